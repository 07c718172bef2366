"""Continuing many prompts through few slots: as the trainer sees it, and whatever comes when."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dsjax.errors import InputError
from dsjax.infer.batcher import Batcher, Request
from dsjax.infer.generate import generate
from dsjax.infer.sampler import Sampling
from dsjax.infer.slots import Drawing, SlotSizes
from dsjax.model.transformer import build, merge, split
from dsjax.overrides import override
from dsjax.presets import preset
from dsjax.rl.rows import Sequences, pack, place
from dsjax.train.vocabulary import Draw, log_probs
from tests.helpers import compilations

ALLOWED, STOPS = 60, tuple(range(12))  # about every fifth token ends a sequence
DRAWING = Drawing(allowed=ALLOWED, stop_ids=STOPS)
SIZES = SlotSizes(slots=2, max_prompt=10, max_tokens=8, keep_routing=True)
WARM = Sampling(temperature=0.8)
# float32 on CPU. Two programs that sum in another order differ by some 1e-6 here.
GAP = 1e-4


class Sampler:
    """A model's slots, with a handful of programs."""

    def __init__(self, name, sizes=SIZES, seed=3, drawing=DRAWING):
        config = override(preset(name), "model.vocab_size=64", "model.init_std=0.3")
        if name == "nano":  # its experts alone: half the programs
            model = dataclasses.replace(config.model, stacks=config.model.stacks[1:], mtp=None)
            config = dataclasses.replace(config, model=model)
        self.graphdef, self.params, self.bias = split(build(config)(jax.random.key(0)))
        self.batcher = Batcher(
            *(self.graphdef, self.params, self.bias),
            sizes=sizes,
            drawing=drawing,
            seed=seed,
        )

    def __call__(self, requests, sampling=WARM, params=None, **more):
        return self.batcher(params or self.params, self.bias, requests, sampling, **more)

    def scored(self, requests, found):
        """Log probabilities of the new tokens and routing, by one forward without a cache."""
        sequences = as_sequences(requests, found)
        lengths = sequences.inputs_N.tolist()
        places = place(lengths, max(lengths) + 3)
        rows = 1 + max(at.row for at in places.values())
        told = {"of_completions": {}, "of_sequences": {}}
        batch = pack(sequences, places, row_length=max(lengths) + 3, rows=rows, pad_id=0, **told)
        log_BT, routing = _scored(self.graphdef, self.params, self.bias, batch)
        return sequences, places, np.asarray(log_BT), jax.device_get(routing)


@functools.partial(jax.jit, static_argnames="graphdef")
def _scored(graphdef, params, bias, batch):
    model = merge(graphdef, params, bias)
    output = model(**{name: batch[name] for name in ("tokens_BT", "positions_BT", "segments_BT")})
    draw = Draw(WARM.temperature, ALLOWED)
    log_BT, _ = log_probs(model, output.hidden_BTD, batch["targets_BT"], draw)
    return log_BT, output.aux.routing


def as_sequences(requests, found):
    tokens_NY = np.zeros((len(requests), SIZES.positions), np.int32)
    for row, request, tokens, count in zip(
        tokens_NY, requests, found.tokens_NG, found.count_N, strict=True
    ):
        length = len(request.prompt)
        row[:length] = request.prompt
        row[length : length + count] = tokens[:count]
    lengths = np.array([len(request.prompt) for request in requests], np.int32)
    return Sequences(tokens_NY, lengths, found.count_N, {})


@functools.cache
def sampler(name):
    return Sampler(name)


@functools.cache
def requests():
    """Groups of one prompt, three and one and so on, of all lengths that there may be."""
    rng = np.random.default_rng(0)
    found = []
    for length, times in ((10, 4), (3, 1), (1, 3), (7, 2), (10, 1), (5, 3)):
        prompt = tuple(rng.integers(12, ALLOWED, length).tolist())
        found += [Request(prompt, 100 + len(found) + i) for i in range(times)]
    return tuple(found)


@functools.cache
def continued(name):
    return sampler(name)(requests())


MODELS = pytest.mark.parametrize("name", ["nano", "nano_dense"])  # MLA and experts; GQA


@MODELS
def test_the_sampler_says_what_the_trainer_says(name):
    """With refill, prefill that a group shares, and prompts of different widths; routing, too."""
    found = continued(name)
    sequences, places, log_BT, routing = sampler(name).scored(requests(), found)
    assert set(found.routing) == set(routing) == ({"moe"} if name == "nano" else set())
    for n, at in places.items():
        prompt, count = int(sequences.prompt_N[n]), int(found.count_N[n])
        first, length = at.start + prompt - 1, prompt + count - 1
        wanted = log_BT[at.row, first : first + count]
        np.testing.assert_allclose(found.log_probs_NG[n, :count], wanted, atol=GAP, rtol=0)
        assert (wanted < -1e-3).any()
        for stack, kept in found.routing.items():
            chosen = routing[stack][:, at.row, at.start : at.start + length]
            np.testing.assert_array_equal(kept[n, :length], np.moveaxis(chosen, 0, 1))


@MODELS
def test_a_sequence_ends_at_its_first_stop_token_or_its_budget(name):
    found = continued(name)
    assert found.stopped_N.any()
    assert not found.stopped_N.all()
    for tokens, count, stopped in zip(found.tokens_NG, found.count_N, found.stopped_N, strict=True):
        ends = np.isin(tokens[:count], STOPS)
        assert not ends[:-1].any()
        assert ends[-1] == stopped
        assert stopped or count == SIZES.max_tokens
        assert (tokens[:count] < ALLOWED).all()


