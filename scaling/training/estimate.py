"""What training a language model takes, without allocating it: memory on each GPU, and time.

FLOPs and parameters are those of `madkernels.models.counting`, and training costs three forward passes: what a
checkpointed layer computes again is not counted, as is the custom for model FLOP/s utilisation (MFU).

Memory is that of mixed precision: weights, gradients and both moments of AdamW in float32, weights copied to bfloat16 to
compute with, the residual stream in float32. What layers keep for the backward pass is not a formula: each kind of layer
runs once on fake tensors, which have shapes but no data, and torch says what it saved. Not counted: workspaces of kernels,
buffers of communication, fragmentation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from madkernels.fused.cross_entropy import CHUNK_TOKENS
from madkernels.models import HybridLM, LayerSpec, counting
from madkernels.models.layers.base import check_positive
from madkernels.scaling.training.trainer import CHECKPOINTING, kept_results

SHARDINGS = ("full", "none")

MASTER, HALF = 4, 2  # bytes of float32 and of bfloat16


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 FLOPs per second, from the vendor's datasheet, and the GiB that CUDA finds."""

    flops: float
    memory: float


# NVIDIA datasheets: A100 Tensor Core GPU, H100 Tensor Core GPU, H200 Tensor Core GPU; rates without sparsity.
GPUS = {"a100": Gpu(312e12, 79), "h100": Gpu(989e12, 79), "h200": Gpu(989e12, 139)}


def peak_flops(device: str) -> float | None:
    """The peak of the GPU here in FLOPs per second, where its datasheet is known; None for the CPU."""
    name = "" if device == "cpu" else torch.cuda.get_device_name(device).lower()
    return next((gpu.flops for key, gpu in GPUS.items() if key in name), None)


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    Attributes:
        seqlen: tokens of a row.
        rows: that a GPU takes at a time.
        gpus: data-parallel.
        sharding: full, each GPU holds its share of weights, gradients and moments, and gathers the weights of a layer when
            it gets there (FSDP); or none, each holds them all.
        checkpointing: none; full, of each layer only its input is kept; or selective, also the results of matrix products,
            attention and the project's ops, so that only cheap operations are computed again.
    """

    seqlen: int
    rows: int = 1
    gpus: int = 1
    sharding: str = "full"
    checkpointing: str = "none"

    def __post_init__(self) -> None:
        check_positive(seqlen=self.seqlen, rows=self.rows, gpus=self.gpus)
        for name, value, known in (
            ("sharding", self.sharding, SHARDINGS),
            ("checkpointing", self.checkpointing, CHECKPOINTING),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it takes {', '.join(known)}")

    @property
    def tokens(self) -> int:
        """Tokens that a GPU takes at a time."""
        return self.rows * self.seqlen


def memory(model: HybridLM, setup: Setup) -> dict[str, int]:
    """Bytes on each GPU, by what they are for. The model may be on the meta device."""
    share = -(-counting.params(model) // (setup.gpus if setup.sharding == "full" else 1))
    return {
        "weights, float32": MASTER * share,
        "gradients, float32": MASTER * share,
        "AdamW moments, float32": 2 * MASTER * share,
        "weights, gathered and in bfloat16": _copies(model, setup),
        "activations": activations(model, setup),
        "loss": _loss(model, setup),
    }


def _copies(model: HybridLM, setup: Setup) -> int:
    """What autocast makes for the backward pass: all layers in bfloat16, or with checkpointing one. Sharded, also embeddings
    and two layers in float32, one at work and one on its way, and the gradients of one."""
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in counting.layers(model)]
    cast = HALF * (counting.embedding_params(model) + (sum(sizes) if setup.checkpointing == "none" else max(sizes)))
    return cast if setup.sharding == "none" else cast + MASTER * (counting.embedding_params(model) + 3 * max(sizes))


def _loss(model: HybridLM, setup: Setup) -> int:
    """A chunk of logits, the unembedding's gradient and a chunk's part of it, and the input and its gradient."""
    logits = HALF * min(setup.tokens, CHUNK_TOKENS) * model.vocab_size
    return logits + 2 * MASTER * model.vocab_size * model.dim + 2 * HALF * setup.tokens * model.dim


def activations(model: HybridLM, setup: Setup) -> int:
    """Bytes kept for the backward pass at its beginning and, with checkpointing, those that the greediest layer computes
    again. Without embedding and unembedding."""
    counts = Counter(model.arch.layers)
    saved = {spec: saved_by(spec, model.dim, setup) for spec in counts}
    stream = (len(model.arch.layers) + 1) * setup.tokens * (MASTER * model.dim + MASTER)  # into each norm, and its scale
    if setup.checkpointing == "none":
        return stream + sum(counts[spec] * saved[spec] for spec in counts)
    kept = {spec: kept_by(spec, model.dim, setup) if setup.checkpointing == "selective" else 0 for spec in counts}
    return stream + sum(counts[spec] * kept[spec] for spec in counts) + max(saved.values())


def saved_by(spec: LayerSpec, dim: int, setup: Setup) -> int:
    """Bytes that one layer saves for its backward pass, parameters apart."""
    return _watch(spec, dim, setup, lambda kept: saved_tensors_hooks(kept.add, lambda t: t))


def kept_by(spec: LayerSpec, dim: int, setup: Setup) -> int:
    """Bytes of one layer's results that are dear to compute again."""
    return _watch(spec, dim, setup, _DearResults)


def _watch(spec: LayerSpec, dim: int, setup: Setup, watcher: Callable[[_Storages], AbstractContextManager[Any]]) -> int:
    """Bytes that `watcher` notes while the layer runs forward on fake tensors."""
    with FakeTensorMode(), _bfloat16_by_default():
        layer = spec.build(dim)
        x = torch.empty(setup.rows, setup.seqlen, dim, requires_grad=True)
        kept = _Storages()
        with watcher(kept):
            layer(x)
        return kept.bytes(without=layer.parameters())


class _Storages:
    """The memory of tensors; what several share, once."""

    def __init__(self) -> None:
        self.of: dict[int, torch.UntypedStorage] = {}

    def add(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        self.of[storage._cdata] = storage
        return t

    def bytes(self, without: Iterator[nn.Parameter]) -> int:
        left_out = {p.untyped_storage()._cdata for p in without}
        return sum(storage.nbytes() for key, storage in self.of.items() if key not in left_out)


class _DearResults(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the results that selective checkpointing keeps."""

    def __init__(self, kept: _Storages) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept, self.dear = kept, kept_results()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func in self.dear:
            for t in tree_leaves(results):
                if isinstance(t, Tensor):
                    self.kept.add(t)
        return results


@contextmanager
def _bfloat16_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
