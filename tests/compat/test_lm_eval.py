"""What lm-eval asks of a model: the numbers, against plain ones; and through lm-eval itself where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from madkernels.compat import lm_eval
from madkernels.compat.lm_eval import Scorer, pair_of
from madkernels.models import HybridLM
from madkernels.scaling.training.tokenizers import Bytes

TEXTS = [("a context, ", "and more"), ("", "alone"), ("x", "y"), ("ends in a space ", "z" * 30)]


@pytest.fixture
def model() -> HybridLM:
    torch.manual_seed(0)
    return HybridLM("mamba attention:heads=2 moe hyena", vocab_size=257, dim=16).double()


@torch.no_grad()
def plainly(model: HybridLM, context: str, continuation: str) -> tuple[float, bool]:
    """One token after the other."""
    text, begin = [256, *context.encode(), *continuation.encode()], 1 + len(context.encode())
    logits = model(torch.tensor([text[:-1]]))[0].log_softmax(-1)
    targets = torch.tensor(text[1:])
    told = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    return float(told[begin - 1 :].sum()), bool((logits.argmax(-1) == targets)[begin - 1 :].all())


@pytest.mark.parametrize("stretch", [2048, 7, 1])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods(model: HybridLM, stretch: int, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batches, and the stretches that long texts are cut into."""
    monkeypatch.setattr(lm_eval, "STRETCH", stretch)
    scorer = Scorer(model, Bytes(), batch_size)
    for (found, greedy), (context, continuation) in zip(scorer.loglikelihood(TEXTS), TEXTS, strict=True):
        bare = context.rstrip()
        wanted, right = plainly(model, bare, context[len(bare) :] + continuation)
        assert found == pytest.approx(wanted, rel=1e-5)
        assert greedy == right
    texts = ["a whole text", "b"]
    wanted_of_texts = [plainly(model, "", text)[0] for text in texts]
    assert scorer.loglikelihood_rolling(texts) == pytest.approx(wanted_of_texts, rel=1e-5)


def test_the_likeliest_continuation_is_greedy(model: HybridLM) -> None:
    (text,) = Scorer(model, Bytes(), 1).generate_until([("abc", {"max_gen_toks": 5})])
    if text.isascii():
        assert Scorer(model, Bytes(), 1).loglikelihood([("abc", text)])[0][1]
    prompt = torch.tensor([[256, *b"abc"]])
    new = model.generate(prompt, 5)[0, 4:].tolist()
    assert text == Bytes().decode(new[: new.index(256)] if 256 in new else new)


def test_text_ends_before_the_first_stop(model: HybridLM) -> None:
    scorer = Scorer(model, Bytes(), 1)
    (whole,) = scorer.generate_until([("abc", {"max_gen_toks": 30})])
    stop = whole[2:4]
    (found,) = scorer.generate_until([("abc", {"max_gen_toks": 30, "until": [stop, "never"]})])
    assert found == whole[: whole.index(stop)]


def test_texts_are_generated_in_batches(model: HybridLM) -> None:
    """As alone, in the order that they were asked in, each up to a stop of its own."""
    contexts = ["abc", "", "a longer context than others", "x", "the last one"]
    (whole,) = Scorer(model, Bytes(), 1).generate_until([("abc", {"max_gen_toks": 30})])
    options = [{"max_gen_toks": 30, "until": [whole[2:4]]}, {"max_gen_toks": 9}]
    asked = [(context, options[i % 4 == 1]) for i, context in enumerate(contexts)]
    alone = [Scorer(model, Bytes(), 1).generate_until([each])[0] for each in asked]
    assert len(set(map(len, alone))) > 1
    for batch_size in (1, 2, 8):
        assert Scorer(model, Bytes(), batch_size).generate_until(asked) == alone


def test_spaces_go_to_the_continuation() -> None:
    assert pair_of(Bytes(), "a ", "b") == ([256, *b"a"], list(b" b"))
    assert pair_of(Bytes(), "", "b") == ([256], list(b"b"))


def test_the_harness_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="2"):
        lm_eval.main()
    assert capsys.readouterr().err.endswith("the harness is installed by pip install lm-eval\n")


def test_through_the_harness(model: HybridLM, tmp_path: Path) -> None:
    harness: Any = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    manager: Any = pytest.importorskip("lm_eval.tasks").TaskManager
    model.save_pretrained(tmp_path / "saved", tokenizer="bytes")
    questions = [{"question": c, "choices": [t, "something else"], "answer": 0} for c, t in TEXTS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    task = {
        "task": "offline", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "data.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    lm_eval.register()
    given = {"model": "madkernels", "model_args": {"path": str(tmp_path / "saved"), "dtype": "float64"}, "tasks": [task]}
    found = harness.simple_evaluate(**given, task_manager=manager(), device="cpu", log_samples=False)
    scores = [
        [plainly(model, c.rstrip(), c[len(c.rstrip()) :] + t)[0] for t in (right, "something else")] for c, right in TEXTS
    ]
    assert found["results"]["offline"]["acc,none"] == sum(a > b for a, b in scores) / len(scores)
