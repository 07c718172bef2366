"""Mathematical answers by math-verify and puzzles by reasoning_gym, and texts that attack both."""

import importlib.util
import math
import sys
import time

import pytest

from dsjax.errors import InputError
from dsjax.verify import accuracy, gym, maths
from dsjax.verify.rewards import Sample, Scorer

for package in ("math_verify", "reasoning_gym"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package}, of the extra rl, is not installed", allow_module_level=True)

TIMEOUT_S = 1.0


@pytest.mark.parametrize(
    ("gold", "given", "expected"),
    [
        ("5", "5", True),
        ("5", " 5. ", True),
        ("70000", "70,000", True),
        ("70000", r"70\,000", True),
        ("70000", r"70{,}000", True),
        ("18", r"\$18", True),
        ("18", "$18$", True),
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        (r"\frac{1}{2}", "-1/2", False),
        ("-5", "−5", True),
        ("0.333", "1/3", False),
        ("1/3", "0.3333333333333333", False),
        ("1", "0.99999999999999999999", False),
        ("5", "", False),
        ("", "", False),
        ("5", "1/0", None),
        (r"\sqrt{2}", "1.4142", None),
        ("5", "9" * 2000, False),
        ("9" * 999, "9" * 998 + "8", None),
    ],
)
def test_what_needs_no_math_verify(gold, given, expected):
    assert maths.same_quickly(gold, given) is expected


@pytest.mark.parametrize(
    ("gold", "given", "expected"),
    [
        ("14/3", r"4\frac{2}{3}", True),
        (r"\{1,2\}", r"\{2, 1\}", True),
        ("(1,2)", "(2,1)", False),
        ("50\\%", "0.5", True),
        ("3.5\\%", "0.035", True),
        ("5", "x=5", True),
        ("x=5", "5", True),
        ("10^{18}", "1000000000000000000", True),
        ("12", r"12 \text{ cm}", True),
        ("90", r"90^\circ", True),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}", True),
        (r"\sqrt{2}", "2^{0.5}", True),
        ("[1,2)", "[1,2]", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2.0\end{pmatrix}", True),
        ("Paris", "London", False),
        # A decimal is the number that it says: closeness is not equality.
        (r"\sqrt{2}", "1.4142", False),
        (r"\sqrt{2}", "1.41421356", False),
        (r"\sqrt{2}", "1.414213562373095048", False),
        (r"\pi", "3.14159265", False),
        # Hedges.
        ("5", "4, 5", False),
        ("5", "4 or 5", False),
        ("5", r"4 \text{ or } 5", False),
        ("5", r"\{4, 5\}", False),
        ("45", "4 5", False),
        ("20", "4 5", False),
        ("5", "5=4", False),
        ("5", r"5 \pm 1", False),
        ("5", "x", False),
        ("5", r"\infty", False),
        ("5", "$4$ and $5$", False),
    ],
)
def test_math_verify(gold, given, expected):
    assert maths.same(gold, given) is expected


def test_a_right_answer_that_cannot_be_read_is_told():
    with pytest.raises(ValueError, match="cannot read the right answer"):
        maths.same(r"\frac{", "5")
    record = {"answer": r"\frac{"}
    with Scorer({"right": "accuracy"}, workers=1) as scorer:
        scores = scorer([Sample("", r"\boxed{5}", record)])
    assert math.isnan(scores.values["right"][0])
    assert scores.errors == {"right": 1}
    assert "cannot read the right answer" in scores.first_error["right"]


def test_hostile_mathematics_is_bounded_and_holds_nobody_up():
    hostile = [
        "9^{9^{9^9}}",
        "1000000!",
        "(x+1)^{5000}",
        "(" * 3000 + "5" + ")" * 3000,
        "(" * 400 + "5" + ")" * 400,
        "5" * 200_000,
        r"\boxed{" * 2000,
    ]
    texts = [rf"\boxed{{{text}}}" for text in hostile]
    fair = [(r"\boxed{b+a}", 1.0), (r"\boxed{b-a}", 0.0)]
    texts[1:1] = [text for text, _ in fair]
    samples = [Sample("", text, {"answer": "a+b"}) for text in texts]
    with Scorer({"right": "accuracy"}, timeout_s=TIMEOUT_S) as scorer:
        start = time.monotonic()
        scores = scorer(samples)
        # Twice: each process that is killed makes way for another, which takes a second to start.
        assert time.monotonic() - start < 2 * math.ceil(len(samples) / 2) * TIMEOUT_S + 10
        assert scores.values["right"] == [0.0, *(right for _, right in fair), *[0.0] * 6]
        assert scores.errors == {"right": 0}
        assert scores.timeouts["right"] > 0
        again = scorer(samples[1:3])
    assert again.values["right"] == [right for _, right in fair]


# -------------------------------------------------------------------------------------------------
# reasoning_gym


def _judge(record, given):
    return accuracy.slowly("", f"<think>a</think> <answer>{given}</answer>", record)


