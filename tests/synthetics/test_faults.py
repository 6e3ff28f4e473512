"""The faults of the only public implementation (mad-lab, as of December 2024), each by its name, and none of them here.

Where another test shows one absent in full, the comment says which.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from madkernels.models import HybridLM
from madkernels.models.layers import LAYERS
from madkernels.models.layers.norm import RMSNorm
from madkernels.synthetics import protocol, train
from madkernels.synthetics.protocol import Run, Training, load_protocol, mad_score, scores
from madkernels.synthetics.tasks import Task
from madkernels.synthetics.tasks.compression import Compression
from madkernels.synthetics.tasks.fuzzy_recall import FuzzyRecall
from madkernels.synthetics.tasks.recall import Recall
from madkernels.synthetics.tasks.selective_copying import SelectiveCopying

TASK = Recall(vocab_size=8, seqlen=8, train_examples=64)
RUN = Run("mlp", TASK, Training(lr=3e-3, epochs=2, batch=16, dim=16, held_out=32, seed=1))
ROOT = Path(__file__).parents[2]


class TestOneWrongOrSilentlyDead:
    """A schedule that is ignored, macro accuracy called accuracy, a test set that also chooses, experts that are not sparse,
    heads taken for their width, copying that no seed reaches, noise that is dropped, two norms for one model."""

    def test_the_schedule_acts(self) -> None:  # its shape: test_runs.test_learning_rate_follows_a_cosine
        flat = dataclasses.replace(RUN, training=dataclasses.replace(RUN.training, min_lr=RUN.training.lr))
        assert train.train(RUN)["loss"] != train.train(flat)["loss"]

    def test_accuracy_is_over_tokens_and_both_are_kept(self) -> None:
        result = train.train(RUN)
        assert {"accuracy", "macro_accuracy"} <= result.keys()
        assert load_protocol("strict").score == "accuracy"

    def test_the_test_set_is_looked_at_once_and_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data, seen = train.data(RUN), []
        honest = train.measure

        def watch(model: Any, inputs: Any, targets: Any, options: Any) -> Any:
            seen.append("test" if torch.equal(inputs, data.test[0]) else "validation")
            return honest(model, inputs, targets, options)

        monkeypatch.setattr(train, "measure", watch)
        train.train(RUN)
        assert seen == ["validation", "validation", "test"]
        assert not torch.equal(data.held_out[0], data.test[0])

    def test_a_token_reaches_its_experts_only(self) -> None:
        layer = LAYERS["moe"](32, experts=8, top_k=2, hidden=16)
        layer(torch.randn(1, 1, 32)).sum().backward()
        reached = layer.gate_up.grad.flatten(1).any(1)
        assert int(reached.sum()) == 2
        with torch.no_grad():  # others change nothing
            x = torch.randn(1, 1, 32)
            y, chosen = layer(x), layer.router(x[0]).topk(2).indices[0]
            layer.down[[i for i in range(8) if i not in chosen]] = torch.nan
            torch.testing.assert_close(layer(x), y)

    def test_heads_of_multi_head_hyena_are_heads(self) -> None:
        assert LAYERS["mh-hyena"](128, heads=16).state_size(1) == 16 * 8 * 8 * 2
        assert LAYERS["mh-hyena"](128, heads=16).in_proj.out_features == 3 * 128

    def test_selective_copying_follows_its_seed(self) -> None:
        task = SelectiveCopying(vocab_size=16, seqlen=64)
        first, again, other = (task.generate(5, seed=seed, split="train")[0] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_an_option_that_would_do_nothing_is_refused(self) -> None:
        with pytest.raises(TypeError, match="frac_noise"):
            Compression(vocab_size=16, seqlen=8, frac_noise=0.2)  # type: ignore[call-arg]

    def test_one_model_for_training_and_benchmark(self) -> None:
        model = train.build(RUN)
        assert type(model) is HybridLM
        assert {type(norm) for norm in model.backbone.norms} == {RMSNorm}


def test_two_copies_reach_the_generator() -> None:
    for copies in (4, 9):
        _, targets = SelectiveCopying(vocab_size=16, seqlen=64, copies=copies).generate(3, seed=1, split="train")
        assert ((targets != -100).sum(1) == copies).all()


def test_three_options_are_passed_on_and_unknown_ones_refused(tmp_path: Path) -> None:
    runs = protocol.plan("demo", ["mlp"], "recall", seeds=[7], dtype="bfloat16")
    assert {(r.training.seed, r.training.dtype) for r in runs} == {(7, "bfloat16")}
    training = {"lr": [1], "weight_decay": [0]}
    whole = {
        "about": "",
        "score": "accuracy",
        "seeds": [1],
        "tasks": {"recall": {"baseline": {"vocab_size": 8, "seqlen": 8}}},
    }
    for entry in ({"training": training | {"precision": "x"}}, {"training": training, "precision": "x"}):
        file = tmp_path / "p.json"
        file.write_text(json.dumps(whole | entry))
        with pytest.raises(ValueError, match="unknown key 'precision'"):
            load_protocol(str(file))


def test_four_a_changed_option_never_brings_back_an_old_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> set[str]:
        archs = ["mlp", "mlp:expand=2", "mamba", "mamba:dstate=4"]
        wider = dataclasses.replace(RUN.training, dim=32)
        runs = [Run(arch, TASK, training) for arch in archs for training in (RUN.training, wider)]
        return {run.key() for run in runs}

    before = keys()
    assert len(before) == 8
    monkeypatch.setattr("madkernels.runs.keys.__version__", "another")
    assert not before & keys()


def test_five_part_of_the_runs_gives_part_of_the_score() -> None:  # one that fails: test_engines, test_runs
    other = dataclasses.replace(RUN, task=Compression(6, 8))
    table = scores([(RUN, {"accuracy": 0.5, "held_out_accuracy": 0.5}), (other, None)])
    assert table["mlp"]["recall"].value == 0.5
    assert table["mlp"]["compression"].value is None
    assert mad_score(table["mlp"]).value is None


def test_six_nothing_of_a_gpu_is_needed() -> None:
    blocked = "triton", "flash_attn", "mamba_ssm", "causal_conv1d", "fla", "transformers", "ray"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "from madkernels.models import HybridLM\nfrom madkernels.models.layers import LAYERS\n"
        "import torch\nfrom madkernels.runs import engines\nfrom madkernels.synthetics import page, sweep\n"
        "HybridLM(' '.join(LAYERS), vocab_size=8)(torch.zeros(1, 4, dtype=torch.long))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("task", [TASK, FuzzyRecall(16, 32), SelectiveCopying(16, 64)], ids=lambda task: task.name)
def test_seven_examples_do_not_depend_on_who_makes_them(task: Task) -> None:
    whole = task.generate(40, seed=1, split="train")[0]
    parts = [task.generate(10, seed=1, split="train", start=start)[0] for start in (0, 10, 20, 30)]
    assert torch.equal(torch.cat(parts), whole)
    rows = {split: set(map(tuple, task.generate(40, seed=1, split=split)[0].tolist())) for split in ("train", "test")}
    assert len(rows["train"]) > 20
    assert rows["train"] != rows["test"]


def test_eight_fuzzy_recall_of_a_large_vocabulary_is_made_at_once() -> None:
    """By listing permutations these examples would take hours."""
    inputs, _ = FuzzyRecall(vocab_size=128, seqlen=128).generate(12_800, seed=1, split="train")
    assert inputs.shape == (12_800, 128)


def test_nine_the_examples_of_the_front_page_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, {})


def test_ten_costs_intervals_and_comparisons_stand_beside_scores() -> None:
    """Shown by test_report; here that the three counts are the layers' own."""
    from madkernels.synthetics.report import cost_of, unequal

    costs = {arch: cost_of(dataclasses.replace(RUN, arch=arch)) for arch in ("mamba", "mlp")}
    assert costs["mamba"] is not None
    assert costs["mamba"].state == 2 * 16 * 16
    told = "The sizes are not equal: mlp keeps no state, mamba 512, and mamba has 1.6 times the parameters of mlp."
    assert unequal(costs) == told
    assert unequal({"mamba": costs["mamba"]}) == ""


@pytest.mark.parametrize("name", ["hyena", "mh-hyena", "hyena-experts"])
def test_eleven_hyena_takes_more_than_it_was_made_for(name: str) -> None:
    layer = LAYERS[name](32, horizon=8)
    x = torch.randn(1, 50, 32)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(layer(x[:, :20]), y[:, :20], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rwkv5-time-mixer", "rwkv6-time-mixer"])
@pytest.mark.parametrize("head_dim", [2, 6, 12])
def test_twelve_rwkv_takes_any_head_and_dtype(name: str, head_dim: int) -> None:
    layer = LAYERS[name](12, head_dim=head_dim).double()
    assert layer(torch.randn(1, 5, 12, dtype=torch.float64)).dtype == torch.float64
