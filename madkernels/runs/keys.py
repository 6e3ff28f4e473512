"""What makes a run that run and no other: a hash of all that its result depends on."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

from madkernels._version import __version__
from madkernels.models.layers import user_layers
from madkernels.models.presets import layers_of


class Keyed:
    """A run with a configuration."""

    def config(self) -> dict[str, Any]:
        """All that the result depends on, as JSON."""
        raise NotImplementedError

    @cached_property
    def _key(self) -> str:
        return hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode()).hexdigest()

    def key(self) -> str:
        """A hash of `config`: a changed option is another run."""
        return self._key


def code_of(arch: str) -> dict[str, Any]:
    """The version of the code, and the hashes of the layers from outside that an architecture has."""
    own = {name: digest for name, digest in user_layers().items() if name in {s.name for s in layers_of(arch)}}
    return {"version": __version__} | ({"layers": own} if own else {})
