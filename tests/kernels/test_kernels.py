"""Full attention with its log-sum-exp, and the elementwise kernels against their plain-torch twins."""

import importlib
from contextlib import nullcontext

import pytest
import torch

from sparsed.kernels import add_rms_norm, availability, full_attention, rms_norm, rotate, silu_product, store_rotated
from tests.helpers import reference
from tests.helpers.interpreter import interpret

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# ------------------------------------------------------------------------------------------------------ full attention


def heads(length, n_heads, width, dtype, device, last=None):
    """q of the last tokens, k, v: laid out [B, T, H, D] in memory, as the models' projections leave them."""
    sizes = (last or length, n_heads[0]), (length, n_heads[1]), (length, n_heads[1])
    return [torch.randn(2, tokens, count, width).to(device, dtype).transpose(1, 2) for tokens, count in sizes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "last"), [(77, None), (333, None), (333, 50), (16, 1)])
@pytest.mark.parametrize(("n_heads", "width"), [((4, 4), 128), ((7, 1), 128), ((4, 2), 64), ((2, 2), 20)])
def test_full_attention_and_its_log_sum_exp(device, dtype, length, last, n_heads, width):
    q, k, v = heads(length, n_heads, width, dtype, device, last)
    out, lse = full_attention(q, k, v)
    wide_q, wide_k, wide_v = q.double(), *(x.double().repeat_interleave(n_heads[0] // n_heads[1], 1) for x in (k, v))
    logits = wide_q @ wide_k.mT / width**0.5
    expected = logits.softmax(-1) @ wide_v
    assert out.shape == q.shape and out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (out.double() - expected).abs().max() < tolerance
    if lse is not None:
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-3, rtol=0)
    if device == "cuda" and dtype == torch.bfloat16 and width == 128 and last is None:
        assert lse is not None, "selection would have to compute it again"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "width"), [(77, 16), (80, 128), (333, 128)])
@pytest.mark.parametrize("pads", [(0, 40), (5, 60)])
def test_full_attention_of_padded_rows(device, dtype, length, width, pads):
    q, k, v = heads(length, (4, 2), width, dtype, device)
    valid = torch.tensor([[t >= pad for t in range(length)] for pad in pads])
    out, lse = full_attention(q, k, v, valid.to(device))
    expected = reference.attention(q.cpu(), k.cpu(), v.cpu(), valid)
    real = valid[:, None, :, None].expand_as(expected)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.cpu().double()[real], expected[real], atol=tolerance, rtol=0)
    if device == "cuda":
        assert lse is not None, "selection would have to compute it again"
        logits = q.cpu().double() @ k.cpu().double().repeat_interleave(2, 1).mT / width**0.5
        exact = logits.masked_fill(~valid[:, None, None], -torch.inf).logsumexp(-1)
        torch.testing.assert_close(lse.cpu().double()[real[..., 0]], exact[real[..., 0]], atol=1e-3, rtol=0)


