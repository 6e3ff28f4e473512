"""Models of this package under the Language Model Evaluation Harness (lm-eval 0.4): runs, checkpoints, exported models.

    python -m madkernels.compat.lm_eval --model madkernels --model_args path=run --tasks hellaswag

is `lm_eval` that knows the model `madkernels`; in Python `register()` makes it known. Arguments of the model: path,
tokenizer (default: that of the data), dtype, plugin (a Python file that adds layers). The harness's own --batch_size is how
many rows are scored, or continued, at a time.

Texts are never cut: a layer's state carries the context from one stretch of a long text to the next.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from madkernels.models import HybridLM
from madkernels.models.generation import continue_prompts
from madkernels.runs.engines import load_plugin
from madkernels.scaling.training.checkpoint import load_with_tokenizer
from madkernels.scaling.training.tokenizers import Tokenizer, tokens_of

NAME = "madkernels"
DTYPES = ("float32", "bfloat16", "float16", "float64")
STRETCH = 2048  # tokens that are scored at a time

Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation


def pair_of(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Tokens of both, cut where the tokens of the whole text are; spaces at the end of a context go to what follows, as the
    tokens of words begin with theirs. A context is a document's end at least."""
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    whole = tokens_of(tokenizer, context + continuation)
    length = len(tokens_of(tokenizer, context))
    return ([tokenizer.end, *whole[:length]], whole[length:])


@torch.no_grad()
def scores(model: HybridLM, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """Of each continuation its log-likelihood in nats after its context, and whether each of its tokens is the likeliest.

    The pairs are one batch; rows that end early are padded behind their end, which no layer sees from before it.
    """
    device = model.embedding.weight.device
    rows = [torch.tensor(context + continuation, device=device) for context, continuation in pairs]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    found, right = [0.0] * len(pairs), [True] * len(pairs)
    states = model.init_state(len(pairs))
    for first in range(0, padded.shape[1] - 1, STRETCH):
        last = min(first + STRETCH, padded.shape[1] - 1)
        logits = model(padded[:, first:last], states=states).float()
        told, likeliest = (t.cpu() for t in _of_targets(logits, padded[:, first + 1 : last + 1]))
        for i, (context, continuation) in enumerate(pairs):
            begin = max(len(context) - 1 - first, 0)
            end = min(len(context) + len(continuation) - 1 - first, last - first)
            if begin < end:
                found[i] += float(told[i, begin:end].double().sum())
                right[i] &= bool(likeliest[i, begin:end].all())
    return list(zip(found, right, strict=True))


def _of_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (rows, seqlen, vocab_size) -> log-likelihoods of targets (rows, seqlen), and whether they are the likeliest."""
    told = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return told, logits.argmax(-1) == targets


class Scorer:
    """What the harness asks of a model, in its own words. `progress` iterates over a list, as tqdm does."""

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.progress: Callable[[Sequence[Any]], Iterable[Any]] = iter

    def loglikelihood(self, texts: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of (context, continuation)."""
        return self._scored([pair_of(self.tokenizer, *text) for text in texts])

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Of whole texts."""
        pairs = [([self.tokenizer.end], tokens_of(self.tokenizer, text)) for text in texts]
        return [score for score, _ in self._scored(pairs)]

    def generate_until(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Of (context, options), text up to the first of `until`. Those of the same options are continued together, long
        ones with long ones."""
        tokens = [[self.tokenizer.end, *tokens_of(self.tokenizer, context)] for context, _ in asked]
        alike: dict[str, list[int]] = {}
        for i in sorted(range(len(asked)), key=lambda i: -len(tokens[i])):
            alike.setdefault(repr(asked[i][1]), []).append(i)
        batches = [some for group in alike.values() for some in self._batches(group)]
        found = [""] * len(asked)
        for some in self.progress(batches):
            for i, text in zip(some, self._generated([tokens[i] for i in some], asked[some[0]][1]), strict=True):
                found[i] = text
        return found

    def _scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Long ones together with long ones."""
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for some in self.progress(self._batches(order)):
            for i, score in zip(some, scores(self.model, [pairs[i] for i in some]), strict=True):
                found[i] = score
        return found

    def _batches(self, order: list[int]) -> list[list[int]]:
        return [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]

    def _generated(self, contexts: list[list[int]], options: dict[str, Any]) -> list[str]:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        device = self.model.embedding.weight.device
        prompts = [torch.tensor(context, device=device) for context in contexts]
        texts: list[list[int]] = [[] for _ in prompts]
        stopped = [False] * len(prompts)

        def stop(new: list[int]) -> bool:
            """Whether all texts have ended, or come to a stop."""
            for i, token in enumerate(new):
                if stopped[i]:
                    continue
                texts[i] += [token] if token >= 0 else []
                stopped[i] = token < 0 or any(each in self.tokenizer.decode(texts[i]) for each in stops)
            return all(stopped)

        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
        drawn: dict[str, Any] = {"temperature": temperature}
        drawn |= {name: options[name] for name in ("top_k", "top_p") if options.get(name)}
        most = int(options.get("max_gen_toks") or 256)
        continued = continue_prompts(self.model, prompts, most, end=self.tokenizer.end, on_tokens=stop, **drawn)
        return [_until(self.tokenizer.decode(new), stops) for new in continued]


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.index(each) for each in stops if each in text), default=len(text))]


def register() -> None:
    """Makes the model `madkernels` known to lm-eval, which must be installed."""
    base, tqdm = import_module("lm_eval.api.model").LM, import_module("tqdm").tqdm

    class Model(base):  # type: ignore[misc, valid-type]
        def __init__(
            self, path: str, tokenizer: str | None = None, dtype: str = "float32", device: str | None = None,
            batch_size: int | str | None = None, max_batch_size: int | None = None, plugin: str | None = None,
        ) -> None:  # fmt: skip
            super().__init__()
            if dtype not in DTYPES:
                raise ValueError(f"dtype is {dtype!r}; it takes {', '.join(DTYPES)}")
            if plugin is not None:
                load_plugin(plugin)
            model, made = load_with_tokenizer(path, tokenizer)
            device = device if device and (torch.cuda.is_available() or "cuda" not in device) else "cpu"  # lm-eval's default
            rows = 8 if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
            self.scorer = Scorer(model.to(device, getattr(torch, dtype)), made, rows)

        def _shown(self, disable_tqdm: bool) -> Scorer:
            self.scorer.progress = partial(tqdm, disable=disable_tqdm)
            return self.scorer

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
            return self._shown(disable_tqdm).loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
            return self._shown(disable_tqdm).loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
            return self._shown(disable_tqdm).generate_until([request.args for request in requests])

    import_module("lm_eval.api.registry").register_model(NAME)(Model)


def main() -> None:
    try:
        register()
    except ModuleNotFoundError as error:
        print(f"error: {error}; the harness is installed by pip install lm-eval", file=sys.stderr)
        sys.exit(2)
    import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
