"""Renders chat templates in a process of its own, which may be killed at any moment.

`dsjax.interop.chat` runs this file as a script and nothing imports it: it knows nothing of dsjax,
so that it starts quickly. A request is a line of JSON on standard input, its answer a line on
standard output. A template meets what transformers 5.23 gives it (`apply_chat_template`): the same
environment, filters, functions and tags. Against what a sandbox cannot see, such as `10**10**10`,
the process has bounded memory and time; it can write no file and start no process.
"""

import contextlib
import datetime
import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils

MAX_MEMORY_BYTES = 512 * 2**20
MAX_MESSAGE = 300  # characters of an error, part of which a template can write


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, which marks what an assistant wrote: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Its body, as it is."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class Dict:
    """`dict(...)` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        """A plain dict."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        """As that of `dict`."""
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that keeps nothing whose name begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any):  # so that `namespace(self=...)` works
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace keeps no {name!r}")


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`tojson` without the HTML escapes of Jinja's own."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(message)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Any] = {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: _now[0].strftime(format),
        "dict": Dict(),
        "namespace": Namespace,
    }
    environment.globals.update(functions)
    return environment.from_string(source)


_now = [datetime.datetime.now()]  # the request's time: two renderings of a chat are to agree


def _pieces(request: dict) -> Iterator[str]:
    """What the template writes, no longer than allowed."""
    room = request["max_characters"]
    _now[0] = datetime.datetime.fromtimestamp(request["now"])
    for piece in _compiled(request["source"]).generate(**request["variables"]):
        room -= len(piece)
        if room < 0:
            raise OverflowError(f"it writes more than {request['max_characters']:,} characters")
        yield piece


def _answer(request: dict) -> dict[str, str]:
    try:
        return {"text": "".join(_pieces(request))}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}", "kind": "syntax"}
    except jinja2.UndefinedError as error:
        return {"error": str(error), "kind": "undefined"}
    except jinja2.exceptions.SecurityError as error:
        return {"error": f"it is not allowed: {error}", "kind": "security"}
    except jinja2.TemplateError as error:
        return {"error": str(error), "kind": "raised"}
    except MemoryError:
        return {"error": "it takes too much memory", "kind": "memory"}
    except RecursionError:
        return {"error": "it calls itself too deeply", "kind": "recursion"}
    except Exception as error:  # a template can make anything happen within the language
        return {"error": f"{type(error).__name__}: {error}", "kind": "other"}


def _limit() -> None:
    """What a template that left the sandbox would not have, either."""
    limits = {
        resource.RLIMIT_AS: MAX_MEMORY_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for name, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a system that knows no such limit
            resource.setrlimit(name, (most, most))


def main() -> None:
    """Answers until standard input ends."""
    _limit()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # Where nobody is left to kill it, it ends by itself.
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        seconds = int(time.process_time() + request["seconds"]) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))
        answer = _answer(request)
        if "error" in answer:
            answer["error"] = " ".join(answer["error"].split())[:MAX_MESSAGE]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
