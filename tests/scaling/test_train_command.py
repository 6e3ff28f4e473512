"""`madkernels train` as it is typed: one line and an exit code for what the user can put right."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from madkernels import _C
from madkernels.cli.main import main
from madkernels.models import HybridLM, counting
from madkernels.models.presets import preset
from madkernels.scaling.training import trainer as training
from madkernels.scaling.training.data import Corpus
from madkernels.scaling.training.prepare import prepare
from madkernels.scaling.training.tokenizers import Bytes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "data"
    prepare((f"document {i} ".encode() * 9 for i in range(60)), folder, Bytes(), validation=0.2)
    return folder


def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    monkeypatch.setattr(sys, "argv", ["madkernels", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code or 0
    assert isinstance(code, int)
    told, errors = capsys.readouterr()
    return code, told, errors


def options(data: Path, out: Path) -> list[object]:
    return [
        "train", "run", "--data", data, "--out", out, "--arch", "mlp", "--dim", "8", "--lr", "3e-3", "--steps", "6",
        "--batch", "2", "--seqlen", "16",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("device", "wanted"),
    [
        ("cuda", "--device cuda: torch sees no GPU; see madkernels doctor"),
        ("cuda:3", "--device cuda:3: torch sees no GPU; see madkernels doctor"),
        *(
            (name, f"--device: {name!r} is not known; expected cpu, cuda or cuda:<number>")
            for name in ("gpu", "", "cuda:", "cuda:x", "cpu:0", "mps")
        ),
    ],
)
def test_a_device_that_is_not_here(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = called(monkeypatch, capsys, *options(data, tmp_path / "run"), "--device", device)
    assert found == (2, "", f"error: {wanted}\n")
    assert not (tmp_path / "run").exists()


def test_a_device_under_torchrun(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process has a GPU of its own, so none is numbered, and there must be one for each."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, wanted in (
        ("cuda:1", "--device: 'cuda:1' is not known; expected cpu or cuda"),
        ("cuda", "--device cuda: torch sees 1 GPUs; see madkernels doctor"),
    ):
        found = called(monkeypatch, capsys, *options(data, tmp_path), "--device", device)
        assert found == (2, "", f"error: {wanted}\n")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--arch", "mlp", "--dim", "8"], "--arch has no learning rate of its own: give --lr"),
        (["--arch", "mlp"], "give --preset, or --arch and --dim"),
        (["--preset", "mamba-70m", "--dim", "8"], "give --preset, or --arch and --dim"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_missing_is_told_before_torch_is_loaded(arguments: list[str], wanted: str) -> None:
    """In another process: here it is loaded."""
    command = ["train", "run", "--data", "D", "--out", "O", "--steps", "1", "--batch", "1", *arguments]
    script = (
        "import sys; from madkernels.cli.main import main\n"
        f"sys.argv = ['madkernels', *{command!r}]\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout, found.stderr) == (2, "False\n", f"error: {wanted}\n")


def test_a_rate_of_zero_is_not_that_of_the_preset(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", data, "--out", tmp_path, "--steps", "1", "--batch", "1", "--preset", "mamba-70m", "--lr", "0"]
    assert called(monkeypatch, capsys, "train", "run", *given) == (2, "", "error: lr is 0.0; expected a number above 0\n")


def test_the_work_is_that_of_the_vocabulary_of_the_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", data, "--out", tmp_path / "run", "--steps", "2", "--batch", "3", "--seqlen", "64"]
    code, told, _ = called(monkeypatch, capsys, "train", "run", *given, "--preset", "mamba-70m", "--dry-run")
    chosen = preset("mamba-70m")
    model = HybridLM(chosen.arch, vocab_size=Corpus(data).vocab_size, dim=chosen.dim, tied=True)
    assert (code, f" {2 * 3 * 64 * counting.training_flops(model, 64):.3g} FLOPs" in told) == (0, True), told


def test_a_run_that_diverges(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options(data, tmp_path), "--lr", "1e30", "--steps", "60"]
    code, _, errors = called(monkeypatch, capsys, *arguments)
    assert code == 2
    assert errors.startswith("error: the training diverged: 20 steps in a row skipped; at step ")
    assert errors.count("\n") == 1


def test_it_says_where_it_goes_on_and_what_could_not_be_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options(data, tmp_path), "--save-every", "0", "--log-every", "2"]
    assert "going on" not in called(monkeypatch, capsys, *arguments)[1]
    part = tmp_path / "checkpoints" / "step-00000006" / "__0_0.distcp"
    part.unlink()
    code, told, errors = called(monkeypatch, capsys, *arguments)
    warning = f"{part} is damaged: No such file or directory; trying the checkpoint before it"
    assert (code, errors) == (0, "")
    assert told.splitlines()[1:3] == [f"warning: {warning}", "going on from step 4"]
    assert told.splitlines()[-1] == f"Warnings: 1, the last: {warning}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("owner", "method"), [(training._Trainer, "update"), (FileSystemWriter, "write_data")])
def test_a_signal_in_a_step_or_a_save_lets_it_be_finished(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    owner: type,
    method: str,
) -> None:
    honest = getattr(owner, method)

    def signalled(*arguments: Any) -> Any:
        signal.raise_signal(number)
        return honest(*arguments)

    arguments = [*options(data, tmp_path), "--save-every", "0", "--log-every", "1"]
    monkeypatch.setattr(owner, method, signalled)
    code, told, errors = called(monkeypatch, capsys, *arguments)
    assert (code, errors) == (130, "")
    assert told.splitlines()[-1] == "stopped at step 1, saved; the same command goes on"
    monkeypatch.setattr(owner, method, honest)
    code, told, errors = called(monkeypatch, capsys, *arguments)
    assert (code, errors) == (0, "")
    assert "\ngoing on from step 1\n" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_of_data_that_are_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def signalled(*_: object) -> list[int]:
        signal.raise_signal(number)
        return []

    (tmp_path / "text").write_text("text")
    monkeypatch.setattr(Bytes, "encode", signalled)
    assert called(monkeypatch, capsys, "train", "prepare", tmp_path / "text", "--out", tmp_path / "data") == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize(("number", "deferred"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_a_signal_that_ends_it_at_once(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    deferred: bool,
) -> None:
    """Before the first step, and the second time in the middle of one or of a save."""

    def interrupted(*args: object, **options: object) -> None:
        signal.raise_signal(number)
        if deferred:
            signal.raise_signal(number)

    where = (FileSystemWriter, "write_data") if deferred else (training._Trainer, "resume")
    monkeypatch.setattr(*where, interrupted)
    code, told, errors = called(monkeypatch, capsys, *options(data, tmp_path))
    assert (code, errors) == (130, "")
    assert told.splitlines()[-1] == "stopped at once; the same command goes on from the last checkpoint"


# ---- recipe files


def test_a_recipe_file_gives_options_and_what_is_typed_counts_more(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the file that a run leaves does the same run again."""
    recipe, out = tmp_path / "my.toml", tmp_path / "run"
    recipe.write_text(
        f'data = "{data}"\narch = "mlp"\ndim = 8\nlr = 3e-3\nsteps = 6\nbatch = 2\nseqlen = 16\n'
        "log-every = 1\neval-every = 3\ndocuments = true\n"
    )
    code, told, errors = called(monkeypatch, capsys, "train", "run", "--recipe", recipe, "--out", out, "--steps", 4)
    assert (code, errors) == (0, "")
    assert [line.split(":")[0] for line in told.splitlines() if line.startswith("step")] == [
        f"step {i}/4 ({25 * i}%)" for i in (1, 2, 3, 4)
    ]
    steps = [line for line in told.splitlines() if line.startswith("step")]
    assert [i for i, line in enumerate(steps, 1) if "held out loss" in line] == [3, 4]
    again = tmp_path / "again"
    code, repeated, _ = called(monkeypatch, capsys, "train", "run", "--recipe", out / "recipe.toml", "--out", again)
    assert code == 0
    assert losses(repeated) == losses(told)
    assert (again / "recipe.toml").read_text() == (out / "recipe.toml").read_text()


