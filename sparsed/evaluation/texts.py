"""Parts of the tasks' texts: keys, their values, essays about people, and noise, drawn from the caller's rng.

`held_out` says who draws. An evaluation (True) asks about what training never sees, in texts that may hold anything.
Training (False) meets nothing that is held out.
"""

import functools
import random
import uuid
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from ..prompts import FACT_SHARE, HELD_OUT_EVERY, Fact, language

# share of facts that are a second fact about the same person
SECOND_FACTS = 0.25
Key = tuple[str, str]
Item = TypeVar("Item")


@functools.cache
def key_words() -> tuple[list[str], list[str]]:
    """The first and the second words of keys such as ("russet", "heron")."""
    words = language()
    groups = words.tasks["keys"]
    first, second = ([word for group in groups[part] for word in words.words[group]] for part in ("first", "second"))
    return first, second


def key_held_out(key: Key) -> bool:
    """Whether this pair of words is kept out of training; one in eight is."""
    first, second = (words.index(word) for words, word in zip(key_words(), key, strict=True))
    return (first + 3 * second) % HELD_OUT_EVERY == 0


def number_held_out(number: int) -> bool:
    """Whether training never asks for this number, in variable tracking."""
    return number % HELD_OUT_EVERY == 0


def elsewhere(held_out: bool) -> bool | None:
    """`held_out` for the rest of the text: anything in an evaluation (None), nothing held out in training (False)."""
    return None if held_out else False


def keys(rng: random.Random, *, held_out: bool | None) -> Iterator[Key]:
    """All keys for which `key_held_out` has this value, or all (None), in random order."""
    first, second = key_words()
    seen: set[Key] = set()
    while len(seen) < len(first) * len(second):
        key = (rng.choice(first), rng.choice(second))
        if key not in seen:
            seen.add(key)
            if held_out in (None, key_held_out(key)):
                yield key


def take(items: Iterable[Item], count: int) -> list[Item]:
    """The first `count` of the items.

    Raises:
        ValueError: there are fewer.
    """
    taken = list(islice(items, count))
    if len(taken) < count:
        raise ValueError(f"a text of this length needs {count} different keys, and there are only {len(taken)}")
    return taken


def key_names(rng: random.Random, asked: int, others: int, *, held_out: bool) -> list[str]:
    """'the russet heron' and so on: first the asked ones, then others, all different."""
    first = take(keys(rng, held_out=held_out), asked)
    rest = take((key for key in keys(rng, held_out=elsewhere(held_out)) if key not in first), others)
    return [f"the {' '.join(key)}" for key in first + rest]


def numbers(rng: random.Random, count: int, digits: int = 7) -> list[str]:
    """Different numbers of `digits` digits."""
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def uuids(rng: random.Random, count: int) -> list[str]:
    """Random UUIDs; with 122 random bits they neither repeat nor need to be held out."""
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def noise(count: int) -> list[str]:
    """The same few sentences again and again."""
    sentences = language().tasks["noise"]
    return [sentences[place % len(sentences)] for place in range(count)]


def essay(rng: random.Random, count: int, *, held_out: bool, without: Collection[Fact] = ()) -> list[str]:
    """Sentences of filler and of facts about people, with at most one fact of a kind per person.

    Args:
        without: no fact has the values of these, and no person the last name of one of theirs.
    """
    words = language()
    kinds = list(words.kinds)
    values, lasts = {fact.values for fact in without}, {fact.person[1] for fact in without}
    persons = (person for person in words.persons(rng, held_out=elsewhere(held_out)) if person[1] not in lasts)
    once: list[Fact] = []
    sentences: list[str] = []
    while len(sentences) < count:
        if rng.random() >= FACT_SHARE:
            sentences.append(words.filler_sentence(rng))
            continue
        before = once.pop(rng.randrange(len(once))) if once and rng.random() < SECOND_FACTS else None
        if before:
            fact = words.fact(rng, before.person, rng.choice([kind for kind in kinds if kind != before.kind]))
        else:
            fact = words.fact(rng, next(persons), rng.choice(kinds))
        if fact.values not in values:
            sentences.append(fact.fill(rng.choice(words.kinds[fact.kind]["facts"])))
            if not before:
                once.append(fact)
    return sentences
