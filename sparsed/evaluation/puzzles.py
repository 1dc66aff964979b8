"""The kinds of RULER's tasks (arXiv 2404.06654), in the language of `prompts/`: a text, a question, its answers.

A builder takes `size`, the number of sentences (or list items) of the text: `make_sample` finds the size that fills a
prompt, and training draws puzzles of any size with an rng of its own.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..prompts import PARAGRAPH, answer_key, join_message, language
from .texts import elsewhere, essay, key_names, key_words, keys, noise, number_held_out, numbers, take, uuids

# RULER's figures: words of cwe, how often the common and the others stand in a list of at least that many items
COMMON = 10
LONG_LIST, LONG_COUNTS = 400, (30, 3)
SHORT_COUNTS = (6, 1)
# fwe: counts fall with the rank to the power of -2 (their sum is pi^2 / 6); the first rank is no name
ZIPF_SUM = math.pi**2 / 6
ASKED_RANKS = 3
BLANK = "-"


@dataclass(frozen=True)
class Puzzle:
    """A text with a question, in pieces.

    Attributes:
        opening: what to do with the text.
        sentences: the text, needles among them; of a list, its items.
        places: indices of the sentences that the answer is read from, in the answer's order; none for lists.
        question: the question.
        answers: what a right reply must contain.
        reply: a right reply, as a full sentence.
        paragraph: sentences of a paragraph.
    """

    opening: str
    sentences: list[str]
    places: tuple[int, ...]
    question: str
    answers: tuple[str, ...]
    reply: str
    paragraph: int = PARAGRAPH

    def text(self, ending: str = "") -> str:
        """The user message, with `ending` between the text and the question."""
        return join_message(self.opening, self.sentences, ending, self.question, self.paragraph)


def _puzzle(
    kind: str, sentences: list[str], places: Sequence[int], question: str, answers: Sequence[str], **more: int
) -> Puzzle:
    """A puzzle with its kind's opening; the answers make the reply."""
    opening = language().tasks["intro"][kind]
    return Puzzle(opening, sentences, tuple(places), question, tuple(answers), reply(answers), **more)


