"""The launchers. Ctrl-C while modules are still imported ends one at once, with one line."""

import os
import signal
import sys

INTERRUPTED = 130  # exit code of a process that Ctrl-C ended


def _end(*_):
    # Not an exception: the import of a compiled module would make another of it.
    os.write(sys.stderr.fileno(), b"error: interrupted by Ctrl-C before anything was done.\n")
    os._exit(INTERRUPTED)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)  # `launch.main.run` takes it from here
