"""What each op means, in plain PyTorch.

Any float dtype, any device, differentiable any number of times, no cleverness: the tests compare every kernel with these
functions in float64, and double backward runs through them. Signatures equal those of the ops.
"""

from madkernels.reference.causal_conv import causal_conv, causal_conv_step
from madkernels.reference.fft_conv import fft_conv, fft_conv_step
from madkernels.reference.selective_scan import selective_scan, selective_scan_step

__all__ = ["causal_conv", "causal_conv_step", "fft_conv", "fft_conv_step", "selective_scan", "selective_scan_step"]
