"""Scores of answers, and intervals of mean scores."""

import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np

MATCHES = ("all", "part")
RESAMPLES = 10_000  # of a bootstrap


def score(text: str, answers: Sequence[str], match: str) -> float:
    """How much of the answers a text contains, 0 to 1, as RULER scores (arXiv 2404.06654), whatever the case.

    Args:
        text: what the model wrote.
        answers: the strings to look for, anywhere in the text.
        match: "all" for the share of the answers that occur, "part" for 1 if any of them does.

    Raises:
        ValueError: no answers, or another `match`.
    """
    if match not in MATCHES:
        raise ValueError(f"unknown match {match!r}: choose one of {', '.join(MATCHES)}")
    if not answers:
        raise ValueError("there are no answers to look for")
    text = text.lower()
    found = [answer.lower() in text for answer in answers]
    return sum(found) / len(found) if match == "all" else float(any(found))


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval of a proportion (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927), within 0 and 1.

    For scores between 0 and 1, which vary less than right and wrong with the same mean, it is a little wide.

    Args:
        successes: the sum of the scores, 0 to n.
        n: how many there are.
        z: normal quantile; 1.96 covers 95 %.

    Raises:
        ValueError: n below 1, or successes beyond 0 to n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a proportion")
    share = successes / n
    centre = share + z**2 / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # rounding must not put the share outside
    return max(0.0, min(share, (centre - reach) / scale)), min(1.0, max(share, (centre + reach) / scale))


Interval = tuple[float, float, float]  # value, low, high


def proportion(scores: Sequence[float]) -> Interval:
    """The mean of scores between 0 and 1, with its Wilson interval."""
    return sum(scores) / len(scores), *wilson(sum(scores), len(scores))


def paired_difference(scores: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean difference of two scores of the same samples: what is won less what is lost, each with its interval.

    The intervals are combined by the method of variance estimates recovery (G. Y. Zou and A. Donner, Statistics in
    Medicine 27, 2008). Its result has a width even if nothing differs.
    """
    changes = [score - other for score, other in zip(scores, others, strict=True)]
    gains, losses = [max(change, 0.0) for change in changes], [max(-change, 0.0) for change in changes]
    won, won_low, won_high = proportion(gains)
    lost, lost_low, lost_high = proportion(losses)
    # a sample is won or lost, never both: what is won more often is lost less often
    spread = statistics.pstdev(gains) * statistics.pstdev(losses)
    correlation = -won * lost / spread if spread else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(one**2 + other**2 - 2 * correlation * one * other)

    value = won - lost
    return value, value - reach(won - won_low, lost_high - lost), value + reach(won_high - won, lost - lost_low)


def mean_of(intervals: Sequence[Interval]) -> Interval:
    """The mean of independent values, with an interval combined from theirs as in `paired_difference`."""
    value = sum(middle for middle, _, _ in intervals) / len(intervals)
    low = math.hypot(*(middle - low for middle, low, _ in intervals)) / len(intervals)
    high = math.hypot(*(high - middle for middle, _, high in intervals)) / len(intervals)
    return value, value - low, value + high


def bootstrap(sums: Sequence[float], counts: Sequence[int]) -> Interval:
    """The mean over the things of all groups, with its 95 % bootstrap interval over the groups.

    The same groups are drawn every time, so sums of differences have the intervals of paired draws.

    Args:
        sums, counts: of each group, what its things add up to, and how many there are: above 0.
    """
    values, n = np.asarray(sums, float), np.asarray(counts, float)
    drawn = _drawn(len(n))
    low, high = np.quantile((drawn @ values) / (drawn @ n), (0.025, 0.975))
    return float(values.sum() / n.sum()), float(low), float(high)


@functools.lru_cache(maxsize=8)
def _drawn(groups: int) -> np.ndarray:
    """How often each of the groups is in each of the resamples: float64 [RESAMPLES, groups]."""
    drawn = np.random.default_rng(0).integers(0, groups, (RESAMPLES, groups))
    rows = np.arange(RESAMPLES)[:, None] * groups
    return np.bincount((rows + drawn).ravel(), minlength=RESAMPLES * groups).reshape(RESAMPLES, groups).astype(float)
