"""Small fused functions, in Triton on a GPU and in plain torch elsewhere."""

from madkernels.fused.cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
