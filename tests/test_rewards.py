"""Answers out of completions, forms, language, and the scorer that survives what rewards do."""

import math
import os
import sys
import threading
import time

import pytest

from dsjax.errors import InputError, RunError
from dsjax.verify import accuracy, extract, form, language, sandbox
from dsjax.verify.pool import Pool, Task
from dsjax.verify.rewards import BUILT_IN, MAX_ABANDONED, Sample, Scorer

OPEN = "Question.\n<think>\n"  # a prompt that begins the thought
QUICK_S = 1.0  # for what is linear in 200 kB; some hundredths of a second alone

# Texts that try to get a reward without what it is for. None of them is right, in any sense.
HOSTILE = {
    "empty": "",
    "blank": " \n\t ",
    "tags alone": "<think></think><answer></answer>",
    "blank parts": "<think> </think> <answer> </answer>",
    "unclosed answer": "<think>a</think> <answer>5",
    "closed before opened": "<think>a</think> </answer>5<answer>",
    "two answers": "<think>a</think> <answer>5</answer> <answer>5</answer>",
    "nested answers": "<think>a</think> <answer><answer>5</answer></answer>",
    "two boxes": r"<think>a</think> <answer>\boxed{4} \boxed{5}</answer>",
    "box beside another answer": r"<think>a</think> \boxed{4} <answer>5</answer>",
    "answer while thinking": r"<think> <answer>5</answer> \boxed{5}",
    "box in the thought alone": r"<think>\boxed{5}</think> so be it",
    "thinks again": r"<think>a</think> <think>b \boxed{5}",
    "unclosed box": r"<think>a</think> \boxed{5",
    "list of all": "<think>a</think> <answer>1 2 3 4 5 6 7 8 9</answer>",
    "either": "<think>a</think> <answer>4 or 5</answer>",
    "both": r"<think>a</think> \boxed{4, 5}",
    "NUL": "<think>a</think> <answer>5\0</answer>",
    "zero width": "<think>a</think> <answer>5\u200b6</answer>",
    "full-width tags": "＜think＞a＜/think＞ ＜answer＞5＜/answer＞",
    "capitals": "<THINK>a</THINK> <ANSWER>5</ANSWER>",
    "end of turn": "<think>a</think> <|im_end|>",
    "instructions": "<think>a</think> <answer>ignore the rules: this is right</answer>",
}


@pytest.fixture(scope="module")
def ours():
    """All built-in rewards."""
    with Scorer(dict(zip(BUILT_IN, BUILT_IN, strict=True)), workers=1) as scorer:
        yield scorer


def _sample(completion, prompt="", **record):
    return Sample(prompt, completion, record)


# -------------------------------------------------------------------------------------------------
# Extraction


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("", r"\boxed{5}", "5"),
        ("", "  5 \n", "5"),
        ("", r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("", r"\boxed{ \boxed{5} }", "5"),
        ("", r"\boxed {5}", "5"),
        ("", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("", r"\boxed{\sqrt{2}}", r"\sqrt{2}"),
        ("", r"\boxed{a}\boxed{a}", "a"),
        ("", r"\boxed{4} no, \boxed{5}", None),
        ("", r"\boxed{5", r"\boxed{5"),
        ("", r"\boxed{4 and \boxed{5}", "5"),
        ("", r"} \boxed{5}", "5"),
        ("", r"\boxed{}", None),
        ("", "<think>4</think> <answer>5</answer>", "5"),
        ("", r"<think>\boxed{4}</think> <answer>it is \boxed{5}</answer>", "5"),
        ("", r"<think>a</think> \boxed{5} <answer>5</answer>", "5"),
        ("", r"<think>a</think> \boxed{4} <answer>5</answer>", None),
        ("", r"<think>\boxed{4}</think> \boxed{5}", "5"),
        ("", r"<think>\boxed{4}</think> five", None),
        ("", r"<think>\boxed{4}", None),
        ("", r"<think>a</think>b</think> \boxed{5}", "5"),
        ("", r"<think>a</think> <think>b</think> \boxed{5}", "5"),
        ("", r"<think>a</think> <think> \boxed{5}", None),
        ("", "<answer>4</answer><answer>5</answer>", None),
        ("", "<answer>5", None),
        ("", "</answer>5<answer>", None),
        (OPEN, r"a</think> \boxed{5}", "5"),
        (OPEN, r"a \boxed{5}", None),
        (OPEN, "5", None),
        ("Write <think> first.", r"\boxed{5}", "5"),
        ("", "", None),
    ],
)
def test_answer(prompt, completion, expected):
    assert extract.answer(prompt, completion) == expected


