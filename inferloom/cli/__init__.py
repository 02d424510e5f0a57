"""The command `inferloom`. Exit codes: 0 done, 1 refused with a reason, 2 wrong usage, 3 a bug, 130 interrupted."""

from __future__ import annotations

import sys
import traceback

from inferloom.cli.app import app
from inferloom.cli.console import fail
from inferloom.errors import is_inferloom_error

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; errors raised on purpose are printed without a traceback."""
    if sys.argv[1:3] == ["bench", "serve"]:  # a subcommand of a command that takes a path (such a path: ./serve)
        sys.argv[1:3] = ["bench-serve"]
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of stdout has gone: nobody is left to tell
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if is_inferloom_error(error):
            fail(str(error), type(error).__name__)
            sys.exit(1)
        traceback.print_exc()
        fail(f"{type(error).__name__}: {error} (a bug in inferloom: please report it with the lines above and the "
             "output of `inferloom doctor --json`)", "InternalError")
        sys.exit(3)
