"""The `lrt-deploy` command: registers the verbs, and turns every error into one line and an exit code.

Exit codes: 0 done, 1 the answer is no (parity failed, wrong input, something broke), 2 usage, 130 interrupted,
141 the reader of stdout has gone. Each verb is a plain function in a file of its own and knows nothing of this.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lrt_deploy.errors import LRTDeployError

from . import bench, build, chat, doctor, evaluate, export, generate, inspect, output, parity

EXPORT_EXTRA = {"torch", "onnx", "onnxscript", "onnx_ir", "onnx-ir"}
INTERRUPTED, READER_GONE = 130, 141
_WITH_TRACEBACK = "run again with --debug for the traceback"

app = typer.Typer(
    name="lrt-deploy",
    help="Latent Recurrent Transformers, from checkpoint to running deployment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line of this process; always ends in SystemExit."""
    output.settle_streams()
    try:
        app()
    except Exception as error:  # outside any verb: printing the help onto a full disk
        output.silence_stdout()
        output.say(f"error: {describe(error)}")
        sys.exit(1)


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb`, with its errors printed and turned into exit codes; its `debug` option adds the traceback."""

    @functools.wraps(verb)
    def run(**options: Any) -> None:  # noqa: ANN401 - whatever options the verb has
        try:
            verb(**options)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            output.say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            output.silence_stdout()
            raise typer.Exit(READER_GONE) from None
        except Exception as error:
            if options.get("debug"):
                output.say(traceback.format_exc().rstrip())
            output.say(f"error: {describe(error)}")
            raise typer.Exit(1) from None

    return run


def describe(error: Exception) -> str:
    """One line that says what happened; only errors raised on purpose speak for themselves."""
    if isinstance(error, LRTDeployError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "polygraphy":
        return (
            "this command needs an engine extra: pip install 'lrt-deploy[tensorrt-rtx]' (polygraphy is not installed)"
        )
    if isinstance(error, ModuleNotFoundError) and (root := (error.name or "").split(".")[0]) in EXPORT_EXTRA:
        return f"this command needs the export extra: pip install 'lrt-deploy[export]' ({root} is not installed)"
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Latent Recurrent Transformers, from checkpoint to running deployment."""


for _name, _verb in (
    ("export", export.export),
    ("build", build.build),
    ("generate", generate.generate),
    ("chat", chat.chat),
    ("parity", parity.parity),
    ("eval", evaluate.evaluate),
    ("bench", bench.bench),
    ("inspect", inspect.inspect),
    ("doctor", doctor.doctor),
):
    app.command(_name)(guarded(_verb))