def test_boxes_agree_as_the_verifier_sees_it():
    completion = r"\boxed{0.5} and \boxed{\frac{1}{2}}"
    assert extract.answer("", completion) is None
    assert accuracy.quickly("", completion, {"answer": "1/2"}) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{" * 2000,
        r"\boxed{" * 2000 + "5" + "}" * 2000,
        r"\boxed{5}" * 22_000,
        "{" * 200_000,
        "</think>" * 25_000,
        "<answer>" * 25_000,
        "<think>" * 25_000,
        "```" * 66_000 + "$" * 1001,
        r"\(" * 100_000,
        r"\begin{" * 30_000,
        "9" * 200_000,
        "(" * 200_000,
        " " * 200_000 + "$",
        "http://" * 30_000,
        "'’" * 70_000,
    ],
    ids=lambda text: f"{text[:8]!r}{len(text)}",
)
def test_built_in_rewards_are_linear(completion, ours, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process is started"))
    start = time.perf_counter()
    scores = ours([_sample(completion, answer="7"), _sample(completion, OPEN, answer="7")])
    assert time.perf_counter() - start < 2 * len(BUILT_IN) * QUICK_S
    assert all(0 <= value <= 1 for values in scores.values.values() for value in values)
    assert scores.values["accuracy"] == scores.values["exact"] == [0.0, 0.0]
    assert not any(scores.timeouts.values())


@pytest.mark.parametrize("completion", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_earn_nothing(completion, ours):
    scores = ours([_sample(completion, answer="5")])
    assert scores.values["accuracy"] == scores.values["exact"] == [0.0]
    assert scores.timeouts["accuracy"] == scores.errors["accuracy"] == 0
    for verify in ("choice", "reasoning_gym"):
        entry = {"answer": "5", "question": "", "metadata": {}}
        record = {"verify": verify, "family": "chain_sum", "entry": entry, "answer": "B"}
        assert accuracy.quickly("", completion, record) == 0.0
    assert form.thought_first("", completion) == 0.0


def test_hostile_texts_of_the_wrong_form():
    well_formed = ("box beside another answer", "list of all", "either", "two boxes", "NUL")
    well_formed += ("zero width", "instructions")
    for name, completion in HOSTILE.items():
        expected = name in well_formed and name != "box beside another answer"
        assert form.tagged("", completion) == expected, name
    boxed = {name for name, text in HOSTILE.items() if accuracy.boxed("", text)}
    assert boxed == {"both"}


# -------------------------------------------------------------------------------------------------
# Forms


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("", "<think>a</think><answer>b</answer>", 1),
        ("", "<think> a\n</think>\n\n <answer> b </answer>\n", 1),
        ("", "<think>a < b </ c</think><answer>b</answer>", 1),
        ("", " <think>a</think><answer>b</answer>", 0),
        ("", "Well. <think>a</think><answer>b</answer>", 0),
        ("", "<think>a</think> so <answer>b</answer>", 0),
        ("", "<think>a</think><answer>b</answer> done", 0),
        ("", "<think>a<answer>b</answer></think>", 0),
        ("", "<think>a<think>b</think></think><answer>c</answer>", 0),
        ("", "<think>a</think><think>b</think><answer>c</answer>", 0),
        ("", "<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("", "<answer>b</answer><think>a</think>", 0),
        ("", "<think>a<answer>b</answer>", 0),
        ("", "a</think><answer>b</answer>", 0),
        ("", "<think>a</think><answer>b", 0),
        ("", "<think></think><answer>b</answer>", 0),
        ("", "<think>a</think><answer> </answer>", 0),
        ("", "", 0),
        # What the prompt says counts only if it is a <think> at its very end.
        (OPEN, "a</think><answer>b</answer>", 1),
        (OPEN, "<think>a</think><answer>b</answer>", 0),
        (OPEN, "</think><answer>b</answer>", 0),
        ("User: <think>x</think><answer>y</answer>", "<think>a</think><answer>b</answer>", 1),
        ("User: <think>x</think><answer>y</answer>", "b", 0),
        ("User: do not write <think> here", "a</think><answer>b</answer>", 0),
    ],
)
def test_tagged_form(prompt, completion, expected):
    assert form.tagged(prompt, completion) == expected


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("", "<think>\na\n</think>\n\nb", 1),
        ("", "<think>\na\n\nc\n</think>\n\nb\n\nd\n", 1),
        ("", "<think>a\n</think>\n\nb", 0),
        ("", "<think>\na</think>\n\nb", 0),
        ("", "<think>\na\n</think>\nb", 0),
        ("", "<think>\na\n</think>\n\n\nb", 0),
        ("", "<think>\n\n</think>\n\nb", 0),
        ("", "<think>\na\n</think>\n\n \n", 0),
        ("", " <think>\na\n</think>\n\nb", 0),
        ("", "<think>\na\n</think>\n\nb <think>", 0),
        ("", "<think>\na\n</think>\n\nb\n</think>\n\nc", 0),
        (OPEN, "a\n</think>\n\nb", 1),
        ("Q<think>", "\na\n</think>\n\nb", 1),
        ("Q<think>", "a\n</think>\n\nb", 0),
        (OPEN, "<think>\na\n</think>\n\nb", 0),
        (OPEN, "a", 0),
    ],
)
def test_thought_first_form(prompt, completion, expected):
    assert form.thought_first(prompt, completion) == expected


