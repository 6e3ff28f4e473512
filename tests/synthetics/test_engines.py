"""Where sweeps run: the same results from every engine, and what happens when workers die."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from madkernels.runs import engines
from madkernels.runs.engines import InProcess, Pool, RayCluster, Result
from madkernels.runs.execute import Outcome
from madkernels.runs.store import Store
from madkernels.synthetics import train
from madkernels.synthetics.protocol import Run, Training
from madkernels.synthetics.sweep import jobs_of, sweep
from madkernels.synthetics.tasks.recall import Recall

TASK = Recall(vocab_size=8, seqlen=8, train_examples=64)
TINY = Training(lr=3e-3, epochs=2, batch=16, dim=16, held_out=32, seed=1)
RUNS = [
    Run("attention:heads=2 mlp", TASK, TINY),
    Run("mlp", TASK, TINY),
    Run("mlp", TASK, dataclasses.replace(TINY, lr=1e30, epochs=5)),
]
LONG = Run(
    "attention:heads=2 mlp",
    dataclasses.replace(TASK, train_examples=6_000),
    dataclasses.replace(TINY, epochs=200, enough=2.0),
)
PLUGIN = """
from torch import nn
from madkernels.models import add_layer
class Twice(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
    def forward(self, x):
        return 2 * self.linear(x)
add_layer("twice", Twice)
"""


class Heard:
    """What an engine told; with a deed to do once a run has told its first epoch."""

    def __init__(self, deed: Any = None) -> None:
        self.results: dict[Run, Result] = {}
        self.starts: list[Run] = []
        self.epochs = 0
        self.deed = deed

    def started(self, run: Run) -> None:
        self.starts.append(run)

    def point(self, run: Run, epoch: int, point: dict[str, float]) -> None:
        self.epochs += 1
        if self.deed and run == LONG:
            self.deed()

    def ended(self, run: Run, result: Result) -> None:
        assert run not in self.results
        self.results[run] = result


class Silent:
    def run_starts(self, run: Run) -> None: ...
    def point(self, run: Run, epoch: int, point: dict[str, float]) -> None: ...
    def run_ends(self, run: Run, outcome: str) -> None: ...


def children(pid: int) -> list[int]:
    """Processes of Python's pool; not its resource tracker."""
    found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [p for p in found if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


def without_time(result: Result) -> Any:
    return result if isinstance(result, str) else {k: v for k, v in result.items() if not k.endswith("seconds")}


def test_a_worker_that_is_killed_is_replaced_and_its_run_done_again() -> None:
    killed: list[int] = []

    def kill_all() -> None:
        if not killed:
            killed.extend(children(os.getpid()))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    short = dataclasses.replace(LONG, training=dataclasses.replace(LONG.training, epochs=3))
    heard = Heard()
    heard.point = lambda run, epoch, point: kill_all()  # type: ignore[method-assign]
    Pool(2).run([(short,), (RUNS[1],)], heard)
    assert killed
    assert heard.starts.count(short) == 2
    assert without_time(heard.results[short]) == without_time(engines.work((short,), lambda *_: None, "cpu")[0])
    assert isinstance(heard.results[RUNS[1]], dict)


def test_a_run_that_kills_its_workers_is_given_up() -> None:
    def kill() -> None:
        for pid in children(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)

    heard = Heard(kill)
    Pool(1).run([(LONG,), (RUNS[1],)], heard)
    assert heard.results[LONG] == "its worker died 3 times"
    assert heard.starts.count(LONG) == 3
    assert isinstance(heard.results[RUNS[1]], dict)


def test_an_error_of_one_run_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = train.step

    def fails(model: Any, inputs: Any, targets: Any, options: Training) -> Any:
        if options.lr == 1e30:
            raise MemoryError("no more")
        return honest(model, inputs, targets, options)

    monkeypatch.setattr(train, "step", fails)
    heard = Heard()
    InProcess().run([(RUNS[2],), (RUNS[1],)], heard)
    assert heard.results[RUNS[2]] == "MemoryError: no more"
    assert isinstance(heard.results[RUNS[1]], dict)


def test_the_longest_come_first() -> None:
    jobs = jobs_of([*RUNS, LONG], together=False)
    assert jobs[0] == (LONG,)
    together = jobs_of([RUNS[1], dataclasses.replace(RUNS[1], training=dataclasses.replace(TINY, seed=5))], together=True)
    assert [len(job) for job in together] == [2]


def test_layers_from_a_plugin_reach_the_workers(tmp_path: Path) -> None:
    """The command in a process of its own, twice: done again only where the plugin's file has changed."""
    plugin = tmp_path / "mine.py"
    outputs = []
    for text in (PLUGIN, PLUGIN, PLUGIN.replace("2 *", "3 *")):
        plugin.write_text(text)
        command = [sys.executable, "-m", "madkernels.cli", "mad", "run", "--arch", "twice", "--tasks", "compression",
                   "--workers", "2", "--seed", "1", "--seed", "2", "--plugin", str(plugin),
                   "--out", str(tmp_path / "out")]  # fmt: skip
        found = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"COLUMNS": "200"})
        assert found.returncode == 0, found.stderr
        outputs.append(found.stdout)
    assert "2 runs trained, 0 found done" in outputs[0]
    assert "0 runs trained, 2 found done" in outputs[1]
    assert "2 runs trained, 0 found done" in outputs[2]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing fails from the first end on, and is possible again by the last."""
    store, ends = Store(tmp_path), 0
    honest = Store._end

    def full(self: Store, *args: Any) -> None:
        nonlocal ends
        ends += 1
        if ends <= 2:
            raise OSError("cannot write: database or disk is full")
        honest(self, *args)

    monkeypatch.setattr(Store, "_end", full)
    assert sweep(RUNS, store, Silent()) == Outcome(2, 0, 1)
    assert sorted(row["status"] for row in store.rows()) == ["done", "done", "failed"]
    monkeypatch.setattr(Store, "_end", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="1 finished runs are lost: disk is full"):
        sweep(RUNS, store, Silent())  # the failed one, again
    store.close()


# ---- Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A local cluster of two workers, started as users start it."""
    ray = pytest.importorskip("ray")
    here = Path(sys.executable).parent / "ray"
    options = ["--head", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--port=0"]
    started = subprocess.run([here, "start", *options], capture_output=True, text=True, timeout=120)
    assert started.returncode == 0, started.stdout + started.stderr
    yield "auto"
    ray.shutdown()
    subprocess.run([here, "stop", "--force"], capture_output=True, timeout=60)


def test_ray_equals_the_pool(cluster: str, tmp_path: Path) -> None:
    found = []
    for engine in (RayCluster(cluster), Pool(2)):
        store = Store(tmp_path / type(engine).__name__)
        assert sweep(RUNS, store, Silent(), engine=engine) == Outcome(2, 0, 1)
        found.append({k: without_time(v) for k, v in store.metrics().items()})
        store.close()
    assert found[0] == found[1]


def test_a_worker_of_ray_that_is_killed_is_replaced(cluster: str) -> None:
    short = dataclasses.replace(LONG, training=dataclasses.replace(LONG.training, epochs=4))
    killed: list[str] = []

    def kill() -> None:
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and b"_work_on_ray" in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
                    killed.append(folder.name)
            except OSError:
                continue

    heard = Heard()
    heard.point = lambda run, epoch, point: None if killed else kill()  # type: ignore[method-assign]
    RayCluster(cluster).run([(short,)], heard)
    assert killed
    assert heard.starts.count(short) == 2
    assert without_time(heard.results[short]) == without_time(engines.work((short,), lambda *_: None, "cpu")[0])


def test_an_interrupt_ends_what_ray_is_at(cluster: str) -> None:
    def busy() -> list[str]:
        titles = [(folder / "cmdline") for folder in Path("/proc").glob("[0-9]*")]
        return [path.parent.name for path in titles if path.exists() and b"_work_on_ray" in path.read_bytes()]

    def interrupt() -> None:
        assert busy()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RayCluster(cluster).run([(LONG,)], Heard(interrupt))
    deadline = time.monotonic() + 10
    while busy() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not busy()


def test_no_cluster_and_no_ray_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"Ray is not installed: pip install 'madkernels\[cluster\]'"):
        RayCluster()


