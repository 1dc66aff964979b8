"""`python -m sparsed.report`: a page from a record that `--json` wrote, perhaps on another machine."""

import json
import sys
from typing import Any

from ..console.endings import blame, guarded
from ..console.files import check_apart, output_path, text_of, write_text
from ..console.parser import Parser
from ..console.readers import non_empty, shown
from .page import page

PROGRAM = "python -m sparsed.report"


def main(argv: list[str] | None = None) -> int:
    """Make the page with these words (None: the process's own); returns the exit code."""
    return guarded(lambda: _make(argv), PROGRAM, advice="the record is too large", ending=argv is None)


def _make(argv: list[str] | None) -> None:
    parser = Parser(
        prog=PROGRAM,
        description="Make one self-contained HTML page from the record of a run, which dream_generation.py and "
        "llada_generation.py write with --json; with --report they make the page themselves.",
        epilog=f"example:\n  {PROGRAM} run.json -o run.html",
    )
    parser.add_argument("record", type=non_empty, metavar="RECORD", help="the JSON file")
    parser.add_argument("-o", "--out", metavar="FILE", required=True, help="the HTML file to write")
    args = parser.parse_args(argv)
    args.parser = parser
    args.out = output_path(parser, "--out", args.out)
    check_apart(parser, "--out", args.out, "RECORD", args.record)
    with blame(args, "RECORD"):
        text = page(_read(args.record))
    with blame(args, "--out"):
        write_text(args.out, text)


def _read(name: str) -> Any:
    """The JSON value in a file; a ValueError says in one line why there is none."""
    text = text_of(name)
    try:
        return json.loads(text, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(name)} is not JSON: {error}") from None


def _not_a_number(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


if __name__ == "__main__":
    sys.exit(main())
