"""The two commands. What they import takes seconds, in which Ctrl-C may already come."""

import signal


def dream() -> int:
    """`sparsed-dream` and `dream_generation.py`; returns the exit code."""
    _end_on_ctrl_c()
    from .cli import main_dream

    return main_dream()


def llada() -> int:
    """`sparsed-llada` and `llada_generation.py`; returns the exit code."""
    _end_on_ctrl_c()
    from .cli import main_llada

    return main_llada()


def _end_on_ctrl_c() -> None:
    """Let Ctrl-C end the process at once, without a traceback, unless it is ignored, as in a shell's background job."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
