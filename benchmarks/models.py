"""A model of a preset, its forward and its training step, beside the same on plain torch and under torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.weak import WeakTensorKeyDictionary

from madkernels.benchmarks.cases import Axes, Case, Inputs
from madkernels.benchmarks.harness import Benchmark, Peer
from madkernels.benchmarks.layers import CHECKED, parameters_of
from madkernels.benchmarks.machine import memory_bytes
from madkernels.benchmarks.plain import plain_ops, plainly
from madkernels.benchmarks.sizes import Size
from madkernels.models.counting import flops_per_token, training_flops
from madkernels.models.lm import HybridLM
from madkernels.models.presets import Preset, architecture
from madkernels.scaling.training.trainer import BETAS, Objective

CHECKED_BLOCKS, CHECKED_VOCABULARY = 4, 512  # at the most, of the model that is compared with float64
COPIES_TO_TRAIN = 4  # of the parameters: themselves, gradients, two moments


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """The mean loss of a batch, without a graph."""

    called: ClassVar[dict[str, str]] = {"forward": "forward, with its loss"}
    out: ClassVar[Axes] = ()
    rotates: ClassVar[bool] = False
    tells_tokens: ClassVar[bool] = True
    tells_memory: ClassVar[bool] = True
    leeway: ClassVar[float] = 10.0
    share: ClassVar[str] = "MFU"
    formula: ClassVar[str] = "as the layers count them and 2 dim vocab_size a token, what causality spares not taken off"
    family: str
    dim: int
    blocks: int
    vocab_size: int

    def build(self) -> Objective:
        """The model and its loss, with parameters as training begins with."""
        arch = architecture(self.family, self.dim, self.blocks, seqlen=self.seqlen)
        return Objective(HybridLM(arch, vocab_size=self.vocab_size, dim=self.dim, tied=True))

    @property
    def module(self) -> Objective:
        return meta_model(self)

    @property
    def axes(self) -> dict[str, Axes]:
        return {**{name: () for name, _ in self.module.named_parameters()}, "out": self.out}

    @property
    def options(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        tokens, targets = torch.randint(self.vocab_size, (2, self.batch, self.seqlen), generator=generator)
        return {"module": self.module, "tokens": tokens, "targets": targets}

    @property
    def checked_as(self) -> Case:
        """A shallower model with fewer words, on a shorter sequence: the whole has no room in float64."""
        blocks, vocab_size = min(self.blocks, CHECKED_BLOCKS), min(self.vocab_size, CHECKED_VOCABULARY)
        small: dict[str, Any] = {"blocks": blocks, "vocab_size": vocab_size, "batch": 1, "seqlen": min(self.seqlen, CHECKED)}
        return replace(self, name="a smaller one", **small)

    def flops(self, direction: str) -> int:
        return int(self.tokens * flops_per_token(self.module.model, self.seqlen))

    def make_inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        return parameters_of(self.build, dtype, seed)


@dataclass(frozen=True, kw_only=True)
class TrainingCase(ModelCase):
    """A training step: forward, backward, the norm of the gradients clipped, AdamW. Its output is the loss and the norm."""

    called: ClassVar[dict[str, str]] = {"forward": "training step"}
    out: ClassVar[Axes] = ("figures",)
    figures: ClassVar[int] = 2

    def flops(self, direction: str) -> int:
        """Three times the forward's: clipping and AdamW are not counted."""
        return int(self.tokens * training_flops(self.module.model, self.seqlen))


@cache
def meta_model(case: ModelCase) -> Objective:
    """The model of a case without memory: parameters are given to it."""
    with torch.device("meta"):
        return case.build()


def loss_of(module: Objective, tokens: Tensor, targets: Tensor) -> Tensor:
    """As the trainer computes it, in chunks."""
    loss: Tensor = module(tokens, targets, None)
    return loss


def plain_loss_of(module: Objective, tokens: Tensor, targets: Tensor) -> Tensor:
    """From all logits."""
    return F.cross_entropy(module.model(tokens).flatten(0, 1), targets.flatten())


def exact_loss(*, module: Objective, tokens: Tensor, targets: Tensor, **parameters: Tensor) -> Tensor:
    """The loss, through which gradients go to the parameters."""
    plain = _PlainObjective(module)
    named = {f"objective.{name}": value for name, value in parameters.items()}
    loss: Tensor = functional_call(plain, named, (tokens, targets))
    return loss


