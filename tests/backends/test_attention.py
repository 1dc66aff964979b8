"""Block-sparse attention: the kernels against float64 loops, the lists that they read, the choice of a backend."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparsed.backends import BACKENDS, Backend, BackendError, Problem, choose_backend, gather, registry
from sparsed.backends import flash as flash_backend
from sparsed.backends.self_check import self_check
from sparsed.backends.triton import united_lists
from sparsed.blocks import BlockGrid, Pattern
from sparsed.kernels import flash
from tests.helpers import reference
from tests.helpers.interpreter import interpret

ROOT = Path(__file__).parents[2]
SHAPES = [
    # length, prompt_len, block_size, heads, padding by row
    (203, 150, 16, (4, 4), (0,)),
    (203, 150, 32, (4, 2), (0,)),
    (192, 128, 32, (6, 2), (0,)),  # no ragged end
    (193, 130, 48, (4, 1), (0, 0)),
    (250, 249, 64, (2, 2), (0,)),
    (20, 11, 32, (2, 1), (0,)),  # less than one block
    (210, 140, 16, (4, 2), (0, 5, 100)),
    (210, 140, 48, (2, 2), (48, 139, 0)),
    (300, 200, 128, (2, 1), (0, 130)),
    (1090, 900, 256, (2, 1), (700, 0)),
]


def problem(length, prompt_len, block_size, heads, pads, *, select=0.4, width=16, seed=0):
    """Random q, k, v and kept blocks: (q, k, v, valid [B, T], keep [B, Hq, nQ, nK], the Pattern that says the same)."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(pads), h, length, width, generator=generator) for h in (heads[0], heads[1], heads[1]))
    valid = torch.tensor([[t >= pad for t in range(length)] for pad in pads])
    n = reference.n_blocks(length, block_size)
    keep = torch.zeros(len(pads), heads[0], n, n, dtype=torch.bool)
    counts = [reference.exact_share(select, n - pad // block_size) for pad in pads]
    indices = torch.zeros(*keep.shape[:3], max(counts), dtype=torch.int32)
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in keep.shape[:3])).tolist():
        first = pads[b] // block_size
        others = first + torch.randperm(n - 1 - first, generator=generator)[: counts[b] - 1]
        kept = sorted([*others.tolist(), n - 1])  # the ragged end is where kernels read too far
        keep[b, h, i, kept] = True
        indices[b, h, i] = torch.tensor(kept + kept[-1:] * (max(counts) - len(kept)))
    grid = BlockGrid(length, prompt_len, block_size, None if valid.all() else valid)
    return q, k, v, valid, keep, Pattern(indices, tuple(counts), grid)


def exact(q, k, v, valid, keep, block_size):
    return reference.attention(q, k, v, valid, reference.expand(keep, block_size, q.shape[2]))


