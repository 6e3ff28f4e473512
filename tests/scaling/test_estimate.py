"""What a training takes, against what torch counts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.models import HybridLM
from madkernels.models.counting import embedding_params, training_flops
from madkernels.models.layers import norm
from madkernels.models.presets import PRESETS, preset
from madkernels.scaling.training.estimate import Setup, activations, memory

SMALL = "hyena:expand=1,groups=1,horizon=64 swiglu mamba attention:heads=4 moe:hidden=64 mh-hyena:heads=8 mlp"


def small(arch: str = SMALL) -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(arch, vocab_size=16, dim=64, tied=True)


def tokens(rows: int, seqlen: int) -> Tensor:
    return torch.randint(16, (rows, seqlen), generator=torch.Generator().manual_seed(0))


def plan(*options: str) -> str:
    result = CliRunner().invoke(app, ["train", "plan", *options])
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0
    return re.sub(" +", " ", result.stdout)


# ---- parameters and FLOPs


def test_parameters_of_seven_billion() -> None:
    with torch.device("meta"):
        lm = preset("transformer++-7b").model()
    by_torch = sum(p.numel() for p in lm.parameters())
    attention, swiglu = 4 * 4096**2 + 4 * 4096, 3 * 4096 * 10928
    assert by_torch == 50_304 * 4096 + 32 * (attention + swiglu + 2 * 4096) + 4096
    assert embedding_params(lm) == 50_304 * 4096
    assert f" parameters {by_torch:,}\n" in plan("--preset", "transformer++-7b")


def test_flops_of_a_step_against_torchs_count() -> None:
    rows, seqlen = 2, 32
    lm = small("2*(attention:heads=4 swiglu)")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lm(tokens(rows, seqlen)).sum().backward()
    softmax = 3 * 2 * 2 * 4 * seqlen  # per token: three passes, two layers, 2 H L; torch counts products only
    again = 2 * 2 * seqlen * lm.dim  # the scores, which the backward of attention computes once more
    ours = training_flops(lm, seqlen) - softmax + again
    assert ours * rows * seqlen == pytest.approx(counter.get_total_flops(), rel=1e-6)


# ---- memory


class FusedNorm(torch.autograd.Function):
    """RMSNorm that saves what the fused kernels of GPUs do: its input and the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        ctx.save_for_backward(x, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError


def saved(lm: HybridLM, rows: int, seqlen: int) -> int:
    """Bytes that torch saves for the backward pass of the backbone under autocast."""
    storages: dict[int, torch.UntypedStorage] = {}

    def note(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    x = lm.embedding(tokens(rows, seqlen))
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(note, lambda t: t):
        lm.backbone(x)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("arch", [SMALL, "2*(attention:heads=4 swiglu)", "3*mamba", "hyena-experts moe:hidden=64", "2*mlp"])
def test_activations_against_what_torch_saves(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows more, so that weights, which are saved once, drop out."""
    monkeypatch.setattr(norm, "DEVICES", set())  # a GPU has torch's operators, and its own norm
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight))
    lm, seqlen = small(arch), 256
    measured = saved(lm, 4, seqlen) - saved(lm, 2, seqlen)
    ours = activations(lm, Setup(seqlen, rows=4)) - activations(lm, Setup(seqlen, rows=2))
    assert ours == pytest.approx(measured, rel=0.03)


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    lm, setup = small("2*(attention:heads=4 swiglu)"), {"seqlen": 256, "rows": 2}
    none, selective, full = (activations(lm, Setup(**setup, checkpointing=c)) for c in ("none", "selective", "full"))
    assert full < selective < none
    inputs, scales, swiglu_hidden = 5 * 512 * 64 * 4, 5 * 512 * 4, 176
    again = 2 * 512 * (64 + 4 * swiglu_hidden)  # of SwiGLU: its input, gate and up, silu, their product
    assert full == inputs + scales + again
    attention, swiglu = 2 * 512 * (3 + 1 + 1) * 64 + 512 * 4 * 4, 2 * 512 * (2 * swiglu_hidden + 64)
    assert selective == full + 2 * (attention + swiglu)  # qkv, mixed, its softmax's scale, out; gate and up, down


def test_sharding_divides_what_is_kept_for_each_parameter() -> None:
    lm = small("2*swiglu")
    one, eight = (memory(lm, Setup(16, gpus=gpus)) for gpus in (1, 8))
    params, layer = sum(p.numel() for p in lm.parameters()), 3 * 64 * 176
    assert one["AdamW moments, float32"] == 8 * params
    assert eight["AdamW moments, float32"] == 8 * -(-params // 8)
    gathered = 2 * (16 * 64 + 2 * layer) + 4 * (16 * 64 + 3 * layer)
    assert one["weights, gathered and in bfloat16"] == eight["weights, gathered and in bfloat16"] == gathered
    assert memory(lm, Setup(16, gpus=8, sharding="none"))["gradients, float32"] == 4 * params


# ---- the command


def test_plan_of_a_preset() -> None:
    text = plan("--preset", "striped-hyena-7b", "--gpus", "64", "--tokens", "1e11", "--batch-tokens", "1000000")
    assert " fixed state of a sequence 1,572,864 elements\n" in text  # 24 layers of 4096 channels of 16
    assert " tokens per step 1,048,576 (2 times 524,288)\n" in text
    flops = float(re.findall("per token, training (.*)", text)[0]) * 1e11
    hours = flops / (64 * 989e12 * 0.4) / 3600
    found = re.search(r" time at an MFU of 40% (\d+) h \(([\d,]+) GPU hours\)", text)
    assert found, text
    assert float(found[1]) == pytest.approx(hours, abs=0.6)
    assert float(found[2].replace(",", "")) == pytest.approx(64 * hours, rel=1e-3)
    assert re.search(r"together .* GiB: does not fit in 1 GiB", plan("--preset", "hyena-70m", "--memory", "1"))


def test_plan_of_an_architecture() -> None:
    text = plan("--arch", "2*(mamba swiglu)", "--dim", "256", "--vocab", "256", "--seqlen", "512", "--peak", "1")
    assert " state after 512 tokens 16,384 elements\n" in text
    assert "GPUs: 1, 1 TFLOP/s each\n" in text


def test_the_page_of_presets_holds_what_the_command_prints() -> None:
    table = CliRunner().invoke(app, ["train", "presets"]).stdout
    assert len(table.splitlines()) == 2 + len(PRESETS)
    assert table in (Path(__file__).parents[2] / "docs" / "presets.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --preset, or --arch and --dim"),
        (["--arch", "mamba"], "give --preset, or --arch and --dim"),
        (["--preset", "mamba-7b", "--dim", "64"], "give --preset, or --arch and --dim"),
        (["--preset", "mamba-7"], "no preset 'mamba-7'"),
        (["--preset", "mamba-7b", "--mfu", "0"], "--mfu is 0.0; expected a number above 0"),
    ],
)
def test_refusals(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(*options)
