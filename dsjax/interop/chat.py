"""Chat templates: from messages to the text and the token ids that a model was trained on.

Knows nothing about models or requests. A template comes with published weights and is a program of
somebody else, so that it runs in a process of its own (`dsjax.interop.chat_worker`), one for each
`ChatTemplate`, started by the first rendering and kept: rendering then takes under a millisecond.
A count of steps within our own process would not do: a single step such as `10**10**10` or
`'%999999999d' % 1` never comes back to be counted, and Python threads cannot be ended.

Behaviour follows transformers 5.23's `apply_chat_template`, which is the reference of the tests.
"""

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dsjax.errors import InputError, RunError
from dsjax.interop.tokenizer import Tokenizer

MAX_TEMPLATE = 256 * 1024  # characters; the longest published ones have some 30,000
MAX_RENDERED = 4_000_000  # characters: four times the context of any published model
MAX_REQUEST_BYTES = 16 * 2**20
MAX_DEPTH = 64  # of lists and dicts in messages and tools
SECONDS = 5.0
_START_SECONDS = 60.0
_MAX_ANSWER_BYTES = 13 * MAX_RENDERED  # a character takes at most twelve in JSON

# What an assistant's `content` may hold that becomes tokens again: what models write within a turn
# and callers give back. The marks that begin and end turns are not among them.
KEPT = {"assistant": ("<think>", "</think>", "<tool_call>", "</tool_call>")}

# They come out of requests: checked by hand, so that what is wrong is told in one line.
type Messages = Any  # a list of objects with a role and a content
type Tools = Any  # a list of JSON schemas, or None

_REASONING = ("reasoning_content", "thinking", "reasoning")
# A template that reads parts of a content names their type or their field.
_READS_PARTS = re.compile(r"""['"]text['"]|\.text\b""")
_WORKER = Path(__file__).with_name("chat_worker.py")
_ENVIRONMENT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


