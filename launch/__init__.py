"""The launchers. Ctrl-C while modules are still imported ends one without a traceback."""

import os
import sys

INTERRUPTED = 130  # exit code of a process that Ctrl-C ended


def _on_uncaught(kind, error, traceback):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("error: interrupted by Ctrl-C before anything was done.", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


sys.excepthook = _on_uncaught
