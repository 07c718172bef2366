"""Every implementation of every op against its definition, and the definition against loops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import bench_cpu_kernels, command
from pallas_kernels.gqa_decode import gqa_decode
from pallas_kernels.gqa_decode import shapes as gqa_shapes
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul import shapes as grouped_shapes
from pallas_kernels.latents import Fp8Latents, round_latents
from pallas_kernels.mla_attention import mla_attention, xla
from pallas_kernels.mla_attention import shapes as attention_shapes
from pallas_kernels.mla_decode import combine, mla_decode, sequence_part
from pallas_kernels.mla_decode import shapes as decode_shapes
from pallas_kernels.tiled import dequantize
from tests.reference import mla as reference_mla

FLOAT32 = 2e-6  # rounding of float32 sums in another order, as a relative norm


def assert_near(got, wanted, tolerance=FLOAT32):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= tolerance * max(np.linalg.norm(wanted), 1e-3)


# ---- grouped_matmul -----------------------------------------------------------------------------


def grouped_case(sizes, block, d, f, seed=0):
    """Rows sorted by group in whole tiles, with a spare unused tile."""
    rng = np.random.default_rng(seed)
    tiles = [e for e, size in enumerate(sizes) for _ in range(-(-size // block))]
    tile_expert = np.array([*tiles, len(sizes)], np.int32)
    x = np.zeros((len(tile_expert) * block, d), np.float32)
    row = 0
    for size in sizes:
        x[row : row + size] = rng.standard_normal((size, d))
        row += -(-size // block) * block
    w = rng.standard_normal((len(sizes), d, f)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray(tile_expert)


def grouped_by_hand(x, w, tile_expert):
    x, w, tile_expert = map(np.asarray, (x, w, tile_expert))
    block = len(x) // len(tile_expert)
    y = np.zeros((len(x), w.shape[2]))
    for row in range(len(x)):
        expert = tile_expert[row // block]
        if expert < len(w):
            y[row] = x[row].astype(np.float64) @ w[expert].astype(np.float64)
    return y


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
@pytest.mark.parametrize("shape", grouped_shapes.SHAPES)
def test_grouped_matmul(shape, implementation):
    x, w, tile_expert = grouped_case(*shape)
    y = grouped_matmul(x, w, tile_expert, implementation=implementation)
    assert_near(y, grouped_by_hand(x, w, tile_expert))


@pytest.mark.parametrize("shape", grouped_shapes.SHAPES)
def test_grouped_matmul_gradients(shape):
    x, w, tile_expert = grouped_case(*shape)

    def total(implementation):
        def of(x, w):
            y = grouped_matmul(x, w, tile_expert, implementation=implementation)
            return jnp.sum(jnp.sin(y))

        return jax.jit(jax.grad(of, (0, 1)))(x, w)

    for got, wanted in zip(total("xla"), total("reference"), strict=True):
        assert_near(got, wanted)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    block=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_grouped_matmul_drawn(sizes, block, seed):
    x, w, tile_expert = grouped_case(sizes, block, 3, 2, seed)
    assert_near(grouped_matmul(x, w, tile_expert), grouped_by_hand(x, w, tile_expert))


def test_grouped_matmul_refuses():
    x, w, tile_expert = grouped_case((2, 3), 4, 3, 2)
    with pytest.raises(ValueError, match="do not divide"):
        grouped_matmul(x[:-1], w, tile_expert)
    with pytest.raises(ValueError, match="width 3"):
        grouped_matmul(x, w[:, :2], tile_expert)
    with pytest.raises(ValueError, match="unknown implementation 'pallas'"):
        grouped_matmul(x, w, tile_expert, implementation="pallas")


# ---- mla_attention ------------------------------------------------------------------------------


def attention_case(shape, seed=0):
    rng = np.random.default_rng(seed)
    b, t, n, a, h = shape[:5]
    i = shape.i or n
    q, k = (rng.standard_normal((b, t, heads, a)).astype(np.float32) for heads in (n, i))
    v = rng.standard_normal((b, t, i, h)).astype(np.float32)
    segments = np.zeros((b, t), np.int32)
    positions = np.zeros((b, t), np.int32)
    rows = [shape.documents, *([(t,)] * (b - 1))]
    for row, documents in enumerate(rows):
        start = 0
        for number, length in enumerate(documents, 1):
            segments[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    return tuple(map(jnp.asarray, (q, k, v, segments, positions)))


def a_head_each(q, k, v, *rest):
    """Keys and values copied to every query head of their group."""
    group = q.shape[2] // k.shape[2]
    return q, np.repeat(k, group, axis=2), np.repeat(v, group, axis=2), *rest


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("shape", attention_shapes.SHAPES)
def test_mla_attention(shape, implementation):
    case = attention_case(shape)
    out = mla_attention(*case, 0.3, implementation=implementation)
    wanted, _ = reference_mla.attend(*a_head_each(*map(np.asarray, case)), 0.3)
    real = np.asarray(case[3] != 0)
    assert_near(np.asarray(out)[real], np.asarray(wanted)[real])
    assert not np.asarray(out)[~real].any()


@pytest.mark.parametrize("block", [8, pytest.param(128, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("shape", attention_shapes.SHAPES)
def test_mla_attention_gradients(shape, block, monkeypatch):
    monkeypatch.setattr(xla, "block_rows", lambda length: block)
    q, k, v, segments, positions = attention_case(shape)
    real = (segments != 0)[..., None, None]

    def gradients(attend):
        def of(q, k, v):
            return jnp.sum(jnp.where(real, jnp.sin(attend(q, k, v, segments, positions, 0.3)), 0))

        return jax.jit(jax.grad(of, (0, 1, 2)))(q, k, v)

    def blocked(*args):
        return mla_attention(*args, implementation="xla")

    def plain(*args):
        return mla_attention(*args, implementation="reference")

    for got, wanted in zip(gradients(blocked), gradients(plain), strict=True):
        assert_near(got, wanted)


def value_and_gradients(attend):
    """Outputs, and gradients of q, k, v for a loss that rows add to: compiled, `rest` as it is."""

    @jax.jit
    def of(q, k, v, real, *rest):
        def loss(q, k, v):
            out = attend(q, k, v, *rest)
            return jnp.sum(jnp.where(real[..., None, None], jnp.sin(out), 0)), out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    return of


PARTED = (  # what is cut, and into how many
    (attention_shapes.SHAPES[0], 2),  # one document over the border
    (attention_shapes.SHAPES[1], 4),  # tiles smaller than the block asked for
    (attention_shapes.SHAPES[4], 4),
    (attention_shapes.SHAPES[5], 2),
    (attention_shapes.Shape(2, 96, 4, 12, 8, (10, 38, 31), 1), 4),  # the last part half padding
    (attention_shapes.Shape(1, 3, 2, 8, 4, (2,)), 3),  # one query a part
)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("shape", "parts"), PARTED)
def test_mla_attention_of_parts_of_the_rows(shape, parts, implementation, monkeypatch):
    """Queries cut into parts: the same outputs and gradients, by one program for all parts."""
    monkeypatch.setattr(xla, "block_rows", lambda length: 8)  # several tiles a part
    q, k, v, segments, positions = attention_case(shape)
    real = segments != 0

    def whole(q, k, v, *ids):
        return mla_attention(q, k, v, *ids, 0.3, implementation="reference")

    def part(q, k, v, segments, positions, first_row):
        arguments = q, k, v, segments, positions, 0.3
        return mla_attention(*arguments, first_row=first_row, implementation=implementation)

    wanted = value_and_gradients(whole)(q, k, v, real, segments, positions)
    program = value_and_gradients(part)
    size = shape.t // parts
    results = []
    for row in range(0, shape.t, size):
        rows = slice(row, row + size)
        ids = segments, positions, jnp.int32(row)
        results.append(program(q[:, rows], k, v, real[:, rows], *ids))
    assert program._cache_size() == 1
    out, dq, dk, dv = zip(*results, strict=True)
    got = np.concatenate(out, 1), np.concatenate(dq, 1), np.sum(dk, 0), np.sum(dv, 0)
    for one, other in zip(got, wanted, strict=True):
        assert_near(one, other)
    assert not got[0][~np.asarray(real)].any()


def test_a_part_visits_only_the_tiles_it_needs(monkeypatch):
    """Keys after the part, and of documents that ended before it, may hold anything."""
    monkeypatch.setattr(xla, "block_rows", lambda length: 8)
    shape = attention_shapes.Shape(1, 64, 2, 8, 8, (16, 28, 20))
    q, k, v, segments, positions = attention_case(shape)
    k, v = (x.at[:, :16].set(jnp.nan).at[:, 48:].set(jnp.nan) for x in (k, v))

    def part(q, k, v, *ids):
        first_row = jnp.int32(32)
        return mla_attention(q, k, v, *ids, 0.3, first_row=first_row, implementation="xla")

    rows = slice(32, 48)
    program = value_and_gradients(part)
    out, dq, dk, dv = program(q[:, rows], k, v, segments[:, rows] != 0, segments, positions)
    assert np.isfinite(out).all()
    assert np.isfinite(dq).all()
    for gradient in map(np.asarray, (dk, dv)):
        assert np.isfinite(gradient).all()
        assert gradient[:, 16:48].any(axis=(0, 2, 3)).all()
        assert not gradient[:, :16].any()
        assert not gradient[:, 48:].any()


@pytest.mark.parametrize("gathered", [True, False])
def test_a_part_of_the_rows_on_every_device(gathered):
    """Inside `shard_map`, its checks on: keys gathered there, or the same everywhere already."""
    shape = attention_shapes.Shape(2, 32, 4, 8, 12, (13, 15), 2)
    q, k, v, segments, positions = attention_case(shape)
    real = segments != 0
    mesh = jax.make_mesh((2, 4), ("data", "context"))
    cut, same = jax.P("data", "context"), jax.P("data")

    def local(q, k, v, segments, positions):
        if gathered:
            k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
        first_row = jax.lax.axis_index("context") * q.shape[1]
        return mla_attention(q, k, v, segments, positions, 0.3, first_row=first_row)

    of_keys = cut if gathered else same
    specs = cut, of_keys, of_keys, same, same
    attend = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=cut)

    def whole(*arguments):
        return mla_attention(*arguments, 0.3, implementation="reference")

    wanted = value_and_gradients(whole)(q, k, v, real, segments, positions)
    with jax.set_mesh(mesh):
        specs = *specs[:3], cut, same, same
        arguments = q, k, v, real, segments, positions
        placed = (jax.device_put(x, spec) for x, spec in zip(arguments, specs, strict=True))
        results = value_and_gradients(attend)(*placed)
    for got, one in zip(results, wanted, strict=True):
        assert_near(got, one)


def test_rows_that_do_not_fit_are_refused():
    q, ids = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="4 queries of 8 rows need first_row"):
        mla_attention(q[:, :4], q, q, ids, ids, 1.0)
    with pytest.raises(ValueError, match="8 rows do not divide into parts of 3 queries"):
        mla_attention(q[:, :3], q, q, ids, ids, 1.0, first_row=jnp.int32(0))
    with pytest.raises(ValueError, match="4 rows do not divide into parts of 8 queries"):
        mla_attention(q, q[:, :4], q[:, :4], ids[:, :4], ids[:, :4], 1.0, first_row=0)
    for row in (2, 8, -4):
        with pytest.raises(ValueError, match=f"first_row {row} is not a multiple of 4 below 8"):
            mla_attention(q[:, :4], q, q, ids, ids, 1.0, first_row=row)
    with pytest.raises(ValueError, match="8 rows of keys, 8 of values, 4 segments, 8 positions"):
        mla_attention(q[:, :4], q, q, ids[:, :4], ids, 1.0, first_row=0)


@pytest.mark.parametrize("parts", [1, 4])
def test_mla_attention_memory_is_linear(parts):
    """No [T, S] array, forward or backward: temporaries are a few copies of the operands."""

    def temporaries(t):
        q, k = (jax.ShapeDtypeStruct((1, s, 2, 16), jnp.float32) for s in (t // parts, t))
        ids = jax.ShapeDtypeStruct((1, t), jnp.int32)
        first_row = None if parts == 1 else jax.ShapeDtypeStruct((), jnp.int32)

        def of(q, k, v, segments, positions, first_row):
            return mla_attention(q, k, v, segments, positions, 0.3, first_row=first_row).sum()

        compiled = jax.jit(jax.grad(of, (0, 1, 2))).lower(q, k, k, ids, ids, first_row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(32_768), temporaries(131_072)
    print(f"temporaries {small / 1e6:.1f} MB at 32K, {large / 1e6:.1f} MB at 128K")
    assert large < 4.05 * small
    operand = 131_072 * 2 * 16 * 4
    assert large < 12 * operand  # one row of scores a query would be 8,192 of them


def test_grouped_keys_are_not_repeated():
    """Eight query heads a key head cost no copy of the keys; the gradient of each sums them."""

    def temporaries(n, i):
        q, k = (jax.ShapeDtypeStruct((1, 4096, heads, 32), jnp.float32) for heads in (n, i))
        ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
        compiled = jax.jit(lambda *args: mla_attention(*args, 0.3)).lower(q, k, k, ids, ids)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    keys_and_values = 2 * 8 * 4096 * 32 * 4  # of eight heads
    assert temporaries(8, 8) - temporaries(8, 1) > 0.8 * 7 / 8 * keys_and_values


def test_heads_that_do_not_divide_are_refused():
    q, ids = jnp.ones((1, 4, 6, 8)), jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="6 query heads, 4 of keys and 4 of values"):
        mla_attention(q, q[:, :, :4], q[:, :, :4], ids, ids, 1.0)
    with pytest.raises(ValueError, match="6 query heads, 3 of keys and 2 of values"):
        mla_attention(q, q[:, :, :3], q[:, :, :2], ids, ids, 1.0)
    cache = jnp.ones((1, 1, 64, 4, 8))
    with pytest.raises(ValueError, match="6 query heads, 4 of keys"):
        gqa_decode(q, cache, cache, jnp.int32(0), ids[:, :1] - 1, ids[0, :1], ids, 1.0)


# ---- mla_decode ---------------------------------------------------------------------------------


def decode_case(shape, seed=0):
    """A cache of three layers, pages in random order, and garbage where none was written."""
    rng = np.random.default_rng(seed)
    b, z = len(shape.lengths), shape.c + shape.r
    pages = b * shape.table_width
    cache = rng.standard_normal((3, pages, 64, z)).astype(np.float32)
    table = rng.permutation(pages).reshape(b, shape.table_width).astype(np.int32)
    q = rng.standard_normal((b, shape.t, shape.n, z)).astype(np.float32)
    lengths = np.array(shape.lengths, np.int32)
    positions = lengths[:, None] - shape.t + np.arange(shape.t, dtype=np.int32)
    return tuple(map(jnp.asarray, (q, cache, table, lengths, positions)))


def decode_by_hand(shape, q, cache, table, lengths, positions, layer):
    q, cache, table, lengths, positions = map(np.asarray, (q, cache, table, lengths, positions))
    out = np.zeros((*q.shape[:3], shape.c))
    lse = np.full(q.shape[:3], -1e30)
    for b, length in enumerate(lengths):
        entries = cache[layer, table[b]].reshape(-1, cache.shape[-1])
        for t, position in enumerate(positions[b]):
            seen = min(length, position + 1)
            if seen > 0:
                attended = reference_mla.attend_latent(q[b, t], entries[:seen], shape.c, 0.2)
                out[b, t], lse[b, t] = attended
    return out, lse


def fp8_cache(cache, latent_dim):
    """A cache of float32 entries in FP8, and the same made wide again."""
    narrow, rope = round_latents(cache, latent_dim)
    wide = jnp.concatenate([dequantize(narrow), rope], axis=-1)
    return Fp8Latents(narrow.q, jnp.swapaxes(narrow.scale, -1, -2), rope), wide


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("shape", [*decode_shapes.SHAPES, decode_shapes.FP8])
def test_mla_decode_of_fp8_latents(shape, implementation):
    q, cache, table, lengths, positions = decode_case(shape)
    narrow, wide = fp8_cache(cache, shape.c)
    assert 0.002 < np.abs(wide - cache)[..., : shape.c].mean() < 0.05
    pages = table, lengths, positions, 0.2
    out, lse = mla_decode(
        q, narrow, jnp.int32(1), *pages, value_dim=shape.c, implementation=implementation
    )
    wanted, wanted_lse = decode_by_hand(shape, q, wide, table, lengths, positions, 1)
    assert_near(out, wanted)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


def test_fp8_latents_take_656_bytes_a_token():
    narrow, rope = round_latents(jnp.zeros((1, 1, 64, 576), jnp.bfloat16), 512)
    cache = Fp8Latents(narrow.q, jnp.swapaxes(narrow.scale, -1, -2), rope)
    assert sum(x.nbytes for x in cache) == 656 * 64


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("shape", decode_shapes.SHAPES)
def test_mla_decode_of_parts_combines_to_the_whole(shape, parts):
    q, cache, table, lengths, positions = decode_case(shape)
    layer = jnp.int32(1)
    found = []
    for part in range(parts):  # every parts-th page, as if on a device of its own
        length = sequence_part(lengths, part, parts, 64)
        seen = sequence_part(positions + 1, part, parts, 64) - 1
        own = table[:, part::parts]
        if own.shape[1]:
            pages = own, length, seen
            found.append(mla_decode(q, cache, layer, *pages, 0.2, value_dim=shape.c))
    out, lse = combine(*map(jnp.stack, zip(*found, strict=True)))
    wanted, wanted_lse = decode_by_hand(shape, q, cache, table, lengths, positions, 1)
    assert_near(out, wanted)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("shape", decode_shapes.SHAPES)
def test_mla_decode(shape, implementation):
    q, cache, table, lengths, positions = decode_case(shape)

    @jax.jit
    def decode(q, cache, layer, *pages):
        options = {"value_dim": shape.c, "implementation": implementation}
        return mla_decode(q, cache, layer, *pages, 0.2, **options)

    out, lse = decode(q, cache, jnp.int32(1), table, lengths, positions)
    wanted, wanted_lse = decode_by_hand(shape, q, cache, table, lengths, positions, 1)
    assert_near(out, wanted)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


def test_mla_decode_ignores_pages_past_the_length():
    shape = decode_shapes.Shape(1, 2, 8, 4, (70, 3), 20)
    q, cache, table, lengths, positions = decode_case(shape)
    arguments = (table, lengths, positions, 0.2)
    layer = jnp.int32(0)
    out, _ = mla_decode(q, cache, layer, *arguments, value_dim=8)
    cache, table, lengths = np.asarray(cache), np.asarray(table), np.asarray(lengths)
    poisoned = np.full_like(cache, np.nan)
    for b, length in enumerate(lengths):
        pages = table[b, : -(-length // 64)]
        poisoned[:, pages] = cache[:, pages]
    table = np.where(np.arange(20) < -(-lengths[:, None] // 64), table, 10_000)
    arguments = (jnp.asarray(table), jnp.asarray(lengths), positions, 0.2)
    again, _ = mla_decode(q, jnp.asarray(poisoned), layer, *arguments, value_dim=8)
    np.testing.assert_array_equal(out, again)


# ---- gqa_decode ---------------------------------------------------------------------------------


def gqa_case(shape, seed=0):
    """As `decode_case`, with keys and values of several heads."""
    rng = np.random.default_rng(seed)
    b, (t, n, i, a, h) = len(shape.lengths), shape[:5]
    pages = b * shape.table_width
    k, v = (rng.standard_normal((3, pages, 64, i, w)).astype(np.float32) for w in (a, h))
    table = rng.permutation(pages).reshape(b, shape.table_width).astype(np.int32)
    q = rng.standard_normal((b, t, n, a)).astype(np.float32)
    lengths = np.array(shape.lengths, np.int32)
    positions = lengths[:, None] - t + np.arange(t, dtype=np.int32)
    return tuple(map(jnp.asarray, (q, k, v, table, lengths, positions)))


def gqa_by_hand(q, k, v, table, lengths, positions, layer):
    q, k, v, table, lengths, positions = map(np.asarray, (q, k, v, table, lengths, positions))
    group = q.shape[2] // k.shape[3]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    lse = np.full(q.shape[:3], -1e30)
    for b, length in enumerate(lengths):
        keys, values = (x[layer, table[b]].reshape(-1, *x.shape[3:]) for x in (k, v))
        for t, position in enumerate(positions[b]):
            seen = min(length, position + 1)
            for n in range(q.shape[2] if seen > 0 else 0):
                scores = keys[:seen, n // group].astype(np.float64) @ q[b, t, n] * 0.2
                lse[b, t, n] = np.log(np.sum(np.exp(scores)))
                out[b, t, n] = np.exp(scores - lse[b, t, n]) @ values[:seen, n // group]
    return out, lse


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
@pytest.mark.parametrize("shape", gqa_shapes.SHAPES)
def test_gqa_decode(shape, implementation):
    q, k, v, *pages = gqa_case(shape)

    @jax.jit
    def decode(q, k, v, layer, *pages):
        return gqa_decode(q, k, v, layer, *pages, 0.2, implementation=implementation)

    out, lse = decode(q, k, v, jnp.int32(1), *pages)
    wanted, wanted_lse = gqa_by_hand(q, k, v, *pages, 1)
    assert_near(out, wanted)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


def test_gqa_decode_ignores_pages_past_the_length():
    shape = gqa_shapes.Shape(1, 4, 2, 8, 4, (70, 3), 20)
    q, k, v, table, lengths, positions = gqa_case(shape)
    layer = jnp.int32(0)
    out, _ = gqa_decode(q, k, v, layer, table, lengths, positions, 0.2)
    table, used = np.asarray(table), -(-np.asarray(lengths) // 64)
    pages = np.concatenate([row[:count] for row, count in zip(table, used, strict=True)])
    poisoned = [np.full_like(x, np.nan) for x in (k, v)]
    for x, clean in zip(poisoned, (k, v), strict=True):
        x[:, pages] = np.asarray(clean)[:, pages]
    table = np.where(np.arange(20) < used[:, None], table, table[:, :1])
    again, _ = gqa_decode(
        q, *map(jnp.asarray, poisoned), layer, jnp.asarray(table), lengths, positions, 0.2
    )
    np.testing.assert_array_equal(out, again)


def test_an_unknown_implementation_is_refused():
    q, k, v, *pages = gqa_case(gqa_shapes.SHAPES[0])
    with pytest.raises(ValueError, match="unknown implementation 'pallas'; known: xla, reference"):
        gqa_decode(q, k, v, jnp.int32(0), *pages, 0.2, implementation="pallas")


# ---- the benchmark of what runs on a CPU --------------------------------------------------------


def test_the_benchmark_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)  # for the process's whole life
    tiny = ["--tokens=256", "--groups=4", "--rows=64", "--repeats=2"]
    out = tmp_path / "cpu.json"
    assert bench_cpu_kernels.main(["bench", *tiny, f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["groups"]["4"]["over_dense"].keys() == {"grouped_matmul", "ragged_dot"}
    assert found["rows"]["64"]["over_plain"].keys() == {"mla_attention"}
    assert bench_cpu_kernels.main(["bench", *tiny, "--groups=5"]) == 2
    message = "256 tokens do not divide into 5 groups of whole tiles of 64"
    assert message in capsys.readouterr().err
    assert bench_cpu_kernels.main(["bench", *tiny, "--rows=96"]) == 2
    assert "256 tokens do not divide into sequences of 96" in capsys.readouterr().err
