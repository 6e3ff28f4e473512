"""`madkernels bench`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from fakes import FixedRates
from typer.testing import CliRunner

from madkernels import cuda
from madkernels.benchmarks import harness, machine, report
from madkernels.benchmarks.cases import Case
from madkernels.benchmarks.causal_conv import ConvCase
from madkernels.benchmarks.harness import Measured, Result
from madkernels.cli.bench import OPS, _benchmark, bench

app = typer.Typer()
app.command()(bench)

SMALL = [{"name": "small", "batch": 1, "seqlen": 12, "dim": 6, "width": 3, "activation": "silu"}]


@pytest.fixture(autouse=True)
def fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Rates", FixedRates)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def shapes_file(folder: Path, content: Any) -> str:
    path = folder / "shapes.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_prints_the_figures_and_writes_them(tmp_path: Path) -> None:
    out, picture = tmp_path / "new" / "out.json", tmp_path / "out.png"
    shapes = shapes_file(tmp_path, SMALL)
    text = run(
        "causal_conv", "--shapes", shapes, "--dtype", "float32,bfloat16", "--threads", "1", "--json", str(out),
        "--plot", str(picture),
    )  # fmt: skip
    assert "small: batch 1, seqlen 12, dim 6, width 3, activation silu" in text
    for words in ("of the floor", "times the forward", "times float32", "the fastest peer", "times inputs and output"):
        assert words in text
    record = json.loads(out.read_text())
    assert record["schema"] == 1
    assert record["op"] == "causal_conv"
    assert record["machine"]["threads"] == "1"
    (case,) = record["cases"]
    assert case["case"]["dim"] == 6
    contenders = {"madkernels", "reference", "conv1d", "conv1d-channel-first", "shift-and-add"}
    assert {result["contender"] for result in case["results"]} == contenders
    assert all(result["seconds"] and result["minimum"] <= result["median"] for result in case["results"])
    assert case["figures"].keys() == {"float32", "bfloat16"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_threads_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    run("causal_conv", "--shapes", shapes_file(tmp_path, SMALL), "--peers", "none", "--threads", str(before + 1))
    assert torch.get_num_threads() == before


def test_peers_are_chosen_by_name(tmp_path: Path) -> None:
    shapes = shapes_file(tmp_path, SMALL)
    alone = run("causal_conv", "--shapes", shapes, "--peers", "none", "--pass", "fwd")
    assert "conv1d" not in alone
    assert "fastest peer" not in alone
    assert "backward" not in alone
    some = run("causal_conv", "--shapes", shapes, "--peers", "conv1d", "--pass", "fwd")
    assert "conv1d" in some
    assert "shift-and-add" not in some


def test_peers_that_are_absent_are_listed() -> None:
    text = run("selective_scan", "--quick", "--pass", "fwd", "--peers", "transformers")
    assert "not run: transformers: does not take this case" in text  # several groups


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fft"], f"op 'fft' has no benchmark; expected {' or '.join(OPS)}"),
        (["causal_conv", "--dtype", "int8"], "--dtype: 'int8' is not one of float32"),
        (["causal_conv", "--peers", "cudnn"], "causal_conv has no peer 'cudnn'; expected auto, none, or reference"),
        (["causal_conv", "--shapes", "gpt"], "no case 'gpt' of causal_conv; expected mamba-130m"),
        (["causal_conv", "--shapes", "no/such.json"], "--shapes no/such.json: .*No such file"),
        (["causal_conv", "--device", "tpu"], "--device: 'tpu' is not known; expected cpu"),
        (["causal_conv", "--device", "cuda:x"], "--device: 'cuda:x' is not known; expected cpu"),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_a_gpu_that_is_not_there() -> None:
    wanted = "torch sees 0 GPUs; see madkernels doctor" if cuda.ops_with_kernels() else "causal_conv has no CUDA kernel here"
    with pytest.raises(ValueError, match=f"--device cuda: {wanted}"):
        run("causal_conv", "--device", "cuda")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a list of objects"),
        ({"dim": 1}, "expected a list of objects"),
        ([{"dim": 4, "height": 3}], "case 1 has height; expected name, batch"),
        ([{"batch": 1, "seqlen": 2, "dim": 4}], "case 1: missing 1 required keyword-only argument: 'width'"),
        ([{"batch": 1, "seqlen": 2, "dim": -4, "width": 3}], "case 'case 1': dim is -4; expected an integer"),
    ],
)
def test_shape_files_that_do_not_fit(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run("causal_conv", "--shapes", shapes_file(tmp_path, content))


def test_figures() -> None:
    case = ConvCase(name="some", batch=1, seqlen=100, dim=10, width=1)
    measured = Measured(case, {}, FixedRates())  # type: ignore[arg-type]
    measured.rates.measure()
    times = {
        ("madkernels", "forward"): 4e-6,
        ("madkernels", "backward"): 10e-6,
        ("a", "forward"): 12e-6,
        ("b", "forward"): 8e-6,
    }
    for (name, direction), seconds in times.items():
        measured.results.append(Result(name, "float32", direction, 0.0, 1e-5, [seconds / 2, seconds, seconds * 9]))
    measured.results.append(Result("wrong", "float32", "forward", 1.0, 1e-5))
    measured.results.append(Result("madkernels", "bfloat16", "forward", 0.0, 1e-5, [2e-6]))
    measured.traffic = {"float32": {"forward": 8000, "backward": 12000}, "bfloat16": {"forward": 4000, "backward": 6000}}
    measured.memory = {"float32": 20000}
    found = report.figures(measured)
    forward = found["float32"]["forward"]
    assert forward["times_as_long"] == {"b": pytest.approx(2.0), "a": pytest.approx(3.0)}
    assert forward["fastest_peer"] == "b"
    assert forward["of_floor"] == pytest.approx(8000 / 1e10 / 4e-6)
    assert found["float32"]["backward"]["times_forward"] == pytest.approx(2.5)
    assert found["float32"]["backward"]["fastest_peer"] is None
    assert found["float32"]["peak_memory"] == pytest.approx(2.5)
    assert found["bfloat16"]["forward"]["times_float32"] == pytest.approx(0.5)


def test_speed_of_an_op_of_products(tmp_path: Path) -> None:
    """Operations a second, the formula once, and their share of the rate of multiplying."""
    entry = {"name": "small", "batch": 1, "seqlen": 12, "heads": 2, "kv_heads": 1, "head_dim": 8, "head_dim_v": 8}
    out = tmp_path / "out.json"
    shapes = shapes_file(tmp_path, [entry | {"causal": True, "documents": 2}])
    text = run("attention", "--shapes", shapes, "--dtype", "float32,bfloat16", "--json", str(out))
    assert text.count("operations: forward 2 (head_dim + head_dim_v), backward 2 (3 head_dim + 2 head_dim_v)") == 1
    assert "multiplying float32: 100 GFLOP/s, from 100 GFLOP/s to 100 GFLOP/s between the runs" in text
    assert "multiplying bfloat16: 100 GFLOP/s, from 100 GFLOP/s to 100 GFLOP/s between the runs" in text
    assert "of the rate of multiplying" in text
    assert "not run: sdpa: does not take this case" in text
    (case,) = json.loads(out.read_text())["cases"]
    assert {result["contender"] for result in case["results"]} == {"madkernels", "sdpa-mask", "reference"}
    backward = case["figures"]["bfloat16"]["backward"]
    assert backward["operations"] == 2 * 5 * 8 * 2 * 2 * 21  # two heads, two documents
    assert backward["operations_per_second"] == pytest.approx(backward["operations"] / backward["seconds"])
    assert backward["of_multiply"] == pytest.approx(backward["operations_per_second"] / 1e11)
    assert set(case["rates"]["multiply_per_second"]) == {"float32", "bfloat16"}
    assert set(case["rates"]["multiply_per_second"]["float32"]) == {1e11}


def test_an_op_of_no_products_has_no_such_speed(tmp_path: Path) -> None:
    text = run("causal_conv", "--shapes", shapes_file(tmp_path, SMALL), "--peers", "none")
    assert "FLOP/s" not in text
    assert "operations" not in text


@pytest.mark.parametrize(
    ("operations", "text"),
    [(5e6, "0.005 GFLOP/s"), (234.4e9, "234 GFLOP/s"), (1e12, "1 TFLOP/s"), (989.4e12, "989.4 TFLOP/s")],
)
def test_speeds_are_written_in_a_unit_that_fits(operations: float, text: str) -> None:
    assert report.speed(operations) == text


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_case_to_begin_with(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `madkernels bench OP` times with nothing else said."""
    taken: list[str] = []

    def measure(benchmark: Any, case: Case, *_: Any) -> Measured:
        taken.append(case.name)
        raise ValueError("seen enough")

    monkeypatch.setattr(harness, "measure", measure)
    with pytest.raises(ValueError, match="seen enough"):
        run(op)
    first = next(case for case in _benchmark(op).cases if not case.quick)
    assert taken == [first.name]


def test_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (1.9, 0.0, 0.0))
    assert machine.busy() is None
    monkeypatch.setattr("os.getloadavg", lambda: (2.1, 0.0, 0.0))
    assert str(machine.busy()).startswith("the load is 2.10 on 4 cores")
