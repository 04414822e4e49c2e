"""The `lrt-deploy` command: registers the verbs, and turns every error into one message and an exit code.

Exit codes: 0 done, 1 the answer is no (parity failed, wrong input, something broke), 2 usage, 130 interrupted, 141 the
reader of stdout has gone, 143 terminated. With --json an error is one document on stdout as well: `{"error": {"type",
"message"}}`.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from lrt_deploy import machine
from lrt_deploy.errors import LRTDeployError

from . import (
    batch,
    bench,
    build,
    chat,
    doctor,
    evaluate,
    export,
    generate,
    options,
    output,
    package,
    parity,
    serve,
    signals,
)
from . import inspect as inspecting

READER_GONE = 141
_WITH_TRACEBACK = "run again with --debug for the traceback"
_NAMES_OF_FILES = ("checkpoint", "path")  # texts, because names on the Hub are no paths
_reported = False  # this command's error has been reported
# Typer has a copy of Click or uses the package, by version; its exceptions are found through the one that it exports.
_UsageError: Any = typer.BadParameter.__base__


class _PlainFlags:
    """The help shows no type beside flags."""

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401 - typer has its own copy of Click
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters


class Commands(_PlainFlags, TyperGroup):
    """All verbs. Reports errors that belong to no verb: wrong usage, and a full disk under the help."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,  # noqa: ANN401 - as in the base class
    ) -> int:
        """Run a command line; ends in SystemExit, or returns the exit code if `standalone_mode` is False."""
        words = list(sys.argv[1:] if args is None else args)
        code = self._run(words, prog_name, complete_var)
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, words: list[str], prog_name: str | None, complete_var: str | None) -> int:
        global _reported
        json, _reported = "--json" in words, False
        output.begin()
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False)
        except _UsageError as error:
            # Pydantic, which checks values for typer, begins its messages with its own word.
            error.message = error.message.replace("Value error, ", "")
            message = error.format_message()
            if json:
                output.failure("UsageError", message)
                output.say(f"error: {message}")
            else:
                error.show()
            return int(error.exit_code)
        except Exception as error:
            return report(error, json=json)
        # Typer makes an exit code of an interrupt that comes outside of a verb, and says nothing.
        if not _reported and (stopped := signals.received()) is not None:
            return report(stopped, json=json)
        return code if isinstance(code, int) else 0


class Verb(_PlainFlags, TyperCommand):
    """One verb. Refuses empty paths: they would name the current folder, and come from unset shell variables."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer has its own copy of Click
        """Parse the words after the verb's name; raise BadParameter for an empty path."""
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        kinds = get_type_hints(_COMMANDS[str(self.name)])
        for parameter in self.get_params(ctx):
            kind = kinds.get(parameter.name)
            is_path = Path in (kind, *get_args(kind)) or parameter.name in _NAMES_OF_FILES
            if given.get(parameter.name) == "" and is_path:
                raise typer.BadParameter(
                    "it is empty; expected a path (is a shell variable unset?)", ctx=ctx, param=parameter
                )
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ANN401 - typer has its own copy of Click
        """Return the pieces of the usage line, arguments without braces."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


app = typer.Typer(
    name="lrt-deploy",
    cls=Commands,
    help="Latent Recurrent Transformers, from checkpoint to running deployment.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run() -> int:
    """Run the command line of this process; return its exit code."""
    return int(typer.main.get_command(app)(standalone_mode=False))


def command(verb: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a verb: errors are reported and become exit codes, and `--debug` adds the traceback.

    A dataclass among the verb's parameters stands for its fields: each is an option of the command, and the verb gets
    the object.
    """
    parameters, groups = [], dict[str, Any]()
    for name, taken in inspect.signature(verb, eval_str=True).parameters.items():
        group = taken.annotation
        if dataclasses.is_dataclass(group):
            groups[name] = group
            kinds = get_type_hints(group, include_extras=True)
            fields = dataclasses.fields(group)
            parameters += [options.parameter(field.name, kinds[field.name], field.default) for field in fields]
        else:
            parameters.append(options.parameter(name, group, taken.default))
    parameters.append(options.parameter("debug", options.Debug, False))

    def run(**given: Any) -> None:  # noqa: ANN401 - the values of all options
        debug, json = given.pop("debug"), bool(given.get("json"))
        try:
            for name, group in groups.items():
                given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            verb(**given)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt, signals.Terminated) as error:
            raise typer.Exit(report(error, json=json, debug=debug, verb=verb.__name__)) from None

    run.__name__, run.__doc__ = verb.__name__, verb.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def report(error: BaseException, *, json: bool, debug: bool = False, verb: str = "") -> int:
    """Report an error on stderr, and with `json` on stdout too; return the exit code.

    After a signal every error is the signal's: libraries turn its exception into others.
    """
    global _reported
    _reported = True
    if isinstance(error, Exception):
        error = signals.received() or error
    if isinstance(error, BrokenPipeError):
        output.silence_stdout()
        return READER_GONE
    if debug:
        output.say("".join(traceback.format_exception(error)).rstrip())
    mine = isinstance(error, Exception)
    line = describe(error, verb) if isinstance(error, Exception) else signals.describe(error)
    if json:
        output.failure(type(error).__name__, line)
    output.say(f"error: {line}" if mine else line)
    return 1 if mine else signals.exit_code(error)


def describe(error: Exception, verb: str = "") -> str:
    """Describe an error in one line; the messages of our own errors are complete already."""
    if isinstance(error, LRTDeployError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        extras: tuple[machine.Extra, ...] = ("export",)  # that the verb may need, the likeliest first
        if verb == "build":
            lacks_rtx = "tensorrt_rtx" in machine.missing("tensorrt-rtx")
            extras = ("tensorrt", "tensorrt-rtx") if lacks_rtx else ("tensorrt-rtx",)
        if text := machine.explain(error, extras):
            return text
    if isinstance(error, MemoryError):
        return f"out of memory{_reason(error)}; {_WITH_TRACEBACK}"
    if isinstance(error, OSError) and error.strerror:
        place = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{place}; {_WITH_TRACEBACK}"
    return f"something broke inside lrt-deploy, {type(error).__name__}{_reason(error)}; {_WITH_TRACEBACK}"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f": {text[:300]}" if text else ""


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        output.answer(f"lrt-deploy {version('lrt-deploy')} (Python {sys.version.split()[0]})")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Latent Recurrent Transformers, from checkpoint to running deployment."""


_VERBS: dict[str, Callable[..., None]] = {
    "export": export.export,
    "build": build.build,
    "generate": generate.generate,
    "chat": chat.chat,
    "parity": parity.parity,
    "eval": evaluate.evaluate,
    "serve": serve.serve,
    "batch": batch.batch,
    "package": package.package,
    "bench": bench.bench,
    "inspect": inspecting.inspect,
    "doctor": doctor.doctor,
}
_COMMANDS = {name: command(verb) for name, verb in _VERBS.items()}
for _name, _command in _COMMANDS.items():
    app.command(_name, cls=Verb)(_command)
