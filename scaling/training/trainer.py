"""Training a language model: in one process, or sharded over several.

    objective = cross-entropy(model(tokens), targets), in nats per token
    step:  gradient of the mean over the batch, clipped; AdamW; the learning rate is a function of the step

Under torchrun parameters, gradients and moments are sharded (FSDP2, layer by layer) and each process takes its part of the
rows. What a step does depends on the step, the parameters and the moments alone, so a run that was killed goes on from its
last checkpoint exactly as it would have.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import create_selective_checkpoint_contexts as selective_contexts, noop_context_fn

from madkernels.fused import linear_cross_entropy
from madkernels.models import HybridLM, counting
from madkernels.models.causality import check_layers_from_outside
from madkernels.models.init import parameter_groups
from madkernels.models.layers.base import check_positive
from madkernels.models.layers.expert_parallel import shard_experts
from madkernels.models.layers.moe import MoE, balance_experts
from madkernels.models.lm import Place
from madkernels.ops.registration import kept_under_recomputation
from madkernels.runs.engines import Diverged
from madkernels.runs.pace import Trial, trial_of
from madkernels.scaling.training import checkpoint, tokenizers
from madkernels.scaling.training.data import Batch, Batches, Corpus, held_out
from madkernels.scaling.training.guard import Guard
from madkernels.scaling.training.log import Log, points_of, say
from madkernels.scaling.training.recipe import LMRun
from madkernels.scaling.training.stop import Stop, Stopped

BETAS = (0.9, 0.95)
CHECKPOINTING = ("none", "selective", "full")
LOOKED_AT = 1024, 16  # longest rows, and their number, that a layer from outside is looked at with
PATIENCE = 20  # steps skipped one after the other


@dataclass(frozen=True)
class Execution:
    """How a run is done: nothing here changes what comes out, but for rounding.

    Attributes:
        device: cpu, cuda or cuda:N; under torchrun cuda, of which each process takes its own.
        micro_batch: rows of one forward in one process; all of its rows if None.
        checkpointing: what the backward computes again: none, full (everything inside a layer), or selective (all but
            matrix products, attention and the project's ops).
        compile: whether layers go through torch.compile.
        expert_parallel: processes that share the experts of MoE layers, each of which holds a part.
        save_every: seconds between checkpoints.
        log_every: steps between points of the log; a hundredth of the run if None.
        eval_every: steps between measurements of the held-out loss for the log, besides the end; none if None.
        peak_flops: FLOPs per second of one device at best, for the utilisation in the log.
    """

    device: str = "cpu"
    micro_batch: int | None = None
    checkpointing: str = "none"
    compile: bool = False
    expert_parallel: int = 1
    save_every: float = 300.0
    log_every: int | None = None
    eval_every: int | None = None
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(f"checkpointing is {self.checkpointing!r}; it takes {', '.join(CHECKPOINTING)}")
        check_positive(expert_parallel=self.expert_parallel)


class Objective(nn.Module):
    """The mean loss of a batch, in nats per token; a module, so that FSDP gathers what it needs."""

    def __init__(self, model: HybridLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """tokens, targets (rows, seqlen) to ()."""
        hidden = self.model.backbone(self.model.embedding(tokens), cu_seqlens=cu_seqlens).flatten(0, 1)
        head = self.model.unembedding
        return linear_cross_entropy(hidden, head.weight, targets.flatten(), head.bias)


def build(run: LMRun, place: Place | None = None) -> HybridLM:
    """The model of a run, initialised by its seed. ValueError where the architecture does not go with the width."""
    torch.manual_seed(run.recipe.seed)
    return HybridLM(run.arch, vocab_size=run.vocab_size, dim=run.dim, tied=run.tied, place=place)


def meta_model(run: LMRun) -> HybridLM:
    """The model of a run, of which nothing is allocated, to count by."""
    with torch.device("meta"):
        return build(run)


def train(
    run: LMRun,
    how: Execution | None = None,
    on_point: Callable[[int, dict[str, float]], None] | None = None,
    *,
    on_start: Callable[[int], None] | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Trains and measures.

    Args:
        run: what to train, and where its data and its folder are. With a folder it is logged (`log.jsonl`; TensorBoard where
            that is installed), and goes on from the newest checkpoint there that is not damaged.
        how: where and in what pieces.
        on_point: called with the number of steps done and the point of the log.
        on_start: called with the step that it goes on from, 0 where nothing was done yet.
        stop: whether this process was asked to end: then the step is finished and saved. One process that is asked ends all.

    Returns:
        `loss` on the held-out rows and `train_loss`, the mean of the last tenth of the run, in nats per token; `params`
        without embeddings, `flops` of the training, `tokens`, `seconds`, `left_out`, steps that the guard skipped,
        `warnings`, and `curve`, the points of the log.

    Raises:
        Diverged: many steps one after the other had to be skipped.
        Stopped: `stop` was wanted. It is a KeyboardInterrupt.
        ValueError: a layer from outside looks ahead, the data are damaged or not those of the run, the batch does not divide
            among the processes, or the folder holds another run, or damaged checkpoints only.
    """
    longest, rows = LOOKED_AT
    check_layers_from_outside(run.arch, dim=run.dim, batch=rows, seqlen=min(run.recipe.seqlen, longest))
    trainer = _Trainer(run, how or Execution(), on_point, stop)
    try:
        trainer.resume()
        if on_start and trainer.rank == 0:
            on_start(trainer.step)
        with trainer.stop.deferred():
            return trainer.train()
    finally:
        trainer.log.close()


class _Trainer:
    def __init__(
        self,
        run: LMRun,
        how: Execution,
        on_point: Callable[[int, dict[str, float]], None] | None,
        stop: Stop | None = None,
    ) -> None:
        self.run, self.how, self.recipe, self.on_point, self.stop = run, how, run.recipe, on_point, stop or Stop()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = torch.device(how.device)
        if self.ranks > 1 and self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        self.rows = self._rows()
        corpus = _corpus_of(run, self.rank, self.ranks)
        options = {"batch": self.recipe.batch, "seqlen": self.recipe.seqlen, "seed": self.recipe.seed}
        self.tokenizer = corpus.manifest["tokenizer"]
        self.end, self.batches = corpus.end, Batches(corpus.split("train"), corpus.end, **options)
        self.held_out = held_out(corpus.split("validation"), self.recipe.seqlen, self.recipe.held_out)
        model = meta_model(run)
        _check_experts(model, how.expert_parallel, self.ranks)
        self.params = counting.params(model) - counting.embedding_params(model)
        self.flops_per_token = counting.training_flops(model, self.recipe.seqlen)
        self.objective = _objective(run, how, self.device, self.ranks)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.objective, self.recipe.weight_decay), lr=self.recipe.lr, betas=BETAS, fused=True
        )
        self.guard, self.step, self.seconds = Guard(), 0, 0.0
        self.total, self.since = torch.zeros((), device=self.device), 0  # losses after the last point of the log
        self.held_out_loss: float | None = None  # at the last point of the log, where it was measured
        self.saved = 0  # the step of the last checkpoint
        self.log = Log(Path(run.out) if run.out and self.rank == 0 else None)

    def _rows(self) -> range:
        """The rows of a batch that this process takes."""
        rows, left = divmod(self.recipe.batch, self.ranks)
        if left or rows % (self.how.micro_batch or 1):
            parts = f"{self.ranks} processes" + (
                f", in micro-batches of {self.how.micro_batch}" if self.how.micro_batch else ""
            )
            raise ValueError(f"a batch of {self.recipe.batch} rows does not divide among {parts}")
        return range(self.rank * rows, (self.rank + 1) * rows)

    def train(self) -> dict[str, Any]:
        begun = saved = time.perf_counter()
        before = self.seconds
        every = self.how.log_every or max(1, self.recipe.steps // 100)
        while self.step < self.recipe.steps:
            loss, norm = self.update(self.batches[self.step])
            self.step += 1
            self.total += loss
            now = time.perf_counter()
            self.seconds = before + now - begun
            last = self.step == self.recipe.steps
            evaluates = self.how.eval_every is not None and (last or self.step % self.how.eval_every == 0)
            if last or evaluates or self.step % every == 0:
                self.held_out_loss = self.measure(at_end=False) if evaluates else None
                begun += time.perf_counter() - now  # which is no time of training
                self.tell(self.total / (self.step - self.since), norm)
                self.total, self.since = torch.zeros_like(self.total), self.step
                if self.checkpoint_due(now - saved):
                    self.save()
                    saved = time.perf_counter()
            self.end_if_asked()
        return self.result()

    def end_if_asked(self) -> None:
        """Saves and raises Stopped where any process was asked to end."""
        if not self.asked():
            return
        if self.run.out and self.saved != self.step:
            self.save()
        how = "saved; the same command goes on"
        if self.saved != self.step:
            how = f"not saved; the same command goes on from step {self.saved}" if self.saved else "not saved"
        raise Stopped(f"stopped at step {self.step}, {how}")

    def asked(self) -> bool:
        """Whether any process was asked to end; all processes call it."""
        if self.ranks == 1:
            return self.stop.wanted
        return bool(self.mean(torch.tensor(float(self.stop.wanted), device=self.device)))

    def update(self, batch: Batch) -> tuple[Tensor, float]:
        """One step: the loss before it, over all processes, and the norm of the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        size = self.how.micro_batch or len(self.rows)
        parts = [batch.part(row, row + size) for row in self.rows[::size]]
        total = torch.zeros((), device=self.device)
        self.objective.train()
        for part in parts:
            if isinstance(self.objective, FSDPModule):
                self.objective.set_requires_gradient_sync(part is parts[-1])
            loss = self.loss(part) / len(parts)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self.how.expert_parallel > 1:
            _average_experts(self.objective, self.how.expert_parallel)
        norm, foreach = self.norm(), None if self.how.expert_parallel == 1 else False  # which takes one mesh alone
        nn.utils.clip_grads_with_norm_(self.objective.parameters(), self.recipe.clip, norm, foreach=foreach)
        total = self.mean(total)
        if self.guard.allows(float(total), float(norm)):
            self.optimizer.step()
            balance_experts(self.objective)
        elif self.guard.in_a_row >= PATIENCE:
            raise Diverged(f"{PATIENCE} steps in a row skipped; at step {self.step} the loss is {float(total)}")
        self.optimizer.zero_grad(set_to_none=True)
        return total, float(norm)

    def loss(self, batch: Batch) -> Tensor:
        tokens, targets = (t.to(self.device, non_blocking=True) for t in (batch.tokens, batch.targets))
        offsets = None
        if self.recipe.documents:
            tokens, targets, offsets = tokens.reshape(1, -1), targets.reshape(1, -1), batch.cu_seqlens.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"):
            loss: Tensor = self.objective(tokens, targets, offsets)
        return loss

    def norm(self) -> Tensor:
        """Of the gradient: of several processes each element is in one, whichever axes of which mesh it is sharded along."""
        gradients = [_local(p.grad) for p in self.objective.parameters() if p.grad is not None]
        square = nn.utils.get_total_norm(gradients).square()
        if self.ranks > 1:
            dist.all_reduce(square)
        return square.sqrt()

    @torch.no_grad()
    def measure(self, at_end: bool) -> float:
        """The loss on the held-out rows; the processes take them in turn, and as often as each other.

        at_end: of the run, where it may be stopped."""
        self.objective.eval()
        size = self.how.micro_batch or len(self.rows)
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        turns = -(-len(self.held_out) // (size * self.ranks))
        for turn in range(turns):
            start = (turn * self.ranks + self.rank) * size
            rows = self.held_out[start : start + size]
            shown = rows if len(rows) else self.held_out[:1]  # the others need this one to take part
            loss = self.loss(Batch(shown[:, :-1], shown[:, 1:], self.end))
            total += loss * len(rows)
            if at_end:
                self.end_if_asked()
        return float(self.mean(total)) * self.ranks / len(self.held_out)

    def mean(self, value: Tensor) -> Tensor:
        """Over processes."""
        if self.ranks > 1:
            dist.all_reduce(value)
            value /= self.ranks
        return value

    def tell(self, loss: Tensor, norm: float) -> None:
        tokens = self.recipe.batch * self.recipe.seqlen
        pace = self.step * tokens / self.seconds
        point = {"loss": float(loss), "norm": norm, "lr": self.recipe.rate(self.step - 1), "tokens_per_second": pace}
        if self.held_out_loss is not None:
            point["held_out_loss"] = self.held_out_loss
        if self.how.peak_flops:
            point["mfu"] = pace * self.flops_per_token / (self.how.peak_flops * self.ranks)
        self.log.add(self.step, point)
        if self.on_point and self.rank == 0:
            self.on_point(self.step, point)

    # ---- checkpoints

    def resume(self) -> None:
        """Goes on from the newest sound checkpoint of the folder."""
        meta = None
        if self.run.out:
            folder = Path(self.run.out) / checkpoint.FOLDER
            meta = checkpoint.resume(folder, self.objective, self.optimizer, self.check_run, self.warn)
        if meta is None:
            self.log.begin([], 0)
            return
        self.step = self.saved = meta["step"]
        self.seconds, self.guard = meta["seconds"], Guard(**meta["guard"])
        self.tell_extension(meta["config"]["recipe"]["steps"])
        self.total += meta.get("total", 0.0)
        self.since = meta.get("since", self.step)
        # a checkpoint from before there were checksums leaves the points to the log
        points = meta["points"] if "points" in meta else points_of(Path(str(self.run.out)), self.step)
        self.log.begin(points, self.step)

    def check_run(self, found: Path, config: dict[str, Any]) -> None:
        """ValueError where a checkpoint is of another run. One of fewer steps is extended."""
        changed = _differences(config, self.run.config())
        if changed == ["steps"] and config["recipe"]["steps"] < self.recipe.steps:
            return
        if changed:
            raise ValueError(f"{found} is of another run ({', '.join(changed)}); choose another --out")

    def tell_extension(self, steps: int) -> None:
        """Of a run of so many steps that goes on as a longer one: what becomes of the learning rate."""
        if steps == self.recipe.steps or self.rank > 0:
            return
        before = dataclasses.replace(self.recipe, steps=steps).rate(self.step - 1)
        say(
            f"extended from {steps} to {self.recipe.steps} steps; "
            f"learning rate {before:.3g} so far, {self.recipe.rate(self.step):.3g} from here on"
        )

    def warn(self, text: str) -> None:
        if self.rank == 0:
            self.log.warn(text)

    def checkpoint_due(self, since: float) -> bool:
        """Whether to save now: at the end, and when it is time. The first process decides, so that all do the same."""
        time_has_come = self.step == self.recipe.steps or since >= self.how.save_every
        due = torch.tensor(float(self.run.out is not None and time_has_come), device=self.device)
        if self.ranks > 1:
            dist.broadcast(due, 0)
        return bool(due)

    def save(self) -> None:
        """A full disk costs the checkpoint, not the run."""
        assert self.run.out
        if self.rank == 0:
            with suppress(OSError):
                tokenizers.copy(Path(self.run.corpus), Path(self.run.out))
        meta = {
            "config": self.run.config(),
            "tokenizer": self.tokenizer,
            "seconds": self.seconds,
            "guard": vars(self.guard),
            "total": float(self.total),
            "since": self.since,
            "points": self.log.points,
        }
        try:
            checkpoint.save(Path(self.run.out) / checkpoint.FOLDER, self.step, self.objective, self.optimizer, meta)
            self.saved = self.step
        except OSError as error:
            self.warn(str(error))

    def result(self) -> dict[str, Any]:
        curve = self.log.points
        last = [p["loss"] for p in curve if p["step"] > 0.9 * self.recipe.steps]
        return {
            "loss": self.measure(at_end=True) if self.held_out_loss is None else self.held_out_loss,
            "train_loss": sum(last) / len(last) if last else math.nan,  # a process that is not the first has no log
            "params": self.params,
            "flops": self.flops_per_token * self.recipe.tokens,
            "tokens": self.recipe.tokens,
            "seconds": self.seconds,
            "left_out": self.guard.left_out,
            "warnings": self.log.warnings,
            "curve": curve,
        }


def trial(run: LMRun, dearest: float) -> Trial | None:
    """As :meth:`madkernels.runs.engines.Run.trial`: as many rows of a step as cost no more than that."""
    flops = counting.training_flops(meta_model(run), run.recipe.seqlen) * run.recipe.seqlen
    rows = min(run.recipe.batch, int(dearest // flops))
    if not rows:
        return None
    objective = Objective(build(run))
    optimizer = torch.optim.AdamW(parameter_groups(objective, run.recipe.weight_decay), betas=BETAS, fused=True)
    tokens = torch.randint(run.vocab_size, (rows, run.recipe.seqlen + 1))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=run.recipe.dtype == "bfloat16"):
            found: Tensor = objective(tokens[:, :-1], tokens[:, 1:], None)
        return found

    return trial_of(loss, optimizer, rows * flops)


def _corpus_of(run: LMRun, rank: int, ranks: int) -> Corpus:
    """The data of a run, each process having looked at its share of the shards."""
    corpus = Corpus(Path(run.corpus))
    if corpus.sha256 != run.data:
        raise ValueError(f"{run.corpus} holds other data than those of the run: {corpus.sha256[:12]}, not {run.data[:12]}")
    corpus.verify(rank, ranks)
    return corpus


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    flat = [config | config["recipe"] | {"recipe": None} for config in (ours, theirs)]
    return sorted(name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name))


# ---- how a model is laid out


@contextmanager
def processes(device: str) -> Iterator[bool]:
    """The process group, where torchrun has started several; whether this process is the first."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield True
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
        _wait_for_gloo()


def _wait_for_gloo() -> None:
    """Waits until Gloo's threads sleep, at most 10 seconds.

    `destroy_process_group` does not end them where DTensor still knows the group, and one that has yet to let go of a
    collective's tensor needs Python for it: it aborts the process where Python has ended. One that waits for Python gets it
    while this sleeps.
    """
    deadline, asleep = time.monotonic() + 10, 0
    while asleep < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
        asleep = 0 if any("(pt_gloo_runloop) R" in state for state in _threads()) else asleep + 1


def _threads() -> Iterator[str]:
    """What Linux says of each thread of this process: its number, its name in brackets, its state."""
    for path in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # it has ended
            yield path.read_text()


def _objective(run: LMRun, how: Execution, device: torch.device, ranks: int) -> Objective:
    """Recomputation inside, compilation around it, shards around that. Each layer goes where it belongs before the next is
    made, so no process holds the whole model."""
    mesh = init_device_mesh(device.type, (ranks,)) if ranks > 1 else None
    of_experts = _mesh_of_experts(device, ranks, how.expert_parallel)
    placement = None if of_experts is None else _placement(of_experts["dp"])

    def place(norm: nn.Module, layer: nn.Module) -> None:
        if how.compile:
            layer.compile()
        if mesh:
            if of_experts:
                shard_experts(layer, of_experts["ep"])
            fully_shard([norm, layer], mesh=mesh, shard_placement_fn=placement)
        else:
            norm.to(device)
            layer.to(device)

    objective = Objective(build(run, place))
    if how.checkpointing != "none":
        contexts = noop_context_fn if how.checkpointing == "full" else partial(selective_contexts, kept_results())
        objective.model.backbone.recompute = contexts
    if mesh is None:
        return objective.to(device)
    warnings.filterwarnings("ignore", message=".*returned a view tensor. An in-place op")  # the residual stream has none
    fully_shard(objective, mesh=mesh)
    return objective


def _check_experts(model: HybridLM, parts: int, ranks: int) -> None:
    """ValueError where so many processes cannot share the experts."""
    if parts == 1:
        return
    layers = [layer for layer in counting.layers(model) if isinstance(layer, MoE)]
    if not layers:
        raise ValueError(f"expert_parallel is {parts}, but {model.arch} has no moe layer")
    for count, of_what in ((ranks, "processes"), *((layer.experts, "experts") for layer in layers)):
        if count % parts:
            raise ValueError(f"expert_parallel is {parts}, which does not divide the {count} {of_what}")


def _mesh_of_experts(device: torch.device, ranks: int, parts: int) -> DeviceMesh | None:
    """Neighbours share experts, along "ep"; along "dp" each part is held by so many."""
    return init_device_mesh(device.type, (ranks // parts, parts), mesh_dim_names=("dp", "ep")) if parts > 1 else None


def _placement(dp: DeviceMesh) -> Callable[[nn.Parameter], Any]:
    """Tells FSDP to shard experts over the processes alone that hold the same, along an axis that divides."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
    except ImportError:
        raise ValueError(f"expert_parallel takes torch 2.12 or later; this is {torch.__version__}") from None
    over = FSDPMeshInfo(dp, shard_mesh_dim=0)

    def placement(parameter: nn.Parameter) -> ShardPlacementResult | None:
        if not isinstance(parameter, DTensor):
            return None
        axis = next((axis for axis in (1, 2) if parameter.shape[axis] % dp.size() == 0), 0)
        return ShardPlacementResult(Shard(axis), over)

    return placement


@torch.no_grad()
def _average_experts(model: nn.Module, parts: int) -> None:
    """Makes means over all processes of the gradients of experts: FSDP took that over "dp", of what are sums over "ep"."""
    for layer in model.modules():
        if isinstance(layer, MoE):
            for weight in (layer.gate_up, layer.down):
                assert weight.grad is not None
                weight.grad /= parts


def kept_results() -> list[Any]:
    """The ops whose results selective recomputation keeps: they cost more to do again than to remember."""
    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._grouped_mm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        *kept_under_recomputation(),
    ]


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