class ChatTemplate:
    """A published chat template with the tokenizer that it came with.

    Safe to use from several threads, which wait for one another.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str | Mapping[str, str] | None = None,
        *,
        seconds: float = SECONDS,
    ):
        """Takes the tokenizer's own template, or another one.

        Args:
            tokenizer: whose named tokens the template may use.
            source: Jinja text, or several by name, of which `tool_use` is taken where there are
                tools and `default` otherwise; None takes `tokenizer.chat_template`.
            seconds: how long a rendering may take.

        Raises:
            InputError: if there is no template, or it is too long.
        """
        source = tokenizer.chat_template if source is None else source
        if source is None:
            raise InputError("this tokenizer has no chat template")
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        for name, text in self._sources.items():
            if len(text) > MAX_TEMPLATE:
                raise InputError(
                    f"the chat template {name!r} has {len(text):,} characters; at most "
                    f"{MAX_TEMPLATE:,} are read"
                )
        self.tokenizer = tokenizer
        self._seconds = seconds
        self._worker = _Worker()

    def __reduce__(self) -> tuple:
        return _again, (self.tokenizer, self._sources, self._seconds)

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation; `encode_chat` makes ids of it.

        As in transformers, fields of a message that are None are left out. A template that asks for
        a content nevertheless, where transformers fails, gets None (R1's asks whether it `is none`)
        or an empty text (Qwen3's adds to it). A content in parts reaches a template that reads
        parts as it is, others joined by line ends.

        Args:
            messages: each with a `role` and a `content`: a text, or `[{"type": "text", "text":
                ...}]`, or None beside `tool_calls`. Further fields reach the template.
            tools: JSON schemas, as the OpenAI interface has them.
            add_generation_prompt: ends with the beginning of the assistant's answer.
            variables: more for the template, such as `enable_thinking=False`; plain JSON values.

        Raises:
            InputError: for messages of another form, and for a template that is malformed, refuses
                the conversation, or wants more time, memory or room than it is given.
            RunError: if the process that renders does not start.
        """
        inputs = self._inputs(messages, tools, variables)
        return self._render(self._source(tools), inputs, add_generation_prompt, time.time())

    def encode_chat(
        self,
        messages: Messages,
        *,
        tools: Tools = None,
        add_generation_prompt: bool = True,
        kept: Mapping[str, Sequence[str]] = KEPT,
        **variables: Any,
    ) -> list[int]:
        """The ids of `render`'s text, in which the template's own special tokens alone are such.

        A special token's text in a message, a tool or a variable stays text: wherever one could
        begin there, a character that no input has is put behind its first one, the template is
        rendered with it, and it is taken out of what is encoded as ordinary text. The template
        must write the same with it and without.

        Args:
            messages: as in `render`, like the other three.
            tools: see `render`.
            add_generation_prompt: see `render`.
            kept: by role, what becomes tokens in a message's `content` nevertheless. Without
                entries a reasoning history is text, and a template that looks for it is refused.
            variables: see `render`.

        Raises:
            InputError: as `render`; for a conversation whose special token texts the template
                reads, so that they cannot be told from its own; and for half a surrogate pair.
        """
        guarded = self.guard(messages, tools=tools, kept=kept, now=time.time(), **variables)
        return guarded.encode(guarded.text(add_generation_prompt=add_generation_prompt))

    def guard(
        self,
        messages: Messages,
        *,
        tools: Tools = None,
        kept: Mapping[str, Sequence[str]] = KEPT,
        now: float,
        **variables: Any,
    ) -> "GuardedChat":
        """A conversation to be rendered and encoded in parts; see `encode_chat`.

        Args:
            messages: as in `render`.
            tools: see `render`.
            kept: see `encode_chat`.
            now: the time that the template is told, in seconds since 1970.
            variables: see `render`.

        Raises:
            InputError: for messages of another form.
        """
        source, inputs = self._source(tools), self._inputs(messages, tools, variables)
        given = json.dumps(inputs, ensure_ascii=False)
        unused = (chr(code) for code in range(0xF0000, 0xFFFFE))  # private use, plane 15
        guard = next(c for c in unused if c not in given and c not in source)
        return GuardedChat(self, source, inputs, self._guarded(inputs, guard, kept), guard, now)

    def _source(self, tools: Tools) -> str:
        names = ("default",) if tools is None else ("tool_use", "default")
        for name in names:
            if name in self._sources:
                return self._sources[name]
        raise InputError(f"no chat template is named 'default'; there are {sorted(self._sources)}")

    def _inputs(
        self,
        messages: Messages,
        tools: Tools,
        variables: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Checked copies, which hold nothing but JSON's own types."""
        reads_parts = _READS_PARTS.search(self._source(tools)) is not None
        checked = check_messages(messages, reads_parts=reads_parts)
        if tools is not None and not (
            isinstance(tools, (list, tuple)) and all(isinstance(t, Mapping) for t in tools)
        ):
            raise InputError("tools must be a list of objects")
        return {
            "messages": checked,
            "tools": _plain("tools", tools),
            "variables": _plain("variables", dict(variables)),
        }

    def _guarded(
        self, inputs: dict[str, Any], guard: str, kept: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """The inputs with the guard behind each character that begins a mark."""
        firsts = sorted({mark[0] for mark in self.tokenizer.marks if not mark.isspace()})
        if not firsts:
            return inputs
        first = "[" + "".join(map(re.escape, firsts)) + "]"
        every = re.compile(f"()({first})")
        guarded = {key: _replace(inputs[key], every, guard) for key in ("tools", "variables")}
        guarded["messages"] = []
        for message in inputs["messages"]:
            texts = "|".join(map(re.escape, kept.get(message["role"], ()))) or "(?!)"
            but_kept = re.compile(f"({texts})|({first})")
            guarded["messages"].append(
                {
                    _replace(key, every, guard): _replace(
                        value, but_kept if key == "content" else every, guard
                    )
                    for key, value in message.items()
                }
            )
        return guarded

    def _render(
        self, source: str, inputs: dict[str, Any], add_generation_prompt: bool, now: float
    ) -> str:
        def answer(messages: list[dict]) -> dict[str, str]:
            variables = {
                **self.tokenizer.named_tokens,
                "documents": None,
                **inputs["variables"],
                "messages": messages,
                "tools": inputs["tools"],
                "add_generation_prompt": add_generation_prompt,
            }
            request = {
                "source": source,
                "variables": variables,
                "now": now,
                "seconds": self._seconds,
                "max_characters": MAX_RENDERED,
            }
            data = json.dumps(request).encode()
            if len(data) > MAX_REQUEST_BYTES:
                raise InputError(
                    f"the conversation has {len(data):,} bytes; at most {MAX_REQUEST_BYTES:,} "
                    "are rendered"
                )
            return self._worker.ask(data + b"\n", self._seconds)

        messages = [_with_reasoning(message) for message in inputs["messages"]]
        result = answer([{k: v for k, v in m.items() if v is not None} for m in messages])
        if result.get("kind") == "undefined" and any(m.get("content") is None for m in messages):
            for nothing in (None, ""):
                others = [
                    message | {"content": nothing} if message.get("content") is None else message
                    for message in messages
                ]
                if "text" in (other := answer(others)):
                    return other["text"]
        if "text" not in result:
            raise InputError(f"chat template: {result['error']}")
        return result["text"]


class GuardedChat:
    """A conversation in whose texts no special token can be taken for the template's own.

    Attributes:
        messages: with the guard; contents in parts may have been joined.
    """

    def __init__(
        self,
        template: ChatTemplate,
        source: str,
        plain: dict[str, Any],
        guarded: dict[str, Any],
        guard: str,
        now: float,
    ):
        """Of `ChatTemplate.guard`, which checked the inputs and put the guard into a copy."""
        self._template, self._source, self._now = template, source, now
        self._plain, self._with_guard = plain, guarded
        self._guard = "" if guarded == plain else guard
        self.messages: list[dict[str, Any]] = guarded["messages"]

    def text(self, count: int | None = None, *, add_generation_prompt: bool) -> str:
        """The text of the first `count` messages, or of all, with the guard where it is needed.

        Raises:
            InputError: if the template refuses them, or does not write the same with the guard and
                without.
        """

        def rendered(inputs: dict[str, Any]) -> str:
            some = inputs | {"messages": inputs["messages"][:count]}
            return self._template._render(self._source, some, add_generation_prompt, self._now)

        plain = rendered(self._plain)
        if not self._guard:
            return plain
        guarded = rendered(self._with_guard)
        if guarded.replace(self._guard, "") != plain:
            raise InputError(
                "the chat template reads special token texts within the messages, so that they "
                "cannot be kept as text"
            )
        return guarded

    def encode(self, text: str) -> list[int]:
        """The ids of what `text` returned, or of a part of it."""
        return self._template.tokenizer.encode_rendered(text, self._guard)


def check_messages(messages: Messages, *, reads_parts: bool = True) -> list[dict[str, Any]]:
    """Checked copies of messages, as `ChatTemplate.render` takes them.

    Args:
        messages: what somebody gave.
        reads_parts: whether contents in parts stay so; else they are joined by line ends.

    Raises:
        InputError: for messages of another form.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError("messages must be a list of at least one message")
    return [_message(i, m, reads_parts) for i, m in enumerate(messages)]


def _again(tokenizer: Tokenizer, sources: dict[str, str], seconds: float) -> ChatTemplate:
    return ChatTemplate(tokenizer, sources, seconds=seconds)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message's reasoning under the names that templates read, as in transformers."""
    given = [message[name] for name in _REASONING if message.get(name) is not None]
    if not given:
        return message
    message = {name: value for name, value in message.items() if value is not None}
    return {"thinking": given[0], **message, "reasoning_content": given[0]}


def _message(number: int, message: Any, reads_parts: bool) -> dict[str, Any]:
    """One message, checked and copied."""
    what = f"message {number}"
    if not isinstance(message, Mapping):
        raise InputError(f"{what} is not an object with a role and a content")
    message = _plain(what, message)
    role, content, calls = (message.get(name) for name in ("role", "content", "tool_calls"))
    if not isinstance(role, str) or not role:
        raise InputError(f"{what} has no role")
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    ):
        raise InputError(f"{what} has tool_calls that are no list of objects")
    if content is None:
        if not calls:
            raise InputError(f"{what} has no content")
    elif isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise InputError(f"{what} has a part of type {kind!r}; only text can be used")
            if not isinstance(part.get("text"), str):
                raise InputError(f"{what} has a part whose text is no text")
        if not reads_parts:
            message["content"] = "\n".join(part["text"] for part in content)
    elif not isinstance(content, str):
        raise InputError(f"{what} has a content that is neither a text nor a list of parts")
    return message


def _plain(what: str, value: Any, depth: int = 0) -> Any:
    """A copy that JSON can write."""
    if depth > MAX_DEPTH:
        raise InputError(f"{what} holds lists or objects more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, (str, bool, int, float)):
        if isinstance(value, int) and abs(value) >= 2**1024:
            raise InputError(f"{what} holds a number that is too large")
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InputError(f"{what} has a name that is no text")
        return {key: _plain(what, item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(what, item, depth + 1) for item in value]
    raise InputError(f"{what} holds a {type(value).__name__}, which JSON cannot write")


def _replace(value: Any, pattern: re.Pattern, guard: str) -> Any:
    """Puts the guard behind what the pattern's second group finds, in all texts and names."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match[1] or match[2] + guard, value)
    if isinstance(value, dict):
        return {
            _replace(key, pattern, guard): _replace(item, pattern, guard)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_replace(item, pattern, guard) for item in value]
    return value


class _Worker:
    """The process that renders: started when needed, killed when it does not answer."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._stop: weakref.finalize | None = None
        self._owner = 0

    def ask(self, request: bytes, seconds: float) -> dict[str, str]:
        """One line for another; {"error": ...} where none comes."""
        with self._lock:
            process = self._started()
            try:
                answer = json.loads(_exchange(process, request, time.monotonic() + seconds))
            except TimeoutError:
                answer = {"error": f"it takes more than {seconds:g} s", "kind": "time"}
            except (OSError, EOFError):
                answer = {"error": "it takes too much memory or time", "kind": "died"}
            except BaseException:  # Ctrl-C between question and answer: the next one starts afresh
                self._kill()
                raise
            if answer.get("kind") in ("time", "died", "memory"):
                self._kill()
            return answer

    def _started(self) -> subprocess.Popen:
        if self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return self._process
            self._kill()
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        process = subprocess.Popen(
            [sys.executable, "-S", "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us
        )
        self._stop = weakref.finalize(self, _end, process, os.getpid())
        self._process, self._owner = process, os.getpid()
        try:
            _exchange(process, b"", time.monotonic() + _START_SECONDS)
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            self._kill()
            raise RunError("the process that renders chat templates does not start") from error
        return process

    def _kill(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = None


def _end(process: subprocess.Popen, owner: int) -> None:
    if os.getpid() != owner:  # a fork's copy of what belongs to its parent
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            _pipe(pipe).close()
    process.wait()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # it was asked for
    return pipe


def _exchange(process: subprocess.Popen, request: bytes, deadline: float) -> bytes:
    """Writes the request and reads a line, whichever goes on, until the deadline.

    Raises:
        TimeoutError: at the deadline.
        EOFError: if the process ends or says too much.
        BrokenPipeError: if it does not listen.
    """
    source, sink = _pipe(process.stdout).fileno(), _pipe(process.stdin).fileno()
    rest, answer = memoryview(request), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        if rest:
            os.set_blocking(sink, False)
            selector.register(sink, selectors.EVENT_WRITE)
        while not answer.endswith(b"\n"):
            if (left := deadline - time.monotonic()) <= 0 or not (ready := selector.select(left)):
                raise TimeoutError
            for key, _ in ready:
                if key.fd == source:
                    if not (data := os.read(source, 1 << 20)):
                        raise EOFError
                    answer += data
                else:
                    rest = rest[os.write(sink, rest) :]
                    if not rest:
                        selector.unregister(sink)
            if len(answer) > _MAX_ANSWER_BYTES:
                raise EOFError
    return bytes(answer)
