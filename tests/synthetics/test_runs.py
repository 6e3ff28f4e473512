"""Training, the results file, sweeps that are killed, and the command."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from madkernels.cli.main import app, main
from madkernels.runs.engines import Diverged, InProcess, Pool
from madkernels.runs.execute import Outcome
from madkernels.runs.store import Store
from madkernels.synthetics import search
from madkernels.synthetics.protocol import Run, Score, Training, load_protocol, mad_score, plan, scores
from madkernels.synthetics.sweep import sweep
from madkernels.synthetics.tasks.compression import Compression
from madkernels.synthetics.tasks.recall import Recall
from madkernels.synthetics.train import macro_accuracy, measure, train

ARCH = "attention:heads=2 mlp"
TINY = Training(lr=3e-3, epochs=2, batch=16, dim=16, held_out=32, seed=1)
TASK = Recall(vocab_size=8, seqlen=8, train_examples=64)


def tiny(arch: str = ARCH, **options: Any) -> Run:
    return Run(arch, TASK, dataclasses.replace(TINY, **options))


class Silent:
    def __init__(self) -> None:
        self.ended: list[tuple[Run, str]] = []
        self.epochs = 0

    def run_starts(self, run: Run) -> None: ...

    def point(self, run: Run, epoch: int, point: dict[str, float]) -> None:
        self.epochs += 1

    def run_ends(self, run: Run, outcome: str) -> None:
        self.ended.append((run, outcome))


def without_time(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if not k.endswith("seconds")}


# ---- training


def test_learns() -> None:
    result = train(Run(ARCH, dataclasses.replace(TASK, train_examples=640), dataclasses.replace(TINY, epochs=20, lr=1e-2)))
    assert result["accuracy"] > 0.6 > 0.25  # chance: a quarter of the values
    assert result["curve"][-1]["loss"] < result["curve"][0]["loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_seed_same_result(dtype: str) -> None:
    runs = [without_time(train(tiny(dtype=dtype))) for _ in range(2)]
    assert runs[0] == runs[1]
    assert without_time(train(tiny(dtype=dtype, seed=2))) != runs[0]


def test_stops_when_it_is_good_enough() -> None:
    assert train(tiny(enough=0.0))["epochs"] == 1
    assert train(tiny(enough=1.1))["epochs"] == 2


def test_learning_rate_follows_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    train(tiny(epochs=4))
    steps = torch.arange(16)
    expected = 1e-6 + (3e-3 - 1e-6) * (1 + torch.cos(torch.pi * steps / 16)) / 2
    torch.testing.assert_close(torch.tensor(rates), expected, rtol=1e-4, atol=1e-9)


def test_auto_encoder_for_compression() -> None:
    result = train(Run(ARCH, Compression(vocab_size=4, seqlen=4, train_examples=64), TINY))
    assert result["accuracy"] > 0.25  # the last token is trivial


def test_divergence_is_told() -> None:
    with pytest.raises(Diverged, match="the loss is"):
        train(tiny(lr=1e30, epochs=5))


def test_measures() -> None:
    class Says(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(x, 4).float() * 10

    inputs = torch.tensor([[0, 1, 2, 3]])
    targets = torch.tensor([[0, 2, 2, -100]])
    found = measure(Says(), inputs, targets, TINY)
    assert found["accuracy"] == pytest.approx(2 / 3)
    # classes 0, 1, 2 occur: recall 1, none wanted, 1/2
    assert found["macro_accuracy"] == pytest.approx(0.5)
    assert macro_accuracy(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2]), 4) == pytest.approx(0.5)


# ---- plans and scores


def test_plan() -> None:
    runs = plan("demo", ["mamba  mlp", "mamba mlp", "2*mlp"], "compression,recall")
    assert [(r.arch, r.task.name) for r in runs] == [
        (a, t) for a in ("mamba mlp", "mlp mlp") for t in ("recall", "compression")
    ]
    assert len(plan("paper", ["mlp"])) == 396


def test_every_option_is_part_of_the_key() -> None:
    base = tiny()
    others = [tiny(lr=1e-4), tiny(dim=32), tiny(seed=9), tiny("mlp")]
    others.append(Run(ARCH, Recall(vocab_size=8, seqlen=8, train_examples=65), TINY))
    assert len({run.key() for run in [base, *others]}) == 6
    assert tiny().key() == base.key()


def test_scores_choose_by_the_held_out_set() -> None:
    results = [
        (tiny(lr=1e-3), {"held_out_accuracy": 0.5, "accuracy": 0.4, "macro_accuracy": 0.1}),
        (tiny(lr=1e-2), {"held_out_accuracy": 0.4, "accuracy": 0.9, "macro_accuracy": 0.2}),
        (tiny("mlp"), None),
    ]
    table = scores(results)
    assert table[ARCH]["recall"] == Score({1: 0.4}, 1, 1)
    assert scores(results, "macro_accuracy")[ARCH]["recall"].value == 0.1
    assert table["mlp"]["recall"] == Score({}, 0, 1)
    assert table["mlp"]["recall"].value is None


def test_seeds_give_intervals() -> None:
    values = {1: 0.2, 2: 0.4, 3: 0.6}
    results = [
        (tiny(seed=seed), {"held_out_accuracy": 1.0, "accuracy": value, "macro_accuracy": value})
        for seed, value in values.items()
    ]
    score = scores(results)[ARCH]["recall"]
    assert score.value == pytest.approx(0.4)
    assert score.margin == pytest.approx(4.302653 * 0.2 / 3**0.5, rel=1e-6)  # Student's at 2 degrees of freedom
    other = Score({1: 0.4, 2: 0.6}, 2, 2)
    both = mad_score({"a": score, "b": other})
    assert both.by_seed == pytest.approx({1: 0.3, 2: 0.5})  # the seeds that both have
    assert mad_score({"a": score, "b": Score({}, 0, 1)}).value is None


def test_protocols() -> None:
    paper, strict = load_protocol("paper"), load_protocol("strict")
    assert len(plan(paper, ["mlp"])) == 396
    assert len(plan(strict, ["mlp"])) == 3 * 396
    assert {t.select for t in paper.trainings} == {"test"}
    assert {t.select for t in strict.trainings} == {"validation"}
    assert all(task.answerable for task in strict.settings["fuzzy-recall"])
    assert not any(task.answerable for task in paper.settings["fuzzy-recall"])
    assert all(task.covered for task in strict.settings["memorization"])
    small = load_protocol("strict-small")
    assert {name: len(settings) for name, settings in small.settings.items()} == {
        "recall": 2, "fuzzy-recall": 2, "compression": 2,
    }  # fmt: skip


def test_a_task_with_optimiser_settings_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    common = {"lr": [1e-3, 1e-2], "weight_decay": [0.0], "epochs": 9, "dim": 16}
    tasks = {
        "recall": {"baseline": {"vocab_size": 8, "seqlen": 8}, "training": {"lr": [4e-3], "patience": 5}},
        "compression": {"baseline": {"vocab_size": 8, "seqlen": 8}},
    }
    file.write_text(json.dumps({"about": "", "score": "accuracy", "seeds": [1], "training": common, "tasks": tasks}))
    found = [(r.task.name, r.training.lr, r.training.patience, r.training.epochs) for r in plan(str(file), ["mlp"])]
    assert found == [("recall", 4e-3, 5, 9), ("compression", 1e-3, 0, 9), ("compression", 1e-2, 0, 9)]
    assert search._first_runs(["mlp"], load_protocol(str(file)))[0].training.lr == 4e-3


def test_the_agreement_of_a_protocol_is_that_of_its_study() -> None:
    shown = load_protocol("strict-small").agreement
    assert shown is not None
    text = (Path(__file__).parents[2] / shown.study).read_text()
    assert f"Spearman {shown.spearman:+.2f}" in text
    assert str(shown) == "Spearman -0.03 over 6 architectures (docs/studies/strict-small/README.md)"
    assert [load_protocol(name).agreement for name in ("demo", "paper", "strict")] == [None] * 3


def task(baseline: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"tasks": {"recall": {"baseline": {"vocab_size": 8, "seqlen": 8} | baseline} | others}}


def training(**options: Any) -> dict[str, Any]:
    return {"training": {"lr": [1e-3], "weight_decay": [0.0]} | options}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scores": "x"},
            "the file: unknown key 'scores'; there are about, seeds, score, training, tasks, seeds_until_apart, agreement; "
            "did you mean score?",
        ),
        ({"score": "loss"}, "score is 'loss'; it takes accuracy or macro_accuracy"),
        ({"about": 3}, "about: got 3; expected a string"),
        ({"seeds": [1, 1]}, "seeds: got [1, 1]; expected each value once"),
        ({"seeds": []}, "seeds: got []; expected a list of one value or more"),
        ({"seeds": [True]}, "seeds: got true; expected a whole number"),
        ({"tasks": {}}, "tasks: there is none"),
        ({"tasks": []}, "tasks: got []; expected an object"),
        ({"tasks": {"recal": {}}}, "tasks: unknown task 'recal'"),
        (task({"vocab_size": 1}), "vocab_size 1 is too small"),
        (task({"vocab_sise": 8}), "tasks.recall.baseline: unknown key 'vocab_sise'; there are vocab_size, seqlen"),
        (task({"train_examples": "many"}), 'tasks.recall.baseline.train_examples: got "many"; expected a whole number'),
        (task({"train_examples": 0}), "tasks.recall.baseline.train_examples: got 0; expected a whole number from 1"),
        (task({"vocab_size": 8.5}), "tasks.recall.baseline.vocab_size: got 8.5; expected a whole number"),
        (task({"vocab_size": [8, 16]}), "tasks.recall.baseline.vocab_size: got [8, 16]; expected a whole number"),
        ({"tasks": {"recall": {}}}, "tasks.recall: 'baseline' is missing"),
        ({"tasks": {"recall": {"baseline": {"vocab_size": 8}}}}, "tasks.recall.baseline: 'seqlen' is missing"),
        (
            task({}, chnages={"vocab_size": [32]}),
            "tasks.recall: unknown key 'chnages'; there are baseline, changes, training; did you mean",
        ),
        (task({}, vocab_size=[16, 32]), "tasks.recall: unknown key 'vocab_size'"),
        (task({}, changes={"seqlenn": [8]}), "tasks.recall.changes: unknown key 'seqlenn'; there are vocab_size, seqlen"),
        (task({}, changes={"vocab_size": 32}), "tasks.recall.changes.vocab_size: got 32; expected a list"),
        (task({}, changes={"vocab_size": [8]}), "tasks.recall.changes.vocab_size: 8 is the baseline's"),
        (task({}, changes={"vocab_size": [1]}), "vocab_size 1 is too small"),
        (training(select="train"), "select is 'train'; it takes validation or test"),
        (training(epoch=3), "training: unknown key 'epoch'; there are lr, weight_decay"),
        (training(epochs="three"), 'training.epochs: got "three"; expected a whole number'),
        (training(epochs=0), "training.epochs: got 0; expected a whole number from 1"),
        (training(lr=0.1), "training.lr: got 0.1; expected a list of one value or more"),
        (training(lr=["a"]), 'training.lr: got "a"; expected a number'),
        (training(seed=3), "training: unknown key 'seed'"),
        (training(warmup=-0.1), "training.warmup: got -0.1; expected a number from 0"),
        (training(warmup=1.1), "warmup is 1.1; it takes a share of the steps, from 0 to 1"),
        (training(patience=-1), "training.patience: got -1; expected a whole number from 0"),
        (training(min_epochs=2.5), "training.min_epochs: got 2.5; expected a whole number"),
        (task({}, training={"lr": 0.1}), "tasks.recall.training.lr: got 0.1; expected a list"),
        (task({}, training={"lrs": [0.1]}), "tasks.recall.training: unknown key 'lrs'; there are lr, weight_decay"),
        (task({}, training={"dim": 32}), "tasks.recall.training: unknown key 'dim'"),
        (training(lr=0.1) | task({}, training={"epochs": 3}), "training.lr: got 0.1; expected a list of one value or more"),
        ({"seeds_until_apart": -1}, "seeds_until_apart: got -1; expected a whole number from 0"),
        ({"agreement": {"study": "x"}}, "agreement: 'architectures' is missing"),
        ({"agreement": {"study": "x", "architectures": 2, "spearman": 0.5}}, "agreement.architectures: got 2; expected"),
        (
            {"agreement": {"study": "x", "architectures": 6, "spearman": 1.5}},
            "agreement.spearman: got 1.5; expected a number",
        ),
    ],
)
def test_refuses_protocols(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "mine.json"
    data = {
        "about": "",
        "score": "accuracy",
        "seeds": [1],
        "training": {"lr": [1e-3], "weight_decay": [0.0]},
        "tasks": {"recall": {"baseline": {"vocab_size": 8, "seqlen": 8}}},
    }
    file.write_text(json.dumps(data))
    assert len(plan(str(file), ["mlp"])) == 1
    file.write_text(json.dumps(data | change))
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        load_protocol(str(file))
    assert str(told.value).startswith(f"protocol {file}: ")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Expecting"),
        (b"[]", "the file: got []; expected an object"),
        (b'{"about": "", "about": ""}', "key 'about' is given twice in one object"),
        (b'{"tasks": {"recall": {"baseline": {"seqlen": 8, "seqlen": 9}}}}', "key 'seqlen' is given twice in one object"),
        (b'{"seeds": [NaN]}', "NaN is no number"),
        (b"\xff\xfe", "can't decode"),
        (b"[" * 100_000, "its objects are nested too deeply"),
    ],
)
def test_refuses_files_that_are_no_protocol(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        load_protocol(str(file))
    assert str(told.value).startswith(f"protocol {file}: ")


def test_refuses_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"protocol .*absent\.json: No such file or directory"):
        load_protocol(str(tmp_path / "absent.json"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"protocol .*folder\.json: Is a directory"):
        load_protocol(str(tmp_path / "folder.json"))


# ---- the results file


def test_sweep_keeps_and_reuses_results(tmp_path: Path) -> None:
    runs = [tiny(), tiny("mlp")]
    store, progress = Store(tmp_path), Silent()
    assert sweep(runs, store, progress) == Outcome(2, 0, 0)
    before = store.metrics()
    assert sweep(runs, store, progress) == Outcome(0, 2, 0)
    assert store.metrics() == before
    assert sweep([*runs, tiny(lr=1e-4)], store, progress).trained == 1
    store.close()


def test_pool_equals_one_process(tmp_path: Path) -> None:
    runs = [tiny(), tiny("mlp"), tiny(lr=1e30, epochs=5)]
    found = []
    for engine in (InProcess(), Pool(2)):
        store, progress = Store(tmp_path / type(engine).__name__), Silent()
        assert sweep(runs, store, progress, engine=engine) == Outcome(2, 0, 1)
        assert progress.epochs > 0
        found.append({k: without_time(v) for k, v in store.metrics().items()})
        store.close()
    assert found[0] == found[1]


def test_a_run_that_diverges_does_not_end_the_sweep(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert sweep([tiny(lr=1e30, epochs=5), tiny()], store, Silent()) == Outcome(1, 0, 1)
    assert [row["status"] for row in store.rows()] == ["failed", "done"]
    assert "the loss is" in store.rows()[0]["error"]
    store.close()


def test_killed_at_any_moment_loses_no_finished_run(tmp_path: Path) -> None:
    """Kills the sweep after one, two, ... finished runs, until it ends by itself."""
    script = f"""
