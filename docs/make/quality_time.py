"""Draw assets/quality_time.svg: how far every way of generating is from full attention, against the time it takes.

    python -m docs.make.quality_time

Everything is read from committed records. A way that a record does not have is left out of that panel, and drawn as
soon as the record has it. The time is that of LLaDA's 8B shape with random weights: 256 new tokens after 64k. The
quality is that of a real model of 135 million parameters at 4,096 tokens.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.readme_generation import DUAL, FULL, ONCE, PREFIX, THEIRS, rows_of
from benchmarks.readme_generation import PAPER as DUAL_PAPER
from benchmarks.readme_generation import SPARSE as DUAL_DENSE
from benchmarks.readme_generation import UNCACHED_PAPER as PAPER
from benchmarks.readme_generation import UNCACHED_SPARSE as DENSE
from benchmarks.records import ROOT, Record, benchmarks_of, has, read
from sparsed import SparseDConfig
from sparsed.console.files import write_text
from sparsed.console.parser import Parser

from .svg import document

FILE = ROOT / "assets" / "quality_time.svg"
CACHES, TABLE, WRITTEN = (
    ROOT / f"demo/real/results/{name}/summary.json" for name in ("caches", "table-256", "written")
)
TOKENS, LENGTH, BLOCK = 256, 4096, 32
WINDOW, STREAMING = "window", "StreamingLLM"

# ------------------------------------------------------------------------------------------------------------ data

# rows of a way that are drawn small next to it: their label, and what is different; a bare number is a threshold, a
# whole one a refresh
VARIANTS: dict[str, Record] = {
    "2": {"refresh": 2},
    "4": {"refresh": 4},
    "0.9": {"threshold": 0.9},
    "0.7": {"threshold": 0.7},
    "factor 2": {"factor": 2.0},
    "64 steps": {"steps": 64},
    "32 steps": {"steps": 32},
}


@dataclass(frozen=True)
class Point:
    """A way of generating in a panel.

    Args:
        way: its name in the record of times.
        attention: full, paper (the paper's SparseD), dense (SparseD with dense answer rows) or window (also
            StreamingLLM).
        cache: none, prefix, dual or once (dual, with all rows computed once).
        loss: value, low, high, in nats per token.
        documents: that this is the mean of.
        variant: one of `VARIANTS`, or empty.
        elsewhere: whether the row is not of the summary that the panel is about, but of uncached ways by themselves.
    """

    way: str
    attention: str
    cache: str
    seconds: float
    loss: tuple[float, float, float]
    documents: int
    variant: str = ""
    elsewhere: bool = False


def ways() -> dict[str, Record]:
    """The ways whose forwards were timed after 64k tokens, and windows, whose forwards are sparse ones of SparseD's."""
    timed = copy.deepcopy(rows_of(benchmarks_of("generation"))["llada", "64k"])
    timed.pop(THEIRS, None)
    answer = forwards_of(timed[ONCE])["answer"]
    for way in timed.values():
        if way["saving"]:  # refresh 2 and 4 have some of them
            forwards_of(way).setdefault("answer", answer)
    return {**timed, **dict(windows(timed))}


def forwards_of(way: Record) -> Record:
    """The kinds of forwards of 256 steps: how many, and their seconds."""
    kinds: Record = way["steps"][str(TOKENS)]["forwards"]
    return kinds


def windows(timed: dict[str, Record]) -> Iterator[tuple[str, Record]]:
    """A window and StreamingLLM with as many blocks as the paper's rule keeps. They need no full step, and select at
    once."""
    config = {name: value for name, value in timed[PAPER]["config"].items() if name != "skip"}
    sparse = {**forwards_of(timed[PAPER])["sparse"], "count": TOKENS}
    steps = {"seconds": TOKENS * sparse["seconds"]["median"], "forwards": {"sparse": sparse}}
    for method, title in (("window", WINDOW), ("streaming", STREAMING)):
        yield title, {"method": method, "config": config, "saving": {}, "steps": {str(TOKENS): steps}}


def settings_of(way: Record) -> Record:
    """What the summaries know the way by."""
    method = way.get("method") or ("sparsed" if way["config"] else "origin")
    return {"method": method, **(way["config"] or {}), **way["saving"]}


def drawn_as(way: Record) -> tuple[str, str]:
    """Attention and cache, as `Point` has them."""
    config, saving = way["config"], way["saving"]
    attention = "full" if config is None else "dense" if config["dense_answer"] else "paper"
    attention = "window" if "method" in way else attention
    return attention, "once" if saving.get("refresh") == 0 else saving.get("cache", "none")


