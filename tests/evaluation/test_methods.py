"""The methods that an evaluation compares, against brute force."""

import pytest
import torch
import torch.nn.functional as F

from sparsed import SparseDConfig, sparsify
from sparsed.blocks import BlockGrid
from sparsed.evaluation.methods import METHODS, joint_top_k, streaming, window
from sparsed.evaluation.team import leave_group
from sparsed.selection import isolated_top_k
from sparsed.watching import recall, watched
from tests.helpers import reference
from tests.helpers.patch_cases import GEN_LENGTH, PROMPT_LEN, STEPS, logits_of, outputs, sequences
from tests.helpers.standins import tiny_dream, tiny_llada

CASES = [(85, 61, 16, 0.3), (128, 100, 16, 0.5), (128, 128, 16, 0.2), (50, 0, 16, 0.4), (300, 280, 32, 0.1)]
PADS = (0, 40)


def never():
    raise AssertionError("a window needs no scores")


def kept_of(pattern, row=0, head=0):
    """The kept blocks of every query block, each a list."""
    return pattern.indices[row, head, :, : pattern.counts[row]].tolist()


def budget(length, prompt_len, block, select):
    """Key blocks of a query block, by the definition: each part keeps the share of its blocks, rounded up."""
    parts = reference.parts(length, prompt_len, block)
    return sum(reference.exact_share(select, len(part)) for part in parts if part), sum(map(len, parts))


@pytest.mark.parametrize("case", CASES)
def test_windows_lie_around_the_query(case):
    length, prompt_len, block, select = case
    count, blocks = budget(*case)
    q = torch.zeros(2, 3, length, 4)
    pattern = window(q, never, BlockGrid(length, prompt_len, block), select)
    assert pattern.counts == (count, count) and pattern.indices.shape == (2, 3, blocks, count)
    for place, kept in enumerate(kept_of(pattern, 1, 2)):
        assert kept == list(range(kept[0], kept[0] + count)) and kept[0] >= 0 and kept[-1] < blocks
        assert place in kept
        if kept[0] > 0 and kept[-1] < blocks - 1:
            assert abs((place - kept[0]) - (kept[-1] - place)) <= 1


@pytest.mark.parametrize("case", CASES)
def test_streaming_adds_the_sink(case):
    length, prompt_len, block, select = case
    count, blocks = budget(*case)
    pattern = streaming(torch.zeros(1, 1, length, 4), never, BlockGrid(length, prompt_len, block), select)
    for place, kept in enumerate(kept_of(pattern)):
        assert len(set(kept)) == count and kept == sorted(kept) and kept[-1] < blocks
        if count > 1:
            rest = kept[1:]
            assert kept[0] == 0 and rest == list(range(rest[0], rest[0] + count - 1))
            assert place in kept


def test_fixed_patterns_keep_as_many_blocks_as_sparsed_and_none_of_padding():
    length, prompt_len, block, select = 128, 100, 16, 0.3
    valid = torch.tensor([[t >= pad for t in range(length)] for pad in PADS])
    grid = BlockGrid(length, prompt_len, block, valid)
    q = torch.zeros(2, 1, length, 4)
    scores = torch.rand(2, 1, 8, 8)
    chosen = isolated_top_k(scores, grid, select)
    for rule in (window, streaming):
        pattern = rule(q, never, grid, select)
        assert pattern.counts == chosen.counts
        for row, pad in enumerate(PADS):
            for place, kept in enumerate(kept_of(pattern, row)):
                assert len(set(kept)) == chosen.counts[row] and kept[0] >= pad // block
                assert place in kept or place < pad // block or rule is streaming


def test_joint_choice_is_the_highest_of_all_blocks():
    scores = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    grid = BlockGrid(128, 100, 16)
    pattern = joint_top_k(torch.zeros(2, 3, 128, 4), lambda: scores, grid, 0.3)
    count, _ = budget(128, 100, 16, 0.3)
    highest = scores.argsort(-1, descending=True)[..., :count].sort(-1).values
    assert torch.equal(pattern.indices.long(), highest) and pattern.grid is grid
    assert not torch.equal(pattern.indices, isolated_top_k(scores, grid, 0.3).indices), "isolation changed nothing"


