"""What `experiments.bench_train` measures: ratios within one run, medians of several.

Both sides of a ratio alternate, each warm in a process (or program) of its own, while the other is
idle. Absolute times on a shared machine mean little; the ratios, with their spread, are the result.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config, SwiGluConfig
from dsjax.errors import InputError
from dsjax.language_model import init
from dsjax.model import moe as moe_room
from dsjax.model.layers import SwiGlu
from dsjax.model.mla import MultiHeadLatentAttention
from dsjax.model.moe import MixtureOfExperts
from dsjax.model.rope import rotation
from dsjax.precision import Precision
from dsjax.train.flops import train_flops_per_token
from dsjax.train.loss import PretrainLoss
from dsjax.train.state import blueprint, create
from dsjax.train.step import make_train_step
from dsjax.train.vocabulary import cross_entropy
from sharding.dispatch import Plan
from sharding.rules import AxisRules

PEER = Path(__file__).parent / "transformers_bench.py"


def run(
    config: Config,
    *,
    parts: Sequence[str],
    repeats: int,
    oracle: str,
    out: str | None,
    seed: int,
) -> None:
    """Measures and prints.

    Raises:
        InputError: if a peer is asked for and its interpreter is not there.
    """
    if any(part.startswith("peer") for part in parts) and not Path(oracle).exists():
        raise InputError(f"no interpreter at {oracle}; `make oracle` makes it")
    measure = {
        "peer_train": lambda: _peer_train(config, repeats, oracle, seed),
        "peer_generate": lambda: _peer_generate(config, repeats, oracle, seed),
        "dispatch": lambda: _dispatch(config, repeats, seed),
        "parts": lambda: _parts(config, repeats, seed),
        "compile": lambda: _compile(config, seed),
    }
    result: dict = {"machine": machine()}
    for part in parts:
        result[part] = measure[part]()
        print(f"{part}: {json.dumps(result[part])}", file=sys.stderr, flush=True)
    result["load_average_after"] = os.getloadavg()
    text = json.dumps(result, indent=1)
    if out is None:
        print(text)
    else:
        Path(out).write_text(text + "\n", encoding="utf-8")


def machine() -> dict:
    """What the timings depend on."""
    name = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "load_average": os.getloadavg(),
    }


# ---- timing --------------------------------------------------------------------------------------


def _seconds(iteration: Callable[[], object]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(iteration())
    return time.perf_counter() - started


def alternate(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, timed in sides.items():
            seconds[name].append(timed())
    return seconds


def ratio(top: list[float], bottom: list[float]) -> dict:
    """Pair by pair: top over bottom."""
    ratios = sorted(a / b for a, b in zip(top, bottom, strict=True))
    return {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}


def _peer(mode: str, oracle: str) -> contextlib.AbstractContextManager[Callable[[], float]]:
    """A warm transformers process; calling it does one iteration and returns its seconds."""
    return peer([oracle, str(PEER), f"--mode={mode}", "--interactive"])


@contextlib.contextmanager
def peer(command: Sequence[str]) -> Iterator[Callable[[], float]]:
    """A process that is warm once it prints a line; calling it does one iteration.

    Args:
        command: reads a line for each iteration, and answers with JSON that has its `seconds`.

    Raises:
        InputError: if it does not start.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        if not process.stdout.readline():
            raise InputError(f"the peer did not start: {' '.join(command)}")

        def iteration() -> float:
            process.stdin.write("\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())["seconds"]

        yield iteration
        process.stdin.close()


# ---- the train step ------------------------------------------------------------------------------


def random_batch(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Random tokens, a document a row."""
    shape = (config.train.batch_size, config.train.seq_len)
    tokens = np.random.default_rng(seed).integers(
        0, config.model.vocab_size, (shape[0], shape[1] + 1)
    )
    return {
        "tokens_BT": tokens[:, :-1].astype(np.int32),
        "targets_BT": tokens[:, 1:].astype(np.int32),
        "segments_BT": np.ones(shape, np.int32),
        "positions_BT": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
        "weights_BT": np.ones(shape, np.float32),
    }


def _train_iteration(config: Config, seed: int) -> Callable[[], float]:
    """A warm step: forward, backward, clipping, AdamW, bias update; returns its seconds."""
    graphdef, optimizer = blueprint(config, AxisRules())
    state = create(config, jax.random.key(seed), AxisRules())
    step = make_train_step(
        graphdef, PretrainLoss.of(config), optimizer, bias_speed=config.train.bias_speed
    )
    batch = random_batch(config, seed)
    micro = config.train.micro_batch_size or config.train.batch_size
    box = [state]

    def iteration():
        box[0], metrics = step(box[0], batch, progress=0.3, micro_batch_size=micro)
        return box[0], metrics

    for _ in range(3):
        iteration()
    return functools.partial(_seconds, iteration)


def _peer_train(config: Config, repeats: int, oracle: str, seed: int) -> dict:
    tokens = config.train.tokens_per_step
    ours = _train_iteration(config, seed)
    with _peer("train", oracle) as theirs:
        seconds = alternate({"dsjax": ours, "transformers": theirs}, repeats)
    return {
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "tokens_per_s": {name: tokens / statistics.median(s) for name, s in seconds.items()},
        "times_as_fast": ratio(seconds["transformers"], seconds["dsjax"]),
    }


def _peer_generate(config: Config, repeats: int, oracle: str, seed: int) -> dict:
    lm = init(config, seed)
    prompts = np.random.default_rng(seed).integers(0, config.model.vocab_size, (4, 64)).tolist()

    def iteration():
        return lm.generate_tokens(prompts, max_tokens=64, stop_ids=()).tokens_BG

    iteration()
    with _peer("generate", oracle) as theirs:
        sides = {"dsjax": functools.partial(_seconds, iteration), "transformers": theirs}
        seconds = alternate(sides, repeats)
    return {
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "tokens_per_s": {name: 4 * 64 / statistics.median(s) for name, s in seconds.items()},
        "times_as_fast": ratio(seconds["transformers"], seconds["dsjax"]),
    }


# ---- the cost of dispatch ------------------------------------------------------------------------


def _grouped_dispatch(x_UD, gates_UK, expert_UK, *, num_experts):
    """Rows that are already where they belong: equal shares, nothing sorted or gathered."""
    per_token = gates_UK.shape[1]
    rows = x_UD.shape[0] * per_token
    sizes_E = jnp.full((num_experts,), rows // num_experts, jnp.int32)
    block = rows // num_experts
    tile_expert = jnp.arange(num_experts, dtype=jnp.int32)
    tile_expert = jnp.repeat(tile_expert, 2 if block % 2 == 0 else 1)
    plan = Plan(expert_UK, jnp.zeros((rows,), jnp.int32), tile_expert, sizes_E)
    return jnp.tile(x_UD, (per_token, 1)), gates_UK.T.reshape(-1), sizes_E, plan


def _grouped_combine(y_XD, plan):
    return y_XD.reshape(plan.slot_UK.shape[1], -1, y_XD.shape[1]).sum(axis=0)


def _dispatch(config: Config, repeats: int, seed: int) -> dict:
    """The same step with and without sorting, gathering and summing rows."""
    with (
        mock.patch.object(moe_room, "dispatch", _grouped_dispatch),
        mock.patch.object(moe_room, "combine", _grouped_combine),
    ):
        grouped = _train_iteration(config, seed)
    seconds = alternate({"dispatched": _train_iteration(config, seed), "grouped": grouped}, repeats)
    return {
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "cost": ratio(seconds["dispatched"], seconds["grouped"]),
    }


# ---- share of peak, by part ----------------------------------------------------------------------


def _parts(config: Config, repeats: int, seed: int) -> dict:
    """Each part alone, forward and backward, against a large matmul timed in the same rounds."""
    model, train = config.model, config.train
    key = jax.random.key(seed)
    shape = (train.batch_size, train.seq_len, model.embed_dim)
    x_BTD = jax.random.normal(key, shape, jnp.float32)
    ones_BT = jnp.ones(shape[:2], jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape[:2])
    shared = {"std": model.init_std, "precision": Precision.of(config.precision)}
    shared |= {"rules": AxisRules(), "key": key}
    blocks = [block for stack in model.stacks for block in stack.blocks]
    tokens = train.tokens_per_step
    # One layer of each part, its operations by the same count as the whole step's.
    sides: dict[str, tuple[Callable, float]] = {}

    def add(name: str, module, call: Callable, flops: float):
        def loss(module, x):
            return jnp.sum(jnp.square(call(module, x)))

        program = jax.jit(jax.grad(loss, argnums=(0, 1)))
        jax.block_until_ready(program(module, x_BTD))
        sides[name] = (functools.partial(program, module, x_BTD), flops)

    attention = blocks[-1].attention
    one = dataclasses.replace(
        model,
        stacks=(dataclasses.replace(model.stacks[-1], repeats=1, blocks=blocks[-1:]),),
        mtp=None,
    )
    per_layer = train_flops_per_token(dataclasses.replace(config, model=one))
    turn = rotation(positions_BT, attention.rope_dim, attention.rope)
    add(
        "attention",
        MultiHeadLatentAttention(attention, model.embed_dim, **shared),
        lambda m, x: m(x, turn=turn, positions_BT=positions_BT, segments_BT=ones_BT)[0],
        per_layer["attention"] * tokens,
    )
    add(
        "moe",
        MixtureOfExperts(blocks[-1].ffn, model.embed_dim, **shared),
        lambda m, x: m(x, bias_E=None, segments_BT=ones_BT)[0],
        sum(per_layer.get(p, 0) for p in ("experts", "dense_ffn", "router")) * tokens,
    )
    for block in blocks:
        if isinstance(block.ffn, SwiGluConfig):
            hidden = block.ffn.hidden_dim
            add(
                "dense_ffn",
                SwiGlu(model.embed_dim, hidden, **shared),
                lambda m, x: m(x),
                3 * 2 * 3 * model.embed_dim * hidden * tokens,
            )
            break
    head_DV = 0.02 * jax.random.normal(key, (model.embed_dim, model.vocab_size))
    targets_U = jnp.zeros((tokens,), jnp.int32)
    weights_U = jnp.full((tokens,), 1.0 / tokens)
    head = jax.jit(
        jax.grad(
            lambda w, x: cross_entropy(
                shared["precision"], x.reshape(tokens, -1), w, targets_U, weights_U
            ),
            argnums=(0, 1),
        )
    )
    jax.block_until_ready(head(head_DV, x_BTD))
    sides["head"] = (functools.partial(head, head_DV, x_BTD), per_layer["head"] * tokens)

    size = 2048
    square = jax.random.normal(key, (size, size))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(square, square))
    timed = {name: functools.partial(_seconds, call) for name, (call, _) in sides.items()}
    timed["matmul"] = lambda: _seconds(lambda: multiply(square, square))
    timed["step"] = _train_iteration(config, seed)
    flops = {name: f for name, (_, f) in sides.items()}
    flops["step"] = sum(train_flops_per_token(config).values()) * tokens
    seconds = alternate(timed, repeats)
    peak = statistics.median(2 * size**3 / s for s in seconds["matmul"])
    best = max(2 * size**3 / s for s in seconds["matmul"])
    return {
        "matmul_gflops": {"median": peak / 1e9, "max": best / 1e9},
        "share_of_matmul_peak": {
            name: f / statistics.median(seconds[name]) / peak for name, f in flops.items()
        },
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
    }


# ---- compile time against depth ------------------------------------------------------------------


def _compile(config: Config, seed: int) -> dict:
    """Tracing, lowering and compiling `accumulate` with 4 and with 16 layers."""
    del seed
    seconds = {}
    for layers in (4, 16, 4, 16):
        stacks = config.model.stacks
        first = sum(stack.repeats * len(stack.blocks) for stack in stacks[:-1])
        last = dataclasses.replace(stacks[-1], repeats=layers - first)
        model = dataclasses.replace(config.model, stacks=(*stacks[:-1], last))
        deep = dataclasses.replace(config, model=model)
        graphdef, optimizer = blueprint(deep, AxisRules())
        state = create(deep, jax.random.key(0), AxisRules())
        loss = PretrainLoss.of(deep)
        step = make_train_step(graphdef, loss, optimizer, bias_speed=deep.train.bias_speed)
        batch = random_batch(deep, 0)
        totals = loss.totals(batch, 0.0)
        sums = step.zero(state.params, state.bias, batch, totals)
        jax.clear_caches()
        started = time.perf_counter()
        step.accumulate.lower(state.params, state.bias, sums, batch, totals).compile()
        seconds.setdefault(layers, []).append(time.perf_counter() - started)
    return {
        "seconds": {str(layers): min(s) for layers, s in seconds.items()},
        "ratio_16_to_4": min(seconds[16]) / min(seconds[4]),
    }
