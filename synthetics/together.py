"""The runs of one setting as one model: weights of all on a leading axis, one launch for what would be one for each.

MAD's models are so small that a GPU waits for launches; the grid points and seeds of a setting differ in numbers only, so
torch.func maps one forward pass over them, and a CUDA graph makes one launch of a step's forward and backward. Each keeps
its own initialisation, data, order, learning rate and weight decay, and leaves when it is good enough or its loss is not
finite. On a CPU nothing is gained: six models do not fit the cache where one did.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from madkernels.models.causality import layers_from_outside
from madkernels.models.init import parameter_groups
from madkernels.models.layers.moe import balance_experts
from madkernels.runs.engines import Diverged, Refused
from madkernels.synthetics.honesty import check_scored, loaded
from madkernels.synthetics.protocol import Run
from madkernels.synthetics.schedule import chance_of, is_over, rate
from madkernels.synthetics.tasks import IGNORE
from madkernels.synthetics.train import BETAS, EVALUATION_BATCH, Tally, build, check_finite, data

ADAM_EPS = 1e-8
GRAPHS_ON = "cuda"

T = TypeVar("T")


def alike(run: Run) -> Run:
    """What runs that can train together have in common: all but learning rate, weight decay and seed."""
    return replace(run, training=replace(run.training, lr=0.0, weight_decay=0.0, seed=0))


def train_together(
    runs: Sequence[Run], on_epoch: Callable[[Run, int, dict[str, float]], None] | None = None, device: str = "cpu"
) -> list[dict[str, Any] | Refused]:
    """As :func:`train` for each, up to rounding; for a run that diverges or looks ahead, that.

    Raises:
        ValueError: runs that differ in more than learning rate, weight decay and seed.
    """
    if len({alike(run) for run in runs}) > 1:
        raise ValueError("runs that train together differ in learning rate, weight decay and seed only")
    group = _Group(runs, device)
    for epoch in range(1, runs[0].training.epochs + 1):
        losses = group.train(epoch)
        held_out = group.stack.measure([group.splits[i].held_out for i in group.stack.alive])
        points = [
            {"loss": loss, "held_out_accuracy": found["accuracy"]} for loss, found in zip(losses, held_out, strict=True)
        ]
        group.settle(epoch, points, on_epoch)
        if not group.stack.alive:
            break
    return group.results


class _Group:
    """Runs that train together, and what has become of each."""

    def __init__(self, runs: Sequence[Run], device: str) -> None:
        self.runs, self.options, self.device, self.begun = runs, runs[0].training, device, time.perf_counter()
        self.stack = Stack(runs, device)
        begun = time.perf_counter()
        self.splits = [data(run, device) for run in runs]
        self.data_seconds = (time.perf_counter() - begun) / len(runs)
        self.chances = [chance_of(splits.held_out[1]) for splits in self.splits]
        self.orders = [torch.Generator().manual_seed(run.training.seed) for run in runs]
        self.curves: list[list[dict[str, float]]] = [[] for _ in runs]
        self.results: list[dict[str, Any] | Refused] = [Diverged()] * len(runs)

    def train(self, epoch: int) -> list[float]:
        """Trains the models that are left for an epoch; the loss of each."""
        alive, examples = self.stack.alive, len(self.splits[0].train[0])
        order = torch.stack([torch.randperm(examples, generator=self.orders[i]) for i in alive]).to(self.device)
        batches = torch.split(order, self.options.batch, dim=1)
        totals = torch.zeros(len(alive), device=self.device)
        steps = self.options.epochs * len(batches)
        for step, batch in enumerate(batches, (epoch - 1) * len(batches)):
            pairs = [tuple(t[chosen] for t in self.splits[i].train) for i, chosen in zip(alive, batch, strict=True)]
            rates = [rate(self.runs[i].training, step, steps) for i in alive]
            totals += self.stack.step(*_stacked(pairs), rates) * batch.shape[1]
        losses: list[float] = (totals / examples).tolist()
        return losses

    def settle(self, epoch: int, points: list[dict[str, float]], on_epoch: Callable[..., None] | None) -> None:
        """Notes the points of an epoch, and lets go of those that are done."""
        going_on, ended = [], []  # places in the stack; those that diverged are in neither
        for place, (i, point) in enumerate(zip(self.stack.alive, points, strict=True)):
            try:
                check_finite(point["loss"], epoch)
            except Diverged as error:
                self.results[i] = error
                continue
            self.curves[i].append(point)
            if on_epoch:
                on_epoch(self.runs[i], epoch, point)
            if is_over([p["held_out_accuracy"] for p in self.curves[i]], self.options, self.chances[i]):
                ended.append(place)
            else:
                going_on.append(place)
        self.test(ended)
        if len(going_on) < len(points):
            self.stack = self.stack.part(going_on)

    def test(self, places: list[int]) -> None:
        """Measures those that have ended on their test sets."""
        part = self.stack.part(places)
        found = part.measure([self.splits[i].test for i in part.alive])
        for place, (i, measured) in enumerate(zip(part.alive, found, strict=True)):
            try:
                if layers_from_outside(self.runs[i].arch):
                    check_scored(self.runs[i], part.model(place), build, self.splits[i].held_out)
            except Refused as error:
                self.results[i] = error
                continue
            self.results[i] = measured | {
                "held_out_accuracy": self.curves[i][-1]["held_out_accuracy"],
                "epochs": len(self.curves[i]),
                "seconds": (time.perf_counter() - self.begun) / len(self.runs),  # its share
                "data_seconds": self.data_seconds,
                "curve": self.curves[i],
            }


def _stacked(pairs: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*pairs, strict=True)
    return torch.stack(inputs), torch.stack(targets)


@dataclass
class _Moments:
    first: Tensor
    second: Tensor


class Stack:
    """Models of one shape, their parameters (models, ...), and AdamW with a learning rate and weight decay for each."""

    def __init__(self, runs: Sequence[Run], device: str) -> None:
        models = [build(run).to(device) for run in runs]
        self.params, self.buffers = stack_module_state(models)
        self.moments = {k: _Moments(torch.zeros_like(p), torch.zeros_like(p)) for k, p in self.params.items()}
        self.one = copy.deepcopy(models[0]).to("meta")
        decayed = {id(p) for p in parameter_groups(self.one, 1.0)[0]["params"]}
        self.decayed = {name for name, p in self.one.named_parameters() if id(p) in decayed}
        self.runs, self.alive, self.steps = list(runs), list(range(len(runs))), 0
        self.recorded: dict[torch.Size, _Recorded | None] = {}  # by the shape of a batch; None: it cannot be recorded

    def part(self, places: Sequence[int]) -> Stack:
        """A stack of the models at `places`, with their moments; `alive` numbers them as before."""
        index = torch.tensor(places, dtype=torch.int64, device=next(iter(self.params.values())).device)
        part = copy.copy(self)  # shares the runs, the module `one`, the names of decayed parameters and the count of steps
        part.params = {k: p.detach()[index].requires_grad_() for k, p in self.params.items()}
        part.buffers = {k: b[index] for k, b in self.buffers.items()}
        part.moments = {k: _Moments(m.first[index], m.second[index]) for k, m in self.moments.items()}
        part.alive = [self.alive[place] for place in places]
        part.recorded = {}  # graphs are of tensors of the whole stack
        return part

    def model(self, place: int) -> nn.Module:
        """One of the models, by itself."""
        tensors = {name: t[place].detach() for name, t in [*self.params.items(), *self.buffers.items()]}
        with torch.random.fork_rng():  # the others go on as if nothing had been made
            one: nn.Module = build(self.runs[self.alive[place]]).to(next(iter(tensors.values())).device)
        return loaded(one, tensors)  # type: ignore[no-any-return]

    def logits(self, inputs: Tensor) -> Tensor:
        """inputs (models, batch, seqlen) to (models, batch, seqlen, vocab_size)."""

        def one(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
            with _Mappable():
                return functional_call(self.one, (params, buffers), (x,))

        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.runs[0].training.dtype == "bfloat16"):
            found: Tensor = vmap(one)(self.params, self.buffers, inputs)
        return found

    def step(self, inputs: Tensor, targets: Tensor, rates: Sequence[float]) -> Tensor:
        """One step of AdamW, each model at its learning rate; the loss of each, (models,)."""
        self.one.train()
        if inputs.device.type == GRAPHS_ON and inputs.shape not in self.recorded:
            self.recorded[inputs.shape] = _recorded(self, inputs, targets)
        found = self.recorded.get(inputs.shape)
        losses, gradients = self.gradients(inputs, targets) if found is None else found.again(inputs, targets)
        self.update(gradients, rates)
        return losses.clone()  # what a graph gives is written again by the next step

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss of each model, and the gradients of `params`, in their order."""
        logits = self.logits(inputs).float()
        by_token = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORE, reduction="none")
        scored = (targets != IGNORE).flatten(1).sum(1)
        losses = by_token.view(len(inputs), -1).sum(1) / scored
        # Models share nothing, so each gets its own gradient.
        return losses.detach(), list(torch.autograd.grad(losses.sum(), list(self.params.values())))

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], rates: Sequence[float]) -> None:
        self.steps += 1
        trainings = [self.runs[i].training for i in self.alive]
        shrinks = [1 - lr * t.weight_decay for lr, t in zip(rates, trainings, strict=True)]
        first_share, second_share = (1 - beta**self.steps for beta in BETAS)
        for (name, p), gradient in zip(self.params.items(), gradients, strict=True):
            shape = (-1, *[1] * (p.dim() - 1))
            m = self.moments[name]
            m.first.lerp_(gradient, 1 - BETAS[0])
            m.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            if name in self.decayed:
                p.mul_(p.new_tensor(shrinks).view(shape))
            direction = (m.first / first_share) / ((m.second / second_share).sqrt() + ADAM_EPS)
            p.sub_(p.new_tensor(rates).view(shape) * direction)
        balance_experts(self.one, self.buffers)

    @torch.no_grad()
    def measure(self, splits: Sequence[tuple[Tensor, Tensor]]) -> list[dict[str, float]]:
        """The measures of each model on its split."""
        if not self.alive:
            return []
        self.one.eval()
        tallies = [Tally() for _ in self.alive]
        inputs, targets = _stacked(list(splits))
        pairs = zip(*(torch.split(t, EVALUATION_BATCH, dim=1) for t in (inputs, targets)), strict=True)
        for x, y in pairs:
            for tally, logits, wanted in zip(tallies, self.logits(x), y, strict=True):
                tally.add(logits, wanted)
        return [tally.measures() for tally in tallies]


