"""The face for people and notebooks: a model with its tokenizer, ready to be asked.

Knows nothing about how a model was trained beyond the folder it lies in.
"""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from tqdm import tqdm

from dsjax.checkpoint import read_params
from dsjax.config import Config, MeshConfig, ModelConfig, PrecisionConfig, TrainConfig
from dsjax.errors import InputError, nearest
from dsjax.infer.generate import Generation, generate, prepare
from dsjax.infer.sampler import Sampling
from dsjax.interop import hf, save
from dsjax.interop.chat import ChatTemplate
from dsjax.interop.hf_config import CONFIG_FILE as HUGGING_FACE_FILE
from dsjax.interop.hf_config import exported_config
from dsjax.interop.load import load
from dsjax.interop.published import (
    GENERATION_BYTES,
    GENERATION_FILE,
    Published,
    as_json,
    check_requantize,
    checked_dtype,
    checked_scale_format,
    ending_ids,
    keeps_types,
    scale_format_of,
)
from dsjax.interop.tensor_files import read_small
from dsjax.interop.tokenizer import Tokenizer
from dsjax.meshes import blueprint_rules, mesh_of, move, placed, specs_of
from dsjax.model.transformer import build, merge, split
from dsjax.overrides import override
from dsjax.precision import Quantized
from dsjax.presets import preset
from dsjax.train.stages import stage_of
from dsjax.workdir import CONFIG_FILE, read_run
from sharding import island
from sharding.init import init as init_sharded
from sharding.rules import PRESETS, AxisRules
from sharding.spread import Spread

