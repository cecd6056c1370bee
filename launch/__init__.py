"""The launchers. Ctrl-C while modules are still imported ends one at once, with one line."""

import os
import signal
import sys

INTERRUPTED = 130  # exit code of a process that Ctrl-C ended


def show(text: str) -> None:
    """Print a text; a reader that ends before (head, less) ends the process, without an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os._exit(141)  # as a shell has it for SIGPIPE


def end_at_once(*_):
    """End the process from a signal handler, with one line."""
    # Not an exception: the import of a compiled module would make another of it.
    os.write(sys.stderr.fileno(), b"error: interrupted by Ctrl-C before anything was done.\n")
    os._exit(INTERRUPTED)


# So Python calls itself while it imports the package of `python -m launch.NAME`; other programs may
# import a launcher too. A launcher takes the signal over once it is imported.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
