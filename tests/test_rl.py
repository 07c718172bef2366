"""A run of reinforcement learning: problems, rewards, what is logged, and what may go wrong."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from dsjax.checkpoint import Checkpoints
from dsjax.config import RewardConfig, RlConfig
from dsjax.errors import InputError, RunError
from dsjax.infer.batcher import Batcher, Continued
from dsjax.interop.templates import template_text
from dsjax.interop.tokenizer import Tokenizer
from dsjax.meshes import spread_of
from dsjax.overrides import override, to_json
from dsjax.presets import preset
from dsjax.rl import loop
from dsjax.rl.evaluation import Evaluation, measured_by
from dsjax.rl.loop import train_grpo
from dsjax.rl.pictures import write_samples
from dsjax.rl.recipe import around, recipe
from dsjax.rl.rollout import Roller, Shown
from dsjax.rl.saved import abstract
from dsjax.rl.tasks import Problems, check_for, open_problems
from dsjax.train.metrics import read_metrics
from dsjax.train.state import abstract_state, create
from dsjax.train.step import make_train_step
from dsjax.verify.rewards import Scorer
from dsjax.workdir import Run, prepare_workdir
from experiments import command, grpo
from sharding.rules import PRESETS
from tests.helpers import compilations

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORPUS = ["a bad cab, abba; a dad bade a cab: 1 + 2 = 3, 4 - 5 = -1 " * 5]

# ---- problems -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CORPUS, 290)


def rl_of(task, **fields):
    return RlConfig(task=str(task), template="none", **fields)


def write_lines(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def sums(n):
    return [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(n)]


def prompts_of(problems, count):
    return [problem.prompt for problem in problems.take(0, count)[0]]


def test_what_is_held_out_is_never_trained_on(tmp_path, tokenizer):
    """Whatever the order of the lines, and however often one is there."""
    one = write_lines(tmp_path / "one.jsonl", *sums(30), *sums(10))
    other = write_lines(tmp_path / "other.jsonl", *sums(30)[::-1])
    problems = open_problems(rl_of(one, held_out=8), tokenizer, 0)
    held_out = {problem.prompt for problem in problems.held_out}
    epoch = prompts_of(problems, 22)
    assert len(held_out) == 8
    assert len(set(epoch)) == 22
    assert not held_out & set(epoch)
    again = open_problems(rl_of(other, held_out=8), tokenizer, 1)
    assert {problem.prompt for problem in again.held_out} == held_out
    assert prompts_of(again, 22) != epoch  # another seed is another order
    assert sorted(prompts_of(problems, 44)[22:]) == sorted(epoch)  # the next epoch
    few = open_problems(rl_of(one, held_out=500), tokenizer, 0)  # half of them at most
    assert len(few.held_out) == 15


def test_problems_come_by_position(tmp_path, tokenizer):
    problems = open_problems(rl_of(write_lines(tmp_path / "a.jsonl", *sums(9))), tokenizer, 0)
    whole, end = problems.take(0, 12)
    first, position = problems.take(0, 5)
    rest, last = problems.take(position, 7)
    assert first + rest == whole
    assert last == end == 12


def test_prompts_that_are_too_long_are_left_out_and_counted(tmp_path, tokenizer):
    lines = [*sums(12), *({"prompt": f"{i}" * 60, "answer": "1"} for i in range(1, 10))]
    task = write_lines(tmp_path / "a.jsonl", *lines)
    problems = open_problems(rl_of(task, max_prompt_tokens=20, held_out=4), tokenizer, 0)
    found, position = problems.take(0, 8)
    assert all(len(problem.ids) <= 20 for problem in [*found, *problems.held_out])
    assert position > 8
    roller = roller_of(problems=problems, config=rl_of("x", **SMALL))
    rollout = roller((0, 0), version=0, position=0)
    assert rollout.position - 2 == rollout.metrics["too_long"]
    with pytest.raises(
        InputError, match=r"no held-out problem is left: prompts have up to \d+ tok"
    ):
        open_problems(rl_of(task, max_prompt_tokens=1), tokenizer, 0)
    short = {"prompt": "1", "answer": "1"}
    with pytest.raises(InputError, match=r"no prompt of rl.task has at most 3 tokens"):
        Problems(
            [{"prompt": "1 2 3 4 5 6 7"}] * 3,
            *([short], lambda text: (tuple(tokenizer.prompt_ids(text)), text)),
            max_tokens=3,
            seed=0,
        )


def test_gsm8ks_answers_end_with_the_result(tmp_path, tokenizer):
    line = {"question": "How many?", "answer": "Two and two.\n2+2=<<2+2=4>>4\n#### 1,004"}
    task = write_lines(tmp_path / "a.jsonl", line, {"question": "And?", "answer": "5"})
    problems = open_problems(rl_of(task), tokenizer, 0)
    records = {problem.prompt: problem.record for problem in problems.held_out}
    records |= {record["question"]: record for record in problems.train}
    assert records["How many?"]["answer"] == "1,004"
    assert records["How many?"]["solution"] == line["answer"]
    assert records["And?"]["answer"] == "5"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: it is not JSON: Expecting"),
        ("[1]", "line 2: it is no object"),
        ('{"text": "x"}', "line 2: it has none of messages, prompt, question"),
        ('{"prompt": 3, "answer": "1"}', "line 2: its question is 3"),
        ('{"prompt": " ", "answer": "1"}', "line 2: its question is ' '"),
        ('{"prompt": "\\ud800", "answer": "1"}', "line 2: its question holds half of a surrogate"),
        ('{"messages": [], "answer": "1"}', r"line 2: its question is \[\]"),
        ('{"messages": ["x"], "answer": "1"}', "line 2: its messages are no objects"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}], "answer": "1"}',
            "line 2: its messages end with an answer",
        ),
        ('{"prompt": "x"}', "line 2: a record for the verifier 'math' has no 'answer'"),
        ('{"prompt": "x", "answer": "1", "verify": "mth"}', "unknown verifier 'mth'; did you mean"),
        (b'{"prompt": "\xff"}', "line 2: it is not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"\x00", "line 2: it is not JSON"),
        ("[" * 100_000, "line 2: it is not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, tokenizer, line, message):
    path = tmp_path / "some problems.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "1", "answer": "1"}\r\n' + line + b"\n\n")
    with pytest.raises(InputError, match=message) as caught:
        open_problems(rl_of(path), tokenizer, 0, check=check_for({"a": "accuracy"}))
    assert "some problems.jsonl, line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "nothing/*.jsonl",
            "rl.task 'nothing/.*' is neither a file nor begins with 'reasoning_gym",
        ),
        ("{folder}", "cannot be read: Is a directory"),
        ("{folder}/empty", "gives 0 problems to train on and 0 held-out ones"),
        ("{folder}/one", "gives 1 problems to train on and 0 held-out ones"),
        ("reasoning_gym:chain_su", "chain_sum"),
        ("reasoning_gym:chain_sum{", "rl.task 'reasoning_gym:chain_sum{': Expecting"),
        ('reasoning_gym:chain_sum{"min_term": 2}', "min_term"),
        ("reasoning_gym:chain_sum+reasoning_gym:", "unknown"),
        ("+reasoning_gym:chain_sum", "has an empty part"),
    ],
)
def test_a_task_that_is_none_is_refused(tmp_path, tokenizer, task, message):
    (tmp_path / "empty").write_text("\n")
    write_lines(tmp_path / "one", *sums(1))
    with pytest.raises(InputError, match=message) as caught:
        open_problems(rl_of(task.replace("{folder}", str(tmp_path)), problems=20), tokenizer, 0)
    assert "\n" not in str(caught.value)


def test_families_are_joined_and_have_their_own_fields(tokenizer):
    task = 'reasoning_gym:chain_sum{"min_terms": 2, "max_terms": 2}+reasoning_gym:spell_backward'
    problems = open_problems(rl_of(task, problems=30, held_out=10), tokenizer, 0)
    assert len(problems.train) == 60
    families = [problem.record["family"] for problem in problems.held_out]
    assert families.count("chain_sum") == families.count("spell_backward") == 5
    for record in problems.train:
        if record["family"] == "chain_sum":
            assert len(record["question"].partition(":")[2].split()) == 4  # 1 + 2 =
    asked = {json.dumps(record["question"]) for record in problems.train}
    assert not asked & {json.dumps(problem.record["question"]) for problem in problems.held_out}


def test_a_template_makes_prompts_and_one_that_is_missing_is_told_of(tmp_path, tokenizer):
    lines = [{"messages": [{"role": "user", "content": str(i)}], "answer": "1"} for i in range(4)]
    task = write_lines(tmp_path / "a.jsonl", *lines)
    with pytest.raises(InputError, match="a problem has messages, but rl"):
        open_problems(rl_of(task), tokenizer, 0)
    talking = dataclasses.replace(rl_of(task), template="chat")
    with pytest.raises(InputError, match="the tokenizer has no chat template; fine-tune"):
        open_problems(talking, tokenizer, 0)
    problems = open_problems(talking, tokenizer.with_template(template_text("plain")), 0)
    problem = problems.held_out[0]
    assert problem.prompt.endswith("Assistant:\n")
    assert tokenizer.decode(list(problem.ids)) == problem.prompt


# ---- rollouts, with completions that are given ---------------------------------------------------

SMALL = {"prompts": 2, "group_size": 3, "mini_batches": 1, "max_completion_tokens": 6}
SMALL |= {"max_prompt_tokens": 20, "rewards": (RewardConfig(name="r"),)}


class FakeBatcher(Batcher):
    """Completions of one to six tokens, by number; every other one is not stopped."""

    def __init__(self, stopped=True):
        self.asked, self.stopped = [], stopped

    def __call__(self, params, bias, requests, sampling, *, on_finished=lambda count: None):
        self.asked.append([request.number for request in requests])
        count_N = np.array([1 + request.number % 6 for request in requests], np.int32)
        tokens_NG = np.array([[100 + r.number % 50] * 6 for r in requests], np.int32)
        on_finished(len(requests))
        stopped_N = np.full(len(requests), self.stopped)
        return Continued(
            tokens_NG, np.full((len(requests), 6), -1.0, np.float32), count_N, stopped_N, {}
        )


def roller_of(reward=None, *, config=None, problems=None, batcher=None, timeout_s=5.0):
    config = config or rl_of("x", **SMALL)
    tokenizer = Tokenizer.train(CORPUS, 290)
    if problems is None:
        problems = Problems(
            *(sums(40)[1:], sums(1), lambda text: (tuple(tokenizer.prompt_ids(text)), text)),
            max_tokens=20,
            seed=0,
        )
    scorer = Scorer({"r": reward or (lambda p, c, r: float(len(c)))}, timeout_s=timeout_s)
    return Roller(config, batcher or FakeBatcher(), problems, scorer, tokenizer)


def failing(how, seen):
    """A reward that fails for the third completion it sees."""

    def reward(prompt, completion, record):
        seen.append(completion)
        return how() if len(seen) == 3 else float(len(seen))

    return reward


def raising():
    raise OSError("no\nway")


@pytest.mark.parametrize(
    ("how", "name", "said"),
    [
        (raising, "reward_errors", "no way"),
        (lambda: None, "reward_errors", "None"),
        (lambda: float("nan"), "reward_errors", "nan"),
        (lambda: float("inf"), "reward_errors", "inf"),
        (lambda: "good", "reward_errors", "str"),
        (lambda: [1.0, 2.0], "reward_errors", "list"),
        (lambda: sys.exit(0), "reward_errors", "SystemExit"),
        (threading.Event().wait, "reward_timeouts", "it took more than 0.2 s"),
    ],
    ids=["raises", "None", "NaN", "infinity", "text", "list", "exits", "hangs"],
)
def test_a_reward_that_fails_masks_its_sample_and_nothing_else(how, name, said):
    rollout = roller_of(failing(how, []), timeout_s=0.2)((0, 0), version=0, position=0)
    assert rollout.metrics["masked_samples"] == 1.0
    for other in ("reward_errors", "reward_timeouts"):
        assert rollout.metrics[other] == float(other == name)
    assert rollout.sequences.count_N[2] == 0
    assert (np.delete(rollout.sequences.count_N, 2) > 0).all()
    assert np.isfinite(rollout.advantage_N).all()
    assert rollout.advantage_N[2] == 0
    assert rollout.advantage_N[0] == -rollout.advantage_N[1] < 0
    assert np.isfinite([value for key, value in rollout.metrics.items()]).all()
    assert rollout.metrics["reward"] == (1 + 2 + 4 + 5 + 6) / 5
    assert said in rollout.first_errors["r"]


def test_rewards_that_are_all_equal_or_all_masked_teach_nothing():
    rollout = roller_of(lambda p, c, r: 0.5)((0, 0), version=0, position=0)
    np.testing.assert_array_equal(rollout.advantage_N, 0)
    assert rollout.metrics["zero_std_share"] == 1.0
    assert rollout.ranges == {"r": (0.5, 0.5)}
    rollout = roller_of(lambda p, c, r: None)((0, 0), version=0, position=0)
    np.testing.assert_array_equal(rollout.advantage_N, 0)
    np.testing.assert_array_equal(rollout.sequences.count_N, 0)
    assert rollout.metrics["masked_samples"] == 6.0
    assert np.isnan(rollout.metrics["reward"])  # null in the file


def test_completions_without_an_end_can_be_left_out():
    config = rl_of("x", **SMALL, mask_truncated=True)
    rollout = roller_of(config=config, batcher=FakeBatcher(stopped=False))(
        (0, 0), version=0, position=0
    )
    np.testing.assert_array_equal(rollout.sequences.count_N, 0)
    assert rollout.metrics["truncated_share"] == 1.0
    assert rollout.metrics["ended_tokens"] == 0.0
    assert rollout.metrics["masked_samples"] == 0.0
    rollout = roller_of(config=config)((0, 0), version=0, position=0)
    assert (rollout.sequences.count_N > 0).all()


def test_groups_of_equal_rewards_are_replaced_and_counted():
    """The first two groups are equal, one of the next two: three more are drawn for the rollout."""
    seen = []

    def reward(prompt, completion, record):
        seen.append(1)
        group = (len(seen) - 1) // 3
        if len(seen) == 1:
            raise ValueError("of a group that is thrown away")
        return float(len(seen)) if group in (3, 4) else 0.0

    config, batcher = rl_of("x", **SMALL, dynamic_sampling=5), FakeBatcher()
    rollout = roller_of(reward, config=config, batcher=batcher)((0, 0), version=0, position=0)
    assert batcher.asked == [list(range(6)), list(range(6, 12)), list(range(12, 15))]
    assert rollout.metrics["resampled_groups"] == 3.0
    assert rollout.metrics["zero_std_share"] == 3 / 5
    assert rollout.metrics["reward_errors"] == 1.0
    assert rollout.first_errors == {"r": "ValueError: of a group that is thrown away"}
    assert rollout.position == 5
    assert (rollout.advantage_N != 0).sum() == 4  # of 10, 11, 12 and of 13, 14, 15 the middle is 0
    # Where too few teach anything, others fill the rollout up.
    config = rl_of("x", **SMALL, dynamic_sampling=2)
    rollout = roller_of(lambda p, c, r: 1.0, config=config)((0, 0), version=0, position=0)
    assert len(rollout.advantage_N) == 6
    assert rollout.metrics["resampled_groups"] == 4.0


def test_shuffled_rewards_are_the_same_in_other_places():
    plain = roller_of(config=rl_of("x", **SMALL, advantage="mean"))
    control = roller_of(config=rl_of("x", **SMALL, advantage="mean", shuffle_rewards=True))
    one, other = (roller((0, 0), version=2, position=0) for roller in (plain, control))
    assert one.metrics["reward"] == other.metrics["reward"]
    assert (one.advantage_N != other.advantage_N).any()
    np.testing.assert_array_equal(one.sequences.count_N, other.sequences.count_N)


def test_the_overlong_penalty_counts_tokens():
    config = rl_of("x", **SMALL, overlong_tokens=4)
    rollout = roller_of(lambda p, c, r: 1.0, config=config)((0, 0), version=0, position=0)
    # Lengths 1 to 6, of at most 6, the last four of them over the soft limit.
    assert rollout.metrics["reward"] == pytest.approx(np.mean([1, 1, 0.75, 0.5, 0.25, 0.0]))
    assert rollout.metrics["reward/r"] == 1.0


def test_what_held_out_answers_are_measured_by(tmp_path, tokenizer):
    rl = rl_of(write_lines(tmp_path / "a.jsonl", *sums(6)), held_out=3)
    problems = open_problems(rl, tokenizer, 0)
    assert measured_by(rl, problems.held_out) == {"format": "format", "accuracy": "accuracy"}
    thinks = dataclasses.replace(rl, rewards=(RewardConfig(name="format_think"),))
    assert measured_by(thinks, problems.held_out)["format"] == "format_think"
    free = write_lines(tmp_path / "b.jsonl", *({"prompt": str(i)} for i in range(6)))
    problems = open_problems(rl_of(free), tokenizer, 0)
    assert measured_by(rl, problems.held_out) == {"format": "format"}


def test_pass_at_k_of_an_evaluation(tmp_path, tokenizer):
    """Of each problem every third answer is right; greedy ones are not."""
    lines = [line | {"verify": "exact"} for line in sums(8)]
    rl = rl_of(write_lines(tmp_path / "a.jsonl", *lines), held_out=4, eval_samples=3)
    problems = open_problems(rl, tokenizer, 0)

    class Third(Scorer):
        def __call__(self, samples):
            scores = super().__call__(samples)
            many = len(samples) > len(problems.held_out)
            right = [float(many and i % 3 == 0) for i in range(len(samples))]
            return dataclasses.replace(scores, values=scores.values | {"accuracy": right})

    scorer = Third(measured_by(rl, problems.held_out))
    figures = Evaluation(rl, problems, scorer, tokenizer)(FakeBatcher(), (0, 0), sampled=True)
    assert figures["pass_1"] == pytest.approx(1 / 3)
    assert figures["pass_k"] == 1.0
    assert figures["accuracy"] == figures["format"] == figures["format_sampled"] == 0.0
    assert figures["tokens"] > 0


# ---- pictures -----------------------------------------------------------------------------------


def test_nothing_that_a_model_writes_breaks_the_table(tmp_path):
    shown = [
        Shown("```md\n# not a title", "``````\n<script>|\0|\ud800", {"r|s": 1.0}, 0.5, 3, True),
        Shown("p", "x" * 10_000, {"r|s": float("nan")}, -1.0, 9, False),
        Shown("", "", {"r|s": 2.0}, 0.0, 1, True),
    ]
    write_samples(tmp_path, 7, shown)
    text = (tmp_path / "samples" / "000007.md").read_text(encoding="utf-8")
    assert "\0" not in text
    outside, fence = [], None
    for line in text.split("\n"):  # as Markdown is read
        if fence is None and line.startswith("```"):
            fence = line
        elif fence is None:
            outside.append(line)
        elif line == fence:
            fence = None
    assert fence is None
    assert [line for line in outside if line] == [
        "# Completions after 7 steps",
        "| # | r\\|s | advantage | tokens | ended |",
        "|---|---|---|---|---|",
        "| 1 | 1 | +0.50 | 3 | yes |",
        "| 2 | masked | -1.00 | 9 | no |",
        "| 3 | 2 | +0.00 | 1 | yes |",
        *("## 1", "## 2", "## 3"),
    ]
    assert "6000 characters" in text
    write_samples(tmp_path, 8, [])
    assert not (tmp_path / "samples" / "000008.md").exists()


# ---- runs ---------------------------------------------------------------------------------------


def make_base(folder, name, **changes):
    """The folder of a run, at its first step: weights, and a tokenizer with a template."""
    config = override(preset(name), "model.vocab_size=300", "model.init_std=0.1")
    if name == "nano_dense":
        stack = dataclasses.replace(config.model.stacks[0], repeats=1)
        model = dataclasses.replace(config.model, stacks=(stack,))
        config = dataclasses.replace(config, model=model)
    tokenizer = Tokenizer.train(CORPUS, 290).with_template(template_text("plain"))
    run = Run(config=config, seed=0)
    prepare_workdir(folder, run, tokenizer.save)
    state = create(config, jax.random.key(0), PRESETS["single"])
    checkpoints = Checkpoints(folder, keep=1, tell=print)
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    checkpoints.save(1, fields, data={}, meta={})
    checkpoints.wait()
    checkpoints.close()
    return {"folder": str(folder)}


@pytest.fixture(scope="session")
def base(once):
    return once("rl base", lambda folder: make_base(folder / "base", "nano_dense"))["folder"]


@pytest.fixture(scope="session")
def experts(once):
    """MLA, experts, MTP."""
    return once("rl experts", lambda folder: make_base(folder / "base", "nano"))["folder"]


@pytest.fixture(autouse=True)
def _process_left_alone(monkeypatch):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(command, "keep_compiled", lambda folder: None)


MADE = {}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    share_programs(monkeypatch)
    monkeypatch.setattr(loop, "plot_reinforcement", lambda workdir: None)


def share_programs(monkeypatch):
    """Runs of one model and one loss share their step: what differs is what they do with it."""
    blueprint = loop.blueprint

    def known(config, rules):
        key = json.dumps([to_json(config.model), to_json(config.train.optimizer), str(rules)])
        return MADE.setdefault(key, blueprint(config, rules))

    def step(graphdef, loss, optimizer, **how):
        key = graphdef, loss, id(optimizer), str(how)
        if key not in MADE:
            MADE[key] = make_train_step(graphdef, loss, optimizer, **how)
        return MADE[key]

    monkeypatch.setattr(loop, "blueprint", known)
    monkeypatch.setattr(loop, "make_train_step", step)


def letter_reward():
    """The share of a in a completion; a closure, for which no process is started."""
    return lambda prompt, completion, record: completion.count("a") / max(len(completion), 1)


FIELDS = (
    *("rl.steps=6", "rl.prompts=3", "rl.group_size=4", "rl.mini_batches=2"),
    *("rl.max_prompt_tokens=20", "rl.max_completion_tokens=6", "rl.slots=2"),
    *(
        "rl.template=none",
        "rl.held_out=4",
        "rl.eval_samples=0",
        "rl.eval_every_steps=4",
        "rl.micro_batch_rows=2",
    ),
    *("rl.reference_every_steps=2", "rl.max_logprob_gap=1e-4"),
    *('rl.rewards=[{"name": "letter"}]', "train.save_every_steps=100"),
    *("train.optimizer.learning_rate=1e-2", "rl.kl_weight=0.01"),
)


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    known = {"answer": "7", "verify": "exact"}  # which needs no process
    lines = [{"prompt": f"a {'bad ' * (i % 4)}{i}:", **known} for i in range(40)]
    return str(write_lines(tmp_path_factory.mktemp("task") / "a.jsonl", *lines))


def config_of(init, task, *fields):
    return override(around(init, recipe("r1_zero")), f"rl.task={task}", *FIELDS, *fields)


def trained(init, task, workdir, *fields, rewards=None, **more):
    rewards = {"letter": letter_reward()} if rewards is None else rewards
    return train_grpo(config_of(init, task, *fields), workdir, init=init, rewards=rewards, **more)


def contents(init, task, workdir, *fields):
    """Everything that a run's newest checkpoint holds."""
    config = config_of(init, task, *fields)
    checkpoints = Checkpoints(workdir, keep=9, tell=print)
    restored = checkpoints.restore_newest(abstract(config, config.rl, spread_of(config.mesh)))
    checkpoints.close()
    return restored.step, restored.data, jax.device_get(restored.state)


