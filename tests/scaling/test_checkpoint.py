"""Checkpoints and data that are not what was written: named, passed over or refused, and never run."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from madkernels.scaling.training import checkpoint
from madkernels.scaling.training.data import Corpus
from madkernels.scaling.training.log import Log
from madkernels.scaling.training.prepare import prepare
from madkernels.scaling.training.recipe import LMRun, Recipe
from madkernels.scaling.training.tokenizers import Bytes
from madkernels.scaling.training.trainer import Execution, train

HOW = Execution(save_every=0, log_every=2)
WEIGHT = "model.model.embedding.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "data"
    prepare((f"document {i} ".encode() * 9 for i in range(60)), folder, Bytes(), validation=0.2)
    return folder


def run_of(data: Path, out: Path) -> LMRun:
    recipe = Recipe(steps=6, batch=2, seqlen=16, lr=3e-3, held_out=4)
    return LMRun("mlp", 8, 257, recipe, Corpus(data).sha256, corpus=str(data), out=str(out))


@pytest.fixture(scope="module")
def sound(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run that ended, and what came out."""
    out = tmp_path_factory.mktemp("sound") / "run"
    result = train(run_of(data, out), HOW)
    assert [path.name for path in checkpoint.steps_in(out / "checkpoints")] == ["step-00000004", "step-00000006"]
    return out, result


@pytest.fixture
def out(sound: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound[0], tmp_path / "run"))


def losses(result: dict[str, Any]) -> list[float]:
    return [result["loss"], result["train_loss"], *(point["loss"] for point in result["curve"])]


# ---- damage


