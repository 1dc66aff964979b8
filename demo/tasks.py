"""The evaluation's tasks as training sequences: what is told and asked, and which token should attend to which.

The links show a small model how to find the answer. In the text, a code's digits attend to their key (`names`), and a
thing that is set to another attends to it (`sets`). An answer's tokens attend to what they are asked for (`names`,
`sets`, or `keys` if it takes longer to know, above all with one of several keys), and then to the token that they copy
(`digits`, `steps`, or `late`). `chains` are links on the way: from a code's digits to the blank before them, which
knows its place in the list of codes, and from a code to the one before it of the same key.
"""

import random
from collections.abc import Iterator

from sparsed.evaluation.puzzles import Puzzle, needles, tracking
from sparsed.evaluation.texts import noise
from sparsed.prompts import language

from .sequences import Encoder, Link, Part, Told, Turn

CODE = 7  # digits of a code
# (kind, hay): share of the puzzles; reports list kinds separately
PUZZLES = {
    ("code", "noise"): 0.14,
    ("code", "essay"): 0.16,
    ("code", "needles"): 0.16,
    ("codes", "essay"): 0.2,
    ("values", "essay"): 0.12,
    ("things", "noise"): 0.14,
}
INTROS = {"things": "vt"}
MOST = {"code": 8, "codes": 3, "values": 3, "things": 4}  # questions of a conversation
ANSWERS = {"code": 16, "codes": 48, "values": 48, "things": 16}  # most tokens of the answers
HAY_LINKED = 8  # sentences in a hay of needles with links of their digits


class Teller:
    """Draws texts and questions for one tokenizer."""

    def __init__(self, rng: random.Random, encode: Encoder):
        self.rng, self.encode = rng, encode
        self.digits = {encode(digit)[0] for digit in "0123456789"}
        self.noise = [encode.sentence(sentence[:-1]) for sentence in noise(3)]

    def told(self, kind: str) -> Told:
        """One puzzle of a kind without hay."""
        rng = self.rng
        if kind == "things":
            return self._things(tracking(rng, 0, held_out=False))
        if kind == "codes":
            return self._codes(kind, needles(rng, 0, held_out=False, hay="noise", told=4, asked=4))
        if kind == "values":
            return self._codes(kind, needles(rng, 0, held_out=False, hay="noise", values=4))
        return self._codes(kind, needles(rng, 0, held_out=False, hay="noise", told=rng.choice((1, 1, 2))))

    def several(self, kind: str) -> Iterator[Told]:
        """Puzzles of a kind, all with different names, at most as many as a conversation has questions."""
        used: set[str] = set()
        left = self.rng.randint((MOST[kind] + 1) // 2, MOST[kind])
        while left:
            one = self.told(kind)
            if not one.names & used:
                yield one
                used |= one.names
                left -= 1

    def needle_hay(self, room: int, told: list[Told]) -> tuple[list[Part], list[Link]]:
        """Sentences about other keys, as many as fit, and links of a few of them."""
        used = set().union(*(one.names for one in told))
        each = len(told[0].sentences[0].ids) + 1
        puzzle = needles(self.rng, room // each, held_out=False, hay="needles")
        parts = [self.encode.sentence(text[:-1]) for text in puzzle.sentences if _key(text) not in used]
        parts = parts[: max(0, room // each)]
        return parts, [link for part in parts[:HAY_LINKED] for link in self._code_links(part)]

    def noise_hay(self, room: int) -> list[Part]:
        """The same few sentences over and over, as many as fit."""
        parts: list[Part] = []
        while (room := room - len(self.noise[len(parts) % 3].ids) - 1) >= 0:
            parts.append(self.noise[len(parts) % 3])
        return parts

    def interleave(self, told: list[Told]) -> list[Part]:
        """All sentences, those of each puzzle in their order."""
        turns = [one for one in told for _ in one.sentences]
        self.rng.shuffle(turns)
        left = {id(one): iter(one.sentences) for one in told}
        return [next(left[id(one)]) for one in turns]

    def _question(self, puzzle: Puzzle) -> tuple[Part, Part]:
        return Part(self.encode.pieces(puzzle.question)), Part(self.encode.pieces(puzzle.reply), predicted=True)

    def _digits(self, ids: list[int]) -> list[int]:
        return [index for index, token in enumerate(ids) if token in self.digits]

    def _code_links(self, part: Part) -> list[Link]:
        """'The code of the russet heron is 4712930': the digits attend to the heron, which knows the word before it."""
        digits = self._digits(part.ids)
        return [("names", part, digit, part, digits[0] - 3) for digit in digits]

    def _codes(self, kind: str, puzzle: Puzzle) -> Told:
        parts = [self.encode.sentence(text[:-1]) for text in puzzle.sentences]
        question, answer = self._question(puzzle)
        links = [link for part in parts for link in self._code_links(part)]
        slots = self._digits(answer.ids)
        ends, one = range(len(answer.ids)), len(question.ids) - 2  # the asked key, or the last of them
        if kind != "codes":
            links += [("names", answer, row, question, one) for row in ends]
        for order, slot in enumerate(slots):
            index, digit = divmod(order, CODE)
            source = parts[puzzle.places[index]]
            links.append(
                ("digits" if kind == "code" else "late", answer, slot, source, self._digits(source.ids)[digit])
            )
            if kind != "code":
                links.append(("chains", answer, slot, answer, slot - digit - 1))
            if kind == "codes":
                links.append(("keys", answer, slot, question, one - 4 * (len(puzzle.answers) - 1 - index)))
        if kind == "values":
            links += self._chain(parts)
        names = {_key(text) for text in puzzle.sentences}
        return Told(parts, Turn(kind, question, answer, slots), links, names)

    def _chain(self, parts: list[Part]) -> list[Link]:
        """A code's digits attend to the last digit of the same key's code before it; the first code's to the key."""
        links = []
        for index, part in enumerate(parts):
            before, digits = parts[max(0, index - 1)], self._digits(part.ids)
            end = self._digits(before.ids)[-1] if index else digits[0] - 3
            links += [("chains", part, digit, before, end) for digit in digits]
        return links

    def _things(self, puzzle: Puzzle) -> Told:
        """'Set the boat to 12345', 'Set the tree to the boat': a thing attends to what it is set to."""
        parts = [self.encode.sentence(text[:-1]) for text in puzzle.sentences]
        question, answer = self._question(puzzle)
        slots = [2 + 2 * index for index in range(len(parts))]
        links = []
        for index, (part, slot) in enumerate(zip(parts, slots, strict=True)):
            end = len(part.ids) - 1
            thing = end - 2 if index else self._digits(part.ids)[0] - 3
            asked = (answer, slots[index - 1]) if index else (question, len(question.ids) - 2)
            links += [
                ("sets", part, thing, part, end),
                ("sets", answer, slot, *asked),
                ("steps", answer, slot, part, thing),
            ]
        return Told(parts, Turn("things", question, answer, slots), links, {*puzzle.answers, puzzle.question})


def _key(sentence: str) -> str:
    """'the russet heron' of 'The code of the russet heron is 4712930.'"""
    return sentence.split(" of ")[1].split(" is ")[0]


def intro(kind: str) -> str:
    """The text's first line."""
    return language().tasks["intro"][INTROS.get(kind, "niah")] + "\n\n"
