"""One self-contained HTML page about the record of a run, or of a comparison."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .charts import PHASES, duration, layer_chart, step_chart, time_bars
from .fields import check_record
from .summary import LABELS, compare_times, compare_tokens, repeats_line, single_times, stretches, verdict

FOLDER = Path(__file__).parent


def page(record: dict[str, Any]) -> str:
    """The page, as HTML that needs no other file and no network.

    Args:
        record: what `--json` writes, of this version or an earlier one.

    Raises:
        ValueError: it is something else; names the field.
    """
    check_record(record)
    templates = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"duration": duration, "repeats_line": repeats_line}
    return templates.get_template("page.html").render(
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup((FOLDER / "page.js").read_text(encoding="utf-8")),
        record=record,
        **_view(record["runs"], record),
    )


def _view(runs: list[dict[str, Any]], record: dict[str, Any]) -> dict[str, Any]:
    """All that the template shows beside the record itself."""
    first, last = runs[0], runs[-1]
    compared = len(runs) == 2
    has_history = all("history" in run for run in runs)
    tokens = compare_tokens(*runs) if compared and has_history else None
    times = compare_times(*runs) if compared else single_times(first)
    lines = [] if tokens is None else verdict(tokens, first["expected"], [run["answer_found"] for run in runs])
    different = [] if tokens is None else tokens["different_positions"]
    return {
        "title": _title(record),
        "tokens": tokens,
        "speedup": times["speedup"],
        "verdict": [f"{line[0].upper()}{line[1:]}." for line in lines],
        "answers": [stretches(run, different) if "pieces" in run else [(False, run["text"])] for run in runs],
        "labels": [LABELS[run["mode"]] for run in runs],
        "steps": step_chart(runs),
        "times": {"bars": time_bars(runs, times["seconds"]), "rows": _time_rows(record, times)},
        "layers": layer_chart(last["layers"]) if last.get("layers") else None,
        "layer_rows": last.get("layers") or [],
        "replay": [_replay(run) for run in runs] if has_history else None,
        "pattern": _pattern(last),
    }


def _title(record: dict[str, Any]) -> str:
    arguments = record["arguments"]
    path = str(arguments.get("model_path", "a model"))
    model = f"{Path(path).name} demo checkpoint" if arguments.get("demo") else path
    return f"{model}: {' and '.join(LABELS[run['mode']] for run in record['runs'])}"


def _time_rows(record: dict[str, Any], times: dict[str, Any]) -> list[tuple[str, list[float | None], float | None]]:
    """Name, seconds of each run, speed-up; first the timed phases, then what is not counted."""
    runs, names = record["runs"], {phase: name for phase, (name, _) in PHASES.items()} | {"whole": "whole run"}
    rows = [
        (name, [times["seconds"][run["mode"]][phase] for run in runs], times["speedup"].get(phase))
        for phase, name in names.items()
    ]
    uncounted = {
        "compile, not counted": [run["compile_seconds"] + run["warmup_compile_seconds"] or None for run in runs],
        "warm-up runs, not counted": [sum(run["warmup_seconds"]) or None for run in runs],
        "loading, once": [record["load_seconds"]],
        "first forward pass, once": [record["first_forward_seconds"]],
    }
    return rows + [(name, seconds, None) for name, seconds in uncounted.items()]


def _replay(run: dict[str, Any]) -> dict[str, Any]:
    """What the page's script needs of a run to replay it."""
    wanted = ("history", "pieces", "answer_tokens", "step_seconds", "full_steps")
    return {name: run[name] for name in wanted} | {"chose": run["density"] is not None}


def _pattern(run: dict[str, Any]) -> dict[str, Any] | None:
    """The pattern, with the first block that belongs to the generated region."""
    pattern = run.get("pattern")
    if pattern is None:
        return None
    border = min(-(-pattern["prompt_tokens"] // pattern["block_size"]), pattern["key_blocks"] - 1)
    return {**pattern, "border": border / pattern["key_blocks"]}
