"""How a command ends: what goes wrong becomes one line on stderr and an exit code."""

import argparse
import contextlib
import errno
import math
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import huggingface_hub
import torch
import transformers

from ..models.loading import ModelTooLarge
from .streams import StdoutLost, one_line, settle, tell

EXIT_WRONG, EXIT_OUT_OF_MEMORY, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE, EXIT_TERMINATED = 2, 3, 130, 141, 143
# seconds in which a second Ctrl-C means no more than the first; later ones count, lest a callback swallows the only one
ONE_WISH = 1.0
# seconds in which a signal should have unwound the stack; it cannot while PyTorch computes
PATIENCE = 1.0


class Terminated(KeyboardInterrupt):
    """SIGTERM, to be handled as Ctrl-C is."""


class TooLittleMemory(MemoryError):
    """Memory that would run out; the message says of what there is too little, and what would help."""


def guarded(work: Callable[[], None], program: str, *, advice: str, ending: bool, interrupted: str = "") -> int:
    """Do the work of a command, and return its exit code.

    Args:
        program: its name, for the line.
        advice: what to try when memory runs out.
        ending: whether only Python's own exit comes afterwards.
        interrupted: what to add to the line that says so.
    """

    def end(number: int) -> int:
        """Say which signal has ended the command; its exit code."""
        terminated = number == signal.SIGTERM
        tell(f"{program}: {'terminated' if terminated else 'interrupted'}{interrupted}")
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED

    try:
        with _interruptible(ending, end), _quiet_libraries():
            work()
    except SystemExit as stop:  # argparse's way to end
        return int(stop.code or 0)
    except KeyboardInterrupt as signalled:
        code = end(signal.SIGTERM if isinstance(signalled, Terminated) else signal.SIGINT)
        if ending:  # at once: Python's own exit waits for threads, and takes PyTorch apart, for seconds
            settle()
            os._exit(code)
        return code
    except StdoutLost as lost:
        if isinstance(lost.fault, BrokenPipeError):  # the reader has left, as `head` does
            return EXIT_BROKEN_PIPE
        tell(f"{program}: error: cannot write to stdout: {lost.fault.strerror}")
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


@contextlib.contextmanager
def blame(
    args: argparse.Namespace, option: str, errors: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[None]:
    """Turn these errors of the library into a wrong-call line about `option`."""
    try:
        yield
    except errors as error:
        if _is_out_of_memory(error):  # the system's, which is an OSError
            raise error if isinstance(error, MemoryError) else MemoryError from error
        args.parser.error(f"argument {option}: {error}")


@contextlib.contextmanager
def _interruptible(ending: bool, end: Callable[[int], int]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM unwind the stack, so that nothing half-written stays; once, if they come in a burst.

    Args:
        ending: whether only Python's own exit comes afterwards, which is then not to be interrupted.
        end: says which signal has ended the command, and returns its exit code.
    """
    latest = -math.inf

    def stop(number: int, _: object) -> None:
        nonlocal latest
        before, latest = latest, time.monotonic()
        if latest - before > ONE_WISH:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # what is ignored stays ignored: Ctrl-C is not meant for a shell's background job
            if signal.getsignal(number) is not signal.SIG_IGN:
                handlers[number] = signal.signal(number, stop)
    try:
        with _watchdog(end) if ending and handlers else contextlib.nullcontext():
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)


@contextlib.contextmanager
def _watchdog(end: Callable[[int], int]) -> Iterator[None]:
    """End the process if a signal has not unwound the stack in time: one call of PyTorch may take minutes.

    Python runs a signal's handler between two of its own instructions, but notes the signal's number at once where
    another thread can read it.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    unwound = threading.Event()

    def watch() -> None:
        with reader:
            while number := reader.recv(1):
                if number[0] in (signal.SIGINT, signal.SIGTERM) and not unwound.wait(PATIENCE):
                    os._exit(end(number[0]))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        unwound.set()
        signal.set_wakeup_fd(before)
        writer.close()


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No advice and no warnings from the libraries: what the user should know, this module says."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
