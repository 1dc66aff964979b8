"""The files that the flags name: checked early, read with a limit, written whole or not at all."""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .readers import shown

# bytes, far more than a record or a file of tasks has
LARGEST_FILE = 2**28


def output_path(parser: argparse.ArgumentParser, option: str, name: str | None) -> Path | None:
    """The real path of a file to write, if it can be written; a link is followed, so that it stays one."""
    if name is None:
        return None
    if not name.strip():
        parser.error(f"argument {option}: the file name must not be empty")
    try:
        path = Path(os.path.realpath(Path(name).expanduser()))
        if not path.parent.is_dir():
            parser.error(f"argument {option}: there is no folder {path.parent}")
        if name.startswith("/dev/") or (path.exists() and not path.is_file()):
            parser.error(f"argument {option}: {shown(name)} is not an ordinary file")
        temporary_beside(path).touch()
        temporary_beside(path).unlink()
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(f"argument {option}: cannot write {shown(name)}: {getattr(error, 'strerror', None) or error}")
    return path


def check_apart(
    parser: argparse.ArgumentParser, option: str, output: Path | None, other: str, name: str | Path | None
) -> None:
    """Refuse to write over the file that another option names."""
    if output is None or name is None:
        return
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a prompt that cannot be read is refused as such
        path = Path(name).expanduser()
        if output == path or output.samefile(path):
            parser.error(f"argument {option}: {shown(str(name))} is the file of {other}")


def text_of(name: str, *, encoding: str = "utf-8", most: int = LARGEST_FILE, streams: tuple[str, ...] = ()) -> str:
    """The text of a file that the user named; `encoding` is UTF-8 with or without a byte order mark, the rest as for
    `bytes_of`."""
    try:
        return bytes_of(name, most=most, streams=streams).decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(name)} is not UTF-8 text (see byte {error.start})") from None


def bytes_of(name: str, *, most: int = LARGEST_FILE, streams: tuple[str, ...] = ()) -> bytes:
    """The content of an ordinary file that the user named.

    Args:
        most: bytes that it may have.
        streams: names with these beginnings are read although they are no ordinary files.

    Raises:
        ValueError: it cannot be read; one line says why.
    """
    try:
        path = Path(name).expanduser()
        ordinary = path.is_file() or not path.exists() or name.startswith(streams)
        content = b""
        if ordinary:
            with path.open("rb") as file:
                content = file.read(most + 1)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot read {shown(name)}: {getattr(error, 'strerror', None) or error}") from None
    if not ordinary:
        raise ValueError(f"{shown(name)} is not an ordinary file")
    if len(content) > most:
        raise ValueError(f"{shown(name)} has more than {most} bytes")
    return content


def temporary_beside(path: Path) -> Path:
    """Where this process writes a file before it gets its name, on the same disk."""
    return path.with_name(f".sparsed-{os.getpid()}.tmp")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write the record, as `write_text` does."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises OSError where the folder cannot be written to."""
    with replacing(path) as temporary:
        # a file name that is not UTF-8 holds lone surrogates; with a backslash they are JSON's own escapes
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file so that it is there whole or not at all: it gets its name at the end."""
    temporary = temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