def _cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _flip(path: Path) -> None:
    found = bytearray(path.read_bytes() or b" ")
    found[len(found) // 2] ^= 0xFF
    path.write_bytes(found)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: _cut(path, 0),
    "half": lambda path: _cut(path, 0.5),
    "flipped": _flip,
    "folder": _folder,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    data: Path, sound: tuple[Path, dict[str, Any]], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for name in sorted(path.name for path in (sound[0] / "checkpoints" / "step-00000006").iterdir()):
        out = tmp_path / name / "run"
        shutil.copytree(sound[0], out)
        newest = out / "checkpoints" / "step-00000006"
        damage(newest / name)
        with pytest.raises(ValueError, match=re.escape(name)) as refused:
            checkpoint.load_model(newest)
        assert "\n" not in str(refused.value)
        with pytest.warns(UserWarning, match=re.escape(str(newest / name))):
            checkpoint.load_model(out)
        steps = list[int]()
        result = train(run_of(data, out), HOW, on_start=steps.append)
        assert steps == [4]
        assert losses(result) == losses(sound[1])
        assert [str(newest / name) in warning for warning in result["warnings"]] == [True]
        assert losses(train(run_of(data, out), HOW)) == losses(sound[1])  # from the one that took its place


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_other_damage_of_a_run_changes_nothing(
    data: Path, sound: tuple[Path, dict[str, Any]], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for name in [path.name for path in sound[0].iterdir() if path.is_file()]:
        out = tmp_path / name / "run"
        shutil.copytree(sound[0], out)
        damage(out / name)
        if (name, damage) == ("log.jsonl.lock", _folder):
            with pytest.raises(OSError, match=r"cannot write to .*run: Is a directory; choose another --out"):
                train(run_of(data, out), HOW)
        else:
            assert losses(train(run_of(data, out), HOW)) == losses(sound[1])


def test_where_no_checkpoint_is_sound(data: Path, out: Path) -> None:
    for step in ("step-00000004", "step-00000006"):
        _flip(out / "checkpoints" / step / "__0_0.distcp")
    folder = re.escape(str(out / "checkpoints"))
    with pytest.raises(ValueError, match=f"step-00000004/__0_0.distcp is damaged: .*; remove {folder} to train from the"):
        train(run_of(data, out), HOW)
    earlier = pytest.raises(ValueError, match=r"__0_0\.distcp is damaged: .*; there is no earlier one")
    with pytest.warns(UserWarning, match="step-00000006"), earlier:
        checkpoint.load_model(out)
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").write_text("")
    with pytest.raises(ValueError, match=f"{folder} is no folder of checkpoints"):
        train(run_of(data, out), HOW)


@pytest.mark.parametrize("name", ["run.json", "SHA256SUMS"])
def test_no_flipped_byte_passes(out: Path, name: str) -> None:
    found = out / "checkpoints" / "step-00000006"
    whole = (found / name).read_bytes()
    for place in range(len(whole)):
        (found / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(checkpoint.Damaged, match=f"{name}|damaged|missing"):
            checkpoint.verify(found)


def test_the_model_of_a_run_or_of_a_checkpoint(out: Path, tmp_path: Path) -> None:
    newest = out / "checkpoints" / "step-00000006"
    weights = [checkpoint.load_model(path).embedding.weight for path in (out, str(out), newest, str(newest))]
    assert all((weight == weights[0]).all() for weight in weights)
    assert (checkpoint.load_model(out / "checkpoints" / "step-00000004").embedding.weight != weights[0]).any()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint"):
        checkpoint.load_model(tmp_path)
    for absent in (tmp_path / "absent", tmp_path / "run" / "log.jsonl"):
        with pytest.raises(ValueError, match=f"{absent} (does not exist|is neither a run, a checkpoint)"):
            checkpoint.load_model(absent)


def test_a_checkpoint_without_checksums_is_still_read(data: Path, out: Path, sound: tuple[Path, dict[str, Any]]) -> None:
    """As they were written first: run.json had no format and no points."""
    for found in checkpoint.steps_in(out / "checkpoints"):
        (found / "SHA256SUMS").unlink()
        meta = json.loads((found / "run.json").read_text())
        for name in ("format", "points", "total", "since"):
            del meta[name]
        (found / "run.json").write_text(json.dumps(meta))
    assert losses(train(run_of(data, out), HOW)) == losses(sound[1])
    (out / "checkpoints" / "step-00000006" / "run.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"step-00000006/run\.json is damaged: it does not say what a checkpoint should"):
        checkpoint.load_model(out)


# ---- files that would run something


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists(), "the test wants something that runs"
    path.unlink()
    yield path
    assert not path.exists()


def _evil_metadata(found: Path, marker: Path) -> None:
    (found / ".metadata").write_bytes(pickle.dumps(Evil(marker)))


def _evil_storage(found: Path, marker: Path) -> None:
    """Nested, where the metadata is otherwise right."""
    meta = pickle.loads((found / ".metadata").read_bytes())
    meta.planner_data = Evil(marker)
    (found / ".metadata").write_bytes(pickle.dumps(meta))


def _evil_tensor(found: Path, marker: Path) -> None:
    _evil_part(found, marker, lambda meta: None)


def _evil_bytes(found: Path, marker: Path) -> None:
    """The library would unpickle what is no tensor."""
    _evil_part(found, marker, lambda meta: meta.state_dict_metadata.update({WEIGHT: BytesStorageMetadata()}))


def _evil_part(found: Path, marker: Path, change: Callable[[Any], None]) -> None:
    meta = pickle.loads((found / ".metadata").read_bytes())
    change(meta)
    part, buffer = found / "__0_0.distcp", io.BytesIO()
    torch.save(Evil(marker), buffer)
    for index, info in list(meta.storage_data.items()):
        if index.fqn == WEIGHT:
            info = dataclasses.replace(info, offset=part.stat().st_size, length=buffer.tell())
            meta.storage_data[index] = info
            meta.storage_data[dataclasses.replace(index, offset=None)] = info
    part.write_bytes(part.read_bytes() + buffer.getvalue())
    (found / ".metadata").write_bytes(pickle.dumps(meta))


@pytest.mark.parametrize("change", [{"dim": "8"}, {"dim": None}, {"vocab_size": []}, {"arch": 3}, {"arch": "mine"}], ids=str)
def test_a_configuration_that_makes_no_model(out: Path, change: dict[str, Any]) -> None:
    """Of a checkpoint from before there were checksums."""
    found = out / "checkpoints" / "step-00000006"
    (found / "SHA256SUMS").unlink()
    meta = json.loads((found / "run.json").read_text())
    meta["config"] |= change
    del meta["format"]
    (found / "run.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"run\.json: |run\.json is damaged: it does not say what a model is made of"):
        checkpoint.load_model(found)


@pytest.mark.parametrize("make", [_evil_metadata, _evil_storage, _evil_tensor, _evil_bytes])
def test_nothing_in_a_checkpoint_is_run(data: Path, out: Path, marker: Path, make: Callable[[Path, Path], None]) -> None:
    """By somebody who has written the checksums too."""
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    found = out / "checkpoints" / "step-00000006"
    make(found, marker)
    files = [path for path in found.iterdir() if path.name != "SHA256SUMS"]
    sums = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (found / "SHA256SUMS").write_text("".join(sums))
    for use in (lambda: checkpoint.load_model(found), lambda: train(run_of(data, out), HOW)):
        with pytest.raises(ValueError, match=f"{found} is damaged: ") as refused:
            use()
        assert "\n" not in str(refused.value)


def test_a_part_outside_of_the_checkpoint_is_refused(out: Path) -> None:
    found = out / "checkpoints" / "step-00000006"
    meta = pickle.loads((found / ".metadata").read_bytes())
    for info in meta.storage_data.values():
        info.relative_path = f"../step-00000004/{info.relative_path}"
    (found / ".metadata").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match="names a file of another folder"):
        checkpoint._Reader(found).read_metadata()


# ---- data


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_data_is_named(data: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for name in ("manifest.json", "train-00000.bin", "validation-00000.bin"):
        folder = tmp_path / name / "data"
        shutil.copytree(data, folder)
        run = dataclasses.replace(run_of(folder, tmp_path), out=None)
        damage(folder / name)
        with pytest.raises(ValueError, match=re.escape(str(folder))) as refused:
            train(run)
        assert name in str(refused.value) or (name, damage) == ("manifest.json", Path.unlink)
        assert "\n" not in str(refused.value)


def test_no_flipped_byte_of_a_manifest_passes(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    path, was = folder / "manifest.json", Corpus(data).manifest
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = Corpus(folder).manifest
        except ValueError:
            continue
        assert found == was or "checksum" not in found


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": None}, {"dtype": "object"}, {"dtype": "uint32"}, {"end": 300}, {"vocab_size": "many"}, {"splits": []},
        {"splits": {"train": [{"file": "../a", "tokens": 3, "sha256": ""}], "validation": []}}, {"sha256": "0"},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_was_written_by_hand_is_refused(data: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    manifest = {name: value for name, value in Corpus(data).manifest.items() if name != "checksum"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    Corpus(folder)  # one from before there were checksums
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in (manifest | change).items() if v is not None}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged|is not the shard of"):
        Corpus(folder)


# ---- full disks


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What is written beyond is refused, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_what_cannot_be_written_only(
    data: Path, sound: tuple[Path, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with files_of_at_most(150):
        result = train(run_of(data, tmp_path), HOW)
    assert losses(result) == losses(sound[1])
    told = "\n".join(result["warnings"])
    assert re.search(f"cannot save the checkpoint {tmp_path}/checkpoints/step-00000002: (File too large|a file could)", told)
    assert f"cannot write {tmp_path}/log.jsonl: " in told
    assert told.count("log.jsonl") == 1
    assert "TensorBoard" in told or find_spec("tensorboard") is None
    assert "Traceback" not in "".join(capfd.readouterr())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_log_is_whole_again_once_there_is_room(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin([], 0)
    for step in range(1, 7):
        with files_of_at_most(2**30 if step > 4 else 50):
            log.add(step, {"loss": 1 / 3})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(range(1, 7))


def test_a_log_that_cannot_be_made_costs_a_warning(data: Path, sound: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for name in ("log.jsonl", "log.unfinished"):
        out = tmp_path / name / "run"
        (out / name / "in the way").mkdir(parents=True)
        result = train(run_of(data, out), HOW)
        assert losses(result) == losses(sound[1])
        assert [f"cannot write {out}/log.jsonl: " in warning for warning in result["warnings"]] == [True]


def test_what_a_killed_save_left_goes_with_the_next(data: Path, tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".step-00000005"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    train(run_of(data, tmp_path), HOW)
    assert not left.exists()


def test_where_there_is_no_room_for_three_the_older_goes_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: argparse.Namespace(free=0))
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *_, checkpoint_id, write=checkpoint.write_tensors: (
        kept.append(len(checkpoint.steps_in(checkpoint_id.parent))), write(*_, checkpoint_id=checkpoint_id)
    ))  # fmt: skip
    run = run_of(data, tmp_path)
    train(dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, steps=8)), HOW)
    assert kept == [0, 1, 1, 1]
