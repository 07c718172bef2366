"""Measures of a trained model, by hand; and studies of the recipe."""

import json
import math
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.data import recall
from dsjax.data.fim import fim_prompt
from dsjax.errors import InputError
from dsjax.evaluate.acceptance import second_token_acceptance
from dsjax.evaluate.infilling import infilling_loss
from dsjax.evaluate.needle import _haystack, needle_accuracy
from dsjax.interop.tokenizer import Tokenizer
from dsjax.model.transformer import merge
from dsjax.overrides import override
from dsjax.presets import preset
from dsjax.study import Study, measure, run_study, studies, study_named, summary
from experiments import ablate, command, needle
from tests.helpers import packed_batch


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train((text for _, text in recall.documents(200)), 512)


# ---- needles ------------------------------------------------------------------------------------


def copier(tokenizer, *, reach=None):
    """Scores that give back the code after the name that was last said, if it is near enough."""
    vocab_size = tokenizer.vocab_size

    def logits(tokens_BT):
        scores_BTV = np.zeros((*tokens_BT.shape, vocab_size), np.float32)
        for row, scores in zip(tokens_BT, scores_BTV, strict=True):
            row = row.tolist()
            for i in range(len(row)):
                start = 0 if reach is None else max(i - reach, 0)
                if row[i] in row[start:i]:
                    before = max(j for j in range(start, i) if row[j] == row[i])
                    scores[i, row[before + 1]] = 1.0
        return scores_BTV

    return logits


@pytest.mark.parametrize("length", [48, 128, 300])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_haystack_is_filler_with_one_fact_and_a_question(tokenizer, length, depth):
    for seed in range(10):
        tokens, answer = _haystack(tokenizer, length, depth, random.Random(seed))
        assert len(tokens) == length
        said = tokenizer.decode(tokens)
        *before, question = said.split("\n")
        facts = [line for line in before if line and line[:3] in recall.NAMES]
        assert facts == [question]  # the name comes once, with the same code
        assert tokenizer.decode(tokens[-answer:]) == question[3:]
        assert set(before) - set(facts) <= {
            *(sentence.strip() for sentence in recall.FILLER),
            *before[:2],  # one of them is cut at its beginning
        }
        place = before.index(question) / max(len(before) - 1, 1)
        assert abs(place - depth) < 0.35


def test_a_needle_is_found_by_who_looks_far_enough(tokenizer):
    far = needle_accuracy(copier(tokenizer), tokenizer, length=256, repeats=4)
    assert far == dict.fromkeys((0.0, 0.25, 0.5, 0.75, 1.0), 1.0)
    near = needle_accuracy(copier(tokenizer, reach=100), tokenizer, length=256, repeats=4)
    assert near[0.0] == near[0.25] == 0.0
    assert near[1.0] == 1.0


def test_the_source_says_every_code_again(tokenizer):
    """From the second time on a code follows from what was said; documents are all different."""
    texts = [text for _, text in recall.documents(50)]
    assert len(set(texts)) == 50
    again = 0
    for text in texts:
        known = {}
        for line in text.splitlines():
            if line[:3] in recall.NAMES:
                again += known.setdefault(line[:3], line[3:]) == line[3:]
                assert known[line[:3]] == line[3:]
    assert again > 1000
    assert [text for _, text in recall.documents(50)] == texts


def test_the_script_asks_a_run(nano_run, monkeypatch, capsys):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)
    arguments = [f"--workdir={nano_run.workdir}", "--length=200", "--repeats=1"]
    assert needle.main(["needle", *arguments]) == 0
    assert "    200 tokens: 0." in capsys.readouterr().out
    for wrong, expected in (
        ("--length=9", "--length=9 must lie in [32, 4096] (model.max_positions)"),
        ("--repeats=0", "--repeats is 0"),
        ("--step=5", "has no step 5"),
        ("--workdir=", "--workdir is needed"),
    ):
        assert needle.main(["needle", *arguments[:1], wrong]) == 2
        assert expected in capsys.readouterr().err


# ---- infilling ----------------------------------------------------------------------------------


def test_infilling_is_the_mean_loss_of_the_middle(tokenizer):
    """Scores that know only how often each token came, against the sums by hand."""
    texts = [f"one {i} two {i * 7 % 11} three\nfour" for i in range(40)]
    frequency = np.random.default_rng(0).standard_normal(tokenizer.vocab_size)
    log = frequency - np.log(np.exp(frequency).sum())
    seen = []

    def logits(tokens_BT):
        seen.append(tokens_BT.copy())
        return np.broadcast_to(frequency, (*tokens_BT.shape, len(frequency)))

    losses = infilling_loss(logits, tokenizer, texts, length=96, rows=10, batch_size=4)
    hole, begin, end = tokenizer.fim
    rows = [row for batch in seen for row in batch.tolist()]
    total = count = 0.0
    for row in rows[:10]:
        assert row[0] == begin
        assert row.count(hole) == row.count(end) == 1
        stop = len(row)
        while row[stop - 1] == tokenizer.pad_id:
            stop -= 1
        middle = row[row.index(end) + 1 : stop]
        total, count = total - log[middle].sum(), count + len(middle)
    np.testing.assert_allclose(losses["with_suffix"], total / count, rtol=1e-9)
    np.testing.assert_allclose(losses["prefix_only"], total / count, rtol=1e-9)  # the same middles
    plain = rows[12 : 12 + 10]
    assert not any(mark in row for row in plain for mark in tokenizer.fim)
    assert infilling_loss(logits, tokenizer, texts, length=3) == {}


