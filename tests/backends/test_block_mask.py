"""FlexAttention: the BlockMask of a pattern, whose lists and mask_mod both say what it says; the backend `flex`."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from sparsed.backends import BACKENDS, Problem, choose_backend, flex, sparse_attention
from tests.backends.test_attention import SHAPES, exact, problem
from tests.helpers import reference


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


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_lists_and_the_mask_mod_are_the_twin_s(shape, dense, first):
    length, _, size = shape[:3]
    start = first * size
    if start >= length:
        pytest.skip("the sequence has one block")
    *_, valid, allowed, pattern = masks(shape, dense)
    lists = pattern.flex_lists(slice(first, None), pattern.grid.n_blocks)
    mask = lists.block_mask(size, (length - start, length)) if first else pattern.block_mask()
    wanted = (allowed & valid[:, None, None])[:, :, start:]
    assert mask.seq_lengths == (length - start, length) and mask.BLOCK_SIZE == (size, size)
    assert mask.kv_indices.data_ptr() != mask.full_kv_indices.data_ptr(), "one tensor for both lists does not compile"
    b, h, q, k = (torch.arange(n) for n in wanted.shape)
    said = mask.mask_mod(b[:, None, None, None], h[:, None, None], q[:, None], k)
    assert torch.equal(said, wanted)
    blocks = reference.n_blocks(length, size)
    part = listed(mask.kv_num_blocks, mask.kv_indices, blocks)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices, blocks)
    assert not (part & whole).any()
    # what a kernel reads: all of the full blocks, of the partial ones what the mask_mod lets through
    whole_read, part_read = (
        found.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, : length - start, :length]
        for found in (whole, part)
    )
    read = whole_read | (part_read & said)
    real = valid[:, None, start:, None].expand_as(read)
    assert torch.equal(read[real], wanted[real])
    assert torch.equal(whole, blockwise(wanted, size).bool()), "what is read as a whole must be listed as full"


def blockwise(allowed, size):
    """Which blocks are allowed as a whole, of the queries that are real tokens of the sequence."""
    rows, columns = ([slice(start, start + size) for start in range(0, n, size)] for n in allowed.shape[2:])
    return torch.stack([torch.stack([allowed[:, :, q, k].all(-1).all(-1) for k in columns], -1) for q in rows], 2)


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


# --------------------------------------------------------------------------------------------------- the backend `flex`


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as it is written: it computes what the mask_mod says of every pair."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flex._compiled.cache_clear()
    yield
    flex._compiled.cache_clear()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flex_is_given_what_is_kept(shape, dense):
    q, k, v, valid, allowed, pattern = masks(shape, dense)
    expected = exact(q, k, v, valid, allowed, 1)
    attend, length = sparse_attention("flex", pattern), shape[0]
    for window in (slice(0, length), slice(length // 3, 2 * length // 3)):
        out = attend(q[:, :, window], k, v, window.start)
        real = valid[:, None, window, None].expand_as(out)
        torch.testing.assert_close(out[real].double(), expected[:, :, window][real], atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [16, 48, 64, 80, 128, 192, 256])
def test_flex_takes_every_block_size(size):
    options = flex.kernel_options(size)
    assert options["BACKEND"] == "TRITON"
    for tile in (options.get("BLOCK_M", 128), options.get("BLOCK_N", 128)):
        assert tile >= 16 and tile & (tile - 1) == 0 and size % tile == 0


def test_flex_runs_on_a_gpu_and_only_where_it_is_named():
    where = Problem(torch.device("cpu"), torch.float32, 1, 4, 2, 16, 32, False)
    with pytest.raises(ValueError, match="^backend cannot run here: flex: needs a CUDA device, not cpu$"):
        choose_backend("flex", where, 10_000)
    assert "flex" not in choose_backend("auto", where, 10_000)[1]
    narrow = Problem(torch.device("cuda"), torch.float32, 1, 4, 2, 8, 32, False)
    assert "16" in BACKENDS["flex"].fault(narrow)


@pytest.mark.gpu
def test_flex_is_compiled_once_for_all_layers_and_lengths():
    found = []
    for length in (700, 1000, 1500, 2300, 3001):
        for seed in (0, 1):
            q, k, v, *_, pattern = problem(length, length // 2, 128, (4, 2), (0,), width=64, seed=seed)
            q, k, v = q.cuda().bfloat16(), k.cuda().bfloat16(), v.cuda().bfloat16()
            attend = sparse_attention("flex", replace(pattern, indices=pattern.indices.cuda()))
            attend(q, k, v), attend(q[:, :, -300:], k, v, length - 300)
        found.append(counters["stats"]["unique_graphs"])
    assert found[-1] == found[1], f"graphs after each length: {found}"


@pytest.mark.gpu
def test_flex_runs_no_kernel_of_another_block_size():
    """PyTorch's cache of compiled graphs takes one for another where block sizes are dynamic: 48 after 16 before 80 was
    silently wrong. They are also more problems than torch compiles by itself."""
    for size in (16, 48, 80, 128, 256):
        for heads, pads in (((4, 2), (0,)), ((7, 1), (size, 0)), ((8, 2), (0, 0))):
            length = 6 * size + 3
            q, k, v, valid, keep, pattern = problem(length, length // 2, size, heads, pads, width=64)
            on_gpu = None if pattern.grid.key_valid is None else valid.cuda()
            moved = replace(pattern, indices=pattern.indices.cuda(), grid=replace(pattern.grid, key_valid=on_gpu))
            out = sparse_attention("flex", moved)(q.cuda(), k.cuda(), v.cuda()).cpu()
            real = valid[:, None, :, None].expand_as(out)
            expected = exact(q, k, v, valid, keep, size)
            torch.testing.assert_close(out[real].double(), expected[real], atol=5e-3, rtol=0)
