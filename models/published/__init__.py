"""Checkpoints that others publish, as models here, and back."""

from madkernels.models.published.convert import FAMILIES, from_hf, to_hf

__all__ = ["FAMILIES", "from_hf", "to_hf"]
