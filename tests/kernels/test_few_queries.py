"""Attention of few queries over split keys, against float64."""

import importlib

import pytest
import torch

from sparsed.kernels import full_attention, full_attention_kernel
from tests.helpers import reference
from tests.helpers.interpreter import interpret
from tests.helpers.standins import tiny_dream, tiny_llada

full_attention_module = importlib.import_module("sparsed.kernels.full_attention")
# logits reach some hundreds, where float32 rounds to 1e-5
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check_few_queries(device, dtype, batch, heads, queries, keys, width, pads=None):
    """On keys as a cache holds them, which begin with padding; NaN wherever nothing was written."""
    from sparsed.kernels.few_queries_triton import few_queries_attention

    q = torch.randn(batch, queries, heads[0], width).to(device, dtype).transpose(1, 2)
    k, v = torch.randn(2, batch, keys, heads[1], width).to(device, dtype).transpose(2, 3)
    k[:, :, 5] *= 20  # one key outweighs all others of other splits
    valid = None if pads is None else torch.tensor([[t >= pad for t in range(keys)] for pad in pads])
    out = few_queries_attention(q, k, v, None if valid is None else valid.to(device))
    assert out.shape == q.shape and out.dtype == dtype
    expected = reference.attention(q.cpu(), k.cpu(), v.cpu(), valid)
    if pads is not None:
        empty = torch.tensor(pads) >= keys
        assert (out[empty.to(device)] == 0).all(), "no key, no attention"
        out, expected = out[~empty.to(device)], expected[~empty]
    assert (out.cpu().double() - expected).abs().max() < TOLERANCE[dtype]


CASES = [
    (1, (2, 2), 32, 600, 32, None),
    (1, (3, 1), 9, 2100, 16, None),  # many short splits
    (2, (4, 2), 20, 700, 24, (0, 300)),  # padding beyond the first split
    (2, (4, 2), 3, 64, 16, (1, 64)),
    (1, (2, 2), 1, 65, 128, None),
]

INTERPRETED = """
import torch
from tests.kernels.test_few_queries import CASES, check_few_queries
for dtype, cases in ((torch.float32, CASES), (torch.float16, CASES[:4:3])):  # by threads, and by the copy engine
    for case in cases:
        check_few_queries("cpu", dtype, *case)
"""


def test_interpreted():
    interpret(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        (1, (32, 32), 32, 5000, 128, None),
        (1, (28, 4), 33, 33000, 128, None),
        (2, (28, 4), 129, 4000, 128, (0, 2000)),
    ],
)
def test_on_a_gpu(case, dtype):
    check_few_queries("cuda", dtype, *case)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "kernel"),
    [
        ((32, 32), 32, 4000, "split"),
        ((28, 4), 257, 4000, "split"),
        ((32, 32), 257, 4000, "torch"),
        ((4, 4), 64, 64, "torch"),
    ],
)
def test_which_kernel_is_taken(heads, queries, keys, kernel):
    """That of few queries where they would leave multiprocessors idle, and never for all queries of a sequence."""
    q, k, v = (
        torch.randn(1, n, t, 128, device="cuda") for n, t in ((heads[0], queries), (heads[1], keys), (heads[1], keys))
    )
    for padded in (False, True):
        assert full_attention_kernel(q, k, v, padded) == kernel
    with torch.enable_grad():
        assert full_attention_kernel(q.requires_grad_(), k, v, False) == "torch"


def test_no_kernel_of_ours_without_a_gpu():
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 30, 16)
    assert full_attention_kernel(q, k, k, False) == "torch"


@pytest.mark.parametrize("make", [tiny_dream, tiny_llada])
def test_a_model_asks_with_its_own_shapes(make, monkeypatch):
    model, asked = make(), []
    common = importlib.import_module("sparsed.models.common")
    monkeypatch.setattr(common, "full_attention_kernel", lambda *given: asked.append(given) or "torch")
    model.attention_kernel(2, 33, 4000)
    ((q, k, v, padded),) = asked
    with torch.no_grad():
        cache = model.kv_cache(2, 40)
        model(torch.zeros(2, 40, dtype=torch.long), cache=cache)
    held = cache._layers[0][0]
    assert k.shape == v.shape == (*held.shape[:2], 4000, held.shape[3]) and not padded
    assert q.shape == (2, model.config.sizes.heads, 33, held.shape[3]) and q.dtype == held.dtype


def without_last_key(q, k, v, valid):
    return full_attention(q, k[:, :, :-1], v[:, :, :-1], None if valid is None else valid[:, :-1])[0]


@pytest.mark.parametrize("tile", [16, 32, 64])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("kernel", "agrees"),
    [
        (lambda q, k, v, valid: full_attention(q, k, v, valid)[0], True),
        (without_last_key, False),
        (lambda q, k, v, valid: 1 / 0, False),
    ],
    ids=["right", "without the last key", "does not run"],
)
def test_a_kernel_that_is_wrong_is_not_taken(kernel, agrees, padded, tile, monkeypatch):
    monkeypatch.setattr(full_attention_module, "few_queries_attention", kernel)
    asked = full_attention_module._split_agrees.__wrapped__
    assert asked(torch.device("cpu"), torch.float32, 4, 2, 32, padded, tile) == agrees


@pytest.mark.parametrize("padded", [False, True])
def test_padding_that_is_read_is_noticed(padded, monkeypatch):
    unpadded = lambda q, k, v, valid: full_attention(q, k, v)[0]  # noqa: E731
    monkeypatch.setattr(full_attention_module, "few_queries_attention", unpadded)
    asked = full_attention_module._split_agrees.__wrapped__
    assert asked(torch.device("cpu"), torch.float32, 4, 2, 32, padded, 64) != padded
