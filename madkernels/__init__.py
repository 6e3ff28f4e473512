"""Kernels for hybrid language models, and the MAD pipeline that designs them.

The ops load when one is first asked for (`madkernels.selective_scan`, or `import madkernels.ops`, which registers
`torch.ops.madkernels`), so that the command line can say what is wrong where the extension does not load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from madkernels._version import __version__

if TYPE_CHECKING:
    from madkernels.ops.attention import attention as attention, attention_step as attention_step
    from madkernels.ops.causal_conv import causal_conv as causal_conv, causal_conv_step as causal_conv_step
    from madkernels.ops.fft_conv import fft_conv as fft_conv, fft_conv_step as fft_conv_step
    from madkernels.ops.glu import glu as glu
    from madkernels.ops.grouped_gemm import grouped_gemm as grouped_gemm
    from madkernels.ops.matrix_scan import matrix_scan as matrix_scan, matrix_scan_step as matrix_scan_step
    from madkernels.ops.moe_mlp import moe_mlp as moe_mlp
    from madkernels.ops.moe_route import (
        RoutingPlan as RoutingPlan,
        moe_combine as moe_combine,
        moe_dispatch as moe_dispatch,
        moe_route as moe_route,
    )
    from madkernels.ops.rms_norm import rms_norm as rms_norm
    from madkernels.ops.selective_scan import selective_scan as selective_scan, selective_scan_step as selective_scan_step
    from madkernels.ops.ssd_scan import ssd_scan as ssd_scan, ssd_scan_step as ssd_scan_step

OPS: dict[str, tuple[str, ...]] = {  # each with its public functions; an op's name is that of its files
    "attention": ("attention", "attention_step"),
    "causal_conv": ("causal_conv", "causal_conv_step"),
    "fft_conv": ("fft_conv", "fft_conv_step"),
    "glu": ("glu",),
    "grouped_gemm": ("grouped_gemm",),
    "matrix_scan": ("matrix_scan", "matrix_scan_step"),
    "moe_mlp": ("moe_mlp",),
    "moe_route": ("moe_route", "moe_dispatch", "moe_combine", "RoutingPlan"),
    "rms_norm": ("rms_norm",),
    "selective_scan": ("selective_scan", "selective_scan_step"),
    "ssd_scan": ("ssd_scan", "ssd_scan_step"),
}
_FOLDERS = ("benchmarks", "fused", "models", "reference", "scaling", "synthetics")
_OWNERS = {function: op for op, functions in OPS.items() for function in functions}

__all__ = ["OPS", "__version__", *_OWNERS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"{__name__}.{name}")
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from madkernels import ops

    return getattr(getattr(ops, _OWNERS[name]), name)


def __dir__() -> list[str]:
    return sorted([*(name for name in globals() if name.startswith("__")), *_FOLDERS, *__all__])
