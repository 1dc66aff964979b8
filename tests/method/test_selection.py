"""Block scores and isolated selection against loops in float64."""

import importlib
import math
from pathlib import Path

import pytest
import torch

from sparsed import blocks, selection
from sparsed.backends.triton import united_lists
from sparsed.blocks import BlockGrid, true_places
from sparsed.kernels import block_scores, full_attention
from sparsed.selection import compile_selection, highest_places, highest_places_torch, isolated_top_k, select_blocks
from tests.helpers import reference
from tests.helpers.interpreter import interpret

ROOT = Path(__file__).parents[2]
BORDERS = [
    # length, prompt_len, block_size
    (200, 100, 16),  # the border inside a block, a ragged end
    (192, 96, 32),  # the border between two blocks, no ragged end
    (193, 130, 32),  # one token in the last block
    (250, 10, 48),  # a prompt shorter than a block
    (250, 249, 48),  # one generated token
    (211, 0, 64),  # no prompt
    (130, 128, 64),  # the generated region is the ragged last block
    (140, 120, 64),  # no block lies wholly in the generated region
    (20, 11, 32),  # less than one block in all
    (64, 32, 64),  # exactly one block in all
]


def attention_inputs(length, heads=(4, 2), batch=1, width=16, seed=0):
    """q and k whose softmax is peaked, so that blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, h, length, width, generator=generator) * 1.5 for h in heads)
    return q, k


def left_padding(length, pads):
    return torch.tensor([[t >= pad for t in range(length)] for pad in pads])


def check_selection(q, k, valid=None, **sizes):
    """Equal to the loops, except that rows of queries that are all padding mean nothing."""
    expected = reference.select(q, k, valid=valid, **sizes)
    assert expected.gap > 1e-7, "a near-tie: choose another seed"
    chosen = select_blocks(q, k, key_valid=valid, **sizes)
    assert chosen.dtype == torch.bool and chosen.shape == expected.keep.shape
    real = torch.ones(chosen.shape[0], chosen.shape[2], dtype=torch.bool)
    if valid is not None:
        blocks = torch.nn.functional.pad(valid, (0, -valid.shape[1] % sizes["block_size"]))
        real = blocks.unflatten(1, (-1, sizes["block_size"])).any(-1)
    rows = real[:, None].expand(chosen.shape[:3])
    assert torch.equal(chosen[rows], expected.keep[rows])
    return chosen


@pytest.mark.parametrize("select", [0.01, 0.3, 0.5, 1])
@pytest.mark.parametrize(("length", "prompt_len", "block_size"), BORDERS)
def test_selection_equals_the_loops(length, prompt_len, block_size, select):
    q, k = attention_inputs(length)
    check_selection(q, k, prompt_len=prompt_len, block_size=block_size, select=select)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_every_query_head_has_its_own_pattern_over_shared_keys(heads, block_size):
    q, k = attention_inputs(203, heads, batch=2)
    chosen = check_selection(q, k, prompt_len=150, block_size=block_size, select=0.3)
    assert not torch.equal(chosen[:, 0], chosen[:, 1]), "two heads that share keys must differ here"


@pytest.mark.parametrize("pads", [(0, 64, 128), (0, 5, 40), (33, 100, 139)])
@pytest.mark.parametrize(("block_size", "select"), [(16, 0.3), (32, 0.5), (64, 0.01), (48, 1)])
def test_padding_adds_nothing(pads, block_size, select):
    q, k = attention_inputs(210, batch=3)
    valid = left_padding(210, pads)
    sizes = {"prompt_len": 140, "block_size": block_size, "select": select}
    chosen = check_selection(q, k, valid, **sizes)

    scrambled = valid[:, None, :, None]
    q, k = torch.where(scrambled, q, 50 * torch.randn_like(q)), torch.where(scrambled, k, 50 * torch.randn_like(k))
    again = check_selection(q, k, valid, **sizes)
    for b, pad in enumerate(pads):
        assert torch.equal(chosen[b, :, -(-pad // block_size) :], again[b, :, -(-pad // block_size) :])
        assert not chosen[b, :, :, : pad // block_size].any(), "a block of padding alone was kept"


@pytest.mark.parametrize("blocks", [1, 3])
def test_padding_by_whole_blocks_selects_as_without_it(blocks):
    q, k = attention_inputs(150)
    pad = blocks * 16
    padded_q, padded_k = (torch.cat([torch.randn(1, x.shape[1], pad, 16), x], 2) for x in (q, k))
    chosen = select_blocks(q, k, prompt_len=100, block_size=16, select=0.3)
    valid = left_padding(150 + pad, [pad])
    padded = select_blocks(padded_q, padded_k, prompt_len=100 + pad, block_size=16, select=0.3, key_valid=valid)
    assert torch.equal(padded[:, :, blocks:, blocks:], chosen)


@pytest.mark.parametrize(
    ("length", "prompt_len", "block_size", "select", "prompt_blocks", "prompt_kept", "generation_kept"),
    [
        (200, 100, 16, 0.3, 7, 3, 2),  # 7 prompt blocks (one straddles), 6 generation blocks
        (200, 96, 16, 0.3, 6, 2, 3),  # on the border: 6 and 7
        (200, 100, 16, 0.01, 7, 1, 1),
        (200, 100, 16, 1, 7, 7, 6),
        (200, 199, 16, 0.5, 12, 6, 1),  # the last block is the generation's, straddling or not
        (160, 0, 16, 0.2, 0, 0, 2),  # 0.2 * 10 is 2, not 3
        (320, 160, 16, 0.7, 10, 7, 7),  # 0.7 * 10 is 7
        (30, 20, 32, 0.3, 0, 0, 1),
        (4096, 3968, 128, 0.3, 31, 10, 1),
    ],
)
def test_budget_of_each_part(length, prompt_len, block_size, select, prompt_blocks, prompt_kept, generation_kept):
    q, k = attention_inputs(length, heads=(1, 1))
    chosen = select_blocks(q, k, prompt_len=prompt_len, block_size=block_size, select=select)
    assert (chosen[..., :prompt_blocks].sum(-1) == prompt_kept).all()
    assert (chosen[..., prompt_blocks:].sum(-1) == generation_kept).all()


def test_budget_counts_only_blocks_with_a_real_key():
    q, k = attention_inputs(320, heads=(2, 2), batch=2)
    valid = left_padding(320, [0, 90])  # row 1: 5 blocks of padding, a mixed one, 4 more of the prompt
    chosen = select_blocks(q, k, prompt_len=160, block_size=16, select=0.5, key_valid=valid)
    assert (chosen[0, :, :, :10].sum(-1) == 5).all() and (chosen[0, :, :, 10:].sum(-1) == 5).all()
    assert (chosen[1, :, 5:, :10].sum(-1) == 3).all() and (chosen[1, :, 5:, 10:].sum(-1) == 5).all()


def test_equal_scores_go_to_the_earliest_block():
    q, k = torch.zeros(1, 2, 160, 16), torch.randn(1, 2, 160, 16)
    chosen = select_blocks(q, k, prompt_len=96, block_size=16, select=0.3)
    expected = torch.tensor([True] * 2 + [False] * 4 + [True] * 2 + [False] * 2)  # 2 of 6 and 2 of 4
    assert torch.equal(chosen, expected.expand_as(chosen))


def test_the_ragged_block_counts_what_it_has():
    q, k = torch.zeros(1, 1, 72, 16), torch.randn(1, 1, 72, 16)
    chosen = select_blocks(q, k, prompt_len=32, block_size=16, select=0.5)  # 8 keys in the last block, 16 in others
    assert chosen[0, 0, 0].tolist() == [True, False, True, True, False]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt_len": -1},
        {"prompt_len": 65},
        {"block_size": 0},
        {"select": 0},
        {"select": -0.1},
        {"select": 1.2},
        {"key_valid": torch.ones(1, 64)},
        {"key_valid": torch.ones(1, 63, dtype=torch.bool)},
        {"key_valid": torch.ones(1, 65, dtype=torch.bool)},
        {"k": torch.zeros(1, 3, 64, 16)},
        {"k": torch.zeros(1, 2, 63, 16)},
        {"k": torch.zeros(1, 2, 65, 16)},
        {"k": torch.zeros(1, 0, 64, 16)},
        {"q": torch.zeros(1, 0, 64, 16)},
        {"q": torch.zeros(64, 16)},
        {"k": torch.zeros(2, 64, 16)},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_bad_input(bad):
    good = {"q": torch.zeros(1, 4, 64, 16), "k": torch.zeros(1, 2, 64, 16), "prompt_len": 32, "block_size": 16}
    with pytest.raises(ValueError) as error:
        select_blocks(**(good | {"select": 0.3} | bad))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- block scores

SCORE_CASES = [
    # length, block_size, heads, padding of two rows
    (96, 16, (2, 2), None),
    (101, 32, (4, 2), None),
    (77, 48, (3, 1), (0, 50)),
    (70, 64, (2, 1), (7, 0)),
    (20, 32, (2, 2), (19, 3)),
    (200, 16, (2, 1), (40, 64)),
]


def masks(length, pads):
    """Left padding, and the same with a token that does not count in the middle and one at the end."""
    if pads is None:
        return [None]
    holes = left_padding(length, pads)
    holes[0, -1], holes[1, (max(pads) + length) // 2] = False, False
    return [left_padding(length, pads), holes]


def check_scores(scores, q, k, block_size, valid, tolerance=2e-5):
    expected = reference.block_scores(q, k, block_size, valid)
    assert scores.dtype == torch.float32 and scores.shape == expected.shape
    torch.testing.assert_close(scores.double(), expected, atol=tolerance * block_size, rtol=0)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize(("length", "block_size", "heads", "pads"), SCORE_CASES)
def test_block_scores(monkeypatch, length, block_size, heads, pads, chunk):
    if chunk:
        monkeypatch.setattr(importlib.import_module("sparsed.kernels.block_scores"), "CPU_CHUNK", chunk)
    q, k = attention_inputs(length, heads, batch=2)
    valid = None if pads is None else left_padding(length, pads)
    check_scores(block_scores(q, k, block_size=block_size, key_valid=valid), q, k, block_size, valid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_scores_of_half_precision_inputs(dtype):
    q, k = (x.to(dtype) for x in attention_inputs(90))
    check_scores(block_scores(q, k, block_size=16), q, k, 16, None)


def test_block_scores_read_strided_inputs():
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in attention_inputs(90))
    check_scores(block_scores(q, k, block_size=16), q, k, 16, None)


@pytest.mark.parametrize("select", [0.01, 0.3, 0.5, 0.6, 0.9, 0.99, 1.0])
def test_keeps_all_says_whether_the_budgets_hold_every_block(select):
    for length, prompt_len, block_size in [(16, 0, 16), (40, 20, 16), (90, 61, 16), (200, 72, 128), (300, 299, 32)]:
        whole = BlockGrid(length, prompt_len, block_size)
        parts = reference.parts(length, prompt_len, block_size)
        expected = all(reference.exact_share(select, len(part)) == len(part) for part in parts if part)
        assert whole.keeps_all(select) == expected
        if expected:  # then of any padded rows too, which hold fewer blocks
            for pad in range(1, length):
                padded = BlockGrid(length, prompt_len, block_size, left_padding(length, (pad,)))
                assert sum(padded.budgets(select)[0]) == int((padded.block_tokens > 0).sum())


def test_true_places():
    chosen = torch.rand(3, 4, 37) < 0.4
    most = int(chosen.sum(-1).max())
    for width in (most, most + 3, 37):
        places = true_places(chosen, width)
        assert places.dtype == torch.int32 and places.shape == (3, 4, width)
        for row, found in zip(chosen.flatten(0, 1), places.flatten(0, 1), strict=True):
            expected = row.nonzero().flatten().tolist()
            assert found.tolist() == expected + [0] * (width - len(expected))


@pytest.mark.parametrize("chunk", [1, 100])
def test_ranking_in_chunks_of_heads(monkeypatch, chunk):
    scores = torch.rand(2, 5, 7, 7).round(decimals=1)  # many ties
    grid = BlockGrid(7 * 16, 80, 16)
    whole = isolated_top_k(scores, grid, 0.4)
    lists = united_lists(whole, 2)
    monkeypatch.setattr(blocks, "RANKED", chunk)
    parts = isolated_top_k(scores, grid, 0.4)
    assert torch.equal(parts.indices, whole.indices) and parts.counts == whole.counts
    assert all(torch.equal(one, other) for one, other in zip(united_lists(whole, 2), lists, strict=True))


# The cases above, the last one of them shorter: its tiles of 32 tokens are padding alone, padding and more, whole and
# ragged. One of the heads is as wide as no tile.
INTERPRETED_CASES = [*SCORE_CASES[:5], (136, 16, (2, 1), (40, 64))]
INTERPRETED = """
from tests.method.test_selection import INTERPRETED_CASES, attention_inputs, check_scores, log_sum_exp, masks
from sparsed.kernels import availability, block_scores
availability.triton_fault = lambda device: None
for number, (length, block_size, heads, pads) in enumerate(INTERPRETED_CASES):
    q, k = attention_inputs(length, heads, batch=2, width=(32, 16, 20, 16, 16, 16)[number])
    for hole, valid in enumerate(masks(length, pads)):
        # padded, with and without the log-sum-exp in turn: each of the two masks has both in several tiles
        for given in (False, True) if valid is None else ((number + hole) % 2 == 1,):
            lse = log_sum_exp(q, k, valid) if given else None
            scores = block_scores(q, k, block_size=block_size, key_valid=valid, lse=lse)
            check_scores(scores, q, k, block_size, valid)
