"""A chat as token ids in the checkpoint's template, a prompt without one, and where the answer ends."""

import functools
import json
import re
import threading
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import jinja2

# what a template sees in the place of each turn's text
PLACEHOLDER = "placeholder{}of0the0text"
# far above any chat template, which is a program that comes with the checkpoint: seconds that it may run, and
# characters that it may put around the messages
TEMPLATE_SECONDS, TEMPLATE_CHARACTERS = 10.0, 1 << 20
CHAT_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>")
# what a decoder writes for bytes that are not a character, or not yet
REPLACEMENT = "\ufffd"
ROLES = ("system", "user", "assistant")

# a message of a chat: its "role", one of ROLES, and its "content"
Turn = dict[str, str]


class ChatTemplateError(ValueError):
    """The checkpoint's chat template cannot render a user message, or its tokenizer cannot encode it."""


class TurnsError(ValueError):
    """The chat template renders a user message, but not with the turns that stand before it."""


def check_text(text: str, name: str) -> None:
    """Raise ValueError, which calls the text `name`, if it is blank or cannot be encoded."""
    if not text.strip():
        raise ValueError(f"{name} is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} is not valid UTF-8 text")


def turns_of(text: str) -> tuple[list[Turn], str]:
    """The earlier turns and the user's last message of a chat in JSON: a list of {"role": ..., "content": ...}.

    Raises:
        ValueError: in one line, what is wrong, and in which turn.
    """
    try:
        turns = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError):  # a number of too many digits, lists too deep in each other
        turns = None
    if not isinstance(turns, list) or not turns:
        raise ValueError('not a chat, which is a JSON list of {"role": ..., "content": ...}, at least one')
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
            raise ValueError(f'turn {number} must be an object with "role" and "content", and nothing else')
        if turn["role"] not in ROLES:
            raise ValueError(f'the "role" of turn {number} must be one of {", ".join(ROLES)}')
        if not isinstance(turn["content"], str):
            raise ValueError(f'the "content" of turn {number} must be a string')
        check_text(turn["content"], f"turn {number}")
    *earlier, last = turns
    if last["role"] != "user":
        raise ValueError(f"turn {len(turns)}, the last one, must be the user's, which is to be answered")
    return earlier, last["content"]


