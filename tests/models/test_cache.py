"""Rows and a cache: a refresh is the plain forward, a window over it its rows, also in sparse steps."""

import pytest
import torch
from torch import nn

from sparsed import SparseDConfig, sparsify
from sparsed.models.rows import Rows
from sparsed.watching import watched
from tests.helpers import reference
from tests.helpers.patch_cases import published_config
from tests.helpers.standins import tiny_dream, tiny_llada

LENGTH, GEN_LENGTH = 77, 21
MODELS = {
    "dream": tiny_dream,
    "llada": tiny_llada,
    "llada, shared key heads": lambda: tiny_llada(n_kv_heads=2, n_heads=4, d_model=128),
}
WINDOWS = [(0, LENGTH), (0, 1), (5, 40), (16, 48), (31, 33), (LENGTH - 21, LENGTH), (LENGTH - 1, LENGTH)]


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(params=[(0,), (0, 9, 33)], ids=["one row", "left padding"])
def sequences(request):
    """(ids [B, T], its mask or None)."""
    pads = request.param
    valid = torch.tensor([[t >= pad for t in range(LENGTH)] for pad in pads])
    return torch.randint(0, 90, valid.shape), None if valid.all() else valid


def window_of(model, ids, mask, start, stop, cache, **options):
    rows = model.rows(start, stop, ids.shape[1], mask)
    return model(ids[:, start:stop], mask, rows=rows, cache=cache, **options)


def real(mask, ids):
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask


@torch.no_grad()
@pytest.mark.parametrize(("start", "stop"), WINDOWS)
def test_a_window_over_a_fresh_cache_is_the_plain_rows(model, sequences, start, stop):
    ids, mask = sequences
    plain, cache = model(ids, mask), model.kv_cache(*ids.shape)
    assert torch.equal(model(ids, mask, cache=cache), plain), "a refresh is the plain forward"
    out = window_of(model, ids, mask, start, stop, cache)
    kept = real(mask, ids)[:, start:stop]
    torch.testing.assert_close(out[kept], plain[:, start:stop][kept], atol=1e-5, rtol=0)
    # from a row on, and some rows, by their places in the whole sequence
    first = (start + stop) // 2
    torch.testing.assert_close(
        window_of(model, ids, mask, start, stop, cache, first_row=first), out[:, first - start :], atol=1e-5, rtol=0
    )
    places = torch.tensor([first, (len(ids) - 1) * LENGTH + stop - 1])
    some = window_of(model, ids, mask, start, stop, cache, first_row=first, logit_rows=places)
    torch.testing.assert_close(some, torch.stack([out[0, first - start], out[-1, -1]]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_window_writes_its_own_keys_and_leaves_the_others(model, sequences):
    """Other tokens in the window: the others' keys stay those of the refresh, as in a cached sampler."""
    ids, mask = sequences
    changed, start, stop = ids.clone(), 30, 52
    changed[:, start:stop] = torch.randint(0, 90, changed[:, start:stop].shape)
    cache, fresh = model.kv_cache(*ids.shape), model.kv_cache(*ids.shape)
    model(ids, mask, cache=cache)
    before = [layer.clone() for layer in cache._layers]
    out = window_of(model, changed, mask, start, stop, cache)
    model(changed, mask, cache=fresh)
    outside = torch.ones(LENGTH, dtype=torch.bool)
    outside[start:stop] = False
    for index, (now, then, other) in enumerate(zip(cache._layers, before, fresh._layers, strict=True)):
        assert torch.equal(now[:, :, :, outside], then[:, :, :, outside])
        assert not torch.equal(now[:, :, :, start:stop], then[:, :, :, start:stop])
        if index == 0:  # deeper ones have seen the others' stale states
            torch.testing.assert_close(now[:, :, :, start:stop], other[:, :, :, start:stop], atol=1e-5, rtol=0)
    again = window_of(model, changed, mask, start, stop, cache)
    torch.testing.assert_close(again, out, atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dense_answer", [False, True])
@pytest.mark.parametrize(("start", "stop"), WINDOWS)
def test_a_sparse_window_is_masked_attention(model, sequences, start, stop, dense_answer):
    """Against the float64 twin under the patterns' own masks, after a refresh that was sparse as well."""
    ids, mask = sequences
    patterns, config = [], SparseDConfig(0, 0.4, 16, dense_answer=dense_answer)
    rule = watched(lambda scores, pattern: patterns.append(pattern))
    cache = model.kv_cache(*ids.shape)
    with sparsify(model, config, steps=3, gen_length=GEN_LENGTH, rule=rule) as run, run.sequence(ids.shape):
        for _ in range(2):  # one that selects, with full attention, and a sparse one
            model(ids, mask, cache=cache)
        out = window_of(model, ids, mask, start, stop, cache)
        assert run.step == 3 and len(patterns) == sum(1 for m in model.modules() if hasattr(m, "attend"))
    allowed = [reference.expand(pattern.as_mask(), 16, LENGTH) for pattern in patterns]
    if dense_answer:
        allowed = [reference.dense_rows(layer, LENGTH - GEN_LENGTH) for layer in allowed]
    config = published_config(model.family) | vars(model.config)
    expected, _ = reference.forward(model.family, model.state_dict(), config, ids, real(mask, ids), allowed)
    kept = real(mask, ids)[:, start:stop]
    torch.testing.assert_close(out[kept].double(), expected[:, start:stop][kept], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_window_does_not_choose(model):
    """Where blocks are wanted and none selected yet, it has full attention; the next whole forward selects."""
    ids = torch.randint(0, 90, (1, LENGTH))
    cache, plain = model.kv_cache(1, LENGTH), model(ids)
    with sparsify(model, SparseDConfig(0, 0.4, 16), steps=9, gen_length=GEN_LENGTH) as run, run.sequence(ids.shape):
        model(ids[:, :50])  # of another sequence: no step
        assert run.step == 0
        with run.uncounted():
            model(ids, cache=cache)
        run.reset()
        out = window_of(model, ids, None, 20, 60, cache)
        torch.testing.assert_close(out, plain[:, 20:60], atol=1e-5, rtol=0)
        assert run.step == 1 and run.density is None
        model(ids, cache=cache)
        assert run.density is not None and run.phase == "sparse"


@torch.no_grad()
def test_a_window_does_not_begin_a_generation(model):
    """Outside a told sequence: whole forwards alone are counted, and what comes after a window stays sparse."""
    ids, cache = torch.randint(0, 90, (1, LENGTH)), model.kv_cache(1, LENGTH)
    with sparsify(model, SparseDConfig(0, 0.4, 16), steps=3, gen_length=GEN_LENGTH) as run:
        for _ in range(3):
            model(ids, cache=cache)
        for _ in range(2):
            window_of(model, ids, None, 20, 60, cache)
            assert (run.step, run.phase) == (3, "sparse")
        model((ids + 1) % 90, cache=cache)
        assert run.step == 1, "a whole forward of other tokens begins the next one"


@torch.no_grad()
def test_a_window_that_a_part_makes_itself_is_an_error(model):
    """`sparsify` would take its tokens for a shorter sequence."""
    ids, cache = torch.randint(0, 90, (1, LENGTH)), model.kv_cache(1, LENGTH)
    with sparsify(model.model, SparseDConfig(0, 0.4, 16), steps=3, gen_length=GEN_LENGTH):
        model(ids, cache=cache)
        with pytest.raises(ValueError, match="`rows` must be an argument of the model that was given to sparsify"):
            window_of(model, ids, None, 20, 60, cache)


@torch.no_grad()
def test_a_refresh_that_failed_does_not_count(model):
    """Its first layers hold the new tokens' keys, its last ones the old ones'."""
    ids, cache = torch.randint(0, 90, (2, LENGTH)), model.kv_cache(1, LENGTH)
    model(ids[:1], cache=cache)
    last = [module for module in model.modules() if hasattr(module, "attend")][-1]
    hook = last.k_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids[1:], cache=cache)
    hook.remove()
    with pytest.raises(ValueError, match="the cache is not filled"):
        window_of(model, ids[1:], None, 20, 60, cache)
    plain = model(ids[1:], cache=cache)
    out = window_of(model, ids[1:], None, 20, 60, cache)
    torch.testing.assert_close(out, plain[:, 20:60], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_traced_window_serves_others_of_its_size(model, sequences):
    """What a CUDA graph reads are the tensors of `Rows`: traced over one window, the forward is right for another."""
    from torch.fx.experimental.proxy_tensor import make_fx

    ids, mask = sequences
    cache = model.kv_cache(*ids.shape)
    plain = model(ids, mask, cache=cache)

    def forward(tokens, slots, positions, places):
        rows = Rows(16, 26, LENGTH, slots, positions)
        return model(tokens, mask, rows=rows, cache=cache, first_row=18, logit_rows=places)

    def given(start):
        rows = model.rows(start, start + 10, LENGTH, mask)
        places = torch.tensor([start + 2, start + 5, (len(ids) - 1) * LENGTH + start + 9])
        return (ids[:, start : start + 10].clone(), rows.slots, rows.positions, places), places

    traced = make_fx(forward)(*given(16)[0])
    inputs, places = given(50)
    torch.testing.assert_close(traced(*inputs), plain.flatten(0, 1)[places], atol=1e-5, rtol=0)


def test_a_cache_is_as_large_as_it_says(model):
    config, cache = model.config, model.kv_cache(3, LENGTH)
    sizes = config.sizes
    assert cache.bytes == 2 * sizes.layers * 3 * LENGTH * sizes.kv_width * 4 and cache.shape == (3, LENGTH)
    assert model.bfloat16().kv_cache(3, LENGTH).bytes == cache.bytes // 2


def test_dream_s_positions_are_each_row_s_own():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    rows = tiny_dream().rows(1, 4, 5, mask)
    assert rows.positions.tolist() == [[1, 0, 1], [1, 2, 3]] and rows.slots.tolist() == [1, 2, 3]
    assert tiny_llada().rows(1, 4, 5, mask).positions.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (4, 3), (0, 6), (5, 6)])
def test_rows_that_are_not_there(start, stop):
    with pytest.raises(ValueError, match="rows must be some of the sequence's 5"):
        Rows.of(start, stop, torch.arange(5)[None])


WRONG = {
    "no cache": (lambda m, ids: m(ids[:, 3:9], rows=m.rows(3, 9, LENGTH, None)), "need a cache"),
    "other ids": (
        lambda m, ids: m(ids, rows=m.rows(3, 9, LENGTH, None), cache=m.kv_cache(1, LENGTH)),
        "the 6 tokens of rows",
    ),
    "empty": (
        lambda m, ids: m(ids[:, 3:9], rows=m.rows(3, 9, LENGTH, None), cache=m.kv_cache(1, LENGTH)),
        "the cache is not filled",
    ),
    "other length": (
        lambda m, ids: m(ids[:, 3:9], rows=m.rows(3, 9, LENGTH, None), cache=m.kv_cache(1, 50)),
        r"the cache is of sequences \[1, 50\]",
    ),
    "longer mask, no rows": (
        lambda m, ids: m(ids, torch.ones(1, 90), cache=m.kv_cache(1, 90)),
        r"attention_mask must be \[1, 77\]",
    ),
    "mask of another length": (
        lambda m, ids: m.rows(3, 9, LENGTH, torch.ones(1, 50)),
        r"attention_mask must be \[batch, 77\]",
    ),
    "other batch": (lambda m, ids: m(ids, cache=m.kv_cache(2, LENGTH)), r"the cache is of sequences \[2, 77\]"),
    "mask of the window": (
        lambda m, ids: m(ids[:, 3:9], torch.ones(1, 6), rows=m.rows(3, 9, LENGTH, None), cache=m.kv_cache(1, LENGTH)),
        r"attention_mask must be \[1, 77\], that of the whole",
    ),
    "first_row": (
        lambda m, ids: m(ids[:, 3:9], rows=m.rows(3, 9, LENGTH, None), cache=m.kv_cache(1, LENGTH), first_row=9),
        "first_row must be one of the rows 3 to 8",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit(model, wrong):
    call, line = WRONG[wrong]
    with pytest.raises(ValueError, match=line):
        call(model, torch.randint(0, 90, (1, LENGTH)))


class Adapted(nn.Module):
    """As an adapter: the layer is inside, under another name."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_a_cache_takes_what_the_layers_give(model, autocast):
    """Whatever their weights are called, and whatever they are stored in."""
    ids = torch.randint(0, 90, (1, LENGTH))
    for module in list(model.modules()):
        if hasattr(module, "k_proj"):
            module.k_proj = Adapted(module.k_proj)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, cache = model(ids), model.kv_cache(1, LENGTH)
        assert torch.equal(model(ids, cache=cache), plain)
        out = window_of(model, ids, None, 30, 40, cache)
        torch.testing.assert_close(out, plain[:, 30:40], atol=5e-2 if autocast else 1e-5, rtol=0)
    assert {layer.dtype for layer in cache._layers} == {torch.bfloat16 if autocast else torch.float32}