@pytest.mark.parametrize("place", ["address", "environment"])
def test_an_address_without_a_cluster_is_told(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1" if place == "environment" else "")
    begun = time.monotonic()
    with pytest.raises(
        ValueError, match=r"no Ray cluster at 127\.0\.0\.1:1: .*refused; start one with: ray start --head, or give"
    ):
        RayCluster("auto" if place == "environment" else "127.0.0.1:1")
    assert time.monotonic() - begun < 5


def test_a_cluster_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray start` leaves an address behind when its machine goes down."""
    ray = pytest.importorskip("ray")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.9:6379")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr(engines, "CONNECT", 0.2)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: time.sleep(30))
    with pytest.raises(
        ValueError, match=r"no Ray cluster at auto \(10\.0\.0\.9:6379, as .* says\): no answer within 0 s; start one"
    ):
        RayCluster()


def test_threads_of_the_process_are_as_before() -> None:
    import torch

    before = torch.get_num_threads()
    InProcess().run([(RUNS[1],)], Heard())
    assert torch.get_num_threads() == before


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(engines, "_Worker", lambda device, plugins: given.append(device))
    for place in range(3):
        Pool(3, "cuda").worker(place)
    Pool(1, "cpu").worker(0)
    assert given == ["cuda:0", "cuda:1", "cuda:0", "cpu"]
