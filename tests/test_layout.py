"""What a mesh does with every tensor, and what moves: the page, the prediction, the real programs.

Programs are traced, which is cheap; a few are compiled, and their text and the compiler's log read.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsjax.config import Config
from dsjax.meshes import rules_of
from dsjax.overrides import override
from dsjax.plan.collectives import (
    abstract_mesh,
    collectives,
    inner_jaxprs,
    predicted,
    tally,
)
from dsjax.plan.layout import layout_table, page_tables, tensors, with_tables
from dsjax.presets import preset
from dsjax.train.loss import PretrainLoss
from dsjax.train.state import abstract_state, blueprint
from dsjax.train.step import make_train_step
from experiments import layout as script
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import PRESETS
from sharding.spread import Spread

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "sharding.md"
ROWS, LENGTH = 8, 32
INTS = ("tokens_BT", "targets_BT", "segments_BT", "positions_BT")

# ---- the programs -------------------------------------------------------------------------------


def configured(name, *changes) -> Config:
    """A preset, with `axis=size` and `rules=name` for its mesh and dotted paths for the rest."""
    return override(preset(name), *(c if "." in c.split("=")[0] else f"mesh.{c}" for c in changes))


class Programs(NamedTuple):
    """The step's two programs, traced."""

    config: Config
    mesh: Any
    accumulate: Any
    apply: Any