def variants(*changed: str) -> dict[str, Record]:
    """The variants that change nothing but one of these, and the way itself."""
    return {"": {}} | {name: change for name, change in VARIANTS.items() if set(change) <= set(changed)}


def row_of(summary: Record, settings: Record, **others: Any) -> Record | None:
    """The summary's row of these settings at 4,096 tokens; None if it has none."""
    dense = settings.get("dense_answer") or None  # False in the record of times
    wanted = {**settings, **others, "dense_answer": dense, "length": LENGTH}
    found = [row for row in summary["rows"] if has(row, wanted)]
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows have {wanted}")
    return found[0] if found else None


def counts(row: Record, config: Record | None, tokens: int, new_tokens: int = TOKENS) -> dict[str, float]:
    """Forwards by kind for 256 tokens, of a row that counts those for fewer.

    Twice the tokens are twice the blocks, and so twice the forwards. Two things do not double: SparseD selects once, at
    the end of the share that `skip` gives, and `refresh` 0 computes all rows once.
    """
    times = new_tokens / tokens
    kinds = {kind: count * times for kind, count in row["forwards"].items()}
    cached, answer = kinds.get("cached", 0.0), kinds.get("answer", 0.0)
    whole = sum(kinds.values()) - cached - answer
    if row["refresh"] == 0:
        whole, answer = 1.0, whole + answer - 1
    elif answer and tokens // BLOCK % row["refresh"]:
        raise ValueError(f"not known how often refresh {row['refresh']} computes all rows of {new_tokens} tokens")
    if config is None:
        shared = {"full": whole}
    elif "skip" not in config:
        shared = {"sparse": whole}
    else:
        full = SparseDConfig(**config).n_full(round(whole))
        shared = {"full": full - 1.0, "selecting": 1.0, "sparse": whole - full}
    return {kind: count for kind, count in {**shared, "answer": answer, "cached": cached}.items() if count}


def seconds(way: Record, forwards: dict[str, float]) -> float:
    """Those of the forwards, each as long as the median of its kind."""
    timed = forwards_of(way)
    return sum(count * timed[kind]["seconds"]["median"] for kind, count in forwards.items())


def refreshed(way: Record, refresh: int) -> float:
    """Seconds of 256 steps with a cache in which every `refresh`-th block computes all rows."""
    blocks = TOKENS // BLOCK
    forwards = {"full": blocks / refresh, "answer": blocks - blocks / refresh, "cached": TOKENS - blocks}
    return seconds(way, counts({"refresh": refresh, "forwards": forwards}, way["config"], TOKENS))


def forced() -> list[Point]:
    """The left panel: nats lost per masked token, half of a block masked; full attention is the zero."""
    points = []
    caches, table = read(CACHES), read(TABLE)
    for name, way in ways().items():
        settings = settings_of(way)
        changed = ("refresh",) if way["saving"] and "refresh" not in way["saving"] else ()
        for variant, change in variants(*changed).items():
            row = row_of(caches, settings, mask_rate=0.5, **change)
            other = None if row or change else row_of(table, settings, mask_rate=0.5)
            found = row or other
            if found:
                loss = tuple(found["difference"] or (0.0, 0.0, 0.0))
                time = refreshed(way, **change) if change else way["steps"][str(TOKENS)]["seconds"]
                elsewhere = other is not None
                points.append(Point(name, *drawn_as(way), time, loss, found["documents"], variant, elsewhere))
    return points


def written() -> list[Point]:
    """The right panel: by how many nats per token the written text is less likely than full attention's own."""
    points = []
    summary = read(WRITTEN)
    tokens = summary["settings"]["seq_len"]
    for name, way in ways().items():
        few = () if name == PREFIX else ("threshold", "factor", "steps")
        for variant, change in variants(*few).items():
            row = row_of(summary, settings_of(way), **{"steps": tokens, **change})
            if row:
                time = seconds(way, counts(row, way["config"], tokens))
                loss = tuple(row["difference"] or (0.0, 0.0, 0.0))
                points.append(Point(name, *drawn_as(way), time, loss, row["documents"], variant))
    return points


# --------------------------------------------------------------------------------------------------------- drawing

