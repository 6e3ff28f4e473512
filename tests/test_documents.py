"""How pages are read and run by tools/documents.py."""

from __future__ import annotations

from pathlib import Path

import documents
import pytest

from madkernels.models.layers import LAYERS, user_layers

PAGE = """\
# A page

```bash
echo first > kept
```

<!-- not run: it never ends -->
```bash
sleep 1000
```

<!-- smaller: 1000 => 2; big => small -->
```python
assert open("kept").read() == "first\\n"
open("big", "w").write("x" * 1000)
```

```text
madkernels of the text
```
"""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    return tmp_path / "docs" / "page.md"


def test_blocks_are_run_in_order_and_smaller(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.write_text(PAGE)
    first, never, small = documents.blocks(page)
    assert (first.line, never.skipped, small.smaller().splitlines()[-1]) == (4, True, 'open("small", "w").write("x" * 2)')
    assert documents.main([str(page)]) == 0
    assert "docs/page.md:9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```bash\nfalse | cat\n```\n", "docs/page.md:2 ended with 1"),
        ("```python\nraise SystemExit(3)\n```\n", "docs/page.md:2 ended with 3"),
        ("<!-- smaller: 10 => 1 -->\n```bash\necho 20\n```\n", "docs/page.md:3: the block has no '10' to replace"),
        ("<!-- later: -->\n```bash\ntrue\n```\n", "is not `smaller: ...`"),
        ("Run it:\n\n    madkernels doctor\n", "docs/page.md:3: madkernels d... stands outside of a fence"),
    ],
)
def test_what_is_wrong_is_said(text: str, complaint: str, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.write_text(text)
    assert documents.main([str(page)]) == 1
    assert complaint in capsys.readouterr().err


def test_what_installs_is_run_alone_and_in_the_checkout(page: Path) -> None:
    page.write_text("```bash\necho >>others\n```\n\n<!-- installs: it -->\n```bash\necho >>docs/installed\n```\n")
    assert documents.main([str(page)]) == 0
    assert not (page.parent / "installed").exists()
    assert documents.main([str(page), "--installs"]) == 0
    assert (page.parent / "installed").read_text() == "\n"
    assert not (documents.ROOT / "others").exists()


def test_every_page_is_fenced_and_reasons_are_given() -> None:
    for page in documents.pages():
        assert documents.outside_of_fences(page) == []
        for block in documents.blocks(page):
            assert block.skipped or block.smaller()
            assert not block.skipped or len(block.how) > len("not run: ") + 10, f"{block.place}: why?"


def test_the_page_of_layers_has_every_layer() -> None:
    page = (documents.ROOT / "docs/api/layers.md").read_text()
    expected = [
        f"## {name}\n\n::: {kind.__module__.removeprefix('madkernels.')}.{kind.__name__}\n"
        for name, kind in LAYERS.items()
        if name not in user_layers()
    ]
    assert [section for section in expected if section not in page] == []
