"""Training batches: documents with questions, the evaluation's tasks and word problems, masked, with known sources."""

import random
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer

from sparsed.evaluation.puzzles import scatter
from sparsed.prompts import Fact, Language

from .sequences import Answer, Chat, Encoder, Link, Part, Sequence, Told, Turn
from .tasks import ANSWERS, PUZZLES, Teller, intro

SIZES = (256, 512, 1056, 4128)
SHORT = 512
GEN_LENGTHS = (16, 32, 64, 64, 128)
NUMBERS = ("number_0", "number_1", "number_2")
# heads with known sources for their attention rows; each kind of copying has its own, so that no kind drowns another
SOURCES = ("copies", "digits", "steps", "late")
HEADS = ("names", "sets", "keys", "chains", *SOURCES, *NUMBERS)
KINDS = ("problems", "documents", *dict.fromkeys(kind for kind, _ in PUZZLES))
ONE_SHOT = {"problems", "documents"}  # a trained model knows the answers of these kinds at once
PROBLEMS = 0.25  # share of the batches
DOCUMENTS = 0.35  # share of the other sequences that asks for facts
IGNORE = -1
POOL = 4000
ROWS = 128  # most attention rows that are supervised per sequence and head
ANSWER_ROWS = 88  # how many of them are the answers' rows
ROOM = 16  # tokens left for a text's last sentence: at most
ENDING = 3  # and at least
INTRO = 24  # tokens of a text's first line, at most


