"""Training a language model: the same in pieces, over processes and after a kill; and what happens when things break."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import call, starter
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_common

from madkernels.models import HybridLM
from madkernels.models.layers import LAYERS, add_layer
from madkernels.runs.engines import Diverged
from madkernels.scaling.training import checkpoint, trainer as training
from madkernels.scaling.training.data import Batch, Corpus, held_out
from madkernels.scaling.training.guard import Guard
from madkernels.scaling.training.prepare import prepare
from madkernels.scaling.training.recipe import LMRun, Recipe
from madkernels.scaling.training.stop import Stop, Stopped
from madkernels.scaling.training.tokenizers import Bytes
from madkernels.scaling.training.trainer import Execution, train

RECIPE = Recipe(steps=8, batch=4, seqlen=32, lr=3e-3, held_out=6, seed=3)
ARCH = "mamba:dstate=4 hyena swiglu attention:heads=2 moe:experts=4,hidden=8"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "data"
    texts = (
        Path(module.__file__).read_bytes() for module in (argparse, subprocess, json.decoder, dataclasses) if module.__file__
    )
    parts = (text[i : i + 4000] for text in texts for i in range(0, len(text), 4000))
    prepare(parts, folder, Bytes(), validation=0.2)
    return folder


def run_of(data: Path, out: Path | None = None, arch: str = ARCH, **changes: Any) -> LMRun:
    recipe = dataclasses.replace(RECIPE, **changes)
    return LMRun(arch, 16, 257, recipe, Corpus(data).sha256, corpus=str(data), out=None if out is None else str(out))


def losses(result: dict[str, Any]) -> list[float]:
    return [point["loss"] for point in result["curve"]]


def log(out: Path) -> list[dict[str, float]]:
    """Without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def test_it_learns_and_measures(data: Path) -> None:
    run = run_of(data, arch="hyena swiglu", steps=60)
    result = train(run)
    assert result["loss"] < losses(result)[0] - 1
    assert result["tokens"] == 60 * 4 * 32
    model = training.build(run)
    assert result["params"] == sum(p.numel() for p in model.backbone.parameters())
    torch.testing.assert_close(losses(train(run_of(data, steps=1)))[0], 5.55, atol=0.1, rtol=0)  # log 257, before any step


@pytest.mark.parametrize("how", [{"micro_batch": 1}, {"checkpointing": "full"}, {"checkpointing": "selective"}], ids=str)
def test_how_it_is_done_changes_nothing(data: Path, how: dict[str, Any]) -> None:
    whole, parts = train(run_of(data)), train(run_of(data), Execution(**how))
    torch.testing.assert_close(losses(parts), losses(whole), atol=2e-5, rtol=0)
    torch.testing.assert_close(parts["loss"], whole["loss"], atol=2e-5, rtol=0)


def test_measuring_on_the_way_changes_nothing(data: Path) -> None:
    changes: dict[str, Any] = {"arch": ARCH.replace("hidden=8", "hidden=8,balance=0.01"), "schedule": "constant"}
    result, wanted = train(run_of(data, **changes), Execution(eval_every=3)), train(run_of(data, **changes))
    assert losses(result) == losses(wanted)
    assert result["loss"] == wanted["loss"]
    measured = {point["step"]: point["held_out_loss"] for point in result["curve"] if "held_out_loss" in point}
    assert list(measured) == [3, 6, 8]
    assert measured[3] == train(run_of(data, **changes, steps=3))["loss"]
    assert measured[8] == result["loss"]


def test_compiled_layers_do_the_same(data: Path) -> None:
    run = run_of(data, arch="swiglu", steps=3)
    torch.testing.assert_close(losses(train(run, Execution(compile=True))), losses(train(run)), atol=1e-5, rtol=0)


def test_half_precision_is_near(data: Path) -> None:
    single, half = train(run_of(data)), train(run_of(data, dtype="bfloat16"))
    assert losses(half) != losses(single)
    torch.testing.assert_close(losses(half), losses(single), atol=0.02, rtol=0)


def test_a_log_for_tensorboard(data: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(run_of(data, tmp_path))
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (point["step"], pytest.approx(point["loss"])) for point in result["curve"]
    ]


