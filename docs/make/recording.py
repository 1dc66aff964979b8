"""Make assets/denoising.svg: `--show` in motion, from a real run of the LLaDA demo checkpoint.

pip install -e ".[show]"
python -m docs.make.recording
"""

import io
import json
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from xml.sax.saxutils import escape

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment

from sparsed.console.files import write_text
from sparsed.report.record import RunRecord, read
from sparsed.report.summary import LABELS, attention
from sparsed.report.view import Token, View, drawn

ROOT = Path(__file__).parents[2]
FILE = ROOT / "assets" / "denoising.svg"
RUN = "llada_generation.py --demo --show --prompt 4k --seq_len 32 --steps 32"
FASTER, PAUSE = 3, 4.0  # how many times as fast as the run, and seconds of standstill at the end
COLUMNS, LINES = 80, 4
CELL, LINE, MARGIN = 8, 20, 16  # pixels
COLOURS = {"green": "#8ccf7e", "yellow": "#e5c76b", "red": "#e57474", "cyan": "#6cbfe0"}
INK, DIM, PAPER, RIM = "#dfe3e8", "#858d99", "#15181e", "#3a414c"

Line = list[Segment]


def frames(run: RunRecord) -> list[list[Line]]:
    """What the terminal shows before the first step of a recorded run and after each, as lines of styled text."""
    console = Console(file=io.StringIO(), width=COLUMNS, height=LINES, force_terminal=True, _environ={})
    return [console.render_lines(drawn(view, console), pad=False) for view in views(run)]


def views(run: RunRecord) -> list[View]:
    """The run's moments, by its history."""
    tokens: list[Token | None] = [None] * len(run.token_ids)
    newest: set[int] = set()
    kinds, steps = attention(run.forwards), len(run.forwards)
    found = []
    for done, seconds in enumerate(accumulate((forward.seconds for forward in run.forwards), initial=0.0)):
        commits = run.history[done - 1] if done else []
        for position, _, probability in commits:
            piece = run.pieces[position] if position < run.answer_tokens else None
            tokens[position] = Token(piece, probability or 0.0)
        newest = {position for position, _, _ in commits} or newest
        title, step = LABELS[run.mode], min(done + 1, steps)
        found.append(View(title, kinds[step - 1].value, step, steps, seconds, list(tokens), newest))
    return found


def animation(shown: list[list[Line]], seconds: list[float]) -> str:
    """An SVG that shows each frame for its seconds, in a loop; with prefers-reduced-motion, only the last one.

    The frames stand one below the other, and the strip jumps up behind a window of one frame's height.
    """
    width, height = COLUMNS * CELL + 2 * MARGIN, LINES * LINE
    tall = height + 2 * LINE + MARGIN
    whole, begins = sum(seconds), list(accumulate(seconds, initial=0.0))[:-1]
    jumps = [
        f"{100 * begin / whole:.3f}% {{ transform: translateY({-number * height}px) }}"
        for number, begin in enumerate(begins)
    ]
    strip = "\n".join(_frame(lines, number * height) for number, lines in enumerate(shown))
    still = f"transform: translateY({-(len(shown) - 1) * height}px)"
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" role="img">
<title>An answer of 32 masked tokens is filled in step by step</title>
<style>
text {{ font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }}
.strip {{ animation: jumps {whole:.2f}s step-end infinite }}
@keyframes jumps {{ {" ".join(jumps)} }}
@media (prefers-reduced-motion: reduce) {{ .strip {{ animation: none; {still} }} }}
</style>
<rect x="0.5" y="0.5" width="{width - 1}" height="{tall - 1}" rx="8" fill="{PAPER}" stroke="{RIM}"/>
{_text(f"$ python {RUN}", MARGIN, MARGIN + LINE / 2, INK)}
<svg x="{MARGIN}" y="{2 * LINE}" width="{COLUMNS * CELL}" height="{height}">
<g class="strip">
{strip}
</g>
</svg>
</svg>
"""


def _frame(lines: list[Line], top: int) -> str:
    parts = []
    for number, line in enumerate(lines):
        x, y = 0, top + number * LINE
        for text, style, _ in line:
            ink = DIM if style and style.dim else COLOURS.get(style.color.name, INK) if style and style.color else INK
            if style and style.reverse:
                parts.append(f'<rect x="{x}" y="{y}" width="{CELL * cell_len(text)}" height="{LINE}" fill="{ink}"/>')
                ink = PAPER
            if text.strip():
                parts.append(_text(text, x, y + LINE * 0.7, ink, bool(style and style.bold)))
            x += CELL * cell_len(text)
    return "\n".join(parts)


def _text(text: str, x: float, y: float, ink: str, bold: bool = False) -> str:
    """Text that takes as many cells as on a terminal, whichever font is there."""
    weight = ' font-weight="bold"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" textLength="{CELL * cell_len(text)}" lengthAdjust="spacingAndGlyphs"'
    return f'<text {place} fill="{ink}"{weight}>{escape(text)}</text>'


def main() -> None:
    """Run the demo, and write what it showed."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "run.json")
        subprocess.run([sys.executable, *RUN.split(), "--json", record], cwd=ROOT, check=True)
        (run,) = read(json.loads(record.read_text(encoding="utf-8"))).runs
    seconds = [forward.seconds / FASTER for forward in run.forwards]
    write_text(FILE, animation(frames(run), [*seconds, PAUSE]))


if __name__ == "__main__":
    main()
