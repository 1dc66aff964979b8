"""One self-contained HTML page about the record of a run, or of a comparison."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from msgspec import UNSET, structs

from .charts import PHASES, duration, layer_chart, step_chart, time_bars
from .record import Record, RunRecord, read
from .summary import (
    LABELS,
    attention,
    compare_times,
    compare_tokens,
    repeats_line,
    single_times,
    stretches,
    verdict,
    work_line,
)

FOLDER = Path(__file__).parent


def page(record: Any) -> str:
    """The page, as HTML that needs no other file and no network.

    Args:
        record: the JSON value that `--json` writes, of this version or an earlier one.

    Raises:
        ValueError: it is something else; names the field.
    """
    found = read(record)
    templates = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"duration": duration, "repeats_line": repeats_line, "work_line": work_line}
    return templates.get_template("page.html").render(
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup((FOLDER / "page.js").read_text(encoding="utf-8")),
        record=found,
        **_view(found.runs, found),
    )


def _view(runs: list[RunRecord], record: Record) -> dict[str, Any]:
    """Everything the template shows that is not in the record itself."""
    first, last = runs[0], runs[-1]
    compared = len(runs) == 2
    has_history = all(run.history for run in runs)
    tokens = compare_tokens(*runs) if compared and has_history else None
    times = compare_times(*runs) if compared else single_times(first)
    lines = [] if tokens is None else verdict(tokens, first.expected, [run.answer_found for run in runs])
    different = [] if tokens is None else tokens["different_positions"]
    return {
        "title": _title(record),
        "tokens": tokens,
        "speedup": times["speedup"],
        "verdict": [f"{line[0].upper()}{line[1:]}." for line in lines],
        "answers": [stretches(run, different) if run.pieces else [(False, run.text)] for run in runs],
        "labels": [LABELS[run.mode] for run in runs],
        "step_counts": " and ".join(dict.fromkeys(f"{len(run.forwards):,}" for run in runs)),
        "steps": step_chart(runs),
        "times": {"bars": time_bars(runs, times["seconds"]), "rows": _time_rows(record, times)},
        "layers": layer_chart(last.layers) if last.layers else None,
        "layer_rows": last.layers or [],
        "keeps_pattern": last.pattern is not UNSET,
        "replay": [_replay(run) for run in runs] if has_history else None,
        "pattern": _pattern(last),
    }


def _title(record: Record) -> str:
    path = str(record.arguments.get("model_path", "a model"))
    model = f"{Path(path).name} demo checkpoint" if record.arguments.get("demo") else path
    return f"{model}: {' and '.join(LABELS[run.mode] for run in record.runs)}"


def _time_rows(record: Record, times: dict[str, Any]) -> list[tuple[str, list[float | None], float | None]]:
    """Name, seconds of each run, speed-up; first the timed phases, then what is not counted."""
    runs, known = record.runs, times["seconds"][record.runs[-1].mode]
    names = {phase: name for phase, (name, _) in PHASES.items() if phase in known} | {"whole": "whole run"}
    rows = [
        (name, [times["seconds"][run.mode][phase] for run in runs], times["speedup"].get(phase))
        for phase, name in names.items()
    ]
    uncounted: dict[str, list[float | None]] = {
        "compile, not counted": [run.compile_seconds + run.warmup_compile_seconds or None for run in runs],
        "warm-up runs, not counted": [sum(run.warmup_seconds) or None for run in runs],
        "loading, once": [record.load_seconds],
        "first forward pass, once": [record.first_forward_seconds],
    }
    return rows + [(name, seconds, None) for name, seconds in uncounted.items()]


def _replay(run: RunRecord) -> dict[str, Any]:
    """What the page's script needs of a run to replay it."""
    return {
        "history": run.history,
        "pieces": run.pieces,
        "answer_tokens": run.answer_tokens,
        "seconds": [forward.seconds for forward in run.forwards],
        "phases": attention(run.forwards),
    }


def _pattern(run: RunRecord) -> dict[str, Any] | None:
    """The pattern, with the first block that belongs to the generated region."""
    if not (pattern := run.pattern):
        return None
    border = min(-(-pattern.prompt_tokens // pattern.block_size), pattern.key_blocks - 1)
    return {**structs.asdict(pattern), "border": border / pattern.key_blocks}