class Builder:
    """Draws training sequences of one family."""

    def __init__(self, language: Language, tokenizer: Tokenizer, family: str, seed: str):
        self.rng = random.Random(seed)
        self.language, self.encode = language, Encoder(tokenizer)
        self.chat = Chat(family, self.encode)
        self.teller = Teller(self.rng, self.encode)
        self.pool = [self.encode.sentence(language.filler_sentence(self.rng)[:-1]) for _ in range(POOL)]

    def document(self, length: int, questions: int, gen_length: int | None, density: float) -> Sequence:
        """Exactly `length` ids: a document, then `questions` turns, or one padded to gen_length if that is given.

        Args:
            density: share of distractor facts in the text.
        """
        persons = iter(self.language.persons(self.rng, held_out=False))
        drawn = (self._asked(next(persons)) for _ in range(questions if gen_length is None else 1))
        told = self._fitting(drawn, length)
        sequence, budget = self._begin("documents", told, length, gen_length)
        room = self._room(told, budget)
        others = self._others(persons, told, int(density * room / 12))
        facts = [part for one in told + others for part in one.sentences]
        sentences = self._filled(facts[: len(facts) - len(others)], facts[len(facts) - len(others) :], room)
        self.rng.shuffle(sentences)
        told_facts = {id(part) for part in facts}
        filler = [index for index, part in enumerate(sentences) if id(part) not in told_facts]
        if filler and self.rng.random() < 0.5:  # as in the presets: their paragraphs start with filler
            for part in facts:
                part.opening = None
            sentences[0], sentences[filler[0]] = sentences[filler[0]], sentences[0]
        return self._end(sequence, sentences, budget, told, [link for one in others for link in one.links], gen_length)

    def puzzle(self, kind: str, hay: str, length: int, gen_length: int | None) -> Sequence:
        """Exactly `length` ids: a task of the evaluation, with several questions, or one padded to gen_length if given.

        Args:
            kind, hay: one of `PUZZLES`.
        """
        rng = self.rng
        told = [self.teller.told(kind)] if gen_length is not None else self._fitting(self.teller.several(kind), length)
        sequence, budget = self._begin(kind, told, length, gen_length)
        room = self._room(told, budget)
        links: list[Link] = []
        if hay == "needles":
            straw, links = self.teller.needle_hay(room, told)
        elif hay == "noise":
            straw = self.teller.noise_hay(room)
        else:
            persons = self.language.persons(rng, held_out=False)
            facts = [part for one in self._others(persons, [], int(0.4 * room / 12)) for part in one.sentences]
            straw = self._filled([], facts, room)
            rng.shuffle(straw)
        sentences, _ = scatter(rng, straw, self.teller.interleave(told), in_order=True)
        return self._end(sequence, sentences, budget, told, links, gen_length)

    def problems(self, length: int, gen_length: int | None) -> Sequence:
        """Word problems, one per turn, as many as fit into `length` ids, then padding; one if gen_length is given."""
        sequence, turns, links = Sequence(self.chat), [], []
        used = len(sequence.ids)
        while True:
            text, answer, _ = self.language.problem(self.rng, held_out=False)
            turn = Turn("problems", Part(self.encode.pieces(text)), Part(self.encode.pieces(answer), predicted=True))
            used += len(turn.question.ids) + len(turn.answer.ids) + self.chat.frame(2) - self.chat.frame(1)
            if turns and (gen_length is not None or used > length):
                break
            turns.append(turn)
            # the padding's rows too, so that all rows of a block look at the same place
            rows = len(turn.answer.ids) + 1 if gen_length is None else length - used
            numbers = [index for index, token in enumerate(turn.question.ids) if token in self.teller.digits]
            for head, number in zip(NUMBERS, numbers, strict=False):
                links += [(head, turn.answer, row, turn.question, number) for row in range(rows)]
        sequence.converse(turns, gen_length)
        sequence.ids += [self.chat.eos] * (length - len(sequence.ids))
        if gen_length is not None:
            first = sequence.answers[0]
            sequence.answers[0] = Answer(first.kind, first.start, first.end, length, ())
        sequence.link([link for link in links if link[1].start + link[2] < length])
        return sequence

    def _asked(self, person: tuple[str, str]) -> Told:
        """A fact and a question about it."""
        rng, words = self.rng, self.language
        fact = words.fact(rng, person, rng.choice(list(words.kinds)))
        told, slots, links = self._told(fact)
        kind = words.kinds[fact.kind]
        answer, _, places = self.encode.fill(kind["answer"], fact)
        answer = Part(answer, predicted=True)
        ids, name, _ = self.encode.fill("Question: " + rng.choice(kind["questions"]), fact)
        question = Part(ids)
        links += [("names", answer, row, question, name) for row in range(len(answer.ids))]
        links += [("copies", answer, place, told, slot) for place, slot in zip(places, slots, strict=True)]
        return Told([told], Turn("documents", question, answer, places), links, about=(person, fact.kind))

    def _told(self, fact: Fact) -> tuple[Part, list[int], list[Link]]:
        """A fact's sentence, the places of its values in it, and their links to the name."""
        template = self.rng.choice(self.language.kinds[fact.kind]["facts"])[:-1]
        ids, name, slots = self.encode.fill(" " + template, fact)
        part = Part(ids, opening=self.encode.fill(template, fact)[0])
        return part, slots, [("names", part, slot, part, name) for slot in slots]

    def _others(self, persons, told: list[Told], count: int) -> list[Told]:
        """Distractor facts; a quarter are a second fact about a person already mentioned."""
        rng, kinds, others = self.rng, list(self.language.kinds), []
        once = [one.about for one in told]
        for _ in range(count):
            if once and rng.random() < 0.25:
                person, known = once.pop(rng.randrange(len(once)))
                kind = rng.choice([kind for kind in kinds if kind != known])
            else:
                person, kind = next(persons), rng.choice(kinds)
                once.append((person, kind))
            part, _, links = self._told(self.language.fact(rng, person, kind))
            others.append(Told([part], None, links))
        return others

    def _begin(self, kind: str, told: list[Told], length: int, gen_length: int | None) -> tuple[Sequence, int]:
        """A sequence up to its text, and how many tokens the text takes if the whole is `length` tokens long."""
        sequence, chat = Sequence(self.chat), self.chat
        sequence.ids += self.encode(intro(kind))
        tail = sum(len(one.turn.question.ids) for one in told)
        if gen_length is not None:
            tail += len(chat.asked) + gen_length
        else:
            tail += sum(len(one.turn.answer.ids) for one in told) + chat.frame(len(told))
        return sequence, length - len(sequence.ids) - tail

    def _fitting(self, drawn: Iterable[Told], length: int) -> list[Told]:
        """The first drawn item, and as many more as leave a part of `length` tokens for other sentences."""
        each = self.chat.frame(2) - self.chat.frame(1)
        room, told = int(0.9 * length) - len(self.chat.start) - INTRO, []
        for one in drawn:
            room -= one.size + each
            if told and room < 0:
                break
            told.append(one)
        return told

    def _room(self, told: list[Told], budget: int) -> int:
        """Tokens left for other sentences."""
        return budget - ENDING - sum(len(part.ids) + 1 for one in told for part in one.sentences)

    def _filled(self, sentences: list[Part], others: list[Part], room: int) -> list[Part]:
        """The sentences, as many of the others as there is room for, and filler."""
        sentences = list(sentences)
        for part in others:
            if room <= ROOM:
                break
            sentences.append(part)
            room -= len(part.ids) + 1
        while room > ROOM:
            sentences.append(self.rng.choice(self.pool))
            room -= len(sentences[-1].ids) + 1
        return sentences

    def _end(
        self,
        sequence: Sequence,
        sentences: list[Part],
        budget: int,
        told: list[Told],
        links: list[Link],
        gen_length: int | None,
    ) -> Sequence:
        """The text, the turns, and the links between the told sentences."""
        sequence.lay_out(sentences, budget)
        sequence.converse([one.turn for one in told], gen_length)
        sequence.link([*links, *(link for one in told for link in one.links)])
        return sequence

    def batch(self, sequences: list[Sequence]) -> dict[str, np.ndarray]:
        """Arrays of a batch.

        ids [B, T], answers masked. For each of the n masked tokens: rows [n] (flat position of its logit row), targets
        [n], weights [n] in the loss, kinds [n] (index in `KINDS`), groups [n] (tokens of one answer, which must be
        right together, share a number above 0; 0 if the token does not count).
        Attention rows with their sources: links [heads, B, ROWS, 2], heads as in `HEADS`.
        """
        clean = np.array([sequence.ids for sequence in sequences], dtype=np.int64)
        noisy = clean.copy()
        tokens = []
        group = 0
        blind = [set() for _ in sequences]
        for row, sequence in enumerate(sequences):
            for answer in sequence.answers:
                group += 1
                masked, counted = self._masked(answer)
                noisy[row, masked] = self.chat.mask
                pairs = zip(answer.slots, answer.slots[1:], strict=False)
                blind[row] |= {slot - self.chat.shift for before, slot in pairs if before in masked}
                for place in masked:
                    weight = self._weight(answer, place, place in counted, clean[row, place])
                    counts = group if place in counted else 0
                    flat = row * clean.shape[1] + place - self.chat.shift
                    tokens.append((flat, clean[row, place], weight, KINDS.index(answer.kind), counts))
        rows, targets, weights, kinds, groups = (np.array(column) for column in zip(*tokens, strict=True))
        batch = {"ids": noisy, "rows": rows, "targets": targets, "kinds": kinds, "groups": groups}
        batch["weights"] = weights.astype(np.float32)
        batch["links"] = np.stack(
            [[self._pairs(*one, head) for one in zip(sequences, blind, strict=True)] for head in HEADS]
        )
        return batch

    def _weight(self, answer: Answer, place: int, counted: bool, token: int) -> float:
        """Weights in the loss: more for word problems' numbers, less for padding and what can hardly be known yet."""
        if place >= answer.end:
            return 0.05
        if answer.kind == "problems":
            return 3.0 if token in self.teller.digits else 1.0
        return 1.0 if counted or answer.kind in ONE_SHOT or place not in answer.slots else 0.5

    def _masked(self, answer: Answer) -> tuple[list[int], set[int]]:
        """Masked places of an answer and its padding, and those that count for its accuracy.

        Often all are masked, as in decoding. Answers that are found one token after another are also often revealed up
        to some token, and this token counts.
        """
        rng, start, end, padded = self.rng, answer.start, answer.end, answer.padded
        places = range(start, padded)
        alone = answer.kind in ONE_SHOT
        chance = rng.random()
        if chance < (0.4 if alone else 0.2):
            return list(places), set(range(start, end)) if alone else set()
        fixed = {place for place in places if place not in answer.slots}
        shown = fixed if not alone and rng.random() < 0.5 else set()
        if not alone and chance < 0.65:
            cut = rng.choice(answer.slots)
            masked, counted = [place for place in places if place >= cut and place not in shown], {cut}
        else:
            ratio = rng.random()
            masked, counted = [place for place in places if rng.random() < ratio and place not in shown], set()
        if padded - start > 32 and rng.random() < 0.3:
            # blockwise decoding: everything after the first block is still masked
            later = range(start + 32, padded)
            masked = [place for place in masked if place < later[0]] + list(later)
            counted = {place for place in counted if place <= later[0]}
        return masked or [start], counted

    def _pairs(self, sequence: Sequence, blind: set[int], head: str) -> np.ndarray:
        """ROWS pairs [ROWS, 2], those of the answers first, IGNORE in the second column where there is none.

        Args:
            blind: rows with the answer's token before them masked; then a thing's source cannot be known.
        """
        first = sequence.answers[0].start - self.chat.shift
        pairs = sequence.pairs[head]
        if head == "steps":
            pairs = [pair for pair in pairs if pair[0] not in blind]
        answers, others = [pair for pair in pairs if pair[0] >= first], [pair for pair in pairs if pair[0] < first]
        kept = answers if len(answers) <= ANSWER_ROWS else self.rng.sample(answers, ANSWER_ROWS)
        kept = kept + self.rng.sample(others, min(ROWS - len(kept), len(others)))
        return np.array(kept + [(0, IGNORE)] * (ROWS - len(kept)), dtype=np.int64)


