"""A published folder as a whole: configuration, tensors and the small files beside them.

Opens one for reading, and converts one into another, tensor by tensor, without building a model.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dsjax.config import ModelConfig
from dsjax.errors import InputError
from dsjax.interop import fp8, hf, save
from dsjax.interop.gguf import read_gguf
from dsjax.interop.hf_config import CONFIG_FILE, exported_config, model_config, read_config
from dsjax.interop.load import check_tensors, present
from dsjax.interop.tensor_files import TensorFolder, TensorSpec, read_small

GENERATION_FILE, GENERATION_BYTES = "generation_config.json", 1_000_000
# Handed on as they are: how text becomes tokens and a conversation text, and how to sample.
PASSED_ON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    GENERATION_FILE,
)
_MOST_BYTES = 100_000_000  # of a small file


def is_published(path: str | os.PathLike) -> bool:
    """Whether a folder is one of Hugging Face's: has a `config.json`."""
    return os.path.isfile(os.path.join(path, CONFIG_FILE))


def also_ending(content: bytes | None, token_id: int) -> bytes:
    """A `generation_config.json`, or a new one, with one more token that ends a sequence.

    Raises:
        InputError: if it is malformed.
    """
    settings, ends = _settings(content)
    return as_json(settings | {"eos_token_id": list(dict.fromkeys([*ends, token_id]))})