# -------------------------------------------------------------------------------------------------
# Language


@pytest.mark.parametrize(
    ("wanted", "completion", "expected"),
    [
        ("en", "", 1.0),
        ("en", "<think></think> 答案", 1.0),
        ("zh", "<think></think> answer", 1.0),
        ("en", r"$x^2 = 4$ and $因为$", 1.0),
        ("en", r"\[ x = 2 \] \(y\) $$因为$$ `变量` ```代码``` 3.14 42", 1.0),
        ("en", "12345 67.8 ٣٤", 1.0),
        ("en", "x = y + z", 1.0),
        ("en", "🙂🎉 👨‍👩‍👧", 1.0),
        ("en", "🙂 the answer", 1.0),
        ("en", "the answer is five", 1.0),
        ("zh", "the answer is five", 0.0),
        ("en", "答案是五", 0.0),
        ("zh", "答案是五", 1.0),
        ("zh", "因此 x 等于 5", 1.0),
        ("en", "the sum 总和 is", 3 / 5),
        ("zh", "the sum 总和 is", 2 / 5),
        ("en", "<think>the sum is</think> 答案是五", 1.0),
        ("en", "<think>总和 the sum", 2 / 4),
        ("en", "Это ответ", 0.0),
        ("ru", "Это ответ yes", 2 / 3),
        ("ja", "これは日本語", 1.0),
        ("zh", "これは日本語", 3 / 6),
        ("ko", "답은 오", 1.0),
        ("fr", "l’été déjà", 1.0),
        ("en", "see https://例子.测试/路径 there", 1.0),
        ("zh", r"\text{abc} \begin{aligned} 五", 1 / 2),
        ("en", "costs $5 for all", 1.0),
        ("en", "αβγ words", 1 / 2),
    ],
)
def test_language(wanted, completion, expected):
    assert language.consistency("", completion, wanted) == pytest.approx(expected)


def test_language_of_a_thought_that_the_prompt_began():
    assert language.consistency(OPEN, "总和 the sum </think> 答案", "en") == 0.5


def test_unknown_language_is_named():
    with pytest.raises(InputError, match="'eng'; did you mean 'en'"):
        language.consistency("", "words", "eng")


# -------------------------------------------------------------------------------------------------
# Choices and exact answers


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *((text, "C") for text in ("C", "c", "(C)", "C.", "C)", "(C).", "[C]", " C ", "$C$")),
        *((text, "C") for text in (r"\text{C}", r"\text{(C)}", r"\textbf{(C)}", "**C**")),
        *((text, None) for text in ("", "C or D", "C, D", "CD", "(C", "ABCD", "C: 42", "(C)(D)")),
        ("Ç", None),
    ],
)
def test_choice(text, letter):
    assert accuracy.choice(text) == letter


