"""How a command ends: what goes wrong becomes one line on stderr and an exit code."""

import argparse
import contextlib
import errno
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

import huggingface_hub
import torch
import transformers

from ..models.loading import ModelTooLarge
from .streams import StdoutLost, one_line, settle, tell

EXIT_WRONG, EXIT_OUT_OF_MEMORY, EXIT_BROKEN_PIPE = 2, 3, 141


class TooLittleMemory(MemoryError):
    """Memory would run out; the message says which memory is too small, and what would help."""


def guarded(work: Callable[[], None], program: str, *, advice: str, ending: bool) -> int:
    """Do the work of a command, and return its exit code.

    Args:
        program: its name, for the line.
        advice: what to try when memory runs out.
        ending: whether only Python's own exit comes afterwards. Then Ctrl-C ends the process at once, as SIGTERM does,
            even in a long call of PyTorch. Files are written whole or not at all, so nothing has to be undone.
    """
    # if Ctrl-C is ignored, as in a shell's background job, it stays ignored
    if ending and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _quiet_libraries()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except SystemExit as stop:  # argparse's way to end
        return int(stop.code or 0)
    except StdoutLost as lost:
        if isinstance(lost.__cause__, BrokenPipeError):  # the reader has left, as `head` does
            return EXIT_BROKEN_PIPE
        tell(f"{program}: error: cannot write to stdout: {lost}")
        return EXIT_WRONG
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        said = f"out of memory{_estimate(error)}; {advice}"
        reason = f"too little memory: {error}" if isinstance(error, TooLittleMemory) else said
        tell(one_line(f"{program}: error: {reason}"))
        return EXIT_OUT_OF_MEMORY
    finally:
        settle()
    return 0


class Parsed(Protocol):
    """The values of a command line's flags, with the parser that words its errors."""

    @property
    def parser(self) -> argparse.ArgumentParser: ...


@contextlib.contextmanager
def blame(args: Parsed, option: str, errors: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Turn these errors of the library into a line about `option`, and exit code 2."""
    try:
        yield
    except errors as error:
        if _is_out_of_memory(error):  # the system's, which is an OSError
            raise error if isinstance(error, MemoryError) else MemoryError from error
        args.parser.error(f"argument {option}: {error}")


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Let signals that end the process wait, so that half a drawing does not leave the terminal in its colours."""
    waiting: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    deadly = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in deadly:
        signal.signal(number, lambda came, _: waiting.append(came))
    try:
        yield
    finally:
        for number in deadly:
            signal.signal(number, signal.SIG_DFL)
        for came in waiting:
            signal.raise_signal(came)


def _quiet_libraries() -> None:
    """Silence the libraries' advice: the commands say what the user should know."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()


def _estimate(error: BaseException) -> str:
    """What the error says about the memory that was asked for, in parentheses; nothing if it does not say."""
    said = str(error) if isinstance(error, ModelTooLarge) else ""
    if tried := re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error)):
        said = f"tried to allocate {tried[1]}"
    return f" ({said})" if said else ""


def _is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or getattr(error, "errno", None) == errno.ENOMEM
    words = ("can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory", "start new thread")
    return known or any(word in str(error) for word in words)