def test_the_middle_follows_the_prompt(tokenizer):
    prompt = fim_prompt(tokenizer, "one", "three")
    hole, begin, end = tokenizer.fim
    wanted = [begin, *tokenizer.encode("one"), hole, *tokenizer.encode("three"), end]
    assert prompt == wanted


# ---- acceptance ---------------------------------------------------------------------------------


@pytest.mark.nightly
def test_acceptance_counts_agreements_of_draft_and_model():
    """Against a loop over documents, each run alone."""
    lm = dsjax.init("nano", seed=1)
    lengths = [(20, 3, 33), (1, 2, 40)]
    batch = packed_batch(np.random.default_rng(3), 512, lengths)
    got = second_token_acceptance(lm.graphdef, lm.params, lm.bias, [batch, batch])
    model = merge(lm.graphdef, lm.params, lm.bias)
    hits = count = 0
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            tokens = jnp.asarray(batch["tokens_BT"][row : row + 1, start : start + length])
            start += length
            if length < 2:
                continue
            places = {
                "positions_BT": jnp.arange(length)[None],
                "segments_BT": jnp.ones((1, length), jnp.int32),
            }
            hidden = model(tokens, **places).hidden_BTD
            best = np.asarray(model.logits(hidden).argmax(-1))[0]
            shifted = jnp.roll(tokens, -1, axis=1)
            places["segments_BT"] = places["segments_BT"].at[0, -1].set(0)
            drafted, _ = model.mtp(0, hidden, shifted, **places)
            draft = np.asarray(model.logits(drafted).argmax(-1))[0]
            hits += int((draft[: length - 1] == best[1:]).sum())
            count += length - 1
    assert got == pytest.approx(hits / count)
    assert count == 19 + 2 + 32 + 1 + 39


def test_acceptance_needs_mtp():
    lm = dsjax.init(override(preset("nano"), "model.mtp=null"))
    batch = packed_batch(np.random.default_rng(3), 512, [(8,)])
    with pytest.raises(ValueError, match="the model has no MTP"):
        second_token_acceptance(lm.graphdef, lm.params, lm.bias, [batch])


# ---- studies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(studies()))
def test_every_variant_is_a_configuration_of_its_own(name):
    study = study_named(name)
    configs = set()
    for overrides in study.variants.values():
        configs.add(override(preset("tiny"), *study.common, *overrides))
    assert len(configs) == len(study.variants) >= 2


@pytest.mark.nightly
def test_a_study_trains_measures_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    config = override(
        preset("nano"),
        "train.total_tokens=2048",
        "data.max_bytes_per_source=60000",
        "data.held_out_fraction=0.2",
    )
    study = Study(
        question="Is it one?",
        variants={"with MTP": (), "without": ("model.mtp=null",)},
        measures=("eval_loss", "max_violation", "second_token_acceptance"),
    )
    results = run_study(study, config, tmp_path, seeds=1)
    assert set(results) == {"with MTP", "without"}
    for name, figures in results.items():
        assert len(figures["eval_loss"]) == len(figures["max_violation"]) == 1
        assert figures["eval_loss"][0] < math.log(512) + 0.2
        assert figures["max_violation"][0] > 0.0
        assert len(figures["second_token_acceptance"]) == (name == "with MTP")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "worst_violation" in measure(tmp_path / "without-0")
    table = summary(results)
    assert "second_token_acceptance" in table
    assert table.splitlines()[2].rstrip().endswith("-")
    gap = results["without"]["eval_loss"][0] / results["with MTP"]["eval_loss"][0] - 1
    assert f"eval_loss against with MTP: without {gap:+.2%}" in table
    jax.clear_caches()


def test_ablate_refuses_what_it_cannot_use(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)
    monkeypatch.chdir(tmp_path)
    for arguments, expected in (
        (["--study=balanse", "--workdir=x"], "unknown study 'balanse'; did you mean 'balance'?"),
        (["--study=mtp"], "--workdir is needed"),
        (["--study=mtp", "--workdir=x", "--seeds=0"], "--seeds is 0"),
        (["--study=mtp", "--workdir=x", "--steps=0"], "--steps is 0"),
    ):
        assert ablate.main(["ablate", *arguments]) == 2
        assert expected in capsys.readouterr().err
    with pytest.raises(InputError, match="unknown study"):
        study_named("nothing")
    assert list(pathlib.Path.cwd().iterdir()) == []