@pytest.mark.parametrize("build", [tiny_dream, tiny_llada])
@pytest.mark.parametrize("name", ["window", "streaming"])
def test_fixed_patterns_hold_from_the_first_step_on(monkeypatch, build, name):
    """Every forward is one under the expanded mask, computed here by dense attention."""
    block, select, length = 16, 0.3, PROMPT_LEN + GEN_LENGTH
    pattern = METHODS[name].rule.select(
        torch.zeros(1, 1, length, 4), never, BlockGrid(length, PROMPT_LEN, block), select
    )
    mask = torch.zeros(length, length, dtype=torch.bool)
    for place, kept in enumerate(kept_of(pattern)):
        for other in kept:
            mask[place * block : (place + 1) * block, other * block : (other + 1) * block] = True
    assert not mask.all()
    model = build()

    def masked(q, k, v, key_valid, start):
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[-q.shape[2] :])

    steps = sequences(STEPS)
    config = METHODS[name].config(SparseDConfig(0.5, select, block))
    with sparsify(model, config, steps=STEPS, gen_length=GEN_LENGTH, rule=METHODS[name].rule) as run:
        found = outputs(model, steps)
        assert run.schedule.n_full == 0 and run.step == STEPS
    for module in model.modules():
        if hasattr(module, "attend"):
            monkeypatch.setattr(module, "attend", masked)
    torch.testing.assert_close(found, outputs(model, steps), atol=1e-4, rtol=0)


def test_without_skipping_the_pattern_is_that_of_the_first_step():
    config = SparseDConfig(0.5, 0.4, 16)
    steps = sequences(STEPS)
    method = METHODS["no_skip"]
    assert method.config(config) == SparseDConfig(0.0, 0.4, 16)
    model = tiny_llada()
    dense = outputs(model, steps)
    with sparsify(model, method.config(config), steps=STEPS, gen_length=GEN_LENGTH, rule=method.rule):
        found = outputs(model, steps)
    assert torch.equal(found[0], dense[0]) and not torch.allclose(found[1], dense[1], atol=1e-3)


@pytest.mark.parametrize("select", [0.3, 1.0])
def test_recall_is_the_attention_that_the_kept_blocks_hold(select):
    length, prompt_len, block = 85, 61, 16
    q, k = (torch.randn(2, heads, length, 8) for heads in (4, 2))
    grid = BlockGrid(length, prompt_len, block)
    recalls = []
    rule = watched(lambda scores, pattern: recalls.extend(recall(scores, pattern).tolist()))
    exact = reference.block_scores(q, k, block)
    pattern = rule.select(q, lambda: exact.float(), grid, select)
    held = torch.zeros(2, dtype=torch.float64)
    for row in range(2):
        for head in range(4):
            for place, kept in enumerate(kept_of(pattern, row, head)):
                held[row] += sum(exact[row, head, place, other] for other in kept)
    # every query's probabilities sum to 1
    assert recalls == pytest.approx((held / (4 * length)).tolist(), abs=1e-6)
    if select == 1:
        assert recalls == pytest.approx([1.0, 1.0])


def test_an_unpatched_model_is_left_behind():
    model = tiny_dream()
    ids = sequences(1)
    before = logits_of(model, ids[0])
    rule = METHODS["window"].rule
    with sparsify(model, SparseDConfig(0.2, 0.3, 16), steps=2, gen_length=GEN_LENGTH, rule=rule):
        assert not torch.allclose(logits_of(model, ids[0]), before, atol=1e-3)
    assert torch.equal(logits_of(model, ids[0]), before)


def test_leaving_the_group_of_processes(tmp_path):
    leave_group()  # without one, nothing happens
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    leave_group()
    assert not torch.distributed.is_initialized()
