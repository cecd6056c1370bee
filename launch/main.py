"""How every launcher starts and how it reports a user's mistake."""

from __future__ import annotations

import os
import signal
import sys
from typing import Callable

from absl import app, logging


def run(main: Callable[..., None], *, positional: bool = False) -> None:
    """Run a launcher: a ValueError or a full disk ends it with one clear line and exit code 2.

    Args:
      main: the launcher.
      positional: it takes positional arguments, and is given the list of them.
    """

    def wrapped(argv):
        if len(argv) > 1 and not positional:
            print(f"error: unexpected argument '{argv[1]}'; settings are given as --group.option=value.", file=sys.stderr)
            sys.exit(2)
        logging.set_verbosity(logging.ERROR)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-filled folders are cleared away
        try:
            main(*([argv[1:]] if positional else []))
        except BrokenPipeError:  # who reads the output (head, less) has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except (MemoryError, RuntimeError) as error:  # JAX's errors are RuntimeErrors; some launchers do without JAX
            if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).partition("\n")[0] or "the system gives no more"
            print(f"error: out of memory ({reason}). Use more devices or a machine with more memory; in a run also lower "
                  "--derive.batch_size and --evaluate.batch_size, or set --model.remat=full.", file=sys.stderr)
            sys.exit(2)

    app.run(wrapped)