def ending_ids(eos_id: int | None, content: bytes | None, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end a sequence: the tokenizer's, and those of a `generation_config.json`.

    Llama-3's chat models end their turn with another token than their text.

    Args:
        eos_id: the tokenizer's; None without one.
        content: of the file, or None.
        vocab_size: ids from here on are none.

    Raises:
        InputError: if the file is malformed.
    """
    found = [] if eos_id is None else [eos_id]
    _, ends = _settings(content)
    found += [end for end in ends if type(end) is int and 0 <= end < vocab_size]
    return tuple(dict.fromkeys(found))


def _settings(content: bytes | None) -> tuple[dict[str, Any], list[Any]]:
    """What a `generation_config.json` says, and the end tokens among it."""
    try:
        settings = {} if content is None else json.loads(content)
        ends = settings.get("eos_token_id")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{GENERATION_FILE} is malformed: {error}") from error
    return settings, ends if isinstance(ends, list) else [] if ends is None else [ends]


class Published:
    """A Hugging Face folder that was found to hold exactly the tensors of a model.

    Attributes:
        folder: its tensors.
        content: of its `config.json`.
        model: what that describes, without MTP if its tensors are not there.
        dtype: "fp8" if any weight is, "float32" if all are, else "bfloat16" (or float16).
        types: the type of each tensor.
    """

    def __init__(self, path: str | os.PathLike, ignore: Sequence[str] = ()):
        """Reads and checks everything but the weights.

        Args:
            path: the folder.
            ignore: unknown fields of `config.json` that change nothing.

        Raises:
            InputError: naming the file, and the field or tensor.
        """
        self.path = Path(path)
        self.content = read_config(self.path)
        described = model_config(self.content, str(self.path / CONFIG_FILE), ignore)
        self.folder = TensorFolder.open(self.path)
        try:
            self.model = present(described, self.folder.infos)
            check_tensors(self.model, self.folder)
        except BaseException:
            self.folder.close()
            raise
        self.types = {name: info.dtype for name, info in self.folder.infos.items()}
        kinds = {self.types[e.name] for e in hf.entries(self.model) if e.kind != "f32"}
        self.dtype: save.Dtype = "bfloat16"
        if "F8_E4M3" in kinds:
            self.dtype = "fp8"
        elif kinds == {"F32"}:
            self.dtype = "float32"

    def __enter__(self) -> "Published":
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()

    def small_files(self) -> dict[str, bytes]:
        """The files beside configuration and tensors that are handed on."""
        found = {name: read_small(self.path, name, _MOST_BYTES) for name in PASSED_ON}
        return {name: content for name, content in found.items() if content is not None}

    def tensors(self) -> save.Source:
        """Its tensors, for `convert`."""
        return save.FolderSource(self.folder)

    def identity(self) -> dict[str, Any]:
        """What tells this folder from another, or from an earlier state of it."""
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.folder.files]
        config = hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()
        return {"path": os.path.realpath(self.path), "files": files, "config": config}


def fingerprint(identity: Mapping[str, Any]) -> str:
    """What is left of an identity where a short text must do."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def scale_format_of(content: Mapping[str, Any], types: Mapping[str, str]) -> fp8.ScaleFormat:
    """How a checkpoint keeps its scales, from its `config.json` and its tensors' types."""
    if "F8_E8M0" in types.values():
        return "e8m0"
    named = (content.get("quantization_config") or {}).get("scale_fmt")
    return "power_of_two" if named == "ue8m0" else "float32"


def check_requantize(source: save.Dtype, dtype: save.Dtype, requantize: bool) -> None:
    """Refuses to make FP8 of weights that BF16 has rounded, unless that is what is wanted.

    Raises:
        InputError: saying so.
    """
    if dtype == "fp8" and source == "bfloat16" and not requantize:
        raise InputError(
            "the weights are of 16 bits; FP8 made of them differs from FP8 made of the weights "
            "they were rounded from (scales drift by up to 0.3%); to do it all the same, "
            "requantize (--requantize)"
        )


def keeps_types(origin: save.Dtype, dtype: save.Dtype | None) -> bool:
    """Whether an export keeps the type of each tensor: where none was asked for, and of FP8."""
    return dtype is None or (dtype == "fp8" and origin == "fp8")


def checked_dtype(dtype: str) -> save.Dtype:
    """The name of a dtype, known to be one that exports are written in.

    Raises:
        InputError: naming those that are.
    """
    for known in save.DTYPES:
        if dtype == known:
            return known
    raise InputError(f"dtype is '{dtype}'; known: {', '.join(save.DTYPES)}")


def checked_scale_format(scale_format: str | None) -> fp8.ScaleFormat | None:
    """The name of a format of scales, or None.

    Raises:
        InputError: for another one.
    """
    for known in fp8.SCALE_FORMATS:
        if scale_format == known:
            return known
    if scale_format is None:
        return None
    raise InputError(f"scale format is '{scale_format}'; known: {', '.join(fp8.SCALE_FORMATS)}")


@runtime_checkable
class Convertible(Protocol):
    """A checkpoint that can be written in another dtype: `Published`, or `GgufFile`."""

    content: dict[str, Any]
    model: ModelConfig
    dtype: save.Dtype
    types: dict[str, str]

    def tensors(self) -> save.Source:
        """Its tensors."""
        ...

    def small_files(self) -> dict[str, bytes]:
        """Its files beside them."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells it from another."""
        ...


class GgufFile:
    """A GGUF file; see `Convertible`. Its tensors are dequantised to float32, one at a time."""

    def __init__(self, path: str | os.PathLike):
        """Reads all but the tensors.

        Raises:
            InputError: as `read_gguf`.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path} is no file")
        self._gguf = read_gguf(path)
        self.content = self._gguf.config
        self.model = model_config(self.content, str(path))
        self.dtype: save.Dtype = "float32"
        self.types: dict[str, str] = {}
        self._last: tuple[str, np.ndarray] = "", np.zeros(0, np.float32)
        for entry in hf.entries(self.model):
            shape = self._gguf.tensors.shapes.get(entry.name)
            if shape != entry.shape:
                found = "missing" if shape is None else f"of shape {list(shape)}"
                raise InputError(f"{path}: tensor {entry.name} is {found}")

    def tensors(self) -> "GgufFile":
        """See `Convertible`: it is its own source."""
        return self

    def small_files(self) -> dict[str, bytes]:
        """See `Convertible`."""
        return self._gguf.files

    def identity(self) -> dict[str, Any]:
        """See `Convertible`."""
        status = self.path.stat()
        return {"path": os.path.realpath(self.path), "files": [status.st_size, status.st_mtime_ns]}

    def kept_as(self, name: str) -> str:
        """See `save.Source`."""
        return "F32"

    def scale(self, name: str) -> None:
        """See `save.Source`."""
        return

    def rows(self, entry: hf.Entry, first: int, last: int) -> np.ndarray:
        """See `save.Source`."""
        if self._last[0] != entry.name:
            self._last = entry.name, self._gguf.tensors[entry.name]
        return self._last[1][first:last]


def convert(
    source: Convertible,
    target: str | os.PathLike,
    dtype: save.Dtype | None = None,
    *,
    scale_format: fp8.ScaleFormat | None = None,
    requantize: bool = False,
    shard_bytes: int = save.SHARD_BYTES,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes a checkpoint's tensors in another dtype, a piece at a time, without building a model.

    It can be ended at any moment; the same call goes on.

    Args:
        source: the checkpoint to read.
        target: the folder to write, which must not exist or be empty.
        dtype: of the tensors; None keeps the type of each.
        scale_format: of FP8's scales; None takes the source's, or float32.
        requantize: rounds to FP8 what was rounded before.
        shard_bytes: the most that a file holds.
        on_bytes: told of bytes written.

    Raises:
        InputError: if the target is in the way, or FP8 would be made of rounded weights.
        RunError: if the disk refuses; the same call goes on.
    """
    check_requantize(source.dtype, dtype or source.dtype, requantize)
    chosen, plan = _plan(source, dtype, scale_format)
    export = save.Export(
        source.model,
        source.tensors(),
        plan,
        scale_format=chosen,
        asked=scale_format,
        requantize=requantize,
    )
    content = exported_config(
        source.model,
        dtype or source.dtype,
        chosen,
        source.content,
        as_stored=keeps_types(source.dtype, dtype) and scale_format is None,
    )
    identity = {
        **source.identity(),
        "dtype": dtype,
        "scale_format": chosen,
        "requantize": requantize,
        "shard_bytes": shard_bytes,
    }
    save.write_folder(
        target,
        plan,
        export.pieces,
        {**source.small_files(), CONFIG_FILE: as_json(content)},
        identity=fingerprint(identity),
        shard_bytes=shard_bytes,
        on_bytes=on_bytes,
    )


def _plan(
    source: Convertible, dtype: save.Dtype | None, scale_format: fp8.ScaleFormat | None
) -> tuple[fp8.ScaleFormat, dict[str, TensorSpec]]:
    chosen = scale_format or scale_format_of(source.content, source.types)
    plan = save.specs(
        source.model,
        dtype or source.dtype,
        scale_format=chosen,
        stored=source.types if keeps_types(source.dtype, dtype) else None,
        keep_scales=scale_format is None,
    )
    return chosen, plan


def num_bytes(
    source: Convertible, dtype: save.Dtype | None, scale_format: fp8.ScaleFormat | None
) -> int:
    """Bytes of tensors that `convert` writes."""
    return sum(spec.num_bytes for spec in _plan(source, dtype, scale_format)[1].values())


def as_json(content: Mapping[str, Any]) -> bytes:
    """A file's content."""
    return (json.dumps(content, indent=2) + "\n").encode()


def planned(
    model: ModelConfig, dtype: save.Dtype, scale_format: fp8.ScaleFormat = "float32"
) -> dict[str, dict[str, Any]]:
    """What an export would write: {name: {"shape": [...], "dtype": ...}}, with no weights."""
    plan = save.specs(model, dtype, scale_format=scale_format)
    return {name: {"shape": list(spec.shape), "dtype": spec.dtype} for name, spec in plan.items()}
