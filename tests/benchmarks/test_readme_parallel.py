"""Several GPUs on the pages: the arithmetic for others, against numbers worked out by hand, and the tables' cells."""

import pytest

from benchmarks.readme_parallel import (
    Forward,
    Measured,
    OnPaper,
    all_rows,
    kernels_table,
    laid_out_bytes,
    paper_table,
    parallel_figures,
    parallel_table,
    some_rows,
)
from sparsed.models.common import Sizes

TITLES = {"dream": "Dream", "llada": "LLaDA"}
NEW, K64, K128, K512, MILLION = 256, 65792, 131328, 524544, 1048832  # the lengths with the new tokens
COUNTS = {"full": 1, "selecting": 1, "sparse": 6, "cached": 248}
# seconds at 64k on one GPU and on two: of these 2, 3, 1 and 0.004 are not shared
ONE, TWO = (10.0, 15.0, 5.0, 0.020), (6.0, 9.0, 3.0, 0.012)


def entry(times, gigabytes):
    forwards = {phase: {"median": seconds} for phase, seconds in zip(COUNTS, times, strict=False)}
    return {"forwards": forwards, "peak_memory_bytes": gigabytes * 1e9}


def short(family, gigabytes):
    """The record of 64k."""
    one, every = entry(ONE, 2 * gigabytes), entry(TWO, gigabytes)
    for each, seconds in ((one, 90.0), (every, 50.0)):
        sums = 0.0 if each is one else 1.0
        linear = each["forwards"]["full"]["median"] - sums
        each["full_step"] = {"kernels": {"nvjet": linear, "ncclDevKernel": sums, "nccl:all_reduce": sums}}
        each["whole"] = {"seconds": seconds, "forwards": {phase: {"count": n} for phase, n in COUNTS.items()}}
    row = {"length": "64k", "prompt_tokens": K64 - NEW, "one": one, "all": every}
    row["speedup"] = {"full": 1.667, "selecting": 1.5, "sparse": 1.4, "cached": 1.3, "whole": 1.8}
    agreement = {"relative_error": 0.0123, "same_top_token": 0.9375}
    return {"family": family, "processes": 2, "new_tokens": NEW, "rows": [row], "agreement": agreement}


def longest():
    """At 512k a full step takes 4 t² + 2 t seconds, t times the tokens at 64k; at 128k half of what that gives."""
    full = 4 * (K512 / K64) ** 2 + 2 * K512 / K64
    rows = [
        {"length": "128k", "prompt_tokens": K128 - NEW, "all": entry((10.0, 20.0, 10.0, 0.020), 49)},
        {"length": "512k", "prompt_tokens": K512 - NEW, "all": entry((full, full * 1.5, full / 2), 37)},
    ]
    return {"family": "llada", "processes": 2, "new_tokens": NEW, "rows": rows}


@pytest.fixture
def records():
    return [short("dream", 13), short("llada", 29), longest()]


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_a_cached_step_s_kernels_by_purpose(records):
    kernels = {"nvjet": 0.004, "_part_kernel": 0.002, "gatherTopK": 0.0001, "Memcpy": 0.0004}
    for record in records[:2]:
        for who in ("one", "all"):
            record["rows"][0][who]["cached_step"] = {"kernels": kernels}
    records[0]["rows"][0]["all"]["cached_step"] = {"kernels": {**kernels, "ncclDevKernel": 0.001}}
    times = ["4.00 ms", "2.00 ms", "-", "0.50 ms", "6.50 ms"]
    assert cells(kernels_table(records, TITLES)) == [
        ["LLaDA, 64k", "1", *times, "20.00 ms"],
        ["LLaDA, 64k", "2", *times, "12.00 ms"],
        ["Dream, 64k", "1", *times, "20.00 ms"],
        ["Dream, 64k", "2", "4.00 ms", "2.00 ms", "1.00 ms", "0.50 ms", "7.50 ms", "12.00 ms"],
    ]


def test_one_gpu_that_was_too_small_has_a_row(records):
    records[1]["rows"][0]["one"] = {"error": "out of memory"}
    del records[1]["rows"][0]["speedup"]
    rows = cells(parallel_table(records, TITLES))
    (row,) = (row for row in rows if row[2] == "out of memory")
    assert row == ["LLaDA, 64k", "1", "out of memory", *["-"] * 5] and {len(row) for row in rows} == {8}


def test_what_gpus_share_shrinks_and_the_rest_does_not():
    """10 s on one GPU and 6 s on two: 8 s are shared, 2 s are not."""
    forward = Forward.of(10, 6, 2)
    assert [forward.on(count) for count in (1, 2, 4, 8)] == pytest.approx([10, 6, 4, 3])
    assert Forward.of(9, 5, 3) == Forward(pytest.approx(6), pytest.approx(3))


def test_lengths_between_and_beyond():
    # 3 t² + 5 t, then 7 + 2 t
    assert [all_rows(t, (1, 8), (10, 350)) for t in (1, 2, 10, 20)] == pytest.approx([8, 22, 350, 1300])
    assert [some_rows(t, (1, 9), (10, 27)) for t in (1, 2, 10, 20)] == pytest.approx([9, 11, 27, 47])


