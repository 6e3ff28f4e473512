"""Checkpoints: model, optimiser and place in the data, through torch.distributed.checkpoint.

A checkpoint is a folder `step-NNNNNNNN`: the tensors, in pieces that any number of processes can read back; `run.json`, all
else; and `SHA256SUMS`, as `sha256sum -c` takes it. It is written under another name and renamed when it is whole, so a
half-written one is never found. The last two are kept: where the newest is damaged, a run goes on from the one before.

Reading a checkpoint runs no code that is in it. The library's own `.metadata` is a pickle: it is read by an unpickler that
knows the classes of that file and no others, and tensors by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors
from torch.optim import Optimizer

from madkernels.models import HybridLM, pretrained
from madkernels.scaling.training.digest import file_sha256
from madkernels.scaling.training.tokenizers import Bytes, Tokenizer, tokenizer_in, tokenizer_of

FOLDER = "checkpoints"  # of a run
META, SUMS, PIECES = "run.json", "SHA256SUMS", ".metadata"
FORMAT = 2  # from 2 on there are checksums
KEPT = 2
HEX_DIGITS = 64  # of SHA-256

Warn = Callable[[str], None]


class Damaged(ValueError):
    """A checkpoint is not what was written."""


# ---- writing


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, meta: dict[str, Any]) -> None:
    """Writes the checkpoint of a step, and lets go of all but the one before. All processes call it.

    Raises:
        OSError: it could not be written; those before are still there.
    """
    place, unfinished = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
    problem = None
    try:
        _first(lambda: _begin(unfinished, step))
        weights, moments = get_state_dict(model, optimizer)
        with _quiet():
            write_tensors(_tensors(weights, moments), checkpoint_id=unfinished)
        _first(lambda: _write(unfinished / META, json.dumps({"format": FORMAT, "step": step} | meta)))
        sums = _sums(unfinished, sorted(path.name for path in unfinished.iterdir()))
        _first(lambda: _finish(unfinished, sums, place))
    except (OSError, RuntimeError, CheckpointException) as error:
        problem = _reason(error)
    if _rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    if problem is not None:
        raise OSError(f"cannot save the checkpoint {place}: {problem}")


def _begin(unfinished: Path, step: int) -> None:
    """Half-written ones go, and where the disk has no room for one more, the older of two."""
    for left in unfinished.parent.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir(parents=True)
    before = [path for path in steps_in(unfinished.parent) if _step_of(path) < step]
    if len(before) >= KEPT and shutil.disk_usage(unfinished).free < 1.2 * _size(before[-1]):
        _remove(before[0])


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def _write(path: Path, text: str) -> None:
    """Writes a file and waits until it is on the disk itself."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _finish(unfinished: Path, sums: dict[str, str], place: Path) -> None:
    if unread := [f"{name}: {digest}" for name, digest in sums.items() if len(digest) != HEX_DIGITS]:
        raise OSError(f"cannot read back {unread[0]}")
    _write(unfinished / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    _remove(place)
    unfinished.rename(place)
    for old in _let_go(place.parent, _step_of(place)):
        _remove(old)


def _tensors(weights: Mapping[str, Any], moments: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored as tensors: the options of the optimiser are the run's, and lie in its configuration."""
    return {"model": weights, "optimizer": {"state": moments["state"]}}


def _let_go(folder: Path, step: int) -> list[Path]:
    """All but the last of those up to a step. Later ones were damaged, or the run would have gone on from there."""
    found = steps_in(folder)
    kept = [path for path in found if _step_of(path) <= step][-KEPT:]
    return [path for path in found if path not in kept]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sums(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files, each read by one of the processes; the error of one that cannot be read. All processes call it."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    parts: list[dict[str, str]] = [{}] * ranks
    ours = {name: _sum(folder / name) for name in names[_rank() :: ranks]}
    if ranks > 1:
        dist.all_gather_object(parts, ours)
    return {name: digest for part in (parts if ranks > 1 else [ours]) for name, digest in part.items()}


def _sum(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        return str(error.strerror)


# ---- finding


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, sound or not, from the first to the last. ValueError where it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder of checkpoints; remove it, or choose another --out")
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def meta_of(checkpoint: Path) -> dict[str, Any]:
    """What was saved beside the tensors. Damaged where that is not to be read."""
    path = checkpoint / META
    meta = _json_of(path)
    try:
        parts = meta["config"], meta["config"]["recipe"], meta["guard"]
        usable = meta["step"] >= 0 and meta["seconds"] >= 0 and all(isinstance(part, dict) for part in parts)
    except (KeyError, TypeError):
        usable = False
    if not usable:
        raise Damaged(f"{path} is damaged: it does not say what a checkpoint should")
    assert isinstance(meta, dict)
    return meta


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise Damaged(f"{path} is damaged: it is no JSON") from None


def verify(checkpoint: Path) -> dict[str, Any]:
    """What `meta_of` gives, after all files were compared with their checksums. All processes call it.

    Raises:
        Damaged: a file is missing or another than was written. Checkpoints of format 1 have no checksums.
    """
    meta = meta_of(checkpoint)
    path = checkpoint / SUMS
    if not path.exists() and meta.get("format", 1) == 1:
        return meta
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError):
        raise Damaged(f"{path} is missing or damaged") from None
    wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if missing := {META, PIECES} - set(wanted):
        raise Damaged(f"{path} is damaged: {', '.join(sorted(missing))} is not in it")
    found = _sums(checkpoint, sorted(wanted))
    for name, digest in wanted.items():
        if found[name] != digest:
            why = f"its SHA-256 is not the one in {SUMS}" if len(found[name]) == HEX_DIGITS else found[name]
            raise Damaged(f"{checkpoint / name} is damaged: {why}")
    return meta


# ---- reading


def resume(folder: Path, model: nn.Module, optimizer: Optimizer, check: Callable[[Path, Any], None], warn: Warn) -> Any:
    """Brings model and optimiser to the newest sound checkpoint. All processes call it.

    Args:
        folder: of checkpoints; it need not be there.
        check: called with a checkpoint and its configuration; raises where that is of another run.
        warn: told of every damaged checkpoint that is passed over.

    Returns:
        What was saved beside the tensors, or None where there is no checkpoint.

    Raises:
        ValueError: there are checkpoints, but none is sound; or `check` raises it.
    """

    def one(checkpoint: Path) -> dict[str, Any]:
        meta = verify(checkpoint)
        check(checkpoint, meta["config"])
        load(checkpoint, model, optimizer)
        return meta

    if not (found := steps_in(folder)):
        return None
    return _newest(found, one, warn, f"remove {folder} to train from the beginning, or choose another --out")


def load(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Brings model and optimiser to where they were. All processes call it. Damaged where it cannot be read."""
    weights, moments = get_state_dict(model, optimizer)
    _read(checkpoint, _tensors(weights, moments))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def load_model(path: str | Path) -> HybridLM:
    """The language model of a run or of one of its checkpoints, or of a folder that was exported, on the CPU.

    Args:
        path: the folder of a run, for its newest checkpoint that is sound; that of a checkpoint, `step-NNNNNNNN`; or what
            `madkernels train export` wrote.

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
    """
    path = Path(path)
    if is_exported(path):
        return HybridLM.from_pretrained(path)
    if not (path / FOLDER).exists():
        if not (path / META).exists() and not (path / SUMS).exists():
            what = "is neither a run, a checkpoint nor an exported model" if path.exists() else "does not exist"
            raise ValueError(f"{path} {what}; expected a folder that madkernels train run or train export wrote")
        return _load_model(path)
    if not (found := steps_in(path / FOLDER)):
        raise ValueError(f"{path / FOLDER} has no checkpoint")
    model: HybridLM = _newest(found, _load_model, lambda text: warnings.warn(text, stacklevel=4), "there is no earlier one")
    return model


def is_exported(path: Path) -> bool:
    """Whether this is the folder of an exported model, not of a run or checkpoint."""
    return (path / pretrained.CONFIG).exists()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """What makes tokens for the model that `load_model` gives of the same path.

    Raises:
        ValueError: its file is not there, or it is not known which one it was.
    """
    path = Path(path)
    if is_exported(path):
        config = pretrained.config_of(path)
        return _tokenizer(path, config.get("tokenizer"), config.get("vocab_size"))
    run = path if (path / FOLDER).exists() else path.parent.parent
    meta = _newest(steps_in(path / FOLDER) or [path], meta_of, lambda text: None, "there is no earlier one")
    return _tokenizer(run, meta.get("tokenizer"), meta["config"].get("vocab_size"))


def load_with_tokenizer(path: str | Path, tokenizer: str | None = None) -> tuple[HybridLM, Tokenizer]:
    """The model of `load_model`, and its tokenizer: that of `load_tokenizer`, `bytes`, or a tokenizer.json.

    Raises:
        ValueError: as those two do, or the tokenizer has another number of tokens than the model.
    """
    model = load_model(path)
    found = load_tokenizer(path) if tokenizer is None else tokenizer_of(tokenizer)
    if found.vocab_size != model.vocab_size:
        raise ValueError(f"the tokenizer {found.name} has {found.vocab_size} tokens, the model {model.vocab_size}")
    return model, found


def _tokenizer(folder: Path, name: str | None, vocab_size: int | None) -> Tokenizer:
    """Of a model that was saved without the name of one, bytes where its vocabulary is of their size."""
    name = name or (Bytes.name if vocab_size == Bytes.vocab_size else None)
    if name is None:
        raise ValueError(f"{folder} does not say which tokenizer made its tokens; give --tokenizer")
    return tokenizer_in(folder, name)


def _load_model(checkpoint: Path) -> HybridLM:
    config = verify(checkpoint)["config"]
    try:
        options = {name: config[name] for name in ("arch", "vocab_size", "dim", "tied")}
        model = HybridLM(**options)
    except ValueError as error:  # such as a layer of a plugin that is not loaded
        raise ValueError(f"{checkpoint / META}: {error}{pretrained.PLUGIN}") from None
    except (KeyError, TypeError, AttributeError):
        raise Damaged(f"{checkpoint / META} is damaged: it does not say what a model is made of") from None
    weights = get_model_state_dict(model)
    _read(checkpoint, {"model": {f"model.{name}": tensor for name, tensor in weights.items()}})
    model.load_state_dict(weights)
    return model


def _newest(found: list[Path], read: Callable[[Path], Any], warn: Warn, otherwise: str) -> Any:
    """What `read` gives of the last checkpoint that is not damaged."""
    for place in reversed(range(len(found))):
        try:
            return read(found[place])
        except Damaged as error:
            if place == 0:
                raise ValueError(f"{error}; {otherwise}") from None
            warn(f"{error}; trying the checkpoint before it")


def _read(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """Into tensors. Damaged where something of them is not there, or of another shape."""
    try:
        with _quiet():
            read_tensors(tensors, storage_reader=_Reader(checkpoint), planner=_Planner())
    except (Exception, CheckpointException) as error:  # whatever the library meets in a damaged file
        raise Damaged(f"{checkpoint} is damaged: {_reason(error)}") from None


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        """What is no tensor would be unpickled, and nothing that is stored is none."""
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor")


class _Reader(filesystem.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        path = Path(self.path) / PIECES
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, metadata.Metadata):
            raise ValueError(f"{PIECES} is none")
        if any(Path(piece.relative_path).name != piece.relative_path for piece in found.storage_data.values()):
            raise ValueError(f"{PIECES} names a file of another folder")
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


def _nothing(*given: Any) -> None:
    """Stands for a class or function that reading the metadata does not need."""


class _Unpickler(pickle.Unpickler):
    """Knows what the metadata of tensors is made of; any other name is an error."""

    known = {
        (kind.__module__, kind.__name__): kind
        for kind in (
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.BytesStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
        )
    } | {
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("pathlib", "PosixPath"): _nothing,  # where it was saved
        ("pathlib._local", "PosixPath"): _nothing,  # the same, of Python 3.13
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        raise pickle.UnpicklingError(f"{PIECES} asks for {module}.{name}, which is nothing of a checkpoint")


# ---- processes and errors


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _first(do: Callable[[], None]) -> None:
    """The first process does something, and the others wait for it. OSError in all of them where it could not."""
    problem: list[str | None] = [None]
    if _rank() == 0:
        try:
            do()
        except OSError as error:
            problem = [str(error.strerror or error)]
    if dist.is_initialized():
        dist.broadcast_object_list(problem, 0)
    if problem[0] is not None:
        raise OSError(problem[0])


def _reason(error: BaseException) -> str:
    """What lies under the exceptions of all processes, in one line. KeyboardInterrupt passes: the library catches it too."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch's archives know no more
        return "a file could not be written to its end; is the disk full?"
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (told.splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warning that torch gives where one process saves without torch.distributed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
        yield
