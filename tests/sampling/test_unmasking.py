"""How many positions a step commits: the published schedules, as plain arithmetic."""

import math

import pytest
import torch

from sparsed.sampling.canvas import Canvas
from sparsed.sampling.unmasking import (
    Threshold,
    commit_counts,
    commit_fractions,
    even_shares,
    idle_steps,
    steps_per_block,
    while_masked,
)


@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 64, 1000])
def test_dream_commits_what_the_time_grid_says(steps, eps):
    """A step from time t to time s commits 1 - s / t of what is masked, the last all of it."""
    times = [1 + (eps - 1) * step / steps for step in range(steps + 1)]
    fractions = [1 - s / t for t, s in zip(times, times[1:], strict=False)]
    found = commit_fractions(steps, eps)
    assert found.dtype == torch.float32 and found.shape == (steps,)
    assert found[:-1].tolist() == pytest.approx(fractions[:-1], rel=1e-3, abs=1e-6)
    assert found[-1] == 1


@pytest.mark.parametrize("masks", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("steps", [1, 2, 5, 7, 8, 64, 130, 257])
def test_dream_idles_until_a_step_commits(steps, masks):
    fractions = commit_fractions(steps, 1e-3)
    committed = [math.floor(masks * fraction) for fraction in fractions.tolist()]
    assert idle_steps(masks, fractions) == next(step for step, count in enumerate(committed) if count)


def test_dream_idle_steps_end_at_the_first_that_commits():
    """A later step that commits nothing is not idle: the mask token may have been drawn before it."""
    assert idle_steps(4, torch.tensor([0.2, 0.24, 0.25, 0.1, 1.0])) == 2
    assert idle_steps(4, torch.tensor([0.5, 0.1, 0.1, 1.0])) == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 33])
def test_llada_spreads_a_block_evenly_the_larger_shares_first(steps):
    masked = torch.tensor([0, 1, 2, 7, 8, 31, 32, 33, 64])
    counts = commit_counts(masked, steps)
    assert counts.shape == (len(masked), steps)
    for total, shares in zip(masked.tolist(), counts.tolist(), strict=True):
        assert sum(shares) == total
        assert max(shares) - min(shares) <= 1
        assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("gen_length", "steps", "block_length", "each"), [(32, 32, 32, 32), (64, 32, 16, 8), (96, 9, 32, 3), (5, 10, 1, 2)]
)
def test_llada_divides_the_steps_among_the_blocks(gen_length, steps, block_length, each):
    assert steps_per_block(gen_length, steps, block_length) == each


@pytest.mark.parametrize(
    ("gen_length", "steps", "block_length", "line"),
    [
        (33, 33, 32, "gen_length must be a multiple of block_length 32, got 33"),
        (31, 31, 32, "gen_length must be a multiple of block_length 32, got 31"),
        (64, 33, 32, "steps must be a multiple of the number of blocks 2, got 33"),
        (64, 1, 32, "steps must be a multiple of the number of blocks 2, got 1"),
    ],
)
def test_llada_refuses_what_does_not_divide(gen_length, steps, block_length, line):
    with pytest.raises(ValueError) as refused:
        steps_per_block(gen_length, steps, block_length)
    assert str(refused.value) == line


@pytest.mark.parametrize(("tokens", "share"), [(1, 0.2), (2, 0.4), (3, 0.6), (4, 0.8), (5, 1.0)])
@pytest.mark.parametrize("each", [4, 12, 32])
def test_a_share_that_is_committed_is_exactly_what_skip_says(tokens, share, each):
    """As decimals: 1 - 0.8 is less than 0.2 in floating point."""
    canvas = Canvas.of(torch.zeros(2, 3, dtype=torch.long), None, 5 * each, 9, 10)
    canvas.ids[0, 3:] = 1
    canvas.ids[1, 3 : 3 + tokens * each] = 1
    assert canvas.committed == share, "of the row that has least"