def test_recomputing_remembers_less(data: Path) -> None:
    kept = {}
    for name in training.CHECKPOINTING:
        run, sizes = run_of(data, arch="mamba swiglu"), list[int]()
        trainer = training._Trainer(run, Execution(checkpointing=name), None)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # noqa: B023
            trainer.objective.model.backbone(torch.randn(2, 32, 16))
        kept[name] = sum(sizes)
    assert kept["full"] < 0.5 * kept["none"]


def test_documents_are_kept_apart_when_asked(data: Path) -> None:
    trainer = training._Trainer(run_of(data, documents=True), Execution(), None)
    tokens = torch.randint(0, 256, (2, 32))
    tokens[0, 10] = 256
    changed = tokens.clone()
    changed[0, 3] += 1 if tokens[0, 3] < 255 else -1
    seen = []
    trainer.objective.model.backbone.register_forward_hook(lambda module, args, output: seen.append(output.view(2, 32, -1)))
    for t in (tokens, changed):
        trainer.loss(Batch(t, t, 256))
    same = (seen[0] == seen[1]).all(-1)
    assert same[1].all()
    assert same[0, 11:].all()
    assert not same[0, 3:11].any()


@pytest.mark.parametrize("seqlen", [1, 33])
def test_documents_kept_apart_to_the_end_with_every_layer(data: Path, seqlen: int) -> None:
    """Rows of an odd length, measured in one piece and row by row, by one model: its one step is too small to tell, as the
    first step of AdamW goes by the signs of gradients, those of rounding too."""
    run = run_of(data, arch=" ".join(LAYERS), documents=True, seqlen=seqlen, steps=1, lr=1e-9)
    run = dataclasses.replace(run, dim=64)
    whole, parts = train(run), train(run, Execution(micro_batch=1))
    assert 4 < whole["loss"] < 8
    torch.testing.assert_close(parts["loss"], whole["loss"], atol=1e-5, rtol=0)


