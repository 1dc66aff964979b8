"""What a run leaves behind: the decoded answer, the environment, and files written whole or not at all."""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

CHAT_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>")


def stop_ids(config: Any, tokenizer: Any) -> set[int]:
    """The ids at which an answer ends: the model's EOS and pad, and the ends of a chat turn that the tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary[token] for token in CHAT_ENDS if token in vocabulary}
    return ends | {config.eos_token_id, config.pad_token_id}


def answer_length(token_ids: list[int], stops: set[int]) -> int:
    """How many tokens stand before the first stop id."""
    return next((position for position, token in enumerate(token_ids) if token in stops), len(token_ids))


def decode(tokenizer: Any, token_ids: list[int], *, special: bool = False) -> str:
    """The text of some ids, with or without special tokens; ids that the tokenizer lacks are skipped."""
    known = len(tokenizer)
    return tokenizer.decode([token for token in token_ids if token < known], skip_special_tokens=not special)


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, device, number format and threads, for the record."""
    cuda = device.type == "cuda"
    return {
        "sparsed": _version(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "platform": platform.platform(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "device_name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor's name; Linux keeps it in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version() -> str | None:
    """The installed package's version, None in a checkout that is not installed."""
    try:
        return metadata.version("sparsed")
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file is in, -dirty if its files have changed since; None without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def temporary_beside(path: Path) -> Path:
    """Where this process writes a file before it gets its name, on the same disk."""
    return path.with_name(f".sparsed-{os.getpid()}.tmp")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write the record, whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    with replacing(path) as temporary:
        # a file name that is not UTF-8 holds lone surrogates; with a backslash they are JSON's own escapes
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file so that it is there whole or not at all: it gets its name at the end.

    Raises:
        OSError: the folder cannot be written to.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