LARGE_BYTES = 2**26  # from here on a progress bar is shown


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is remembered of the published checkpoint that a model was read from, to hand it back.

    Attributes:
        content: of its `config.json`.
        dtype: "fp8", "bfloat16" or "float32".
        types: the type of each tensor, as safetensors names it.
        scales: of FP8 weights that were made float32.
    """

    content: Mapping[str, Any]
    dtype: save.Dtype
    types: Mapping[str, str]
    scales: Mapping[str, np.ndarray]


class LanguageModel:
    """A model's blueprint, its arrays and its tokenizer.

    Attributes:
        config: what it is.
        graphdef: the blueprint; `dsjax.model.transformer.merge` puts it together with arrays.
        params: nested dicts of weights.
        bias: {stack: [L, E]} balancing biases.
        tokenizer: None for a model that was never given one.
        origin: the published checkpoint that it was read from, or None.
        generation: content of a published `generation_config.json`, also of one that a run began
            with, or None.
    """

    def __init__(
        self,
        config: Config,
        graphdef: nnx.GraphDef,
        params: dict[str, Any],
        bias: dict[str, Any],
        tokenizer: Tokenizer | None,
        origin: Origin | None = None,
        generation: bytes | None = None,
    ):
        self.config = config
        self.graphdef = graphdef
        self.params = params
        self.bias = bias
        self.tokenizer = tokenizer
        self.origin = origin
        self.generation = generation
        self._chat: ChatTemplate | None = None
        rules = blueprint_rules(graphdef)
        # Training cuts rows over devices, and may bound what experts receive; here neither.
        exact = dataclasses.replace(rules.exchange, buffer_factor=None)
        if rules.of("seq") or rules.exchange != exact:
            rules = dataclasses.replace(rules, seq=None, exchange=exact)
            model = jax.eval_shape(build(config, rules), jax.random.key(0))
            graphdef, _, _ = split(model)
        self._spread, self._by_row = Spread(mesh_of(params), rules), graphdef
        self._logits = jax.jit(lambda params, bias, tokens: _logits(graphdef, params, bias, tokens))

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params, is_leaf=_is_quantized)
        count = sum((leaf.q if _is_quantized(leaf) else leaf).size for leaf in leaves)
        return f"LanguageModel({count:,} parameters, vocabulary {self.config.model.vocab_size:,})"

    def logits(
        self, tokens: Sequence[int] | Sequence[Sequence[int]] | Array | np.ndarray
    ) -> Float[Array, "*B T V"]:
        """Scores the next token at every position.

        Args:
            tokens: int ids of shape [T] or [B, T], each sequence from its first position.

        Returns:
            float32 [T, V] or [B, T, V].

        Raises:
            InputError: for ids outside the vocabulary, another shape, or too many positions.
        """
        ids = np.asarray(tokens)
        if ids.ndim not in (1, 2) or ids.size == 0:
            raise InputError(f"tokens must be of shape [T] or [B, T], not {list(ids.shape)}")
        self._check(ids, ids.shape[-1])
        rows, spread = np.atleast_2d(ids).astype(np.int32), self._spread
        filled = np.pad(rows, ((0, -len(rows) % spread.row_devices()), (0, 0)), mode="edge")
        with spread.mesh_set():
            placed = spread({"tokens_BT": filled}, len(filled), whole=True)
            result = self._logits(self.params, self.bias, placed["tokens_BT"])
        if spread.mesh is not None:  # as of one device, for a person to compute with
            result = jnp.asarray(np.asarray(result))[: len(rows)]
        return result[0] if ids.ndim == 1 else result

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Continues a text.

        Args:
            prompt: the text; special tokens typed in it stay text.
            max_tokens: the budget; a shorter answer ends with the end-of-sequence token.
            temperature: 0 takes the best token each time.
            top_p: keeps the smallest set of tokens with this probability.
            seed: of the draws.

        Returns:
            The continuation alone.

        Raises:
            InputError: without a tokenizer, for an empty prompt, a value out of range, or more
                positions than the model has.
        """
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer; use generate_tokens with token ids")
        if not self.tokenizer.encode(prompt):
            raise InputError("the prompt is empty")
        return self._continue(
            self.tokenizer.prompt_ids(prompt),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int = 256,
        temperature: float = 0.6,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> str:
        """Answers a conversation through the model's own chat template.

        Args:
            messages: each with a `role` and its `content`, as of OpenAI's interface, or a text as
                the one message of a user; special tokens typed in them stay text.
            tools: functions that the model may call, where its template knows of them.
            max_tokens: as in `generate`, like the three that follow.
            temperature: see `generate`; R1 recommends 0.6.
            top_p: see `generate`; R1 recommends 0.95.
            seed: see `generate`.

        Returns:
            The answer, reasoning included.

        Raises:
            InputError: without a tokenizer or a chat template, for messages that the template
                refuses, and as `generate`.
        """
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer, so no chat template")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
            raise InputError("messages must be a list of {'role': ..., 'content': ...}, or a text")
        if self._chat is None:
            self._chat = ChatTemplate(self.tokenizer)
        ids = self._chat.encode_chat(
            [dict(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
        )
        return self._continue(
            ids, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
        )

    def _continue(self, ids: list[int], **how: Any) -> str:
        assert self.tokenizer is not None  # the callers have looked
        result = self.generate_tokens([ids], **how)
        count = int(result.length_B[0]) - int(result.stopped_B[0])
        return self.tokenizer.decode(result.tokens_BG[0, :count].tolist())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence: the tokenizer's, and a `generation_config.json`'s."""
        eos_id = None if self.tokenizer is None else self.tokenizer.eos_id
        return ending_ids(eos_id, self.generation, self.config.model.vocab_size)

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> Generation:
        """Continues a batch of token sequences, of any lengths.

        Args:
            prompts: token ids.
            max_tokens: as in `generate`, like the three that follow.
            temperature: see `generate`.
            top_p: see `generate`.
            seed: see `generate`.
            stop_ids: tokens that end a sequence; None takes the model's `stop_ids`.

        Raises:
            InputError: as `generate`, and for ids outside the vocabulary.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p)
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens!r}; it must be a whole number from 1")
        if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
            raise InputError("every prompt needs at least one token")
        _check_seed(seed)
        longest = max(len(prompt) for prompt in prompts) + max_tokens
        for prompt in prompts:
            self._check(np.asarray(prompt), longest)
        if stop_ids is None:
            stop_ids = self.stop_ids
        vocab_size = self.config.model.vocab_size
        return generate(
            self._by_row,
            self.params,
            self.bias,
            [list(map(int, prompt)) for prompt in prompts],
            max_tokens=max_tokens,
            sampling=sampling,
            stop_ids=tuple(stop_ids),
            infer=self.config.infer,
            allowed=vocab_size if self.tokenizer is None else self.tokenizer.vocab_size,
            seed=seed,
        )

    def with_rules(self, rules: AxisRules | str, mesh: Mesh | None = None) -> "LanguageModel":
        """The same model laid out by other rules: each array is moved where they put it.

        Args:
            rules: where each logical axis goes, or the name of a preset.
            mesh: on which; None keeps the mesh that the weights lie on, if any.

        Raises:
            InputError: if a weight's dimension does not divide, naming it and the devices.
        """
        mesh = mesh or mesh_of(self.params)
        rules = _chosen(rules, mesh)
        model = jax.eval_shape(build(self.config, rules), jax.random.key(0))
        graphdef, _, _ = split(model)
        params, bias = move(self.params, self.bias, self.config, rules, mesh)
        return LanguageModel(
            self.config,
            graphdef,
            params,
            bias,
            self.tokenizer,
            self.origin,
            self.generation,
        )

    def save_pretrained(
        self,
        path: str | os.PathLike,
        dtype: str | None = None,
        *,
        scale_format: str | None = None,
        requantize: bool = False,
        wide: Literal["bfloat16", "float32"] = "bfloat16",
        shard_bytes: int = save.SHARD_BYTES,
        identity: str | None = None,
    ) -> None:
        """Writes a folder that transformers' `from_pretrained`, and `load_pretrained`, read.

        The folder appears whole or not at all. Weights that were read from a published checkpoint
        and not changed are written as they were, bit for bit, in the types that they came in.

        Args:
            path: the folder, which must not exist or be empty.
            dtype: "bfloat16", "float32", or "fp8" as DeepSeek-V3 is published. None keeps each
                tensor's type; it is "bfloat16" for a model that was read from no checkpoint.
            scale_format: of FP8's scales: "float32", "power_of_two" or "e8m0" (V3.1's); None takes
                those of the checkpoint that the model was read from, or of the recipe that it was
                trained with (`precision.scale`).
            requantize: makes FP8 of weights that BF16 has rounded, too.
            wide: what is not in FP8 beside it: "bfloat16" as published, or "float32", so that a
                model trained with `precision.recipe=fp8` gives the same logits when it is read
                again with that recipe.
            shard_bytes: the most that a file of tensors holds.
            identity: of what is written; a call that was ended is taken up by one of the same.

        Raises:
            InputError: if the path is in the way, no published architecture computes the model, or
                FP8 would be made of rounded weights.
            RunError: if the disk refuses.
        """
        save.check_target(path)
        wanted = None if dtype is None else checked_dtype(dtype)
        if wide != "bfloat16" and wanted != "fp8":
            raise InputError(f"wide={wide!r} is of what lies beside FP8; it goes with dtype='fp8'")
        written = wanted or ("bfloat16" if self.origin is None else self.origin.dtype)
        asked = checked_scale_format(scale_format)
        kept: save.Dtype = _kept_in(self.params)
        if kept == "float32" and self.origin is not None and self.origin.dtype == "bfloat16":
            kept = "bfloat16"  # its numbers are still those that BF16 has left
        check_requantize(kept, written, requantize)
        model, origin = self.config.model, self.origin
        content = {} if origin is None else origin.content
        types = {} if origin is None else origin.types
        trained = self.config.precision.scale if origin is None else None
        chosen = asked or trained or scale_format_of(content, types)
        same = origin is not None and keeps_types(origin.dtype, wanted)
        plan = save.specs(
            model,
            written,
            scale_format=chosen,
            stored=types if same else None,
            keep_scales=asked is None,
            wide=wide,
        )
        scales = {} if origin is None else origin.scales
        export = save.Export(
            model,
            save.ParamsSource(model, self.params, self.bias, scales),
            plan,
            scale_format=chosen,
            asked=asked,
            requantize=requantize,
        )
        config = exported_config(
            model, written, chosen, content or None, as_stored=same and asked is None
        )
        files = {} if self.generation is None else {GENERATION_FILE: self.generation}
        if self.tokenizer is not None:
            config = _token_ids(self.tokenizer) | config
            files |= _tokenizer_files(self.tokenizer)
        with _bar("writing", sum(spec.num_bytes for spec in plan.values())) as bar:
            save.write_folder(
                path,
                plan,
                export.pieces,
                {**files, HUGGING_FACE_FILE: as_json(config)},
                identity=identity,
                shard_bytes=shard_bytes,
                on_bytes=bar.update,
            )

    def _check(self, ids: np.ndarray, positions: int) -> None:
        leaves = jax.tree.leaves(self.params, is_leaf=_is_quantized)
        if self._spread.mesh is not None and any(map(_is_cut, leaves)):
            raise InputError(
                "weights kept in FP8 can be computed with where experts alone are laid over "
                "devices; load them as bfloat16 or float32, or with other rules"
            )
        vocab_size, most = self.config.model.vocab_size, self.config.model.max_positions
        if not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"tokens must be integers, not {ids.dtype}")
        if ids.min() < 0 or ids.max() >= vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(f"token {wrong} is outside the vocabulary of {vocab_size}")
        if positions > most:
            raise InputError(f"{positions} positions; the model has {most} (model.max_positions)")


