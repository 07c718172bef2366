"""Attention's Hopper kernels, interpreted on the CPU: their numbers, and that nothing races."""

import sys
import types

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.choose import Uncovered
from pallas_kernels.hopper import compat
from pallas_kernels.mla_attention import (
    hopper,
    hopper_forward,
    hopper_key_gradients,
    hopper_query_gradient,
    hopper_ring,
    hopper_spans,
    hopper_tiles,
    mla_attention,
    tokamax,
)

# Relative norms: what is summed is rounded to BF16, by 2^-9 at most, and so is the sum; the
# gradient of keys is made of products of two roundings.
OUT, GRADIENTS = 2 * 2.0**-9, 3 * 2.0**-9


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def pack(documents, rows, batch=1):
    """(segments, positions) of rows that begin with a document each, but for negative padding."""
    segments, positions = np.zeros((2, batch, rows), np.int32)
    row = 0
    for number, length in enumerate(documents):
        if length > 0:
            segments[:, row : row + length] = number + 1
            positions[:, row : row + length] = np.arange(rows)[: max(min(length, rows - row), 0)]
        row += abs(length)
    return jnp.asarray(segments), jnp.asarray(positions)


def relative(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def interpret(function, *arguments, detect_races=False):
    with compat.interpreted(detect_races=detect_races):
        return jax.block_until_ready(function(*arguments))


CASES = (  # B, N, I, A, H, rows, documents (padding is negative), first row and queries
    (1, 2, 1, 64, 64, 137, (137,), None),  # rows that no tile, and no copy, divides; shared keys
    (1, 1, 1, 192, 128, 256, (40, 150, 60), (128, 128)),  # V3's widths; the second part of two
    (2, 1, 1, 24, 40, 144, (70, -9, 60), None),  # padding between documents; narrow
    pytest.param((1, 1, 1, 64, 128, 640, (640,), None), marks=pytest.mark.nightly),
    pytest.param((1, 4, 2, 128, 64, 300, (1, 299), None), marks=pytest.mark.nightly),
    pytest.param((2, 1, 1, 64, 64, 384, (-300, 84), (192, 192)), marks=pytest.mark.nightly),
    pytest.param((1, 1, 1, 64, 64, 512, (100, 30, 300), (256, 128)), marks=pytest.mark.nightly),
)


@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients(case):
    b, n, i, a, h, rows, documents, part = case
    first_row, queries = (None, rows) if part is None else (jnp.int32(part[0]), part[1])
    ids = pack(documents, rows, b)
    operands = (
        normal(b, queries, n, a),
        normal(b, rows, i, a, seed=1),
        normal(b, rows, i, h, seed=2),
    )
    d_out = normal(b, queries, n, h, seed=3)

    def run(*operands, name):
        def attend(q, k, v):
            options = {"first_row": first_row, "implementation": name}
            return mla_attention(q, k, v, *ids, a**-0.5, **options)

        out, pull = jax.vjp(attend, *operands)
        return out, pull(d_out.astype(out.dtype))

    out, gradients = interpret(lambda *x: run(*x, name="hopper"), *operands)
    wide = [x.astype(jnp.float32) for x in operands]
    wanted, wanted_gradients = run(*wide, name="reference")
    assert relative(out, wanted) < OUT
    for got, should, operand in zip(gradients, wanted_gradients, operands, strict=True):
        assert got.dtype == operand.dtype
        assert relative(got, should) < GRADIENTS
    start = 0 if part is None else part[0]
    padding = np.asarray(ids[0] == 0)
    assert not np.asarray(out)[padding[:, start : start + queries]].any()
    for gradient in gradients[1:]:
        assert not np.asarray(gradient)[padding].any()


def test_rows_of_padding_have_a_finite_log_sum_exp():
    q, ids = normal(1, 128, 1, 64), pack((-64, 8), 128)
    _, lse_BTN = interpret(lambda q: hopper.forward(q, q, q, *ids, 1.0, None), q)
    scores = np.asarray(q, np.float64)[0, 64:72, 0]
    scores = np.where(np.tril(np.ones((8, 8))), scores @ scores.T, -np.inf)
    wanted = np.logaddexp.reduce(scores, axis=1)
    np.testing.assert_allclose(lse_BTN[0, 64:72, 0], wanted, rtol=1e-5)
    assert np.isfinite(lse_BTN).all()


def test_what_is_not_covered_is_said():
    q, ids = normal(1, 8, 1, 64), pack((8,), 8)
    with pytest.raises(Uncovered, match="attention in bfloat16, float32: bfloat16 only"):
        hopper.forward(q.astype(jnp.float32), q, q, *ids, 1.0, None)
    wide = normal(1, 8, 1, 256)
    with pytest.raises(Uncovered, match="keys 256 and values 64 wide; up to 192 and 128"):
        hopper.forward(wide, wide, q, *ids, 1.0, None)
    with pytest.raises(Uncovered, match=r"a scale of -1\.0; positive ones are taken"):
        hopper.forward(q, q, q, *ids, -1.0, None)
    with pytest.raises(Uncovered, match="nothing to attend to"):
        hopper.forward(q[:0], q[:0], q[:0], *ids, 1.0, None)


# ---- which tiles see each other ------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    documents=st.lists(
        st.integers(1, 300).flatmap(lambda size: st.sampled_from([size, -size])), max_size=5
    ),
    parts=st.sampled_from([1, 2, 4]),
    part=st.integers(0, 3),
    tiles=st.sampled_from([(128, 128), (128, 64), (64, 128)]),
)
def test_spans(documents, parts, part, tiles):
    """Runs of tiles have all that is seen, and no more; only whole tiles go without a mask."""
    rows, (query_tile, key_tile) = 512, tiles
    segments, _ = pack(documents, rows)
    queries = rows // parts
    first_row = part % parts * queries
    spans = hopper_spans.find_spans(segments, queries, jnp.int32(first_row), 128)
    of_key = np.asarray(segments)[0]
    of_query = of_key[first_row : first_row + queries]
    row = first_row + np.arange(queries)
    seen = (of_query[:, None] == of_key) & (of_query != 0)[:, None]
    seen &= row[:, None] >= np.arange(rows)

    tiled = seen.reshape(queries // query_tile, query_tile, rows // key_tile, key_tile)
    any_seen = tiled.any((1, 3))
    all_seen = tiled.all((1, 3))
    last_start = hopper_spans.last_starts(spans, query_tile)[0]
    first_end = hopper_spans.first_ends(spans, key_tile)[0]
    runs = (
        (hopper_spans.keys_of_queries(spans, query_tile, key_tile), any_seen),
        (hopper_spans.queries_of_keys(spans, query_tile, key_tile), any_seen.T),
    )
    for run, needed in runs:
        for begin, count, tile in zip(run.begin[0], run.count[0], needed, strict=True):
            wanted = np.flatnonzero(tile)
            if len(wanted):
                assert begin <= wanted[0]
                assert begin + count >= wanted[-1] + 1
            if of_key.all():  # padding may cost a tile more
                assert count == len(wanted)
    for i, j in np.argwhere(any_seen):
        before = (j + 1) * key_tile <= first_row + i * query_tile + 1
        assert (before and j * key_tile >= last_start[i]) == all_seen[i, j]
        after = first_row + (i + 1) * query_tile
        assert (before and after <= first_end[j]) == all_seen[i, j]


# ---- races --------------------------------------------------------------------------------------


def race_case():
    """The last 128 of 384 rows, whose steps are more than there are stages."""
    rows, queries = 384, 128
    segments, _ = pack((rows,), rows)
    spans = hopper_spans.find_spans(segments, queries, jnp.int32(rows - queries), 128)
    q, d_out = normal(1, queries, 2, 64), normal(1, queries, 2, 64, seed=1)
    k, v = normal(1, rows, 1, 64, seed=2), normal(1, rows, 1, 64, seed=3)
    numbers = jnp.zeros((2, 1, 2, queries))
    return hopper_ring.Operands(q, k, v, d_out, *numbers, spans=spans)


def forward_races():
    at = race_case()
    interpret(hopper_forward.attend, *at[:3], at.spans, 0.1, detect_races=True)
    return compat.races_found()


def gradients_race(function):
    interpret(function, race_case(), 0.1, detect_races=True)
    return compat.races_found()


GRADIENTS_OF = (hopper_query_gradient.query_gradient, hopper_key_gradients.key_gradients)


def test_forward_does_not_race():
    assert not forward_races()


@pytest.mark.parametrize("function", GRADIENTS_OF)
def test_gradients_do_not_race(function):
    assert not gradients_race(function)


@pytest.mark.parametrize("races", [forward_races, lambda: gradients_race(GRADIENTS_OF[1])])
def test_results_that_are_not_committed_race(monkeypatch, races):
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    assert races()


def test_two_warpgroups_on_the_same_rows_race(monkeypatch):
    monkeypatch.setattr(
        hopper_tiles, "rows_of", lambda tile, half: pl.ds(tile * hopper_tiles.ROWS, 64)
    )
    assert forward_races()


def test_a_stage_that_is_filled_too_early_is_found(monkeypatch):
    load = hopper_ring.load

    def careless(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plgpu, "barrier_wait", lambda barrier: None)
            load(*arguments)

    monkeypatch.setattr(hopper_ring, "load", careless)
    # Which it is depends on whether the copy or its reader sees it first.
    with pytest.raises(Exception, match=r"no threads observed phase|is already at phase"):
        gradients_race(GRADIENTS_OF[0])


# ---- tokamax ------------------------------------------------------------------------------------


def test_tokamax_is_needed_only_where_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    q, ids = normal(1, 8, 1, 64), pack((8,), 8)
    with pytest.raises(Uncovered, match="tokamax is not installed"):
        mla_attention(q, q, q, *ids, 1.0, implementation="tokamax")


@pytest.mark.parametrize("first_row", [None, 20])
def test_what_tokamax_is_told_that_queries_see(first_row):
    segments, _ = pack((10, -4, 20), 40)
    part = (40, None) if first_row is None else (20, jnp.int32(first_row))
    mask = tokamax._mask(types.SimpleNamespace(Mask=dict), segments, *part)
    row, key = np.arange(40)[:, None], np.arange(40)
    of_key = np.asarray(segments)[0]
    seen = (of_key[:, None] == of_key) & (of_key != 0)[:, None] & (row >= key)
    rows = slice(first_row, None)
    told = (key >= mask["k_start"][0, 0][:, None]) & (row[rows] >= key)
    if first_row is None:
        assert mask["is_causal"]
    else:
        told &= key < mask["k_end"][0, 0][:, None]
    np.testing.assert_array_equal(told, seen[rows])
