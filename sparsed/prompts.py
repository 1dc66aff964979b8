"""Prompts of our own: documents whose facts can be asked for, word problems, exact token lengths."""

import functools
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat import Turn, encode_chat, encode_raw

PRESETS = ("short_context", "4k", "8k", "16k", "32k", "64k")
LENGTHS = {name: 1024 * int(name[:-1]) for name in PRESETS[1:]}

# one fixed text a preset; any other seed would do
PRESET_SEED = 2512
FACT_SHARE = 0.4
PARAGRAPH = 8
HELD_OUT_EVERY = 8
# tokens kept free for the last sentence
SPARE = 8
# sentences of the shortest document
SHORTEST = 3
# sentences that tell a tokenizer's average
SAMPLE = 64
# what the last sentence of a document is stretched with, until the length is exact
FILLERS = (" and", " so", " on", " the", " it", " a", ".", "a")


@dataclass(frozen=True)
class Prompt:
    """A user message and its chat-templated ids; `expected` is the answer's key phrase, None if nothing is to check."""

    text: str
    expected: str | None
    input_ids: list[int]


@dataclass(frozen=True)
class Fact:
    """One fact of a document: its kind in facts.json, the person (first, last name), the values of the kind's slots."""

    kind: str
    person: tuple[str, str]
    values: tuple[str, ...]

    def fill(self, template: str) -> str:
        """A template of facts.json with the name and the values in their places."""
        return template.format(*self.values, name=" ".join(self.person))


def data_dir() -> Path:
    """The folder of the texts: `prompts/` next to the package in a checkout, else the installed package's own copy."""
    return _bundled("prompts", "words.json")


def demo_path(family: str) -> Path:
    """The folder of the demo checkpoint of `family` (dream, llada), in a checkout or in the installed package.

    Raises:
        ValueError: there is no demo of that name.
    """
    return _bundled(f"demo/{family}", "config.json")


def _bundled(name: str, file: str) -> Path:
    package = Path(__file__).resolve().parent
    for folder in (package.parent / name, package / "data" / name):
        if (folder / file).is_file():
            return folder
    raise ValueError(f"this installation has no {name} folder with {file}")


class Language:
    """The plain English that documents and word problems are written in: the word lists and templates of `prompts/`."""

    def __init__(self, folder: Path):
        def read(name: str) -> dict[str, Any]:
            return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))

        self.words = {key: words.split() for key, words in read("words").items()}
        self.kinds = read("facts")
        self.filler = read("filler")
        self.problems = read("problems")
        self.tasks = read("tasks")
        self._first = {word: index for index, word in enumerate(self.words["first"])}
        self._last = {word: index for index, word in enumerate(self.words["last"])}

    def held_out(self, person: tuple[str, str]) -> bool:
        """Whether this full name is kept out of the demo models' training, for questions that test them."""
        return (self._first[person[0]] + 3 * self._last[person[1]]) % HELD_OUT_EVERY == 0

    def numbers_held_out(self, a: int, b: int, c: int) -> bool:
        """Whether this triple of numbers is kept out of the training's word problems."""
        return (a + 3 * b + 5 * c) % HELD_OUT_EVERY == 0

    def persons(self, rng: random.Random, *, held_out: bool | None = None) -> Iterable[tuple[str, str]]:
        """Full names without end, never one twice, last names repeated as late as possible.

        Args:
            held_out: only names for which `held_out` has this value; None for all names.
        """
        lasts = rng.sample(self.words["last"], len(self.words["last"]))
        seen = set()
        while True:
            for last in lasts:
                person = (rng.choice(self.words["first"]), last)
                if person not in seen and held_out in (None, self.held_out(person)):
                    seen.add(person)
                    yield person

    def fact(self, rng: random.Random, person: tuple[str, str], kind: str) -> Fact:
        return Fact(kind, person, tuple(rng.choice(self.words[slot]) for slot in self.kinds[kind]["slots"]))

    def filler_sentence(self, rng: random.Random) -> str:
        """A sentence without any name or value."""
        template = rng.choice(self.filler["sentences"])
        return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(self.words[slot[1]]), template)

    def problem(self, rng: random.Random, *, held_out: bool) -> tuple[str, str, str]:
        """A word problem: its text, the answer sentence and the answer's key phrase."""
        low, high = self.problems["range"]
        while True:
            problem = rng.choice(self.problems["problems"])
            numbers = [rng.randint(low, high) for _ in "abc"]
            steps = [factor * number for factor, number in zip(problem["result"], numbers, strict=True)]
            result = sum(steps)
            if result > 1 and steps[0] + steps[1] >= 0 and self.numbers_held_out(*numbers) == held_out:
                break
        slots = dict(zip("abc", numbers, strict=True), result=result)
        slots |= {"name": rng.choice(self.words["first"]), "goods": rng.choice(self.words["goods"])}
        texts = (problem["text"], self.problems["answer"], self.problems["expected"])
        return tuple(text.format(**slots) for text in texts)