from pathlib import Path
from madkernels.synthetics.protocol import Run, Training
from madkernels.runs.store import Store
from madkernels.runs.execute import Outcome
from madkernels.synthetics.sweep import sweep
from madkernels.synthetics.tasks.recall import Recall
class P:
    def run_starts(self, run): pass
    def point(self, run, epoch, point): pass
    def run_ends(self, run, outcome): print("ended", flush=True)
task = Recall(vocab_size=8, seqlen=8, train_examples=64)
runs = [Run("{ARCH}", task, Training(lr=3e-3, epochs=2, batch=16, dim=16, held_out=32, seed=s)) for s in range(5)]
sweep(runs, Store(Path({str(tmp_path)!r})), P())
print("all", flush=True)
"""
    finished: dict[str, Any] = {}
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        ended = [process.stdout.readline().strip() for _ in range(2)]
        process.send_signal(signal.SIGKILL)
        process.wait()
        store = Store(tmp_path)
        now = store.metrics()
        store.close()
        assert finished.items() <= now.items(), "a finished run was lost or done again"
        finished = now
        if "all" in ended:
            break
    assert len(finished) == 5


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "madkernels.cli", "mad", "run", "--arch", "mamba mlp", "--arch", "mlp",
               "--tasks", "recall", "--workers", "2", "--out", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = []
    deadline = time.monotonic() + 60
    while len(children) < 3 and time.monotonic() < deadline:  # two workers, and Python's resource tracker
        time.sleep(0.2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(2)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_refuses_a_file_of_another_version(tmp_path: Path) -> None:
    Store(tmp_path).close()
    db = sqlite3.connect(tmp_path / "results.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.commit()
    db.close()
    content = (tmp_path / "results.sqlite").read_bytes()
    with pytest.raises(ValueError, match=r"is of version 99, this madkernels writes version 2; choose another --out"):
        Store(tmp_path)
    assert (tmp_path / "results.sqlite").read_bytes() == content


def test_refuses_what_is_no_results_file(tmp_path: Path) -> None:
    (tmp_path / "results.sqlite").write_text("precious text, " * 100)
    with pytest.raises(ValueError, match="is damaged or no results file"):
        Store(tmp_path)
    assert (tmp_path / "results.sqlite").read_text().startswith("precious")
    (tmp_path / "taken" / "results.sqlite").mkdir(parents=True)
    with pytest.raises(OSError, match=r"cannot open .*results\.sqlite: unable to open"):
        Store(tmp_path / "taken")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.db.execute("PRAGMA query_only = 1")
    with pytest.raises(OSError, match=r"cannot write to .*results\.sqlite: attempt to write a readonly database"):
        store.start(tiny())
    store.close()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="another process is writing"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


# ---- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "madkernels.cli", "mad", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


def test_help_does_not_load_torch() -> None:
    check = "import sys, madkernels.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_command_trains_and_writes_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in this process, on the demo's settings cut short."""
    demo = load_protocol("demo")
    short = dataclasses.replace(demo.trainings[0], epochs=1, held_out=32)
    cut = dataclasses.replace(demo, trainings=(short,))
    monkeypatch.setattr("madkernels.synthetics.protocol.load_protocol", lambda name: cut)
    arguments = ["mad", "run", "--arch", "mlp", "--arch", "mamba mlp", "--tasks", "compression,memorization"]
    for trained in (4, 0):
        result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path), "--workers", "1"], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        assert f"{trained} runs trained, {4 - trained} found done" in result.output
        assert "MAD" in result.output
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arch"] for row in rows] == ["mlp", "mamba mlp"]
    assert all(0 <= float(row["mad_score"]) <= 1 for row in rows)
    with (tmp_path / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4


def test_command_shows_tasks() -> None:
    result = command("tasks", "recall", "--count", "1")
    assert result.returncode == 0, result.stderr
    assert "recall: recall the value" in result.stdout
    assert "key 0-" in result.stdout
    assert "answer" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--arch", "mambo"), "error: unknown layer 'mambo'; there are attention"),
        (("run", "--arch", "mamba:dstates=3"), "error: unknown option 'dstates'; mamba takes dstate"),
        (("run", "--arch", "attention:heads=7"), "error: attention:heads=7: dim 32 does not divide into 7 heads"),
        (("run", "--arch", "mlp", "--tasks", "recal"), "error: unknown task 'recal'; there are recall"),
        (
            ("run", "--arch", "mlp", "--protocol", "papers"),
            "error: unknown protocol 'papers'; there are demo, paper, strict",
        ),
        (("run", "--arch", "mlp", "--dtype", "int8"), "'int8' is not one of 'auto', 'float32', 'bfloat16'"),
        (("run", "--protocol", "paper"), "error: the paper protocol needs an architecture"),
        (
            ("run", "--arch", "mlp", "--engine", "slurm"),
            "'slurm' is not one of 'pool', 'process', 'ray'",
        ),
        (("run", "--arch", "mlp", "--device", "tpu"), "error: --device: 'tpu' is not known; expected cpu or cuda"),
        (("run", "--arch", "mlp", "--plugin", "absent.py"), "absent.py: FileNotFoundError"),
        (
            ("run", "--arch", "mlp", "--protocol", "strict-small", "--tasks", "memorization"),
            "error: protocol strict-small has no",
        ),
        (("status", "--out", "/nowhere"), "error: there are no results in /nowhere"),
        (("compare", "--out", "/nowhere"), "error: there are no results in /nowhere"),
        (("run", "--arch", "mlp", "--out", "/dev/null/x"), "error: cannot write to /dev/null/x: Not a directory"),
        (("tasks", "recal"), "error: unknown task 'recal'"),
        (("run", "--archs", "mlp"), "No such option"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if arguments[0] == "run" and "--out" not in arguments:
        arguments += ("--out", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["madkernels", "mad", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())  # where a message is in a frame, it wraps
    assert not list(tmp_path.glob("out/*.csv"))
