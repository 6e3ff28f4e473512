"""Runs that another process writes while they are looked at, files that it has left half written, and pages of them at every
width, light and dark."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import assert_fits
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.live.server import Server, Site
from madkernels.runs.store import Store
from madkernels.scaling.plan import Setting, isoflop
from madkernels.synthetics.protocol import Run, Training
from madkernels.synthetics.tasks.compression import Compression
from madkernels.synthetics.tasks.recall import Recall

ARCHS = ("mamba:dstate=4 swiglu mamba:dstate=4 swiglu", "hyena swiglu attention:heads=2 swiglu")
TRAINING = Training(lr=1e-3, epochs=2, batch=16, dim=16, held_out=32)


def mad_runs() -> list[Run]:
    """Two architectures, two tasks, two seeds."""
    trainings = [dataclasses.replace(TRAINING, seed=seed) for seed in (1, 2)]
    return [Run(arch, task, t) for arch in ARCHS for task in (Recall(8, 8, 64), Compression(6, 8, 64)) for t in trainings]


def mad_result() -> dict[str, Any]:
    curve = [{"loss": 2.0, "held_out_accuracy": 0.1}, {"loss": 1.0, "held_out_accuracy": 0.5}]
    figures = {"accuracy": 0.5, "macro_accuracy": 0.4, "loss": 1.0, "held_out_accuracy": 0.5}
    return figures | {"epochs": 2, "seconds": 1.5, "curve": curve}


def lm_runs() -> list[Any]:
    """Of a plan: two architectures, two budgets, two sizes."""
    setting = Setting(vocab_size=257, seqlen=32, batch=2)
    rows = isoflop({"mlp": "mlp mlp", "hybrid": "hyena mlp"}, [2e8, 8e8], (8, 16), setting, blocks=1, sizes=2)
    return [row.run("0", "") for row in rows]


def lm_points() -> list[dict[str, float]]:
    return [{"step": n, "loss": 5.0 / n, "norm": 1.0, "lr": 1e-3, "tokens_per_second": 1000.0} for n in range(1, 60)]


def lm_result() -> dict[str, Any]:
    return {"loss": 3.0, "params": 1000, "tokens": 1600, "seconds": 10.0, "curve": lm_points()}


def write_sweep(folder: Path, runs: list[Any], result: dict[str, Any]) -> None:
    """A sweep of which half is done, a run has failed, another was under way when its process ended."""
    store = Store(folder)
    store.plan(runs)
    for run in runs[: len(runs) // 2]:
        store.start(run)
        store.finish(run, result)
    store.fail(runs[-1], "the loss is nan")
    store.start(runs[-3])
    store.close()


def write_training(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(point) + "\n" for point in lm_points()))


class Sweeping:
    """Another process, which holds a folder; it starts a run, and ends it and starts the next whenever it is told."""

    SCRIPT = """
import sys
from pathlib import Path
from test_going_on import mad_result, mad_runs
from madkernels.runs.store import Store
store = Store(Path(sys.argv[1]))
store.plan(mad_runs())
for run in mad_runs():
    store.start(run)
    print("started", flush=True)
    sys.stdin.readline()
    store.finish(run, mad_result())
"""

    def __init__(self, folder: Path) -> None:
        here = Path(__file__).parent
        paths = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
        self.wait()

    def wait(self) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline() == "started\n"

    def end_one(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def sweeping(tmp_path: Path) -> Iterator[Sweeping]:
    found = Sweeping(tmp_path / "runs")
    yield found
    found.kill()


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """The port of a server of the folder."""
    found = Server(folder)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found.server_port
    found.shutdown()
    thread.join()
    found.server_close()


def get(port: int, path: str = "/", host: str | None = "localhost") -> tuple[int, str]:
    """The status and the text of an answer; the request names no host where that is None."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("GET", path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_status_of_a_sweep_under_way_and_then_killed(tmp_path: Path, sweeping: Sweeping) -> None:
    def told() -> str:
        return CliRunner().invoke(app, ["status", str(tmp_path)], env={"COLUMNS": "80"}).output

    assert f"{tmp_path / 'runs'}: 0 of 8 runs are done, 1 running\n" in told()
    for _ in range(2):
        sweeping.end_one()
    assert "2 of 8 runs are done, 1 running; about " in told()
    sweeping.kill()
    assert "2 of 8 runs are done, 1 stopped; about " in told()
    assert "1 running" not in told()


def test_a_page_asked_for_while_a_sweep_writes(tmp_path: Path, sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep is asked for its next row at once each time, as often as it has rows."""
    monkeypatch.setattr("madkernels.live.server.LEAST_REST", 0)
    monkeypatch.setattr("madkernels.live.server.REST", 0)
    with serving(tmp_path / "runs") as port:
        for done in range(1, 8):
            sweeping.end_one()
            assert f"{done} of 8 runs are done, 1 running" in get(port)[1]
        assert all(f"<h2>{section}</h2>" in get(port)[1] for section in ("Status", "Scores", "Training"))
        sweeping.kill()
        assert "7 of 8 runs are done, 1 stopped" in get(port)[1]


def test_a_page_is_not_drawn_at_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("madkernels.live.server.LEAST_REST", 600)
    write_training(tmp_path / "one")
    site = Site(tmp_path / "one")
    first = site.page("/")
    (tmp_path / "one" / "log.jsonl").write_text("")
    assert site.page("/") is first


def test_files_that_are_half_written(tmp_path: Path) -> None:
    """One damaged folder does not keep the others from being shown."""
    logs = {
        "cut": '{"step": 3, "loss": 1.0, "tokens_per_second": 1.0}\n{"st',
        "empty": "",
        "other": '{"step": "x", "loss": []}\n',
    }
    for name, text in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(text)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "results.sqlite").write_bytes(b"")
    write_sweep(tmp_path / "whole", mad_runs(), mad_result())
    with serving(tmp_path) as port:
        answers = {name: get(port, f"/{name}/") for name in (*logs, "store", "whole")}
        index = get(port)[1]
    assert {status for status, _ in answers.values()} == {200}
    assert "stopped: step 3, loss 1.0000" in answers["cut"][1]
    assert "stopped: step 0" in answers["empty"][1]
    assert "It cannot be read: " in answers["store"][1]
    assert "4 of 8 runs are done, 1 failed, 1 stopped" in answers["whole"][1]
    assert all(f'href="/{name}/"' in index for name in answers)


@pytest.mark.parametrize(
    "host", [None, "", "[", "[::1", "evil.example:8400", "localhost@evil.example", "localhost.evil.example"]
)
def test_a_request_that_names_another_host_is_refused(tmp_path: Path, host: str | None) -> None:
    with serving(tmp_path) as port:
        assert get(port, host=host)[0] == 403
        assert get(port, host="localhost:1234")[0] == 200, "the port may be that of a tunnel"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["mad", "scaling", "training", "index"])
def test_pages_fit(tmp_path: Path, name: str, dark: bool) -> None:
    shown = tmp_path / "shown"
    write_sweep(shown / "mad", mad_runs(), mad_result())
    write_sweep(shown / "scaling", lm_runs(), lm_result())
    write_training(shown / "training")
    write_training(shown / "a-folder-with-a-name-that-is-rather-long-for-a-phone")
    site = Site(shown)
    page = site.page("/" if name == "index" else f"/{name}/")
    assert page is not None
    assert not isinstance(page, bytes)
    assert_fits(page.text, tmp_path, dark=dark, labels=name != "index")
