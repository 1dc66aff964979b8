"""The committed records that the pages and their pictures are made from."""

import json
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
TITLES = {"dream": "Dream", "llada": "LLaDA"}
Record = dict[str, Any]
# what a variant of a way has unless it is said
UNSAID = dict.fromkeys(("cache", "refresh", "threshold", "factor", "dense_answer"))


def read(path: Path) -> Record:
    """A record in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def benchmark(name: str) -> Record:
    """A record of benchmarks/results."""
    return read(RESULTS / f"{name}.json")


def benchmarks_of(kind: str) -> list[Record]:
    """All records of benchmarks/results of one kind, which their names begin with."""
    return [benchmark(path.stem) for path in sorted(RESULTS.glob(f"{kind}-*.json"))]


@cache
def evaluation(name: str) -> Record:
    """The summary of an evaluation of a demo model."""
    return read(ROOT / "demo/evaluation" / name / "summary.json")


@cache
def judged(name: str) -> Record:
    """What the judge found on the real model, in a folder of demo/real/results."""
    return read(ROOT / "demo/real/results" / name / "summary.json")


def has(row: Record, wanted: Record) -> bool:
    """Whether a summary's row has all of this, and of a variant nothing more."""
    return all(row.get(name) == value for name, value in (UNSAID | wanted).items())
