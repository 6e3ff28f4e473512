"""Published checkpoints as :class:`HybridLM`, and models as checkpoints that transformers reads.

Nothing of a checkpoint is executed: a folder is JSON and safetensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from madkernels.models.lm import HybridLM
from madkernels.models.pretrained import TIED, write
from madkernels.models.published.checkpoint import Config, read
from madkernels.models.published.family import Family
from madkernels.models.published.mamba import FALCON_MAMBA, MAMBA, MAMBA2
from madkernels.models.published.striped_hyena import STRIPED_HYENA
from madkernels.models.published.transformer import LLAMA, MISTRAL, MIXTRAL
from madkernels.names import did_you_mean

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, MIXTRAL, MAMBA, FALCON_MAMBA, MAMBA2, STRIPED_HYENA)
}

NOT_LEARNED = re.compile(r"\.rotary_emb\.inv_freq$")  # frequencies, which the configuration says
UNEMBEDDING = re.compile(r"^(lm_head|(backbone\.)?unembed)\.weight$")


def from_hf(source: Any, *, dtype: torch.dtype | None = None) -> HybridLM:
    """A published checkpoint as a model of the same logits, on the CPU and in eval mode.

    Args:
        source: a folder with `config.json` and `model.safetensors` or its shards, read without transformers; or a model of
            transformers, whose parameters are copied.
        dtype: of the parameters; as they were saved if None.

    Raises:
        ValueError: the folder cannot be read, its family is not one of :data:`FAMILIES`, or its configuration asks for what
            the layers cannot; the message names it.
    """
    if isinstance(source, (str, Path)):
        config, weights = read(Path(source))
    else:
        config = Config(source.config.to_dict(), f"the configuration of {type(source).__name__}")
        weights = {name: t.detach().cpu().clone() for name, t in source.state_dict().items()}
    family = _family(config)
    config.expect("quantization_config", None)
    arch, options = family.read(config)
    sizes = {"vocab_size": config.required("vocab_size"), "dim": config.required("hidden_size")}
    with torch.device("meta"):
        model = HybridLM(arch, **sizes, **options)
    parameters = _parameters(family, model, config, weights)
    try:
        model.load_state_dict(parameters, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{config.where} does not fit the weights: {error}") from None
    return (model if dtype is None else model.to(dtype)).eval()


def to_hf(model: HybridLM, folder: str | Path | None = None, **more: Any) -> Any:
    """The model as a checkpoint with the same logits that transformers loads: in a folder, or, if none is given, loaded and
    returned.

    The family is the one that has these layers. `attention swiglu` over and over is a Llama, `sliding-attention swiglu` a
    Mistral, either with `moe` in the place of `swiglu` a Mixtral; `mamba` is a Mamba, with `projection_norm_eps` a Falcon
    Mamba, `mamba2` a Mamba-2.

    Args:
        model: with equal options in all layers of a kind, and an unembedding that is tied or has no bias.
        folder: where to write; transformers is not needed for that.
        more: further keys of `config.json`, such as `max_position_embeddings`. Tokens at which sequences begin, end or are
            filled up are None unless they are given here.

    Raises:
        ValueError: no family has these layers, or theirs lacks an option; the message names it.
    """
    family, described = _describe(model)
    config = {
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
        **described,
        **{"vocab_size": model.vocab_size, "hidden_size": model.dim, "tie_word_embeddings": model.tied},
        **{"dtype": str(model.embedding.weight.dtype).removeprefix("torch.")},
        **more,
    }
    weights = _tensors(family, model, Config(config, "the configuration"))
    if folder is not None:
        write(Path(folder), config, weights)
        return None
    import transformers

    cls = getattr(transformers, config["architectures"][0])
    return cls.from_pretrained(None, config=cls.config_class(**config), state_dict=weights).eval()


def _family(config: Config) -> Family:
    model_type = config.required("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES) + did_you_mean(model_type, FAMILIES)
        raise ValueError(f"{config.where}: model_type {model_type!r} is not known; expected one of {known}")
    return FAMILIES[model_type]


def _parameters(family: Family, model: HybridLM, config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model, from all tensors of a checkpoint, which are taken out of `weights` one by one."""
    found: dict[str, Tensor] = {}
    for entry in family.entries(model, weights.keys(), config):
        missing = [name for name in entry.theirs if name not in weights]
        if missing:
            raise ValueError(f"{config.where}: the weights lack {missing[0]}")
        found[entry.ours] = entry.join([weights.pop(name) for name in entry.theirs])
    left = {name: t for name, t in weights.items() if not NOT_LEARNED.search(name)}
    if model.tied:
        found[TIED] = found["embedding.weight"]
        for name in filter(UNEMBEDDING.search, list(left)):
            if not torch.equal(left.pop(name), found[TIED]):
                raise ValueError(f"{config.where}: embeddings are tied, and {name} is not the embedding")
    if left:
        raise ValueError(f"{config.where} has no place for these weights: {', '.join(sorted(left))}")
    return found


def _describe(model: HybridLM) -> tuple[Family, dict[str, Any]]:
    """The family that has the model's layers, and its configuration."""
    if model.unembedding.bias is not None:
        raise ValueError("the unembedding has a bias, which no published family has; build with unembedding_bias=False")
    for family in FAMILIES.values():
        if family.describe and (config := family.describe(model)):
            return family, config
    known = ", ".join(name for name, family in FAMILIES.items() if family.describe)
    raise ValueError(f"{model.arch}: none of {known} has these layers")


def _tensors(family: Family, model: HybridLM, config: Config) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    parameters, found = model.state_dict(), dict[str, Tensor]()
    for entry in family.entries(model, (), config):
        assert entry.split
        parts = entry.split(parameters[entry.ours].detach().cpu())
        found |= {name: t.clone(memory_format=torch.contiguous_format) for name, t in zip(entry.theirs, parts, strict=True)}
    return found