def _check_seed(seed: int) -> None:
    """JAX takes other numbers, too, but drops their high bits."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed!r}; it must be a whole number in [0, 2**32)")


def _logits(graphdef, params, bias, tokens_BT):
    def local(params, bias, tokens_BT):
        model = merge(graphdef, params, bias)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        segments_BT = jnp.ones_like(tokens_BT)
        output = model(tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT)
        return model.logits(output.hidden_BTD)

    by_row = PartitionSpec(blueprint_rules(graphdef).of("batch") or None)
    return island.run(local, by_row, params, bias, tokens_BT)


def init(config: str | Config, seed: int = 0) -> LanguageModel:
    """Makes a model with random parameters and no tokenizer.

    Args:
        config: a preset's name, or a configuration.
        seed: of the parameters.

    Raises:
        InputError: for an unknown preset, with the nearest name, and for a seed out of range.
    """
    _check_seed(seed)
    config = preset(config) if isinstance(config, str) else config
    rules = AxisRules()
    graphdef, params, bias = split(init_sharded(build(config, rules), jax.random.key(seed), rules))
    return LanguageModel(config, graphdef, params, bias, None)


def load_pretrained(
    path: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: str | None = None,
    ema: bool = False,
    overrides: Sequence[str] = (),
    mesh: Mesh | None = None,
    rules: AxisRules | str | None = None,
    ignore: Sequence[str] = (),
) -> LanguageModel:
    """Loads the model of a training run, or a published one from a Hugging Face folder.

    Of a run it takes the rope of the stage that its weights come from. A published folder is one
    of deepseek_v2, deepseek_v3, qwen2 or llama, in safetensors; its weights are read from mapped
    files straight into sharded arrays, each process what its devices hold.

    Args:
        path: the folder.
        step: which checkpoint of a run; None takes the newest.
        dtype: to keep and to use the weights in. Of a run: "float32" or "bfloat16"; None takes the
            run's. Of a published folder: "float32", "bfloat16", or "fp8", which keeps FP8 weights
            as they are; None takes that of the files.
        ema: the moving average of a run's weights in their stead.
        overrides: `path=value` overrides of the configuration; `precision.recipe=fp8` computes as
            training in FP8 does.
        mesh: devices (`sharding.mesh.make_mesh`); None takes the first one.
        rules: where each logical axis goes on the mesh, or the name of a preset of them
            (`sharding.rules.PRESETS`); None takes "decode".
        ignore: unknown fields of `config.json` that change nothing.

    Raises:
        InputError: if the folder is neither, has no such checkpoint, keeps no average, or its files
            are not those of the model that it describes.
    """
    folder = Path(path)
    rules = _chosen(rules, mesh)
    if (folder / CONFIG_FILE).is_file():
        if ignore:
            raise InputError(f"{folder} is a run; `ignore` is for published folders")
        return _load_run(folder, step, dtype, ema, overrides, mesh, rules)
    if (folder / HUGGING_FACE_FILE).is_file():
        if step is not None or ema:
            raise InputError(f"{folder} is a published folder; it has no steps and no average")
        return _load_published(folder, dtype, overrides, mesh, rules, ignore)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; nothing is downloaded here")
    raise InputError(f"{folder} holds neither {CONFIG_FILE} (a run) nor {HUGGING_FACE_FILE}")


def _chosen(rules: AxisRules | str | None, mesh: Mesh | None) -> AxisRules:
    """The rules that a person means."""
    if mesh is None:
        if isinstance(rules, str) and rules != "single":
            raise InputError(f"rules={rules!r} lay a model out over a mesh; mesh= is missing")
        return AxisRules() if rules is None or isinstance(rules, str) else rules
    if set(mesh.axis_names) != set(MeshConfig().axes):
        raise InputError(
            f"the mesh has the axes {', '.join(mesh.axis_names)}; make it by "
            "sharding.mesh.make_mesh, which gives it all six"
        )
    if isinstance(rules, str) and rules not in PRESETS:
        raise InputError(f"unknown rules {rules!r}{nearest(rules, PRESETS)}")
    return PRESETS[rules or "decode"] if rules is None or isinstance(rules, str) else rules


def _load_run(
    folder: Path,
    step: int | None,
    dtype: str | None,
    ema: bool,
    overrides: Sequence[str],
    mesh: Mesh | None,
    rules: AxisRules,
) -> LanguageModel:
    config = override(read_run(folder).config, *overrides)
    if ema and config.train.ema_decay is None:
        raise InputError(f"{folder} keeps no average of the weights (train.ema_decay is null)")
    _, params, bias = split(jax.eval_shape(build(config), jax.random.key(0)))
    params, bias = placed(params, bias, config, rules, mesh)
    if ema:
        average = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), params
        )
        state, step = read_params(folder, {"extra": {"ema": average}, "bias": bias}, step)
        params, bias = state["extra"]["ema"], state["bias"]
    else:
        state, step = read_params(folder, {"params": params, "bias": bias}, step)
        params, bias = state["params"], state["bias"]
    model = stage_of(config, step).config.model
    config = dataclasses.replace(config, model=model)
    if dtype is not None:
        config = override(config, f"precision.compute_dtype={dtype}")
        params, bias = prepare(params, bias, jnp.dtype(dtype))
    graphdef, _, _ = split(jax.eval_shape(build(config, rules), jax.random.key(0)))
    words = folder / "tokenizer"
    generation = read_small(words, GENERATION_FILE, GENERATION_BYTES)
    return LanguageModel(config, graphdef, params, bias, Tokenizer.load(words), None, generation)


def _load_published(
    folder: Path,
    dtype: str | None,
    overrides: Sequence[str],
    mesh: Mesh | None,
    rules: AxisRules,
    ignore: Sequence[str],
) -> LanguageModel:
    with Published(folder, ignore) as published:
        as_stored = dtype in (None, "fp8")
        dtype = checked_dtype(dtype or published.dtype)
        if dtype == "fp8" and published.dtype != "fp8":
            raise InputError(f"{folder} holds no FP8 weights; its dtype is {published.dtype}")
        config = override(_config_of(published, dtype), *overrides)
        _check_part_of(published, config.model)
        if mesh is not None:
            specs_of(config, rules, dict(mesh.shape))  # refuses what cannot be laid out, unread
        files = published.small_files()
        tokenizer = Tokenizer.load(folder) if "tokenizer.json" in files else None
        total = sum(info.stop - info.start for info in published.folder.infos.values())
        with _bar("reading", total) as bar:
            loaded = load(
                published.folder,
                config,
                resident=dtype == "fp8",
                as_stored=as_stored,
                rules=rules,
                mesh=mesh,
                on_bytes=bar.update,
            )
        origin = Origin(
            published.content,
            published.dtype,
            published.types,
            loaded.scales,
        )
    graphdef, _, _ = split(jax.eval_shape(build(config, rules), jax.random.key(0)))
    generation = files.get(GENERATION_FILE)
    return LanguageModel(
        config, graphdef, loaded.params, loaded.bias, tokenizer, origin, generation
    )


def _config_of(published: Published, dtype: str) -> Config:
    """A configuration around a published model, which says nothing about training."""
    model = published.model
    # Weights of float16 would lose in BF16 what they have.
    wide = dtype == "float32" or not {"BF16", "F8_E4M3"} & set(published.types.values())
    kept = "float32" if wide else "bfloat16"
    # As training in FP8 (`precision.recipe=fp8`, an override) would round activations, too.
    format_ = scale_format_of(published.content, published.types)
    scale = "float32" if format_ == "float32" else "power_of_two"
    return Config(
        model=model,
        train=TrainConfig(
            seq_len=min(4096, model.max_positions), batch_size=1, total_tokens=1_000_000
        ),
        precision=PrecisionConfig(param_dtype=kept, compute_dtype=kept, scale=scale),
    )


def _check_part_of(published: Published, model: ModelConfig) -> None:
    """Refuses a model, after overrides, that needs other tensors than the folder's."""
    infos = published.folder.infos
    for entry in hf.entries(model):
        if entry.name not in infos or infos[entry.name].shape != entry.shape:
            there = list(infos[entry.name].shape) if entry.name in infos else "missing"
            raise InputError(
                f"{published.path}: tensor {entry.name} is {there}, but the overrides ask for "
                f"{list(entry.shape)}"
            )


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _is_cut(leaf: Any) -> bool:
    """Whether a device has a part of a matrix in FP8, whose scales are of the whole."""
    if not isinstance(leaf, Quantized) or not isinstance(leaf.q.sharding, NamedSharding):
        return False
    return any(leaf.q.sharding.spec[leaf.scale.ndim - 2 :])


def _kept_in(params: dict[str, Any]) -> save.Dtype:
    """What precision a model's weights have left."""
    leaves = jax.tree.leaves(params, is_leaf=_is_quantized)
    if any(map(_is_quantized, leaves)):
        return "fp8"
    return "bfloat16" if any(leaf.dtype == jnp.bfloat16 for leaf in leaves) else "float32"


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _bar(what: str, total: int) -> tqdm:
    """A progress bar over bytes, shown where the wait is long."""
    hidden = True if total < LARGE_BYTES else None  # None: where stderr is no terminal
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=hidden)
