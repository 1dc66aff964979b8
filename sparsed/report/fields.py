"""What a page needs of a record, and a check of one that was read from a file."""

import base64
import math
from dataclasses import dataclass
from typing import Any, NoReturn

LARGEST = 1e15  # of any number: a float holds all whole ones up to it
ROUNDING = 1e-5  # by which a share, a mean of float32 values, may exceed 1


@dataclass(frozen=True)
class Number:
    """A number in a range."""

    low: float = 0
    high: float = LARGEST
    whole: bool = False


@dataclass(frozen=True)
class Kind:
    """A value of a type, and what an error line calls it."""

    kind: type
    what: str


@dataclass(frozen=True)
class OrNull:
    """Something of that shape, or null."""

    shape: Any


WHOLE, SECONDS, SHARE, SIZE = Number(whole=True), Number(), Number(high=1), Number(1, whole=True)
TEXT, FLAG, MODE = Kind(str, "a text"), Kind(bool, "true or false"), Kind(str, "'origin' or 'sparsed'")
SIZES = ("block_size", "tokens", "query_blocks", "key_blocks", "rows", "columns", "layers", "heads")
RUN = {
    "mode": MODE,
    "token_ids": [WHOLE],
    "prompt_tokens": WHOLE,
    "text": TEXT,
    "expected": OrNull(TEXT),
    "answer_found": OrNull(FLAG),
    "seconds": SECONDS,
    "step_seconds": [SECONDS],
    "full_steps": WHOLE,
    "selection_seconds": OrNull(Number(-LARGEST)),
    "compile_seconds": SECONDS,
    "warmup_seconds": [SECONDS],
    "warmup_compile_seconds": SECONDS,
    "density": OrNull(SHARE),
    "backend": OrNull(TEXT),
    "backend_reason": OrNull(TEXT),
    # what earlier versions did not record
    "repeats?": {"seconds": [SECONDS], "same_tokens": FLAG},
    "history?": [[(WHOLE, WHOLE, OrNull(SHARE))]],
    "pieces?": [TEXT],
    "answer_tokens?": WHOLE,
    "layers?": OrNull([{"density": SHARE, "recall": SHARE}]),
    "pattern?": OrNull({**dict.fromkeys(SIZES, SIZE), "prompt_tokens": WHOLE, "cells": TEXT}),
}
RECORD = {
    "runs": [RUN],
    "trained_length": WHOLE,
    "beyond_trained_length": FLAG,
    "load_seconds": SECONDS,
    "first_forward_seconds": SECONDS,
    "environment": {},
    "arguments": {},
}


def check_record(record: Any) -> None:
    """Refuse what is not the record of a run of the two scripts, of this version or an earlier one.

    Raises:
        ValueError: names the field that is wrong, and says what it should be.
    """
    if isinstance(record, dict) and "advice" in record:
        raise ValueError("this is the record of --advise, which makes no answer; the page needs a run's")
    _check(record, RECORD, "")
    modes = [run["mode"] for run in record["runs"]]
    if modes not in (["origin"], ["sparsed"], ["origin", "sparsed"]):
        raise ValueError("runs must be one of mode 'origin' or 'sparsed', or both in this order")
    for index, run in enumerate(record["runs"]):
        _check_lengths(run, record["runs"][0], f"runs[{index}]")


def _check(value: Any, shape: Any, where: str) -> None:
    """Refuse a value that is not of the shape.

    Args:
        shape: `Number`, `Kind` or `OrNull`; [shape] for a list of any length, (shape, ...) for one of that length; for
            an object a dict of what it holds, in which a name with ? may be missing.
        where: the field, for the error line.
    """
    match shape:
        case OrNull() if value is not None:
            _check(value, shape.shape, where)
        case Number(low, high, whole):
            kind = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high + ROUNDING:
                range_ = f"of at least {low:g}" if high == LARGEST else f"from {low} to {high}"
                _fail(where, f"a {'whole ' if whole else ''}number {range_}")
        case Kind(kind, what) if not isinstance(value, kind):
            _fail(where, what)
        case list() | tuple():
            exact = len(shape) if isinstance(shape, tuple) else None
            if not isinstance(value, list) or exact not in (None, len(value)):
                _fail(where, "a list" if exact is None else f"a list of {exact}")
            for index, item in enumerate(value):
                _check(item, shape[index if exact else 0], f"{where}[{index}]")
        case dict():
            if not isinstance(value, dict):
                _fail(where, "an object")
            for key, inner in shape.items():
                name = key.removesuffix("?")
                path = f"{where}.{name}" if where else name
                if name in value:
                    _check(value[name], inner, path)
                elif name == key:
                    raise ValueError(f"{path} is missing")


def _fail(where: str, what: str) -> NoReturn:
    raise ValueError(f"{where or 'the record'} must be {what}")


def _check_lengths(run: dict[str, Any], first: dict[str, Any], where: str) -> None:
    """Refuse fields of one run that do not fit each other, or the other run."""
    for name in ("token_ids", "step_seconds"):
        if not run[name] or len(run[name]) != len(first[name]):
            _fail(f"{where}.{name}", "as long as the other run's, and not empty")
    tokens, steps = len(run["token_ids"]), len(run["step_seconds"])
    if run["full_steps"] > steps:
        _fail(f"{where}.full_steps", f"at most the number of steps, {steps}")
    if "repeats" in run and not run["repeats"]["seconds"]:
        _fail(f"{where}.repeats.seconds", "at least one")
    written = {"history", "pieces", "answer_tokens"}
    if written & run.keys():
        if not written <= run.keys():
            raise ValueError(f"{where} must hold all of history, pieces and answer_tokens, or none of them")
        if len(run["pieces"]) != tokens:
            _fail(f"{where}.pieces", f"one text for each of the {tokens} tokens")
        if run["answer_tokens"] > tokens:
            _fail(f"{where}.answer_tokens", f"at most {tokens}")
        positions = sorted(position for step in run["history"] for position, _, _ in step)
        if len(run["history"]) != steps or positions != list(range(tokens)):
            _fail(f"{where}.history", f"one list for each of the {steps} steps, with every position once")
    if run.get("pattern"):
        _check_pattern(run["pattern"], f"{where}.pattern")


def _check_pattern(pattern: dict[str, Any], where: str) -> None:
    try:
        cells = base64.b64decode(pattern["cells"], validate=True)
    except ValueError:
        _fail(f"{where}.cells", "base64")
    bits = math.prod(pattern[name] for name in ("layers", "heads", "rows", "columns"))
    if len(cells) != -(-bits // 8):
        _fail(f"{where}.cells", f"the base64 of {bits} bits")
    if pattern["prompt_tokens"] >= pattern["tokens"]:
        _fail(f"{where}.prompt_tokens", "fewer than tokens")