def assert_same(found, wanted, order):
    """The same sequences; log probabilities of other programs may differ in their last bits."""
    for n, m in enumerate(order):
        count = int(wanted.count_N[m])
        assert found.count_N[n] == count
        assert found.stopped_N[n] == wanted.stopped_N[m]
        np.testing.assert_array_equal(found.tokens_NG[n, :count], wanted.tokens_NG[m, :count])
        np.testing.assert_allclose(
            found.log_probs_NG[n, :count], wanted.log_probs_NG[m, :count], atol=1e-5
        )


@MODELS
def test_tokens_depend_on_a_sequences_number_alone(name):
    """Not on what came before, when it was let in, or who its neighbours are."""
    n = len(requests())
    backwards = list(range(n))[::-1]
    for order in (backwards, [4], [1, 9], list(range(0, n, 2))):
        found = sampler(name)([requests()[m] for m in order])
        assert_same(found, continued(name), order)
    again = sampler(name)([Request(requests()[0].prompt, 7)])  # another number: another one
    count = min(again.count_N[0], continued(name).count_N[0])
    assert (again.tokens_NG[0, :count] != continued(name).tokens_NG[0, :count]).any()


@MODELS
def test_a_budget_of_one_ends_everything_at_once(name):
    """As prompts go in, without a single step; and a slot is free again."""
    found = sampler(name)(requests(), max_tokens=1)
    np.testing.assert_array_equal(found.count_N, 1)
    np.testing.assert_array_equal(found.tokens_NG[:, 0], continued(name).tokens_NG[:, 0])
    np.testing.assert_array_equal(found.stopped_N, np.isin(found.tokens_NG[:, 0], STOPS))
    assert_same(sampler(name)(requests()), continued(name), range(len(requests())))


@pytest.mark.parametrize("name", ["nano_dense", pytest.param("nano", marks=pytest.mark.nightly)])
def test_greedy_is_what_generate_finds(name):
    prompts = sorted({request.prompt for request in requests()})
    found = sampler(name)([Request(p, i) for i, p in enumerate(prompts)], Sampling())
    wanted = generate(
        *(sampler(name).graphdef, sampler(name).params, sampler(name).bias),
        [list(prompt) for prompt in prompts],
        max_tokens=SIZES.max_tokens,
        sampling=Sampling(),
        stop_ids=STOPS,
        allowed=ALLOWED,
        seed=0,
    )
    np.testing.assert_array_equal(found.count_N, wanted.length_B)
    np.testing.assert_array_equal(found.stopped_N, wanted.stopped_B)
    for tokens, count, others in zip(found.tokens_NG, found.count_N, wanted.tokens_BG, strict=True):
        np.testing.assert_array_equal(tokens[:count], others[:count])


def test_nothing_is_compiled_again():
    """For other weights, prompts, temperatures or numbers of requests."""
    continued("nano")
    other = jax.tree.map(lambda x: x * 1.1, sampler("nano").params)
    jax.block_until_ready(other)
    with compilations() as seen:
        found = sampler("nano")(requests()[::-1], Sampling(temperature=0.3), params=other)
        sampler("nano")(requests()[:2])
        sampler("nano")(requests()[:6], Sampling(temperature=1.0, top_p=0.9))
    assert seen == []
    same = found.tokens_NG[::-1, :1] == continued("nano").tokens_NG[:, :1]
    assert not same.all()  # and the weights are those that were given


def test_on_finished_hears_of_every_sequence():
    heard = []
    sampler("nano_dense")(requests(), on_finished=heard.append)
    assert sum(heard) == len(requests())
    assert len(heard) > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ()}, "a prompt of 0 tokens; from 1 to 10 are taken"),
        ({"prompt": (1,) * 11}, "a prompt of 11 tokens; from 1 to 10 are taken"),
        ({"max_tokens": 9}, "max_tokens=9; there is room for 8"),
        ({"max_tokens": 0}, "max_tokens=0; there is room for 8"),
    ],
)
def test_what_has_no_room_is_refused(change, message):
    request = Request(change.pop("prompt", (20,)), 0)
    with pytest.raises(InputError, match=message):
        sampler("nano_dense")([request], **change)


def test_slots_that_the_model_has_no_positions_for_are_refused():
    with pytest.raises(InputError, match=r"prompts of 10000000 tokens and 8 new ones are more"):
        Sampler("nano_dense", SlotSizes(slots=1, max_prompt=10_000_000, max_tokens=8))
    with pytest.raises(InputError, match="has nothing to do"):
        Sampler("nano_dense", SlotSizes(slots=0, max_prompt=1, max_tokens=8))


@pytest.mark.nightly
@MODELS
@pytest.mark.parametrize("slots", [1, 3, 9])
def test_tokens_do_not_depend_on_how_many_slots_there_are(name, slots):
    sizes = SlotSizes(slots=slots, max_prompt=40, max_tokens=8)  # prompts at another width, too
    found = Sampler(name, sizes)(requests())
    assert_same(found, continued(name), range(len(requests())))


@pytest.mark.nightly
@MODELS
def test_all_may_stop_at_once_and_nothing_may(name):
    everything = Drawing(allowed=ALLOWED, stop_ids=tuple(range(ALLOWED)))
    found = Sampler(name, drawing=everything)(requests())
    np.testing.assert_array_equal(found.count_N, 1)
    assert found.stopped_N.all()
    found = Sampler(name, drawing=Drawing(allowed=ALLOWED, stop_ids=()))(requests())
    np.testing.assert_array_equal(found.count_N, SIZES.max_tokens)
    assert not found.stopped_N.any()


@pytest.mark.nightly
def test_another_seed_draws_otherwise():
    seeded = Sampler("nano", seed=4)(requests())
    assert (seeded.tokens_NG[:, 0] != continued("nano").tokens_NG[:, 0]).any()
