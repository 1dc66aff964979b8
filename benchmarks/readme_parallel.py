"""The pages' tables of GPUs that share a model: what was measured, and by arithmetic more GPUs and longer prompts.

Time: the GPUs share a part of a forward, and each of them computes the rest whole. How large the parts are follows from
one GPU and all of them at the same length. At another length, a forward of all rows has a part that grows with the
length's square and one that grows with the length, as does what is not shared; a cached one has a fixed part and one
that grows with the length. Memory: weights, cache and kept blocks by the model's shape, and of the rest as many bytes
per token as were measured.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sparsed.blocks import BlockGrid
from sparsed.evaluation.results import markdown
from sparsed.models.common import Sizes
from sparsed.sampling.common import CACHED
from sparsed.schedule import FULL, SELECTING, SPARSE

from .breakdown import by_purpose
from .common import seconds
from .generation import BLOCK_LENGTH, PAPER
from .parallel import ALL, LONGEST, LONGEST_CACHED, ONE
from .shapes import model_config

Record = dict[str, Any]
Point = tuple[int, float]  # tokens, and seconds of a forward
PHASES = (FULL, SELECTING, SPARSE, CACHED)
WHOLE, SHORT = "whole", "64k"
MILLION = 1024 * 1024  # prompt tokens
LARGE = "llada"  # the family whose longest prompts were measured
# family, prompt, GPUs
ON_PAPER = (
    ("llada", SHORT, 4),
    ("llada", SHORT, 8),
    ("dream", SHORT, 4),
    *((LARGE, "1M", count) for count in (2, 4, 8)),
)
KERNELS = ("linear layers", "attention", "sums over GPUs")  # purposes that have a column
H200_BYTES = 141e9
NUMBER_BYTES, INDEX_BYTES = 2, 4  # of a weight and of what the cache holds; of a kept block's index


@dataclass(frozen=True)
class Forward:
    """Seconds of a forward: what the GPUs share, as one GPU takes for it, and what each computes whole."""

    shared: float
    whole: float

    @staticmethod
    def of(one: float, several: float, count: int) -> "Forward":
        """From the seconds on one GPU, and on `count`."""
        whole = (count * several - one) / (count - 1)
        return Forward(one - whole, whole)

    def on(self, count: int) -> float:
        """Seconds on `count` GPUs."""
        return self.shared / count + self.whole


def all_rows(tokens: int, short: Point, long: Point) -> float:
    """Seconds at a length, a * tokens² + b * tokens, through two points."""
    slope = (long[1] / long[0] - short[1] / short[0]) / (long[0] - short[0])
    return tokens * (short[1] / short[0] + slope * (tokens - short[0]))


def some_rows(tokens: int, short: Point, long: Point) -> float:
    """Seconds at a length, a + b * tokens, through two points."""
    return short[1] + (long[1] - short[1]) / (long[0] - short[0]) * (tokens - short[0])


def laid_out_bytes(sizes: Sizes, head_dim: int, count: int, prompt: int, new: int, *, cached: bool) -> float:
    """What one of `count` GPUs holds throughout: its weights, cache and kept blocks; embedding and head are whole."""
    layer = 2 * sizes.width * (sizes.heads * head_dim + sizes.kv_width) + 3 * sizes.width * sizes.mlp_width
    weights = sizes.layers * layer / count + 2 * sizes.vocabulary * sizes.width
    cache = 2 * sizes.layers * sizes.kv_width * (prompt + new) / count if cached else 0
    grid = BlockGrid(prompt + new, prompt, PAPER.block_size)
    kept = sizes.layers * sizes.heads / count * grid.n_blocks * sum(grid.budgets(PAPER.select)[0])
    return NUMBER_BYTES * (weights + cache) + INDEX_BYTES * kept


class Measured:
    """What the records say of a family: all its lengths, and one GPU at the first."""

    def __init__(self, records: Iterable[Record], family: str):
        found = [record for record in records if record["family"] == family]
        self.family, self.count, self.new = family, found[0]["processes"], found[0]["new_tokens"]
        self.rows = {row["length"]: row for record in found for row in record["rows"]}

    def tokens(self, length: str) -> int:
        return self.rows[length]["prompt_tokens"] + self.new

    def median(self, length: str, phase: str, who: str = ALL) -> float:
        """Seconds of a kind of forward."""
        return self.rows[length][who]["forwards"][phase]["median"]

    def point(self, length: str, phase: str) -> Point:
        return self.tokens(length), self.median(length, phase)

    def forward(self, phase: str) -> Forward:
        """A forward at the length that one GPU did."""
        return Forward.of(self.median(SHORT, phase, ONE), self.median(SHORT, phase), self.count)

    def together(self, phase: str, tokens: int) -> float:
        """Seconds that all GPUs take at a length, prompt and new tokens."""
        if phase == CACHED:
            return some_rows(tokens, self.point(SHORT, phase), self.point(LONGEST_CACHED, phase))
        return all_rows(tokens, self.point(SHORT, phase), self.point(LONGEST, phase))

    def forward_at(self, phase: str, tokens: int) -> Forward:
        """A forward at a length, prompt and new tokens."""
        whole = self.forward(phase).whole
        if phase != CACHED:
            whole *= tokens / self.tokens(SHORT)
        return Forward(self.count * (self.together(phase, tokens) - whole), whole)

    def laid_out(self, count: int, prompt: int, *, cached: bool) -> float:
        config = model_config(self.family)
        return laid_out_bytes(config.sizes, config.head_dim, count, prompt, self.new, cached=cached)

    def rest(self, length: str) -> float:
        """Bytes per token that one of the GPUs held beyond what is laid out."""
        row = self.rows[length]
        laid_out = self.laid_out(self.count, row["prompt_tokens"], cached=CACHED in row[ALL]["forwards"])
        return (row[ALL]["peak_memory_bytes"] - laid_out) / self.tokens(length)

    def memory(self, count: int, prompt: int, like: str, *, cached: bool) -> float:
        """Bytes on one of `count` GPUs, of the rest as many per token as at a measured length."""
        return self.laid_out(count, prompt, cached=cached) + self.rest(like) * (prompt + self.new)


def parallel_table(records: list[Record], titles: dict[str, str]) -> str:
    """Markdown: a line for one GPU and one for all of them at each length, with how many times as fast."""
    lines = []
    for record in sorted(records, key=lambda record: (record["family"] != LARGE, len(record["rows"]))):
        for row in record["rows"]:
            for who, count in ((ONE, 1), (ALL, record["processes"])):
                if who in row:
                    name = f"{titles[record['family']]}, {row['length']}"
                    gains = row.get("speedup", {}) if who == ALL else {}
                    lines.append([name, str(count), *_measured_cells(row[who], gains)])
    return markdown(_columns("memory of each"), lines)


def _columns(*last: str) -> list[str]:
    steps = (f"{phase} step" for phase in PHASES)
    return ["model, prompt", "GPUs", *steps, "256 tokens, dual cache", *last]


def _measured_cells(entry: Record, gains: dict[str, float]) -> list[str]:
    if "error" in entry:  # one GPU was too small
        return [entry["error"], *["-"] * (len(PHASES) + 1)]
    took = {phase: found["median"] for phase, found in entry["forwards"].items()}
    if WHOLE in entry:
        took[WHOLE] = entry[WHOLE]["seconds"]
    cells = []
    for kind in (*PHASES, WHOLE):
        gain = f" ({gains[kind]:.2f}x)" if kind in gains else ""
        cells.append(seconds(took[kind]) + gain if kind in took else "-")
    return [*cells, f"{entry['peak_memory_bytes'] / 1e9:.1f} GB"]


@dataclass(frozen=True)
class OnPaper:
    """What `count` GPUs would take: seconds by phase and of a whole generation, bytes on each."""

    seconds: dict[str, float]
    cached_bytes: float
    uncached_bytes: float

    @staticmethod
    def of(found: Measured, length: str, count: int) -> "OnPaper":
        """At the length that one GPU did, or at a million tokens."""
        row = found.rows[SHORT]
        short = length == SHORT
        prompt, like = (row["prompt_tokens"], SHORT) if short else (MILLION, LONGEST)
        forwards = {p: found.forward(p) if short else found.forward_at(p, prompt + found.new) for p in PHASES}
        took = {phase: forward.on(count) for phase, forward in forwards.items()}
        whole = sum(part["count"] * took[phase] for phase, part in row[ALL][WHOLE]["forwards"].items())
        memory = (found.memory(count, prompt, like, cached=cached) for cached in (True, False))
        return OnPaper(took | {WHOLE: whole}, *memory)


def paper_table(records: list[Record], titles: dict[str, str]) -> str:
    """Markdown: what other numbers of GPUs would take, at the measured length and for a million tokens."""
    lines = []
    for family, length, count in ON_PAPER:
        found = Measured(records, family)
        paper = OnPaper.of(found, length, count)
        cells = [seconds(took) for took in paper.seconds.values()]
        if length == SHORT:
            cells[-1] += f" ({found.rows[SHORT][ONE][WHOLE]['seconds'] / paper.seconds[WHOLE]:.2f}x)"
        if paper.cached_bytes > H200_BYTES:
            cells[-2:] = ["-", "-"]
        memory = (f"{size / 1e9:.0f} GB" for size in (paper.cached_bytes, paper.uncached_bytes))
        lines.append([f"{titles[family]}, {length}", str(count), *cells, *memory])
    return markdown(_columns("memory of each", "without a cache"), lines)


def kernels_table(records: list[Record], titles: dict[str, str]) -> str:
    """Markdown: what the kernels of a cached step take on one GPU and on all of them, by purpose, and the step."""
    lines = []
    for family in sorted(titles, key=lambda family: family != LARGE):
        found = Measured(records, family)
        for who, count in ((ONE, 1), (ALL, found.count)):
            purposes = by_purpose(found.rows[SHORT][who]["cached_step"]["kernels"])
            parts = [purposes[name] for name in KERNELS]
            together, step = sum(purposes.values()), found.median(SHORT, CACHED, who)
            times = (*parts, together - sum(parts), together, step)
            cells = (f"{1e3 * seconds:.2f} ms" if seconds else "-" for seconds in times)
            lines.append([f"{titles[family]}, {SHORT}", str(count), *cells])
    return markdown(["model, prompt", "GPUs", *KERNELS, "other kernels", "all kernels", "the step"], lines)


def parallel_figures(records: list[Record], titles: dict[str, str]) -> dict[str, str]:
    """By name: gains, cached steps and their rest, memory, how near logits are, how far off the arithmetic is."""
    figures = {}
    for family in titles:
        found = Measured(records, family)
        row, name = found.rows[SHORT], f"parallel.{family}"
        figures |= {f"{name}.{kind}": f"{gain:.2f}" for kind, gain in row["speedup"].items()}
        figures |= {f"{name}.{who}.memory": f"{row[who]['peak_memory_bytes'] / 1e9:.1f}" for who in (ONE, ALL)}
        figures |= {f"{name}.{who}.cached": f"{1e3 * found.median(SHORT, CACHED, who):.1f}" for who in (ONE, ALL)}
        figures[f"{name}.one.cached.fine"] = f"{1e3 * found.median(SHORT, CACHED, ONE):.2f}"
        figures[f"{name}.cached.rest"] = f"{1e3 * found.forward(CACHED).whole:.1f}"
        one, full = (by_purpose(row[who]["full_step"]["kernels"]) for who in (ONE, ALL))
        figures[f"{name}.full.sums"] = f"{full['sums over GPUs']:.2f}"
        figures[f"{name}.full.kernels"] = f"{sum(full.values()):.2f}"
        figures[f"{name}.full.bound"] = f"{sum(one.values()) / (sum(full.values()) - full['sums over GPUs']):.2f}"
        kept, none = (found.laid_out(1, row["prompt_tokens"], cached=which) for which in (True, False))
        figures[f"{name}.cache"] = f"{(kept - none) / 1e9:.1f}"
        near = next(r["agreement"] for r in records if r["family"] == family and "agreement" in r)
        figures[f"{name}.error"] = f"{100 * near['relative_error']:.1f}"
        figures[f"{name}.same"] = f"{100 * near['same_top_token']:.0f}"
    found, middle = Measured(records, LARGE), LONGEST_CACHED
    for phase in (FULL, SELECTING, SPARSE):
        foretold = found.together(phase, found.tokens(middle))
        figures[f"parallel.paper.{phase}"] = f"{100 * (foretold / found.median(middle, phase) - 1):.0f}"
    row = found.rows[middle]
    memory = found.memory(found.count, row["prompt_tokens"], LONGEST, cached=True)
    figures["parallel.paper.memory"] = f"{100 * abs(memory / row[ALL]['peak_memory_bytes'] - 1):.1f}"
    figures["parallel.paper.1M"] = f"{OnPaper.of(found, '1M', 8).seconds[WHOLE] / 60:.0f}"
    for length in (LONGEST_CACHED, LONGEST):
        figures[f"parallel.{length}.memory"] = f"{found.rows[length][ALL]['peak_memory_bytes'] / 1e9:.1f}"
    return figures


def sums_figures(records: list[Record], parallel: list[Record]) -> dict[str, str]:
    """A sum of a cached step, in us, by NCCL and by the one-shot kernel, and what that would save; both layers of 64k
    rows, in ms, in one sum and in pieces."""
    figures = {}
    for record in records:
        rows = BLOCK_LENGTH + (record["family"] == "dream")  # Dream's has one more on the left
        (few,) = (row for row in record["few"] if row["rows"] == rows)
        name = f"sums.{record['family']}"
        figures |= {f"{name}.{way}": f"{1e6 * few[way]:.1f}" for way in ("nccl", "one_shot")}
        layers = model_config(record["family"]).sizes.layers
        saved = 2 * layers * (few["nccl"] - few["one_shot"])
        one, every = (Measured(parallel, record["family"]).median(SHORT, CACHED, who) for who in (ONE, ALL))
        figures |= {f"{name}.saved": f"{1e3 * saved:.2f}", f"{name}.cached": f"{one / (every - saved):.2f}"}
        figures |= {
            f"{name}.{way}": f"{1e3 * sum(row[way] for row in record['many']):.1f}" for way in ("whole", "pieces")
        }
    return figures