TIMES = ("_s", "goodput", "memory_bytes")  # how names end of what no run has twice


def rows_of(workdir):
    return [
        {k: v for k, v in row.items() if not k.endswith(TIMES)} for row in read_metrics(workdir)
    ]


def assert_same_run(one, other, init, task, *fields):
    """Bit for bit: state, reference, rollout, rows without times, and samples."""
    got, wanted = (contents(init, task, folder, *fields) for folder in (one, other))
    assert got[:2] == wanted[:2]
    jax.tree.map(np.testing.assert_array_equal, got[2], wanted[2])
    assert rows_of(one) == rows_of(other)
    samples = {path.name: path.read_text() for path in (other / "samples").iterdir()}
    assert samples == {path.name: path.read_text() for path in (one / "samples").iterdir()}


@pytest.fixture(scope="module")
def unbroken(base, task, tmp_path_factory):
    """Six steps of three rollouts."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch)
        result = trained(base, task, folder)
    return folder, result


def test_sampler_and_trainer_are_one_model_after_every_update(unbroken):
    """Weights that had not gone over would show in the gap: updates move what is sampled."""
    folder, result = unbroken
    rows = [row for row in rows_of(folder) if "loss_total" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    rolled = rows[::2]
    assert all(0 < row["logprob_gap_max"] < 1e-4 for row in rolled)
    assert not any("logprob_gap_max" in row for row in rows[1::2])
    assert [row["weight_version"] for row in rows] == [0, 0, 2, 2, 4, 4]
    np.testing.assert_allclose([row["ratio_mean"] for row in rolled], 1.0, atol=1e-5)
    assert all(abs(row["ratio_max"] - 1) > 1e-3 for row in rows[1::2])  # it did move
    assert result.step == 6
    assert result.stopped_by is None
    assert set(result.shares) == {"rollout", "reward", "score", "update"}
    assert sum(result.shares.values()) == pytest.approx(1.0)


def test_the_reference_is_replaced_and_the_divergence_then_0(unbroken):
    folder, _ = unbroken
    rows = {row["step"]: row for row in rows_of(folder) if "loss_total" in row}
    assert [rows[step]["reference_age"] for step in range(1, 7)] == [1, 0, 1, 0, 1, 0]
    for step in (1, 3, 5):  # the first that follow the start and the steps 2 and 4
        assert abs(rows[step]["kl"]) < 1e-6
        assert rows[step + 1]["kl"] > 1e-5


def test_a_run_writes_rows_samples_and_a_picture(unbroken):
    folder, result = unbroken
    first, *steps, last = rows_of(folder)
    assert first["step"] == 0
    assert last["step"] == 6
    assert {f"eval/{name}": value for name, value in result.after.items()}.items() <= last.items()
    assert [row["step"] for row in steps if "eval/accuracy" in row] == [4]
    names = {"reward", "reward_std", "reward/letter", "zero_std_share", "completion_tokens"}
    names |= {"truncated_share", "masked_samples", "reward_errors", "reward_timeouts", "too_long"}
    assert names <= set(steps[0])
    assert not names & set(steps[1])
    every = {"entropy", "kl", "ratio_min", "ratio_max", "clipped_low", "clipped_high", "grad_norm"}
    every |= {"loss_policy", "loss_kl", "weight_version", "learning_rate"}
    assert all(every <= set(row) for row in steps)
    assert {path.name for path in (folder / "samples").iterdir()} == {
        *("000000.md", "000002.md", "000004.md")
    }
    assert (folder / "reinforcement.png").stat().st_size > 10_000


def test_a_run_that_is_done_does_nothing(unbroken, base, task):
    """Nor is it another run for being cut otherwise into rows and micro-batches."""
    folder, result = unbroken
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}
    rows = read_metrics(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Evaluation, "__call__", None)
        patch.setattr(loop.Roller, "__call__", None)
        again = trained(base, task, folder, "rl.micro_batch_rows=4", "rl.row_tokens=40")
    assert (again.before, again.after, again.step) == (result.before, result.after, 6)
    assert read_metrics(folder) == rows
    assert before


def test_a_run_goes_on_in_the_middle_of_a_rollout(unbroken, base, task, tmp_path):
    """The checkpoint holds the rollout, so that nothing is sampled again."""
    result = trained(base, task, tmp_path, stop_at_step=3)
    assert result.step == 3
    assert result.after is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Trainer, "_roll", counted := Counted(loop._Trainer._roll))
        trained(base, task, tmp_path)
    assert counted.calls == 1  # step 4 learns from what step 3 did
    assert_same_run(tmp_path, unbroken[0], base, task)


class Counted:
    """A method that counts its calls, and dies in one of them."""

    def __init__(self, method, dies_in=None):
        self.method, self.dies_in, self.calls = method, dies_in, 0

    def __get__(self, instance, owner):
        def call(*arguments, **named):
            self.calls += 1
            found = self.method(instance, *arguments, **named)
            if self.calls == self.dies_in:
                raise Died
            return found

        return call


class Died(BaseException):
    """As abrupt as a process can be told to go within itself."""


KILLS = {
    "first evaluation": (loop.Evaluation, "__call__", 1),
    "first rollout": (loop.Batcher, "__call__", 2),
    "rollout": (loop.Batcher, "__call__", 3),
    "rewards": (Scorer, "__call__", 4),
    "update": (loop._Trainer, "_mini_batch", 4),
    "before a reference": (loop._Trainer, "_show", 3),
    "reference": (loop._Trainer, "_copied", 3),
}


@pytest.mark.parametrize(
    ("where", "every"),
    [
        ("rollout", 1),
        pytest.param("reference", 1, marks=pytest.mark.nightly),
        *(
            pytest.param(where, every, marks=pytest.mark.nightly)
            for where in KILLS
            for every in (1, 3, 100)
            if (where, every) not in {("rollout", 1), ("reference", 1)}
        ),
    ],
)
def test_a_killed_run_comes_to_the_same(unbroken, base, task, tmp_path, where, every):
    """While it samples, while it learns, and around a new reference: the same to the last bit."""
    fields = [f"train.save_every_steps={every}"]
    owner, name, dies_in = KILLS[where]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, Counted(getattr(owner, name), dies_in))
        with pytest.raises(Died):
            trained(base, task, tmp_path, *fields)
    trained(base, task, tmp_path, *fields)
    assert_same_run(tmp_path, unbroken[0], base, task, *fields)


@pytest.mark.nightly
def test_rewards_that_are_equal_change_no_parameter(unbroken, base, task, tmp_path):
    """Without a divergence, and so without a reference."""
    trained(base, task, tmp_path, "rl.kl_weight=0", rewards={"letter": lambda p, c, r: 0.25})
    _, _, state = contents(base, task, tmp_path, "rl.kl_weight=0")
    _, _, other = contents(base, task, unbroken[0])
    assert "reference" not in state
    assert "reference" in other
    like = abstract_state(config_of(base, task), PRESETS["single"])
    checkpoints = Checkpoints(base, keep=1, tell=print)
    fields = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
    first = checkpoints.restore_newest(fields)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, state["params"], first.state["params"])
    steps = [row for row in rows_of(tmp_path) if "loss_total" in row]
    assert all(row["grad_norm"] == 0 for row in steps)
    assert steps[0]["zero_std_share"] == 1.0


def test_a_reward_that_never_changes_is_told_of(monkeypatch, capfd):
    """Once in so many rollouts; one that says something else in between begins anew."""
    monkeypatch.setattr(loop, "CONSTANT_ROLLOUTS", 3)
    trainer = types.SimpleNamespace(_alike={})
    ranges = [(0.25, 0.25)] * 2 + [(0.0, 1.0)] + [(0.25, 0.25)] * 2 + [(0.0, 0.0)] * 6
    for one in ranges:
        rollout = types.SimpleNamespace(ranges={"r": one, "other": (0.0, 0.5)})
        loop._Trainer._warn_of_constants.__wrapped__(trainer, rollout)
    said = "reward r was 0 for every completion of the last {} rollouts: it teaches nothing\n"
    assert capfd.readouterr().err == said.format(3) + said.format(6)


@pytest.mark.nightly
def test_a_run_without_any_reward_goes_on(base, task, tmp_path):
    trained(base, task, tmp_path, "rl.steps=2", rewards={"letter": lambda p, c, r: None})
    rows = [row for row in rows_of(tmp_path) if "loss_total" in row]
    assert [row["loss_total"] for row in rows] == [0.0, 0.0]
    assert rows[0]["reward"] is None
    assert rows[0]["masked_samples"] == 12.0


def test_weights_that_are_not_the_trainers_end_the_run(base, task, tmp_path):
    """As a sampler's would be that had missed an update."""
    moved = loop._Trainer._moved

    def stale(trainer):
        params, bias = moved(trainer)
        return jax.tree.map(lambda x: x * 1.001, params), bias

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Trainer, "_moved", stale)
        with pytest.raises(
            RunError, match=r"step 1: a token's log probability differs by 0\.\d+ be"
        ):
            trained(base, task, tmp_path)


