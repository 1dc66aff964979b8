"""Training sequences under construction: parts with known ids, the chat around them, and which token attends where."""

import re
from collections import defaultdict
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from sparsed.prompts import PARAGRAPH, Fact

# a text's pieces before the BPE, `QWEN2_PIECES` for texts in ASCII without apostrophes
PIECES = re.compile(
    r"[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(eq=False)
class Part:
    """Some ids of a sequence: a sentence without its full stop, a question, an answer.

    Attributes:
        opening: the ids at the start of a paragraph; None if it never stands there.
        predicted: whether the model writes it; its attention rows are then those that predict its tokens.
        start: where it stands in the sequence; None before that is known.
    """

    ids: list[int]
    opening: list[int] | None = None
    predicted: bool = False
    start: int | None = None


# (head, part and index of the row, part and index of the token that this row attends to)
Link = tuple[str, Part, int, Part, int]


@dataclass(eq=False)
class Turn:
    """A question and its answer; `slots` are the indices of the answer's tokens that are not always the same."""

    kind: str
    question: Part
    answer: Part
    slots: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Told:
    """Sentences in an order to be kept, and a question.

    Attributes:
        turn: the question about them, if any.
        links: which token attends to which.
        names: names that nothing else in the text may have.
        about: a fact's person and kind.
    """

    sentences: list[Part]
    turn: Turn | None
    links: list[Link] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    about: tuple[tuple[str, str], str] | None = None

    @property
    def size(self) -> int:
        """Tokens that it takes, without the chat around the turn."""
        return sum(len(part.ids) + 1 for part in self.sentences) + len(self.turn.question.ids + self.turn.answer.ids)


@dataclass(frozen=True)
class Answer:
    """An answer's places: its start, its end with the end token, the end of its padding, its slots."""

    kind: str
    start: int
    end: int
    padded: int
    slots: tuple[int, ...]


class Encoder:
    """Ids of texts, remembered: BPE never joins across the borders of pieces, so ids of pieces can be concatenated."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that comes often."""
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.known[text]

    def pieces(self, text: str) -> list[int]:
        """Ids of any text in ASCII, from those of its pieces."""
        ids = []
        for piece in PIECES.findall(text):
            ids += self(piece)
        return ids

    def sentence(self, text: str) -> Part:
        """A sentence that may stand anywhere, given without its full stop."""
        return Part(self.pieces(" " + text), opening=self.pieces(text))

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
    """The chat template's pieces of one family; `shift` is 1 if row t predicts token t + 1 (Dream), otherwise 0."""

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
        self.shift = int(family == "dream")
        self.eos = encode.tokenizer.token_to_id("<|endoftext|>")
        self.mask = encode.tokenizer.token_to_id("<|mask|>" if family == "dream" else "<|mdm_mask|>")
        self.full_stop, self.paragraph = encode("."), encode(".\n\n")
        self.stretch = encode(" And"), encode(" and")

    def frame(self, turns: int) -> int:
        """Tokens around this many questions and answers, without padding."""
        return turns * (len(self.asked) + len(self.end) + len(self.next)) - len(self.next)


class Sequence:
    """Ids under construction, with what training needs to know about them."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.ids: list[int] = list(chat.start)
        self.pairs: dict[str, list[tuple[int, int]]] = defaultdict(list)  # head: attention rows with their sources
        self.answers: list[Answer] = []

    def lay_out(self, sentences: list[Part], budget: int, paragraph: int = PARAGRAPH) -> None:
        """A text of exactly `budget` ids, its last sentence stretched as `sparsed.prompts` does."""
        ids, chat = self.ids, self.chat
        end = len(ids) + budget
        for index, sentence in enumerate(sentences):
            opens = sentence.opening is not None and index % paragraph == 0
            if index:
                ids += chat.paragraph if opens else chat.full_stop
            ids += sentence.opening if opens else sentence.ids
            sentence.start = len(ids) - len(sentence.ids)  # an opening differs only in its first word
        first, more = chat.stretch
        ids += chat.full_stop + first
        ids += more * (end - len(ids) - 1) + chat.paragraph

    def converse(self, turns: list[Turn], gen_length: int | None) -> None:
        """The questions and answers, or the only one with its answer padded to `gen_length`."""
        ids, chat = self.ids, self.chat
        for index, turn in enumerate(turns):
            if index:
                ids += chat.next
            turn.question.start = len(ids)
            ids += turn.question.ids + chat.asked
            turn.answer.start = start = len(ids)
            ids += turn.answer.ids + chat.end
            end = len(ids)
            if gen_length is not None:
                ids += [chat.eos] * (start + gen_length - end)
            self.answers.append(Answer(turn.kind, start, end, len(ids), tuple(start + slot for slot in turn.slots)))

    def link(self, links: list[Link]) -> None:
        """Remember the links; links of left-out parts are dropped."""
        for head, part, row, source, index in links:
            if part.start is None:
                continue
            shift = self.chat.shift if part.predicted else 0
            self.pairs[head].append((part.start + row - shift, source.start + index))
