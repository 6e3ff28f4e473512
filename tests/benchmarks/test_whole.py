"""Cases of model sizes, layers and models, and comparison with another run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from fakes import FixedRates
from torch import Tensor
from typer.testing import CliRunner

import madkernels
from madkernels import OPS
from madkernels.benchmarks import harness, layers, models, sizes
from madkernels.benchmarks.causal_conv import BENCHMARK as CONV, ConvCase
from madkernels.benchmarks.harness import Peer, benchmark_of, measure, too_slow
from madkernels.benchmarks.moe_mlp import MoeCase
from madkernels.benchmarks.plain import PLAIN, modules_with_ops, plain_fft_conv, plain_ops, plain_scan
from madkernels.benchmarks.sizes import Size, seqlens, size_of
from madkernels.cli.bench import bench
from madkernels.models.layers import LAYERS, hyena, mamba
from madkernels.models.presets import preset
from madkernels.reference.fft_conv import fft_conv
from madkernels.reference.selective_scan import selective_scan

app = typer.Typer()
app.command()(bench)

SMALL = Size("small", 64, 2, 40)
CASE = {"name": "small", "batch": 1, "seqlen": 12, "dim": 6, "width": 3}
MACHINE = {"cpu": "some", "threads": "2"}


@pytest.fixture(autouse=True)
def fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Rates", FixedRates)
    monkeypatch.setattr("madkernels.benchmarks.machine.describe", lambda: MACHINE | {"torch": "2"})


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments, "--threads", "1"], env={"COLUMNS": "300"}, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_case_of_each_size(op: str) -> None:
    of_model = benchmark_of(op).of_model
    assert of_model, f"benchmarks/{op}.py: BENCHMARK has no of_model"
    for name in sizes.NAMES:
        case = of_model(size_of(name, "cpu"))
        assert case.name == name
        assert case.arithmetic("forward") > 0
        assert case.shortened().work() < case.work()
        assert of_model(size_of(name, "cuda")).tokens > case.tokens or name == "mad"


def test_sizes_are_those_of_presets() -> None:
    size = size_of("7b", "cpu")
    assert (size.dim, size.batch, size.seqlen) == (4096, 1, 1024)
    attention, scan = (benchmark_of(op).of_model(size) for op in ("attention", "selective_scan"))  # type: ignore[misc]
    assert attention.heads == 4096 // 64  # type: ignore[attr-defined]
    assert (scan.dim, scan.dstate) == (8192, 16)  # type: ignore[attr-defined]
    assert str(size.spec("moe")) == "moe:hidden=5472"
    assert size_of("7b", "cpu", 128).batch == 8
    assert (size_of("mad", "cpu").batch, size_of("mad", "cpu").dim) == (128, 128)
    assert seqlens("1k,300,2K".lower()) == [1024, 300, 2048]


def test_slow_peers_are_told_and_not_timed() -> None:
    def slow(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        calls.append(x.shape[1])
        return CONV.function(x, weight, **options)

    calls: list[int] = []
    case = ConvCase(name="some", batch=1, seqlen=800, dim=4, width=3)
    found = too_slow(case, torch.float32, False, [Peer("slow", slow)], torch.device("cpu"), limit=0.0)
    assert found["slow"].startswith("skipped: about 0 s a call")
    assert calls == [100, 100]
    measured = measure(replace(CONV), case, [torch.float32], ["forward"], [Peer("slow", slow)], runs=1, limit=0.0)
    assert {result.contender for result in measured.results} == {"madkernels"}
    assert not too_slow(case, torch.float32, False, [Peer("slow", slow)], torch.device("cpu"), limit=60.0)


def test_all_ops_at_a_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sizes, "load_protocol", lambda _: pytest.fail("not asked for"))
    monkeypatch.setattr(sizes, "SIZES", {"70m": (64, 4, 1e-3)})
    monkeypatch.setattr(sizes, "TOKENS", {"cpu": 32})
    monkeypatch.setattr("madkernels.cli.bench.LONGEST", 0.0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which takes long
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    text = run("--preset", "70m", "--quick", "--json", str(out), "--plot", str(picture))
    table = text[text.index("All cases") :]
    assert all(table.count(f" {op} ") == 2 for op in OPS)  # forward and backward
    assert "a call" in table
    record = json.loads(out.read_text())
    assert [case["op"] for case in record["cases"]] == list(OPS)
    assert picture.read_text().startswith("<?xml")


def test_lengths_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "SIZES", {"70m": (64, 4, 1e-3)})
    text = run("causal_conv", "--preset", "70m", "--seqlen", "16,32", "--quick", "--peers", "none", "--pass", "fwd")
    assert "70m-16: batch 64, seqlen 16" in text
    assert "70m-32: batch 32, seqlen 32" in text


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_on_plain_torch_are_the_same(layer: str) -> None:
    """And their decoding steps; gated in float64 at a length that divides nothing."""
    whole, step = layers.benchmarks_of(layer, replace(SMALL, batch=1, seqlen=13))
    for benchmark, passes in ((whole, ("forward", "backward")), (step, ("forward",))):
        case = benchmark.training
        plain = [peer for peer in benchmark.peers if peer.name == "plain"]
        gate = harness.gate_of(benchmark, case, torch.float64, harness.inputs_of(case, torch.float64, harness.CPU))
        absent: dict[str, str] = {}
        runners = list(harness.contenders(benchmark, case, torch.float64, passes, plain, gate, absent))
        assert not absent
        assert len(runners) == len(passes) * (1 + len(plain))
        assert all(runner.result.error < 1e-10 for runner in runners)


def test_plain_ops_are_put_back() -> None:
    with plain_ops():
        assert mamba.selective_scan is PLAIN["selective_scan"]
        assert hyena.fft_conv is PLAIN["fft_conv"]
        assert not modules_with_ops()
    assert mamba.selective_scan is madkernels.selective_scan
    assert hyena.fft_conv is madkernels.fft_conv


def test_plain_ops_continue_a_state() -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u, delta, B, C = randn(2, 19, 6), randn(2, 19, 6), randn(2, 19, 4), randn(2, 19, 4)
    options: dict[str, Any] = {"return_final_state": True, "initial_state": randn(2, 6, 4)}
    inputs = (u, delta, -randn(6, 4).exp(), B, C, randn(6), u.sin(), randn(6), True)
    torch.testing.assert_close(plain_scan(*inputs, **options), selective_scan(*inputs, **options))
    for history, taps in ((0, 5), (4, 5), (30, 26)):
        options = {"initial_state": randn(2, history, 6), "return_final_state": True, "pre_gate": u.cos(), "skip": randn(6)}
        filter = randn(3, taps)
        ours, state = plain_fft_conv(u, filter, **options)
        theirs, wanted = fft_conv(u, filter, **options)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(state, wanted)


@pytest.mark.parametrize("family", ["striped-hyena-moe", "mamba"])
def test_models(family: str) -> None:
    """Forward and training step: losses and gradients' norms of both, and what is told of them."""
    text = run("model", f"{family}-70m", "--quick", "--peers", "plain", "--dtype", "float32")
    for words in ("training step, in ms", "forward, with its loss, in ms", "MFU", "tokens/s", "peak MiB"):
        assert words in text
    assert "wrong" not in text
    assert "not run" not in text


