"""`madkernels train sample` and `export`: from a trained model to text, and to other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from madkernels.cli.options import Dtype, Plugins
from madkernels.cli.sweeps import load_plugins
from madkernels.cli.train import train as train  # with these commands

if TYPE_CHECKING:  # torch is loaded when a command runs, not to print its help
    from madkernels.models import HybridLM
    from madkernels.scaling.training.tokenizers import Tokenizer

Model = Annotated[
    Path, typer.Argument(help="Folder of a run (its newest checkpoint), of a checkpoint, or of an exported model.")
]
TokenizerFile = Annotated[
    str | None, typer.Option(help="bytes, or a tokenizer.json. Default: the one that the data were prepared with.")
]


@train.command()
def sample(
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to continue; repeat for a batch. Default: an empty line.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text file with a prompt on each line, after those of --prompt."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most; a text also ends with its document.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among so many of the likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest tokens that have this probability together.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the parameters.")] = "float32",
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.")] = "cpu",
    tokenizer: TokenizerFile = None,
    plugin: Plugins = None,
) -> None:
    """Continue text with a trained model. A single prompt is written as it grows.

    For example: madkernels train sample run --prompt "import "
    """
    import torch

    from madkernels.cli.device import check_device
    from madkernels.models.generation import continue_prompts
    from madkernels.scaling.training.tokenizers import TextStream

    check_device(device)
    lm, text = _loaded(model, tokenizer, plugin)
    lm = lm.to(device, getattr(torch, dtype)).eval()
    begins = [*(prompt or ()), *(prompts.read_text(encoding="utf-8").splitlines() if prompts else ())] or ["\n"]
    begun = [_tokens_of(text, each) for each in begins]
    stream = TextStream(text, begun[0]) if len(begins) == 1 else None
    if stream:
        print(begins[0], end="", flush=True)
    found = continue_prompts(
        lm, [torch.tensor(each, device=device) for each in begun], tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        end=text.end, generator=torch.Generator(device).manual_seed(seed),
        on_tokens=(lambda new: print(stream.add(new[0]), end="", flush=True)) if stream else None,
    )  # fmt: skip
    if stream:
        print(stream.end())
        return
    for number, (begin_text, begin, new) in enumerate(zip(begins, begun, found, strict=True), 1):
        print(f"--- {number}\n{begin_text}{text.decode(begin + new)[len(text.decode(begin)) :]}")


@train.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not be there yet.")],
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the parameters.")] = "float32",
    tokenizer: TokenizerFile = None,
    plugin: Plugins = None,
) -> None:
    """Write a trained model as other tools read it: model.safetensors, config.json, and its tokenizer.json if it has one.

    HybridLM.from_pretrained and every command that takes a run read it.
    """
    import torch

    if out.exists():
        raise ValueError(f"{out} is there already; choose another --out")
    lm, text = _loaded(model, tokenizer, plugin)
    lm.to(getattr(torch, dtype)).save_pretrained(out, tokenizer=text.name, end=text.end)
    text.save(out)
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}, {size:,.1f} MB")


def _loaded(path: Path, tokenizer: str | None, plugins: list[Path] | None) -> tuple[HybridLM, Tokenizer]:
    from madkernels.scaling.training.checkpoint import load_with_tokenizer

    load_plugins(plugins)
    return load_with_tokenizer(path, tokenizer)


def _tokens_of(tokenizer: Tokenizer, prompt: str) -> list[int]:
    from madkernels.scaling.training.tokenizers import tokens_of

    if not prompt:
        raise ValueError("--prompt, or a line of --prompts, is empty; give a character at least")
    return tokens_of(tokenizer, prompt)
