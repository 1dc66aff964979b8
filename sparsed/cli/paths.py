"""The files that the flags name: where the record and the page go, and a prompt of the user's own."""

import argparse
import contextlib
import io
import os
from pathlib import Path

from ..models.loading import MODEL_FILES
from ..models.tokenizer import TOKENIZER_FILES
from .readers import shown
from .record import temporary_beside

# far beyond any model's context; an endless file is not read to its end
LONGEST_PROMPT = 2**24
# bytes, far above a record or a file of tasks
LARGEST_FILE = 2**28
# names of streams that are open already, a shell's <(...) among them; to open another pipe could wait for ever
OPEN_STREAMS = ("/dev/stdin", "/dev/fd/")


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


def check_checkpoint_kept(
    parser: argparse.ArgumentParser, option: str, output: Path | None, source: str, checkpoint: str
) -> None:
    """Refuse to write over, or to add, a file that is read with the checkpoint folder that another option names."""
    folder = Path(os.path.realpath(Path(checkpoint).expanduser()))
    for pattern in (*MODEL_FILES, *TOKENIZER_FILES):
        for file in (folder / pattern, *folder.glob(pattern)):
            check_apart(parser, option, output, source, file)


def own_prompt(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str | None:
    """The text of --prompt_text or --prompt_file, or None for a preset."""
    text = args.prompt_text
    if args.prompt_file is not None:
        text = _read_prompt(parser, args.prompt_file)
    if text is None:
        return None
    if not text.strip():
        parser.error(f"argument {args.prompt_option}: the prompt is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        parser.error(f"argument {args.prompt_option}: the prompt is not valid UTF-8 text")
    return text


def _read_prompt(parser: argparse.ArgumentParser, name: str) -> str:
    """The file's text, with line ends as Python reads them."""
    try:
        text = text_of(name, encoding="utf-8-sig", most=LONGEST_PROMPT, streams=OPEN_STREAMS)
    except ValueError as error:
        parser.error(f"argument --prompt_file: {error}")
    return io.StringIO(text, newline=None).read()


def text_of(name: str, *, encoding: str = "utf-8", most: int = LARGEST_FILE, streams: tuple[str, ...] = ()) -> str:
    """The text of an ordinary file that the user named.

    Args:
        encoding: UTF-8, with a byte order mark or without.
        most, streams: as for `bytes_of`.

    Raises:
        ValueError: in one line, why there is none.
    """
    try:
        return bytes_of(name, most=most, streams=streams).decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(name)} is not UTF-8 text (see byte {error.start})") from None


def bytes_of(name: str, *, most: int = LARGEST_FILE, streams: tuple[str, ...] = ()) -> bytes:
    """The content of an ordinary file that the user named.

    Args:
        most: bytes that it may have.
        streams: what the names of other files that are read too begin with.

    Raises:
        ValueError: in one line, why there is none.
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
