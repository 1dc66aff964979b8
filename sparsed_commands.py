"""The two commands, outside of the package: importing it takes seconds, in which Ctrl-C may already come."""

import os
import signal
import sys


def dream() -> int:
    """`sparsed-dream` and `dream_generation.py`; returns the exit code."""
    _end_on_ctrl_c()
    from sparsed.cli import main_dream

    return main_dream()


def llada() -> int:
    """`sparsed-llada` and `llada_generation.py`; returns the exit code."""
    _end_on_ctrl_c()
    from sparsed.cli import main_llada

    return main_llada()


def _end_on_ctrl_c() -> None:
    """End the process at the first Ctrl-C: nothing has begun that would have to be undone."""

    def end(*_: object) -> None:
        try:
            os.write(2, os.fsencode(f"{os.path.basename(sys.argv[0])}: interrupted\n"))
        finally:
            os._exit(130)

    # ignored in a shell's background job, and then it stays so
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)
