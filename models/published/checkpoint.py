"""Folders as transformers writes them: `config.json`, and `model.safetensors` or its shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from madkernels.models.pretrained import CONFIG, WEIGHTS

INDEX = "model.safetensors.index.json"


class Config:
    """A configuration, and where it is from, for messages."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def required(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ValueError(f"{self.where} does not say {key!r}")
        return self.values[key]

    def get(self, key: str, default: Any) -> Any:
        """The value; the default where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def expect(self, key: str, only: Any) -> None:
        """Raises ValueError unless the value, where there is one, is the only one that the layers know."""
        if self.get(key, only) != only:
            raise ValueError(f"{self.where}: {key} is {self.values[key]!r}; the layers here know {only!r} alone")


def read(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """Its configuration and its tensors; raises ValueError with what is wrong with the folder."""
    config = Config(_json(folder / CONFIG), str(folder / CONFIG))
    weights: dict[str, Tensor] = {}
    for name in _files(folder):
        try:
            weights |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / name} cannot be read: {error}") from None
    return config, weights


def _files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}; weights in other formats are not read")
    names = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
    for name in names:
        if name != Path(name).name:
            raise ValueError(f"{folder / INDEX} names {name!r}; expected files of the folder")
    return names


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is no JSON object")
    return found


def _number(value: dict[str, Any]) -> Any:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
