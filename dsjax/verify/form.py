r"""Does a completion have the form that was asked for? Two forms, each an exact rule.

Knows nothing of answers being right. Tags that somebody typed into a prompt do not count, except
for a `<think>` at its very end, which a completion then need not write again.
"""

from dsjax.verify.extract import ANSWER, END_ANSWER, END_THINK, THINK, opens_thinking


def tagged(prompt: str, completion: str) -> float:
    """1.0 for `<think> ... </think> <answer> ... </answer>`, else 0.0.

    Each tag occurs once, in this order; nothing stands before the first, only white space between
    the middle two and behind the last; neither part is blank.

    Source: DeepSeek-R1, table 1 (the template of R1-Zero) and section 2.2.2.
    """
    text = _whole(prompt, completion)
    if any(text.count(tag) != 1 for tag in (THINK, END_THINK, ANSWER, END_ANSWER)):
        return 0.0
    before, _, rest = text.partition(THINK)
    thought, _, rest = rest.partition(END_THINK)
    between, _, rest = rest.partition(ANSWER)
    answer, end, behind = rest.partition(END_ANSWER)
    right = not before and thought.strip() and not between.strip() and answer.strip() and end
    return float(bool(right) and not behind.strip())


def thought_first(prompt: str, completion: str) -> float:
    r"""1.0 for `<think>\n ... \n</think>\n\n ...`, else 0.0.

    Both tags occur once, with exactly these line ends about them; neither the thought nor what
    follows is blank. A prompt that ends with `<think>` or `<think>\n` gives the beginning.

    Source: the output form of DeepSeek-R1's published chat template.
    """
    text = _whole(prompt, completion)
    if text.count(THINK) != 1 or text.count(END_THINK) != 1 or not text.startswith(f"{THINK}\n"):
        return 0.0
    thought, end, answer = text.removeprefix(f"{THINK}\n").partition(f"\n{END_THINK}\n\n")
    return float(bool(end and thought.strip() and answer.strip()) and answer[0] != "\n")


def _whole(prompt: str, completion: str) -> str:
    if not opens_thinking(prompt):
        return completion
    return THINK + prompt[len(prompt.rstrip()) :] + completion
