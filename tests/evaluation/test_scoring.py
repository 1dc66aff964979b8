"""Scores against cases made by hand, and intervals against published ones."""

import itertools
import random

import numpy as np
import pytest

from sparsed.evaluation import score, wilson
from sparsed.evaluation.scoring import bootstrap, mean_of, paired_difference, proportion


@pytest.mark.parametrize(
    ("text", "match", "expected"),
    [
        ("It is 123 and 456.", "all", 1.0),
        ("It is 456.", "all", 0.5),
        ("It is 456.", "part", 1.0),
        ("I do not know.", "all", 0.0),
        ("I do not know.", "part", 0.0),
        ("x1234", "part", 1.0),
    ],
)
def test_score(text, match, expected):
    assert score(text, ("123", "456"), match) == expected


def test_score_ignores_case_and_refuses_what_it_does_not_know():
    assert score("THE LANTERN", ["Lantern"], "all") == 1.0
    with pytest.raises(ValueError, match="unknown match 'any'"):
        score("a", ["a"], "any")
    with pytest.raises(ValueError, match="no answers"):
        score("a", [], "all")


def test_wilson_gives_published_intervals():
    assert wilson(10, 20) == pytest.approx((0.299, 0.701), abs=5e-4)
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    for successes, n in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="is not a proportion"):
            wilson(successes, n)


# how many of the intervals of repeated experiments hold the truth; 95 % should
EXPERIMENTS = 1500


def share_that_hold(truth, draw):
    rng = random.Random(3)
    intervals = [draw(rng) for _ in range(EXPERIMENTS)]
    assert all(low <= value <= high for value, low, high in intervals)
    return sum(low <= truth <= high for _, low, high in intervals) / EXPERIMENTS


@pytest.mark.parametrize(("won", "lost"), [(0.05, 0.03), (0.3, 0.3), (0.0, 0.02)])
def test_differences_of_pairs_hold_the_truth(won, lost):
    def draw(rng):
        changes = [rng.random() for _ in range(200)]
        scores = [float(change < won) for change in changes]
        others = [float(change > 1 - lost) for change in changes]
        return paired_difference(scores, others)

    assert 0.93 <= share_that_hold(won - lost, draw) <= 0.995


def test_means_of_tasks_hold_the_truth():
    shares = (0.98, 0.9, 0.5, 0.7)

    def draw(rng):
        return mean_of([proportion([float(rng.random() < share) for _ in range(100)]) for share in shares])

    assert 0.93 <= share_that_hold(sum(shares) / 4, draw) <= 0.98


def test_a_task_alone_is_its_own_mean():
    scores = [1.0, 0.0, 0.5, 1.0]
    assert mean_of([proportion(scores)]) == pytest.approx((0.625, *wilson(2.5, 4)))
    assert paired_difference(scores, scores) == pytest.approx((0.0, -wilson(0, 4)[1], wilson(0, 4)[1]))


def test_a_bootstrap_draws_groups_with_all_that_is_in_them():
    """Against the distribution over all 5 ** 5 samples, each as likely as any other."""
    sums, counts = [3.0, 1.0, 40.0, 8.0, -2.0], [10, 2, 30, 8, 5]
    means = sorted(
        sum(sums[group] for group in drawn) / sum(counts[group] for group in drawn)
        for drawn in itertools.product(range(5), repeat=5)
    )
    value, low, high = bootstrap(sums, counts)
    assert value == pytest.approx(50 / 55)
    # 10,000 draws put the ends within half a percent of the samples
    assert means[int(0.02 * len(means))] <= low <= means[int(0.03 * len(means))]
    assert means[int(0.97 * len(means))] <= high <= means[int(0.98 * len(means))]


def test_a_bootstrap_by_hand():
    # of two groups, one is drawn twice in a quarter of the samples each
    assert bootstrap([2.0, 8.0], [1, 2]) == (pytest.approx(10 / 3), 2.0, 4.0)
    assert bootstrap([6.0], [3]) == (2.0, 2.0, 2.0)
    # paired: the same draws for everything
    sums = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    assert bootstrap(sums - (sums - 2), [4] * 5) == pytest.approx((0.5, 0.5, 0.5))
