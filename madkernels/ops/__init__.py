"""The ops: public functions, and what torch needs to know of each (shapes, gradients, autocast). One file an op.

Importing this package registers `torch.ops.madkernels`.
"""

import torch  # noqa: F401  (first: it loads the libraries that the extension links to)

from madkernels import _C, cuda  # noqa: F401
from madkernels.ops import causal_conv, fft_conv, selective_scan

cuda.refuse_where_there_are_none()

__all__ = ["causal_conv", "fft_conv", "selective_scan"]
