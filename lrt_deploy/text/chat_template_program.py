"""Render a chat template as a program of its own, so that its time, memory and output are bounded; see `chat_template`.

Reads JSON lines from stdin: first the templates and the limits, then lists of renderings. Answers each line by one on
stdout. Templates run in Jinja's immutable sandbox with the names that transformers gives to chat templates, and the
process can open no file. Imports nothing of this package.
"""

import contextlib
import datetime
import encodings.unicode_escape  # noqa: F401 - as jinja2.debug: needed when no file can be opened any more
import json
import signal
import sys
from typing import Any

import jinja2.debug  # noqa: F401
from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SHOWN = 300  # characters of an error


class RefusalError(TemplateError):
    """A template has called `raise_exception`."""


class Generation(Extension):
    """`{% generation %}`, which marks what an assistant has written for training, renders what is in it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Renderer:
    """The templates of one process."""

    def __init__(self, max_characters: int) -> None:
        self._most = max_characters
        self._now = datetime.datetime.now()
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
        )
        del self._environment.globals["lipsum"]
        self._environment.filters["tojson"] = _to_json
        self._environment.globals |= {"raise_exception": _refuse, "strftime_now": self._date}
        self._templates: list[Template] = []

    def _date(self, form: str) -> str:
        return self._now.strftime(form)

    def load(self, sources: list[str]) -> list[str]:
        """Compile templates; return what is wrong with each, or an empty text."""
        found = []
        for source in sources:
            template, problem = self._environment.from_string(""), ""
            try:
                template = self._environment.from_string(source)
            except Exception as error:
                problem = _reason(error)
            self._templates.append(template)
            found.append(problem)
        return found

    def render(self, wanted: list[tuple[int, dict[str, Any]]]) -> list[dict[str, str]]:
        """Render templates by their numbers, all at one time of day; return a text or an error of each."""
        self._now = datetime.datetime.now()
        found = []
        for number, variables in wanted:
            try:
                found.append({"text": self._text(self._templates[number], variables)})
            except RefusalError as error:
                found.append({"error": f"refuses these messages: {_reason(error)}"})
            except Exception as error:
                found.append({"error": f"fails on these messages: {_reason(error)}"})
        return found

    def _text(self, template: Template, variables: dict[str, Any]) -> str:
        parts, size = [], 0
        for part in template.generate(**variables):
            parts.append(part)
            size += len(part)
            if size > self._most:
                raise TemplateError(f"more than {self._most} characters come out")
        return "".join(parts)


def _refuse(message: object) -> None:
    raise RefusalError(str(message)[:_SHOWN])


def _to_json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:  # noqa: ANN401 - json's arguments
    return json.dumps(value, ensure_ascii=ensure_ascii, **form)


def _reason(error: Exception) -> str:
    """Describe an error in one line."""
    text = " ".join(str(error).split())[:_SHOWN]
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {text}"
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"


def confine(max_bytes: int) -> None:
    """Bound the memory of this process and take away files and further processes, where the system can."""
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))
        for which in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
            resource.setrlimit(which, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def arm(cpu_seconds: float, seconds: float) -> None:
    """Let the system end this process after so much CPU time or time; 0: no more. No template can take that back."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    """Answer lines until stdin ends."""
    setup = json.loads(sys.stdin.buffer.readline())
    confine(setup["bytes"])
    renderer = Renderer(setup["characters"])
    limits = setup["cpu_seconds"], setup["seconds"]
    arm(*limits)
    answer: object = renderer.load(setup["templates"])
    while True:
        arm(0, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        arm(*limits)
        answer = renderer.render(json.loads(line))


if __name__ == "__main__":
    main()
