"""Records that the scripts wrote before `forwards` was in them: their pages and lines stay what they were."""

import json
from pathlib import Path

import pytest

from sparsed.report import record, summary
from sparsed.report.page import page

FOLDER = Path(__file__).with_name("earlier_records")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))


def read(name, kind):
    return (FOLDER / f"{name}.{kind}").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_what_it_was(name):
    """All that it shows; what its script replays is in the script's own data, which the browser's tests watch."""
    text = page(json.loads(read(name, "json")))
    assert text[text.index("<body>") : text.index('<script type="application/json"')] == read(name, "html")


@pytest.mark.parametrize("name", NAMES)
def test_the_lines_are_what_they_were(name):
    runs = record.read(json.loads(read(name, "json"))).runs
    lines = [line for run in runs for line in summary.run_lines(run)]
    if len(runs) == 2:
        lines += summary.comparison_lines(*runs, summary.compare(*runs))
    else:
        lines.append(summary.expected_line(runs[0]))
    assert lines == read(name, "txt").splitlines()[1:], "the first line is about the call"


def test_a_committed_record_with_other_names_in_its_work():
    text = (RESULTS / "cache-demo-llada-cpu.json").read_text(encoding="utf-8")
    assert "tokens_a_forward" in text and "tokens_per_forward" not in text
    runs = record.read(json.loads(text)).runs
    assert [run.work.tokens_per_forward for run in runs] == [1.0, 1.0]
    assert [run.work.tokens_per_second for run in runs] == pytest.approx([64 / run.seconds for run in runs])
    assert "of an earlier version" not in page(json.loads(text))
