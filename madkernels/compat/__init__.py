"""The ops under names and signatures of other libraries. Nothing is changed in these at import: a call asks for it,
:func:`enable` for a whole library."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from madkernels.names import unknown

LIBRARIES = {"transformers": "madkernels.compat.transformers_models"}  # by the modules that say what is replaced
_replaced: dict[str, list[tuple[Any, str, Any]]] = {}  # by library: owner, name, and what was there


def enable(library: str) -> None:
    """Makes models of another library use the ops: those that are there already and those to come, on the CPU too, until
    :func:`disable`. Twice is as once.

    "transformers" (5.16 or newer): Mamba, Mamba-2, Falcon-Mamba, Jamba, Bamba, Llama, Mistral and Mixtral. Variables of
    their modules are replaced: scans, short convolutions and their steps; what went to torch's
    scaled_dot_product_attention, the default; and experts of the default, "grouped_mm". An implementation that was asked
    for by another name, such as `attn_implementation="eager"`, stays. So does what the ops have not: dropout in attention,
    activations of a convolution other than SiLU, steps whose derivatives are tracked (decode under `torch.no_grad`), a GPU
    for which this build has no kernels.

    Raises:
        ValueError: an unknown library, or a version of it that is not known; nothing is changed then.
        ImportError: the library is not installed.
    """
    _check(library)
    if library not in _replaced:
        replacements = import_module(LIBRARIES[library]).replacements()
        _replaced[library] = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
        for owner, name, ours in replacements:
            setattr(owner, name, ours)


def disable(library: str | None = None) -> None:
    """Undoes :func:`enable`, of one library or of all: each function of theirs is again in its place. The names that
    `compat.transformers.register` makes known stay known.

    Raises:
        ValueError: an unknown library. One that is not enabled is none.
    """
    if library is not None:
        _check(library)
    for name in [library] if library else list(_replaced):
        for owner, attribute, theirs in _replaced.pop(name, []):
            setattr(owner, attribute, theirs)


def _check(library: str) -> None:
    if library not in LIBRARIES:
        raise ValueError(unknown("library", library, LIBRARIES))
