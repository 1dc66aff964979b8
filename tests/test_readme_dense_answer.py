"""What the README says of dense answer rows, against the committed records."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
README = (ROOT / "README.md").read_text()
TEXT = " ".join(README.split())
LENGTHS = ("16k", "128k")
TITLES = {"llada": "LLaDA", "dream": "Dream"}
SPARSED, DENSE = "SparseD, select {}, block_size {}", "SparseD, dense answer rows, select {}, block_size {}"
LATER = ", selected at 0.2"
FIDELITY = {  # the README's label: the record's title
    "the paper's rule, `--select` 0.3": SPARSED.format(0.3, 128),
    **{f"the paper's rule, {select}": SPARSED.format(select, 128) for select in (0.15, 0.1)},
    **{f"dense answer rows, {select}": DENSE.format(select, 128) for select in (0.5, 0.3, 0.2, 0.15, 0.1, 0.05)},
    "selected after a fifth of the answer: the paper's rule, 0.3": SPARSED.format(0.3, 128) + LATER,
    **{f"the same, dense answer rows, {select}": DENSE.format(select, 128) + LATER for select in (0.3, 0.15, 0.1)},
    "blocks of 32: the paper's rule, 0.3": SPARSED.format(0.3, 32),
    "blocks of 32: dense answer rows, 0.3": DENSE.format(0.3, 32),
    "sliding window, 0.3": "sliding window, select 0.3, block_size 128",
    "sliding window with dense answer rows, 0.3": "sliding window, dense answer rows, select 0.3, block_size 128",
    "StreamingLLM, 0.3": "StreamingLLM, select 0.3, block_size 128",
    "StreamingLLM with dense answer rows, 0.3": "StreamingLLM, dense answer rows, select 0.3, block_size 128",
}


def fidelity():
    """The settings of the record by title, with 128 and with 256 new tokens."""
    rows = json.loads((RESULTS / "fidelity-smollm2-h200.json").read_text())["rows"]
    assert [(row["new_tokens"], row["windows"], row["documents"]) for row in rows] == [(128, 31, 18), (256, 31, 18)]
    return [{setting["title"]: setting for setting in row["settings"]} for row in rows]


def speeds(family):
    """The rows of the record by prompt length."""
    record = json.loads((RESULTS / f"dense-answer-{family}-h200.json").read_text())
    assert record["environment"]["device_name"] == "NVIDIA H200"
    return {row["length"]: row["runs"] for row in record["rows"]}


def seconds(value):
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"


def test_the_fidelity_table_is_the_record_s():
    found = fidelity()
    for label, title in FIDELITY.items():
        cells = [
            cell
            for settings in found
            for cell in (
                "{:.3f} ({:.3f} to {:.3f})".format(*settings[title]["kl"]),
                f"{100 * settings[title]['same_token'][0]:.1f}",
            )
        ]
        assert f"| {' | '.join([label, *cells])} |" in README, label


def test_what_follows_from_the_fidelity_table():
    one, two = ({title: setting["kl"][0] for title, setting in settings.items()} for settings in fidelity())
    paper, dense = SPARSED.format(0.3, 128), DENSE.format(0.3, 128)
    later = one[paper + LATER] / one[dense + LATER]
    assert [round(ratio) for ratio in (one[paper] / one[dense], two[paper] / two[dense], later)] == [7, 13, 4]
    assert one[dense] == pytest.approx(one[dense + LATER], abs=1e-3)
    assert one[DENSE.format(0.15, 128) + LATER] == pytest.approx(one[paper + LATER], rel=0.03)
    assert two[DENSE.format(0.15, 128) + LATER] < two[paper + LATER]
    assert one[DENSE.format(0.1, 128)] < one[paper] and two[DENSE.format(0.1, 128)] < two[paper]
    windows = "sliding window, dense answer rows, select 0.3, block_size 128"
    assert f"windows lose {one[windows] / one[dense]:.0f} times as much" in TEXT
    part = "only the {}, select 0.3, block_size 128"
    rows, keys, own = "prompt's rows", "answer's rows: prompt keys", "answer's rows: answer keys"
    assert one[part.format(own)] < 1e-9 and one[part.format(keys)] == one[part.format("answer's rows")]
    assert f"{one[part.format(keys)]:.3f} of the {one[paper]:.3f} with 128 new tokens" in TEXT
    assert f"and {one[part.format(rows)]:.3f} in the prompt's queries; with 256" in TEXT
    text = "{:.3f} through the answer's own keys, {:.3f} through the prompt's, {:.3f} in the prompt's queries"
    assert text.format(*(two[part.format(name)] for name in (own, keys, rows))) in TEXT


@pytest.mark.parametrize("family", TITLES)
def test_the_speed_table_is_the_record_s(family):
    runs = speeds(family)["64k"]
    for name, run in runs.items():
        if name == "full attention":
            cells = [seconds(run["full_step"]["median"]), "-", *map(seconds, run["whole_seconds"].values())]
            assert f"| {TITLES[family]}, {name} | {' | '.join(cells)} |" in README
        for skip, whole in run.get("skips", {}).items():
            pairs = zip(whole["whole_seconds"].values(), whole["speedup"].values(), strict=True)
            times = [f"{seconds(took)} ({gain:.2f}x)" for took, gain in pairs]
            cells = [f"{TITLES[family]}, {name}, skip {skip}", "-", seconds(run["sparse_step"]["median"]), *times]
            assert f"| {' | '.join(cells)} |" in README
    sparse = {name: run["sparse_step"]["median"] for name, run in runs.items() if "sparse_step" in run}
    assert sparse["dense answer rows, select 0.3"] / sparse["the paper's, select 0.3"] < 1.015


def test_the_other_lengths():
    gains = {
        (family, length, name): f"{runs[name]['skips'][skip]['speedup']['1024']:.2f}"
        for family in TITLES
        for length, runs in speeds(family).items()
        for name, skip in (("the paper's, select 0.3", "0.2"), ("dense answer rows, select 0.15", "0.05"))
    }
    fast, paper = "dense answer rows, select 0.15", "the paper's, select 0.3"
    short, long = ([gains[family, length, name] for name in (fast, paper) for family in TITLES] for length in LENGTHS)
    text = "{} (LLaDA) and {} times (Dream) as fast as full attention, the paper's setting {} and {} times"
    assert text.format(*long) in TEXT
    assert "at 16k {} and {} instead of {} and {}".format(*short) in TEXT


@pytest.mark.parametrize(("folder", "length", "sizes"), [("1k", 1024, (128, 32)), ("dense-128", 4096, (128,))])
@pytest.mark.parametrize("family", TITLES)
def test_the_evaluation(family, folder, length, sizes):
    summary = json.loads((ROOT / f"demo/evaluation/{family}-{folder}/summary.json").read_text())
    assert {(row["length"], row["n"]) for row in summary["rows"]} == {(length, 100)}
    assert len(summary["rows"]) == 6 * (1 + 4 * len(sizes)), "six tasks"
    found = {(row["block_size"], row["select"], row["dense_answer"]): row for row in summary["averages"]}
    full = found[None, None, None]
    for size in sizes:
        for select in (0.2, 0.3):
            plain, dense = found[size, select, None], found[size, select, True]
            gain = f"{dense['gain']:+.1f} ({dense['gain_low']:+.1f} to {dense['gain_high']:+.1f})"
            cells = [f"{row['accuracy']:.1f}" for row in (full, plain, dense)]
            label = f"{TITLES[family]}, blocks of {size}, `--select` {select}"
            assert f"| {' | '.join([label, *cells, gain])} |" in README
            if folder == "dense-128":
                assert dense["accuracy"] > full["accuracy"] - 0.4 and "within 0.4 points of full attention" in TEXT
