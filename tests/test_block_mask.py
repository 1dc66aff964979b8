"""`Pattern.block_mask`: a FlexAttention BlockMask whose lists and mask_mod both say what the pattern says."""

import shutil
from dataclasses import replace

import pytest
import reference
import torch
from test_attention import SHAPES, exact, problem
from torch.nn.attention.flex_attention import flex_attention


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def masks(shape, dense):
    """(q, k, v, valid, the twin's token mask [B, H, T, T] without padding, the Pattern)."""
    q, k, v, valid, keep, pattern = problem(*shape)
    allowed = reference.expand(keep, shape[2], shape[0])
    if dense:
        allowed = reference.dense_rows(allowed, shape[1])
        pattern = replace(pattern, grid=replace(pattern.grid, dense_answer=True))
    return q, k, v, valid, allowed, pattern


def listed(counts, indices, blocks):
    """The blocks in the lists as bool [B, H, nQ, nK]; each list ascends and names no block twice."""
    found = torch.zeros(*indices.shape[:-1], blocks, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        entries = indices[tuple(place)][: counts[tuple(place)]].tolist()
        assert entries == sorted(set(entries)), "the indices must ascend"
        found[tuple(place)][entries] = True
    return found


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_lists_and_the_mask_mod_are_the_twin_s(shape, dense):
    length, _, size = shape[:3]
    *_, valid, allowed, pattern = masks(shape, dense)
    mask, wanted = pattern.block_mask(), allowed & valid[:, None, None]
    assert mask.seq_lengths == (length, length) and mask.BLOCK_SIZE == (size, size)
    assert mask.kv_indices.data_ptr() != mask.full_kv_indices.data_ptr(), "one tensor for both lists does not compile"
    b, h, q, k = (torch.arange(n) for n in allowed.shape)
    said = mask.mask_mod(b[:, None, None, None], h[:, None, None], q[:, None], k)
    assert torch.equal(said, wanted)
    blocks = reference.n_blocks(length, size)
    part = listed(mask.kv_num_blocks, mask.kv_indices, blocks)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices, blocks)
    assert not (part & whole).any()
    # what a kernel reads: all of the full blocks, of the partial ones what the mask_mod lets through
    read = reference.expand(whole, size, length) | (reference.expand(part, size, length) & said)
    real = valid[:, None, :, None].expand_as(read)
    assert torch.equal(read[real], wanted[real])
    assert torch.equal(whole, blockwise(wanted, size).bool()), "what is read as a whole must be listed as full"


def blockwise(allowed, size):
    """Which blocks are allowed as a whole, of the queries that are real tokens of the sequence."""
    length = allowed.shape[-1]
    cut = [slice(start, start + size) for start in range(0, length, size)]
    return torch.stack([torch.stack([allowed[:, :, q, k].all(-1).all(-1) for k in cut], -1) for q in cut], 2)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flex_attention_uncompiled_equals_the_loops(shape, dense):
    q, k, v, valid, allowed, pattern = masks(shape, dense)
    out = flex_attention(q, k, v, block_mask=pattern.block_mask(), enable_gqa=True)
    real = valid[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[real].double(), exact(q, k, v, valid, allowed, 1)[real], atol=2e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("dense", [False, True])
def test_flex_attention_compiled_equals_the_loops(dense):
    """The compiled kernel walks the lists, which the uncompiled one does not."""
    shape = (300, 200, 128, (2, 1), (0, 130))
    q, k, v, valid, allowed, pattern = masks(shape, dense)
    compiled = torch.compile(flex_attention, fullgraph=True)
    with torch.no_grad():
        out = compiled(q, k, v, block_mask=pattern.block_mask(), enable_gqa=True)
    real = valid[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[real].double(), exact(q, k, v, valid, allowed, 1)[real], atol=2e-6, rtol=0)