def test_scoring_a_rollout_compares_all_of_it_with_the_sampler(base, task, tmp_path):
    fields = "rl.score_rollouts=true", "rl.steps=2"
    trained(base, task, tmp_path, *fields)
    rows = [row for row in rows_of(tmp_path) if "loss_total" in row]
    assert 0 < rows[0]["logprob_gap"] < rows[0]["logprob_gap_max"] < 1e-4
    assert "logprob_gap_max" not in rows[1]


LEARNING = "rl.steps=32", "rl.group_size=8", "rl.eval_every_steps=100"


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_policy_learns_what_is_rewarded_and_from_shuffled_rewards_nothing(
    base, task, tmp_path, shuffled
):
    trained(base, task, tmp_path, *LEARNING, f"rl.shuffle_rewards={json.dumps(shuffled)}")
    rewards = [row["reward"] for row in rows_of(tmp_path) if "reward" in row]
    early, late = np.mean(rewards[:3]), np.mean(rewards[-3:])
    if shuffled:
        assert late < early + 0.1
    else:
        assert late > early + 0.2


def assert_same_first_step(one, other):
    """Two programs: the same samples, and figures that differ in their last bits."""
    (first, second), (again, _) = (
        [row for row in rows_of(folder) if "loss_total" in row][:2] for folder in (one, other)
    )
    for name in ("reward", "completion_tokens", "truncated_share", "zero_std_share", "tokens"):
        assert again[name] == first[name]
    for name in ("loss_policy", "entropy", "grad_norm", "param_norm"):
        np.testing.assert_allclose(again[name], first[name], rtol=1e-3, atol=1e-6)
    assert again["logprob_gap_max"] < 1e-4
    assert second["loss_total"] != first["loss_total"]


