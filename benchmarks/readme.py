"""The tables and figures of README.md, docs/ and the demo's pages, filled in from the committed records.

    python -m benchmarks.readme

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; a number in a sentence is followed by `<!--=NAME-->`,
which no page shows. `readme_values` computes the values of the names; this writes them into the pages.
"""

import re
from pathlib import Path

from sparsed.console.files import write_text
from sparsed.console.parser import Parser

from .readme_values import figures, tables

ROOT = Path(__file__).parents[1]
DEMO = (ROOT / "demo/README.md", ROOT / "demo/real/README.md")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *DEMO)
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIGURE = re.compile(r"[+-]?\d+(?:[.,]\d+)*(<!--=(\S+)-->)")
MARK = re.compile(r"<!-- table: (\S+) -->|<!--=(\S+)-->")


def names(text: str) -> list[str]:
    """The tables and figures that a text has marks for."""
    return [table or figure for table, figure in MARK.findall(text)]


def filled(text: str) -> str:
    """The text with the records' values at its marks.

    Raises:
        ValueError: a mark has no number before it, or names nothing that the records give.
    """
    known_tables, known_figures = tables(), figures()
    if unknown := [name for name in names(text) if name not in known_tables and name not in known_figures]:
        raise ValueError(f"the records give no {unknown[0]}")
    text, n_tables = TABLE.subn(lambda found: found[1] + known_tables[found[2]] + "\n" + found[3], text)
    text, n_figures = FIGURE.subn(lambda found: known_figures[found[2]] + found[1], text)
    if n_tables + n_figures != len(names(text)):
        raise ValueError("a mark of a figure must follow a number, one of a table must have an end")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.readme", description=__doc__)
    parser.parse_args(argv)
    for page in PAGES:
        try:
            text = filled(page.read_text(encoding="utf-8"))
        except ValueError as error:
            parser.error(f"{page}: {error}")
        write_text(page, text)


if __name__ == "__main__":
    main()
