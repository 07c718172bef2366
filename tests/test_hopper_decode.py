"""`mla_decode` for Hopper, interpreted on the CPU: its numbers, what it reads, what races."""

from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.choose import Uncovered
from pallas_kernels.hopper import compat
from pallas_kernels.latents import Fp8Latents, read_pages, round_latents
from pallas_kernels.mla_decode import hopper, hopper_kernel, hopper_pages, mla_decode
from pallas_kernels.mla_decode.hopper_schedule import ROWS, make_schedule, team_of

# Weights and outputs are rounded to BF16, half a unit in the last place each.
BFLOAT16 = 2 * 1.01 * 2.0**-9
SCALE = 0.2
LIMITED = {"max_examples": 5, "deadline": None}  # a case takes seconds


class Shape(NamedTuple):
    """T queries of N heads over latents of C; cached lengths by sequence; CTAs."""

    t: int
    n: int
    c: int
    lengths: tuple[int, ...]
    ctas: int
    fp8: bool = False


class Case(NamedTuple):
    """Arguments of `mla_decode` up to the scale."""

    q: jax.Array
    cache: jax.Array | Fp8Latents
    layer: jax.Array
    table: jax.Array
    length: jax.Array
    positions: jax.Array


def make_case(shape, seed=0):
    """Two layers, pages in random order; what may not be read is NaN, what is masked is huge."""
    rng = np.random.default_rng(seed)
    width = 1 + max(shape.lengths) // 64  # one more than is used
    b, z = len(shape.lengths), shape.c + 64
    table = rng.permutation(b * width + 3)[: b * width].reshape(b, width)
    cache = rng.standard_normal((2, b * width + 3, 64, z))
    seen = np.zeros(cache.shape[:2], bool)
    for pages, length in zip(table, shape.lengths, strict=True):
        used = pages[: -(-length // 64)]
        seen[1, used] = True
        cache[1, used] = np.where(
            np.arange(len(used) * 64).reshape(-1, 64, 1) < length, cache[1, used], 1e30
        )
    table = np.where(np.arange(width) * 64 < np.array(shape.lengths)[:, None], table, 10**9)
    cache = jnp.asarray(cache, jnp.bfloat16)
    if shape.fp8:
        narrow, rope = round_latents(jnp.minimum(cache.astype(jnp.float32), 1e4), shape.c)
        scale = jnp.where(seen[..., None, None], jnp.swapaxes(narrow.scale, -1, -2), jnp.nan)
        cache = Fp8Latents(narrow.q, scale, rope.astype(jnp.bfloat16))
    else:
        cache = jnp.where(seen[..., None, None], cache, jnp.nan)
    length = np.array(shape.lengths)
    positions = length[:, None] - shape.t + np.arange(shape.t)
    table, length, positions = (jnp.asarray(x, jnp.int32) for x in (table, length, positions))
    q = jnp.asarray(rng.standard_normal((b, shape.t, shape.n, z)), jnp.bfloat16)
    return Case(q, cache, jnp.int32(1), table, length, positions)


def by_hand(case, width):
    """In float64, query by query."""
    out = np.zeros((*case.q.shape[:3], width))
    lse = np.full(case.q.shape[:3], -1e30)
    for b, length in enumerate(map(int, case.length)):
        pages = case.table[b, : -(-length // 64)]
        entries = np.asarray(read_pages(case.cache, 1, pages, jnp.bfloat16), np.float64)
        for t, position in enumerate(map(int, case.positions[b])):
            keys = entries.reshape(-1, entries.shape[-1])[: min(length, position + 1)]
            if len(keys):
                scores = np.asarray(case.q[b, t], np.float64) @ keys.T * SCALE
                top = scores.max(axis=1, keepdims=True)
                weights = np.exp(scores - top)
                total = weights.sum(axis=1, keepdims=True)
                out[b, t] = weights @ keys[:, :width] / total
                lse[b, t] = (top + np.log(total))[:, 0]
    return out, lse


def decode(case, shape, detect_races=False):
    with compat.interpreted(detect_races=detect_races):
        found = hopper.mla_decode(*case, scale=SCALE, value_dim=shape.c, num_sms=shape.ctas)
        return jax.block_until_ready(found)


def assert_right(shape, case):
    out, lse = decode(case, shape)
    wanted, wanted_lse = by_hand(case, shape.c)
    nothing = wanted_lse == -1e30
    assert out.dtype == jnp.bfloat16
    assert not np.asarray(out)[nothing].any()
    assert (np.asarray(lse)[nothing] == np.float32(-1e30)).all()
    np.testing.assert_allclose(np.asarray(lse), wanted_lse, rtol=1e-5)
    off = np.linalg.norm(np.asarray(out, np.float64) - wanted, axis=-1)
    assert (off <= BFLOAT16 * np.linalg.norm(wanted, axis=-1)).all(), off.max()


SHAPES = (
    Shape(1, 16, 128, (1, 64, 65), 5),  # on and off the page; more CTAs than pages
    Shape(2, 3, 128, (330, 0, 7), 2),  # a cut in the longest, a sequence without anything
    Shape(5, 16, 128, (5, 70), 3),  # two tiles of rows, one of them not full
    Shape(1, 128, 128, (70, 330, 0), 5),  # two teams of two
    pytest.param(Shape(2, 128, 128, (200,), 9), marks=pytest.mark.nightly),  # two of four
    pytest.param(Shape(40, 4, 128, (150, 40), 1), marks=pytest.mark.nightly),  # chunks of prompts
    pytest.param(Shape(1, 128, 512, (130,), 2), marks=pytest.mark.nightly),  # V3's
    Shape(2, 16, 256, (200, 30), 2, fp8=True),
    pytest.param(Shape(1, 16, 512, (150,), 1, fp8=True), marks=pytest.mark.nightly),  # V3's
)


@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape):
    assert_right(shape, make_case(shape))


@pytest.mark.nightly
@settings(**LIMITED)
@given(
    shape=st.builds(
        Shape,
        t=st.integers(1, 5),
        n=st.sampled_from([1, 8, 16, 24]),
        c=st.sampled_from([128, 256]),
        lengths=st.lists(st.integers(0, 400), min_size=1, max_size=4).map(tuple),
        ctas=st.integers(1, 5),
        fp8=st.booleans(),
    ),
    seed=st.integers(0, 99),
)
def test_decode_drawn(shape, seed):
    shape = shape._replace(c=256) if shape.fp8 else shape
    assert_right(shape, make_case(shape, seed))


def test_positions_need_not_be_the_last():
    """Queries earlier than the cache ends, in any order; one that is none."""
    shape = Shape(3, 8, 128, (200, 90), 2)
    case = make_case(shape)
    positions = jnp.array([[199, -1, 64], [5, 500, 63]], jnp.int32)
    assert_right(shape, case._replace(positions=positions))


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", [False, True])
def test_pages_in_use_are_read_once_a_tile(fp8, monkeypatch):
    shape = Shape(5, 16, 256, (70, 0, 129), 2, fp8)
    case = make_case(shape)
    itemsize = {x.shape: x.dtype.itemsize for x in jax.tree.leaves(case.cache)}
    read = Counter()
    copy = gpu_callbacks.copy_gmem_to_smem

    def counted(**arguments):
        (source,) = arguments["src_transforms"]
        if source.shape in itemsize:
            sizes = [index.size for index in source.indices if hasattr(index, "size")]
            pages = [int(index) for index in source.indices[:2]]
            read[tuple(pages)] += int(np.prod(sizes)) * itemsize[source.shape]
        return copy(**arguments)

    monkeypatch.setattr(gpu_callbacks, "copy_gmem_to_smem", counted)
    decode(case, shape)
    # Queries 0 to 3 are a tile, the last is another; of 129 positions that one alone sees the last.
    entry = 256 + 2 * 4 + 2 * 64 if fp8 else 2 * (256 + 64)
    tables = np.asarray(case.table)
    wanted = Counter({(1, page): 2 for page in (*tables[0, :2], *tables[2, :2])})
    wanted[(1, tables[2, 2])] = 1
    assert read == {page: tiles * 64 * entry for page, tiles in wanted.items()}


# ---- how work is shared out ---------------------------------------------------------------------


@pytest.mark.parametrize("ctas", [1, 7, 132])
@pytest.mark.parametrize(
    ("lengths", "t", "heads"), [([2000], 1, 128), ([0, 64, 1500, 65, 0], 9, 64)]
)
def test_every_page_is_somebodys_and_shares_are_even(lengths, t, heads, ctas):
    length = jnp.array(lengths, jnp.int32)
    positions = length[:, None] - t + jnp.arange(t)
    found = jax.jit(make_schedule, static_argnames=("heads", "ctas"))(
        length, positions, heads=heads, ctas=ctas
    )
    schedule = jax.tree.map(np.asarray, found)
    tiles, team = -(-t * heads // ROWS), team_of(t * heads, ctas)
    assert team == (min(2, ctas) if t == 1 else min(3, ctas))
    limits = np.repeat(np.asarray(positions), heads, axis=1)
    for g, pages in enumerate(schedule.pages_G):
        rows = limits[g // tiles, g % tiles * ROWS :][:ROWS]
        assert pages == max(rows.max(), -1) // 64 + 1
    begin, end = schedule.start_H1[:-1], schedule.start_H1[1:]
    most = schedule.pages_G.reshape(-1, team).max(axis=1)
    np.testing.assert_array_equal(end - begin, np.maximum(most, 1))
    visited = []
    (share,) = schedule.share_1
    assert share == -(-end[-1] // (ctas // team))
    for c in range(ctas // team):
        for group in range(schedule.first_c[c], schedule.last_c[c] + 1):
            low, high = max(c * share, begin[group]), min((c + 1) * share, end[group])
            assert low < high
            visited += range(low, high)
    assert visited == list(range(end[-1]))


# ---- what is not taken --------------------------------------------------------------------------


def test_what_is_not_covered_is_said():
    def refused(match, *, q=(1, 1, 2, 192), cache=(1, 1, 64, 192), dtype=jnp.bfloat16, c=128):
        ids = jnp.ones((1, 1), jnp.int32)
        arguments = jnp.ones(q, dtype), jnp.ones(cache, dtype), ids[0, 0], ids, ids[0], ids
        with pytest.raises(Uncovered, match=match):
            mla_decode(*arguments, 1.0, value_dim=c, implementation="hopper")

    refused("queries of float32, keys of float32; bfloat16 is taken", dtype=jnp.float32)
    refused("pages of 32 positions; 64 are taken", cache=(1, 1, 32, 192))
    refused("rotated keys 92 wide; 64 is taken", c=100)
    wide = {"q": (1, 1, 2, 704), "cache": (1, 1, 64, 704)}
    refused("latents 640 wide; multiples of 128 to 512 are taken", **wide, c=640)
    refused("nothing to do", q=(1, 0, 2, 192))


# ---- races --------------------------------------------------------------------------------------


def races(fp8=False, joined=False):
    """Whether two pieces of work of several pages, the first part of a tile, race."""
    shape = Shape(1, 8, 256 if fp8 else 128, (320, 130), 2, fp8)
    with pytest.MonkeyPatch.context() as patch:
        if not joined:  # otherwise it is only known of the kernel that joins
            patch.setattr(hopper, "combine_parts", lambda _, out, part, lse, part_lse: (out, lse))
        decode(make_case(shape), shape, detect_races=True)
    return compat.races_found()


def test_joining_does_not_race():
    assert not races(joined=True)


@pytest.mark.parametrize("fp8", [False, True])
def test_nothing_races(fp8):
    assert not races(fp8)


def test_weights_that_are_not_committed_race(monkeypatch):
    publish = hopper_pages.Pages.publish

    def careless(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper_pages.plgpu, "commit_smem", lambda: None)
            publish(*arguments)

    monkeypatch.setattr(hopper_pages.Pages, "publish", careless)
    assert races()


def test_a_page_that_is_let_go_before_it_is_added_races(monkeypatch):
    add = hopper_pages.Pages.add

    def careless(*arguments):
        late = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper_pages.plgpu, "wgmma", lambda *operands: late.append(operands))
            add(*arguments)
        for operands in late:
            hopper_pages.plgpu.wgmma(*operands)

    monkeypatch.setattr(hopper_pages.Pages, "add", careless)
    assert races()


def test_a_stage_that_is_filled_too_early_is_caught(monkeypatch):
    load = hopper_kernel.Decode.load

    def careless(self, at):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper_kernel.plgpu, "barrier_wait", lambda barrier: None)
            load(self, at)

    monkeypatch.setattr(hopper_kernel.Decode, "load", careless)
    # Which it is depends on whether the copy or its reader sees it first.
    with pytest.raises(Exception, match=r"no threads observed phase|is already at phase"):
        races()