def test_a_run_on_devices_is_that_of_one(unbroken, base, task, tmp_path):
    mesh = "mesh.rules=fsdp", "mesh.fsdp=2"
    trained(base, task, tmp_path, *mesh, stop_at_step=2)
    assert_same_first_step(unbroken[0], tmp_path)


EXPERTS = "rl.replay_routing=true", "rl.steps=4", "rl.mini_batches=2"


@pytest.fixture(scope="module")
def with_experts(experts, task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "run"
    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch)
        trained(experts, task, folder, *EXPERTS)
    return folder


@pytest.mark.nightly
def test_experts_latents_and_replayed_routing(with_experts, experts, task, tmp_path):
    """A V3 with an MTP block, which nothing here trains; on its way again with its routing."""
    steps = [row for row in rows_of(with_experts) if "loss_total" in row]
    assert all(0 < row["logprob_gap_max"] < 1e-4 for row in steps[::2])
    _, _, state = contents(experts, task, with_experts, *EXPERTS)
    assert any(name.startswith("routing_") for name in state["rollout"])
    trained(experts, task, tmp_path, *EXPERTS, stop_at_step=3)
    trained(experts, task, tmp_path, *EXPERTS)
    assert_same_run(tmp_path, with_experts, experts, task, *EXPERTS)


