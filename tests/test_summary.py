"""What a record says in lines: the phases' times, the run that counts of several, how two runs differ."""

import pytest
from records import made_up_run

from sparsed.report import summary


def test_steps_without_a_forward_are_left_out_of_the_selections_time():
    assert summary.selection_seconds([0.0, 2.0, 2.0, 5.0, 1.0], 4) == 3.0
    assert summary.selection_seconds([0.0, 5.0, 1.0], 2) is None, "no full step to compare with"


def timed(seconds, tokens=(1, 2)):
    return {"seconds": seconds, "token_ids": list(tokens), "compile_seconds": 1.0, "step_seconds": [seconds]}


@pytest.mark.parametrize(
    ("seconds", "median", "spread"), [([3.0], 3.0, 0.0), ([9.0, 1.0, 2.0], 2.0, 8.0), ([4.0, 1.0, 3.0, 2.0], 2.0, 3.0)]
)
def test_the_run_of_median_time_counts(seconds, median, spread):
    run = summary.typical([timed(each) for each in seconds])
    assert run["seconds"] == median and run["step_seconds"] == [median]
    assert run["repeats"] == {"seconds": seconds, "median": median, "spread": spread, "same_tokens": True}
    assert run["compile_seconds"] == len(seconds)


def test_repeats_with_other_tokens_are_told():
    repeats = summary.typical([timed(1.0), timed(2.0, (1, 3)), timed(3.0)])["repeats"]
    assert repeats["same_tokens"] is False
    assert summary.repeats_line(repeats) == (
        "median of 3 runs, which took 1.00 to 3.00 s; their tokens differ, with the same seed"
    )


def test_differences_are_marked_up_to_the_answers_end():
    run = {"pieces": ["un", "der", " the", " ", "m", "at", "<|eot_id|>"], "answer_tokens": 6}
    assert summary.stretches(run, [1, 2, 5, 6]) == [(False, "un"), (True, "der the"), (False, " m"), (True, "at")]


def pair(**changes):
    """Two runs of equal tokens but for the changes, which are the second's."""
    origin, sparsed = made_up_run("origin"), made_up_run("sparsed")
    sparsed.update(changes)
    return origin, sparsed


def test_tokens_are_compared_in_the_answer_and_beyond():
    origin, sparsed = pair(answer_tokens=5, text="shorter")
    for position in (3, 30):
        sparsed["token_ids"][position] = 7
    sparsed["pieces"][3] = "?"
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
