"""The entry point of `lrt-deploy` and of `python -m lrt_deploy`.

It handles signals before it imports the command line, which takes a tenth of a second.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from .cli import signals


def main() -> NoReturn:
    """Run the command line of this process; always ends in SystemExit, or at once after a signal."""
    try:
        signals.install()
        from .cli import app

        code = app.run()
    except BaseException as error:
        stopped = error if isinstance(error, (KeyboardInterrupt, signals.Terminated)) else signals.received()
        if stopped is None:
            raise
        code = _report(stopped)
    signals.end_at_once()
    if signals.received() is not None:
        # Threads that libraries left running in C++ may abort the process while Python shuts down.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):  # gone, closed, or never there
                continue
        os._exit(code)
    sys.exit(code)


def _report(stopped: BaseException) -> int:
    """Report a signal that came outside of any verb; return the exit code."""
    from .cli import output

    if "--json" in sys.argv:
        output.failure(type(stopped).__name__, signals.describe(stopped))
    output.say(signals.describe(stopped))
    return signals.exit_code(stopped)


if __name__ == "__main__":
    main()
