"""Loading a published tokenizer without remote code: tokenizer.json, or the vocab.json and merges.txt of Dream."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .files import check_size, checkpoint_folder, optional_json, read_text

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")
# the tokenizers library counts up to the largest
LARGEST_ID = 2**24
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# how Qwen2, and so Dream, cuts text into pieces before the byte-level BPE
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a Dream or LLaDA folder or hub id, with its special tokens and chat template.

    The class that tokenizer_config.json names is ignored, so no code of the checkpoint ever runs.

    Raises:
        ValueError: one line that names the missing or malformed file or the token whose id does not fit.
    """
    folder = checkpoint_folder(path, TOKENIZER_FILES)
    config = optional_json(folder / "tokenizer_config.json")
    names = _named_tokens(folder, config)
    backend = _backend(folder)
    added = _added_tokens(folder, config, names)
    backend.add_tokens([added[index] for index in sorted(added)])
    for index, token in sorted(added.items()):
        found = backend.token_to_id(token.content)
        if found != index:
            raise ValueError(f"{folder}: token {token.content!r} must have id {index}, the vocabulary gives it {found}")
    for name, content in names.items():
        if backend.token_to_id(content) is None:
            raise ValueError(f"{folder}: the {name} {content!r} is not in the vocabulary")
    if config.get("add_bos_token") is True and "bos_token" in names:
        _begin_with(backend, names["bos_token"])
    # model_max_length stays unset: it would only make the library warn about long prompts
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_chat_template(folder, config),
        padding_side="left",  # whatever the files say: generated tokens follow the prompt
        clean_up_tokenization_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
        **names,
    )


def _begin_with(backend: Tokenizer, bos: str) -> None:
    """Have plain text begin with this token, as `add_bos_token` says, unless it does so already."""
    index = backend.token_to_id(bos)
    if backend.encode("a").ids[:1] == [index]:
        return
    template = processors.TemplateProcessing(single=f"{bos}:0 $A:0", special_tokens=[(bos, index)])
    found = backend.post_processor
    backend.post_processor = template if found is None else processors.Sequence([found, template])


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary, whole or broken."""
    return any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))


def _backend(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _parse(Tokenizer.from_file, folder / "tokenizer.json")
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not vocab.is_file() or not merges.is_file():
        raise ValueError(f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt")
    backend = _parse(lambda *files: Tokenizer(BPE.from_file(*files)), vocab, merges)
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _parse(parser: Callable[..., Tokenizer], *files: Path) -> Tokenizer:
    for file in files:
        check_size(file)
    try:
        backend = parser(*map(str, files))
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = " ".join(str(error).split())
        raise ValueError(f"{files[0]} is not a tokenizer file the tokenizers library can read: {reason}") from None
    largest = max(backend.get_vocab().values(), default=0)
    if largest >= LARGEST_ID:
        raise ValueError(f"{files[0]}: the id {largest} is not below {LARGEST_ID}")
    return backend


def _named_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... -> text; tokenizer_config.json wins over special_tokens_map.json."""
    written = {**optional_json(folder / "special_tokens_map.json"), **config}
    names = {}
    for name in NAMED_TOKENS:
        # a token is a string, or an object with its text and flags
        token = written.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            names[name] = text
        elif token is not None:
            raise ValueError(f"{folder}: the {name} must be a string or an object with 'content', found {token!r}")
    return names


def _added_tokens(folder: Path, config: dict[str, Any], names: dict[str, str]) -> dict[int, AddedToken]:
    """Id -> token, from added_tokens.json (ids only) and added_tokens_decoder (ids and flags, which wins)."""
    added = {}
    try:
        for text, index in optional_json(folder / "added_tokens.json").items():
            special = text in names.values()
            added[int(index)] = AddedToken(text, special=special, normalized=not special)
        for index, written in config.get("added_tokens_decoder", {}).items():
            flags = {key: written[key] for key in TOKEN_FLAGS if key in written}
            added[int(index)] = AddedToken(written["content"], **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: added_tokens.json or added_tokens_decoder is malformed: {error}") from None
    return added


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template: a file of its own wins over the entry of tokenizer_config.json (a string or a named list)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else template
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder}: the chat_template of tokenizer_config.json must be a string or have a default")
    return template
