"""Finding a checkpoint's files: a local folder in the hub's format, or a hub id downloaded into the hub's cache."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, tqdm

# bytes, far above the megabytes of a published tokenizer
LARGEST_TEXT = 2**26
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def checkpoint_folder(path: str | os.PathLike, patterns: list[str]) -> Path:
    """The local folder of a checkpoint; for a hub id, downloads the files that match `patterns` (nothing else).

    Raises:
        ValueError: neither a folder nor a hub id, or a hub id that cannot be downloaded and is not cached.
    """
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder
        is_file = folder.exists()
    except (OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is not a readable folder: {getattr(error, 'strerror', None) or error}") from None
    if is_file:
        raise ValueError(f"{path} is a file; a model is a folder with config.json, or a hub id")
    if not HUB_ID.fullmatch(str(path)):
        raise ValueError(f"{path}: no such folder, and not a hub id of the form owner/name")
    return _download(str(path), patterns)


def listing(path: str | os.PathLike) -> list[str]:
    """All file names of a checkpoint, downloaded or not; none if `path` is a hub id and the hub does not answer."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return sorted(file.name for file in folder.iterdir())
    try:
        return sorted(name for name in list_repo_files(str(path)) if "/" not in name)
    except Exception:  # as in _download; the list is only for advice
        return []


def check_size(file: Path) -> None:
    """Raise ValueError if a file of text is larger than any checkpoint's; OSError if there is none."""
    if (size := file.stat().st_size) > LARGEST_TEXT:
        raise ValueError(f"{file} has {size} bytes, more than the {LARGEST_TEXT} that are read")


def read_text(file: Path) -> str:
    """The text of an ordinary file in UTF-8; ValueError in one line if there is none that can be read."""
    try:
        if file.exists() and not file.is_file():
            raise ValueError(f"{file} is not an ordinary file")
        check_size(file)
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (see byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; ValueError in one line if the file is missing, unreadable or holds anything else."""
    text = read_text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, found a {type(content).__name__}")
    return content


def optional_json(file: Path) -> dict[str, Any]:
    """As `read_json`; an empty object if there is no such file."""
    return read_json(file) if file.exists() else {}


class _TerminalBar(tqdm):
    """The hub's progress bar, silent where stderr is no terminal."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"disable": None, **kwargs})


def _download(hub_id: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, tqdm_class=_TerminalBar))
    except GatedRepoError:
        terms = f"accept its terms on https://huggingface.co/{hub_id}"
        advice = f"access is restricted; {terms}, and log in to the hub: hf auth login"
    except RepositoryNotFoundError:
        advice = (
            "there is no such folder here and no such public model on the hub; check the spelling, "
            "and for a private model log in: hf auth login"
        )
    except Exception as error:  # network errors have no common base across the hub client's versions
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            advice = f"the disk of {HF_HUB_CACHE} is full; free some space, or set HF_HOME to another folder"
        else:
            reason = type(error.__cause__ or error).__name__
            way = "unset HF_HUB_OFFLINE" if HF_HUB_OFFLINE else "check the network"
            advice = f"no such folder here, and the download failed ({reason}); {way}, or pass a folder"
    raise ValueError(f"{hub_id}: {advice}")