def encode_chat(tokenizer: Any, text: str, earlier: Sequence[Turn] = ()) -> list[int]:
    """Ids of a user message in the tokenizer's chat template, ready for the answer; plain ids without a template.

    Control tokens come only from the template: one that was typed in a turn, such as '<|mask|>', is ordinary text.

    Args:
        earlier: the turns before the message, such as a system turn.

    Raises:
        ChatTemplateError: the template or the tokenizer fails, or gives no tokens for a text that is not blank.
        TurnsError: the template does not take the earlier turns, or there is none.
    """
    between, messages = _render_chat(tokenizer, [*earlier, {"role": "user", "content": text}])
    control = _control_tokens(tokenizer)
    ids: list[int] = []
    typed = ""  # since the template's last control token; encoded in one, because tokens may join across its borders
    for index, part in enumerate(between):
        if found := [match.span() for match in control.finditer(part)]:
            start = found[0][0] if index else 0
            stop = found[-1][1] if index < len(messages) else len(part)
            ids += _encode_typed(tokenizer, typed + part[:start], control)
            ids += _encode(tokenizer, [part[start:stop]], split_special_tokens=False)
            typed = part[stop:]
        else:
            typed += part
        typed += "".join(messages[index : index + 1])
    ids += _encode_typed(tokenizer, typed, control)
    return _some(ids, text)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that is not a prompt: a control token written out in it is ordinary text, and none is added.

    Raises:
        ChatTemplateError: the tokenizer fails.
    """
    return _encode_typed(tokenizer, text, _control_tokens(tokenizer))


def encode_raw(tokenizer: Any, text: str) -> list[int]:
    """Ids of a prompt as it is, for base models: control tokens that are written out in it are such.

    The tokenizer adds what it always adds, as the models' authors call it; for Dream's and LLaDA's that is nothing.

    Raises:
        ChatTemplateError: the tokenizer fails, or gives no tokens for a text that is not blank.
    """
    return _some(_encode(tokenizer, [text], add_special_tokens=True), text)


def _some(ids: list[int], text: str) -> list[int]:
    if text.strip() and not ids:
        raise ChatTemplateError("the tokenizer gives no tokens for the prompt")
    return ids


def stop_ids(config: Any, tokenizer: Any) -> set[int]:
    """The ids at which an answer ends: what the model's config or the tokenizer calls EOS or pad, the first being what
    config.json and generation_config.json name, and the ends of a chat turn that the tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary[token] for token in CHAT_ENDS if token in vocabulary}
    named = {config.eos_token_id, config.pad_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    # configs of other packages name one id of a kind
    return (ends | named | {*getattr(config, "end_token_ids", ())}) - {None}


def answer_length(token_ids: list[int], stops: set[int], mask_id: int | None = None) -> int:
    """How many tokens stand before the first stop id; none if all of them are masks that nothing has filled."""
    length = next((position for position, token in enumerate(token_ids) if token in stops), len(token_ids))
    return length if any(token != mask_id for token in token_ids[:length]) else 0


def decode(tokenizer: Any, token_ids: list[int], *, special: bool = False) -> str:
    """The text of some ids, with or without special tokens; ids that the tokenizer lacks are skipped."""
    known = len(tokenizer)
    return tokenizer.decode([token for token in token_ids if token < known], skip_special_tokens=not special)


class Speller:
    """The texts of an answer's tokens one by one, special tokens included."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._alone = functools.cache(lambda token: decode(tokenizer, [token], special=True))

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
        return self._alone(*token_ids) if len(token_ids) == 1 else decode(self._tokenizer, token_ids, special=True)


def _render_chat(tokenizer: Any, turns: list[Turn]) -> tuple[list[str], list[str]]:
    """The template's texts before, between and after the messages, and the messages."""
    try:
        return _render(tokenizer, turns)
    except ChatTemplateError as error:
        if len(turns) == 1:
            raise
        _render(tokenizer, turns[-1:])  # a template that never works is at fault itself
        raise TurnsError(f"{error}; without turns before the user's message it works") from None


def _render(tokenizer: Any, turns: list[Turn]) -> tuple[list[str], list[str]]:
    if not getattr(tokenizer, "chat_template", None):
        if len(turns) > 1:
            raise ChatTemplateError("the tokenizer has no chat template")
        return ["", ""], [turns[0]["content"]]
    if _computes_powers(str(tokenizer.chat_template)):
        raise ChatTemplateError("the tokenizer's chat template computes powers (**), which nothing could interrupt")
    chat, messages = [], [turn["content"].strip() for turn in turns]
    for index, (turn, message) in enumerate(zip(turns, messages, strict=True)):
        # the template sees a message's outer spaces, because some templates trim them
        lead, _, trail = turn["content"].partition(message) if message else (turn["content"], "", "")
        chat.append({"role": turn["role"], "content": lead + PLACEHOLDER.format(index) + trail})
    rendered = _in_time(lambda: tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    if len(rendered) > TEMPLATE_CHARACTERS:
        raise ChatTemplateError(f"the tokenizer's chat template writes {len(rendered)} characters around the message")
    pieces = re.split(PLACEHOLDER.format(r"(\d+)"), rendered)
    between, places = pieces[::2], pieces[1::2]
    for index, turn in enumerate(turns):
        if (count := places.count(str(index))) != 1:
            fault = "repeats" if count else "leaves out"
            raise ChatTemplateError(f"the tokenizer's chat template {fault} the {turn['role']}'s message")
    if places != sorted(places, key=int):
        raise ChatTemplateError("the tokenizer's chat template puts the turns into another order")
    return between, messages


@functools.lru_cache(maxsize=8)  # a prompt of an exact length is encoded dozens of times
def _computes_powers(template: str) -> bool:
    """Whether ** stands in a template: one such operation can take for ever, while no other thread runs."""
    try:
        words = jinja2.Environment().lex(template)
        return any((kind, word) == ("operator", "**") for _, kind, word in words)
    except jinja2.TemplateError:  # rendering says what is wrong
        return False


def _in_time(render: Callable[[], str]) -> str:
    """What a template renders, in a thread of its own, which is abandoned if it takes too long."""
    done: list[str | Exception] = []

    def work() -> None:
        try:
            done.append(render())
        except Exception as error:  # a template is a small program, which may raise anything
            done.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if not done:
        raise ChatTemplateError(f"the tokenizer's chat template takes more than {TEMPLATE_SECONDS:g} seconds")
    if isinstance(done[0], Exception):
        raise ChatTemplateError(f"the tokenizer's chat template fails: {_reason(done[0])}") from None
    return done[0]


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Finds any of them, the longest first, so that no token hides a longer one."""
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _encode_typed(tokenizer: Any, text: str, control: re.Pattern[str]) -> list[int]:
    """Ids of ordinary text, in which nothing is a control token."""
    # cut inside the tokens in it, because the library splits only those that the checkpoint calls special
    cuts = [match.start() + 1 for match in re.finditer(f"(?={control.pattern})", text)]
    pieces = [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]
    return _encode(tokenizer, pieces, split_special_tokens=True)


def _encode(tokenizer: Any, pieces: list[str], add_special_tokens: bool = False, **how: bool) -> list[int]:
    try:
        encoded = tokenizer(pieces, add_special_tokens=add_special_tokens, **how)["input_ids"]
        return list(chain.from_iterable(encoded))
    except BaseException as error:
        # what the tokenizers library calls a panic is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ChatTemplateError(f"the tokenizer cannot encode the prompt: {_reason(error)}") from None
