"""The face for people and notebooks: a model with its tokenizer, ready to be asked.

Knows nothing about how a model was trained beyond the folder it lies in.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dsjax.checkpoint import read_params
from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.infer.generate import Generation, generate, prepare
from dsjax.infer.sampler import Sampling
from dsjax.interop.tokenizer import Tokenizer
from dsjax.model.transformer import build, merge, split
from dsjax.overrides import override
from dsjax.presets import preset
from dsjax.train.stages import stage_of
from dsjax.workdir import CONFIG_FILE, read_run
from sharding.init import init as init_sharded
from sharding.rules import AxisRules

HUGGING_FACE_FILE = "config.json"


class LanguageModel:
    """A model's blueprint, its arrays and its tokenizer.

    Attributes:
        config: what it is.
        graphdef: the blueprint; `dsjax.model.transformer.merge` puts it together with arrays.
        params: nested dicts of weights.
        bias: {stack: [L, E]} balancing biases.
        tokenizer: None for a model that was never given one.
    """

    def __init__(
        self,
        config: Config,
        graphdef: nnx.GraphDef,
        params: dict[str, Any],
        bias: dict[str, Any],
        tokenizer: Tokenizer | None,
    ):
        self.config = config
        self.graphdef = graphdef
        self.params = params
        self.bias = bias
        self.tokenizer = tokenizer
        self._logits = jax.jit(lambda params, bias, tokens: _logits(graphdef, params, bias, tokens))

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
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
        result = self._logits(self.params, self.bias, np.atleast_2d(ids).astype(np.int32))
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
        if not (ids := self.tokenizer.encode(prompt)):
            raise InputError("the prompt is empty")
        result = self.generate_tokens(
            [ids], max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        count = int(result.length_B[0]) - int(result.stopped_B[0])
        return self.tokenizer.decode(result.tokens_BG[0, :count].tolist())

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
            stop_ids: tokens that end a sequence; None takes the tokenizer's end of sequence.

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
            stop_ids = () if self.tokenizer is None else (self.tokenizer.eos_id,)
        vocab_size = self.config.model.vocab_size
        return generate(
            self.graphdef,
            self.params,
            self.bias,
            [list(map(int, prompt)) for prompt in prompts],
            max_tokens=max_tokens,
            sampling=sampling,
            stop_ids=tuple(stop_ids),
            allowed=vocab_size if self.tokenizer is None else self.tokenizer.vocab_size,
            seed=seed,
        )

    def with_rules(self, rules: AxisRules) -> "LanguageModel":
        """The same arrays under another blueprint, whose activations follow `rules`."""
        model = jax.eval_shape(build(self.config, rules), jax.random.key(0))
        graphdef, _, _ = split(model)
        return LanguageModel(self.config, graphdef, self.params, self.bias, self.tokenizer)

    def _check(self, ids: np.ndarray, positions: int) -> None:
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
    model = merge(graphdef, params, bias)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    segments_BT = jnp.ones_like(tokens_BT)
    output = model(tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT)
    return model.logits(output.hidden_BTD)


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
) -> LanguageModel:
    """Loads the model of a training run, with the rope of the stage that its weights come from.

    Args:
        path: the run's folder.
        step: which checkpoint; None takes the newest.
        dtype: "float32" or "bfloat16", to keep and to use the weights in; None takes the run's.
        ema: the moving average of the weights in their stead.
        overrides: `path=value` overrides of the run's configuration.

    Raises:
        InputError: if the folder is no run, has no such checkpoint, or keeps no average.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file():
        if (folder / HUGGING_FACE_FILE).is_file():
            raise InputError(f"{folder} is a Hugging Face folder; this version reads none yet")
        raise InputError(f"{folder} holds neither {CONFIG_FILE} (a run) nor {HUGGING_FACE_FILE}")
    config = override(read_run(folder).config, *overrides)
    if ema and config.train.ema_decay is None:
        raise InputError(f"{folder} keeps no average of the weights (train.ema_decay is null)")
    _, params, bias = split(jax.eval_shape(build(config), jax.random.key(0)))
    if ema:
        average = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params)
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
    graphdef, _, _ = split(jax.eval_shape(build(config), jax.random.key(0)))
    return LanguageModel(config, graphdef, params, bias, Tokenizer.load(folder / "tokenizer"))
