"""What each op means, in plain PyTorch.

Any float dtype, any device, differentiable any number of times, no cleverness: the tests compare every kernel with these
functions in float64, and double backward runs through them. Names and signatures equal those of the ops.
"""

from importlib import import_module
from typing import Any

from madkernels import OPS

for _op, _functions in OPS.items():
    _module = import_module(f"{__name__}.{_op}")
    globals().update({name: getattr(_module, name) for name in _functions})


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