def test_bytes_that_are_laid_out():
    """One layer of two heads of 2 and one key-value head; 200 + 56 tokens are two blocks, and both are kept."""
    sizes = Sizes(layers=1, heads=2, width=4, kv_width=2, mlp_width=8, vocabulary=10)
    # q and o 16 each, k and v 8 each, three of the MLP 32 each; embedding and head 40 each
    assert laid_out_bytes(sizes, 2, 1, 200, 56, cached=False) == 2 * (144 + 80) + 4 * 2 * 2 * 2
    assert laid_out_bytes(sizes, 2, 2, 200, 56, cached=False) == 2 * (72 + 80) + 4 * 2 * 2
    more = [laid_out_bytes(sizes, 2, count, 200, 56, cached=True) for count in (1, 2)]
    assert more == [480 + 2 * 2 * 2 * 256, 320 + 2 * 2 * 256]


def test_a_family_on_paper(records):
    found = Measured(records, "llada")
    four = OnPaper.of(found, "64k", 4)
    # 8, 12, 4 and 0.016 s are shared by four
    assert four.seconds == pytest.approx(
        {"full": 4, "selecting": 6, "sparse": 2, "cached": 0.008, "whole": 4 + 6 + 6 * 2 + 248 * 0.008}
    )
    two = OnPaper.of(found, "64k", 2)
    assert two.cached_bytes == pytest.approx(29e9), "as measured"
    # half of 32 layers' keys and values of 4096 numbers of two bytes
    assert two.cached_bytes - two.uncached_bytes == pytest.approx(32 * 2 * 4096 * 2 * K64 / 2)


def test_a_million_tokens_on_paper(records):
    found, eight = Measured(records, "llada"), OnPaper.of(Measured(records, "llada"), "1M", 8)
    times = MILLION / K64
    together = 4 * times**2 + 2 * times  # of two GPUs; 2 s at 64k are not shared, and grow with the length
    assert found.together("full", MILLION) == pytest.approx(together)
    assert eight.seconds["full"] == pytest.approx((together - 2 * times) / 4 + 2 * times)
    # 12 ms at 64k and 20 ms at 128k; 4 ms are not shared at any length
    cached = 0.012 + 0.008 * (MILLION - K64) / (K128 - K64)
    assert eight.seconds["cached"] == pytest.approx((cached - 0.004) / 4 + 0.004)
    # of the 37 GB, 2 * (6.98e9 / 2 + 1.036e9) are weights, 32 * 16 heads keep 4098 * (1229 + 1) blocks
    held = 37e9 - (32 * (4 * 4096**2 + 3 * 4096 * 12288) + 2 * 2 * 126464 * 4096) - 4 * 512 * 4098 * 1230
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 12288) / 8 + 2 * 126464 * 4096)
    kept = 4 * 32 * 4 * 8194 * (2458 + 1)
    assert eight.uncached_bytes == pytest.approx(weights + kept + held * MILLION / K512, rel=1e-9)


def test_the_table_of_what_was_measured(records):
    lines = cells(parallel_table(records, TITLES))
    assert [line[:2] for line in lines] == [
        *(["LLaDA, 64k", count] for count in "12"),
        *([f"LLaDA, {length}", "2"] for length in ("128k", "512k")),
        *(["Dream, 64k", count] for count in "12"),
    ]
    assert lines[0][2:] == ["10 s", "15 s", "5 s", "20 ms", "90 s", "58.0 GB"]
    assert lines[1][2:] == ["6 s (1.67x)", "9 s (1.50x)", "3 s (1.40x)", "12 ms (1.30x)", "50 s (1.80x)", "29.0 GB"]
    assert lines[2][2:] == ["10 s", "20 s", "10 s", "20 ms", "-", "49.0 GB"]
    assert lines[3][5:] == ["-", "-", "37.0 GB"]


def test_the_table_on_paper(records):
    lines = cells(paper_table(records, TITLES))
    assert [line[:2] for line in lines] == [
        *(["LLaDA, 64k", count] for count in "48"),
        ["Dream, 64k", "4"],
        *(["LLaDA, 1M", count] for count in "248"),
    ]
    # 4 + 6 + 12 + 1.984 s against 90
    assert lines[0][2:7] == lines[2][2:7] == ["4 s", "6 s", "2 s", "8 ms", "24 s (3.75x)"]
    assert lines[3][5:7] == lines[4][5:7] == ["-", "-"], "half a terabyte of keys and values"
    assert "-" not in lines[5]


def test_figures(records):
    found = parallel_figures(records, TITLES)
    assert found["parallel.dream.whole"] == "1.80" and found["parallel.llada.one.memory"] == "58.0"
    assert (found["parallel.llada.all.cached"], found["parallel.llada.cached.rest"]) == ("12.0", "4.0")
    assert (found["parallel.llada.cache"], found["parallel.dream.cache"]) == ("34.5", "3.8")
    assert (found["parallel.llada.error"], found["parallel.llada.same"]) == ("1.2", "94")
    # about 20 s at 128k by the arithmetic, 10 s measured
    assert found["parallel.paper.full"] == "99" and found["parallel.512k.memory"] == "37.0"