@pytest.mark.nightly
def test_eight_devices_with_experts_are_one(with_experts, experts, task, tmp_path):
    mesh = "mesh.rules=fsdp_ep", "mesh.fsdp=2", "mesh.expert=4", "rl.micro_batch_rows=8"
    trained(experts, task, tmp_path, *EXPERTS, *mesh, stop_at_step=2)
    assert_same_first_step(with_experts, tmp_path)


@pytest.mark.nightly
def test_no_step_after_the_second_compiles_anything(experts, task, tmp_path):
    """Nor does another rollout; without the fixture that shares programs, in a run of its own."""
    with pytest.MonkeyPatch.context() as patch:
        taken = loop._Trainer._take_step
        counts = []

        def counted(trainer, last):
            with compilations() as seen:
                taken(trainer, last)
            counts.append(len(seen))

        patch.setattr(loop._Trainer, "_take_step", counted)
        trained(experts, task, tmp_path, "rl.steps=6", "rl.kl_weight=0.02")
    assert counts[0] > 0
    assert counts[3:] == [0, 0, 0]


# ---- the script ----------------------------------------------------------------------------------


def script(base, task, workdir, *more):
    own = "rl.steps", "rl.rewards"
    fields = [part for field in FIELDS if not field.startswith(own) for part in ("--set", field)]
    if not any(flag.startswith("--reward") for flag in more):
        fields += ["--reward=format", "--reward=accuracy"]
    named = f"--init={base}", f"--workdir={workdir}", f"--task={task}"
    return ["grpo", *named, "--steps=6", *fields, *more]


