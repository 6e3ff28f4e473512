"""The old place of :mod:`madkernels.scaling.training.checkpoint`, for programs that import from here."""

from madkernels.scaling.training.checkpoint import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
