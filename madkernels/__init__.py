"""Kernels for hybrid language models, and the MAD pipeline that designs them.

The ops load when one is first asked for (`madkernels.selective_scan`, or `import madkernels.ops`, which registers
`torch.ops.madkernels`), so that the command line can say what is wrong where the extension does not load.
"""

from typing import TYPE_CHECKING, Any

from madkernels._version import __version__

if TYPE_CHECKING:
    from madkernels.ops.causal_conv import causal_conv, causal_conv_step
    from madkernels.ops.fft_conv import fft_conv, fft_conv_step
    from madkernels.ops.selective_scan import selective_scan, selective_scan_step

__all__ = [
    "__version__",
    "causal_conv",
    "causal_conv_step",
    "fft_conv",
    "fft_conv_step",
    "selective_scan",
    "selective_scan_step",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from madkernels import ops

    return getattr(getattr(ops, name.removesuffix("_step")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
