"""What a record says in lines: the phases' times, the run that counts of several, how two runs differ."""

from types import SimpleNamespace

import msgspec
import pytest

from sparsed.report import summary
from sparsed.report.record import Forward, Phase, RunRecord, Work
from tests.helpers.records import made_up_run

UNSET = dict.fromkeys(("step_seconds", "full_steps", "selection_seconds"), msgspec.UNSET)
LETTERS = {"f": Phase.FULL, "S": Phase.SELECTING, "s": Phase.SPARSE, "-": Phase.IDLE}


def forwards(phases, seconds, rows=100):
    """Forwards of these phases, a letter each, that take these seconds."""
    return [Forward(LETTERS[phase], rows, taken, 1.0) for phase, taken in zip(phases, seconds, strict=True)]


def typed(mode, **changes):
    return msgspec.convert(made_up_run(mode) | changes, RunRecord)


def test_steps_without_a_forward_are_left_out_of_the_selections_time():
    assert summary.selection_seconds(forwards("-ffSs", [0.0, 2.0, 2.0, 5.0, 1.0])) == 3.0
    assert summary.selection_seconds(forwards("-Ss", [0.0, 5.0, 1.0])) is None, "no full step to compare with"
    assert summary.selection_seconds(forwards("ff", [5.0, 1.0])) is None, "nothing was selected"


def test_the_selection_is_compared_with_forwards_of_as_many_rows():
    few = forwards("ff", [0.1, 0.1], rows=32)
    assert summary.selection_seconds(forwards("fS", [2.0, 5.0]) + few) == 3.0
    assert summary.selection_seconds(forwards("S", [5.0]) + few) is None


@pytest.mark.parametrize(("phases", "n_full"), [("ffff", 4), ("f-fSs-s", 4), ("Sss", 1), ("f-", 2), ("ffS-", 3)])
def test_a_schedule_of_full_steps_first_is_told_as_before(phases, n_full):
    seconds = [0.0 if phase == "-" else 1.0 for phase in phases]
    found = summary.prefix_fields(forwards(phases, seconds))
    assert (found["step_seconds"], found["full_steps"]) == (seconds, n_full)


@pytest.mark.parametrize("phases", ["fSsf", "sf", "fSsSs", "SfS"])
def test_any_other_order_has_no_schedule(phases):
    assert summary.prefix_fields(forwards(phases, [1.0] * len(phases))) == {}


def test_a_run_of_any_order_is_grouped_by_phase():
    run = typed("sparsed")
    mixed = forwards("fSs", [2.0, 5.0, 1.0]) + forwards("fff", [0.1] * 3, rows=32) + forwards("Sss", [4.0, 1.0, 1.0])
    run = msgspec.structs.replace(run, forwards=mixed, seconds=14.3, history=[], pieces=[], answer_tokens=None, **UNSET)
    parts = summary.phases(run)
    assert parts == pytest.approx({"full_steps": 2.0 + 2 * 2.0 + 0.3, "selection": 3.0 + 2.0, "sparse_steps": 3.0})
    assert summary.run_lines(run)[0] == (
        "SparseD: 14.30 s (6 full steps 6.30 s, selection 5.00 s, 3 sparse steps 3.00 s)"
    )


def test_work_is_counted_without_idle_steps_and_fills():
    history = [[(0, 7, 0.5), (1, 7, 0.9)], [(2, 7, 1.0)], [], [(3, 7, 0.25), (4, 9, None), (5, 9, None)]]
    work = summary.work_of(forwards("fs-s", [1.0, 0.5, 0.0, 0.5]), history)
    assert work == Work(
        {Phase.FULL: 1, Phase.SPARSE: 2}, tokens=4, filled=2, tokens_per_forward=4 / 3, tokens_per_second=2.0
    )
    assert summary.work_line(work) == (
        "3 forwards (1 full, 2 sparse) for 4 tokens, 1.33 each, 2 tokens per second, and 2 filled in"
    )