def torch_dense(q, k, v, keys=None):
    """What a right FlashAttention-4 gives, of the first `keys` keys."""
    k, v = (x[:, :, :keys].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@pytest.mark.parametrize(
    ("kernel", "agrees"),
    [
        (torch_dense, True),
        (lambda q, k, v: torch_dense(q, k, v, None if q.shape[2] == k.shape[2] else q.shape[2]), False),
        (lambda q, k, v: (torch_dense(q, k, v)[0], torch_dense(q, k, v, -1)[1]), False),
    ],
    ids=["right", "few queries over as few keys", "a log-sum-exp without the last key"],
)
def test_a_flash_attention_that_is_wrong_is_not_taken(kernel, agrees, monkeypatch):
    module = importlib.import_module("sparsed.kernels.full_attention")
    monkeypatch.setattr(module, "flash_dense", kernel)
    assert module._flash_agrees.__wrapped__(torch.device("cpu"), torch.float32, 4, 2, 32) == agrees


@pytest.mark.gpu
def test_gradients_still_flow_on_a_gpu():
    """Training of the demo models goes through these functions."""
    x = torch.randn(2, 9, 32, device="cuda", requires_grad=True)
    weight = torch.ones(32, device="cuda", requires_grad=True)
    total, normed = add_rms_norm(x, 2 * x, weight, 1e-6)
    split = normed.unflatten(-1, (2, 16)).transpose(1, 2)
    out = full_attention(rotate(split, *tables(9, 16, torch.float32, "cuda")), split, split)[0]
    (silu_product(out, out).sum() + total.sum()).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------------------- elementwise


def tables(length, width, dtype, device="cpu", rows=1):
    angles = torch.rand(rows, 1, length, width // 2) * 100
    angles = torch.cat((angles, angles), -1).to(device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def check_elementwise(dtype, device, allowed, kernels=nullcontext):
    """Kernel against twin on the same values; `allowed`: the share of elements that may differ, by one rounding.

    `kernels`: a context in which the functions use their kernels; on a GPU they do anyway.
    """

    def same(got, expected):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        torch.testing.assert_close(got.cpu(), expected, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)
        assert (got.cpu() != expected).float().mean() <= allowed

    def both(function, *tensors):
        """By kernel and by twin; neither may write into what it is given."""
        there = [t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors]
        copies = [t.clone() for t in there if isinstance(t, torch.Tensor)]
        with kernels():
            got = function(*there)
        given = [t for t in there if isinstance(t, torch.Tensor)]
        assert all(torch.equal(*pair) for pair in zip(copies, given, strict=True))
        expected = function(*tensors)
        if isinstance(got, torch.Tensor):
            got, expected = [got], [expected]
        for one, other in zip(got, expected, strict=True):
            same(one, other)
        return got[0]

    for shape in ((2, 40, 64), (1, 50, 100), (1, 5, 1024)):  # thousands of elements, for a share to be counted
        x, update = torch.randn(2, *shape).to(dtype)
        weight = torch.randn(shape[-1]).to(dtype)
        both(rms_norm, x, weight, 1e-5)
        both(silu_product, x, update)
        both(add_rms_norm, x, update, weight, 1e-5)
        both(add_rms_norm, x[:, 1:], update[:, 1:], weight, 1e-5)  # the tail that the last layer computes
    for width, table_dtype, rows in ((16, dtype, 1), (128, torch.float32, 1), (24, dtype, 2)):
        x = torch.randn(2, 19, 3, width).to(dtype).transpose(1, 2)
        cos, sin = tables(19, width, table_dtype, rows=rows)
        for first in (0, 12):
            both(rotate, x[:, :, first:], cos[..., first:, :], sin[..., first:, :])
        assert both(rotate, x, cos, sin).stride() == x.stride(), "heads are merged without a copy"
        check_store(x, cos, sin, device, kernels, same)


def check_store(x, cos, sin, device, kernels, same):
    """Into slots in mid-sequence of a cache that holds something everywhere."""
    slots = torch.arange(11, 11 + x.shape[2])
    caches = []
    for where, context in ((device, kernels), ("cpu", nullcontext)):
        cache = torch.full((2, 2, 60, *x.shape[1:2], x.shape[3]), 7.0, dtype=x.dtype, device=where).transpose(2, 3)
        given = (x, 2 * x[:, :, 1:].roll(1, 2)[:, :, :1].expand_as(x), cos, sin, slots, *cache)
        with context():
            store_rotated(*(t.to(where) for t in given))
        caches.append(cache)
    same(*caches)


INTERPRETED = """
import contextlib
import torch
from tests.helpers.reference import forward
from tests.helpers.sampling_cases import CONFIG
from sparsed.kernels import elementwise
from tests.helpers.standins import tiny_dream, tiny_llada
from tests.kernels.test_kernels import check_elementwise

@contextlib.contextmanager
def kernels():
    twins, elementwise.usable = elementwise.usable, lambda *tensors: True
    yield
    elementwise.usable = twins

check_elementwise(torch.float16, "cpu", 1e-3, kernels)
check_elementwise(torch.float32, "cpu", 1, kernels)

for model in (tiny_dream(), tiny_llada()):
    ids, valid = torch.randint(0, 90, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    valid[1, :3] = False
    with torch.no_grad(), kernels():
        got = model(ids, valid, first_row=6)
    exact, _ = forward(model.family, model.state_dict(), CONFIG[model.family], ids, valid=valid)
    torch.testing.assert_close(got.double(), exact[:, 6:], atol=1e-4, rtol=0)
"""


def test_elementwise_kernels_interpreted():
    interpret(INTERPRETED)


def test_kernels_are_left_where_a_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr(availability, "triton_fault", lambda device: None)
    plain, wanted = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert availability.usable(plain, plain)
    assert not availability.usable(plain, wanted) and not availability.usable(wanted, plain)
    with torch.no_grad():
        assert availability.usable(plain, wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_elementwise_kernels(dtype):
    # sums of squares are added in another order, which now and then tips a rounding
    check_elementwise(dtype, "cuda", 1e-3 if dtype != torch.float32 else 1)