class _PlainObjective(nn.Module):
    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return plain_loss_of(self.objective, tokens, targets)


def exact_figures(**inputs: Any) -> Tensor:
    """The loss, and the norm of its gradients."""
    loss = exact_loss(**inputs)
    parameters = [value for name, value in inputs.items() if name not in ("module", "tokens", "targets")]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.stack([loss, torch.stack([gradient.norm() for gradient in gradients]).norm()])


Learned = tuple[dict[str, nn.Parameter], torch.optim.Optimizer]
_learned: MutableMapping[Tensor, Learned] = WeakTensorKeyDictionary()


def learned(key: Tensor, parameters: Inputs) -> Learned:
    """The parameters to train and what trains them: one for all contenders on the same inputs, whose first is `key`, so that
    their moments are in memory once."""
    if key not in _learned:
        shared = {name: nn.Parameter(value) for name, value in parameters.items()}
        _learned[key] = shared, torch.optim.AdamW(shared.values(), lr=0.0, betas=BETAS, fused=True)
    return _learned[key]


class Runner:
    """A forward or, with `trains`, a training step of a model that has the parameters it is given. Its learning rate is 0:
    all contenders have the same parameters, which stay as they are.

    Args:
        plain: on plain torch, its loss from all logits.
        compiles: each layer by torch.compile.
        trains: see above.
    """

    def __init__(self, plain: bool, compiles: bool, trains: bool) -> None:
        self.plain, self.compiles, self.trains = plain, compiles, trains
        self.bound: MutableMapping[Tensor, Objective] = WeakTensorKeyDictionary()

    def __call__(self, *, module: Objective, tokens: Tensor, targets: Tensor, **parameters: Tensor) -> Tensor:
        key = next(iter(parameters.values()))
        shared, optimizer = learned(key, parameters)
        if key not in self.bound:
            self.bound[key] = self.bind(module, shared)
        objective = self.bound[key]
        ops: AbstractContextManager[None] = plain_ops() if self.plain else nullcontext()
        with ops, torch.set_grad_enabled(self.trains):
            loss = (plain_loss_of if self.plain else loss_of)(objective, tokens, targets)
            if not self.trains:
                return loss
            loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), norm])

    def bind(self, module: Objective, parameters: Mapping[str, nn.Parameter]) -> Objective:
        """The model with these parameters."""
        objective = copy.deepcopy(module)
        objective.load_state_dict(parameters, strict=False, assign=True)  # a tied matrix comes once
        objective.model.tie()
        if self.compiles:
            for layer in objective.model.backbone.layers:
                layer.compile(dynamic=False)
        return objective


def peers_of(trains: bool) -> tuple[Peer, ...]:
    """The model in the other ways."""
    ways = {"plain": (True, False), "plain-compiled": (True, True), "compiled": (False, True)}
    return tuple(Peer(name, Runner(plain, compiles, trains)) for name, (plain, compiles) in ways.items())


def benchmarks_of(preset: Preset, size: Size) -> list[Benchmark]:
    """Of a preset's forward and of its training step, each a pass of its own, on the sequences of a size."""
    sizes: dict[str, Any] = {"family": preset.family, "dim": preset.dim, "blocks": preset.blocks}
    sizes |= {"name": preset.name, "vocab_size": preset.vocab_size, "batch": size.batch, "seqlen": size.seqlen}
    cases: list[tuple[ModelCase, Callable[..., Tensor]]] = [
        (ModelCase(**sizes), exact_loss),
        (TrainingCase(**sizes), exact_figures),
    ]
    found = []
    for case, exact in cases:
        trains = isinstance(case, TrainingCase)
        ours = Runner(plain=False, compiles=False, trains=trains)
        name = f"{preset.name} training" if trains else preset.name
        found.append(Benchmark(name, ours, plainly(exact), (case,), case, peers_of(trains)))
    return found


def check_memory(case: Case, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """ValueError where there is no room for the parameters and what trains them; activations are not counted."""
    assert isinstance(case, ModelCase)
    count = sum(p.numel() for p in case.module.parameters())
    needed = COPIES_TO_TRAIN * count * sum(dtype.itemsize for dtype in dtypes)
    there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory_bytes()
    if needed > there:
        raise ValueError(
            f"{case.name} needs {needed >> 30} GiB to be trained, and more for activations; there are {there >> 30} GiB"
        )