def windows(length, block_size):
    """Of a sequence: all of it, some of its last tokens, and some in its midst, cut inside blocks."""
    found = [slice(0, length), slice(length - 1, length), slice(max(0, length - block_size - 7), length)]
    return [*found, slice(length // 3, 2 * length // 3 + 1)]


# ------------------------------------------------------------------------------------------------------------- gather


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("select", [0.01, 0.4, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_equals_the_loops(shape, select):
    q, k, v, valid, keep, pattern = problem(*shape, select=select)
    out = BACKENDS["gather"].build(pattern)(q, k, v)
    expected = exact(q, k, v, valid, keep, shape[2])
    real = valid[:, None, :, None].expand_as(out)
    assert out.shape == q.shape and out.dtype == q.dtype
    torch.testing.assert_close(out[real].double(), expected[real], atol=2e-6, rtol=0)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("chunk", [1, 20_000])
def test_gather_in_chunks(monkeypatch, chunk):
    shape = SHAPES[6]
    q, k, v, valid, keep, pattern = problem(*shape)
    whole = BACKENDS["gather"].build(pattern)(q, k, v)
    monkeypatch.setattr(gather, "CPU_CHUNK", chunk)
    torch.testing.assert_close(BACKENDS["gather"].build(pattern)(q, k, v), whole, atol=1e-6, rtol=0)


def test_gather_in_bfloat16_errs_no_more_than_dense_attention():
    shape = SHAPES[1]
    q, k, v, valid, keep, pattern = problem(*shape)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    check_error(BACKENDS["gather"].build(pattern)(q, k, v), q, k, v, valid, keep, shape[2])


def check_error(out, q, k, v, valid, keep, block_size):
    """At most twice the error of torch's dense attention under the same mask in the same dtype."""
    allowed = reference.expand(keep, block_size, q.shape[2]) & valid[:, None, None]
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1])
    expected = exact(q, k, v, valid, keep, block_size)
    real = valid.cpu()[:, None, :, None].expand_as(expected)
    error, dense_error = ((x.cpu().double() - expected)[real].abs().max().item() for x in (out, dense))
    rounding = torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps
    assert error <= 2 * dense_error + rounding * expected[real].abs().max().item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_on_windows(shape):
    q, k, v, _, _, pattern = problem(*shape)
    attend = BACKENDS["gather"].build(pattern)
    whole = attend(q, k, v)
    for window in windows(shape[0], shape[2]):
        out = attend(q[:, :, window], k, v, window.start)
        torch.testing.assert_close(out, whole[:, :, window], atol=2e-6, rtol=0)


# ------------------------------------------------------------------------------------------- what the GPU kernels read


def listed(indices, counts, b, h, i):
    """The entries of one list that count: ascending, none twice."""
    entries = indices[b, h, i, : counts[b, h, i]].tolist()
    assert entries == sorted(set(entries)), "the indices must ascend"
    return entries


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_united_lists_name_what_each_query_block_keeps(shape, group):
    *_, keep, pattern = problem(*shape)
    lists, counts = united_lists(pattern, group)
    assert lists.dtype == counts.dtype == torch.int32
    assert lists.shape[-1] <= min(keep.shape[-1], group * pattern.indices.shape[-1])
    seen = torch.zeros_like(keep)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        for entry in listed(lists, counts, b, h, i):
            block, members = (entry, 1) if group == 1 else divmod(entry, 2**group)
            assert members, "a block that nobody keeps"
            for member in range(group):
                if members >> member & 1:
                    seen[b, h, i * group + member, block] = True
    assert torch.equal(seen, keep)


def flash_twin(q, k, v, counts, indices, block_shape):
    """What FlashAttention-4 promises, in float64 loops: all tokens of the listed blocks, none behind the end."""
    rows, columns = block_shape
    batch, heads, n_query, _ = q.shape
    assert counts.shape == indices.shape[:3] == (batch, heads, -(-n_query // rows)), "one list for each query block"
    allowed = torch.zeros(batch, heads, n_query, k.shape[2], dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        blocks = listed(indices, counts, b, h, i)
        assert max(blocks) * columns < k.shape[2], "a listed block begins behind the end"
        for j in blocks:
            allowed[b, h, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = True
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=allowed, enable_gqa=True)


@pytest.mark.parametrize("block_size", [64, 128, 256, 384])
@pytest.mark.parametrize("blocks", [3, 2.1, 2.6, 0.4])
def test_flash_is_given_what_is_kept(monkeypatch, block_size, blocks):
    monkeypatch.setattr(flash_backend, "flash_block_sparse", flash_twin)
    length = int(blocks * block_size)
    q, k, v, valid, keep, pattern = problem(length, length // 2, block_size, (4, 2), (0,))
    expected = exact(q, k, v, valid, keep, block_size)
    attend = BACKENDS["flash"].build(pattern)
    for window in windows(length, block_size):
        out = attend(q[:, :, window], k, v, window.start)
        torch.testing.assert_close(out, expected[:, :, window], atol=1e-6, rtol=0)


# for tiles cut down: blocks that share a list, without and with padding, and blocks that no tile divides
SMALL_SHAPES = [(75, 50, 16, (2, 2), (0,)), (97, 70, 48, (4, 1), (0, 0)), (75, 50, 16, (2, 1), (0, 5, 40))]

INTERPRETED = """
from tests.backends.test_attention import SHAPES, SMALL_SHAPES, exact, problem
from sparsed.backends import BACKENDS
for shape in shapes:
    q, k, v, valid, keep, pattern = problem(*shape)
    length, expected = shape[0], exact(q, k, v, valid, keep, shape[2])
    for window in (slice(0, length), slice(length // 3, length // 3 + 7)):
        out = BACKENDS["triton"].build(pattern)(q[:, :, window], k, v, window.start)
        real = valid[:, None, window, None].expand_as(out)
        torch.testing.assert_close(out[real].double(), expected[:, :, window][real], atol=2e-6, rtol=0)
        assert out.isfinite().all()
"""


def test_triton_kernel_interpreted():
    interpret(INTERPRETED.replace("in shapes", "in SHAPES"))


def test_triton_kernel_with_tiles_cut_down_interpreted():
    """Queries of one list of blocks in several tiles, as where there is little shared memory."""
    some = INTERPRETED.replace("in shapes", "in SMALL_SHAPES")
    interpret("from sparsed.kernels import launch; launch.CONSUMER_SHARED_MEMORY = 6 * 1024\n" + some)


@pytest.mark.parametrize("shared_memory", [48, 99, 163, 227])
@pytest.mark.parametrize("row_bytes", [32, 128, 256, 512])
@pytest.mark.parametrize(("block_size", "group"), [(16, 4), (32, 2), (48, 1), (64, 1), (80, 1), (128, 1), (256, 1)])
def test_tiles_fit_the_shared_memory(monkeypatch, block_size, group, row_bytes, shared_memory):
    pytest.importorskip("triton")
    from sparsed.kernels import block_sparse_triton, launch

    monkeypatch.setattr(launch, "CONSUMER_SHARED_MEMORY", shared_memory * 1024)
    device = torch.device("cpu")  # its kernels are interpreted with a consumer GPU's tiles
    rows, keys, stages = block_sparse_triton._tile(block_size, group, row_bytes, device)
    assert (rows + 2 * keys * stages) * row_bytes < shared_memory * 1024
    assert rows >= 16 and keys >= 16 and stages >= 1 and rows & (rows - 1) == keys & (keys - 1) == 0


# compute capability, KiB of shared memory; an RTX 4090 (89) multiplies as an RTX 3090 and has the same tiles
CARDS = {"RTX 3090": (86, 99), "A100": (80, 163), "H100": (90, 227), "RTX 5090": (120, 99)}
COMPILED = """
import torch
from tests.helpers.compiled_kernels import scores_kernel
from sparsed.kernels import block_scores_triton, launch
for card, (capability, kibibytes) in CARDS.items():
    launch.CONSUMER_SHARED_MEMORY = kibibytes * 1024
    # of 128 wide heads, blocks of 32 and 64 need what lies between those of 16 and of 128
    for block_size, width in ((16, 128), (128, 128), (32, 80), (128, 256)):
        tile = block_scores_triton._tile(width, torch.bfloat16, torch.device("cpu"))
        shared = scores_kernel(tile, min(tile.rows, block_size), width, capability).metadata.shared
        assert shared <= tile.shared_memory <= kibibytes * 1024, (card, block_size, width, shared, tile)
"""


@pytest.mark.slow
def test_the_scores_kernel_fits_the_shared_memory_as_compiled():
    """Compiled for the cards by Triton and its assembler, which need no GPU; in one process, for imports take long."""
    interpret(f"CARDS = {CARDS}\n{COMPILED}", interpreted=False)


def test_density_of_a_pattern():
    for shape in (SHAPES[0], SHAPES[1], SHAPES[5]):
        *_, valid, keep, pattern = problem(*shape)
        assert pattern.density == pytest.approx(reference.density([keep], shape[2], shape[0]), abs=1e-9)
    padded = (210, 140, 48, (2, 2), (50,))
    *_, valid, keep, pattern = problem(*padded)
    assert pattern.density == pytest.approx(reference.density([keep], 48, 210, valid), abs=1e-9)


# --------------------------------------------------------------------------------------------------- choosing a backend

CPU = Problem(torch.device("cpu"), torch.float32, 2, 4, 2, 16, 32, True)


@pytest.fixture(autouse=True)
def forget_self_checks():
    self_check.cache_clear()
    yield
    self_check.cache_clear()


def named(name, build, **fields):
    """A backend that can run anything."""
    return Backend(name, build, fault=lambda problem: None, **fields)


def test_auto_takes_gather_on_the_cpu_and_says_why():
    name, why = choose_backend("auto", CPU, 100)
    assert name == "gather" and why and "\n" not in why


def test_auto_takes_flash_on_long_sequences_alone(monkeypatch):
    monkeypatch.setitem(BACKENDS, "flash", replace(BACKENDS["flash"], fault=lambda problem: None))
    monkeypatch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], fault=lambda problem: "is not there"))
    monkeypatch.setattr(registry, "self_check", lambda *_: None)
    assert choose_backend("auto", CPU, flash_backend.FLASH_FROM)[0] == "flash"
    name, why = choose_backend("auto", CPU, flash_backend.FLASH_FROM - 1)
    assert name == "gather" and "flash: gains nothing below" in why and "triton: is not there" in why
    assert choose_backend("flash", CPU, 10) == ("flash", "named by the user")


@pytest.mark.parametrize("name", ["flash", "triton", "sdpa", ""])
def test_a_named_backend_that_cannot_run_is_an_error(name):
    with pytest.raises(ValueError) as error:
        choose_backend(name, CPU, 100)
    assert "\n" not in str(error.value) and "backend" in str(error.value)


def full_attention(pattern):
    """A kernel that drops the block lists, as FlexAttention's FLASH backend does under a trivial mask_mod."""
    valid = pattern.grid.key_valid
    return lambda q, k, v, start=0: F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if valid is None else valid[:, None, None], enable_gqa=True
    )


def past_the_end(pattern):
    """Zero keys behind a ragged last block take part in the softmax."""

    def run(q, k, v, start=0):
        out = BACKENDS["gather"].build(pattern)(q, k, v, start)
        spare = -k.shape[2] % pattern.grid.block_size
        keys = reference.expand(pattern.as_mask(), pattern.grid.block_size, k.shape[2])
        keys = keys[:, :, start : start + q.shape[2]]
        if pattern.grid.key_valid is not None:
            keys = keys & pattern.grid.key_valid[:, None, None]
        shared = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q @ shared.mT / q.shape[-1] ** 0.5).masked_fill(~keys, -torch.inf)
        mass = scores.exp().sum(-1, keepdim=True)
        return out * mass / (mass + spare)

    return run


def blind_to_the_start(pattern):
    """The queries are taken for the last ones, wherever they begin."""
    return lambda q, k, v, start=0: BACKENDS["gather"].build(pattern)(q, k, v, k.shape[2] - q.shape[2])


def blind_to_padding(pattern):
    grid = pattern.grid
    bare = BlockGrid(grid.length, grid.prompt_len, grid.block_size)
    return BACKENDS["gather"].build(Pattern(pattern.indices, pattern.counts, bare))


def wrong_shared_heads(pattern):
    return lambda q, k, v, start=0: BACKENDS["gather"].build(pattern)(q, k.flip(1), v.flip(1), start)


def wrong_scale(pattern):
    return lambda q, k, v, start=0: BACKENDS["gather"].build(pattern)(q * 1.1, k, v, start)


def not_a_number(pattern):
    return lambda q, k, v, start=0: torch.full_like(q, float("nan"))


def crashing(pattern):
    raise RuntimeError("LoweringException: tile too large\nwith a long trace")


BROKEN = [
    full_attention,
    past_the_end,
    blind_to_the_start,
    blind_to_padding,
    wrong_shared_heads,
    wrong_scale,
    not_a_number,
    crashing,
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda function: function.__name__)
def test_self_check_refuses_a_broken_backend(monkeypatch, broken):
    monkeypatch.setitem(BACKENDS, "broken", named("broken", broken, auto_from=None))
    with pytest.raises(BackendError) as error:
        choose_backend("broken", CPU, 100)
    assert "\n" not in str(error.value) and "broken" in str(error.value)

    # auto takes it only where it says from which length on, and goes on to the next one, remembering why
    working = BACKENDS["gather"]
    monkeypatch.delitem(BACKENDS, "gather")
    monkeypatch.setitem(BACKENDS, "gather", working)  # behind it
    assert "broken" not in choose_backend("auto", CPU, 100)[1]
    monkeypatch.setitem(BACKENDS, "broken", named("broken", broken))
    name, why = choose_backend("auto", CPU, 100)
    assert name == "gather" and "broken" in why


def test_a_broken_flash_package_is_passed_over(monkeypatch):
    """An installed flash_attn that does not fit torch fails on import, in a way of its own."""

    def broken(name):
        raise OSError("undefined symbol")

    flash._missing.cache_clear()
    monkeypatch.setattr(flash.importlib.util, "find_spec", broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fault = BACKENDS["flash"].fault(Problem(torch.device("cuda"), torch.bfloat16, 1, 2, 2, 64, 128, False))
    flash._missing.cache_clear()
    assert "does not import" in fault and "\n" not in fault


def test_out_of_memory_in_the_self_check_says_nothing_about_the_backend(monkeypatch):
    def starved(pattern):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setitem(BACKENDS, "gather", named("gather", starved))
    with pytest.raises(torch.OutOfMemoryError):
        choose_backend("gather", CPU, 100)


def test_a_block_far_longer_than_the_sequence_costs_no_more_than_the_sequence():
    """2 ** 30 tokens of padding would not fit any memory."""
    q, k, v, valid, keep, _ = problem(203, 150, 208, (4, 2), (0, 60))
    huge = BlockGrid(203, 150, 2**30, valid)
    assert huge.block_tokens.tolist() == [[203], [143]]
    pattern = Pattern(torch.zeros(2, 4, 1, 1, dtype=torch.int32), (1, 1), huge)
    out = BACKENDS["gather"].build(pattern)(q, k, v)
    real = valid[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[real].double(), exact(q, k, v, valid, keep, 208)[real], atol=2e-6, rtol=0)


def test_self_check_runs_once(monkeypatch):
    calls, working = [], BACKENDS["gather"].build

    def counted(pattern):
        calls.append(1)
        return working(pattern)

    monkeypatch.setitem(BACKENDS, "gather", named("gather", counted))
    for _ in range(3):
        choose_backend("gather", CPU, 100)
    assert len(calls) == 1


# ----------------------------------------------------------------------------------------------------------------- GPU

GPU_SHAPES = [
    # length in blocks, heads, padding by row in blocks
    (4.6, (4, 2), (0,)),
    (6.4, (7, 1), (1.5, 0)),
]


def check_on_gpu(name, length, block_size, heads, pads, width=128, select=0.3):
    q, k, v, valid, keep, pattern = problem(length, length // 2, block_size, heads, pads, width=width, select=select)
    q, k, v, valid = q.cuda().bfloat16(), k.cuda().bfloat16(), v.cuda().bfloat16(), valid.cuda()
    padded = pattern.grid.key_valid is not None
    why = BACKENDS[name].fault(Problem(q.device, q.dtype, len(pads), *heads, width, block_size, padded))
    if why and "package" in why:
        pytest.skip(f"{name} {why}")
    if name == "flash" and padded:
        assert "padding" in why
        return
    assert why is None
    grid = BlockGrid(length, length // 2, block_size, valid if padded else None)
    attend = BACKENDS[name].build(Pattern(pattern.indices.cuda(), pattern.counts, grid))
    cuts = (block_size - 3, length - block_size - 5, length)
    parts = [attend(q[:, :, a:b], k, v, a) for a, b in pairwise(cuts)]
    out = torch.cat((attend(q, k, v)[:, :, : cuts[0]], *parts), dim=2)
    check_error(out, q, k, v, valid, keep.cuda(), block_size)


RUNS = [("triton", block) for block in (16, 32, 48, 64, 80, 128, 192, 256)]
RUNS += [("flash", block) for block in (64, 128, 256)]
RUNS += [("flex", block) for block in (16, 32, 48, 64, 80, 128, 192, 256)]


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize(("name", "block_size"), [*RUNS, ("gather", 48)])
def test_kernels_on_the_gpu(name, block_size, shape):
    length, heads, pads = shape
    check_on_gpu(name, int(length * block_size), block_size, heads, tuple(int(pad * block_size) for pad in pads))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [4096, 16001])
@pytest.mark.parametrize(("name", "block_size"), [("triton", 128), ("triton", 32), ("flash", 128), ("flex", 128)])
def test_kernels_on_the_gpu_at_length(name, block_size, length):
    check_on_gpu(name, length, block_size, (2, 1), (0,))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "flex"])
def test_small_heads_on_the_gpu(name):
    check_on_gpu(name, 333, 32, (4, 2), (0, 40), width=16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "flash", "flex"])
def test_self_check_on_the_gpu_refuses_full_attention(name):
    where = Problem(torch.device("cuda"), torch.bfloat16, 1, 4, 2, 128, 128, False)
    if BACKENDS[name].fault(where):
        pytest.skip(f"{name} {BACKENDS[name].fault(where)}")
    assert self_check(BACKENDS[name], where) is None
    assert "wrong" in self_check(named(name, full_attention), where)
