"""The two scripts' own files: a prompt of the user's, and a checkpoint that no output may overwrite."""

import argparse
import io
import os
from pathlib import Path

from ..console.files import check_apart, text_of
from ..models.loading import MODEL_FILES
from ..models.tokenizer import TOKENIZER_FILES

# far beyond any model's context; an endless file is not read to its end
LONGEST_PROMPT = 2**24
# names of streams that are open already, a shell's <(...) among them; to open another pipe could wait for ever
OPEN_STREAMS = ("/dev/stdin", "/dev/fd/")


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
