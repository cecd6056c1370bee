"""How every launcher starts and how it reports a user's mistake."""

from __future__ import annotations

import sys
from typing import Callable

from absl import app, logging


def run(main: Callable[[], None]) -> None:
    """Run a launcher: a ValueError or a full disk ends it with one clear line and exit code 2."""

    def wrapped(argv):
        if len(argv) > 1:
            print(f"error: unexpected argument '{argv[1]}'; settings are given as --group.option=value.", file=sys.stderr)
            sys.exit(2)
        logging.set_verbosity(logging.ERROR)
        try:
            main()
        except (ValueError, OSError) as error:
            if logging.level_debug():
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(wrapped)
