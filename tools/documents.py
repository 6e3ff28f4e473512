"""Runs the commands and the Python of the README and of docs/, from the pages themselves; run by `make documents`.

Fenced blocks of `bash` and `python` are run page by page, from top to bottom, in a folder of the page's own that holds a
link to docs/ and what earlier blocks of the page left. The line before a fence may say

    <!-- smaller: FROM => TO; FROM => TO -->   run with these replacements, so that it ends in seconds
    <!-- not run: REASON -->                   left out
    <!-- installs: WHAT -->                    left out; with --installs these alone are run, in the checkout, whose package
                                               they install over the one that is there

Exit code 1 where a block fails, a replacement does not apply, or a command stands outside of a fence.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 180  # a block
SECONDS_OF_INSTALLS = 1500  # one that compiles
FENCE = re.compile(r"(?:^<!-- (?P<how>.+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
UNFENCED = re.compile(r"^(?: {4}|\t)\s*\$? ?(?:madkernels|make|pip|python|torchrun|git) [a-z-]", re.MULTILINE)
LANGUAGES = ("bash", "python")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    how: str  # what the comment before it says

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def skipped(self) -> bool:
        return self.how.startswith("not run: ")

    @property
    def installs(self) -> bool:
        return self.how.startswith("installs: ")

    def smaller(self) -> str:
        """The text with its replacements.

        Raises:
            ValueError: the comment is not understood, or what it replaces is not there.
        """
        if not self.how or self.installs:
            return self.text
        kind, _, rules = self.how.partition(": ")
        if kind != "smaller":
            raise ValueError(f"{self.place}: <!-- {self.how} --> is not `smaller: ...`, `not run: ...` or `installs: ...`")
        text = self.text
        for rule in rules.split("; "):
            before, arrow, after = rule.partition(" => ")
            if not arrow or before not in text:
                raise ValueError(f"{self.place}: the block has no {before!r} to replace")
            text = text.replace(before, after)
        return text


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    content = page.read_text()
    for found in FENCE.finditer(content):
        if found["language"] in LANGUAGES:
            line = content[: found.start("text")].count("\n") + 1
            yield Block(page, line, found["language"], found["text"], found["how"] or "")


def outside_of_fences(page: Path) -> list[str]:
    """The commands that no fence holds, and that would not be run."""
    content = page.read_text()
    return [
        f"{page.relative_to(ROOT)}:{content[: m.start()].count(chr(10)) + 1}: {m[0].strip()}..."
        for m in UNFENCED.finditer(content)
    ]


def command(block: Block) -> list[str]:
    return (
        ["bash", "-euo", "pipefail", "-c", block.smaller()]
        if block.language == "bash"
        else [sys.executable, "-c", block.smaller()]
    )


def run(block: Block, folder: Path) -> str:
    """What went wrong, or nothing."""
    beside = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": os.pathsep.join([beside, os.environ.get("PATH", "")]), "OMP_NUM_THREADS": "1"}
    begun, limit = time.monotonic(), SECONDS_OF_INSTALLS if block.installs else SECONDS
    try:
        done = subprocess.run(command(block), cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"{block.place}: not done after {limit} s"
    print(f"{block.place:40} {time.monotonic() - begun:6.1f} s  {'failed' if done.returncode else 'passed'}", flush=True)
    if done.returncode:
        return f"{block.place} ended with {done.returncode}:\n{block.smaller()}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return ""


def run_page(page: Path) -> list[str]:
    """What went wrong on a page, without what installs; blocks after one that failed are not run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "docs").symlink_to(ROOT / "docs")
        for block in blocks(page):
            if block.skipped or block.installs:
                print(f"{block.place:40}           {block.how}")
                continue
            try:
                failure = run(block, folder)
            except ValueError as error:
                failure = str(error)
            if failure:
                return [failure]
    return []


def run_installs(page: Path) -> list[str]:
    """What went wrong in the blocks of a page that install."""
    return [failure for block in blocks(page) if block.installs and (failure := run(block, ROOT))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, help="pages to run (default: all)")
    parser.add_argument("--installs", action="store_true", help="run the blocks that install, and no others")
    options = parser.parse_args(arguments)
    chosen = [page.resolve() for page in options.pages] or pages()
    failures = [f"{where} stands outside of a fence" for page in chosen for where in outside_of_fences(page)]
    for page in chosen:
        failures += run_installs(page) if options.installs else run_page(page)
    print("\n".join(failures), file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