"""


def log_sum_exp(q, k, valid):
    """What full attention gives along with its output: float32 [B, Hq, T]."""
    logits = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None].to(q.device), -torch.inf)
    return logits.logsumexp(-1).float()


def test_triton_kernel_interpreted():
    interpret(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("length", "block_size", "heads", "pads"),
    [*SCORE_CASES, (700, 128, (4, 2), (0, 300)), (1000, 256, (7, 1), None), (600, 48, (4, 4), (256, 1))],
)
def test_triton_kernel(length, block_size, heads, pads, width, dtype):
    q, k = (x.to(dtype).mul(0.5) for x in attention_inputs(length, heads, batch=2, width=width))
    for valid in masks(length, pads):
        there = {"block_size": block_size, "key_valid": None if valid is None else valid.cuda()}
        for lse in (None, log_sum_exp(q, k, valid).cuda()):
            on_gpu = block_scores(q.cuda(), k.cuda(), **there, lse=lse)
            check_scores(on_gpu.cpu(), q, k, block_size, valid, tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [128, 48, 32])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_a_gpu_keeps_the_blocks_that_float64_would(heads, block_size):
    """As in a run, from the log-sum-exp of full attention; a block may stand for another only within rounding."""
    length, select = 4173, 0.3
    q, k = (x.cuda().bfloat16().mul(0.5) for x in attention_inputs(length, heads, width=128))
    grid = BlockGrid(length, length - 200, block_size)
    _, lse = full_attention(q, k, torch.randn_like(k))
    assert lse is not None
    kept = isolated_top_k(block_scores(q, k, block_size=block_size, lse=lse), grid, select).as_mask()
    for head in range(heads[0]):
        logits = q[0, head].double() @ k[0, head * heads[1] // heads[0]].double().T / q.shape[-1] ** 0.5
        exact = reference.pooled(logits.softmax(-1), block_size)
        for part, budget in zip(grid.parts, grid.budgets(select)[0], strict=True):
            best = exact[:, part].sort(-1, descending=True)
            lowest, mine = best.values[:, budget - 1, None], kept[0, head, :, part]
            assert (mine.sum(-1) == budget).all()
            assert (exact[:, part][mine].view(len(mine), -1) >= lowest * (1 - 1e-4)).all()
            chosen = torch.zeros_like(mine).scatter_(-1, best.indices[:, :budget], True)
            assert (chosen == mine).float().mean() > 0.999


def test_blocks_of_one_token_are_rows_of_attention():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    chosen = select_blocks(q, k, prompt_len=12, block_size=1, select=0.25)
    logits = q.double() @ k.double().mT
    assert torch.equal(chosen[..., :11], logits[..., :11] >= logits[..., :11].topk(3).values[..., -1:])


def test_the_kernels_are_compiled_on_the_first_block(monkeypatch):
    q, k, lse = torch.rand(2, 4, 50, 16), torch.rand(2, 2, 50, 16), torch.rand(2, 4, 50)
    valid = torch.rand(2, 50) > 0.5
    calls, chosen = [], []

    def scores(*tensors, **options):
        calls.append((tensors, options))
        return torch.rand(2, 4, 1, 1)

    monkeypatch.setattr(selection, "block_scores", scores)
    monkeypatch.setattr(selection, "highest_places", lambda *arguments: chosen.append(arguments))
    compile_selection(q, k, BlockGrid(50, 30, 16, valid), lse)
    compile_selection(q, k, BlockGrid(50, 30, 16), None)
    assert len(chosen) == 4 and all(arguments[0].shape == (4, 1, 1) for arguments in chosen)
    for (tensors, options), masked in zip(calls, (True, False), strict=True):
        assert torch.equal(tensors[0], q[:, :, :16]) and torch.equal(tensors[1], k[:, :, :16])
        assert options["block_size"] == 16
        if masked:
            assert torch.equal(options["key_valid"], valid[:, :16]) and torch.equal(options["lse"], lse[:, :, :16])
        else:
            assert options["key_valid"] is options["lse"] is None


# rows, scores of a row, border between the parts, how many of each to keep, places beyond these
PLACE_CASES = [
    (9, 9, 8, (3, 1), 0),
    (5, 600, 590, (177, 3), 4),
    (3, 7, 7, (4,), 2),
    (3, 300, 256, (0, 5), 0),
    (5, 20, 15, (15, 5), 1),
    (2, 1, 0, (0, 1), 0),
    (8, 257, 256, (77, 1), 300),
]


def check_places(find, device="cpu"):
    """`find` as `highest_places`, on scores with ties, padding (-1), tiny ones and CUDA's NaN, against Python's stable
    sort."""
    not_a_number = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for rows, width, border, keep, more in PLACE_CASES:
        parts = (slice(0, border), slice(border, width)) if len(keep) == 2 else (slice(0, width),)
        scores = torch.rand(3, rows, width).round(decimals=2)
        scores[0, 0] = -1.0
        scores[1, 1] *= 1e-30
        scores[1, 0, ::2] = -1.0
        scores[2, 0] = scores[2, 1, ::2] = not_a_number
        places = torch.full((3, rows, sum(keep) + more), -7, dtype=torch.int32, device=device)
        find(scores.to(device), parts, keep, places)
        for row, found in zip(scores.flatten(0, 1).tolist(), places.flatten(0, 1).tolist(), strict=True):
            expected = []
            for part, most in zip(parts, keep, strict=True):
                inside = range(part.start, part.stop)
                expected += sorted(
                    sorted(inside, key=lambda place: math.inf if math.isnan(row[place]) else -row[place])[:most]
                )
            assert found == expected + [expected[-1]] * more


def test_highest_places_in_plain_torch():
    check_places(highest_places_torch)


def test_highest_places_interpreted():
    interpret(
        "from tests.method.test_selection import check_places\n"
        "from sparsed.kernels.availability import highest_places_triton\n"
        "check_places(highest_places_triton)"
    )


@pytest.mark.gpu
def test_highest_places_on_a_gpu():
    check_places(highest_places, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "blocks"), [(32, 513), (3, 4100)])
def test_highest_places_of_many_rows(heads, blocks):
    scores = torch.rand(heads, blocks, blocks, device="cuda").round(decimals=4)
    parts, keep = (slice(0, blocks - 7), slice(blocks - 7, blocks)), (blocks // 3, 3)
    found, expected = (torch.empty(heads, blocks, sum(keep), dtype=torch.int32, device="cuda") for _ in range(2))
    highest_places(scores, parts, keep, found)
    highest_places_torch(scores, parts, keep, expected)
    assert torch.equal(found, expected)


def test_a_prompt_beyond_the_sequence_is_told_its_length():
    q = torch.zeros(2, 4, 64, 16)
    with pytest.raises(ValueError, match="between 0 and the sequence's 64 tokens, got 70"):
        select_blocks(q, q, prompt_len=70, block_size=16, select=0.3)


def test_a_mask_of_another_shape_is_told_the_right_one():
    q, k = torch.zeros(2, 4, 64, 16), torch.zeros(2, 4, 64, 16)
    with pytest.raises(ValueError, match=r"key_valid must be bool \[B, T\] = \[2, 64\], got \[2, 5\]"):
        select_blocks(q, k, prompt_len=32, block_size=16, select=0.3, key_valid=torch.ones(2, 5, dtype=torch.bool))
