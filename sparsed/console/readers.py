"""Readers of single flag values: they convert a word of the command line, or say in one line what would be right."""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from ..config import SparseDConfig
from ..models.loading import resolve_device

Number = TypeVar("Number", int, float)

LARGEST = 2**31 - 1  # what a tensor's int32 index holds
LONGEST_SHOWN = 60  # characters of a wrong value that an error line repeats


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """A reader of whole numbers from `low` to `high`."""

    def read(word: str) -> int:
        number = _convert(int, word)
        if not low <= number <= high:
            bound = f"at least {low}" if number < low else f"at most {high}"
            raise _wrong(word, f"a whole number of {bound}")
        return number

    return read


def number_in(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """A reader of finite numbers from `low` (not itself, if `above`) to `high`."""

    def read(word: str) -> float:
        number = _convert(float, word)
        if not math.isfinite(number) or number < low or number > high or (above and number == low):
            lower = f"above {low}" if above else f"at least {low}"
            upper = "" if math.isinf(high) else f" and at most {high}"
            raise _wrong(word, f"a number {lower}{upper}")
        return number

    return read


def config_field(name: str, kind: type) -> Callable[[str], float]:
    """A reader of one field of `SparseDConfig`, which knows the field's range."""

    def read(word: str) -> float:
        number = _convert(kind, word)
        try:
            SparseDConfig(**{name: number})  # type: ignore[arg-type]  # which it checks
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name} ")) from None
        return number

    return read


def list_of(read: Callable[[str], object]) -> Callable[[str], list]:
    """A reader of values separated by commas; repeated ones count once."""
    return lambda words: list(dict.fromkeys(read(word) for word in words.split(",")))


def some_of(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """A reader of names separated by commas; repeated ones count once."""

    def name(word: str) -> str:
        if word not in allowed:
            raise _wrong(word, f"some of {', '.join(allowed)}")
        return word

    return list_of(name)


def _convert(kind: Callable[[str], Number], word: str) -> Number:
    try:
        return kind(word)
    except ValueError:
        raise _wrong(word, "a whole number" if kind is int else "a number") from None


def _wrong(word: str, right: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"must be {right}, got {shown(word)}")


def shown(word: str) -> str:
    """The word in quotes, cut if it is long."""
    return repr(word if len(word) <= LONGEST_SHOWN else word[:LONGEST_SHOWN] + "...")


def non_empty(word: str) -> str:
    """A reader of words that are not blank."""
    if not word.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return word


def path(word: str) -> Path:
    """A reader of paths, with the user's home for ~."""
    try:
        return Path(non_empty(word)).expanduser()
    except RuntimeError as error:  # no such user
        raise argparse.ArgumentTypeError(str(error)) from None


def device(word: str) -> str:
    """A reader of devices that this machine has."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", word):
        raise _wrong(word, "auto, cuda, cuda:N, cpu or mps")
    try:
        resolve_device(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return word
