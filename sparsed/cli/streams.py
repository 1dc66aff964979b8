"""What the scripts print: answers to stdout, everything else to stderr, either of which may be closed, full or left."""

import os
import sys
from typing import TextIO


class StdoutLost(Exception):
    """Stdout did not take what was printed; the cause is the system's error."""


def tell(text: str) -> None:
    """Print to stderr; a stderr that cannot be written to takes nothing, as a closed one does."""
    try:
        _say(text, sys.stderr)
    except OSError:
        pass


class Stdout:
    """Prints to stdout.

    Args:
        keep_going: let an error wait for `finish`, for there is more to do than to print.
    """

    def __init__(self, keep_going: bool = False):
        self.keep_going = keep_going
        self.fault: OSError | None = None

    def say(self, text: str) -> None:
        """Print; nothing more after an error."""
        if self.fault is None:
            try:
                _say(text, sys.stdout)
            except OSError as fault:
                self.fault = fault
        if not self.keep_going:
            self.finish()

    def finish(self) -> None:
        """Raise `StdoutLost` if stdout did not take everything."""
        if self.fault is not None:
            raise StdoutLost from self.fault


def settle() -> None:
    """Let go of what the streams could not take: at exit Python writes it once more, which must not fail again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text: str, stream: TextIO | None) -> None:
    """Print, with ? for what the stream's encoding does not have; a closed stream is None and takes nothing."""
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