@contextlib.contextmanager
def unchecked():
    """A mesh of no devices is not of the type that a mesh is."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@functools.cache
def programs(name, *changes, rows=ROWS, length=LENGTH, devices=True) -> Programs:
    """Traces a step; without devices, on a mesh of any size."""
    config = configured(name, *changes)
    rules, sizes = rules_of(config.mesh), config.mesh.axes
    mesh = make_mesh(MeshShape(**sizes)) if devices else abstract_mesh(sizes)
    spread = Spread(mesh, rules)
    graphdef, optimizer = blueprint(config, rules)
    state, loss = abstract_state(config, rules, mesh), PretrainLoss.of(config)
    speed = config.train.bias_speed
    step = make_train_step(graphdef, loss, optimizer, bias_speed=speed, spread=spread)
    dtypes = dict.fromkeys(INTS, np.int32) | {"weights_BT": np.float32}
    place = spread.sharding(2)
    batch = {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=place)
        for name, dtype in dtypes.items()
    }
    ones = {name: np.ones((1, length), dtype) for name, dtype in dtypes.items()}
    totals = loss.totals(ones, 0.5)
    with jax.set_mesh(mesh) if devices else jax.sharding.use_abstract_mesh(mesh):
        sums = jax.eval_shape(step.zero, state.params, state.bias, batch, totals)
        accumulate = step.accumulate.trace(state.params, state.bias, sums, batch, totals)
        apply = step.apply.trace(state, sums, np.float32(0.5)) if devices else None
    return Programs(config, mesh, accumulate, apply)


def counted(made: Programs):
    return collectives(made.accumulate.jaxpr, made.config.mesh.axes)


def foretold(made: Programs, rows=ROWS, length=LENGTH):
    mesh = made.config.mesh
    return predicted(made.config, rules_of(mesh), mesh.axes, rows=rows, seq_len=length)


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_has_the_tables_that_are_made():
    page = PAGE.read_text(encoding="utf-8")
    made = with_tables(page, page_tables(preset("deepseek_v3")))
    assert page == made, (
        "docs/sharding.md is not what dsjax/plan/layout.py makes; to make it again: "
        "python -m experiments.layout --preset=deepseek_v3 --page=docs/sharding.md"
    )


def test_the_script_makes_the_page_again(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    worn = tmp_path / "page.md"
    worn.write_text(page.replace("columns travel", "columns walk"), encoding="utf-8")
    assert script.main(["layout", "--preset=deepseek_v3", f"--page={worn}"]) == 0
    assert worn.read_text(encoding="utf-8") == page


def test_the_table_is_what_devices_hold():
    """By the shards of the arrays that a run is restored into."""
    config = configured("nano", "rules=fsdp_ep_tp", "fsdp=2", "expert=2", "tensor=2")
    rules, mesh = rules_of(config.mesh), make_mesh(MeshShape(**config.mesh.axes))
    told = tensors(config, rules, config.mesh.axes)
    params = abstract_state(config, rules, mesh).params
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert len(leaves) == len(told)
    for path, leaf in leaves:
        tensor = told[jax.tree_util.keystr(path, simple=True, separator=".")]
        assert leaf.sharding.shard_shape(leaf.shape) == tensor.local_shape
    rows = layout_table(config, rules, config.mesh.axes)
    assert sum(row.numbers for row in rows) == sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) for _, leaf in leaves
    )


def test_the_script_prints_v3_on_devices_that_nobody_has(capsys):
    sets = ("mesh.rules=fsdp_ep", "mesh.fsdp=32", "mesh.expert=64")
    assert script.main(["layout", *(f"--set={each}" for each in sets)]) == 0
    out = capsys.readouterr().out
    assert "2,048 devices" in out
    assert re.search(r"ffn\.w_in_ED2F .*experts over expert, embed over fsdp .*tokens travel", out)
    assert re.search(r"ragged_all_to_all over expert: dispatch: rows, forward +59 +27,282", out)


@pytest.mark.parametrize("rules", ["single", "decode"])
def test_the_script_prints_what_is_not_for_training(rules, capsys):
    changes = [] if rules == "single" else ["--set=mesh.tensor=2"]
    arguments = ["--preset=nano", f"--set=mesh.rules={rules}", *changes]
    assert script.main(["layout", *arguments]) == 0
    out = capsys.readouterr().out
    assert "embed_VD" in out
    assert "gradient" not in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rules=fsdp_ep", "expert=63"], "experts' of 256 does not divide over expert=63"),
        (["rules=fsdp", "tensor=2"], "mesh.tensor is 2, but the rules 'fsdp'"),
        (["rules=fsdp", "fsdp=2", "--rows=3"], "3 does not divide over the 2 devices"),
        (["rules=fsdp", "fsdp=2", "--rows=0"], "--rows is 0"),
        (["--rows=8"], "--rows goes with a mesh"),
        (["--page=nowhere.md"], "nowhere.md"),
        (["--page=README.md"], "needs the lines"),
    ],
)
def test_the_script_refuses(arguments, told, capsys, monkeypatch):
    monkeypatch.chdir(PAGE.parent.parent)
    given = [a if a.startswith("--") else f"--set=mesh.{a}" for a in arguments]
    assert script.main(["layout", *given]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


# ---- predicted = counted ------------------------------------------------------------------------

FULL, DOTS, NONE = (f"train.remat={policy}" for policy in ("full", "dots", "none"))
TRACED = [
    ("nano", "rules=fsdp", "data=2", "fsdp=4", FULL),
    ("nano", "rules=fsdp", "fsdp=4", "context=2", DOTS),
    ("nano", "rules=fsdp_ep", "data=8", FULL),
    ("nano", "rules=fsdp_ep", "fsdp=2", "expert=4", FULL),
    ("nano", "rules=fsdp_ep", "fsdp=2", "expert=4", "exchange=ragged", FULL),
    (
        *("nano", "rules=fsdp_ep", "fsdp=2", "expert=2", "context=2", DOTS),
        *("precision.compute_dtype=bfloat16", "wire=bfloat16", "buffer_factor=1.0"),
    ),
    ("nano", "rules=fsdp_ep_tp", "fsdp=2", "expert=2", "tensor=2", FULL),
    ("nano", "rules=fsdp_ep_tp", "expert=2", "tensor=2", "context=2", FULL),
    (
        *("nano", "rules=fsdp_ep_tp", "expert=2", "tensor=2", "context=2", DOTS),
        *("train.device_balance_loss_weight=0.1", "train.communication_balance_loss_weight=0.1"),
    ),
    ("nano_dense", "rules=fsdp_ep_tp", "expert=2", "tensor=2", "context=2", FULL),
    ("nano_dense", "rules=fsdp_ep", "fsdp=2", "expert=4", DOTS),
]
KEPT = [
    ("nano", "rules=fsdp_ep", "fsdp=2", "expert=4", NONE),
    ("nano", "rules=fsdp_ep_tp", "expert=2", "tensor=2", "context=2", NONE),
    ("nano", "rules=fsdp_ep_tp", "fsdp=2", "expert=2", "tensor=2", NONE),
    ("nano_dense", "rules=fsdp_ep_tp", "fsdp=2", "tensor=2", "context=2", NONE),
]
FP8, SELECTIVE = "precision.recipe=fp8", "train.remat=selective"
# Where `tensor` cuts heads, whole blocks of 128 for each device.
WIDE_HEADS = tuple(
    f"model.{block}.attention.{field}"
    for block in ("stacks.dense.blocks.0", "stacks.moe.blocks.0", "mtp.block")
    for field in ("num_heads=8", "nope_dim=32", "rope_dim=32", "value_dim=32")
)
IN_FP8 = [
    ("nano", "rules=fsdp_ep", "fsdp=2", "expert=4", FP8, SELECTIVE),
    (
        *("nano", "rules=fsdp_ep", "fsdp=2", "expert=4", "exchange=ragged", FP8, FULL),
        *("precision.compute_dtype=bfloat16", "model.stacks.dense.blocks.0.ffn.hidden_dim=128"),
    ),
    ("nano", "rules=fsdp", "fsdp=4", "context=2", FP8, NONE),
    ("nano", "rules=fsdp_ep_tp", "fsdp=2", "expert=2", "tensor=2", FP8, SELECTIVE, *WIDE_HEADS),
    ("nano_dense", "rules=fsdp_ep", "fsdp=2", "expert=4", FP8, FULL),
    ("nano", "rules=fsdp_ep", "fsdp=2", "expert=4", SELECTIVE),
]


def late(case):
    return pytest.param(case, marks=pytest.mark.nightly)


def named(case):
    return "-".join(part.partition("=")[2] if "rules" in part else part for part in case)


@pytest.mark.parametrize(
    "case",
    [
        *(case if i in (1, 3, 4, 5, 7) else late(case) for i, case in enumerate(TRACED)),
        KEPT[0],
        *(late(case) for case in KEPT[1:]),
        IN_FP8[0],
        *(late(case) for case in IN_FP8[1:]),
    ],
    ids=named,
)
def test_what_moves_is_what_was_predicted(case):
    """Every exchange of the real step: kind, axes, dtype, shape, and how often."""
    made = programs(*case)
    got, wanted = counted(made), foretold(made)
    assert tally(got) == tally(wanted)
    assert sum(one.bytes for one in got) == pytest.approx(sum(one.bytes for one in wanted))
    assert got
    assert not any(one.looped for one in got)


@pytest.mark.parametrize(
    "case",
    [
        ("rules=fsdp_ep", "fsdp=32", "expert=64"),
        late(("rules=fsdp_ep_tp", "fsdp=16", "expert=64", "tensor=2")),
        late(("rules=fsdp_ep_tp", "fsdp=16", "expert=64", "tensor=2", FP8)),
    ],
    ids=named,
)
def test_v3_on_2048_devices_moves_what_was_predicted(case):
    with unchecked():
        case = ("deepseek_v3", *case, "exchange=ragged", FULL)
        made = programs(*case, rows=2048, length=4096, devices=False)
    assert tally(counted(made)) == tally(foretold(made, 2048, 4096))


def test_a_model_has_the_moves_of_its_parts():
    """By hand, for one weight and one exchange of `nano` on fsdp 2 x expert 4."""
    made = programs(*TRACED[3])
    times = tally(counted(made))
    # w_uq [24, 2, 24] of 4 blocks: forward and again; its gradient once.
    both = ("fsdp", "expert")
    assert times["all_gather", both, "float32", (3, 2, 24)] == 8
    assert times["reduce_scatter", both, "float32", (24, 2, 24)] == 4
    # MTP's projection is copied over `expert`: its gradient is summed there, once.
    assert times["psum", ("expert",), "float32", (32, 32)] == 1
    # 32 tokens to 4 devices; 3 layers: forward 2, backward 2, and dispatched again once.
    assert times["all_to_all", ("expert",), "float32", (4 * 32, 32)] == 3 * 5


def test_loops_count_as_often_as_they_turn_where_that_is_known():
    def run(x):
        x = jax.lax.scan(lambda x, _: (jax.lax.psum(x, "fsdp"), None), x, None, length=5)[0]
        x = jax.lax.while_loop(lambda x: x[0] < 9, lambda x: jax.lax.psum(x, "fsdp") + 1, x)
        x = jax.lax.cond(x[0] > 0, lambda: jax.lax.psum(x, "fsdp"), lambda: x)
        return jax.lax.all_gather(x, "fsdp")[0]

    mesh, spec = make_mesh(MeshShape(fsdp=8)), PartitionSpec("fsdp")
    x = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.shard_map(run, out_specs=spec, check_vma=False)).trace(x)
    found = collectives(traced.jaxpr, dict(mesh.shape))
    assert [(one.kind, one.axes, one.times, one.looped) for one in found] == [
        ("psum", ("fsdp",), 5, False),
        ("psum", ("fsdp",), 1, True),
        ("psum", ("fsdp",), 1, False),
        ("all_gather", ("fsdp",), 1, False),
    ]
    assert found[0].bytes == pytest.approx(5 * 2 * 8 * 7 / 8)
    assert found[-1].bytes == 7 * 8


# ---- what waits for what ------------------------------------------------------------------------

EXCHANGES = ("all_to_all", "ragged_all_to_all")
# Their inner program takes what they take, one for one.
CALLS = ("jit", "pjit", "remat2", "checkpoint", "custom_vjp_call", "custom_jvp_call", "closed_call")


def scans(jaxpr):
    """Bodies of all scans over layers, wherever they are."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in inner_jaxprs(equation):
            yield from scans(inner)


