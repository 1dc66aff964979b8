"""What settings lost where that was measured, for `--advise`: see docs/decoding.md, "What it costs".

Nats per masked token against full attention without a cache, on a real model of 135 million parameters (4,096 tokens,
half of a block masked, blocks of 128, skip 0.2; `demo/real/results`, which a test holds these numbers against).
"""

from ..config import SparseDConfig
from ..sampling import Settings

CACHED_TOKENS, BLOCK_LENGTH = 256, 32  # new tokens with a cache; each step of a block computes one
FEWEST = 2048  # prompt tokens: much shorter prompts were not measured, and SparseD loses more with them
ABOUT = (
    "(loss: nats per token that the setting lost on a real model of 135M at 4k. At 8k, dense answer rows with blocks "
    "of 128 and select 0.15 lost 0.22 and 0.14 on two others: measure yours)"
)
ELSEWHERE = (
    "(what the ways lose was measured with --seq_len 256, without a cache with 128 as well, and prompts of 4k: "
    "docs/decoding.md)"
)

Rule = tuple[float, bool]  # --select, --dense_answer
WITHOUT_CACHE: dict[int, dict[Rule | None, float]] = {  # by new tokens; half of all 256 are masked
    128: {
        (0.5, False): 0.010,
        (0.3, False): 0.035,
        (0.2, False): 0.069,
        (0.15, False): 0.117,
        (0.1, False): 0.149,
        (0.5, True): 0.002,
        (0.3, True): 0.007,
        (0.2, True): 0.022,
        (0.15, True): 0.052,
        (0.1, True): 0.073,
        (0.05, True): 0.173,
    },
    256: {(0.3, False): 0.150, (0.15, False): 0.219, (0.3, True): 0.024, (0.15, True): 0.051},
}
WITH_CACHE: dict[Rule | None, float] = {
    None: 0.021,
    (0.3, False): 0.060,
    (0.15, False): 0.088,
    (0.3, True): 0.033,
    (0.15, True): 0.050,
}
ROWS_ONCE = 0.033  # a dual cache that computes all rows once


def loss(
    config: SparseDConfig | None,
    sampler: Settings,
    prompt_tokens: int,
    *,
    cached: bool = False,
    once: bool = False,
) -> float | None:
    """The nats that a way lost, None if that was not measured.

    Args:
        config: SparseD's, None for full attention.
        sampler: with the cache, if there is one. Few steps, thresholds and factors lose more, which is not in here.
        cached: with a dual cache, refreshed at every block.
        once: with one that computes all rows once.
    """
    if sampler.bound is not None or sampler.steps != sampler.gen_length:
        return None
    if config is None and not cached:
        return 0.0
    if prompt_tokens < FEWEST or (config is not None and (config.block_size, config.skip) != (128, 0.2)):
        return None
    if cached and (sampler.gen_length, sampler.block_length) != (CACHED_TOKENS, BLOCK_LENGTH):
        return None
    rule = None if config is None else (config.select, config.dense_answer)
    if once:
        return ROWS_ONCE if rule is None else None
    return (WITH_CACHE if cached else WITHOUT_CACHE.get(sampler.gen_length, {})).get(rule)


def lost(nats: float | None) -> str:
    """A loss as `--advise` prints it."""
    return "" if nats is None else f", loss {nats:.3f} nats"
