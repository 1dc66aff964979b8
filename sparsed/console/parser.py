"""The parser of the project's commands: errors of one line, help like a manual page, completion for the shell."""

import argparse
import textwrap
from typing import Any, NoReturn

from .streams import Stdout, one_line, tell

SHELLS = ("bash", "zsh", "tcsh")


class Manual(argparse.RawDescriptionHelpFormatter):
    """Help that wraps texts of one line, and leaves texts of several lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text.strip():
            return super()._fill_text(text, width, indent)
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


class Parser(argparse.ArgumentParser):
    """An argument parser with errors of one line, without the usage. Flags cannot be abbreviated."""

    def __init__(self, **described: Any):
        super().__init__(formatter_class=Manual, allow_abbrev=False, **described)

    def error(self, message: str) -> NoReturn:
        tell(one_line(f"{self.prog}: error: {message}"))
        self.exit(2)

    def print_help(self, file: object = None) -> None:
        Stdout().say(self.format_help().rstrip("\n"))


class PrintCompletion(argparse.Action):
    """Prints the parser's completion for a shell, and ends; arguments called FILE or PATH complete to file names."""

    def __call__(self, parser: argparse.ArgumentParser, args: object, shell: Any, option: str | None = None) -> None:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error(f'argument {option}: needs the package shtab: pip install ".[completion]"')
        for action in parser._actions:
            if action.metavar in ("FILE", "PATH"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
        Stdout().say(shtab.complete(parser, shell=shell))
        parser.exit(0)


def add_value(group: Any, name: str, text: str, default: object, **more: Any) -> None:
    """Add a flag with a value to a parser or one of its groups; the help is the text and the default."""
    group.add_argument(name, default=default, help=f"{text} (default: %(default)s)", **more)