def exchanges(equation):
    return equation.primitive.name in EXCHANGES or any(
        exchanges(e) for inner in inner_jaxprs(equation) for e in inner.eqns
    )


def waits(jaxpr, given, seen, scope=""):
    """Notes (equation, scope, whether it waits for an exchange between tokens) of all equations.

    Args:
        jaxpr: a body.
        given: of each of its arguments, whether it comes from an exchange.
        seen: a list.
        scope: names around it.

    Returns:
        Of each of its results, whether it comes from an exchange.
    """
    late = dict(zip(jaxpr.invars, given, strict=True))

    def of(atom):
        return not isinstance(atom, jax.extend.core.Literal) and late.get(atom, False)

    for equation in jaxpr.eqns:
        name, taken = equation.primitive.name, [of(atom) for atom in equation.invars]
        here = f"{scope}/{equation.source_info.name_stack}"
        seen.append((equation, here, any(taken)))
        inner = inner_jaxprs(equation)
        if name in CALLS and len(inner) == 1 and len(inner[0].invars) == len(taken):
            out = waits(inner[0], taken, seen, here)
        else:
            out = [any(taken) or exchanges(equation)] * len(equation.outvars)
        late.update(zip(equation.outvars, out, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


@pytest.mark.parametrize("case", [TRACED[3], TRACED[4]], ids=["dense", "ragged"])
def test_shared_experts_and_weights_do_not_wait_for_the_exchange(case):
    """Within a layer, forward and backward: a scheduler may run them beside it."""
    made = programs(*case)
    bodies = [e for e in scans(made.accumulate.jaxpr.jaxpr) if exchanges(e)]
    assert len(bodies) == 2  # forward and backward
    products, gathers = collections.Counter(), collections.Counter()
    for i, scan in enumerate(bodies):
        (body,) = inner_jaxprs(scan)
        seen = []
        waits(body, [False] * len(body.invars), seen)
        for equation, scope, late in seen:
            if equation.primitive.name == "dot_general":
                # The backward pass of the layer before comes after all of this one's.
                products["shared" if "dense_ffn" in scope else "rest", i, late] += 1
            over = equation.params.get("axis_name", ())
            if equation.primitive.name == "all_gather" and "fsdp" in over:
                gathers[late] += 1
    assert products["shared", 0, False] == 2
    assert products["shared", 0, True] == 0
    # Again 1, and 2 gradients each of inputs and of weights.
    assert products["shared", 1, False] == 5
    assert products["shared", 1, True] == 0
    assert products["rest", 1, True]  # attention's gradients do: the walk sees what waits
    assert gathers[False]
    assert not gathers[True]


@pytest.mark.parametrize("case", [TRACED[5], TRACED[7]], ids=named)
def test_of_a_row_over_context_the_latent_travels(case):
    """Z = C + R numbers a token and layer, and neither keys nor values by head."""
    made = programs(*case)
    attention = made.config.model.stacks[0].blocks[0].attention
    layers = made.config.model.num_layers + 1  # and MTP's
    floats = [
        one
        for one in counted(made)
        if "context" in one.axes and one.kind == "all_gather" and "attention" in one.where
    ]
    assert {one.shape[2:] for one in floats} == {(attention.cache_dim,)}
    assert sum(one.times for one in floats) == 2 * layers  # forward, and again
    dtype = made.config.precision.compute_dtype
    assert {one.dtype for one in floats} == {dtype}


def test_v3s_latent_is_576_numbers():
    assert preset("deepseek_v3").model.stacks[0].blocks[0].attention.cache_dim == 576


@pytest.mark.parametrize("case", [TRACED[3], KEPT[0]], ids=["full", "none"])
def test_no_layer_keeps_a_whole_weight(case):
    """What the forward scan over layers hands to the backward pass."""
    made = programs(*case)
    told = tensors(made.config, rules_of(made.config.mesh), made.config.mesh.axes)
    whole = {t.shape[1:] for name, t in told.items() if name.startswith("stacks.") and t.scattered}
    parts = {  # of experts, whole but for the experts of others
        (t.local_shape[1], *t.shape[2:]) for t in told.values() if "experts" in t.axes
    }
    forward = next(e for e in scans(made.accumulate.jaxpr.jaxpr) if exchanges(e))
    kept = {var.aval.shape[1:] for var in forward.outvars if var.aval.shape[:1] == (2,)}
    assert not kept & (whole | parts)


# ---- compiled -----------------------------------------------------------------------------------

KINDS = {
    "all-gather": "all_gather",
    "all-reduce": "psum",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "collective-permute": "ppermute",
}
# Of what a layer does, what no other does.
ONCE = ("weights", "query", "key/value", "hidden", "keys and", "attention", "dispatch", "combine")
WARNING = "Involuntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A collective of a compiled program: (dtype, dims) of each result, in a loop over layers."""

    kind: str
    axes: tuple[str, ...]
    results: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    loop: bool


def compiled_collectives(text):
    """Every collective of a program's text, as often as the loops around it turn."""
    bodies, name, entry = {}, "", ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif line.startswith("  "):
            bodies[name].append(line)
    found = []

    def walk(name, times, loop):
        for line in bodies[name]:
            operation = re.search(r" = (.*?) ([a-z\-]+)\(", line)
            if operation is None:
                continue
            results, kind = operation[1], operation[2].removesuffix("-start")
            if kind in KINDS:
                axes = re.search(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}", line)
                assert axes, line
                shapes = re.findall(r"([a-z]+\d+)\[([\d,]*)\]", results)
                told = tuple((d, tuple(map(int, filter(None, s.split(","))))) for d, s in shapes)
                names = tuple(re.findall(r"'(\w+)'", axes[1]))
                found.append(Compiled(KINDS[kind], names, told, times, loop))
            if kind == "while":
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                body = re.search(r"body=%?([\w.\-]+)", line)
                assert body
                walk(body[1], times * int(turns[1] if turns else 1), True)
            if kind in ("call", "conditional", "fusion"):
                for called in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
                    walk(called, times, loop)

    assert entry
    walk(entry, 1, False)
    return found


@pytest.fixture
def compile_here(capfd):
    """Compiles, whatever is cached, and returns (text, the compiler's log)."""
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # keeps it for nobody

    def compiled(lowered):
        capfd.readouterr()
        # An option that changes nothing here, so that no other test's program is found instead.
        text = lowered.compile({"xla_cpu_enable_fast_min_max": True}).as_text()
        return text, capfd.readouterr().err

    yield compiled
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def test_the_compilers_complaint_would_be_seen(compile_here):
    """A program whose layout the compiler can only change by gathering all of it everywhere."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def bad(x):
        for spec in (PartitionSpec(None, "b"), PartitionSpec("a", None)):
            x = jnp.sin(jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)))
        return x

    _, log = compile_here(jax.jit(bad).lower(jax.ShapeDtypeStruct((8, 64), jnp.float32)))
    assert WARNING in log


@pytest.mark.parametrize(
    "case",
    [
        TRACED[3],
        pytest.param(TRACED[7], marks=pytest.mark.nightly),
        pytest.param(TRACED[0], marks=pytest.mark.nightly),
        pytest.param(TRACED[6], marks=pytest.mark.nightly),
    ],
    ids=named,
)
def test_compiled_programs_move_no_more(case, compile_here):
    """XLA merges what is equal, and sums many gradients at once; it adds nothing."""
    made = programs(*case)
    text, log = compile_here(made.accumulate.lower())
    assert WARNING not in log
    found, wanted = compiled_collectives(text), foretold(made)
    sums, moves = ([o for o in found if (o.kind == "psum") == s] for s in (True, False))

    # Sums: the same numbers. No gather came back as a sum over a whole weight.
    sizes = {(one.axes, math.prod(one.shape)) for one in wanted if one.kind == "psum"}
    assert {(o.axes, math.prod(dims)) for o in sums for _, dims in o.results} <= sizes
    given = sum(math.prod(dims) * o.times for o in sums for _, dims in o.results)
    told = sum(math.prod(one.shape) * one.times for one in wanted if one.kind == "psum")
    gradients = [w for w in wanted if w.kind == "psum" and "copies" in w.where]
    assert sum(math.prod(one.shape) for one in gradients) <= given <= told
    stacked = {one.shape for one in gradients if "stacks.moe" in one.where}
    assert stacked
    assert not any(dims in stacked for o in sums if o.loop for _, dims in o.results)

    # All else: as often as predicted, or less often where two were equal. What the vocabulary and
    # MTP ask twice is equal, and what is run again, where a loop of one layer is no loop.
    count, most, least = collections.Counter(), collections.Counter(), collections.Counter()
    for o in moves:
        count[o.kind, o.axes, sum(math.prod(dims) for _, dims in o.results)] += o.times
    for one in wanted:
        if one.kind != "psum":
            size = math.prod(one.shape)
            size = size * one.devices if one.kind == "all_gather" else size
            size = size // one.devices if one.kind == "reduce_scatter" else size
            key = one.kind, one.axes, size
            most[key] += one.times
            least[key] += one.times * ("again" not in one.where and one.where.startswith(ONCE))
    assert set(count) == set(most)
    for key, times in count.items():
        assert least[key] <= times <= most[key], key
    returned = [w for w in wanted if w.kind == "reduce_scatter" and "gradients" in w.where]
    scattered = sum(o.times for o in moves if o.kind == "reduce_scatter")
    assert scattered >= sum(one.times for one in returned)  # every gradient

    # Weights are gathered a layer at a time: inside the loop. All layers at once have no size that
    # was predicted.
    gathers = [(o, o.results[0][1]) for o in moves if o.kind == "all_gather"]
    told = tensors(made.config, rules_of(made.config.mesh), made.config.mesh.axes)
    for name, tensor in told.items():
        if name.startswith("stacks.moe") and tensor.scattered:
            layers, *shape = used(tensor)
            inside = sum(o.times for o, dims in gathers if o.loop and dims == tuple(shape))
            assert inside >= 2 * layers, name  # forward and again


def used(tensor):
    """Of a weight as a device multiplies with it."""
    sizes = dict(tensor.sizes)
    kept = [math.prod(sizes[a] for a in stay) for stay in tensor.kept]
    return tuple(n // k for n, k in zip(tensor.shape, kept, strict=True))


def test_the_update_sums_nothing_but_norms(compile_here):
    text, log = compile_here(programs(*TRACED[3]).apply.lower())
    assert WARNING not in log
    found = compiled_collectives(text)
    assert {o.kind for o in found} == {"psum"}
    assert {dims for o in found for _, dims in o.results} == {()}


def test_presets_for_training_are_covered():
    covered = {part.partition("=")[2] for case in TRACED for part in case if "rules=" in part}
    assert covered == set(PRESETS) - {"single", "decode"}
