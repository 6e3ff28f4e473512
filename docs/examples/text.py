"""Text to tokens to a trained model to text, in Python; `madkernels train prepare`, `run` and `sample` do the same.

Run it with `python docs/examples/text.py`.
"""

import tempfile
from pathlib import Path

import torch

from madkernels.models.generation import continue_prompts
from madkernels.models.spec import parse
from madkernels.scaling.training.checkpoint import load_model
from madkernels.scaling.training.data import Corpus
from madkernels.scaling.training.prepare import prepare
from madkernels.scaling.training.recipe import LMRun, Recipe
from madkernels.scaling.training.tokenizers import Bytes
from madkernels.scaling.training.trainer import train

texts = [f"Chapter {i}. The sea was calm, and number {i} of the boats came home." for i in range(1, 41)]

with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)

    # Tokens: every byte is one, and 257 with the token that ends a document. A fifth of the texts is held out.
    tokenizer = Bytes()
    prepare((text.encode() for text in texts), folder / "data", tokenizer, validation=0.2)
    corpus = Corpus(folder / "data")

    # Training: rows of 64 tokens, 8 in a step.
    run = LMRun(
        arch=str(parse("mamba swiglu attention:heads=4 swiglu")),
        dim=64,
        vocab_size=corpus.vocab_size,
        recipe=Recipe(steps=150, batch=8, seqlen=64, lr=5e-3),
        data=corpus.sha256,
        corpus=str(folder / "data"),
        out=str(folder / "run"),
    )
    result = train(run)
    print(f"held-out loss: {result['loss']:.3f} nats per token, in {result['seconds']:.0f} s")

    # Text: the newest checkpoint of the run goes on from two prompts.
    model = load_model(folder / "run")
    prompts = ["Chapter 7. ", "The sea "]
    tokens = [torch.tensor(list(prompt.encode())) for prompt in prompts]
    for prompt, new in zip(prompts, continue_prompts(model, tokens, 40, end=tokenizer.end), strict=True):
        print(prompt + tokenizer.decode(new))
