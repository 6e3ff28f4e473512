"""What of `make gpu-check` can be tried without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_smoke
import pytest
import torch

from madkernels import OPS
from madkernels.cli import bench


@pytest.fixture
def checks(tmp_path: Path) -> gpu_check.Checks:
    return gpu_check.Checks(tmp_path)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_that_fails_does_not_lose_the_others(checks: gpu_check.Checks) -> None:
    assert checks.run("good", python("print('all is well')"), 60)
    assert not checks.run("bad", python("print('something broke'); raise SystemExit(3)"), 60)
    assert not checks.run("slow", python("import time; print('begun', flush=True); time.sleep(60)"), 1.5)
    checks.skip("absent", "it is not there")
    assert checks.run("after", python("import os; print(os.environ['GIVEN'])"), 60, GIVEN="value")
    written = json.loads((checks.out / "summary.json").read_text())
    assert [(o["stage"], o["result"]) for o in written] == [
        ("good", "passed"),
        ("bad", "failed"),
        ("slow", "timed out"),
        ("absent", "skipped"),
        ("after", "passed"),
    ]
    assert (checks.out / "bad.log").read_text() == "something broke\n"
    for line, wanted in zip(
        checks.summary().splitlines(), ("all is well", "something broke", "begun", "it is not there", "value"), strict=True
    ):
        assert line.endswith(wanted)


def test_a_stage_that_times_out_leaves_nobody_behind(checks: gpu_check.Checks) -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    assert not checks.run("slow", python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"), 3)
    pid = int((checks.out / "slow.log").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]:
        assert time.monotonic() < deadline, "the child of a stage outlives it"
        time.sleep(0.05)


def test_a_command_that_is_not_there_fails_alone(checks: gpu_check.Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not checks.run("absent", ["no-such-command"], 5)
    assert checks.outcomes[-1].detail == "no-such-command: No such file or directory"
    monkeypatch.setenv("PATH", str(checks.out))
    assert gpu_check.commit() == "unknown: there is no git here"


def test_all_stages_have_nine_minutes_together(tmp_path: Path) -> None:
    assert gpu_check.SECONDS <= 9 * 60
    assert max(gpu_check.LIMITS.values()) < gpu_check.SECONDS / 2
    checks = gpu_check.Checks(tmp_path, seconds=1)
    assert not checks.run("slow", python("import time; time.sleep(60)"), 30)
    assert not checks.run("late", python("print('here')"), 30)
    assert [o.result for o in checks.outcomes] == ["timed out", "no time left"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out")])
    assert gpu_check.main() == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("backend")
@pytest.mark.backends("ptx")
def test_what_the_sanitizer_is_given_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "DEVICE", "cpu")
    gpu_smoke.main()


def test_bench_takes_its_cases(tmp_path: Path) -> None:
    for op in OPS:
        file = tmp_path / f"{op}.json"
        gpu_check.write_training_case(op, file)
        benchmark = bench._benchmark(op)
        assert bench._cases(benchmark, str(file), quick=False) == [benchmark.training]


def test_a_benchmark_that_does_not_load_fails_alone(checks: gpu_check.Checks) -> None:
    gpu_check.time_training_case(checks, "no_such_op")
    [outcome] = checks.outcomes
    assert (outcome.stage, outcome.result) == ("bench-no_such_op", "failed")
    assert "no_such_op" in outcome.detail


def test_runs_together_are_compared_here_too(tmp_path: Path) -> None:
    """What the check starts on a GPU, small and on the CPU."""
    file = tmp_path / "together.json"
    command = [sys.executable, "tools/gpu_together.py", "--device", "cpu", "--quick", "--json", str(file)]
    subprocess.run(command, check=True, cwd=gpu_check.ROOT, timeout=200)
    assert all(entry["error"] < 1e-3 for entry in json.loads(file.read_text()).values())
