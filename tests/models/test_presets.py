"""Families at any size, and the named models."""

from __future__ import annotations

import re

import pytest
import torch

from madkernels.models import HybridLM, counting
from madkernels.models.layers.swiglu import SwiGLU
from madkernels.models.presets import FAMILIES, PRESETS, SIZES, architecture, preset

NAMED = {"70m": 70e6, "125m": 125e6, "350m": 350e6, "1b": 1e9, "3b": 3e9, "7b": 7e9}


def mixers(family: str, blocks: int) -> list[str]:
    return [layer.name for layer in architecture(family, 64, blocks).layers[::2]]


def test_every_block_is_a_sequence_mixer_and_a_channel_mixer() -> None:
    for family in FAMILIES:
        layers = [layer.name for layer in architecture(family, 128, 4).layers]
        assert len(layers) == 8
        if family != "mamba":
            assert set(layers[1::2]) <= {"swiglu", "moe"}
            assert not set(layers[::2]) & {"swiglu", "moe"}
    assert {layer.name for layer in architecture("mamba", 128, 4).layers} == {"mamba"}


@pytest.mark.parametrize(
    ("blocks", "wanted"),
    [
        (1, "A"),
        (2, "HA"),
        (3, "HHA"),
        (4, "HHHA"),
        (6, "HHHAHH"),
        (8, "HHHAHHHA"),
    ],
)
def test_stripes(blocks: int, wanted: str) -> None:
    assert mixers("striped-hyena", blocks) == [{"A": "attention", "H": "hyena"}[letter] for letter in wanted]


def test_templates_are_filled_for_the_width() -> None:
    template = "hyena:horizon={seqlen} swiglu attention:heads={dim/32} moe:hidden={hidden/2}"
    wide = architecture(template, 512, 2, seqlen=1024)
    assert str(wide) == "hyena:horizon=1024 swiglu attention moe:hidden=688"
    narrow = architecture(template, 16, 2, seqlen=1024)
    assert str(narrow) == "hyena:horizon=1024 swiglu attention:heads=1 moe:hidden=32"
    assert str(architecture("attention:heads={dim/64}", 320, 1)) == "attention:heads=5 attention:heads=5"
    assert str(architecture("swiglu:hidden={dim*3}", 32, 1)) == "swiglu:hidden=96 swiglu:hidden=96"


def test_heads_divide_the_width() -> None:
    assert str(architecture("attention:heads={dim/64} mlp", 224, 1)) == "attention:heads=2 mlp"


def test_the_hidden_width_is_that_of_swiglu() -> None:
    for dim in (32, 100, 640, 4096):
        (moe, _) = architecture("moe:hidden={hidden/1} swiglu", dim, 1).layers
        assert dict(moe.options)["hidden"] == SwiGLU(dim).hidden


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", [2, 6])
def test_families_run_at_small_sizes(family: str, blocks: int) -> None:
    torch.manual_seed(0)
    lm = HybridLM(architecture(family, 32, blocks, seqlen=16), vocab_size=16, dim=32)
    assert lm(torch.randint(16, (2, 16))).isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_near_the_name(name: str) -> None:
    with torch.device("meta"):
        lm = preset(name).model()
    assert {p.device.type for p in (*lm.parameters(), *lm.buffers())} == {"meta"}
    used = counting.active_params(lm) if "moe" in name else counting.params(lm)
    assert used == pytest.approx(NAMED[name.rpartition("-")[2]], rel=0.15)


def test_presets_cover_all_families_and_sizes() -> None:
    assert len(PRESETS) == len(FAMILIES) * len(SIZES)
    assert preset("striped-hyena-7b").blocks == 32
    assert preset("striped-hyena-7b").dim == 4096
    assert all(p.blocks % 4 == 0 and p.dim % 64 == 0 for p in PRESETS.values())


def test_moe_costs_a_token_what_swiglu_does() -> None:
    def flops(family: str) -> float:
        with torch.device("meta"):
            return counting.flops_per_token(HybridLM(architecture(family, 768, 4), vocab_size=16, dim=768), 2048)

    assert flops("striped-hyena-moe") == pytest.approx(flops("striped-hyena"), rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_two_for_each_parameter_and_a_little(family: str) -> None:
    """What is not a product with a weight, such as scores, scans and transforms, is little at this width and length."""
    with torch.device("meta"):
        lm = HybridLM(architecture(family, 512, 4, seqlen=128), vocab_size=1000, dim=512, tied=True)
    assert 0.99 < counting.flops_per_token(lm, 128) / (2 * counting.active_params(lm)) < 1.05


@pytest.mark.parametrize(
    ("text", "dim", "blocks", "message"),
    [
        ("striped-hyna", 64, 2, "unknown layer 'striped-hyna'.*families are transformer"),
        (
            "attention:heads={width/64}",
            64,
            2,
            "{width/64} is not known; a template takes {dim/N}, {dim[*]N}, {hidden/N} and ",
        ),
        ("published:striped-hyna", 64, 2, "unknown published architecture 'striped-hyna'.*did you mean striped-hyena?"),
        ("published:", 64, 2, "unknown published architecture ''; there are transformer"),
        ("published:gla", 40, 2, "published:gla takes widths that are multiples of 16, not 40"),
        ("attention:heads={dim}", 64, 2, "{dim} is not known"),
        ("attention:heads={dim/0}", 64, 2, "{dim/0} is not known"),
        ("attention:heads={dim/64", 64, 2, "takes a whole number"),
        ("hyena", 0, 2, "dim is 0; expected a whole number from 1"),
        ("hyena", 64, 0, "blocks is 0; expected a whole number from 1"),
    ],
)
def test_refusals(text: str, dim: int, blocks: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        architecture(text, dim, blocks)


def test_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"no preset 'hyena-2b'; .* as in striped-hyena-70m; families are transformer"):
        preset("hyena-2b")
