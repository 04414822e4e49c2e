"""The `lrt-deploy` command: registers the verbs, and turns every error into one message and an exit code.

Exit codes: 0 done, 1 the answer is no (parity failed, wrong input, something broke), 2 usage, 130 interrupted,
141 the reader of stdout has gone, 143 terminated. With --json an error is one document on stdout as well:
`{"error": {"type", "message"}}`. Each verb is a plain function in a file of its own and knows nothing of this.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from lrt_deploy import machine
from lrt_deploy.errors import LRTDeployError

from . import bench, build, chat, doctor, evaluate, export, generate, inspect, output, parity, signals

READER_GONE = 141
_WITH_TRACEBACK = "run again with --debug for the traceback"
_reported = False  # this command's error has been reported
# Typer has a copy of Click or uses the package, by version; its exceptions are found through the one that it exports.
_UsageError: Any = typer.BadParameter.__base__


class Commands(TyperGroup):
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


class Verb(TyperCommand):
    """One verb. Refuses empty paths: they would name the current folder, and come from unset shell variables."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer has its own copy of Click
        """Parse the words after the verb's name; raise BadParameter for an empty path."""
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        kinds = get_type_hints(_VERBS[str(self.name)])
        parameters: list[Any] = [*self.get_params(ctx)]
        for parameter in parameters:
            kind = kinds.get(parameter.name)
            if given.get(parameter.name) == "" and Path in (kind, *get_args(kind)):
                raise typer.BadParameter(
                    "it is empty; expected a path (is a shell variable unset?)", ctx=ctx, param=parameter
                )
        return super().parse_args(ctx, args)


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


def main() -> NoReturn:
    """Run the command line of this process; see `lrt_deploy.__main__`."""
    from lrt_deploy.__main__ import main as entry

    entry()


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """Wrap `verb` so that its errors are reported and become exit codes; its `debug` option adds the traceback."""

    @functools.wraps(verb)
    def run(**options: Any) -> None:  # noqa: ANN401 - whatever options the verb has
        try:
            verb(**options)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt, signals.Terminated) as error:
            code = report(error, json=bool(options.get("json")), debug=bool(options.get("debug")), verb=verb.__name__)
            raise typer.Exit(code) from None

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
    if isinstance(error, Exception):
        line, code = f"error: {describe(error, verb)}", 1
    else:
        line, code = signals.describe(error), signals.exit_code(error)
    if json:
        output.failure(type(error).__name__, line.removeprefix("error: "))
    output.say(line)
    return code


def describe(error: Exception, verb: str = "") -> str:
    """Say in one line what happened; only errors raised on purpose speak for themselves."""
    if isinstance(error, LRTDeployError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (text := machine.explain(error, _extras_of(verb))):
        return text
    if isinstance(error, MemoryError):
        return f"out of memory{_reason(error)}; {_WITH_TRACEBACK}"
    if isinstance(error, OSError) and error.strerror:
        place = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{place}; {_WITH_TRACEBACK}"
    return f"something broke inside lrt-deploy, {type(error).__name__}{_reason(error)}; {_WITH_TRACEBACK}"


def _extras_of(verb: str) -> tuple[machine.Extra, ...]:
    """The extras that a verb may need, the likeliest first."""
    if verb != "build":
        return ("export",)
    return ("tensorrt", "tensorrt-rtx") if "tensorrt_rtx" in machine.missing("tensorrt-rtx") else ("tensorrt-rtx",)


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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
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
    "bench": bench.bench,
    "inspect": inspect.inspect,
    "doctor": doctor.doctor,
}
for _name, _verb in _VERBS.items():
    app.command(_name, cls=Verb)(guarded(_verb))