@functools.cache
def language() -> Language:
    """The bundled language; read once, never changed."""
    return Language(data_dir())


def answer_key(kind: dict[str, Any]) -> str:
    """The part of a kind's answer that holds its values: '{0} {1} in {2}' of 'A {0} {1} in {2}.'."""
    answer = kind["answer"]
    return answer[answer.index("{0}") : answer.rindex("}") + 1]


class Document:
    """Facts among filler, grown sentence by sentence, and one question about a fact in the middle.

    The asked person's last name belongs to no one else, one other fact is about the same person, many others are of the
    same kind, and the asked values stand together nowhere else.
    """

    def __init__(self, rng: random.Random, words: Language):
        self.rng, self.words = rng, words
        self.target = words.fact(rng, next(iter(words.persons(rng, held_out=True))), rng.choice(list(words.kinds)))
        kind = words.kinds[self.target.kind]
        self.question = "Question: " + self.target.fill(rng.choice(kind["questions"]))
        self.answer = self.target.fill(kind["answer"])
        self.expected = self.target.fill(answer_key(kind))
        # in the words of the answer, because other models may repeat the document's
        self.asked = self.target.fill(rng.choice([text for text in kind["facts"] if answer_key(kind) in text]))
        other = rng.choice([name for name in words.kinds if name != self.target.kind])
        self.sibling = words.fact(rng, self.target.person, other).fill(rng.choice(words.kinds[other]["facts"]))
        self._persons = (p for p in words.persons(rng) if p[1] != self.target.person[1])
        self._sentences: list[str] = []

    def _sentence(self, index: int) -> str:
        """The next sentence; a paragraph starts with filler."""
        if index % PARAGRAPH == 0 or self.rng.random() >= FACT_SHARE:
            return self.words.filler_sentence(self.rng)
        while True:
            fact = self.words.fact(self.rng, next(self._persons), self.rng.choice(list(self.words.kinds)))
            if fact.values != self.target.values:
                return fact.fill(self.rng.choice(self.words.kinds[fact.kind]["facts"]))

    def text(self, count: int, ending: str = "") -> str:
        """The message: introduction, `count` sentences with the asked fact in their middle, `ending`, the question."""
        self._sentences += [self._sentence(index) for index in range(len(self._sentences), count)]
        body = self._sentences[:count]
        for place, fact in ((len(body) // 4, self.sibling), (len(body) // 2, self.asked)):
            body[min(place + (place % PARAGRAPH == 0), len(body) - 1)] = fact
        return join_message(self.words.filler["intro"], body, ending, self.question)


def join_message(opening: str, sentences: list[str], ending: str, question: str, paragraph: int = PARAGRAPH) -> str:
    """A user message: the opening, paragraphs of `paragraph` sentences, `ending` after the last one, the question."""
    paragraphs = [" ".join(sentences[i : i + paragraph]) for i in range(0, len(sentences), paragraph)]
    return "\n\n".join([opening, *paragraphs]) + ending + "\n\n" + question


def build_document(tokenizer: Any, length: int, seed: int, earlier: Sequence[Turn] = ()) -> tuple[Document, Prompt]:
    """A document with a question, EXACTLY `length` tokens with the chat template under this tokenizer; deterministic.

    Args:
        earlier: the turns before it, which count.

    Raises:
        ValueError: this tokenizer cannot reach that length exactly, or the length is too short for a document.
    """
    document = Document(random.Random(f"{seed} {length}"), language())
    count, ending, ids = fit(tokenizer, length, document.text, SHORTEST, "a document", earlier)
    return document, Prompt(document.text(count, ending), document.expected, ids)


def fit(
    tokenizer: Any,
    length: int,
    text: Callable[[int, str], str],
    shortest: int,
    what: str,
    earlier: Sequence[Turn] = (),
) -> tuple[int, str, list[int]]:
    """How many sentences, and which ending, make a user message EXACTLY `length` tokens long with the chat template.

    Args:
        text: the message with that many sentences and with `ending` after the last one, which ends in a full stop; the
            same for the same arguments.
        shortest: the smallest number of sentences.
        what: what the message is, for the errors.
        earlier: the turns before it, which count.

    Returns:
        The number of sentences, the ending, and the ids of `text` with both.

    Raises:
        ValueError: this tokenizer cannot reach that length exactly, or the length is too short.
    """

    def encode(count: int, ending: str = "") -> list[int]:
        return encode_chat(tokenizer, text(count, ending), earlier)

    count, total = _grow(encode, length, shortest, what)
    for ending in _endings(functools.partial(encode, shortest), length - total):
        ids = encode(count, ending)
        if len(ids) == length:
            return count, ending, ids
    raise ValueError(f"this tokenizer gives no prompt of exactly {length} tokens for {what}")


def _grow(encode: Callable[..., list[int]], length: int, shortest: int, what: str) -> tuple[int, int]:
    """As many sentences as fit, with room left for an ending of at least `SPARE` tokens, and the tokens they take."""
    count, total = shortest, len(encode(shortest))
    start = total
    if start + SPARE > length:
        raise ValueError(f"a prompt of {length} tokens is too short for {what}: it takes at least {start + SPARE}")
    average, more = 16.0, min(SAMPLE, (length - SPARE - start) // 16)
    while more > 0:
        count += more
        total = len(encode(count))
        if total - start < count - shortest:
            raise ValueError(f"this tokenizer gives fewer tokens than {what} has sentences")
        average = max(1, total - start) / (count - shortest)
        more = int((length - SPARE - total) / average)
    while (surplus := total + SPARE - length) > 0:
        count = max(shortest, count - max(1, int(surplus / average)))
        total = len(encode(count))
    return count, total


def _endings(encode: Callable[[str], list[int]], missing: int) -> Iterable[str]:
    """Last sentences ' And and and.' that take `missing` tokens, tried with `encode` on a short message."""
    bare = len(encode(""))
    for filler in FILLERS:
        base = len(encode(" And.")) - bare
        each = max(1, (len(encode(" And" + filler * 16 + ".")) - bare - base) // 16)
        count = max(0, (missing - base) // each)
        for ending in (" And" + filler * number + "." for number in (count, count + 1)):
            if len(encode(ending)) - bare == missing:
                yield ending


def build_prompt(preset: str, tokenizer: Any, earlier: Sequence[Turn] = ()) -> Prompt:
    """The preset's prompt under this tokenizer: a word problem, or a document of EXACTLY 4,096 ... 65,536 tokens.

    Args:
        earlier: the turns before it, which count.

    Raises:
        ValueError: an unknown preset, a tokenizer that cannot reach the length exactly, or turns that are too long.
    """
    if preset == "short_context":
        text, _, expected = language().problem(random.Random(PRESET_SEED), held_out=True)
        return Prompt(text, expected, encode_chat(tokenizer, text, earlier))
    if preset not in LENGTHS:
        raise ValueError(f"unknown prompt {preset!r}: choose one of {', '.join(PRESETS)}")
    return build_document(tokenizer, LENGTHS[preset], PRESET_SEED, earlier)[1]


def make_prompt(
    tokenizer: Any, preset: str, own: str | None, earlier: Sequence[Turn] = (), *, raw: bool = False
) -> Prompt:
    """The preset's prompt or, if it is not None, the user's `own`: after the `earlier` turns, or `raw`, as it is.

    Raises:
        ValueError: as for `build_prompt`, `encode_chat` and `encode_raw`.
    """
    if own is None:
        return build_prompt(preset, tokenizer, earlier)
    return Prompt(own, None, encode_raw(tokenizer, own) if raw else encode_chat(tokenizer, own, earlier))


def answer_found(text: str, expected: str) -> bool:
    """Whether the words of `expected` stand in `text` one after another; case, spaces and punctuation do not count."""

    def words(string: str) -> str:
        return " " + " ".join(re.findall(r"[^\W_]+", string.casefold())) + " "

    return words(expected) in words(text)
