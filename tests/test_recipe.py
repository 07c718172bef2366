"""The published recipe as data: stages, batch ramp, longer contexts, the dry run."""

import dataclasses

import numpy as np
import pytest

from dsjax.config import (
    BatchRampConfig,
    ContextStageConfig,
    RopeConfig,
    ScheduleConfig,
    YarnConfig,
    constant,
)
from dsjax.errors import InputError
from dsjax.overrides import override
from dsjax.presets import preset, presets
from dsjax.train.recipe import borders, describe, next_step, schedule_rows
from dsjax.train.stages import batch_at, stage_of, stages, without_yarn
from experiments import command, pretrain
from tests.reference import optimizer as reference

YARN = RopeConfig(yarn=YarnConfig(factor=4.0, original_max_positions=64))


def ropes(model):
    """Every rope of a model, MTP's too."""
    blocks = [block for stack in model.stacks for block in stack.blocks]
    return {block.attention.rope for block in [*blocks, *([model.mtp.block] if model.mtp else [])]}


def with_rope(model, rope):
    def turned(block):
        return dataclasses.replace(block, attention=dataclasses.replace(block.attention, rope=rope))

    stacks = tuple(
        dataclasses.replace(stack, blocks=tuple(map(turned, stack.blocks)))
        for stack in model.stacks
    )
    mtp = dataclasses.replace(model.mtp, block=turned(model.mtp.block))
    return dataclasses.replace(model, stacks=stacks, mtp=mtp)


def staged():
    """`nano` with a ramp from 2 to 8 rows over half of 10,240 tokens, then two longer stages."""
    config = preset("nano")
    train = dataclasses.replace(
        config.train,
        micro_batch_size=2,
        batch_ramp=BatchRampConfig(start=2, tokens=5120),
        yarn=False,
        context_stages=(
            ContextStageConfig(
                seq_len=128, batch_size=4, micro_batch_size=2, steps=3, learning_rate=1e-4
            ),
            ContextStageConfig(seq_len=256, batch_size=1, steps=2, learning_rate=5e-5, yarn=False),
        ),
    )
    return dataclasses.replace(config, model=with_rope(config.model, YARN), train=train)


def test_the_batch_grows_by_whole_micro_batches_and_every_token_is_counted():
    stage = stages(staged())[0]
    seen = 0
    for batch, before in zip(stage.batches, stage.tokens_before, strict=False):
        assert before == seen
        exact = min(2 + 6 * before / 5120, 8)
        assert batch % 2 == 0
        assert exact - 2 < batch <= exact
        seen += batch * 64
    assert stage.tokens_before[-1] == seen
    assert seen - stage.batches[-1] * 64 < 10_240 <= seen  # no step more than needed
    assert list(stage.batches) == sorted(stage.batches)
    assert {2, 4, 6, 8} == set(stage.batches)


def test_a_run_without_ramp_has_equal_steps():
    config = preset("nano")
    assert stages(config)[0].batches == (8,) * 20
    train = dataclasses.replace(config.train, total_tokens=513)
    assert stages(dataclasses.replace(config, train=train))[0].batches == (8, 8)  # rounded up