@pytest.mark.parametrize("idle", [0, 1, 3])
def test_a_block_is_over_with_the_last_step_that_commits(idle):
    canvas = Canvas.of(torch.zeros(1, 1, dtype=torch.long), None, 4, 9, 10)
    turns = list(even_shares(canvas, [False, False, *[True] * idle] * 2, 2, {7}))
    assert [turn.over for turn in turns] == [False, True, *[True] * idle] * 2


@pytest.mark.parametrize("over", [False, True])
def test_a_block_that_is_over_stops_with_masks_in_it(over):
    """A model that commits the mask token itself leaves one; before, the mask waits for its turn."""
    canvas = Canvas.of(torch.zeros(3, 1, dtype=torch.long), None, 4, 9, 10)
    canvas.ids[:] = torch.tensor([[0, 7, 9, 9, 9], [0, 1, 7, 9, 9], [0, 1, 9, 9, 9]])
    filled = canvas.stop(1, 3, {7, 8}, over)
    stopped = [[0, 7, 9, 7, 7]] if over else [[0, 7, 9, 9, 9]]
    assert canvas.ids.tolist() == [*stopped, [0, 1, 7, 7, 7], [0, 1, 9, 9, 9]]
    assert filled.tolist() == [*([3, 4] if over else []), 8, 9]


def canvas_with(masked):
    """A canvas of 11 prompt tokens; `masked` [B, new] says where the mask, 9, is."""
    prompt = torch.arange(11).expand(len(masked), -1) % 9
    return Canvas(torch.cat((prompt, torch.where(masked, 9, 3)), dim=1), None, 11, 9)


@pytest.mark.parametrize("batch", [1, 3])
def test_places_in_a_block_are_its_candidates(batch):
    torch.manual_seed(batch)
    for share in (0.0, 0.2, 0.7, 1.0):
        canvas = canvas_with(torch.rand(batch, 24) < share)
        for start, end in ((11, 19), (19, 27), (27, 35)):
            block, places = canvas.positions(start, end), canvas.places(start, end)()
            assert block.tolist() == [b * 35 + t for b in range(batch) for t in range(start, end)]
            assert torch.equal(block[places], canvas.candidates(start, end))


@pytest.mark.parametrize(("each", "again", "looks", "turns"), [
    (8, 0, [], 8),  # every step has a share: masks are left before each
    (4, 0, [], 4),
    (12, 0, [8], 8),  # nothing is left after 8: looked at, and over
    (12, 3, [8, 9, 10, 11], 11),  # three times the mask itself was drawn
])  # fmt: skip
def test_a_block_s_masks_are_looked_for_only_where_none_may_be_left(monkeypatch, each, again, looks, turns):
    canvas, looked, taken = canvas_with(torch.ones(1, 8, dtype=torch.bool)), [], []
    candidates = Canvas.candidates
    monkeypatch.setattr(Canvas, "candidates", lambda *args: looked.append(len(taken)) or candidates(*args))
    for turn in while_masked(canvas, each, 8, None, ()):
        rows = candidates(canvas, turn.start, turn.end)
        assert turn.rows is None or torch.equal(turn.rows, rows)
        # one a step where the shares are used up, so that the block ends before its steps do
        canvas.ids.view(-1)[rows[: max(1, int(turn.counts))]] = 9 if len(taken) < again else 4
        taken.append(turn)
    assert looked == looks and len(taken) == turns


def test_a_bound_is_looked_after_at_every_step(monkeypatch):
    canvas, looked = canvas_with(torch.ones(1, 8, dtype=torch.bool)), []
    candidates = Canvas.candidates
    monkeypatch.setattr(Canvas, "candidates", lambda *args: looked.append(1) or candidates(*args))
    for turn in while_masked(canvas, 8, 8, Threshold(0.9), ()):
        canvas.ids[:, turn.start + len(looked)] = 4
        if len(looked) == 3:
            canvas.ids[:, turn.start : turn.end] = 4
    assert len(looked) == 4
