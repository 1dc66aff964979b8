"""The files that the flags name: where the record and the page go, and a prompt of the user's own."""

import argparse
import contextlib
import io
import os
from pathlib import Path

from .readers import shown
from .record import temporary_beside

# far beyond any model's context; an endless file is not read to its end
LONGEST_PROMPT = 2**24
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


def check_apart(parser: argparse.ArgumentParser, option: str, output: Path | None, other: str, name: object) -> None:
    """Refuse to write over the file that another option names."""
    if output is None or name is None:
        return
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a prompt that cannot be read is refused as such
        path = Path(name).expanduser()
        if output == path or output.samefile(path):
            parser.error(f"argument {option}: {shown(str(name))} is the file of {other}")


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
        path = Path(name).expanduser()
        if path.exists() and not path.is_file() and not name.startswith(OPEN_STREAMS):
            parser.error(f"argument --prompt_file: {shown(name)} is not an ordinary file")
        with path.open("rb") as file:
            content = file.read(LONGEST_PROMPT + 1)
        if len(content) > LONGEST_PROMPT:
            parser.error(f"argument --prompt_file: {shown(name)} has more than {LONGEST_PROMPT} bytes")
        return io.StringIO(content.decode("utf-8-sig"), newline=None).read()
    except UnicodeDecodeError as error:
        parser.error(f"argument --prompt_file: {shown(name)} is not UTF-8 text (see byte {error.start})")
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(f"argument --prompt_file: cannot read {shown(name)}: {getattr(error, 'strerror', None) or error}")
