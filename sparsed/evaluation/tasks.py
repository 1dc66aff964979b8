"""RULER's thirteen tasks over texts of our own, samples of exact lengths, and samples from a user's file."""

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..chat import encode_chat
from ..console.files import bytes_of
from ..prompts import fit
from .puzzles import Puzzle, common_words, frequent_words, needles, questions, tracking
from .scoring import MATCHES


@dataclass(frozen=True)
class Sample:
    """One question to a model.

    Attributes:
        id: unique within a run, such as 'niah_single_1-4096-0-17' (task, tokens, seed, index).
        task: the task's name; of a user's file, the file's name without its ending.
        length: tokens of the prompt that were asked for; None for a user's file.
        seed, index: which of the task's samples, the index from 0; no seed in a user's file.
        prompt: the user message.
        answers: what a right answer contains.
        input_ids: the prompt with the chat template.
        match: how `score` counts the answers, "all" or "part".
    """

    id: str
    task: str
    length: int | None
    seed: int | None
    index: int
    prompt: str
    answers: tuple[str, ...]
    input_ids: list[int]
    match: str = "all"


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: RULER's name.
        family: RULER's category.
        gen_length: new tokens for the answer, RULER's figure rounded to a multiple of 32.
        build: (rng, size, *, held_out) -> a puzzle with about `size` sentences or list items.
        shortest: the smallest size.
        match: how RULER scores it, see `score`.
    """

    name: str
    family: str
    gen_length: int
    build: Callable[..., Puzzle]
    shortest: int = 3
    match: str = "all"


TASKS = {
    task.name: task
    for task in (
        Task("niah_single_1", "retrieval", 128, partial(needles, hay="noise")),
        Task("niah_single_2", "retrieval", 128, partial(needles, hay="essay")),
        Task("niah_single_3", "retrieval", 128, partial(needles, hay="essay", value="uuid")),
        Task("niah_multikey_1", "retrieval", 128, partial(needles, hay="essay", told=4)),
        Task("niah_multikey_2", "retrieval", 128, partial(needles, hay="needles")),
        Task("niah_multikey_3", "retrieval", 128, partial(needles, hay="needles", key="uuid", value="uuid")),
        Task("niah_multivalue", "retrieval", 128, partial(needles, hay="essay", values=4)),
        Task("niah_multiquery", "retrieval", 128, partial(needles, hay="essay", told=4, asked=4)),
        Task("vt", "multi-hop tracing", 32, tracking),
        # long enough that the answers' counts differ from the runner-up's
        Task("cwe", "aggregation", 128, common_words, shortest=90),
        Task("fwe", "aggregation", 64, frequent_words, shortest=90),
        Task("qa_1", "question answering", 32, partial(questions, hops=1), match="part"),
        Task("qa_2", "question answering", 32, partial(questions, hops=2), match="part"),
    )
}


def sample_id(task: Task, length: int, seed: int, index: int) -> str:
    """The id of a sample that `make_sample` makes from the same values."""
    return f"{task.name}-{length}-{seed}-{index}"


def make_sample(task: Task, tokenizer: Any, length: int, seed: int, index: int) -> Sample:
    """A held-out sample, EXACTLY `length` tokens with the chat template under this tokenizer; deterministic.

    Raises:
        ValueError: the length is too short or too long for the task, or this tokenizer cannot reach it exactly.
    """

    @functools.lru_cache(maxsize=2)
    def puzzle(size: int) -> Puzzle:
        return task.build(random.Random(f"{task.name} {length} {seed} {index}"), size, held_out=True)

    size, ending, ids = fit(tokenizer, length, lambda size, ending: puzzle(size).text(ending), task.shortest, task.name)
    name, made = sample_id(task, length, seed, index), puzzle(size)
    return Sample(name, task.name, length, seed, index, made.text(ending), made.answers, ids, task.match)


def read_samples(path: str | Path, tokenizer: Any) -> list[Sample]:
    """Samples of a user's JSONL file: one object per line, with "prompt" (string) and "answers" (list of strings).

    A line may also have "id" (string; default: the file's name and the line's number) and "match" ("all", the default,
    or "part"). Empty lines are skipped.

    Raises:
        ValueError: anything else in the file, or a file that cannot be read; the message names the file and the line.
    """
    path = Path(path)
    samples: list[Sample] = []
    first_lines: dict[str, int] = {}
    for number, line in enumerate(bytes_of(str(path)).splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = {"id": f"{path.stem}-{number}", "match": "all", **_fields(line)}
            first = first_lines.setdefault(fields["id"], number)
            if first != number:
                raise ValueError(f"the id {fields['id']!r} is that of line {first}, too")
        except UnicodeError:  # also for half of a surrogate pair, which JSON allows
            raise ValueError(f"{path}, line {number}: not valid Unicode") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        prompt, answers = fields["prompt"], tuple(fields["answers"])
        ids = encode_chat(tokenizer, prompt)
        samples.append(Sample(fields["id"], path.stem, None, None, len(samples), prompt, answers, ids, fields["match"]))
    if not samples:
        raise ValueError(f"{path}: holds no samples")
    return samples


def _fields(line: bytes) -> dict[str, Any]:
    """The fields of one line, checked."""
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON of an object with strings and lists of strings") from None
    if not isinstance(fields, dict):
        raise ValueError('not an object with "prompt" and "answers"')
    for name in ("prompt", "answers"):
        if name not in fields:
            raise ValueError(f'the field "{name}" is missing')
    for name, value in fields.items():
        if name not in _CHECKS:
            raise ValueError(f"unknown field {name!r}: there are {', '.join(_CHECKS)}")
        wanted, right = _CHECKS[name]
        if not right(value):
            raise ValueError(f'"{name}" must be {wanted}')
    json.dumps(fields, ensure_ascii=False).encode("utf-8")
    return fields


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


_CHECKS = {
    "prompt": ("a string that is not empty", _is_text),
    "answers": ("a list of strings, none empty", lambda v: isinstance(v, list) and bool(v) and all(map(_is_text, v))),
    "id": ("a string that is not empty", _is_text),
    "match": (f"one of {', '.join(MATCHES)}", lambda v: v in MATCHES),
}
