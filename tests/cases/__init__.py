"""A case of each op that the package names, from the file here that has the op's name."""

from importlib import import_module

from op_cases import OpCase

from madkernels import OPS

CASES: dict[str, OpCase] = {op: import_module(f"{__name__}.{op}").CASE for op in OPS}
