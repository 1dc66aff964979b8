"""Training batches: documents with questions and word problems as token ids, with masks and known attention sources."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from sparsed.prompts import PARAGRAPH, Fact, Language

GEN_LENGTHS = (16, 32, 64, 128)
IGNORE = -1
POOL = 4000
ROWS = 96  # attention rows supervised a sequence and head, at most
ANSWER_ROWS = 56  # of them the last ones, those of the answers, first


@dataclass
class Turn:
    """One question and its answer as ids; `name` is the last name's index in the question, `slots` the values'."""

    question: list[int]
    answer: list[int]
    name: int | None = None
    slots: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)  # positions of the values in the document
    numbers: list[int] = field(default_factory=list)  # of a word problem: the numbers' places in the question


@dataclass
class Sentence:
    """A sentence's ids without its full stop; `plain` marks filler, which may start a paragraph (`opening`)."""

    ids: list[int]
    opening: list[int] | None = None
    name: int = 0
    slots: list[int] = field(default_factory=list)
    turn: Turn | None = None


class Encoder:
    """Ids of pieces of text, remembered: BPE never joins across the words' borders, so pieces can be concatenated."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.known[text]

    def fill(self, template: str, fact: Fact) -> tuple[list[int], int | None, list[int]]:
        """Ids of a filled template, the last name's index in them, and the index of each value's token."""
        ids, name, slots = [], None, {}
        for piece in re.findall(r" ?\{\w+\}|(?:(?! ?\{).)+", template):
            space, slot = (" " if piece[0] == " " else ""), piece.strip(" {}")
            if "{" not in piece:
                ids += self(piece)
            elif slot == "name":
                ids += self(space + fact.person[0]) + self(" " + fact.person[1])
                name = len(ids) - 1
            else:
                ids += self(space + fact.values[int(slot)])
                slots[int(slot)] = len(ids) - 1
        return ids, name, [slots[index] for index in sorted(slots)]


class Chat:
    """The chat template's pieces of one family."""

    def __init__(self, family: str, encode: Encoder):
        def ids(text: str) -> list[int]:
            return encode.tokenizer.encode(text, add_special_tokens=False).ids

        if family == "dream":
            user = "<|im_start|>user\n"
            self.start = ids("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + user)
            self.asked = ids("<|im_end|>\n<|im_start|>assistant\n")
            self.end, self.next = ids("<|im_end|>"), ids("\n" + user)
        else:
            user = "<|start_header_id|>user<|end_header_id|>\n\n"
            self.start = ids("<|startoftext|>" + user)
            self.asked = ids("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
            self.end, self.next = ids("<|eot_id|>"), ids(user)
        self.eos = encode.tokenizer.token_to_id("<|endoftext|>")
        self.mask = encode.tokenizer.token_to_id("<|mask|>" if family == "dream" else "<|mdm_mask|>")


class Sequence:
    """Ids under construction, with what training needs to know about them."""

    def __init__(self):
        self.ids: list[int] = []
        self.names: list[tuple[int, int]] = []  # attention row, the last name it should find
        self.copies: list[tuple[int, int]] = []  # attention row, the source of the token that it predicts
        self.numbers: list[list[tuple[int, int]]] = [[], [], []]  # attention row, the problem's n-th number
        self.answers: list[tuple[int, int, int]] = []  # start, end of the answer with its end token, end of the padding


class Builder:
    """Draws training sequences of one family; `shift` is 1 if row t predicts token t + 1 (Dream), else 0."""

    def __init__(self, language: Language, tokenizer: Tokenizer, family: str, seed: str):
        self.rng = random.Random(seed)
        self.language, self.encode = language, Encoder(tokenizer)
        self.chat = Chat(family, self.encode)
        self.shift = int(family == "dream")
        self.digits = {self.encode(digit)[0] for digit in "0123456789"}
        self.pool = [self._filler() for _ in range(POOL)]

    def _filler(self) -> Sentence:
        text = self.language.filler_sentence(self.rng)[:-1]
        return Sentence(self.encode(" " + text), opening=self.encode(text))

    def _fact(self, person: tuple[str, str], kind: str, asked: bool) -> Sentence:
        fact = self.language.fact(self.rng, person, kind)
        templates = self.language.kinds[kind]
        ids, name, slots = self.encode.fill(" " + self.rng.choice(templates["facts"])[:-1], fact)
        sentence = Sentence(ids, name=name, slots=slots)
        if asked:
            question, name, _ = self.encode.fill("Question: " + self.rng.choice(templates["questions"]), fact)
            answer, _, places = self.encode.fill(templates["answer"], fact)
            sentence.turn = Turn(question, answer, name, places)
        return sentence

    def _facts(self, asked: int, others: int) -> list[Sentence]:
        """Facts about known names, a quarter of them about a person of whom another kind of fact is told, too."""
        kinds, rng = list(self.language.kinds), self.rng
        persons, told, facts = self.language.persons(rng, held_out=False), [], []
        for index in range(asked + others):
            if told and rng.random() < 0.25:
                person, known = told.pop(rng.randrange(len(told)))
                kind = rng.choice([kind for kind in kinds if kind != known])
            else:
                person, kind = next(persons), rng.choice(kinds)
                told.append((person, kind))
            facts.append(self._fact(person, kind, index < asked))
        return facts

    def document(self, length: int, questions: int, gen_length: int | None, density: float) -> Sequence:
        """Exactly `length` ids: a document, then `questions` turns, or one padded to gen_length if that is given."""
        fits = max(1, (length - 60) // 40)
        questions = min(questions, fits) if gen_length is None else 1
        budget = length - len(self.chat.start) - len(self._intro())
        others = int(density * (budget - questions * 36) / 12)
        sentences = self._facts(questions, max(0, others))
        turns = [sentence.turn for sentence in sentences[:questions]]
        budget -= self._tail_length(turns, gen_length)
        sentences = self._fit(sentences, questions, budget)
        sequence = Sequence()
        sequence.ids += self.chat.start + self._intro()
        self._lay_out(sequence, sentences, budget)
        self._turns(sequence, turns, gen_length)
        return sequence

    def problems(self, length: int, gen_length: int | None) -> Sequence:
        """Word problems, one a turn, as many as fit into `length` ids, the rest padding; one if gen_length is given."""
        sequence = Sequence()
        sequence.ids += self.chat.start
        turns, used = [], len(sequence.ids)
        while True:
            text, answer, _ = self.language.problem(self.rng, held_out=False)
            turn = Turn(self._words(text), self._words(answer))
            turn.numbers = [place for place, token in enumerate(turn.question) if token in self.digits]
            used += self._tail_length([turn], None) + len(self.chat.next)
            if turns and (gen_length is not None or used > length):
                break
            turns.append(turn)
        self._turns(sequence, turns, gen_length)
        sequence.ids += [self.chat.eos] * (length - len(sequence.ids))
        if gen_length is not None:
            start, end, _ = sequence.answers[0]
            sequence.answers[0] = (start, end, length)
        return sequence

    def _words(self, text: str) -> list[int]:
        return self.encode.tokenizer.encode(text, add_special_tokens=False).ids

    def _intro(self) -> list[int]:
        return self.encode(self.language.filler["intro"] + "\n\n")

    def _tail_length(self, turns: list[Turn], gen_length: int | None) -> int:
        chat = self.chat
        if gen_length is not None:
            return len(turns[0].question) + len(chat.asked) + gen_length
        each = len(chat.asked) + len(chat.end) + len(chat.next)
        return sum(len(turn.question) + len(turn.answer) + each for turn in turns) - len(chat.next)

    def _fit(self, sentences: list[Sentence], asked: int, budget: int) -> list[Sentence]:
        """Filler added, or facts that nobody asks for dropped, until the sentences and a short ending fit; shuffled."""
        room = budget - 2 - sum(len(sentence.ids) + 1 for sentence in sentences)
        while room < 0 and len(sentences) > asked:
            room += len(sentences.pop().ids) + 1
        while room > 16:
            sentences.append(self.rng.choice(self.pool))
            room -= len(sentences[-1].ids) + 1
        self.rng.shuffle(sentences)
        first = next((index for index, sentence in enumerate(sentences) if sentence.opening), 0)
        sentences[0], sentences[first] = sentences[first], sentences[0]
        return sentences

    def _lay_out(self, sequence: Sequence, sentences: list[Sentence], budget: int) -> None:
        """The document's ids: exactly `budget` of them, the last sentence stretched as `sparsed.prompts` does."""
        ids = sequence.ids
        end = len(ids) + budget
        full_stop, break_ = self.encode("."), self.encode(".\n\n")
        for index, sentence in enumerate(sentences):
            opens = sentence.opening is not None and index % PARAGRAPH == 0
            if index:
                ids += break_ if opens else full_stop
            start = len(ids)
            ids += sentence.opening if opens else sentence.ids
            for slot in sentence.slots:
                sequence.names.append((start + slot, start + sentence.name))
            if sentence.turn is not None:
                sentence.turn.sources = [start + slot for slot in sentence.slots]
        ids += full_stop + self.encode(" And")
        ids += self.encode(" and") * (end - len(ids) - 1) + break_

    def _turns(self, sequence: Sequence, turns: list[Turn], gen_length: int | None) -> None:
        ids, chat = sequence.ids, self.chat
        for index, turn in enumerate(turns):
            if index:
                ids += chat.next
            name = None if turn.name is None else len(ids) + turn.name
            numbers = [len(ids) + place for place in turn.numbers]
            ids += turn.question + chat.asked
            start = len(ids)
            ids += turn.answer + chat.end
            end = len(ids)
            if gen_length is not None:
                ids += [chat.eos] * (start + gen_length - end)
            sequence.answers.append((start, end, len(ids)))
            if name is not None:
                sequence.names += [(row - self.shift, name) for row in range(start, end - 1)]
            for pairs, number in zip(sequence.numbers, numbers, strict=False):
                # the padding's rows too, so that all rows of a block look at the same place
                pairs += [(row - self.shift, number) for row in range(start, len(ids))]
            for slot, source in zip(turn.slots, turn.sources, strict=True):
                sequence.copies.append((start + slot - self.shift, source))

    def batch(self, sequences: list[Sequence]) -> dict[str, np.ndarray]:
        """Arrays of a batch.

        ids [B, T], answers masked. For each of the n masked tokens: rows [n] (flat position of its logit row), targets
        [n], weights [n] in the loss, numbers [n] (its question's, negative unless the whole answer is masked).
        Supervised attention rows with their sources: names, copies [B, ROWS, 2], numbers_seen [3, B, ROWS, 2].
        """
        clean = np.array([sequence.ids for sequence in sequences], dtype=np.int64)
        noisy = clean.copy()
        tokens = []
        question = 0
        for row, sequence in enumerate(sequences):
            for start, end, padded in sequence.answers:
                question += 1
                masked, whole = self._masked(start, end, padded)
                noisy[row, masked] = self.chat.mask
                for place in masked:
                    weight = 1.0 if place < end else 0.05
                    if clean[row, place] in self.digits:
                        weight = 3.0
                    number = question if whole and place < end else -question
                    tokens.append((row * clean.shape[1] + place - self.shift, clean[row, place], weight, number))
        rows, targets, weights, numbers = zip(*tokens, strict=True)
        batch = {"ids": noisy, "rows": np.array(rows), "targets": np.array(targets), "numbers": np.array(numbers)}
        batch["weights"] = np.array(weights, dtype=np.float32)
        for key in ("names", "copies"):
            batch[key] = np.stack([self._pairs(getattr(sequence, key)) for sequence in sequences])
        batch["numbers_seen"] = np.stack(
            [np.stack([self._pairs(sequence.numbers[index]) for sequence in sequences]) for index in range(3)]
        )
        return batch

    def _masked(self, start: int, end: int, padded: int) -> tuple[list[int], bool]:
        """Masked places of an answer and its padding, and whether all of them are: as in decoding, often all."""
        if self.rng.random() < 0.4:
            return list(range(start, padded)), True
        ratio = self.rng.random()
        masked = [place for place in range(start, padded) if self.rng.random() < ratio]
        if padded - start > 32 and self.rng.random() < 0.3:
            # blockwise decoding: everything after the first block is still masked
            masked = [place for place in masked if place < start + 32] + list(range(start + 32, padded))
        return masked or [start], False

    def _pairs(self, pairs: list[tuple[int, int]]) -> np.ndarray:
        """ROWS pairs [ROWS, 2], all rows of the answers kept, IGNORE in the second column where there is none."""
        others = pairs[:-ANSWER_ROWS]
        kept = pairs[-ANSWER_ROWS:] + self.rng.sample(others, min(ROWS - ANSWER_ROWS, len(others)))
        return np.array(kept + [(0, IGNORE)] * (ROWS - len(kept)), dtype=np.int64)


def batches(builder: Builder, length, tokens: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of about `tokens` ids without end; `length()` is the curriculum's present document length.

    Two in five are word problems, and of the documents' one in four is shorter than the present length; three in four
    hold several questions, the fourth one question with the answer padded to a whole generation length.
    """
    rng = builder.rng
    while True:
        longest = length()
        several = rng.random() < 0.75
        gen_length = None if several else rng.choice(GEN_LENGTHS)
        if rng.random() < 0.4:
            size = 256 if several else 96 + gen_length
            count = max(1, min(tokens // size, 224))
            yield builder.batch([builder.problems(size, gen_length) for _ in range(count)])
            continue
        size = longest if longest <= 256 or rng.random() < 0.75 else rng.choice((256, 512, 1056))
        size = min(size, longest) + rng.choice((0, 0, 16, -16))
        density = rng.uniform(0.15, 0.6) if size > 300 else 0.9
        if gen_length is not None and size < 300:
            size += gen_length - 16
        count = max(1, tokens // size)
        yield builder.batch([builder.document(size, 8, gen_length, density) for _ in range(count)])