def test_runs_of_different_step_counts_are_compared_as_wholes():
    origin, sparsed = typed("origin"), msgspec.convert(made_up_run("sparsed", steps=8), RunRecord)
    compared = summary.compare(origin, sparsed)
    whole = pytest.approx(1.92 / 0.76)
    assert compared["speedup"] == dict.fromkeys(("full_steps", "selection", "sparse_steps")) | {"whole": whole}
    lines = summary.comparison_lines(origin, sparsed, compared)
    assert [" ".join(line.split()) for line in lines[-4:]] == [
        "full steps 1.92 s 0.48 s -",
        "selection - 0.08 s -",
        "sparse steps - 0.20 s -",
        "whole 1.92 s 0.76 s 2.53x",
    ]


def timed(seconds, first=1):
    """A run of so many seconds, with this first token."""
    tokens = [first, *made_up_run("origin")["token_ids"][1:]]
    return typed("origin", seconds=seconds, compile_seconds=1.0, token_ids=tokens)


@pytest.mark.parametrize(
    ("seconds", "median", "spread"), [([3.0], 3.0, 0.0), ([9.0, 1.0, 2.0], 2.0, 8.0), ([4.0, 1.0, 3.0, 2.0], 2.0, 3.0)]
)
def test_the_run_of_median_time_counts(seconds, median, spread):
    run = summary.typical([timed(each) for each in seconds])
    repeats = {"seconds": seconds, "median": median, "spread": spread, "same_tokens": True}
    assert run.seconds == median and msgspec.structs.asdict(run.repeats) == repeats
    assert run.compile_seconds == len(seconds)


def test_repeats_with_other_tokens_are_told():
    repeats = summary.typical([timed(1.0), timed(2.0, first=3), timed(3.0)]).repeats
    assert repeats.same_tokens is False
    assert summary.repeats_line(repeats) == (
        "median of 3 runs, which took 1.00 to 3.00 s; their tokens differ, with the same seed"
    )


def test_differences_are_marked_up_to_the_answers_end():
    run = SimpleNamespace(pieces=["un", "der", " the", " ", "m", "at", "<|eot_id|>"], answer_tokens=6)
    assert summary.stretches(run, [1, 2, 5, 6]) == [(False, "un"), (True, "der the"), (False, " m"), (True, "at")]


def pair(**changes):
    """Two runs of equal tokens but for the changes, which are the second's."""
    return typed("origin"), typed("sparsed", **changes)


def test_tokens_are_compared_in_the_answer_and_beyond():
    origin, sparsed = pair(answer_tokens=5, text="shorter")
    for position in (3, 30):
        sparsed.token_ids[position] = 7
    sparsed.pieces[3] = "?"
    compared = summary.compare(origin, sparsed)
    assert (compared["tokens"], compared["tokens_equal"]) == (32, 30)
    assert (compared["answer_tokens"], compared["answer_tokens_equal"]) == (20, 19)
    assert compared["different_positions"] == [3, 30] and compared["first_difference"] == 3
    assert compared["first_different_texts"] == [" keeper", "?"] and compared["same_answer"] is False


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([True, True], "expected answer 'key' found in both"),
        ([True, False], "expected answer 'key' found with full attention only"),
        ([False, True], "expected answer 'key' found with SparseD only"),
        ([False, False], "expected answer 'key' found in neither"),
    ],
)
def test_the_verdict_says_which_answer_holds_the_expected_one(found, words):
    lines = summary.verdict(summary.compare(*pair()), "key", found)
    assert lines == ["the same answer", words, "the same tokens: 32 of 32 (100.0%), 20 of the answer's 20"]


def test_without_an_expected_answer_there_is_no_word_about_it():
    lines = summary.verdict(summary.compare(*pair(text="other")), None, [None, None])
    assert lines[0] == "the answers differ" and not any("expected" in line for line in lines)
