"""From a run to text and to a folder that other tools read, as it is typed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from madkernels.cli.main import main
from madkernels.models import HybridLM
from madkernels.scaling.training.checkpoint import load_model, load_tokenizer
from madkernels.scaling.training.data import Corpus
from madkernels.scaling.training.prepare import prepare
from madkernels.scaling.training.recipe import LMRun, Recipe
from madkernels.scaling.training.tokenizers import Bytes, TextStream, Tokenizer, tokenizer_of
from madkernels.scaling.training.trainer import Execution, train

WORDS = [f"w{i}" for i in range(5)]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code, output and errors of a command."""

    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["madkernels", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return called


def trained(folder: Path, tokenizer: Tokenizer) -> Path:
    """A run that has learned little."""
    text = [" ".join(WORDS[(i + k) % 5] for k in range(40)).encode() + bytes([97 + i % 26]) for i in range(60)]
    prepare(iter(text), folder / "data", tokenizer, validation=0.2)
    data = folder / "data"
    run = LMRun(
        "mamba attention:heads=2",
        8,
        tokenizer.vocab_size,
        Recipe(6, 2, 16, 0.01),
        _sha(data),
        corpus=str(data),
        out=str(folder / "run"),
    )
    train(run, Execution())
    return folder / "run"


def _sha(data: Path) -> str:

    return Corpus(data).sha256


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("bytes"), Bytes())


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tokens of a tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("words")
    vocabulary = {word: i for i, word in enumerate([*WORDS, "?", "</s>"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(folder / "mine.json"))
    return trained(folder, tokenizer_of(str(folder / "mine.json")))


def test_one_prompt_is_written_as_it_grows(run: Path, call: Call) -> None:
    code, told, errors = call("sample", run, "--prompt", "w1 w2", "--tokens", 9, "--temperature", 0)
    assert (code, errors) == (0, "")
    lm = load_model(run)
    whole = lm.generate(torch.tensor([list(b"w1 w2")]), 9)[0].tolist()
    wanted = whole[: whole.index(256)] if 256 in whole else whole
    assert told == bytes(wanted).decode(errors="replace") + "\n"


def test_several_prompts_of_unequal_lengths(run: Path, call: Call) -> None:
    code, told, _ = call("sample", run, "--prompt", "w1 w2", "--prompt", "w3", "--tokens", 4, "--temperature", 0)
    assert code == 0
    assert told.startswith("--- 1\nw1 w2")
    assert "\n--- 2\nw3" in told
    again = call("sample", run, "--prompt", "w3", "--tokens", 4, "--temperature", 0)[1]
    assert told.endswith(again)


def test_prompts_of_a_file(run: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("w1 w2\nw3\n")
    of_file = call("sample", run, "--prompt", "w", "--prompts", tmp_path / "prompts", "--tokens", 4)
    assert of_file == call("sample", run, "--prompt", "w", "--prompt", "w1 w2", "--prompt", "w3", "--tokens", 4)
    assert of_file[0] == 0


def test_draws_follow_the_seed(run: Path, call: Call) -> None:
    texts = [call("sample", run, "--prompt", "w", "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_model_is_the_run(run: Path, call: Call, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    code, told, errors = call("export", run, "--out", out, "--dtype", dtype)
    assert (code, errors) == (0, "")
    assert told.startswith(f"{out}: config.json, model.safetensors, ")
    ours, theirs = HybridLM.from_pretrained(out), load_model(run).to(getattr(torch, dtype))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert load_tokenizer(out).name == "bytes"
    assert call("sample", out, "--prompt", "w1", "--dtype", dtype) == call("sample", run, "--prompt", "w1", "--dtype", dtype)
    assert call("export", run, "--out", out)[2] == f"error: {out} is there already; choose another --out\n"


def test_a_tokenizer_file_stays_with_data_run_and_export(words: Path, call: Call, tmp_path: Path) -> None:
    """Wherever the first one went."""
    shutil.rmtree(words.parent / "data")
    code, told, errors = call("sample", words, "--prompt", "w1 w2", "--tokens", 3, "--temperature", 0)
    assert (code, errors) == (0, "")
    assert set(told.split()) <= {*WORDS, "?"}  # the decoder's space after the prompt included
    pair = call("sample", words, "--prompt", "w1 w2", "--prompt", "w3", "--tokens", 3, "--temperature", 0)[1]
    assert pair.startswith(f"--- 1\n{told}--- 2\nw3 w")
    assert call("export", words, "--out", tmp_path / "out")[0] == 0
    assert call("sample", tmp_path / "out", "--prompt", "w1 w2", "--tokens", 3, "--temperature", 0)[1] == told
    (tmp_path / "out" / "tokenizer.json").unlink()
    _, _, errors = call("sample", tmp_path / "out", "--prompt", "w1")
    assert "has no tokenizer.json, of tokenizer.json sha256:" in errors
    assert "give --tokenizer" in errors


def test_a_step_of_a_run(run: Path, call: Call) -> None:
    step = sorted((run / "checkpoints").iterdir())[-1]
    assert call("sample", step, "--prompt", "w1") == call("sample", run, "--prompt", "w1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "--prompt, or a line of --prompts, is empty; give a character at least"),
        (("--top-p", "2"), "top_p is 2.0; expected a share above 0 and up to 1"),
    ],
)
def test_refusals(run: Path, call: Call, arguments: tuple[str, ...], message: str) -> None:
    assert call("sample", run, *arguments)[2] == f"error: {message}\n"


def test_what_is_no_model(call: Call, tmp_path: Path) -> None:
    expected = "expected a folder that madkernels train run or train export wrote\n"
    for path, told in (
        (tmp_path, "is neither a run, a checkpoint nor an exported model"),
        (tmp_path / "none", "does not exist"),
    ):
        assert call("sample", path) == (2, "", f"error: {path} {told}; {expected}")


def test_a_damaged_checkpoint_is_passed_over(run: Path, call: Call, tmp_path: Path) -> None:
    """Its tokenizer is known from the one before it, too."""
    again = tmp_path / "run"
    shutil.copytree(run, again)
    (newest,) = (again / "checkpoints").iterdir()
    shutil.copytree(newest, newest.with_name("step-00000007"))
    (newest.with_name("step-00000007") / "run.json").write_text("{")
    with pytest.warns(UserWarning, match="trying the checkpoint before it"):
        found = call("sample", again, "--prompt", "w1")
    assert found == call("sample", run, "--prompt", "w1")


def test_another_tokenizer_than_the_models(run: Path, words: Path, call: Call) -> None:
    errors = call("sample", run, "--tokenizer", words.parent / "mine.json")[2]
    assert errors.startswith("error: the tokenizer mine.json sha256:")
    assert errors.endswith("has 7 tokens, the model 257\n")


def test_text_waits_for_whole_characters() -> None:
    stream = TextStream(Bytes(), list(b"b"))
    told = [stream.add(token) for token in "aé".encode() + b"\xff"]
    assert told == ["a", "", "é", ""]
    assert stream.end() == "�"
