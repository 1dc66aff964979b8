"""A user message as token ids in the checkpoint's chat template, and where the answer to it ends."""

import functools
import re
import threading
from collections.abc import Callable
from itertools import chain, pairwise
from typing import Any

import jinja2

PLACEHOLDER = "placeholder0of0the0user0text"
# far above any chat template, which is a program that comes with the checkpoint: seconds that it may run, and
# characters that it may put around the message
TEMPLATE_SECONDS, TEMPLATE_CHARACTERS = 10.0, 1 << 20
CHAT_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>")
# what a decoder writes for bytes that are no character, or not yet
REPLACEMENT = "\ufffd"


class ChatTemplateError(ValueError):
    """The checkpoint's chat template cannot render a user message, or its tokenizer cannot encode it."""


def encode_chat(tokenizer: Any, text: str) -> list[int]:
    """Ids of one user message in the tokenizer's chat template, ready for the answer; plain ids without a template.

    Control tokens come from the template alone: one that the user typed, such as '<|mask|>', is ordinary text.

    Raises:
        ChatTemplateError: the template or the tokenizer fails, or gives no tokens for a text that is not blank.
    """
    before, message, after = _render(tokenizer, text)
    control = re.compile("|".join(re.escape(token) for token in _control_tokens(tokenizer)) or r"(?!)")
    # ordinary text touching the message is encoded with it, for tokens may join across the border
    head = max((match.end() for match in control.finditer(before)), default=0)
    match = control.search(after)
    tail = match.start() if match else len(after)
    typed = before[head:] + message + after[:tail]
    # cut inside of the tokens in it, for the library splits only those that the checkpoint calls special
    cuts = [match.start() + 1 for match in re.finditer(f"(?={control.pattern})", typed)]
    ids = [
        *_encode(tokenizer, [before[:head]], control=True),
        *_encode(tokenizer, [typed[start:stop] for start, stop in pairwise([0, *cuts, len(typed)])], control=False),
        *_encode(tokenizer, [after[tail:]], control=True),
    ]
    if message.strip() and not ids:
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


def answer_length(token_ids: list[int], stops: set[int]) -> int:
    """How many tokens stand before the first stop id."""
    return next((position for position, token in enumerate(token_ids) if token in stops), len(token_ids))


def decode(tokenizer: Any, token_ids: list[int], *, special: bool = False) -> str:
    """The text of some ids, with or without special tokens; ids that the tokenizer lacks are skipped."""
    known = len(tokenizer)
    return tokenizer.decode([token for token in token_ids if token < known], skip_special_tokens=not special)


def _render(tokenizer: Any, text: str) -> tuple[str, str, str]:
    """The template's text before the message, the message, and the template's text after it."""
    if not getattr(tokenizer, "chat_template", None):
        return "", text, ""
    if _computes_powers(str(tokenizer.chat_template)):
        raise ChatTemplateError("the tokenizer's chat template computes powers (**), which nothing could interrupt")
    message = text.strip()
    # the template sees the message's outer spaces, for some trim them
    lead, _, trail = text.partition(message) if message else (text, "", "")
    chat = [{"role": "user", "content": lead + PLACEHOLDER + trail}]
    rendered = _in_time(lambda: tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    if len(rendered) > TEMPLATE_CHARACTERS:
        raise ChatTemplateError(f"the tokenizer's chat template writes {len(rendered)} characters around the message")
    before, *after = rendered.split(PLACEHOLDER)
    if len(after) != 1:
        fault = "repeats the user's message" if after else "leaves the user's message out"
        raise ChatTemplateError(f"the tokenizer's chat template {fault}")
    return before, message, after[0]


@functools.lru_cache(maxsize=8)  # a prompt of an exact length is encoded dozens of times
def _computes_powers(template: str) -> bool:
    """Whether ** stands in a template: one such operation can take for ever, while no other thread runs."""
    try:
        words = jinja2.Environment().lex(template)
        return any((kind, word) == ("operator", "**") for _, kind, word in words)
    except jinja2.TemplateError:  # rendering says what is wrong
        return False


def _in_time(render: Callable[[], str]) -> str:
    """What a template renders, in a thread of its own, which is left alone where it takes too long."""
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


def _control_tokens(tokenizer: Any) -> list[str]:
    """Longest first, so that no token hides a longer one."""
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return sorted(filter(None, tokens), key=len, reverse=True)


def _encode(tokenizer: Any, pieces: list[str], *, control: bool) -> list[int]:
    try:
        encoded = tokenizer(pieces, add_special_tokens=False, split_special_tokens=not control)["input_ids"]
        return list(chain.from_iterable(encoded))
    except BaseException as error:
        # what the tokenizers library calls a panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ChatTemplateError(f"the tokenizer cannot encode the prompt: {_reason(error)}") from None
