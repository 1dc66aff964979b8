"""The ids of a checkpoint's special tokens, gathered from its files: config.json may name few of them."""

from collections.abc import Collection
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from .common import LARGEST
from .files import optional_json
from .tokenizer import has_tokenizer, load_tokenizer

# what the published tokenizers write for a mask and for the end of a turn, without calling them so
MASKS = ("<|mask|>", "<|mdm_mask|>", "<[MASK]>")
END_OF_TURN = "<|eot_id|>"
MASK = "mask_token_id"
ENDS = ("eos_token_id", "eot_token_id", "pad_token_id")


def with_special_ids(values: dict[str, Any], folder: Path, names: Collection[str]) -> dict[str, Any]:
    """config.json's dict with one id for each special token: that of the first source that names one.

    The sources are config.json, generation_config.json and the tokenizer. All that the two files name as ends of an
    answer, lists included, stand in 'end_token_ids'; `chat.stop_ids` adds the tokenizer's.

    Args:
        values: config.json's dict.
        names: the ids that the model's config has; the mask's among them must be found, others are left out.

    Raises:
        ValueError: a value that is no id, an id outside the vocabulary, or no mask anywhere (the line names the file).
    """
    if "end_token_ids" in values:
        raise ValueError("config.json: 'end_token_ids' must not be there, it is gathered from the other ids")
    sources = {
        "config.json": values,
        "generation_config.json": optional_json(folder / "generation_config.json"),
    }
    named = {
        source: {name: _ids(source, name, content.get(name)) for name in (MASK, *ENDS)}
        for source, content in sources.items()
    }
    ends = {index for ids in named.values() for name in ENDS for index in ids[name]}
    wanted = [name for name in (MASK, *ENDS) if name in names]
    missing = [name for name in wanted if not any(ids[name] for ids in named.values())]
    if missing and has_tokenizer(folder):
        named["the tokenizer"] = _tokenizer_ids(folder)
    found = {**values, "end_token_ids": tuple(sorted(ends))}
    for name in wanted:
        found[name] = _first(name, named, values.get("vocab_size"))
    if found[MASK] is None:
        raise ValueError(
            f"neither config.json nor generation_config.json has a '{MASK}', and no tokenizer here names a mask token: "
            f"add the id to config.json as '{MASK}'"
        )
    return found


def _ids(source: str, name: str, value: Any) -> list[int]:
    """The ids that a file's value means: none, one, or of an end a list of them."""
    if value is None:
        return []
    ids = value if isinstance(value, list) and name != MASK else [value]
    if not ids or not all(type(index) is int and 0 <= index <= LARGEST for index in ids):
        wanted = f"a whole number from 0 to {LARGEST}" + (" or a list of them" if name != MASK else "")
        raise ValueError(f"{source}: '{name}' must be {wanted}, got {shown(value)}")
    return ids


def _tokenizer_ids(folder: Path) -> dict[str, list[int]]:
    tokenizer = load_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    masks = [tokenizer.mask_token_id, *(vocabulary.get(token) for token in MASKS)]
    found = {
        MASK: masks,
        "eos_token_id": [tokenizer.eos_token_id],
        "eot_token_id": [vocabulary.get(END_OF_TURN)],
        "pad_token_id": [tokenizer.pad_token_id],
    }
    return {name: [index for index in ids if index is not None] for name, ids in found.items()}


def _first(name: str, named: dict[str, dict[str, list[int]]], vocabulary: Any) -> int | None:
    """The first id of the first source that has one."""
    source, ids = next(((source, ids[name]) for source, ids in named.items() if ids[name]), ("", []))
    # of the ids in config.json the model's config says it
    if ids and source != "config.json" and isinstance(vocabulary, int) and ids[0] >= vocabulary:
        own = f"add the right '{name}' to config.json"
        raise ValueError(f"{source}: '{name}' {ids[0]} is outside the vocabulary of {vocabulary} ids; {own}")
    return ids[0] if ids else None
