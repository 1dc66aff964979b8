"""Printing: answers to stdout, everything else to stderr. Either may be closed, full, or without a reader."""

import os
import re
import sys
from typing import TextIO

LONGEST_LINE = 2000  # characters of one_line: a checkpoint's names may have megabytes
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class StdoutLost(Exception):
    """Stdout did not take what was printed; the cause is the system's error."""


def printable(text: str) -> str:
    """The text with ? for control characters but tabs and line ends: names in a file must not steer the terminal."""
    return CONTROL.sub("?", text)


def one_line(text: str) -> str:
    """The text on one line, with its middle left out if it is very long."""
    line, half = " ".join(text.split()), LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


def tell(text: str) -> None:
    """Print to stderr, `printable`; if stderr is closed or cannot be written to, print nothing."""
    try:
        _say(printable(text), sys.stderr)
    except OSError:
        pass


class Stdout:
    """Prints to stdout: on a terminal `printable`, elsewhere unchanged.

    Args:
        keep_going: raise an error only in `finish`, because there is more to do than to print.
    """

    def __init__(self, keep_going: bool = False):
        self.keep_going = keep_going
        self.fault: OSError | None = None

    def say(self, text: str) -> None:
        """Print; nothing more after an error."""
        if self.fault is None:
            try:
                _say(printable(text) if sys.stdout is not None and sys.stdout.isatty() else text, sys.stdout)
            except OSError as fault:
                self.fault = fault
        if not self.keep_going:
            self.finish()

    def finish(self) -> None:
        """Raise `StdoutLost` if stdout did not take everything."""
        if self.fault is not None:
            raise StdoutLost(self.fault.strerror) from self.fault


def settle() -> None:
    """Drop what the streams could not take; otherwise Python fails when it writes it again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text: str, stream: TextIO | None) -> None:
    """Print, with ? for what the stream's encoding lacks; a closed stream is None and takes nothing."""
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
