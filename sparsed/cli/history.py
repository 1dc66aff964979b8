"""How an answer came about, for the record: which token was committed in which step, and what each looks like."""

import math
from typing import Any

from ..chat import REPLACEMENT, decode
from ..sampling.common import Step


def history(steps: list[Step], token_ids: list[int], prompt_tokens: int) -> list[list[list]]:
    """The commits [position, token id, confidence] of every step, every position of the generated region once.

    A model may draw the mask token itself, and the position then stays open: its last commit counts. One that nobody
    ever filled goes to the last step. The confidence has 4 digits, and is None where there is none.

    Args:
        steps: of a run of one row, or of the first row.
        token_ids: the generated region at the end.
        prompt_tokens: tokens before it.
    """
    latest = {position: (len(steps) - 1, token, math.nan) for position, token in enumerate(token_ids)}
    for step in steps:
        for flat, token, probability in step.commits():
            latest[flat - prompt_tokens] = (step.index, token, probability)
    entries: list[list[list]] = [[] for _ in steps]
    for position, (index, token, probability) in latest.items():
        entries[index].append([position, token, round(probability, 4) if math.isfinite(probability) else None])
    return entries


class Speller:
    """The texts of an answer's tokens one by one, special tokens included."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def pieces(self, token_ids: list[int]) -> list[str]:
        """One text for each token; joined, they are the text of all.

        Where the bytes of a character are spread over tokens, it stands at the last of them.
        """
        pieces: list[str] = []
        pending: list[int] = []  # since the last whole character
        said, held = 0, ""  # how much of their text is in the pieces, and the rest of it
        for token in token_ids:
            if held and self._text([token])[:1] not in ("", REPLACEMENT):  # the character before has broken off
                pieces[-1] += held
                pending, said = [], 0
            pending.append(token)
            text = self._text(pending)
            whole = text.removesuffix(REPLACEMENT)  # which the next token may turn into a character
            pieces.append(whole[said:])
            said, held = len(whole), text[len(whole) :]
            if not held:
                pending, said = [], 0
        if held:
            pieces[-1] += held
        return pieces

    def _text(self, token_ids: list[int]) -> str:
        if len(token_ids) > 1:
            return decode(self._tokenizer, token_ids, special=True)
        (token,) = token_ids
        if token not in self._alone:
            self._alone[token] = decode(self._tokenizer, token_ids, special=True)
        return self._alone[token]
