"""How every launcher starts and how it reports a user's mistake."""

from __future__ import annotations

import sys
from typing import Callable

import jax
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
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"error: out of memory ({str(error).splitlines()[0]}). Lower --derive.batch_size and "
                  "--evaluate.batch_size, set --model.remat, or use more devices (--mesh.shape).", file=sys.stderr)
            sys.exit(2)

    app.run(wrapped)