def test_problems_of_a_seed():
    config = {"min_terms": 2, "max_terms": 2}
    problems = gym.problems("chain_sum", seed=3, size=5, config=config)
    assert problems == gym.problems("chain_sum", seed=3, size=5, config=config)
    assert problems[:3] == gym.problems("chain_sum", seed=3, size=3, config=config)
    assert problems != gym.problems("chain_sum", seed=4, size=5, config=config)
    long = {"min_terms": 4, "min_digits": 3, "max_digits": 4}  # none by chance
    many = [gym.problems("chain_sum", seed=seed, size=200, config=long) for seed in range(3)]
    questions = [{problem["question"] for problem in found} for found in many]
    assert not questions[0] & questions[1]
    assert not questions[1] & questions[2]
    for problem in problems:
        accuracy.check_record(problem)
        assert problem["question"].count("+") + problem["question"].count(" - ") == 1
        answer = problem["answer"]
        for given, score in [(answer, 1), (f"{answer}.0", 1), (f"{answer} 1", 0), ("1e9", 0)]:
            completion = f"<answer>{given}</answer>"
            assert accuracy.quickly("", completion, problem) == score, given


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("chain_sums", None, "'chain_sums'; did you mean 'chain_sum'"),
        ("chain_sum", {"terms": 3}, "configuration of 'chain_sum' is wrong.*'terms'"),
        ("chain_sum", {"min_terms": 0}, "configuration of 'chain_sum' is wrong"),
        ("rush_hour", None, "'rush_hour' of reasoning_gym has no right answers"),
        ("graph_color", None, "'graph_color' of reasoning_gym has no right answers"),
        ("composite", None, "configuration of 'composite' is wrong"),
    ],
)
def test_problems_that_cannot_be_had(family, config, message):
    with pytest.raises(InputError, match=message):
        gym.problems(family, seed=0, size=1, config=config)


def test_held_out_problems_are_others():
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train, held_out = gym.train_and_held_out(
        "chain_sum", seed=0, train=60, held_out=20, config=config
    )
    questions = [record["question"] for record in train + held_out]
    assert (len(train), len(held_out), len(set(questions))) == (60, 20, 80)
    others = gym.problems("chain_sum", seed=1, size=200, config=config)
    left = gym.without_questions(others, held_out)
    assert 0 < len(left) < len(others)
    assert {record["question"] for record in left}.isdisjoint(questions[60:])
    train, held_out = gym.train_and_held_out(
        "chain_sum", seed=0, train=9000, held_out=20, config=config
    )
    assert 160 < len(train) <= 2 * 10 * 10 - 20  # two digits and a sign
    assert gym.without_questions(train, held_out) == train
    with pytest.raises(InputError, match=r"about \d+ different questions: too few to hold 100"):
        gym.train_and_held_out("chain_sum", seed=0, train=900, held_out=100, config=config)


@pytest.mark.parametrize(
    "family",
    [
        "basic_arithmetic",
        "countdown",
        "fraction_simplification",
        "gsm_symbolic",
        "mini_sudoku",
        "n_queens",
        "products",
    ],
)
def test_the_right_answer_is_right_and_hedges_are_not(family):
    for record in gym.problems(family, seed=3, size=3):
        assert _judge(record, record["answer"]) == 1.0
        assert _judge(record, f"{record['answer']} 1 2 3 4 5 6") == 0.0
        assert _judge(record, "nonsense") == 0.0
        partial = {**record, "partial": True}
        assert 0 <= _judge(partial, f"{record['answer']} 1") <= 1


def test_another_right_answer_is_asked_of_the_family():
    (record,) = gym.problems("countdown", seed=1, size=1)
    swapped = f"0 + ({record['answer']}) * 1"
    assert accuracy.quickly("", f"<answer>({record['answer']})</answer>", record) is None
    assert _judge(record, f"({record['answer']})") == 1.0
    assert _judge(record, swapped) == 0.0  # uses numbers that are not there
    for record in gym.problems("fraction_simplification", seed=3, size=3):
        above, below = (record["entry"]["metadata"][name] for name in ("numerator", "denominator"))
        assert _judge(record, rf"\frac{{{above}}}{{{below}}}") == 0.0  # not in lowest terms


@pytest.mark.parametrize(
    "family", ["binary_matrix", "countdown", "n_queens", "puzzle24", "simple_integration"]
)
def test_answers_are_not_run_as_python(family, tmp_path, monkeypatch):
    """Each of these families passes answers to an `eval`."""
    (record,) = gym.problems(family, seed=1, size=1)
    canary = tmp_path / "canary"
    data = gym.prepare(record)
    for attack in (f"open({str(canary)!r}, 'w')", f"[open({str(canary)!r}, 'w')]"):
        assert gym.score(attack, record) == 0.0
        assert not canary.exists()
    guarded = vars(sys.modules[type(data).__module__])
    for name in ("eval", "parse_expr", "sympy"):  # the same without the guard, which does it
        monkeypatch.delitem(guarded, name, raising=False)
    import sympy

    if "sympy" in type(data).score_answer.__code__.co_names:
        guarded["sympy"] = sympy
    guarded["parse_expr"] = sympy.parse_expr
    data.score_answer(f"open({str(canary)!r}, 'w')", entry=dict(record["entry"]))
    assert canary.exists()


@pytest.mark.parametrize("text", ["f(1)", "x", "(1).real", "lambda: 1", "[i for i in (1,)]", "1;2"])
def test_calculate_refuses_what_is_no_arithmetic(text):
    with pytest.raises((ValueError, SyntaxError)):
        gym.calculate(text)


def test_calculate():
    assert gym.calculate(" -(1 + 2) * 3 // 2 ") == -5
    assert gym.calculate("[[1, 'a'], (True, None)]") == [[1, "a"], (True, None)]


def test_scores_of_a_family_come_from_a_process():
    (record,) = gym.problems("countdown", seed=1, size=1)
    samples = [
        Sample("", f"<answer>{text}</answer>", record)
        for text in (f"({record['answer']})", "1 + 1", "__import__('os')._exit(0)", "9**9**9**9")
    ]
    with Scorer({"right": "accuracy"}, workers=1, timeout_s=TIMEOUT_S) as scorer:
        scores = scorer(samples)
    assert scores.values["right"] == [1.0, 0.0, 0.0, 0.0]
    assert scores.errors == {"right": 0}
    assert scores.timeouts == {"right": 1}
