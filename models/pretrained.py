"""Models on disk, as other tools read them: `config.json`, what the model is, and `model.safetensors`, its parameters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from madkernels.models.lm import HybridLM

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE, FORMAT = "madkernels", 1
PLUGIN = "\nA layer that is not of this package has to be added first: --plugin FILE, or add_layer"
OPTIONS = ("unembedding_bias", "norm_eps", "float32_residual")  # which folders of older versions do not say
TIED = "unembedding.weight"  # not stored where it is the embedding


def save_pretrained(model: HybridLM, folder: Path, **more: Any) -> None:
    """Raises OSError where the folder cannot be written."""
    from madkernels import __version__

    weights = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if model.tied:
        del weights[TIED]
    config = {
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "architectures": [type(model).__name__],
        "arch": str(model.arch),
        "vocab_size": model.vocab_size,
        "dim": model.dim,
        "tied": model.tied,
        "unembedding_bias": model.unembedding.bias is not None,
        "norm_eps": model.norm_eps,
        "float32_residual": model.float32_residual,
        "madkernels_version": __version__,
    }
    write(folder, config | more, weights)


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """A folder's two files; raises OSError where they cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # the library lets only the user read it


def from_pretrained(folder: Path) -> HybridLM:
    """Raises ValueError with what is wrong with the folder."""
    from madkernels.models.lm import HybridLM

    config = config_of(folder)
    try:
        options = {key: config[key] for key in OPTIONS if key in config}
        model = HybridLM(config["arch"], vocab_size=config["vocab_size"], dim=config["dim"], tied=config["tied"], **options)
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} does not say {error}") from None
    except ValueError as error:  # such as a layer of a plugin that is not loaded
        raise ValueError(f"{folder / CONFIG}: {error}{PLUGIN}") from None
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    if model.tied and "embedding.weight" in weights:
        weights[TIED] = weights["embedding.weight"]
    try:
        model.load_state_dict(weights, assign=True)  # in the dtype that they were saved in
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: {error}") from None
    return model


def config_of(folder: Path) -> dict[str, Any]:
    """Raises ValueError where there is none, or it is of something else."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("model_type"), config.get("format")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; expected a folder that madkernels wrote") from None
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is damaged: it is no JSON object") from None
    if kind != (MODEL_TYPE, FORMAT):
        raise ValueError(f"{path} is of model_type {kind[0]!r} and format {kind[1]!r}; expected {MODEL_TYPE!r} and {FORMAT}")
    found: dict[str, Any] = config
    return found
