"""The ops: public functions, and what torch needs to know of each (shapes, gradients, autocast). One file per op.

Importing this package registers `torch.ops.madkernels`.
"""

from importlib import import_module
from typing import Any

import torch  # noqa: F401  (first: it loads the libraries that the extension links to)

from madkernels import _C, OPS, cuda  # noqa: F401

for _op in OPS:
    import_module(f"{__name__}.{_op}")
cuda.refuse_where_there_are_none()


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