WIDE, TALL, TOP = 366, 420, 160  # of a panel's axes, and where they begin
LEFTS = (54, 478)
WIDTH, HEIGHT = LEFTS[1] + WIDE + 62, TOP + TALL + 148
LARGE, SMALL = 4.6, 2.0  # marks, from their middle
FIRST, LAST = 6.0, 1600.0  # seconds
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.small { font-size: 10.5px; font-weight: 400; fill: #57606a }
.bold { font-weight: 600 }
.axis { stroke: #9aa4af; fill: none }
.grid { stroke: #9aa4af; stroke-width: .5; opacity: .5; fill: none }
.full { stroke: #3b82c4; fill: #3b82c4 }
.dense { stroke: #d9822b; fill: #d9822b }
.paper { stroke: #d9822b; fill: none }
.window { stroke: #2f9e66; fill: none }
.mark { stroke-width: 1.8 }
.bar { stroke-width: 1.2; fill: none }
.path { stroke-width: 1; fill: none }
.beyond { stroke-dasharray: 3 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .small { fill: #9aa4af }
  .grid { opacity: .3 }
}
"""
BELOW = "below"  # the bar, in the place of a distance
Label = tuple[str, float, float | str, str]  # text, distance from the point in x and y, anchor; | parts two lines


@dataclass(frozen=True)
class Panel:
    """Axes for seconds and nats.

    Args:
        low: nats at the axis' lower end.
        high: and at the upper one; points that have more are drawn above it, in a band of their own.
        band: its height.
        ticks: nats with a line and a number.
        labels: of the points, by way and variant.
    """

    left: float
    title: str
    about: str
    low: float
    high: float
    band: float
    ticks: tuple[float, ...]
    labels: dict[tuple[str, str], Label]

    def x(self, time: float) -> float:
        """The place of a time in seconds; the axis is logarithmic."""
        return self.left + WIDE * math.log(time / FIRST) / math.log(LAST / FIRST)

    def y(self, loss: float) -> float:
        """The place of a loss in nats."""
        if loss > self.high:  # only in their order
            return TOP + self.band - (self.band - 10) * min(1, (loss - self.high) / 0.6)
        return TOP + self.band + (TALL - self.band) * (self.high - loss) / (self.high - self.low)


FORCED = Panel(
    left=LEFTS[0],
    title="Nats lost per masked token",
    about="to full attention, in a given text; lower is better",
    low=-0.01,
    high=0.2,
    band=56,
    ticks=(0, 0.05, 0.1, 0.15, 0.2),
    labels={
        (FULL, ""): ("full attention", 6, -12, "end"),
        (PAPER, ""): ("SparseD", -11, 4, "end"),
        (DENSE, ""): ("dense rows", -11, 4, "end"),
        (PREFIX, ""): ("prefix", 9, 12, "start"),
        (WINDOW, ""): ("window", -9, 4, "end"),
        (STREAMING, ""): ("StreamingLLM", -9, 4, "end"),
        (DUAL, ""): ("dual cache", 11, 4, "start"),
        (DUAL_PAPER, ""): ("dual cache + SparseD", 11, -3, "start"),
        (DUAL_DENSE, ""): ("dual cache + dense rows", 9, 19, "start"),
        (ONCE, ""): ("all rows|once", -24, BELOW, "start"),
    },
)
TEXTS = Panel(
    left=LEFTS[1],
    title="How unlikely full attention finds the written text",
    about="nats per token above its own text, by an upper bound; below 0: likelier",
    low=-0.22,
    high=0.33,
    band=40,
    ticks=(-0.1, 0, 0.1, 0.2, 0.3),
    labels={
        (FULL, ""): ("full|attention", 10, -18, "start"),
        (FULL, "0.9"): ("0.9", 7, 17, "start"),
        (FULL, "0.7"): ("0.7", 1, 21, "start"),
        (FULL, "32 steps"): ("32 steps", -8, 4, "end"),
        (DUAL, "32 steps"): ("32 steps", -8, 4, "end"),
        (PAPER, ""): ("SparseD", 2, BELOW, "start"),
        (DENSE, ""): ("dense rows", -11, 4, "end"),
        (PREFIX, ""): ("prefix", 9, -9, "start"),
        (DUAL, ""): ("dual cache", 11, 4, "start"),
        (DUAL, "0.7"): ("0.7", 7, 7, "start"),
        (DUAL_PAPER, ""): ("dual cache + SparseD", 0, BELOW, "middle"),
        (DUAL_DENSE, ""): ("dual cache +|dense rows", 0, BELOW, "middle"),
        (DUAL_DENSE, "0.7"): ("0.7", -7, 6, "end"),
        (DUAL_DENSE, "factor 2"): ("factor 2", -7, 0, "end"),
        (ONCE, ""): ("all rows once", -8, BELOW, "start"),
    },
)
PLAIN: Label = ("", 7, 4, "start")  # the variant's name, right of the point
LINES = (
    ("", "0.9", "0.7"),
    ("", "factor 2"),
    ("", "64 steps", "32 steps"),
    ("", "2", "4"),
)  # variants that a line joins
ATTENTION = {
    "full": "full attention",
    "paper": "SparseD, the paper's: select 0.3",
    "dense": "SparseD with dense answer rows: select 0.15",
    "window": "window or StreamingLLM: select 0.3",
}
CACHE = {
    "none": "no cache",
    "prefix": "prefix cache",
    "dual": "dual cache, all rows computed at each block's start",
    "once": "dual cache, all rows computed once",
}


def words(x: float, y: float, text: str, anchor: str = "start", small: bool = False, bold: bool = False) -> str:
    """A line of text."""
    looks = [f'x="{x:.1f}" y="{y:.1f}"']
    looks += [f'text-anchor="{anchor}"'] if anchor != "start" else []
    looks += ['class="small"'] if small else ['class="bold"'] if bold else []
    return f"<text {' '.join(looks)}>{text}</text>"


def mark(x: float, y: float, attention: str, cache: str, small: bool = False) -> str:
    """A point: the colour is the attention, the shape the cache."""
    look, size = f'class="mark {attention}"', SMALL if small else LARGE
    if cache == "none":
        return f'<circle {look} cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    if cache == "dual":
        return f'<path {look} d="M{x - size:.1f} {y - size:.1f}h{2 * size}v{2 * size}h{-2 * size}z"/>'
    size += 1.4
    if cache == "prefix":
        return f'<path {look} d="M{x:.1f} {y - size:.1f}l{size} {2 * size - 1.4:.1f}h{-2 * size}z"/>'
    return f'<path {look} d="M{x:.1f} {y - size:.1f}l{size} {size}l{-size} {size}l{-size} {-size}z"/>'


def signed(value: float, digits: int) -> str:
    """The number with its sign, a true minus; zero without one."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}") if value else "0"


def axes(panel: Panel) -> Iterator[str]:
    """Titles, lines and numbers."""
    left, below = panel.left, TOP + TALL
    yield words(left, TOP - 30, panel.title, bold=True)
    yield words(left, TOP - 13, panel.about, small=True)
    digits = 2 if panel.high <= 0.2 else 1
    for tick in panel.ticks:
        yield f'<path class="{"grid" if tick else "axis"}" d="M{left} {panel.y(tick):.1f}h{WIDE}"/>'
        yield words(left - 7, panel.y(tick) + 4, signed(tick, digits), "end", small=True)
    for time in (10, 30, 100, 300, 1000):
        x = panel.x(time)
        yield f'<path class="grid" d="M{x:.1f} {TOP}V{below}"/>'
        yield words(x, below + 16, f"{time:,}", "middle", small=True)
    yield f'<path class="axis" d="M{left} {below}h{WIDE}"/>'
    yield words(left + WIDE / 2, below + 34, "seconds for 256 new tokens after 64k", "middle", small=True)


def lines(panel: Panel, points: list[Point]) -> Iterator[str]:
    """From a way to its variants, in their order; dashed where a point is beyond the axis."""
    named = {(point.way, point.variant): point for point in points}
    for way in dict.fromkeys(point.way for point in points):
        for variants in LINES:
            joined = [named[way, variant] for variant in variants if (way, variant) in named]
            for one, other in zip(joined, joined[1:], strict=False):
                look = f"path {one.attention}" + " beyond" * (other.loss[0] > panel.high)
                ends = [f"{panel.x(point.seconds):.1f} {panel.y(point.loss[0]):.1f}" for point in (one, other)]
                yield f'<path class="{look}" d="M{ends[0]}L{ends[1]}"/>'


def has_bar(point: Point, panel: Panel) -> bool:
    """Whether the interval is drawn; those of thresholds and factors would cover one another."""
    crowded = VARIANTS.get(point.variant, {}).keys() & {"threshold", "factor", "refresh"}
    return point.loss[1] < point.loss[2] <= panel.high and not crowded


def alike(panel: Panel, point: Point, points: list[Point]) -> list[str]:
    """The variants whose marks lie inside of the point's own."""
    if point.variant:
        return []
    x, y = panel.x(point.seconds), panel.y(point.loss[0])
    others = [other for other in points if other.way == point.way and other.variant]
    return [
        other.variant
        for other in others
        if math.hypot(panel.x(other.seconds) - x, panel.y(other.loss[0]) - y) < LARGE - SMALL
    ]


def shown(panel: Panel, point: Point, points: list[Point]) -> Iterator[str]:
    """A point's bar, mark and label; a variant in the same place is named there."""
    value, low, high = point.loss
    x, y, top, end = panel.x(point.seconds), *(panel.y(loss) for loss in (value, high, low))
    if has_bar(point, panel):
        gap = 4 if point.variant else 6.5
        parts = f"M{x - 3:.1f} {top:.1f}h6m-3 0V{y - gap:.1f}M{x:.1f} {y + gap:.1f}V{end:.1f}m-3 0h6"
        yield f'<path class="bar {point.attention}" d="{parts}"/>'
    yield mark(x, y, point.attention, point.cache, bool(point.variant))
    own = next(other for other in points if other.way == point.way and not other.variant)
    if point.variant in alike(panel, own, points):
        return
    text, right, down, anchor = panel.labels.get((point.way, point.variant), PLAIN)
    text = (text or point.variant) + "*" * point.elsewhere
    if value > panel.high:
        text += f": {signed(value, 2)}"
    if same := alike(panel, point, points):
        text += f' <tspan class="small">and {", ".join(same)}</tspan>'
    first = end + 14 if isinstance(down, str) else y + down
    for number, line in enumerate(text.split("|")):
        yield words(x + right, first + 13 * number, line, anchor, small=bool(point.variant))


def legend() -> Iterator[str]:
    """What colours, shapes and small points say."""
    left = LEFTS[0] + 5
    for row, title in enumerate(ATTENTION.values()):
        yield mark(left, 14 + 18 * row, list(ATTENTION)[row], "none")
        yield words(left + 13, 18 + 18 * row, title)
    left = LEFTS[1] + 5
    for row, (cache, title) in enumerate(CACHE.items()):
        yield mark(left, 14 + 18 * row, "full", cache)
        yield words(left + 13, 18 + 18 * row, title)
    yield mark(left, 14 + 72, "full", "none", small=True)
    yield words(left + 13, 18 + 72, "refresh 2 or 4; threshold 0.9 or 0.7; factor 2; fewer steps")


def numbers(points: list[Point]) -> str:
    """Of how many documents the points are."""
    counted = sorted({point.documents for point in points})
    return f"{counted[0]}" if len(counted) == 1 else f"{counted[0]} to {counted[-1]}"


def notes(left: list[Point], right: list[Point]) -> Iterator[str]:
    """The conditions, and what is not there."""
    summary = read(WRITTEN)
    own = row_of(summary, settings_of(ways()[FULL]), steps=summary["settings"]["seq_len"])
    repeated = f"{own['repeated'][0]:.0%}".replace("%", " %") if own else "many"
    said = [
        "Time: LLaDA's 8B shape with random weights, one H200. Quality: a real model of 135M parameters, 4,096 tokens.",
        f"Left: {numbers(left)} documents, the last 256 tokens in blocks of 32, half of a block masked. "
        f"Right: {numbers(right)} documents, 128 tokens written in blocks of 32, 128 steps.",
        "Above the uppermost line nothing is to scale. Bars: 95 % intervals, of small points for fewer steps only.",
        f"Repetitions make a text likely: of full attention's runs of four tokens, {repeated} stood before.",
    ]
    if any(point.elsewhere for point in left):
        said.append("* Measured separately: half of all 256 tokens masked.")
    absent = [
        f"{', '.join(missing)} ({side})"
        for side, points in (("left", left), ("right", right))
        if (missing := [name for name in ways() if name not in {point.way for point in points}])
    ]
    said += [f"Not measured: {'; '.join(absent)}."] if absent else []
    for number, line in enumerate(said):
        yield words(LEFTS[0], TOP + TALL + 58 + 16 * number, line, small=True)


def picture() -> str:
    """The whole SVG."""
    left, right = forced(), written()
    parts = [*legend()]
    for panel, points in ((FORCED, left), (TEXTS, right)):
        parts += axes(panel)
        parts += lines(panel, points)
        for point in points:
            parts += shown(panel, point, points)
    parts += notes(left, right)
    title = "How far each way of generating is from full attention, against the time it takes"
    return document(title, STYLE, parts, WIDTH, HEIGHT)


def main(argv: list[str] | None = None) -> None:
    Parser(prog="python -m docs.make.quality_time", description=__doc__).parse_args(argv)
    write_text(FILE, picture())


if __name__ == "__main__":
    main()