def test_the_rate_rises_and_falls() -> None:
    cosine = Recipe(steps=100, batch=1, seqlen=1, lr=1.0, warmup=0.1)
    assert [cosine.rate(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert cosine.rate(99) == pytest.approx(0.1)
    assert cosine.rate(54) + cosine.rate(55) == pytest.approx(1.1, abs=1e-3)  # halfway
    wsd = dataclasses.replace(cosine, schedule="wsd")
    assert [wsd.rate(step) for step in (9, 40, 80, 99)] == pytest.approx([1, 1, 1, 0.1])
    assert 0.1 < wsd.rate(90) < 1
    constant = dataclasses.replace(cosine, schedule="constant")
    assert [constant.rate(step) for step in (4, 9, 10, 99)] == pytest.approx([0.5, 1, 1, 1])


# ---- over processes


def command(data: Path, out: Path, *options: str, processes: int = 1, steps: int = 8) -> list[str]:
    return [
        *starter(processes), "-m", "madkernels.cli", "train", "run", "--data", str(data), "--out", str(out), "--arch", ARCH,
        "--dim", "16", "--lr", "3e-3", "--steps", str(steps), "--batch", "4", "--seqlen", "32", "--log-every", "1", *options,
    ]  # fmt: skip


def killed(arguments: list[str], out: Path, after: int) -> None:
    """Starts it, and kills all of it without warning once a checkpoint says that so many steps are done."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    deadline = time.monotonic() + 240
    while not (found := checkpoint.steps_in(out / "checkpoints")) or int(found[-1].name[5:]) < after:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = [p for p in Path("/proc").iterdir() if p.name.isdigit() and str(out).encode() in _command_line(p)]
    for worker in workers:
        os.kill(int(worker.name), signal.SIGKILL)
    process.wait()
    while any(str(out).encode() in _command_line(worker) for worker in workers):
        time.sleep(0.01)


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps in one process that nothing befell."""
    out = tmp_path_factory.mktemp("whole")
    call(command(data, out, steps=60))
    return out


def test_two_processes_equal_one(data: Path, whole: Path, tmp_path: Path) -> None:
    call(command(data, tmp_path, processes=2, steps=60))
    one, two = log(whole), log(tmp_path)
    assert [point["step"] for point in two] == list(range(1, 61))
    torch.testing.assert_close([p["loss"] for p in two], [p["loss"] for p in one], atol=1e-3, rtol=0)
    torch.testing.assert_close([p["norm"] for p in two][:10], [p["norm"] for p in one][:10], atol=1e-3, rtol=1e-3)


BUILD = """
import resource
import torch
from madkernels.scaling.training import trainer
from madkernels.scaling.training.recipe import LMRun, Recipe

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

with trainer.processes("cpu"):
    def prepared(arch):
        run = LMRun(arch, 512, 257, Recipe(steps=1, batch=4, seqlen=32, lr=1e-3), "", corpus="")
        return trainer._objective(run, trainer.Execution(), torch.device("cpu"), 2)

    prepared("swiglu")  # what the libraries take
    before = peak()
    model = prepared("64*swiglu:hidden=1536")
    print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def test_no_process_holds_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it is one's own in two processes, and a layer is whole while it is made."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # as over 32 MiB: what is freed goes back to the system
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    shares = call([*starter(2), str(script)]).split()
    assert len(shares) == 2
    assert max(map(float, shares)) < 0.7


def test_a_killed_run_goes_on_exactly(data: Path, whole: Path, tmp_path: Path) -> None:
    arguments = command(data, tmp_path, "--save-every", "0.05", steps=60)
    killed(arguments, tmp_path, after=10)
    assert len(log(tmp_path)) < 60, "the test wants a run that was killed in its middle"
    call(arguments)
    assert log(tmp_path) == log(whole)


def test_two_processes_are_resumed_by_one(data: Path, whole: Path, tmp_path: Path) -> None:
    killed(command(data, tmp_path, "--save-every", "0.05", processes=2, steps=60), tmp_path, after=10)
    assert int(checkpoint.steps_in(tmp_path / "checkpoints")[-1].name[5:]) < 60
    call(command(data, tmp_path, steps=60))
    torch.testing.assert_close([p["loss"] for p in log(tmp_path)], [p["loss"] for p in log(whole)], atol=1e-3, rtol=0)


# ---- experts over processes


@pytest.fixture(scope="module")
def short(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps in one process."""
    out = tmp_path_factory.mktemp("short")
    call(command(data, out))
    return out


@pytest.fixture(scope="module")
def of_four(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in four, of which two and two share the experts; there are its last two checkpoints."""
    out = tmp_path_factory.mktemp("of_four")
    call(command(data, out, "--expert-parallel", "2", "--save-every", "0", processes=4))
    return out


def assert_same_training(out: Path, wanted: Path) -> None:
    ours, theirs = log(out), log(wanted)
    assert [point["step"] for point in ours] == list(range(1, 9))
    for name in ("loss", "norm"):
        torch.testing.assert_close([p[name] for p in ours], [p[name] for p in theirs], atol=1e-4, rtol=0)
    weights, others = (checkpoint.load_model(path).state_dict() for path in (out, wanted))
    torch.testing.assert_close(weights, others, atol=1e-4, rtol=0)


def test_experts_over_four_processes_change_nothing(short: Path, of_four: Path) -> None:
    assert_same_training(of_four, short)


def test_experts_over_two_processes_in_pieces_change_nothing(data: Path, short: Path, tmp_path: Path) -> None:
    pieces = ["--micro-batch", "1", "--checkpointing", "selective"]
    call(command(data, tmp_path, "--expert-parallel", "2", *pieces, processes=2))
    assert_same_training(tmp_path, short)


@pytest.mark.parametrize(("processes", "sharing"), [(1, 1), (4, 2), (4, 4)])
def test_shared_experts_are_resumed(
    data: Path, short: Path, of_four: Path, tmp_path: Path, processes: int, sharing: int
) -> None:
    out = tmp_path / "out"
    shutil.copytree(of_four, out)
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    told = call(command(data, out, "--expert-parallel", str(sharing), processes=processes))
    assert "\ngoing on from step 7\n" in told
    assert_same_training(out, short)


@pytest.mark.parametrize(
    ("arch", "ranks", "message"),
    [
        ("moe swiglu moe:experts=9", 2, "expert_parallel is 2, which does not divide the 9 experts"),
        ("moe", 3, "expert_parallel is 2, which does not divide the 3 processes"),
        ("swiglu", 2, "expert_parallel is 2, but swiglu has no moe layer"),
    ],
)
def test_experts_that_cannot_be_shared(arch: str, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training._check_experts(HybridLM(arch, vocab_size=5, dim=4), 2, ranks)


def test_who_shares_experts_is_looked_at_before_the_training(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expert_parallel is 2, which does not divide the 1 processes"):
        train(run_of(data), Execution(expert_parallel=2))
    with pytest.raises(ValueError, match="expert_parallel is 0; expected a whole number from 1"):
        Execution(expert_parallel=0)
    monkeypatch.delattr(_fsdp_common, "ShardPlacementResult")
    with pytest.raises(ValueError, match=r"expert_parallel takes torch 2\.12 or later"):
        training._placement(None)


# ---- signals


def signalled(arguments: list[str], number: signal.Signals, out: Path, worker: bool = False) -> tuple[int, str, str]:
    """Starts it, and sends the signal to it, or to one of its workers, when ten steps are done: how it ends."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 10/"):
            break
    workers = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and str(out).encode() in _command_line(p)]
    os.kill(max(workers) if worker else process.pid, number)
    told, errors = process.communicate(timeout=120)
    return process.returncode, told.splitlines()[-1], errors


def test_an_interrupt_saves_and_the_same_command_goes_on_exactly(data: Path, whole: Path, tmp_path: Path) -> None:
    arguments = command(data, tmp_path, steps=60)
    code, told, errors = signalled(arguments, signal.SIGINT, tmp_path)
    assert (code, errors) == (130, "")
    found = re.fullmatch(r"stopped at step (\d+), saved; the same command goes on", told)
    assert found, told
    assert f"\ngoing on from step {found[1]}\n" in call(arguments)
    assert log(tmp_path) == log(whole)


def test_a_signal_to_one_process_stops_all_at_one_step(data: Path, tmp_path: Path) -> None:
    code, _, errors = signalled(command(data, tmp_path, processes=2, steps=60), signal.SIGTERM, tmp_path, worker=True)
    assert code != 0
    assert "exitcode  : 130" in errors
    (found,) = checkpoint.steps_in(tmp_path / "checkpoints")
    assert 10 <= checkpoint.verify(found)["step"] < 60


def test_a_run_that_is_stopped_at_every_step_ends_as_one_that_is_not(data: Path, tmp_path: Path) -> None:
    """Means of the log that a stop cuts through, and held-out losses on the way, included."""
    how = Execution(log_every=3, eval_every=4)
    wanted = train(run_of(data), how)
    for step in range(1, 9):
        stop, begun = Stop(), list[int]()
        stop.wanted = True
        with pytest.raises(Stopped, match=f"stopped at step {step}, saved; the same command goes on"):
            train(run_of(data, tmp_path), how, on_start=begun.append, stop=stop)
        assert begun == [step - 1]
    result = train(run_of(data, tmp_path), how)
    assert [result[name] for name in ("loss", "train_loss")] == [wanted[name] for name in ("loss", "train_loss")]
    for name in ("step", "loss", "held_out_loss"):
        assert [p.get(name) for p in result["curve"]] == [p.get(name) for p in wanted["curve"]]


def test_a_stop_while_it_measures(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, stop = training._Trainer.loss, Stop()

    def signalled(self: Any, batch: Batch) -> torch.Tensor:
        stop.wanted |= not self.objective.training
        return honest(self, batch)

    monkeypatch.setattr(training._Trainer, "loss", signalled)
    with pytest.raises(Stopped, match="stopped at step 8, saved"):
        train(run_of(data, tmp_path), stop=stop)
    monkeypatch.setattr(training._Trainer, "loss", honest)
    assert train(run_of(data, tmp_path))["loss"] == train(run_of(data))["loss"]


def test_what_a_stop_could_not_save_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stop = Stop()
    stop.wanted = True
    with pytest.raises(Stopped, match="stopped at step 1, saved"):
        train(run_of(data, tmp_path), stop=stop)
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(Stopped, match="stopped at step 2, not saved; the same command goes on from step 1"):
        train(run_of(data, tmp_path), stop=stop)


def test_a_second_interrupt_ends_at_once() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stop() as stop:
        stop.check()
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.wanted
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        with pytest.raises(KeyboardInterrupt):  # nothing is under way that could be finished
            os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with Stop(alone=False):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_batch_that_does_not_divide_is_told(data: Path) -> None:
    with pytest.raises(ValueError, match="a batch of 4 rows does not divide among 1 processes, in micro-batches of 3"):
        train(run_of(data), Execution(micro_batch=3))


# ---- checkpoints


def test_a_checkpoint_gives_the_model_back(data: Path, tmp_path: Path) -> None:
    result = train(run_of(data, tmp_path))
    model = checkpoint.load_model(tmp_path)
    rows = held_out(Corpus(data).split("validation"), 32, 6)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    assert float(loss) == pytest.approx(result["loss"], abs=1e-5)


def test_a_half_written_checkpoint_is_never_found(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000006").mkdir(parents=True)
    assert checkpoint.steps_in(folder) == []
    assert train(run_of(data, tmp_path))["curve"][0]["step"] == 1


def test_a_full_disk_costs_the_checkpoint_only(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        (tmp_path / "checkpoints" / ".step-00000008" / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    result = train(run_of(data, tmp_path))
    (warning,) = result["warnings"]
    assert "cannot save the checkpoint" in warning
    assert "No space left on device" in warning
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert result["loss"] == train(run_of(data))["loss"]


def test_another_run_in_the_folder_is_refused(data: Path, tmp_path: Path) -> None:
    train(run_of(data, tmp_path))
    with pytest.raises(ValueError, match=r"step-00000008 is of another run \(arch, lr\); choose another --out"):
        train(run_of(data, tmp_path, arch="swiglu", lr=1e-3))


def test_other_data_are_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="holds other data than those of the run"):
        train(dataclasses.replace(run_of(data), data="0" * 64))


def test_two_writers_in_one_folder_are_refused(data: Path, tmp_path: Path) -> None:
    held = training._Trainer(run_of(data, tmp_path), Execution(), None)
    with pytest.raises(ValueError, match=r"another process is writing to .*log\.jsonl"):
        train(run_of(data, tmp_path))
    held.log.close()
    train(run_of(data, tmp_path))


# ---- the guard


def test_a_loss_that_is_no_number_is_skipped(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = training._Trainer.loss
    calls = 0

    def sometimes(self: Any, batch: Batch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return honest(self, batch) * (float("nan") if calls in (3, 4) else 1)

    monkeypatch.setattr(training._Trainer, "loss", sometimes)
    result = train(run_of(data, arch="swiglu"))
    assert result["left_out"] == 2
    assert result["loss"] < 6


def test_a_run_that_diverges_says_so(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        training._Trainer, "loss", lambda self, batch: self.objective.model.embedding.weight.sum() * float("nan")
    )
    with pytest.raises(Diverged, match="20 steps in a row skipped; at step 19 the loss is nan"):
        train(run_of(data, steps=30))


def test_a_spike_is_skipped() -> None:
    guard = Guard()
    assert all(guard.allows(2.0, 1.0 + 0.1 * (i % 3)) for i in range(60))
    assert not guard.allows(2.0, 50.0)
    assert guard.allows(2.0, 10.0)
    assert (guard.left_out, guard.in_a_row) == (1, 0)


def test_gradients_that_stay_large_are_let_in() -> None:
    guard = Guard()
    assert all(guard.allows(2.0, 1.0) for _ in range(60))
    found = [guard.allows(2.0, 300.0) for _ in range(40)]
    assert not found[0]
    assert all(found[12:])
    assert not guard.allows(math.nan, 1.0)


class NextToken(torch.nn.Module):
    """Adds what comes next, behind a gate that is shut at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * x.roll(-1, 1)


def test_a_layer_that_looks_ahead_is_not_trained(data: Path) -> None:
    add_layer("next-token", NextToken)
    try:
        with pytest.raises(ValueError, match="layer next-token is not causal"):
            train(run_of(data, arch="next-token"))
    finally:
        del LAYERS["next-token"]
