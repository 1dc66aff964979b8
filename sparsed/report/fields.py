"""What a page needs of a record, and a check of one that was read from a file."""

import base64
import math
from collections.abc import Callable
from typing import Any

Check = Callable[[Any, str], None]
LARGEST = 1e15  # of any number: a float holds all whole ones up to it
ROUNDING = 1e-5  # by which a share, a mean of float32 values, may exceed 1


def check_record(record: Any) -> None:
    """Refuse what is not the record of a run of the two scripts, of this version or an earlier one.

    Raises:
        ValueError: names the field that is wrong, and says what it should be.
    """
    if isinstance(record, dict) and "advice" in record:
        raise ValueError("this is the record of --advise, which makes no answer; the page needs a run's")
    RECORD(record, "")
    modes = [run["mode"] for run in record["runs"]]
    if modes not in (["origin"], ["sparsed"], ["origin", "sparsed"]):
        raise ValueError("runs must be one of mode 'origin' or 'sparsed', or both in this order")
    for index, run in enumerate(record["runs"]):
        _check_lengths(run, record["runs"][0], f"runs[{index}]")


def _fail(where: str, what: str) -> None:
    raise ValueError(f"{where or 'the record'} must be {what}")


def _is(kind: type | tuple[type, ...], what: str) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, kind):
            _fail(where, what)

    return check


def _number(low: float, high: float = LARGEST, whole: bool = False) -> Check:
    kind, what = (int, "a whole number") if whole else ((int, float), "a number")
    what += f" of at least {low:g}" if high == LARGEST else f" from {low} to {high}"

    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high + ROUNDING:
            _fail(where, what)

    return check


def _or_null(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _list_of(check: Check) -> Check:
    def check_list(value: Any, where: str) -> None:
        if not isinstance(value, list):
            _fail(where, "a list")
        for index, item in enumerate(value):
            check(item, f"{where}[{index}]")

    return check_list


def _row_of(*checks: Check) -> Check:
    def check_row(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) != len(checks):
            _fail(where, f"a list of {len(checks)}")
        for index, check in enumerate(checks):
            check(value[index], f"{where}[{index}]")

    return check_row


def _object(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    def check_object(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _fail(where, "an object")
        for name, check in {**required, **(optional or {})}.items():
            path = f"{where}.{name}" if where else name
            if name in value:
                check(value[name], path)
            elif name in required:
                raise ValueError(f"{path} is missing")

    return check_object


WHOLE, SECONDS, SHARE = _number(0, whole=True), _number(0), _number(0, 1)
TEXT, FLAG, MODE = _is(str, "a text"), _is(bool, "true or false"), _is(str, "'origin' or 'sparsed'")
SIZE = _number(1, whole=True)
PATTERN = _object(
    {
        **dict.fromkeys(("block_size", "tokens", "query_blocks", "key_blocks"), SIZE),
        **dict.fromkeys(("rows", "columns", "layers", "heads"), SIZE),
        "prompt_tokens": WHOLE,
        "cells": TEXT,
    }
)
RUN = _object(
    {
        "mode": MODE,
        "token_ids": _list_of(WHOLE),
        "prompt_tokens": WHOLE,
        "text": TEXT,
        "expected": _or_null(TEXT),
        "answer_found": _or_null(FLAG),
        "seconds": SECONDS,
        "step_seconds": _list_of(SECONDS),
        "full_steps": WHOLE,
        "selection_seconds": _or_null(_number(-LARGEST)),
        "compile_seconds": SECONDS,
        "warmup_seconds": _list_of(SECONDS),
        "warmup_compile_seconds": SECONDS,
        "density": _or_null(SHARE),
        "backend": _or_null(TEXT),
        "backend_reason": _or_null(TEXT),
    },
    # what earlier versions did not record
    {
        "repeats": _object({"seconds": _list_of(SECONDS), "same_tokens": FLAG}),
        "history": _list_of(_list_of(_row_of(WHOLE, WHOLE, _or_null(SHARE)))),
        "pieces": _list_of(TEXT),
        "answer_tokens": WHOLE,
        "layers": _or_null(_list_of(_object({"density": SHARE, "recall": SHARE}))),
        "pattern": _or_null(PATTERN),
    },
)
TABLE = _object({})
RECORD = _object(
    {
        "runs": _list_of(RUN),
        "trained_length": WHOLE,
        "beyond_trained_length": FLAG,
        "load_seconds": SECONDS,
        "first_forward_seconds": SECONDS,
        "environment": TABLE,
        "arguments": TABLE,
    }
)


def _check_lengths(run: dict[str, Any], first: dict[str, Any], where: str) -> None:
    """Refuse fields of one run that do not fit each other, or the other run."""
    tokens, steps = len(run["token_ids"]), len(run["step_seconds"])
    if not tokens or tokens != len(first["token_ids"]):
        _fail(f"{where}.token_ids", "as long as the other run's, and not empty")
    if not steps or steps != len(first["step_seconds"]):
        _fail(f"{where}.step_seconds", "as long as the other run's, and not empty")
    if run["full_steps"] > steps:
        _fail(f"{where}.full_steps", f"at most the number of steps, {steps}")
    if "repeats" in run and not run["repeats"]["seconds"]:
        _fail(f"{where}.repeats.seconds", "at least one")
    written = {"history", "pieces", "answer_tokens"}
    if written & run.keys():
        if not written <= run.keys():
            raise ValueError(f"{where} must hold all of history, pieces and answer_tokens, or none of them")
        _check_history(run, tokens, steps, where)
    if run.get("pattern"):
        _check_pattern(run["pattern"], f"{where}.pattern")


def _check_history(run: dict[str, Any], tokens: int, steps: int, where: str) -> None:
    if len(run["pieces"]) != tokens:
        _fail(f"{where}.pieces", f"one text for each of the {tokens} tokens")
    if run["answer_tokens"] > tokens:
        _fail(f"{where}.answer_tokens", f"at most {tokens}")
    positions = sorted(position for step in run["history"] for position, _, _ in step)
    if len(run["history"]) != steps or positions != list(range(tokens)):
        _fail(f"{where}.history", f"one list for each of the {steps} steps, with every position once")


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
