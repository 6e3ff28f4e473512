"""Text to tokens and back: bytes, or a `tokenizer.json` of the Hugging Face `tokenizers` library."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from madkernels.scaling.training.data import Tokens

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
FILE = "tokenizer.json"  # beside data and checkpoints that were made with one
REPLACED = "\ufffd"  # what stands for bytes that are no text


class Tokenizer(Protocol):
    """Text to tokens; `end` is the token that ends a document."""

    name: str
    vocab_size: int
    end: int

    def encode(self, text: bytes) -> Sequence[int] | Tokens: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> None:
        """Leaves what :func:`tokenizer_in` needs."""


class Bytes:
    """One token per byte, and 256 to end a document."""

    name, vocab_size, end = "bytes", 257, 256

    def encode(self, text: bytes) -> Tokens:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token != self.end).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """There is nothing to keep."""


class HuggingFace:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library. ValueError where it has none of the known end tokens."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Model
        except ImportError:
            raise ValueError("a tokenizer file needs the tokenizers library: pip install 'madkernels[hf]'") from None
        try:
            self.text = path.read_bytes()
            self.model = Model.from_str(self.text.decode())
        except OSError as error:
            raise ValueError(f"tokenizer {path}: {error.strerror}; expected bytes, or a tokenizer.json") from None
        except Exception as error:  # what the library raises for a file that is none
            raise ValueError(f"tokenizer {path}: {error}") from None
        self.sha256 = hashlib.sha256(self.text).hexdigest()
        self.name = f"{path.name} sha256:{self.sha256}"
        self.vocab_size = self.model.get_vocab_size()
        ends = [self.model.token_to_id(name) for name in END_NAMES]
        found = next((end for end in ends if end is not None), None)
        if found is None:
            raise ValueError(f"tokenizer {path} has no token that ends a document; looked for {', '.join(END_NAMES)}")
        self.end: int = found

    def encode(self, text: bytes) -> list[int]:
        ids: list[int] = self.model.encode(text.decode(errors="replace"), add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.model.decode(list(tokens), skip_special_tokens=True)
        return text

    def save(self, folder: Path) -> None:
        (folder / FILE).write_bytes(self.text)


def tokenizer_of(name: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json."""
    return Bytes() if name == "bytes" else HuggingFace(Path(name))


def tokenizer_in(folder: Path, name: str) -> Tokenizer:
    """What made the tokens of data or of a model in a folder, by the name that is kept of it.

    Raises:
        ValueError: its file is not there, or is another.
    """
    if name == Bytes.name:
        return Bytes()
    path = folder / FILE
    if not path.exists():
        raise ValueError(f"{folder} has no {FILE}, of {name}; give --tokenizer, the file that the data were prepared with")
    found = HuggingFace(path)
    if found.sha256 not in name:
        raise ValueError(f"{path} is another tokenizer than {name}")
    return found


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of text; its end as a document is not among them."""
    return [int(token) for token in tokenizer.encode(text.encode())]


def copy(data: Path, folder: Path) -> None:
    """Leaves with a model the file of a tokenizer that its data were made with, where there is one."""
    if (data / FILE).exists() and not (folder / FILE).exists():
        shutil.copyfile(data / FILE, folder / FILE)


class TextStream:
    """The text of tokens as they come: what is still no text, such as half of a character, waits.

    It follows a prompt, since tokenizers decode a token at the beginning of a text without its space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer, self.tokens = tokenizer, list(prompt)
        self.told = tokenizer.decode(self.tokens)

    def add(self, token: int) -> str:
        """What there is to tell after one more token."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        return "" if text.endswith(REPLACED) else self._rest(text)

    def end(self) -> str:
        """What is left."""
        return self._rest(self.tokenizer.decode(self.tokens))

    def _rest(self, text: str) -> str:
        new, self.told = text[len(self.told) :], text
        return new