def batches(builder: Builder, length, tokens: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of about `tokens` ids without end; `length()` is the curriculum's present length of texts.

    While texts are `SHORT`, batches are half as large, because then the number of steps counts.

    Some are word problems; the others hold documents and tasks side by side, of one length, a quarter of the present
    one or less. Three in five hold several questions, the others one question with the answer padded to a whole
    generation length, as in an evaluation.
    """
    rng = builder.rng
    puzzles, shares = list(PUZZLES), list(PUZZLES.values())
    while True:
        longest = length()
        budget = tokens if longest > SHORT else tokens // 2
        gen_length = None if rng.random() < 0.6 else rng.choice(GEN_LENGTHS)
        if rng.random() < PROBLEMS:
            size = 256 if gen_length is None else 96 + gen_length
            count = max(1, min(budget // size, 128))
            yield builder.batch([builder.problems(size, gen_length) for _ in range(count)])
            continue
        size = rng.choice([size for size in SIZES if size < longest] or [longest])
        size = longest if rng.random() < 0.7 else size
        size += rng.choice((0, 0, 16, -16))
        if gen_length is not None and size < 600:
            size += gen_length - 16
        sequences = []
        for _ in range(max(1, budget // size)):
            if rng.random() < DOCUMENTS:
                density = rng.uniform(0.15, 0.6) if size > 300 else 0.9
                sequences.append(builder.document(size, 8, gen_length, density))
                continue
            kind, hay = rng.choices(puzzles, shares)[0]
            while gen_length is not None and ANSWERS[kind] > gen_length:
                kind, hay = rng.choices(puzzles, shares)[0]
            sequences.append(builder.puzzle(kind, hay, size, gen_length))
        yield builder.batch(sequences)
