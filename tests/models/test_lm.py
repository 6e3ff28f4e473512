"""The language model, the auto-encoder, and what they cost."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from checks import relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from madkernels.models import AutoEncoder, HybridLM, counting
from madkernels.models.autoencoder import sinusoids
from madkernels.models.init import parameter_groups

ALL = "mamba swiglu hyena mlp attention:heads=4 moe sliding-attention:heads=4,window=3"


def model(arch: str = ALL, **options: object) -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(arch, **{"vocab_size": 16, "dim": 32} | options)


def tokens(batch: int, seqlen: int) -> torch.Tensor:
    return torch.randint(16, (batch, seqlen), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_generation_is_the_argmax_of_the_whole_sequence() -> None:
    lm = model()
    out = lm.generate(tokens(2, 5), 6)
    assert out.shape == (2, 11)
    for t in range(5, 11):
        assert torch.equal(out[:, t], lm(out[:, :t])[:, -1].argmax(-1))


def test_sampling_follows_its_generator() -> None:
    lm, prompt = model(), tokens(2, 5)
    runs = [lm.generate(prompt, 8, temperature=2.0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_generation_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="a prompt of one token"):
        model().generate(tokens(2, 0), 3)


def test_packed_documents() -> None:
    lm, text = model(), tokens(1, 20)
    packed = lm(text, cu_seqlens=torch.tensor([0, 6, 20], dtype=torch.int32))
    apart = torch.cat([lm(text[:, :6]), lm(text[:, 6:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; expected a whole number from 1"),
        ({"dim": 0}, "dim is 0; expected a whole number from 1"),
        ({"dim": 2.0}, "dim is 2.0; expected a whole number from 1"),
    ],
)
def test_refuses_sizes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model("mlp", **options)
    with pytest.raises(ValueError, match=message):
        AutoEncoder("mlp", **{"vocab_size": 16, "dim": 32, "seqlen": 4} | options)
    with pytest.raises(ValueError, match="seqlen is 0; expected"):
        AutoEncoder("mlp", vocab_size=16, seqlen=0)


def test_refuses_tokens_that_are_none() -> None:
    lm = model("mlp")
    for bad in (tokens(2, 5).float(), tokens(2, 5)[0]):
        with pytest.raises(ValueError, match=r"tokens has dtype .*; expected int64 \(batch, seqlen\)"):
            lm(bad)
        with pytest.raises(ValueError, match="expected int64"):
            lm.generate(bad, 1)
        with pytest.raises(ValueError, match="expected int64"):
            AutoEncoder("mlp", vocab_size=16, dim=32, seqlen=5)(bad)
    with pytest.raises(ValueError, match=r"max_new_tokens is 2 and temperature -1.0; expected both from 0"):
        lm.generate(tokens(2, 5), 2, temperature=-1.0)
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        lm.generate(tokens(2, 5), -1)


@torch.no_grad()
def test_residual_blocks_are_pre_norm() -> None:
    lm, text = model("mlp swiglu").double(), tokens(2, 5)
    for norm in (*lm.backbone.norms, lm.backbone.norm):
        norm.weight.uniform_(0.5, 2)

    def normed(x: torch.Tensor, norm: torch.nn.RMSNorm) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight

    x = lm.embedding.weight[text]
    for norm, layer in zip(lm.backbone.norms, lm.backbone.layers, strict=True):
        x = x + layer(normed(x, norm))
    wanted = normed(x, lm.backbone.norm) @ lm.unembedding.weight.T + lm.unembedding.bias
    torch.testing.assert_close(lm(text), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_learns_a_sequence_by_heart(bfloat16: bool) -> None:
    lm, text = model("mamba:dstate=4 moe:hidden=16 attention:heads=4 mlp"), tokens(2, 9)
    optimizer = torch.optim.AdamW(parameter_groups(lm, 0.1), lr=1e-2)
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = lm(text[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3  # a guess is log 16 = 2.8


@torch.no_grad()
def test_a_residual_in_float32_keeps_what_bfloat16_loses() -> None:
    """16 layers that each add little to the embedding; steps, too."""
    errors = []
    for float32 in (False, True):
        torch.manual_seed(0)
        lm = HybridLM("16*mlp", vocab_size=16, dim=32, float32_residual=float32)
        lm.embedding.weight.mul_(500)
        text = tokens(1, 9)
        logits = lm.bfloat16()(text)
        step = lm.step(text[:, 0], lm.init_state(1))
        exact = lm.double()(text)
        assert logits.dtype == torch.bfloat16
        errors.append(relative_error(logits.double(), exact))
        assert relative_error(step.double(), exact[:, 0]) < 1.5 * errors[-1]
    assert errors[1] < 0.5 * errors[0]


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = model(tied=True), model()
    assert tied.unembedding.weight is tied.embedding.weight
    assert counting.params(untied) - counting.params(tied) == 16 * 32 + 16


@pytest.mark.parametrize("documents", [1, 2])
def test_a_packed_row_of_no_tokens(documents: int) -> None:
    lm = model()
    logits = lm(tokens(1, 0), cu_seqlens=torch.zeros(documents + 1, dtype=torch.int32))
    logits.sum().backward()
    assert logits.shape == (1, 0, 16)
    assert not any(p.grad.any() for p in lm.parameters() if p.grad is not None)


@torch.no_grad()
def test_states_are_continued_more_than_once() -> None:
    """As beams and shared prompts do: a copy of the dicts is a copy of the states."""
    lm, text = model(), tokens(2, 9)
    states = lm.init_state(2)
    lm(text[:, :5], states=states)
    for path in (text[:, 5:], text[:, 5:].flip(1)):
        own = [dict(state) for state in states]
        steps = torch.stack([lm.step(path[:, t], own) for t in range(4)], 1)
        torch.testing.assert_close(steps, lm(torch.cat([text[:, :5], path], 1))[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False, None])
def test_models_are_whole_after_the_meta_device(tied: bool | None, dtype: torch.dtype) -> None:
    """And tied embeddings are still one parameter."""

    def build() -> HybridLM | AutoEncoder:
        return AutoEncoder(ALL, vocab_size=16, dim=32, seqlen=9) if tied is None else model(tied=tied)

    whole, text = build().to(dtype), tokens(2, 9)
    with torch.device("meta"):
        empty = build().to(dtype)
    empty.to_empty(device="cpu").load_state_dict(whole.state_dict())
    assert torch.equal(empty(text), whole(text))
    assert counting.params(empty) == counting.params(whole)
    with torch.device("meta"):
        empty = build().to(dtype)
    empty.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(empty(text), whole(text))
    assert counting.params(empty) == counting.params(whole)


def test_positions_of_the_autoencoder() -> None:
    """To all digits, whatever dtype the model came through."""
    coder = AutoEncoder("mlp", vocab_size=16, dim=32, seqlen=100).to(torch.bfloat16).double()
    seen: list[torch.Tensor] = []
    coder.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    text = tokens(1, 100)
    coder(text)
    found = seen[0][0] - coder.backbone(coder.embedding(text))[0, -1]
    for t in (0, 1, 99):
        for i in (0, 1, 15):
            angle = t * 10000 ** (-2 * i / 32)
            assert abs(found[t, 2 * i] - math.sin(angle)) < 1e-13
            assert abs(found[t, 2 * i + 1] - math.cos(angle)) < 1e-13


def test_autoencoder_decodes_from_the_last_vector() -> None:
    torch.manual_seed(0)
    coder = AutoEncoder("attention:heads=4 mlp", vocab_size=16, dim=32, seqlen=12)
    seen = []
    coder.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    text = tokens(2, 12)
    logits = coder(text)
    assert logits.shape == (2, 12, 16)
    code = coder.backbone(coder.embedding(text))[:, -1]
    assert torch.equal(seen[0], code.unsqueeze(1) + sinusoids(12, code))
    with pytest.raises(ValueError, match="tokens has length 11; this auto-encoder was built for 12"):
        coder(text[:, :11])


@pytest.mark.parametrize("lm", [model(), copy.deepcopy(model())], ids=["built", "copied"])
def test_parameter_groups(lm: HybridLM) -> None:
    decayed, kept = parameter_groups(lm, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in lm.named_parameters()}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert {names[id(p)] for p in decayed["params"]} | kept_names == set(names.values())
    for name in names.values():
        vector = any(part in name for part in ("norm", "bias", "A_log", ".D", "skip", "frequency"))
        assert (name in kept_names) == vector, name


# ---- counts, each against one made another way


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        # the published layers' counts at width 128
        ("attention", 66_048),
        ("sliding-attention", 66_048),
        ("attention:heads=8,kv_heads=2,head_dim=32,bias=false", 128 * (8 + 2 * 2) * 32 + 8 * 32 * 128),
        ("swiglu:hidden=64,bias=true", 3 * 128 * 64 + 2 * 64 + 128),
        ("mamba:dstate=4,rank=2,bias=true,conv_bias=false", 107_264 + (512 + 128) - 256 + (2 - 8) * 2 * 256),
        ("mamba:dstate=4", 107_264),
        ("mlp", 131_072),
        ("swiglu", 135_168),
        ("linear-attention", 65_824),
        ("linear-attention:heads=1", 131_584),
        ("gated-linear-attention", 86_160),
        ("gated-linear-attention:heads=1", 86_272),
        ("rwkv5-time-mixer", 82_944),
        ("rwkv6-time-mixer", 140_544),
        ("rwkv-channel-mixer", 147_712),
        # by hand: router, 8 experts of three matrices
        ("moe", 128 * 8 + 8 * 3 * 128 * 128),
        # by hand: projections, short convolution, filter network and its frequencies, skip
        (
            "hyena",
            (128 * 384 + 384) + (512 * 128 + 128) + 1536 * (3 + 1) + (3 * 4 + 4) + 2 * (4 * 4 + 4) + 4 + 4 * 512 + 512,
        ),
        ("hyena:modal=true", (128 * 384 + 384) + (512 * 128 + 128) + 1536 * (3 + 1) + 512 * (4 * 2 + 4 * 2 + 1)),
        ("mh-hyena", 4 * (128 * 128 + 128) + 384 * (3 + 1) + (3 * 2 + 2) + 2 * (2 * 2 + 2) + 2 + 2 * 16 + 16),
        (
            "hyena-experts",
            3 * (128 * 128 + 128)
            + 384 * (3 + 1)
            + (3 * 16 + 16)
            + 2 * (16 * 16 + 16)
            + 16
            + 16 * 128
            + 128
            + 128 * 8
            + 16 * 128
            + 128,
        ),
    ],
)
def test_parameters(arch: str, expected: int) -> None:
    lm = HybridLM(arch, vocab_size=16, dim=128)
    embeddings_and_norms = 16 * 128 + (16 * 128 + 16) + 2 * 128
    assert counting.params(lm) == expected + embeddings_and_norms


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    lm = HybridLM("attention moe:experts=8,top_k=2,hidden=64", vocab_size=16, dim=128)
    assert counting.params(lm) - counting.active_params(lm) == 6 * 3 * 128 * 64


@pytest.mark.parametrize(
    ("arch", "not_matrices"),
    [
        ("attention", lambda n: 2 * 16 * n * n),  # softmax
        ("attention:heads=8,kv_heads=2,head_dim=32,bias=false", lambda n: 2 * 8 * n * n),
        ("mlp", lambda n: 0),
        ("swiglu", lambda n: 0),
        ("moe", lambda n: 0),
        ("mamba:dstate=4", lambda n: n * (2 * 256 * 4 + 2 * 256 * 4)),  # short convolution, scan
        ("hyena", lambda n: 10 * n * math.log2(n) * 512 + n * 512 * (6 * 3 + 4)),  # transforms, short convolution, gates
        ("hyena:modal=true", lambda n: 10 * n * math.log2(n) * 512 + n * 512 * (6 * 3 + 4)),
        ("mh-hyena:heads=32", lambda n: 10 * n * math.log2(n) * 512 + n * (128 * 6 * 3 + 4 * 512)),  # by convolutions
        ("hyena-experts", lambda n: 10 * n * math.log2(n) * 128 + n * 128 * (6 * 3 + 4)),
        ("hyena-se", lambda n: n * 128 * (6 * 3 + 2 * 7 + 4)),
        ("rwkv-channel-mixer", lambda n: 0),
    ],
)
def test_flops_against_torchs_count(arch: str, not_matrices: object) -> None:
    """Torch counts what goes through matrix products; the rest is added here from the formula."""
    seqlen = 64
    lm = HybridLM(arch, vocab_size=16, dim=128)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lm(tokens(1, seqlen))
    counted = counter.get_total_flops() + not_matrices(seqlen)
    ours = counting.flops_per_token(lm, seqlen) * seqlen
    if order := {"hyena": 4, "mh-hyena:heads=32": 2, "hyena-experts": 16}.get(arch):  # the formula has a linear layer for it
        filter_network = 2 * seqlen * (3 * order + 2 * order * order)
        counted -= filter_network
    assert ours == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize(
    ("arch", "a_token"),
    [
        ("linear-attention", 2 * (4 * 128 * 128 + 16 * 4 * 8 * 8) + 4 * 16 * 8 * 8),
        ("gated-linear-attention", 2 * (5 * 128 * 128 + 2 * 128 * 16) + 4 * 8 * 16 * 16),
        ("deltanet", 2 * (4 * 128 * 128 + 128 * 8 + 384 * 4) + 6 * 8 * 16 * 16),
        ("gated-deltanet", 2 * (2 * 128 * 128 + 3 * 128 * 256 + 2 * 128 * 8 + 512 * 4) + 6 * 8 * 16 * 32),
        ("mamba2", 2 * (128 * (512 + 256 + 4) + 256 * 128 + 512 * 4) + 4 * 256 * 128),
        ("mamba2:groups=2,bias=true", 2 * (128 * (512 + 2 * 256 + 4) + 256 * 128 + 768 * 4) + 4 * 256 * 128),
        ("rwkv5-time-mixer", 2 * (5 * 128 * 128 + 4 * 128) + 4 * 8 * 16 * 16),
        ("rwkv6-time-mixer", 2 * (5 * 128 * 128 + 5 * 128 + 10 * 32 * 128 + 2 * 64 * 128) + 4 * 8 * 16 * 16),
    ],
)
def test_flops_of_recurrences(arch: str, a_token: int) -> None:
    """Products by hand, and for each element of the state a multiply-add to write and one to read; looking up is a third."""
    (layer,) = counting.layers(HybridLM(arch, vocab_size=16, dim=128))
    assert layer.flops(64) == 64 * a_token


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("attention", ("k", "v")),
        ("sliding-attention:window=9", ("k", "v")),
        ("attention:heads=8,kv_heads=2,head_dim=32", ("k", "v")),
        ("linear-attention:normalise=false", ("matrix",)),
        ("gated-deltanet", ("matrix",)),
        ("hyena-mr", ("past",)),
        ("hyena:modal=true,expand=1,groups=1", ("modes",)),
        ("mamba", ("scan",)),
        ("mamba2", ("matrix",)),
        ("rwkv6-time-mixer", ("matrix",)),
        ("mlp", ()),
    ],
)
def test_state_against_what_is_kept(arch: str, names: tuple[str, ...]) -> None:
    lm = HybridLM(arch, vocab_size=16, dim=128)
    states = lm.init_state(1)
    lm(tokens(1, 50), states=states)
    assert counting.state_size(lm, 50) == sum(states[0][name].numel() for name in names)


def test_the_papers_total_state() -> None:
    assert counting.state_size(HybridLM("4*mamba:dstate=4", vocab_size=16), 128) == 4096
    assert counting.state_size(HybridLM("2*(hyena swiglu)", vocab_size=16), 128) == 4096
    assert counting.state_size(HybridLM("2*(mh-hyena swiglu)", vocab_size=16), 128) == 4096
    assert counting.state_size(HybridLM("2*(hyena-experts moe)", vocab_size=16), 128) == 4096
    assert counting.state_size(HybridLM("2*(gated-linear-attention swiglu)", vocab_size=16), 128) == 4096
    assert counting.state_size(HybridLM("2*(rwkv5-time-mixer rwkv-channel-mixer)", vocab_size=16), 128) == 4096
    assert counting.state_size(HybridLM("2*(rwkv6-time-mixer rwkv-channel-mixer)", vocab_size=16), 128) == 4096
    assert counting.state_size(HybridLM("2*(deltanet swiglu)", vocab_size=16), 128) == 4096
    assert counting.state_size(HybridLM("hyena:taps=9", vocab_size=16), 128) == 512 * 8