def test_training_leaves_parameters_as_they_were() -> None:
    small = replace(preset("mamba-70m"), dim=32, blocks=1, vocab_size=50)
    _, training = models.benchmarks_of(small, Size("small", 32, 1, 9))
    case = training.training
    inputs, options = case.make_inputs(torch.float32), case.options
    before = {name: value.clone() for name, value in inputs.items()}
    first, second = (training.function(**inputs, **options) for _ in range(2))
    assert torch.equal(first, second)
    assert first[1] > 0
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    assert case.flops("forward") == 3 * models.benchmarks_of(small, Size("small", 32, 1, 9))[0].training.flops("forward")


def test_a_model_that_has_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "memory_bytes", lambda: 1 << 30)
    with pytest.raises(ValueError, match=r"mamba-7b needs \d+ GiB to be trained, and more for activations; there are 1 GiB"):
        run("model", "mamba-7b")


def test_large_experts_are_checked_with_fewer() -> None:
    sizes: dict[str, Any] = {"batch": 1, "seqlen": 512, "dim": 4096, "hidden": 5472, "experts": 8, "top_k": 2}
    case = MoeCase(name="7b", **sizes)
    stand_in = case.checked_as
    assert isinstance(stand_in, MoeCase)
    assert (stand_in.experts, stand_in.seqlen) == (2, 256)
    small = replace(case, dim=64)
    assert small.checked_as is small


