"""Numbers under stress: huge logits, ties, one key that takes all; every score finite, every choice determined."""

import pytest
import torch
import torch.nn.functional as F

from sparsed.backends import BACKENDS
from sparsed.blocks import BlockGrid
from sparsed.kernels import block_scores, full_attention
from sparsed.selection import isolated_top_k
from tests.helpers import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS_ON = [("gather", "cpu"), *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("gather", "triton"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTH, PROMPT, WIDTH, BLOCK = 333, 250, 64, 32


def gaussian(count, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, LENGTH, WIDTH, generator=generator) * scale


def huge(sign):
    """Logits q.k / sqrt(64) of 1e4 and, between all other pairs, of -1e4 or the other way round."""
    direction = torch.ones(WIDTH) * (1e4 / WIDTH**0.5) ** 0.5
    flips = torch.where(torch.arange(LENGTH) % 7 == 3, sign, -sign)[:, None]
    return direction.expand(1, 4, LENGTH, WIDTH).clone(), (direction * flips).expand(1, 2, LENGTH, WIDTH).clone()


def dominating():
    """One key, in block 5, that every query looks at and nothing else."""
    k = gaussian(2, 0.01)
    k[:, :, 5 * BLOCK + 3] = 30
    return torch.ones(1, 4, LENGTH, WIDTH), k


CASES = {
    "logits of 1e4": lambda: huge(1.0),
    "logits of -1e4": lambda: huge(-1.0),
    "wide random logits": lambda: (gaussian(4, 60), gaussian(2, 60, seed=1)),
    "one dominating key": dominating,
    "all scores equal": lambda: (gaussian(4, 1), torch.zeros(1, 2, LENGTH, WIDTH)),
    "nothing but zeros": lambda: (torch.zeros(1, 4, LENGTH, WIDTH), torch.zeros(1, 2, LENGTH, WIDTH)),
    "near the top of float16": lambda: (gaussian(4, 1).clamp(-3, 3) * 2e4, gaussian(2, 1e-4, seed=1)),
}


def exact_logits(q, k):
    return q.double() @ k.double().repeat_interleave(2, dim=1).mT / WIDTH**0.5


def exact_scores(q, k):
    return reference.pooled(exact_logits(q, k).softmax(-1), BLOCK)


@pytest.fixture(params=CASES)
def extreme(request):
    return CASES[request.param]()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_scores_are_finite_and_right(extreme, dtype, device, with_lse):
    q, k = (x.to(device, dtype) for x in extreme)
    lse = exact_logits(q, k).logsumexp(-1).float() if with_lse else None
    scores = block_scores(q, k, block_size=BLOCK, lse=lse)
    assert scores.isfinite().all() and (scores >= 0).all()
    # a logit of 1e4 is known to float32's 1e-3, and a probability so to a thousandth
    tolerance = 1e-5 + 4 * torch.finfo(torch.float32).eps * exact_logits(q, k).abs().max().item()
    torch.testing.assert_close(scores.double(), exact_scores(q, k), atol=tolerance * BLOCK, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS_ON)
def test_kept_blocks_are_determined_and_attention_errs_as_dense_does(extreme, dtype, backend, device):
    q, k = (x.to(device, dtype) for x in extreme)
    v = gaussian(2, 1, seed=2).to(device, dtype)
    grid = BlockGrid(LENGTH, PROMPT, BLOCK)
    first, second = (isolated_top_k(block_scores(q, k, block_size=BLOCK), grid, 0.3) for _ in range(2))
    assert torch.equal(first.indices, second.indices)
    mask = reference.expand(first.as_mask(), BLOCK, LENGTH)
    out = BACKENDS[backend].build(first)(q, k, v)
    exact = exact_logits(q, k).masked_fill(~mask, -torch.inf).softmax(-1) @ v.double().repeat_interleave(2, dim=1)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    error, dense_error = ((x.double() - exact).abs().max().item() for x in (out, dense))
    assert out.isfinite().all()
    # a logit is known to float32's precision, and a weight to as much of itself
    rounding = torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps * exact_logits(q, k).abs().max().item()
    assert error <= 2 * dense_error + rounding * v.abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
def test_of_equal_blocks_the_earlier_ones_are_kept(device):
    """Both parts; the last block is shorter and holds less."""
    q, k = (x.to(device) for x in CASES["nothing but zeros"]())
    keep = isolated_top_k(block_scores(q, k, block_size=BLOCK), BlockGrid(LENGTH, PROMPT, BLOCK), 0.3).as_mask()
    assert (keep.nonzero()[:, 3].view(-1, 4).unique(dim=0).tolist()) == [[0, 1, 2, 8]]


@pytest.mark.parametrize("device", DEVICES)
def test_the_block_of_a_dominating_key_is_kept_everywhere(device):
    q, k = (x.to(device) for x in dominating())
    grid = BlockGrid(LENGTH, PROMPT, BLOCK)
    assert isolated_top_k(block_scores(q, k, block_size=BLOCK), grid, 0.01).as_mask()[..., 5].all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_attention_errs_as_torchs_does(extreme, dtype, device):
    q, k = (x.to(device, dtype) for x in extreme)
    v = gaussian(2, 1, seed=2).to(device, dtype)
    out, lse = full_attention(q, k, v)
    exact = exact_logits(q, k).softmax(-1) @ v.double().repeat_interleave(2, dim=1)
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    error, dense_error = ((x.double() - exact).abs().max().item() for x in (out, dense))
    assert out.isfinite().all() and error <= 2 * dense_error + torch.finfo(dtype).eps * exact.abs().max().item()
    if lse is not None:
        tolerance = 1e-3 + 4 * torch.finfo(torch.float32).eps * exact_logits(q, k).abs().max().item()
        torch.testing.assert_close(lse.double(), exact_logits(q, k).logsumexp(-1), atol=tolerance, rtol=0)
