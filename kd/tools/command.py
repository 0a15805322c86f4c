"""How the command lines of kd/tools end: with an exit code, and one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from kd.core.spec import KnownError
from kd.reporting.console import escape_unknown, without_comment
from kd.training.checkpoint import exit_code, raise_on_sigterm


def run_command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command line. A failure with a known reason prints its message, and the exit code is 2."""
    escape_unknown()
    raise_on_sigterm()
    try:
        sys.exit(main(without_comment(sys.argv[1:])))
    except (KnownError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print("interrupted: start the same command again to continue", file=sys.stderr)
        sys.exit(exit_code(interrupt))
