"""Draw assets/composition.svg: which rows each kind of forward computes, which keys they read, and in which steps.

    python -m docs.make.composition

The blocks that are kept are made up; everything else is what the code does with six blocks of prompt and two of answer.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from sparsed.console.files import write_text
from sparsed.console.parser import Parser

from .svg import document

FILE = Path(__file__).parents[2] / "assets" / "composition.svg"
PROMPT, ANSWER = 6, 2  # blocks
BLOCKS = PROMPT + ANSWER
CELL, GAP, LEFT, TOP = 17, 34, 60, 44
SIDE = BLOCKS * CELL
# of the prompt's and the answer's query blocks: which key blocks they keep
KEPT = ((0, 3, 7), (1, 3, 7), (2, 0, 6), (3, 1, 6), (4, 3, 7), (5, 2, 7), (1, 4, 6), (3, 4, 7))
COLOURS = {"full": "#3b82c4", "selecting": "#8e5bb5", "sparse": "#d9822b", "cached": "#2f9e6e"}
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.small { font-size: 10.5px; fill: #57606a }
.bold { font-weight: 600 }
.none { fill: none; stroke: #9aa4af; stroke-width: .6 }
.line { stroke: #57606a; stroke-width: 1.2; stroke-dasharray: 3 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .small { fill: #9aa4af }
  .line { stroke: #9aa4af }
}
"""
PANELS: dict[str, tuple[str, str, Callable[[int, int], bool]]] = {
    "full": ("full", "every row reads every key", lambda row, key: True),
    "selecting": ("selecting", "full, and each head selects", lambda row, key: True),
    "sparse": ("sparse", "prompt rows read their blocks", lambda row, key: row >= PROMPT or key in KEPT[row]),
    "cached": ("cached", "a block's rows, all keys", lambda row, key: row == PROMPT),
}
# a letter for each step's forward: of 20 steps without a cache, and of as many with one, in blocks of 5 steps
TIMELINES = {
    "SparseD": ["full"] * 3 + ["selecting"] + ["sparse"] * 16,
    "cache": (["full"] + ["cached"] * 4) * 4,
    "both": ["selecting"] + ["cached"] * 4 + (["sparse"] + ["cached"] * 4) * 3,
}


def matrix(kind: str, left: int) -> Iterator[str]:
    """A panel: rows are the queries' blocks, columns the keys'."""
    title, about, reads = PANELS[kind]
    yield f'<text x="{left}" y="{TOP - 26}" class="bold">{title}</text>'
    yield f'<text x="{left}" y="{TOP - 10}" class="small">{about}</text>'
    for row in range(BLOCKS):
        for key in range(BLOCKS):
            place = f'x="{left + key * CELL + 1}" y="{TOP + row * CELL + 1}" width="{CELL - 2}" height="{CELL - 2}"'
            look = f'fill="{COLOURS[kind]}"' if reads(row, key) else 'class="none"'
            yield f'<rect {place} rx="2" {look}/>'
    border = PROMPT * CELL
    yield f'<path class="line" d="M{left + border} {TOP - 3}v{SIDE + 6}M{left - 3} {TOP + border}h{SIDE + 6}"/>'


def timeline(name: str, kinds: list[str], top: int) -> Iterator[str]:
    """A line of steps, each in its forward's colour; the lower the bar, the less is computed."""
    heights = {"full": 26, "selecting": 26, "sparse": 14, "cached": 4}
    yield f'<text x="{LEFT - 8}" y="{top + 22}" text-anchor="end" class="small">{name}</text>'
    wide = (4 * SIDE + 3 * GAP) / len(kinds)
    for step, kind in enumerate(kinds):
        tall = heights[kind]
        place = f'x="{LEFT + step * wide + 1:.1f}" y="{top + 28 - tall}" width="{wide - 2:.1f}" height="{tall}"'
        yield f'<rect {place} rx="1.5" fill="{COLOURS[kind]}"/>'


def picture() -> str:
    """The whole SVG."""
    parts = [f'<text x="{LEFT - 8}" y="{TOP + SIDE / 2}" text-anchor="end" class="small">queries</text>']
    for index, kind in enumerate(PANELS):
        parts += matrix(kind, LEFT + index * (SIDE + GAP))
    below = TOP + SIDE + 18
    keys = "keys: the prompt's, and right of the dashed line the answer's"
    parts.append(f'<text x="{LEFT}" y="{below}" class="small">{keys}</text>')
    top = below + 14
    for index, (name, kinds) in enumerate(TIMELINES.items()):
        parts += timeline(name, kinds, top + index * 40)
    end = top + 40 * len(TIMELINES)
    parts.append(f'<text x="{LEFT}" y="{end + 8}" class="small">steps, from left to right</text>')
    width, height = LEFT + 4 * SIDE + 3 * GAP + 12, end + 22
    title = "Which rows each kind of forward computes, which keys they read, and in which steps"
    return document(title, STYLE, parts, width, height)


def main(argv: list[str] | None = None) -> None:
    Parser(prog="python -m docs.make.composition", description=__doc__).parse_args(argv)
    write_text(FILE, picture())


if __name__ == "__main__":
    main()