class _Recorded:
    """The forward and backward of a stack, at one shape of batch, as a CUDA graph."""

    def __init__(self, stack: Stack, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs.clone(), targets.clone()
        self.replay, self.made = record(lambda: stack.gradients(self.inputs, self.targets))

    def again(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Runs the graph on another batch; losses and gradients come in the same tensors."""
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.replay()
        return self.made


def _recorded(stack: Stack, inputs: Tensor, targets: Tensor) -> _Recorded | None:
    """None where a layer waits for the GPU, as one from outside may: then steps are launched one kernel at a time."""
    try:
        return _Recorded(stack, inputs, targets)
    except RuntimeError:
        return None


def record(work: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """Work on the GPU as a graph: what does it again, and the tensors that it is done into. It is not yet done."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what libraries set up at their first calls is not to be recorded
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    return graph.replay, made


class _Mappable(TorchFunctionMode):
    """Linear layers over rows: mapped, a product of matrices for each model rather than for each sequence of each model. And
    attention as products, which can be mapped, where torch's fused kernels cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and args[0].dim() > 2:
            x, *parameters = args
            return func(x.flatten(0, -2), *parameters, **(kwargs or {})).view(*x.shape[:-1], -1)
        if func is nn.functional.scaled_dot_product_attention:
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
