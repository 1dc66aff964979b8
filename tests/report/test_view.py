"""What `--show` draws of a moment of a run, rendered by rich at a fixed size."""

import io

import pytest

from sparsed.report.view import END, MASK, Token, View, drawn, legible, window

console_of = pytest.importorskip("rich.console", reason='no rich: pip install -e ".[show]"').Console

WORDS = [" The", " old", " key", " is", " under", " a", " loose", " stone", "."]


def view_of(tokens, newest=(), **changes):
    fields = {"title": "SparseD", "phase": "sparse", "step": 3, "steps": 8, "seconds": 1.25}
    return View(**fields | changes, tokens=tokens, newest=set(newest))


def rendered(view, width=80, height=24, colour=None):
    """The lines as the terminal gets them, with escape sequences if there is a colour system."""
    out = io.StringIO()
    options = {"force_terminal": colour is not None, "color_system": colour, "_environ": {}}
    console = console_of(file=out, width=width, height=height, **options)
    console.print(drawn(view, console))
    return out.getvalue().splitlines()


def tokens_of(pieces, probability=1.0):
    return [None if piece is MASK else Token(piece, probability) for piece in pieces]


def test_tokens_stand_in_order_and_masks_are_counted():
    pieces = [piece if position % 3 else MASK for position, piece in enumerate(WORDS)]
    heading, answer, legend = rendered(view_of(tokens_of(pieces)))
    assert heading == "SparseD  sparse  step 3 of 8  1.2 s  3 of 9 masked"
    assert answer == "▒ old key ▒ under a ▒ stone."
    assert legend == "▒ masked  ∎ end"


def test_the_last_moment_names_the_steps_that_ran():
    tokens = tokens_of(WORDS)
    assert "SparseD  done  step 3 of at most 8  " in rendered(view_of(tokens, phase="done"))[0]
    assert "SparseD  done  step 8 of 8  " in rendered(view_of(tokens, phase="done", step=8))[0]


def test_end_tokens_are_marks():
    assert rendered(view_of(tokens_of(["Yes", ".", None, None])))[1] == f"Yes.{END}{END}"


def test_colours_say_how_probable_a_token_was():
    tokens = [Token(" sure", 0.9), Token(" so", 0.5), Token(" un", 0.49), Token(" nan", float("nan"))]
    line = rendered(view_of([Token("x", 1.0), *tokens]), colour="standard")[1]
    for word, code in (("sure", 32), ("so", 33), ("un", 31), ("nan", 31)):
        assert f"\x1b[{code}m{word}\x1b[0m" in line
    assert rendered(view_of(tokens), colour="standard")[2].endswith("\x1b[31m below\x1b[0m")


def test_the_newest_tokens_are_marked_without_the_space_before_them():
    line = rendered(view_of(tokens_of(WORDS), newest=[0, 2]), colour="standard")[1]
    assert [part.split("\x1b")[0] for part in line.split("\x1b[7;32m")[1:]] == ["The", "key"]


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\ufffd[2J\ufffd]0;title\ufffd"),
        ("a\x9b31mb", "a\ufffd31mb"),  # the one-byte form of ESC [
        ("\u202eevil", "\ufffdevil"),
        ("a\r\tb\u2028c", "a  b c"),
        ("one\ntwo", "one↵\ntwo"),
        ("象🙂é", "象🙂é"),
    ],
)
def test_a_token_cannot_command_the_terminal(piece, shown):
    assert legible(piece) == shown
    lines = rendered(view_of([Token(piece, 1.0)]), colour="standard")
    assert "\n".join(lines[1:-1]).replace("\x1b[32m", "").replace("\x1b[0m", "") == shown


def test_markup_is_text():
    assert rendered(view_of([Token("[red]a[/red]", 1.0)]))[1] == "[red]a[/red]"


@pytest.mark.parametrize("width", [8, 20, 79])
@pytest.mark.parametrize("height", [1, 2, 3, 7, 200])
def test_a_long_answer_is_wrapped_and_cut_to_the_terminal(width, height):
    pieces = [" word" if position % 2 else MASK for position in range(300)]
    lines = rendered(view_of(tokens_of(pieces)), width, height)
    assert len(lines) <= height and max(map(len, lines)) <= width
    if height == 200 and width > 8:
        body = " ".join(lines[1:-1]).split()
        assert body == "".join(pieces).split()


@pytest.mark.parametrize("newest", [0, 137, 299])
def test_the_lines_around_the_newest_tokens_are_shown(newest):
    pieces = [f" w{position}" for position in range(300)]
    lines = rendered(view_of(tokens_of(pieces), newest=[newest]), 40, 7)
    assert len(lines) == 7
    assert f"w{newest}" in " ".join(lines[1:-1]).split()
    first, last = lines[1].split()[0], lines[-2].split()[-1]
    assert (
        lines[-1].startswith("lines ")
        and int(last[1:]) - int(first[1:]) == sum(len(x.split()) for x in lines[1:-1]) - 1
    )


def test_wide_characters_take_two_columns():
    lines = rendered(view_of(tokens_of(["象"] * 30)), 21)
    assert [len(line) for line in lines[1:-1]] == [10, 10, 10]


def test_the_window_holds_the_middle_of_the_marked_lines():
    assert window([], 5, 10) == (0, 5)
    assert window([], 50, 10) == (0, 10)
    assert window([20, 30, 40], 50, 10) == (25, 35)
    assert window([49], 50, 10) == (40, 50)
    for count in range(1, 12):
        for most in range(1, 12):
            for line in range(count):
                first, last = window([line], count, most)
                assert 0 <= first <= line < last <= count and last - first == min(count, most)