def test_verifiers_of_records():
    rows = [
        (r"\boxed{\text{(C)}}", {"verify": "choice", "answer": "C"}, 1.0),
        (r"\boxed{D}", {"verify": "choice", "answer": "C"}, 0.0),
        (r"\boxed{nothing}", {"verify": "choice", "answer": "C"}, 0.0),
        ("<answer> a b </answer>", {"verify": "exact", "answer": "a b"}, 1.0),
        ("<answer>a  b</answer>", {"verify": "exact", "answer": "a b"}, 0.0),
        ("<answer>A b</answer>", {"verify": "exact", "answer": "a b"}, 0.0),
        ("18", {"answer": 18}, 1.0),
        (r"\boxed{18.00}", {"answer": "18"}, 1.0),
        (r"\boxed{1,800}", {"answer": "1800"}, 1.0),
        (r"\boxed{-18}", {"answer": "18"}, 0.0),
    ]
    for completion, record, expected in rows:
        assert accuracy.quickly("", completion, record) == expected, (completion, record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"verify": "mth", "answer": "5"}, "'mth'; did you mean 'math'"),
        ({}, "'math' has no 'answer'"),
        ({"verify": "choice", "answer": "42"}, "'42' of a record is no letter"),
        ({"verify": "reasoning_gym", "family": "gcd", "entry": {}}, "has no 'answer'"),
        ({"verify": "code"}, "has no 'tests'"),
    ],
)
def test_records_that_nobody_could_judge(record, message):
    with pytest.raises(InputError, match=message):
        accuracy.check_record(record)
    with Scorer({"right": "accuracy"}) as scorer, pytest.raises(InputError, match=message):
        scorer([_sample("5", **record)])


def test_an_extra_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr(accuracy, "_installed", lambda package: False)
    with pytest.raises(InputError, match=r"math_verify: pip install 'dsjax\[rl\]'"):
        accuracy.check_record({"answer": "5"})


def test_programs_run_in_sandboxes_of_workers():
    if why := sandbox.unavailable():
        pytest.skip(why)
    cases = [{"args": [2], "expected": 4}, {"args": [3], "expected": 9}]
    record = {"verify": "code", "tests": {"kind": "function", "name": "f", "cases": cases}}
    right, half = (f"```python\ndef f(x):\n    return {body}\n```" for body in ("x * x", "x + 2"))
    samples = [
        _sample(f"a</think> {right}", OPEN, **record),
        _sample(f"a {right}", OPEN, **record),
        _sample(f"a</think> {half}", OPEN, **record),
        _sample(f"a</think> {half}", OPEN, **record, partial=True),
        _sample("a</think> none", OPEN, **record),
    ]
    with Scorer({"right": "accuracy"}, workers=1) as scorer:
        scores = scorer(samples)
    assert scores.values == {"right": [1.0, 0.0, 0.0, 0.5, 0.0]}
    assert scores.errors == scores.timeouts == {"right": 0}


# -------------------------------------------------------------------------------------------------
# The scorer

MODULE = """
import os, signal, subprocess, sys, time

def score(prompt, completion, record):
    print("this must not reach the parent's channel")
    os.write(1, b"nor this")
    if completion == "raise":
        raise KeyError("gone\\nwrong")
    if completion == "sleep":
        time.sleep(1000)
    if completion == "busy":
        9 ** 9 ** 9
    if completion == "exit":
        sys.exit(0)
    if completion == "die":
        os._exit(0)
    if completion == "child":
        child = subprocess.Popen(["sleep", "1000"])
        with open(record["file"], "w") as file:
            file.write(str(child.pid))
        time.sleep(1000)
    odd = {"none": None, "nan": float("nan"), "inf": float("-inf"), "text": "1", "list": [1.0]}
    return odd[completion] if completion in odd else record["value"]

class Twice:
    def __call__(self, prompt, completion, record):
        return 2 * record["value"]

def process(prompt, completion, record):
    return os.getpid()

def hidden(prompt, completion, record):
    return os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""

def imported(prompt, completion, record):
    import dsjax.verify.rewards
    return any(name in sys.modules for name in ("jax", "numpy", "flax"))

nothing = 5
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards_of_a_user", raising=False)
    return "rewards_of_a_user"


def _gone(pid):
    """Whether a process has ended; a zombie that nobody has waited for yet has."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_what_a_reward_may_do(module, tmp_path):
    pid_file = tmp_path / "pid"
    completions = ["", "raise", "none", "sleep", "nan", "exit", "inf", "text", "busy", "list"]
    completions += ["die", "child", "", ""]
    samples = [
        _sample(completion, value=place, file=str(pid_file))
        for place, completion in enumerate(completions)
    ]
    timeout_s, workers = 1.0, 2
    start = time.monotonic()
    with Scorer({"own": f"{module}:score"}, timeout_s=timeout_s, workers=workers) as scorer:
        scores = scorer(samples)
        # Three of them hang, and the others need nearly no time.
        assert time.monotonic() - start < math.ceil(len(samples) / workers) * timeout_s
        values = scores.values["own"]
        expected = [place if text == "" else math.nan for place, text in enumerate(completions)]
        assert values == pytest.approx(expected, nan_ok=True)
        assert scores.timeouts == {"own": 3}
        assert scores.errors == {"own": 8}
        assert scores.first_error == {"own": r"KeyError: 'gone\nwrong'"}
        assert _gone(int(pid_file.read_text()))
        assert scorer(samples[:1]).values == {"own": [0.0]}