def needles(
    rng: random.Random,
    size: int,
    *,
    held_out: bool,
    hay: str,
    key: str = "words",
    value: str = "number",
    told: int = 1,
    asked: int = 1,
    values: int = 1,
) -> Puzzle:
    """Needle in a haystack: sentences tell the codes of keys, and the question asks for those of some of the keys.

    Args:
        size: sentences of hay.
        hay: "noise", "essay", or "needles" for codes of other keys.
        key, value: "words" or "uuid", "number" or "uuid".
        told, asked: how many keys' codes the text tells, not counting hay, and how many of them are asked.
        values: codes per key; if several, they are answered in the text's order.

    Raises:
        ValueError: there are not enough keys for this much hay of needles.
    """
    others = size if hay == "needles" else told - asked
    if key == "uuid":
        names = uuids(rng, asked + others)
    else:
        names = key_names(rng, asked, others, held_out=held_out)
    codes = (uuids if value == "uuid" else numbers)(rng, len(names) * values)
    mode = "values" if values > 1 else "keys" if asked > 1 else "one"
    tasks = language().tasks
    template = tasks["needle"][mode]
    sentences = [template.format(key=names[index // values], value=code) for index, code in enumerate(codes)]
    straw = []
    if hay != "needles":
        straw = noise(size) if hay == "noise" else essay(rng, size, held_out=held_out)
    text, places = scatter(rng, straw, sentences, in_order=values > 1)
    answers = codes[: asked * values]
    question = tasks["question"][mode].format(keys=listed(names[:asked]))
    return _puzzle("niah", text, places[: len(answers)], question, answers)


def tracking(rng: random.Random, size: int, *, held_out: bool, chains: int = 1, hops: int = 4) -> Puzzle:
    """Variable tracking: chains of `hops` assignments from one thing to the next; which things have a number?

    Args:
        size: sentences of noise.
        chains: the first one's number is asked.
    """
    tasks = language().tasks
    names = rng.sample(key_words()[1], chains * (hops + 1))
    values = numbers(rng, chains, digits=5)
    while number_held_out(int(values[0])) != held_out:
        values = numbers(rng, chains, digits=5)
    # a chain's sentences keep their order, with others between them
    turns = [chain for chain in range(chains) for _ in range(hops + 1)]
    rng.shuffle(turns)
    latest, sentences, asked = list(values), [], []
    for chain in turns:
        name = names.pop()
        sentences.append(tasks["needle"]["vt"].format(key=name, value=latest[chain]))
        latest[chain] = name
        if chain == 0:
            asked.append(name)
    text, places = scatter(rng, noise(size), sentences, in_order=True)
    read = [place for place, chain in zip(places, turns, strict=True) if chain == 0]
    return _puzzle("vt", text, read, tasks["question"]["vt"].format(value=values[0]), asked)


def common_words(rng: random.Random, size: int, *, held_out: bool) -> Puzzle:
    """A numbered list in which ten keys stand more often than all others; answered in the order of the list.

    The ten stand in it 30 times each and the others 3 times; 6 times and once in a list of less than `LONG_LIST` items.
    The last of the others fills up the list.
    """
    often, seldom = LONG_COUNTS if size >= LONG_LIST else SHORT_COUNTS
    rest = size - COMMON * often
    common = take(keys(rng, held_out=held_out), COMMON)
    different = (key for key in keys(rng, held_out=elsewhere(held_out)) if key not in common)
    others = take(different, math.ceil(rest / seldom))
    items = [" ".join(key) for key in common * often + [others[index // seldom] for index in range(rest)]]
    rng.shuffle(items)
    asked = {" ".join(key) for key in common}
    answers = [item for item in dict.fromkeys(items) if item in asked]
    return _list("cwe", [f"{number}. {item}" for number, item in enumerate(items, 1)], answers)


def frequent_words(rng: random.Random, size: int, *, held_out: bool) -> Puzzle:
    """Code names with counts by Zipf's law, the first rank blanks; which three are the most frequent?

    `held_out` changes nothing: each puzzle draws its own frequent names, and the question is always the same.
    """
    names = rng.sample(language().words["last"], len(language().words["last"]))
    items = [name for rank, name in enumerate(names, 2) for _ in range(int(size / ZIPF_SUM / rank**2))]
    items += [BLANK] * (size - len(items))
    rng.shuffle(items)
    return _list("fwe", items, names[:ASKED_RANKS])


def _list(task: str, items: list[str], asked: list[str]) -> Puzzle:
    """A puzzle of one paragraph."""
    items[-1] += "."
    return _puzzle(task, items, (), language().tasks["question"][task], asked, paragraph=len(items))


def questions(rng: random.Random, size: int, *, held_out: bool, hops: int) -> Puzzle:
    """A fact about a person is asked; with two hops, the question describes the person by another fact.

    The text always tells both facts, and no other person in it has this last name or the values of either fact.
    """
    words = language()
    person = next(iter(words.persons(rng, held_out=held_out)))
    asked, clue = (words.fact(rng, person, kind) for kind in rng.sample(list(words.kinds), 2))
    kind = words.kinds[asked.kind]
    # in the words of the answer, because other models may repeat the text's
    told = rng.choice([text for text in kind["facts"] if answer_key(kind) in text])
    sentences = [asked.fill(told), clue.fill(rng.choice(words.kinds[clue.kind]["facts"]))]
    text, places = scatter(rng, essay(rng, size, held_out=held_out, without=(asked, clue)), sentences)
    name = " ".join(person) if hops == 1 else clue.fill(words.tasks["person"][clue.kind])
    return Puzzle(
        opening=words.tasks["intro"]["qa"],
        sentences=text,
        places=places[:1] if hops == 1 else (places[1], places[0]),
        question="Question: " + rng.choice(kind["questions"]).format(name=name),
        answers=(asked.fill(answer_key(kind)),),
        reply=asked.fill(kind["answer"]),
    )


def scatter(
    rng: random.Random, straw: Sequence[str], told: Sequence[str], *, in_order: bool = False
) -> tuple[list[str], tuple[int, ...]]:
    """The told sentences at random places among the others, and the places, in the order of `told`."""
    places = rng.sample(range(len(straw) + len(told)), len(told))
    if in_order:
        places.sort()
    at = dict(zip(places, told, strict=True))
    others = iter(straw)
    return [at[place] if place in at else next(others) for place in range(len(straw) + len(told))], tuple(places)


def listed(items: Sequence[str]) -> str:
    """'a, b and c'."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def reply(answers: Sequence[str]) -> str:
    """The answers in a sentence."""
    return f"{'It is' if len(answers) == 1 else 'They are'} {listed(answers)}."
