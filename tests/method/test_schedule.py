"""When a forward is full, selecting or sparse: the paper's schedule by steps, and one by what is committed."""

import pytest
import torch

from sparsed import SparseDConfig
from sparsed.patch import sparsify
from sparsed.run import SparseRun
from sparsed.schedule import FULL, SELECTING, SPARSE, ByCommitted, ByStep
from sparsed.selection import SPARSED
from tests.helpers.standins import tiny_dream

CONFIG = SparseDConfig(0.2, 0.4, 16)


def phases(schedule, progress):
    """What forwards of one sequence would compute, by how far the generation is before each of them."""
    run, found = SparseRun(CONFIG, schedule, 16, "gather", SPARSED), []
    with run.sequence((1, 100)):
        for run.committed in progress:
            found.append(run.phase)
            with run.forward((1, 100)):
                assert run.phase == found[-1]
    return found


@pytest.mark.parametrize("told", [0.0, 0.7])
@pytest.mark.parametrize(
    ("steps", "n_full", "expected"),
    [
        (5, 2, [FULL, SELECTING, SPARSE, SPARSE, SPARSE]),
        (3, 1, [SELECTING, SPARSE, SPARSE]),
        (3, 3, [FULL] * 3),
        (3, 0, [SELECTING, SPARSE, SPARSE]),
        (4, 4, [FULL] * 4),
    ],
)
def test_by_step(steps, n_full, expected, told):
    assert phases(ByStep(steps, n_full), [told] * steps) == expected


@pytest.mark.parametrize(
    ("skip", "committed", "expected"),
    [
        (0.2, [0, 0.1, 0.2, 0.9], [FULL, FULL, SELECTING, SPARSE]),
        (0.2, [0, 0.5], [FULL, SELECTING]),
        (0.0, [0, 0.1, 0.1], [SELECTING, SPARSE, SPARSE]),
        (1.0, [0, 0.5, 0.99], [FULL] * 3),
    ],
)
def test_by_what_is_committed(skip, committed, expected):
    """However many steps it takes."""
    assert phases(ByCommitted(skip), committed) == expected


def test_the_step_that_chooses_counts_when_it_has_succeeded():
    run = SparseRun(CONFIG, ByCommitted(0.5), 16, "gather", SPARSED)
    with run.sequence((1, 100)):
        run.committed = 0.6
        with pytest.raises(ZeroDivisionError), run.forward((1, 100)):
            1 / 0  # noqa: B018
        assert (run.phase, run.step) == (SELECTING, 0)
        with run.uncounted(), run.forward((1, 100)):
            pass
        assert run.step == 0
        with run.forward((1, 50)):  # of another sequence
            assert run.phase == FULL
        assert run.step == 0
    assert run.committed == 0.6


def test_outside_a_sequence_another_shape_begins_anew():
    model, ids = tiny_dream(), torch.randint(0, 90, (1, 60))
    with torch.no_grad(), sparsify(model, CONFIG, steps=4, gen_length=16) as run:
        for tokens in (ids, ids, ids[:, :50], ids[:, :50]):
            model(tokens)
        assert run.step == 2 and run.phase == SPARSE
        for _ in range(3):
            model(ids[:, :50])
        assert run.step == 5 and run.phase == SPARSE, "more forwards than steps are sparse"