def test_the_script_trains_tells_and_is_done(base, task, tmp_path, capsys):
    arguments = script(base, task, tmp_path / "run", "--steps=2")
    assert grpo.main(arguments) == 0
    told = capsys.readouterr().out
    assert "held out before: accuracy 0.000, format 0.000, tokens " in told
    assert "held out after: accuracy" in told
    assert "time of steps: rollout" in told
    assert grpo.main(arguments) == 0  # it is done: the same again, and no time of steps
    again = capsys.readouterr().out
    assert again.splitlines()[:2] == told.splitlines()[:2]
    assert "time of steps" not in again
    assert grpo.main([*arguments, "--seed=1"]) == 2
    assert "holds another run; seed: 0 there, 1 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--init="], "--init and --workdir are needed"),
        (["--init=nowhere"], "nowhere is neither the folder of a run nor a published model"),
        (["--preset=nano"], "--preset is not for this script"),
        (["--recipe=r1_zer"], "unknown recipe 'r1_zer'; did you mean 'r1_zero'"),
        (["--reward=acuracy"], "unknown reward 'acuracy'; did you mean 'accuracy'"),
        (["--reward=accuracy=much"], "--reward=accuracy=much: 'much' is no weight"),
        (["--reward=accuracy", "--reward=accuracy=2"], "one is there twice"),
        (["--reward=no_such_module:f"], "names no module that can be imported"),
        (["--steps=0"], "RlConfig.steps is 0; it must be positive"),
        (["--steps=many"], "steps"),
        (["--task=no/such/file"], "is neither a file nor begins with 'reasoning_gym'"),
        (["--set", "rl.group_siz=4"], "unknown key 'rl.group_siz'; did you mean 'group_size'"),
        (["--set", "rl.max_prompt_tokens=10000000"], "model.max_positions is"),
        (["--set", "rl.max_prompt_tokens=1"], "no held-out problem is left"),
        (["--set", "mesh.rules=fsdp", "--set", "mesh.fsdp=16"], "devices"),
        (["--set", "mesh.rules=fsdp", "--set", "mesh.fsdp=8"], "micro_batch"),
        (["--stepz=3"], "stepz"),
        (["3"], "unexpected argument '3'"),
    ],
)
def test_the_script_refuses_in_one_line_and_writes_nothing(
    base, task, tmp_path, capsys, more, message
):
    workdir = tmp_path / "run"
    assert grpo.main(script(base, task, workdir, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not workdir.exists()


def test_a_run_is_no_place_for_another(base, task, capsys):
    assert grpo.main(script(base, task, base)) == 2
    assert "holds another run" in capsys.readouterr().err


def test_programs_are_not_judged_without_a_sandbox(base, tmp_path, monkeypatch, capsys):
    line = {"answer": "", "verify": "code", "tests": {"kind": "asserts", "code": ["assert f()"]}}
    lines = [{"prompt": f"{i}", **line} for i in range(8)]
    task = write_lines(tmp_path / "a.jsonl", *lines)
    monkeypatch.setattr(loop.sandbox, "unavailable", lambda: "no bwrap is there")
    assert grpo.main(script(base, task, tmp_path / "run")) == 2
    assert "and no sandbox works: no bwrap is there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    given = {}
    monkeypatch.setattr(loop, "Scorer", lambda names, **how: given.update(how) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grpo.main(script(base, task, tmp_path / "run", "--allow_unsafe_code_execution"))
    assert given["allow_unsafe_code"] is True


def started(arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.grpo", *arguments[1:]],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, workdir, step, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= step for row in read_metrics(workdir)):
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[0])


@pytest.mark.nightly
def test_a_process_that_is_killed_or_told_to_stop_goes_on(base, task, tmp_path):
    """SIGKILL in the middle, then SIGTERM, then to the end: the run that nobody disturbed."""
    more = "--steps=40", "--set", "train.save_every_steps=3"
    arguments = script(base, task, tmp_path / "one", *more)
    process = started(arguments)
    wait_for_step(process, tmp_path / "one", 5)
    process.kill()
    process.communicate()
    process = started(arguments)
    wait_for_step(process, tmp_path / "one", 9)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    assert "stopped by SIGTERM after step" in out
    for folder in ("one", "other"):
        process = started(script(base, task, tmp_path / folder, *more))
        out, _ = process.communicate(timeout=400)
        assert process.returncode == 0, out
    rewards = 'rl.rewards=[{"name": "format"}, {"name": "accuracy"}]'
    fields = "rl.steps=40", "train.save_every_steps=3", rewards
    assert_same_run(tmp_path / "one", tmp_path / "other", base, task, *fields)
