"""Kernels for hybrid language models, and the MAD pipeline that designs them."""

import torch  # first: it loads the libraries that the extension links to

from madkernels import _C  # importing it registers the ops
from madkernels._version import __version__
from madkernels.ops.causal_conv import causal_conv, causal_conv_step
from madkernels.ops.selective_scan import selective_scan, selective_scan_step

__all__ = [
    "__version__",
    "causal_conv",
    "causal_conv_step",
    "selective_scan",
    "selective_scan_step",
]

del torch, _C