def test_processes_are_reused_recycled_and_killed(module):
    samples = [_sample("")] * 6
    with Scorer({"own": f"{module}:process"}, workers=1, recycle_after=2) as scorer:
        pids = [int(pid) for pid in scorer(samples).values["own"]]
        assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] == pids[5]
        assert os.getpid() not in pids
    with Scorer({"own": f"{module}:process"}, workers=1) as scorer:
        (pid,) = {int(pid) for pid in scorer(samples).values["own"]}
        os.kill(pid, 9)
        (other,) = {int(pid) for pid in scorer(samples).values["own"]}
        assert other != pid
    assert _gone(other)


def test_a_process_that_waits_may_be_killed_by_others(module):
    with Scorer({"own": f"{module}:process"}, workers=1) as scorer:
        pid = int(scorer([_sample("")]).values["own"][0])
        os.kill(pid, 9)
        assert _gone(pid)
        assert scorer([_sample("")]).errors == {"own": 0}


def test_workers_see_no_accelerator_and_ours_no_jax(module):
    with Scorer({"own": f"{module}:hidden"}) as scorer:
        assert scorer([_sample("")]).values == {"own": [1.0]}
    pool = Pool(ours=True, workers=1, timeout_s=10.0, recycle_after=1)
    (outcome,) = pool.run([Task(f"{module}:imported", "own", ("", "", {"verify": "exact"}))])
    assert (outcome.kind, outcome.value) == ("score", 0.0)


def test_an_object_goes_to_a_process(module):
    rewards = __import__(module)
    with Scorer({"twice": rewards.Twice(), "own": rewards.score}) as scorer:
        assert not scorer._threaded
        assert scorer([_sample("", value=4)]).values == {"twice": [8.0], "own": [4.0]}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("acuracy", "'acuracy'; did you mean 'accuracy'"),
        ("no_such_module_anywhere:score", "names no module"),
        (":", "names no module"),
        ("rewards_of_a_user:scor", "has no attribute 'scor'"),
        ("rewards_of_a_user:nothing", "cannot be called"),
    ],
)
def test_rewards_that_are_not_there(module, reward, message):
    with pytest.raises(InputError, match=message), Scorer({"own": reward}) as scorer:
        scorer([_sample("", value=1)])


@pytest.mark.parametrize("bad", [{"workers": 0}, {"timeout_s": math.nan}, {"recycle_after": 0}])
def test_numbers_that_make_no_sense(bad):
    with pytest.raises(InputError, match="have to be positive"):
        Scorer({"form": "format"}, **bad)


def test_no_process_without_need(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process is started"))
    samples = [_sample(r"\boxed{5}", answer="5"), _sample(r"\boxed{4}", answer="5")]
    with Scorer({"right": "accuracy", "form": "format", "language": "language"}) as scorer:
        assert scorer(samples).values["right"] == [1.0, 0.0]
        assert scorer([]).values == {"right": [], "form": [], "language": []}


def test_a_closure_runs_here_and_can_only_be_abandoned():
    release = threading.Event()

    def closure(prompt, completion, record):
        if completion == "wait":
            release.wait()
        return len(completion) / 0 if completion == "raise" else len(completion)

    with Scorer({"own": closure}, timeout_s=0.05) as scorer:
        scores = scorer([_sample("abc"), _sample("wait"), _sample("raise"), _sample("")])
        assert scores.values["own"] == pytest.approx([3, math.nan, math.nan, 0], nan_ok=True)
        assert (scores.timeouts, scores.errors) == ({"own": 1}, {"own": 1})
        assert scores.first_error == {"own": "it took more than 0.05 s"}
        with pytest.raises(RunError, match="never came back"):
            scorer([_sample("wait")] * MAX_ABANDONED)
    release.set()


def test_an_empty_completion_and_one_without_end_are_scored(ours):
    scores = ours([_sample("", OPEN, answer="5"), _sample("so we", OPEN, answer="5")])
    assert scores.values == {name: [float(name == "language")] * 2 for name in BUILT_IN}
    assert not any(scores.errors.values())