def test_a_wrong_layer_is_not_timed() -> None:
    whole, _ = layers.benchmarks_of("mlp", SMALL)
    wrong = replace(whole, function=lambda x, **rest: 1.001 * layers.layer_output(x, **rest))
    measured = measure(wrong, whole.training, [torch.float32], ["forward"], [], runs=1)
    assert not measured.results[0].right
    assert not measured.results[0].seconds


def baseline(folder: Path, **changes: Any) -> str:
    """A file of a run of CASE, a forward of which took a second."""
    timing = {"lower_quartile": 1.0, "median": 1.0, "upper_quartile": 1.0} | changes.pop("timing", {})
    result = {"contender": "madkernels", "dtype": "float32", "direction": "forward", "seconds": [1.0]} | timing
    whole = ConvCase(name="x", batch=1, seqlen=1, dim=1, width=1)
    fields = {**whole.__dict__, **CASE}
    record = {"schema": 1, "op": "causal_conv", "machine": MACHINE, "cases": [{"case": fields, "results": [result]}]}
    path = folder / "baseline.json"
    path.write_text(json.dumps(record | changes))
    return str(path)


def compare(folder: Path, code: int = 0, **changes: Any) -> str:
    shapes = folder / "shapes.json"
    shapes.write_text(json.dumps([CASE]))
    file = baseline(folder, **changes)
    return run("causal_conv", "--shapes", str(shapes), "--peers", "none", "--pass", "fwd", "--baseline", file, code=code)


def test_a_faster_run_than_the_baseline(tmp_path: Path) -> None:
    assert "faster" in compare(tmp_path)


def test_a_slower_run_than_the_baseline(tmp_path: Path) -> None:
    times = dict.fromkeys(("lower_quartile", "median", "upper_quartile"), 1e-9)
    text = compare(tmp_path, code=1, timing=times)
    assert "slower than the baseline, quartiles apart: causal_conv small, float32 forward:" in text


def test_quartiles_that_overlap_are_no_regression(tmp_path: Path) -> None:
    text = compare(tmp_path, timing={"lower_quartile": 1e-9, "median": 1e-9, "upper_quartile": 60.0})
    assert "/ baseline" in text
    assert "slower" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine": MACHINE | {"cpu": "other"}}, "cpu is other there, some here"),
        ({"machine": MACHINE | {"threads": "1"}}, "threads is 1 there, 2 here"),
        ({"machine": MACHINE | {"gpu": "H100"}}, "gpu is H100 there, None here"),
        ({"cases": []}, "it has none of the cases; its cases are none"),
        ({"op": "fft_conv"}, "it has none of the cases; its cases are fft_conv small"),
        ({"cases": 3}, "not a file of madkernels bench --json"),
    ],
)
def test_baselines_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compare(tmp_path, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected an op, or --preset for all"),
        (["causal_conv", "--preset", "7bb"], "--preset: no size '7bb'; expected mad, 70m.*; did you mean 7b?"),
        (["causal_conv", "--seqlen", "1k"], "--seqlen: lengths go with a --preset"),
        (["causal_conv", "--preset", "7b", "--seqlen", "1m"], "--seqlen: '1m' is no list of lengths"),
        (["causal_conv", "--preset", "7b", "--shapes", "bare"], "--preset and --shapes: expected one of them"),
        (["layer"], "bench layer: expected a layer, such as attention:heads=8"),
        (["layer", "hyenna"], "unknown layer 'hyenna'.*did you mean hyena"),
        (["layer", "hyena mlp"], "'hyena mlp' has several layers"),
        (["layers", "--warm"], "layers: --shapes and --warm are of ops"),
        (["model", "mamba-71m"], "no preset 'mamba-71m'"),
        (["model", "mamba-70m", "--preset", "1b"], "--preset: a model has its own size"),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*arguments)


def test_ops_and_layers_have_one_record(tmp_path: Path) -> None:
    """Of a layer and its step each has a name of its own, so that a baseline tells them apart."""
    out = tmp_path / "out.json"
    text = run("layer", "hyena", "--quick", "--peers", "plain", "--json", str(out))
    assert [case["op"] for case in json.loads(out.read_text())["cases"]] == ["hyena", "hyena step"]
    assert "decoding step, in ms" in text
