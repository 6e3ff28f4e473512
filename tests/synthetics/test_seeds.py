"""More seeds for architectures that are not apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from madkernels.cli.main import app
from madkernels.runs.engines import Job, Listener
from madkernels.runs.store import Store
from madkernels.synthetics.protocol import Run, Score, Training
from madkernels.synthetics.seeds import more_seeds, overlapping
from madkernels.synthetics.tasks.recall import Recall

# Two that are alike, and one far below that is sure of itself.
ACCURACY = {"mlp": 0.80, "swiglu": 0.81, "mamba": 0.30}


def accuracy(run: Run) -> float:
    wavering = 0.0 if run.arch == "mamba" else 0.02
    return ACCURACY[run.arch] + wavering * (-1) ** run.training.seed


class Oracle:
    """An engine that trains nothing, and is killed after so many runs."""

    def __init__(self, runs: int = 1000) -> None:
        self.left, self.done = runs, list[Run]()

    def run(self, jobs: list[Job], listener: Listener) -> None:
        for run in (run for job in jobs for run in job):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.done.append(run)
            listener.ended(run, {"accuracy": accuracy(run), "macro_accuracy": 0.0, "loss": 0.0, "held_out_accuracy": 0.5,
                                 "epochs": 1, "seconds": 1.0, "curve": []})  # fmt: skip


# ---- the rule


def test_neighbours_whose_intervals_overlap() -> None:
    wide, narrow, lone, none = (
        Score({1: 0.4, 2: 0.6}, 2, 2),
        Score({1: 0.49, 2: 0.5}, 2, 2),
        Score({1: 0.1}, 1, 1),
        Score({}, 0, 1),
    )
    far = Score({1: 0.98, 2: 0.981}, 2, 2)
    assert wide.margin is not None
    assert wide.margin > 0.4, "12.7 times a tenth"
    assert overlapping({"wide": wide, "narrow": narrow}) == {"wide", "narrow"}
    assert overlapping({"narrow": narrow, "far": far}) == set()
    assert overlapping({"far": far, "lone": lone}) == {"far", "lone"}, "one seed has no interval: it may be anywhere"
    assert overlapping({"far": far, "none": none}) == set(), "one without a score has no place"
    assert overlapping({"far": far}) == set()


def test_a_round_is_one_more_seed_of_all_settings() -> None:
    runs = [
        Run(arch, Recall(8, length, 64), Training(lr=lr, seed=seed))
        for arch in ACCURACY for length in (8, 10) for lr in (1e-3, 1e-2) for seed in (7, 8)
    ]  # fmt: skip
    metrics = {run.key(): {"accuracy": accuracy(run), "held_out_accuracy": 0.5} for run in runs}
    more = more_seeds(runs, metrics, "accuracy", 5)
    assert {run.arch for run in more} == {"mlp", "swiglu"}
    assert {run.training.seed for run in more} == {9}
    assert len(more) == len(set(more)) == 2 * 4
    assert more_seeds(runs, metrics, "accuracy", 2) == []
    assert more_seeds(runs, {}, "accuracy", 5) == [], "without a score there is no ranking"


# ---- the command


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.json"
    training = {"lr": [1e-3], "weight_decay": [0.0], "epochs": 1, "dim": 16}
    tasks = {"recall": {"baseline": {"vocab_size": 8, "seqlen": 8, "train_examples": 32}}}
    file.write_text(json.dumps({"about": "", "score": "accuracy", "seeds": [1, 2], "training": training, "tasks": tasks}))
    return file


def sweep(monkeypatch: pytest.MonkeyPatch, tiny: Path, out: Path, oracle: Oracle, *more: str) -> tuple[int, str]:
    monkeypatch.setattr("madkernels.cli.mad.engine_of", lambda *_: oracle)
    archs = [word for arch in ACCURACY for word in ("--arch", arch)]
    arguments = ["mad", "run", "--protocol", str(tiny), "--out", str(out), *archs, *more]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    return result.exit_code, result.output


def seeds_in(folder: Path) -> dict[str, list[int]]:
    store = Store(folder)
    found: dict[str, list[int]] = {}
    for row in store.latest(Run.of):
        assert row["status"] == "done"
        found.setdefault(row["run"].arch, []).append(row["run"].training.seed)
    store.close()
    return found


def test_seeds_until_apart(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, told = sweep(monkeypatch, tiny, tmp_path / "a", Oracle(), "--seeds-until-apart", "5")
    assert code == 0, told
    assert told.count("2 architectures are not apart; one more seed: 2 runs") == 3
    assert "12 runs trained, 0 found done, 0 failed" in told
    assert seeds_in(tmp_path / "a") == {"mlp": [1, 2, 3, 4, 5], "swiglu": [1, 2, 3, 4, 5], "mamba": [1, 2]}
    _, plain = sweep(monkeypatch, tiny, tmp_path / "b", Oracle())
    assert "6 runs trained" in plain


@pytest.mark.parametrize("killed_after", [3, 7, 9])
def test_a_sweep_that_is_killed_comes_to_the_same_runs(
    killed_after: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.loads(tiny.read_text()) | {"seeds_until_apart": 5}
    tiny.write_text(json.dumps(data))
    first, second = Oracle(killed_after), Oracle()
    code, told = sweep(monkeypatch, tiny, tmp_path / "a", first)
    assert code == 130, told
    assert f"stopped: {killed_after} of " in told
    code, told = sweep(monkeypatch, tiny, tmp_path / "a", second)
    assert code == 0, told
    assert len(first.done) == killed_after
    assert len({*first.done, *second.done}) == len(first.done) + len(second.done) == 12
    assert seeds_in(tmp_path / "a") == {"mlp": [1, 2, 3, 4, 5], "swiglu": [1, 2, 3, 4, 5], "mamba": [1, 2]}


def test_fewer_than_there_are_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("madkernels.cli.mad.engine_of", lambda *_: Oracle())
    arguments = ["mad", "run", "--protocol", str(tiny), "--arch", "mlp", "--out", str(tmp_path), "--seeds-until-apart", "1"]
    result = CliRunner().invoke(app, arguments)
    assert "fewer than the 2 that all architectures have" in str(result.exception)


def test_what_is_said_before_it_starts(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, told = sweep(monkeypatch, tiny, tmp_path / "a", Oracle(), "--dry-run", "--seeds-until-apart", "4")
    assert "agreement" not in told, "of a protocol of one's own there is nothing to say"
    assert "6 runs to do" in told
    assert "then, where intervals overlap, up to 6 runs of more seeds" in told
    monkeypatch.setattr("madkernels.cli.mad.engine_of", lambda *_: Oracle())
    arguments = ["mad", "run", "--protocol", "strict-small", "--arch", "mlp", "--out", str(tmp_path / "b"), "--dry-run"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    shown = "Spearman -0.03 over 6 architectures (docs/studies/strict-small/README.md)"
    assert f"strict-small: agreement with the published scores: {shown}" in result.output