def test_v3s_batch_is_the_published_one_at_both_ends():
    train = preset("deepseek_v3").train
    assert batch_at(train, 0) == 3072
    assert batch_at(train, 468_999_999_999) == 14_336  # the last whole micro-batch before
    assert batch_at(train, 469_000_000_000) == batch_at(train, 14 * 10**12) == 15_360
    half = batch_at(train, 469_000_000_000 // 2)
    assert 9216 - 1024 <= half <= 9216


def test_stages_follow_each_other_with_their_own_length_rope_and_rate():
    main, longer, last = stages(staged())
    assert [(s.first_step, s.last_step) for s in (main, longer, last)] == [
        (0, len(main.batches)),
        (len(main.batches), len(main.batches) + 3),
        (len(main.batches) + 3, len(main.batches) + 5),
    ]
    assert [s.config.train.seq_len for s in (main, longer, last)] == [64, 128, 256]
    plain = {RopeConfig()}
    assert [ropes(s.config.model) for s in (main, longer, last)] == [plain, {YARN}, plain]
    assert longer.batches == (4, 4, 4)
    assert longer.config.train.micro_batch_size == 2
    assert longer.config.train.optimizer.learning_rate == 1e-4
    assert longer.config.train.optimizer.schedule == constant(1.0)
    # What they ended with goes on.
    train = preset("nano").train
    assert longer.config.train.bias_speed == constant(train.bias_speed.phases[-1].value)
    assert longer.config.train.mtp_loss_weight == constant(train.mtp_loss_weight.phases[-1].value)
    for stage in (main, longer, last):  # a stage is a run of one stage
        assert stages(stage.config)[0].batches == stage.batches
        assert len(stages(stage.config)) == 1


def test_progress_runs_from_0_to_1_in_every_stage():
    for stage in stages(staged()):
        shares = [stage.progress(step) for step in range(stage.first_step, stage.last_step + 1)]
        assert shares[0] == 0.0
        assert shares[-1] == 1.0
        assert shares == sorted(shares)


def test_a_checkpoint_belongs_to_the_stage_that_made_it():
    config = staged()
    main, longer, last = stages(config)
    for step, wanted in (
        (0, main),
        (1, main),
        (main.last_step, main),
        (main.last_step + 1, longer),
        (longer.last_step, longer),
        (last.last_step, last),
    ):
        assert stage_of(config, step).first_step == wanted.first_step
    with pytest.raises(InputError, match="step 99999 is outside the run of"):
        stage_of(config, 99_999)


@pytest.mark.parametrize("name", sorted(presets()))
def test_without_yarn_changes_the_rope_alone(name):
    model = preset(name).model
    plain = without_yarn(model)
    assert all(rope.yarn is None for rope in ropes(plain))
    assert plain.num_layers == model.num_layers
    if all(rope.yarn is None for rope in ropes(model)):
        assert plain == model


def test_v3s_stages_are_the_published_ones():
    main, *longer = stages(preset("deepseek_v3"))
    assert all(rope.yarn is None for rope in ropes(main.config.model))
    assert [(s.config.train.seq_len, set(s.batches), len(s.batches)) for s in longer] == [
        (32_768, {1920}, 1000),
        (131_072, {480}, 1000),
    ]
    for stage in longer:
        (rope,) = ropes(stage.config.model)
        assert rope.yarn.factor == 40.0
        assert stage.config.train.optimizer.learning_rate == 7.3e-6
    assert preset("deepseek_v3").data.fim_rate == 0.1
    assert preset("deepseek_v3").data.tokenizer == "deepseek"
    # The last partial step apart, the main stage is 14.8T tokens.
    assert 0 <= main.tokens_before[-1] - 14.8e12 < 15_360 * 4096


def test_rows_of_the_schedule_are_the_schedules():
    rows = schedule_rows(preset("deepseek_v3"), points=50)
    main = [row for row in rows if row["stage"] == 0]
    total = stages(preset("deepseek_v3"))[0].tokens_before[-1]
    warmup = 2000 * 3072 * 4096 / 14.8e12
    for row in main:
        share = row["tokens"] / total
        wanted = reference.v3_learning_rate(share, warmup=warmup)
        np.testing.assert_allclose(row["learning_rate"], wanted, rtol=1e-4, atol=1e-9)
        assert row["micro_batches"] * 1024 == row["batch_size"]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert [row["tokens"] for row in rows] == sorted(row["tokens"] for row in rows)
    assert {row["learning_rate"] for row in rows if row["stage"]} == {7.3e-6}


def test_borders_are_where_the_course_changes():
    stage = stages(preset("deepseek_v3"))[0]
    found = borders(stage)
    assert {0, len(stage.batches) - 1} <= found
    for tokens in (469e9, 10e12, 14.3e12, 14.633e12):
        first = next_step(stage, tokens * stage.tokens_before[-1] / 14.8e12)
        assert {first - 1, first} & found
    assert stage.tokens_before[next_step(stage, 1e12)] >= 1e12
    assert stage.tokens_before[next_step(stage, 1e12) - 1] < 1e12


def test_the_dry_run_prints_and_draws_the_whole_schedule(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)
    picture = tmp_path / "schedule.png"
    arguments = ["--preset=deepseek_v3", "--dry_run", f"--picture={picture}"]
    assert pretrain.main(["pretrain", *arguments]) == 0
    told = capsys.readouterr().out
    for wanted in (
        "671,026,404,352 parameters",
        "3 stage(s)",
        "rows of 4,096, plain rope",
        "rows of 32,768, YaRN x40",
        "rows of 131,072, YaRN x40",
        "3,072",
        "15,360",
        "0.00022",
        "2.2e-05",
        "7.3e-06",
        "fill-in-the-middle at 0.1",
    ):
        assert wanted in told
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_has_a_schedule_that_can_be_told(name):
    config = preset(name)
    assert f"{stages(config)[-1].last_step:,} steps" in describe(config)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ('train.batch_ramp={"start": 16, "tokens": 100}', "starts at 16, above batch_size 8"),
        ('train.batch_ramp={"start": 3, "tokens": 100}', "batch_size 3 does not divide into"),
        ('train.batch_ramp={"start": 0, "tokens": 100}', "BatchRampConfig.start is 0"),
        (
            'train.context_stages=[{"seq_len": 32, "batch_size": 1, "steps": 1, '
            '"learning_rate": 1e-3}]',
            "sequence lengths must not fall, but are [64, 32]",
        ),
        (
            'train.context_stages=[{"seq_len": 8192, "batch_size": 1, "steps": 1, '
            '"learning_rate": 1e-3}]',
            "train.context_stages.0.seq_len 8192 is longer than model.max_positions 4096",
        ),
        (
            'train.context_stages=[{"seq_len": 64, "batch_size": 3, "micro_batch_size": 2, '
            '"steps": 1, "learning_rate": 1e-3}]',
            "TrainConfig.context_stages.0: batch_size 3 does not divide into micro-batches of 2",
        ),
        (
            'train.context_stages=[{"seq_len": 64, "batch_size": 3, "steps": 1, '
            '"learning_rate": -1}]',
            "ContextStageConfig.learning_rate is -1.0",
        ),
        ("train.ema_decay=1.0", "TrainConfig.ema_decay is 1.0"),
        ("train.max_skipped_steps=0", "TrainConfig.max_skipped_steps is 0"),
        ("train.profile_steps=[0]", "steps count from 1"),
        ("train.device_balance_loss_weight=-0.1", "TrainConfig.device_balance_loss_weight is -0.1"),
        ("data.fim_rate=1.5", "DataConfig.fim_rate is 1.5"),
        ("data.workers=-1", "DataConfig.workers is -1"),
        ("data.tokenizer=", "DataConfig.tokenizer is empty"),
        ('data.sources=[{"path": "a", "weight": 0}]', "SourceConfig.weight is 0.0"),
        (
            'data.sources=[{"path": "a", "weight": 1}, {"path": "b"}]',
            "give every source a weight, or none; a alone has one",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(assignment, expected):
    config = dataclasses.replace(
        preset("nano"), train=dataclasses.replace(preset("nano").train, micro_batch_size=2)
    )
    with pytest.raises(InputError) as caught:
        override(config, assignment)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ramp_needs_micro_batches():
    with pytest.raises(InputError, match="needs a micro_batch_size"):
        override(preset("nano"), 'train.batch_ramp={"start": 2, "tokens": 100}')


def test_a_schedule_without_phases_in_the_way_has_few_borders():
    config = preset("nano")
    train = dataclasses.replace(
        config.train,
        optimizer=dataclasses.replace(config.train.optimizer, schedule=constant(1.0)),
        bias_speed=constant(1e-3),
        mtp_loss_weight=ScheduleConfig(start=0.3, phases=constant(0.3).phases),
    )
    (stage,) = stages(dataclasses.replace(config, train=train))
    assert borders(stage) == {0, 19}
