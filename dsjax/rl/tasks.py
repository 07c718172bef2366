"""Problems to learn from and to be measured on: where they come from, and how they become prompts.

Knows nothing about sampling or rewards. Which problem comes when is a function of the seed and a
counter, so that a run goes on where it was.
"""

import codecs
import dataclasses
import functools
import glob
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dsjax.config import RlConfig
from dsjax.data.packing import document_order
from dsjax.errors import InputError
from dsjax.interop.chat import ChatTemplate
from dsjax.interop.tokenizer import Tokenizer
from dsjax.verify import gym
from dsjax.verify.accuracy import check_record

type Check = Callable[[Mapping[str, Any]], None]

GYM = "reasoning_gym:"
_QUESTIONS = ("messages", "prompt", "question")  # a line has one of them


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, ready to be continued.

    Attributes:
        ids: of the prompt.
        prompt: its text, which rewards are given.
        record: what is known of it.
    """

    ids: tuple[int, ...]
    prompt: str
    record: Mapping[str, Any]


class Problems:
    """Those of a run: an endless order of training problems, and a held-out list.

    Attributes:
        held_out: never trained on.
        train: records to train on.
    """

    def __init__(
        self,
        train: Sequence[Mapping[str, Any]],
        held_out: Sequence[Mapping[str, Any]],
        render: Callable[[Any], tuple[tuple[int, ...], str]],
        *,
        max_tokens: int,
        seed: int,
    ):
        """Takes records.

        Args:
            train: in any order.
            held_out: all are rendered now.
            render: a question to (ids, text).
            max_tokens: of a prompt.
            seed: of the order.

        Raises:
            InputError: if no held-out prompt is short enough, or none to train on.
        """
        self.train, self._render, self._seed = train, render, seed
        self._max_tokens = max_tokens
        found = [self._problem(record) for record in held_out]
        self.held_out = [p for p in found if len(p.ids) <= max_tokens]
        if not self.held_out or not train:
            longest = max((len(p.ids) for p in found), default=0)
            raise InputError(
                f"no held-out problem is left: prompts have up to {longest} tokens, "
                f"rl.max_prompt_tokens is {max_tokens}"
            )
        self.take(0, 1)

    def take(self, position: int, count: int) -> tuple[list[Problem], int]:
        """The next problems from a position on; those with prompts that are too long are left out.

        Returns:
            (problems, the position behind them).

        Raises:
            InputError: if a whole epoch holds no prompt that is short enough.
        """
        found: list[Problem] = []
        start = position
        while len(found) < count:
            epoch, at = divmod(position, len(self.train))
            problem = self._problem(self.train[self._order(epoch)[at]])
            position += 1
            if len(problem.ids) <= self._max_tokens:
                found.append(problem)
            if not found and position - start > len(self.train):
                raise InputError(
                    f"no prompt of rl.task has at most {self._max_tokens} tokens "
                    "(rl.max_prompt_tokens)"
                )
        return found, position

    @functools.lru_cache(maxsize=2)  # noqa: B019  # one object a run
    def _order(self, epoch: int) -> np.ndarray:
        return document_order(len(self.train), self._seed, epoch)

    def _problem(self, record: Mapping[str, Any]) -> Problem:
        ids, prompt = self._render(_question_of(record))
        return Problem(ids, prompt, record)


def check_for(rewards: Mapping[str, Any]) -> Check:
    """A function that refuses a record which the built-in ones of these rewards cannot judge."""
    names = list(rewards.values())

    def check(record: Mapping[str, Any]) -> None:
        if "accuracy" in names:
            check_record(record)
        if "exact" in names:
            check_record({**record, "verify": "exact"})

    return check


def open_problems(
    config: RlConfig, tokenizer: Tokenizer, seed: int, *, check: Check = lambda record: None
) -> Problems:
    """The problems that `rl.task` names.

    Args:
        config: of the run.
        tokenizer: makes prompts, by its chat template where the configuration wants one.
        seed: of the run.
        check: refuses, with an InputError, a record that cannot be judged.

    Raises:
        InputError: for a task that is neither there nor known, lines that are no problems, or a
            tokenizer without the template that is asked for.
    """
    train, held_out = [], []
    for part in _parts(config.task):
        if part.startswith(GYM):
            ours = _of_family(part, config, seed)
        else:
            ours = _of_files(part, config, check)
        train += ours[0]
        held_out += ours[1]
    if not train or not held_out:
        raise InputError(
            f"rl.task {config.task!r} gives {len(train)} problems to train on and {len(held_out)} "
            "held-out ones; both are needed"
        )
    held_out = _evenly(held_out, config.held_out)
    render = renderer(tokenizer, config.template)
    return Problems(train, held_out, render, max_tokens=config.max_prompt_tokens, seed=seed)


def renderer(tokenizer: Tokenizer, template: str) -> Callable[[Any], tuple[tuple[int, ...], str]]:
    """A function of a question: its prompt's ids and text.

    Args:
        tokenizer: with a chat template, if that is to be used.
        template: `RlConfig.template`.

    Raises:
        InputError: without a template that is asked for; and, by the function, for a question that
            is a conversation where there is none.
    """
    if template == "none":

        def plain(question):
            if not isinstance(question, str):
                raise InputError("a problem has messages, but rl.template is none")
            return tuple(tokenizer.prompt_ids(question)), question

        return plain
    if tokenizer.chat_template is None:
        raise InputError(
            "the tokenizer has no chat template; fine-tune with one first (experiments.sft "
            "--template), or set rl.template=none"
        )
    chat = ChatTemplate(tokenizer)

    def talking(question):
        messages = (
            [{"role": "user", "content": question}] if isinstance(question, str) else question
        )
        return tuple(chat.encode_chat(messages)), chat.render(messages)

    return talking


def _question_of(record: Mapping[str, Any]) -> Any:
    return next(record[name] for name in _QUESTIONS if name in record)


def _parts(task: str) -> list[str]:
    """Tasks that are joined by `+`, which may also stand within braces."""
    parts = re.split(r"\+(?=reasoning_gym:)|(?<=\})\+", task)
    if not all(part.strip() for part in parts):
        raise InputError(f"rl.task {task!r} has an empty part")
    return [part.strip() for part in parts]


def _of_family(part: str, config: RlConfig, seed: int) -> tuple[list, list]:
    name, brace, rest = part.removeprefix(GYM).partition("{")
    try:
        fields = json.loads(brace + rest) if brace else None
    except ValueError as error:
        raise InputError(f"rl.task {part!r}: {error}") from error
    return gym.train_and_held_out(
        *(name,), seed=seed, train=config.problems, held_out=config.held_out, config=fields
    )


def _of_files(pattern: str, config: RlConfig, check: Check) -> tuple[list, list]:
    """Records of JSON lines; which are held out depends on their question alone."""
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise InputError(
            f"rl.task {pattern!r} is neither a file nor begins with {GYM.rstrip(':')!r}"
        )
    records: dict[str, dict[str, Any]] = {}  # by question: none is on both sides
    for path in paths:
        try:
            with open(path, "rb") as file:
                lines = file.read().removeprefix(codecs.BOM_UTF8).split(b"\n")
        except OSError as error:
            raise InputError(f"rl.task: {path} cannot be read: {error.strerror}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = _record(line)
                    check(record)
                except InputError as error:
                    raise InputError(f"{path}, line {number}: {error}") from error
                key = json.dumps(_question_of(record), sort_keys=True)
                records.setdefault(hashlib.sha256(key.encode()).hexdigest(), record)
    ordered = [records[key] for key in sorted(records)]
    count = min(config.held_out, len(ordered) // 2)
    return ordered[count:], ordered[:count]


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError("it is no object")
    if not any(name in record for name in _QUESTIONS):
        raise InputError(f"it has none of {', '.join(_QUESTIONS)}")
    _check_question(_question_of(record))
    if "answer" in record and isinstance(record["answer"], str):
        # GSM8K's answers end with the result behind four hashes.
        _, hashes, result = record["answer"].rpartition("####")
        if hashes:
            record = record | {"answer": result.strip(), "solution": record["answer"]}
    return record


def _check_question(question: Any) -> None:
    if isinstance(question, list) and question:
        if not all(isinstance(message, dict) for message in question):
            raise InputError("its messages are no objects")
        if question[-1].get("role") == "assistant":
            raise InputError("its messages end with an answer; the last one is to be a question")
    elif not isinstance(question, str) or not question.strip():
        raise InputError(f"its question is {question!r:.80}")
    try:
        json.dumps(question, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can write what UTF-8 cannot
        raise InputError("its question holds half of a surrogate pair") from error


def _evenly(items: list, count: int) -> list:
    """So many of a list, spread over it."""
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]