def losses(told: str) -> list[str]:
    return [line.split(",")[0] for line in told.splitlines() if line.startswith("step")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "has 'stepz', which is no option of this command; did you mean steps?"),
        ("eval_evry = 3", "has 'eval_evry', which is no option of this command; did you mean eval-every?"),
        ("recipe = 'x'", "has 'recipe', which is no option of this command; it takes data, "),
        ("[model]\ndim = 8", "has 'model', which is no option of this command; it takes data, "),
        ("steps =", "is no TOML: "),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_recipe_files_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    recipe = tmp_path / "my.toml"
    if text is not None:
        recipe.write_text(text)
    code, _, errors = called(monkeypatch, capsys, "train", "run", "--recipe", recipe)
    assert code == 2
    assert errors.startswith(f"error: --recipe: {recipe} {message}")


def rates_of(told: str) -> list[str]:
    lines = [line for line in told.splitlines() if line.startswith("step")]
    return [part for line in lines for part in line.split(", ") if part.startswith("lr")]


def test_a_finished_run_is_extended(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its learning rate goes on as that of the longer run. Fewer steps, or another option, is another run."""
    run = [*options(data, tmp_path / "run"), "--log-every", 1]
    called(monkeypatch, capsys, *run)
    code, told, _ = called(monkeypatch, capsys, *run, "--steps", 9)
    assert code == 0
    extended = "extended from 6 to 9 steps; learning rate 0.0003 so far, 0.000808 from here on"
    assert f"{extended}\ngoing on from step 6\nstep 7/9 (78%): " in told
    whole = called(monkeypatch, capsys, *options(data, tmp_path / "whole"), "--log-every", 1, "--steps", 9)[1]
    assert rates_of(told) == rates_of(whole)[6:]
    assert "is of another run (steps)" in called(monkeypatch, capsys, *run)[2]
    assert "is of another run (seed, steps)" in called(monkeypatch, capsys, *run, "--steps", 12, "--seed", 1)[2]


def test_a_run_of_a_constant_learning_rate_is_extended_to_the_longer_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose every step it has."""
    part, whole = (
        [*options(data, tmp_path / name), "--log-every", 1, "--schedule", "constant", "--lr", 0.1]
        for name in ("part", "whole")
    )
    called(monkeypatch, capsys, *part)
    told = called(monkeypatch, capsys, *part, "--steps", 9)[1]
    assert "\nextended from 6 to 9 steps; learning rate 0.1 so far, 0.1 from here on\n" in told
    assert losses(told) == losses(called(monkeypatch, capsys, *whole, "--steps", 9)[1])[6:]


def test_a_recipe_that_cannot_be_kept_costs_a_warning(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *args: Any, **options: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    called(monkeypatch, capsys, *options(data, tmp_path))
    kept = (tmp_path / "recipe.toml").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        code, told, _ = called(patch, capsys, *options(data, tmp_path), "--save-every", 9)
    assert code == 0
    assert f"warning: cannot write {tmp_path / 'recipe.toml'}: No space left on device\ngoing on from step 6\n" in told
    assert (tmp_path / "recipe.toml").read_text() == kept


@pytest.mark.parametrize("steps", ["true", "4.5"])
def test_values_of_a_recipe_are_read_as_if_they_were_typed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: str
) -> None:
    """Where neither is a whole number."""
    (tmp_path / "my.toml").write_text(f"steps = {steps}\n")
    code, _, errors = called(
        monkeypatch, capsys, "train", "run", "--recipe", tmp_path / "my.toml", "--data", data, "--out", tmp_path / "run",
        "--arch", "mlp", "--dim", 8, "--lr", 1, "--batch", 2,
    )  # fmt: skip
    assert code == 2
    assert "Invalid value for '--steps'" in errors


@pytest.mark.parametrize(("faster", "found"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_the_faster_dtype_and_the_recipe_has_its_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], faster: bool, found: str
) -> None:
    monkeypatch.setattr(_C, "cpu_bfloat16_dot", lambda: faster)
    code, told, _ = called(monkeypatch, capsys, *options(data, tmp_path / "run"), "--dtype", "auto")
    assert code == 0
    assert f"dtype: {found}\n" in told
    assert f'dtype = "{found}"\n' in (tmp_path / "run" / "recipe.toml").read_text()


@pytest.mark.parametrize(("faster", "found"), [(True, "bfloat16"), (False, "float32")])
def test_auto_of_mad(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], faster: bool, found: str) -> None:
    monkeypatch.setattr(_C, "cpu_bfloat16_dot", lambda: faster)
    code, told, _ = called(monkeypatch, capsys, "mad", "run", "--dry-run", "--arch", "mlp", "--dtype", "auto")
    assert code == 0
    assert told.startswith(f"dtype: {found}\n")
