"""Continues many prompts through a fixed number of slots: a finished sequence's takes the next one.

Knows nothing about text, rewards or HTTP. Shapes never change, so that a handful of programs serves
a run: prompts go in at up to three widths, steps are taken with all slots, half or a quarter.

N sequences, G new tokens at most, Y = prompt and new tokens, L layers, K experts a token.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import InferConfig
from dsjax.errors import InputError
from dsjax.infer import slots as programs
from dsjax.infer.generate import prepare
from dsjax.infer.sampler import Sampling
from dsjax.infer.slots import Drawing, Slots, SlotSizes
from dsjax.meshes import blueprint_rules
from dsjax.model.transformer import merge
from sharding.spread import Spread

REFILL_SHARE = 8  # steps go on until so large a part of the slots is free, if others wait


@dataclasses.dataclass(frozen=True)
class Request:
    """A sequence to be.

    Attributes:
        prompt: token ids; equal prompts that come one after the other are run once.
        number: decides, with the seed, what is drawn.
    """

    prompt: tuple[int, ...]
    number: int


@dataclasses.dataclass(frozen=True)
class Continued:
    """What became of requests, in their order.

    Attributes:
        tokens_NG: int32 new tokens; past a sequence's end they mean nothing.
        log_probs_NG: float32 log probability of each, after temperature and truncation.
        count_N: int32 new tokens of each, its stop token included.
        stopped_N: whether a stop token ended it, else its budget did.
        routing: {stack: uint16 [N, Y, L, K]} experts of each position that a layer has seen, which
            the last new token's is not; empty if they are not kept.
    """

    tokens_NG: np.ndarray
    log_probs_NG: np.ndarray
    count_N: np.ndarray
    stopped_N: np.ndarray
    routing: dict[str, np.ndarray]


class Batcher:
    """Slots on the devices of a model, and the programs that fill and run them.

    Attributes:
        sizes: what decides the shapes.
        num_slots: on all devices together.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        bias: Any,
        *,
        sizes: SlotSizes,
        drawing: Drawing,
        seed: int,
        spread: Spread = Spread(),  # noqa: B008
        infer: InferConfig | None = None,
    ):
        """Takes all memory that it will ever need.

        Args:
            graphdef: the model's blueprint, with rules that do not cut rows.
            params: weights as those of every call will lie.
            bias: balancing biases.
            sizes: of the slots of each device.
            drawing: how tokens are drawn.
            seed: of all draws.
            spread: the model's devices.
            infer: how the cache is kept and filled; None for the defaults.

        Raises:
            InputError: for sizes that the model has no positions for.
        """
        config = merge(graphdef, params, bias).config
        if min(sizes.slots, sizes.max_prompt, sizes.max_tokens) < 1:
            raise InputError(f"{sizes} has nothing to do")
        if sizes.positions > config.max_positions:
            raise InputError(
                f"prompts of {sizes.max_prompt} tokens and {sizes.max_tokens} new ones are more "
                f"than the model's {config.max_positions} positions"
            )
        self.sizes, self._graphdef, self._drawing = sizes, graphdef, drawing
        self._spread, self._key = spread, jax.random.key(seed)
        self._infer = infer = infer or InferConfig()
        self._parts = Spread(spread.mesh, blueprint_rules(graphdef)).row_devices()
        self.num_slots = self._parts * sizes.slots
        self._by_row = Spread(spread.mesh, blueprint_rules(graphdef), spread.processes)
        with spread.mesh_set():
            slots = programs.empty(graphdef, params, bias, sizes=sizes, infer=infer)
        # Committed to their devices as those that a program returns, or it is compiled twice.
        self._slots: Slots | None = jax.device_put(slots, jax.tree.map(lambda x: x.sharding, slots))

    def prepare(self, params: Any, bias: Any) -> tuple[Any, Any]:
        """Weights as a call takes them; what needs no cast is shared."""
        precision = merge(self._graphdef, params, bias).precision
        with self._spread.mesh_set():
            return prepare(params, bias, precision.compute_dtype, recipe=precision.recipe)

    def __call__(
        self,
        params: Any,
        bias: Any,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        on_finished: Callable[[int], object] = lambda count: None,
        max_tokens: int | None = None,
    ) -> Continued:
        """Continues every request.

        Args:
            params: weights, prepared.
            bias: balancing biases.
            requests: in the order in which they begin.
            sampling: how tokens are drawn.
            on_finished: told how many more have ended.
            max_tokens: fewer new tokens than the slots have room for.

        Raises:
            InputError: for a prompt that is empty or longer than the slots have room for, or more
                new tokens than that.
        """
        if max_tokens is None:
            max_tokens = self.sizes.max_tokens
        if not 0 < max_tokens <= self.sizes.max_tokens:
            raise InputError(f"max_tokens={max_tokens}; there is room for {self.sizes.max_tokens}")
        for request in requests:
            if not 0 < len(request.prompt) <= self.sizes.max_prompt:
                raise InputError(
                    f"a prompt of {len(request.prompt)} tokens; from 1 to {self.sizes.max_prompt} "
                    "are taken"
                )
        call = _Call(self, params, bias, requests, sampling, max_tokens)
        with self._spread.mesh_set():
            while call.step():
                on_finished(call.collect())
        return call.found

    def _admit(self, params: Any, bias: Any, newcomers: dict, draws: tuple) -> None:
        slots, self._slots = self._slots, None  # donated
        self._slots = programs.admit(
            *(self._graphdef, params, bias, slots, self._placed(newcomers), self._key, *draws),
            drawing=self._drawing,
            infer=self._infer,
        )

    def _run(self, params: Any, bias: Any, slot_W: np.ndarray, leave_at: int, draws: tuple) -> None:
        slots, self._slots = self._slots, None  # donated
        slot_W = self._placed({"slot_W": slot_W})["slot_W"]
        self._slots = programs.run(
            *(self._graphdef, params, bias, slots, slot_W, np.int32(leave_at), self._key, *draws),
            drawing=self._drawing,
        )

    def _placed(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Arrays [devices * n, ...], each device its part."""
        return {
            name: self._by_row({name: value}, len(value), whole=True)[name]
            for name, value in arrays.items()
        }

    def _prompt_width(self, longest: int) -> int:
        """The narrowest of the widths that prompts go in at."""
        widths = {-(-self.sizes.max_prompt // (16 * n)) * 16 for n in (1, 2, 4)}
        return min(min(width, self.sizes.max_prompt) for width in widths if width >= longest)


class _Call:
    """The requests of one call, on their way."""

    def __init__(self, batcher, params, bias, requests, sampling, max_tokens):
        self.batcher, self.params, self.bias = batcher, params, bias
        self.requests, self.waiting = requests, collections.deque(range(len(requests)))
        self.draws = np.float32(sampling.temperature), np.float32(sampling.top_p)
        self.max_tokens = max_tokens
        sizes, count = batcher.sizes, len(requests)
        self.owner = np.full((batcher._parts, sizes.slots), -1)  # request in each slot
        self.running = np.zeros(self.owner.shape, bool)
        shapes = {name: (x.shape[1:], x.dtype) for name, x in (batcher._slots.routing).items()}
        self.found = Continued(
            tokens_NG=np.zeros((count, sizes.max_tokens), np.int32),
            log_probs_NG=np.zeros((count, sizes.max_tokens), np.float32),
            count_N=np.zeros(count, np.int32),
            stopped_N=np.zeros(count, bool),
            routing={n: np.zeros((count, *shape), t) for n, (shape, t) in shapes.items()},
        )

    def step(self) -> bool:
        """Fills free slots and runs until some are free again; False when nothing is left."""
        while self.waiting and (self.owner < 0).any():
            self._admit()
        if not (self.owner >= 0).any():
            return False
        slots = self.batcher.sizes.slots
        busiest = int(self.running.sum(axis=1).max())
        if busiest:
            width = next(w for w in _widths(slots) if w >= busiest)
            if self.waiting:
                leave_at = busiest - max(1, slots // REFILL_SHARE)
            else:  # until fewer slots do
                leave_at = max((w for w in _widths(slots) if w < busiest), default=0)
            # Running ones first; the sort is stable, so that all slots are in their order.
            slot_DW = np.argsort(~self.running, axis=1, kind="stable")[:, :width]
            self.batcher._run(
                *(self.params, self.bias, slot_DW.reshape(-1).astype(np.int32)),
                *(max(leave_at, 0), self.draws),
            )
        return True

    def collect(self) -> int:
        """Takes finished sequences out of their slots; returns how many."""
        slots = self.batcher._slots
        self.running = _fetch(slots.running_S).reshape(self.owner.shape)
        over = (self.owner >= 0) & ~self.running
        if not over.any():
            return 0
        at, of = over.reshape(-1), self.owner[over]
        found = self.found
        found.tokens_NG[of] = _fetch(slots.tokens_SG)[at]
        found.log_probs_NG[of] = _fetch(slots.log_probs_SG)[at]
        found.count_N[of] = _fetch(slots.count_S)[at]
        found.stopped_N[of] = _fetch(slots.stopped_S)[at]
        for name, kept in slots.routing.items():
            found.routing[name][of] = _fetch(kept)[at]
        self.owner[over] = -1
        return len(of)

    def _admit(self) -> None:
        """Puts requests into free slots, as many as one call of the program takes.

        Sequences of one prompt follow each other, and go to one device as long as it has room.
        """
        sizes, parts = self.batcher.sizes, len(self.owner)
        first = not (self.owner >= 0).any()
        width = sizes.slots if first else max(1, sizes.slots // REFILL_SHARE)
        each = min(width, -(-len(self.waiting) // parts))
        chosen = [self._choose(part, each) for part in range(parts)]
        shared = max(len({self.requests[n].prompt for n, _ in part}) for part in chosen)
        # One program for groups that all fit, another one for any prompts.
        prompts = -(-width // 4) if first and shared <= -(-width // 4) else width
        length = max(len(self.requests[n].prompt) for part in chosen for n, _ in part)
        t = self.batcher._prompt_width(length)
        news = {
            "prompts_PT": np.zeros((parts, prompts, t), np.int32),
            "length_P": np.zeros((parts, prompts), np.int32),
            "home_P": np.zeros((parts, prompts), np.int32),
            "source_W": np.zeros((parts, width), np.int32),
            "slot_W": np.full((parts, width), sizes.slots, np.int32),
            "number_W": np.zeros((parts, width), np.uint32),
            "budget_W": np.zeros((parts, width), np.int32),
        }
        for d, part in enumerate(chosen):
            sources: dict[tuple[int, ...], int] = {}
            for w, (n, slot) in enumerate(part):
                prompt = self.requests[n].prompt
                if prompts == width or prompt not in sources:
                    p = w if prompts == width else len(sources)
                    sources[prompt] = p
                    news["prompts_PT"][d, p, : len(prompt)] = prompt
                    news["length_P"][d, p], news["home_P"][d, p] = len(prompt), slot
                news["source_W"][d, w], news["slot_W"][d, w] = sources[prompt], slot
                news["number_W"][d, w] = self.requests[n].number
                news["budget_W"][d, w] = self.max_tokens
                self.owner[d, slot] = n
        flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in news.items()}
        self.batcher._admit(self.params, self.bias, flat, self.draws)
        self.running = _fetch(self.batcher._slots.running_S).reshape(self.owner.shape)

    def _choose(self, part: int, width: int) -> list[tuple[int, int]]:
        """(request, slot) of those that go to a device now."""
        free = np.flatnonzero(self.owner[part] < 0)[:width]
        return [(self.waiting.popleft(), int(slot)) for slot in free[: len(self.waiting)]]


def _widths(slots: int) -> list[int]:
    """With how many slots steps can be taken, the fewest first."""
    return sorted({slots, -(-slots // 2), -(-slots // 4)})


def _fetch(x: jax.Array) -> np.ndarray:
    return np.asarray(jnp.asarray(x))
