"""How answers are scored, and how sure a mean score is."""

import math
from collections.abc import Sequence

MATCHES = ("all", "part")


def score(text: str, answers: Sequence[str], match: str) -> float:
    """How much of the answers a text contains, 0 to 1, as RULER scores (arXiv 2404.06654); upper and lower case agree.

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

    Scores between 0 and 1 vary less than right and wrong with the same mean, so for them the interval is a little wide.

    Args:
        successes: the sum of the scores, 0 to n.
        n: how many there are.
        z: normal quantile; 1.96 covers 95 %.

    Raises:
        ValueError: n below 1, or successes beyond 0 to n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"no proportion: {successes} of {n}")
    share = successes / n
    centre = share + z**2 / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)
