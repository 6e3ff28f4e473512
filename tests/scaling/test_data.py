"""Prepared data: what is written, and the batches that come out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from madkernels.scaling.training import data
from madkernels.scaling.training.data import Batches, Corpus, held_out, permuted
from madkernels.scaling.training.digest import file_sha256
from madkernels.scaling.training.prepare import dataset_documents, documents_of, files_of, prepare, standard_library
from madkernels.scaling.training.tokenizers import Bytes, tokenizer_of

TEXTS = [f"document {i}: ".encode() + bytes([97 + i % 26]) * (20 + 7 * i % 50) for i in range(60)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(iter(TEXTS), tmp_path / "data", Bytes(), validation=0.2, shard_tokens=500)
    return tmp_path / "data"


def test_every_document_is_there_once_with_its_end(folder: Path) -> None:
    corpus = Corpus(folder)
    found = []
    for split in corpus.splits.values():
        tokens = split[0 : len(split)]
        ends = np.flatnonzero(tokens == 256)
        found += [bytes(part[part != 256].astype(np.uint8)) for part in np.split(tokens, ends + 1)[:-1]]
        assert ends[-1] == len(tokens) - 1
    assert sorted(found) == sorted(TEXTS)
    assert len(corpus.manifest["splits"]["train"]) > 2, "the test wants several shards"


def test_a_split_reads_across_its_shards(folder: Path) -> None:
    split = Corpus(folder).split("train")
    whole = np.concatenate([np.asarray(shard) for shard in split.shards])
    edge = int(split.ends[1])
    for start, stop in ((0, 3), (edge - 2, edge + 2), (edge, edge + 1), (edge - 1, edge), (0, len(whole))):
        assert (split[start:stop] == whole[start:stop]).all()


def test_copies_are_dropped_and_sides_do_not_depend_on_order(tmp_path: Path) -> None:
    first = prepare(iter(TEXTS), tmp_path / "a", Bytes(), validation=0.2)
    prepare(iter([*TEXTS[::-1], *TEXTS[:5], b""]), tmp_path / "b", Bytes(), validation=0.2)
    second = Corpus(tmp_path / "b").manifest
    assert second["left_out"] == 6
    assert [sum(s["documents"] for s in m["splits"]["validation"]) for m in (first, second)] == [
        sum(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") < 0.2 * 2**64 for text in TEXTS)
    ] * 2


def test_a_manifest_says_what_is_there(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["splits"]["train"]:
        data = (folder / shard["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        assert len(data) == 2 * shard["tokens"]


def test_nothing_is_left_of_what_could_not_be_finished(tmp_path: Path) -> None:
    def breaks():  # type: ignore[no-untyped-def]
        yield b"text"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        prepare(breaks(), tmp_path / "data", Bytes())
    assert list(tmp_path.iterdir()) == []


def test_files_and_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    files = files_of([str(tmp_path / "**" / "*.*")])
    assert list(documents_of(files)) == [b"one", b"two", b"three"]
    (tmp_path / "deep" / "b.jsonl").write_text('{"text": "two"}\n{"words": 1}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: expected a JSON object with a string 'text'"):
        list(documents_of(files))
    with pytest.raises(ValueError, match="no file matches"):
        files_of([str(tmp_path / "*.pdf")])


def test_blank_lines_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n \t\r\n{"text": "two"}\n\n')
    assert list(documents_of([path])) == [b"one", b"two"]


@pytest.mark.parametrize(
    "line", [b"{", b"1", b"null", b'"text"', b"[]", b'{"text": null}', b'{"text": 1}', b'{"text": "\\ud800"}', b"[" * 9999]
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line)
    with pytest.raises(ValueError, match=rf"^{path}, line 3: expected a JSON object with a string 'text'$"):
        list(documents_of([path]))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=rf"^{path}, line 2: not UTF-8 \(0xe9\); convert the file first$"):
        list(documents_of([path]))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a\.txt cannot be read: No such file or directory$"):
        list(documents_of([tmp_path / "a.txt"]))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """And not the name under which it would have been written first."""
    (tmp_path / "file").write_text("")
    for out, why in ((tmp_path / "file" / "data", "Not a directory"), (Path("/proc/data"), "No such file or directory")):
        with pytest.raises(OSError, match=f"^cannot write {out}: {why}; choose another --out$"):
            prepare(iter(TEXTS), out, Bytes(), validation=0.2)


def test_the_standard_library_is_a_corpus() -> None:
    files = standard_library()
    assert sum(path.stat().st_size for path in files) > 5e6
    assert not any("test" in path.parts for path in files)


def test_a_tokenizer_of_hugging_face(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "two": 1, "?": 2, "</s>": 3}, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    made = tokenizer_of(str(tmp_path / "tokenizer.json"))
    assert (made.vocab_size, made.end, list(made.encode(b"two one three"))) == (4, 3, [1, 0, 2])


def test_what_is_no_tokenizer_is_told(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "bad.json").write_text("{}")
    for name in ("bad.json", "absent.json"):
        with pytest.raises(ValueError, match=rf"tokenizer .*{name}: "):
            tokenizer_of(str(tmp_path / name))


def test_a_dataset_of_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(dataset_documents(str(tmp_path))) == [b"one", b"two"]
    with pytest.raises(ValueError, match="it has no column 'words'; it has text"):
        list(dataset_documents(str(tmp_path), "words"))


# ---- batches


def batches(folder: Path, **changes: int) -> Batches:
    corpus = Corpus(folder)
    return Batches(corpus.split("train"), corpus.end, **{"batch": 4, "seqlen": 16, "seed": 5} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 1000])
def test_a_permutation_reaches_every_place_once(count: int) -> None:
    assert sorted(permuted(i, count, key=99) for i in range(count)) == list(range(count))
    if count >= 64:
        assert [permuted(i, count, key=99) for i in range(count)] != [permuted(i, count, key=98) for i in range(count)]


def test_an_epoch_shows_every_window_once(folder: Path) -> None:
    made = batches(folder, batch=1)
    made.split = np.arange(len(made.split))  # type: ignore[assignment]  # tokens that say where they are
    for epoch in range(2):
        rows = [made[epoch * made.windows + i].tokens[0].tolist() for i in range(made.windows)]
        assert rows != sorted(rows)
        shift = min(rows)[0]
        assert sorted(rows) == [list(range(shift + 16 * i, shift + 16 * i + 16)) for i in range(made.windows)]


def test_targets_are_the_tokens_that_follow(folder: Path) -> None:
    batch = batches(folder)[3]
    assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()
    assert batch.tokens.shape == batch.targets.shape == (4, 16)


def test_documents_begin_after_ends_and_at_rows(folder: Path) -> None:
    for step in range(6):
        batch = batches(folder)[step]
        flat = batch.tokens.flatten()
        starts = batch.cu_seqlens[:-1].tolist()
        assert starts == [i for i in range(64) if i % 16 == 0 or flat[i - 1] == 256]
        assert batch.cu_seqlens[-1] == 64
        part = batch.part(2, 4)
        assert part.cu_seqlens.tolist() == [s - 32 for s in [*starts, 64] if s >= 32]


def test_batches_depend_on_step_and_seed_alone(folder: Path) -> None:
    assert (batches(folder)[7].tokens == batches(folder)[7].tokens).all()
    assert (batches(folder)[7].tokens != batches(folder, seed=6)[7].tokens).any()


def test_held_out_rows_are_spread_over_the_split(folder: Path) -> None:
    split = Corpus(folder).split("validation")
    rows = held_out(split, 16, 3)
    assert rows.shape == (3, 17)
    assert (rows[0].numpy() == split[0:17]).all()
    assert (rows[-1].numpy() == split[(len(split) - 1) // 16 * 16 - 16 : (len(split) - 1) // 16 * 16 + 1]).all()


# ---- refusals


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a batch of 4000 rows of 16 tokens needs 64017 tokens; there are"):
        batches(folder, batch=4000)
    with pytest.raises(ValueError, match=r"the validation split has \d+ tokens; one row needs 100001"):
        held_out(Corpus(folder).split("validation"), 100_000, 1)
    with pytest.raises(ValueError, match="holds no prepared data; make it with: madkernels train prepare"):
        Corpus(tmp_path)
    with pytest.raises(ValueError, match="is there already; choose another --out"):
        prepare(iter(TEXTS), folder, Bytes())
    with pytest.raises(ValueError, match="1 documents do not make both splits"):
        prepare(iter(TEXTS[:1]), tmp_path / "small", Bytes(), validation=0.2)
    with pytest.raises(ValueError, match=r"validation is 1.0; expected a share"):
        prepare(iter(TEXTS), tmp_path / "small", Bytes(), validation=1.0)
    prepare(iter(TEXTS), tmp_path / "all", Bytes(), validation=0)
    with pytest.raises(ValueError, match="this data has no validation split"):
        Corpus(tmp_path / "all").split("validation")


def test_a_shard_is_read_once_until_it_is_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[Path]()
    monkeypatch.setattr(data, "file_sha256", lambda path: (read.append(path), file_sha256(path))[1])
    corpus = Corpus(folder)
    count = len(corpus.shards())
    for rank in range(2):
        corpus.verify(rank, ranks=2)
    Corpus(folder).verify()
    assert sorted(read) == sorted(folder / shard["file"] for shard in corpus.shards())
    path = folder / "train-00001.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"train-00001\.bin is damaged: its SHA-256 is not the one in manifest\.json"):
        corpus.verify()
    assert len(read) == count + 1


def test_a_shard_that_was_cut_is_told(folder: Path) -> None:
    shard = folder / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train-00001\.bin is not the shard of"):
        Corpus(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 7}))
    with pytest.raises(ValueError, match="is of format 7; this madkernels reads format 1"):
        Corpus(folder)
