"""Cached samplers from elsewhere: forwards of all tokens are SparseD's steps, others attend to all that is cached."""

import pytest
import torch
import torch.nn.functional as F

from sparsed import SparseDConfig, llada_generate, sparsify
from tests.helpers.foreign_cases import Twin, cached_sampler
from tests.helpers.patch_cases import build
from tests.helpers.standins import MASK, tiny_dream, tiny_llada
from tests.helpers.standins_cached import CachedHubDream, CachedHubLLaDA

PROMPT_LEN, GEN_LENGTH = 61, 24
CACHES = ["none", "prefix", "dual"]


@pytest.fixture(params=[CachedHubDream, CachedHubLLaDA])
def model(request, weights):
    return build(request.param, weights)


def layers_of(model):
    return sum(hasattr(module, "q_proj") for module in model.modules())


def sampled(model, prompt, config, steps, cache, threshold, **options):
    with sparsify(model, config, steps=steps, gen_length=GEN_LENGTH, **options) as run:
        tokens, whole = cached_sampler(model, prompt, cache, threshold)
    assert run.step == whole, "only forwards of all tokens count"
    return tokens, run


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("cache", CACHES)
def test_the_sampler_s_own_tokens_where_nothing_is_dropped(model, cache, threshold):
    prompt = torch.randint(0, 90, (2, PROMPT_LEN))
    expected, whole = cached_sampler(model, prompt, cache, threshold)
    for config, options in (
        (SparseDConfig(1.0, 0.4, 16), {}),
        (SparseDConfig(0.3, 1.0, 16), {"backend": "gather"}),
    ):
        tokens, run = sampled(model, prompt, config, whole, cache, threshold, **options)
        assert torch.equal(tokens, expected)
        assert run.tally.sparse == (whole - config.n_full(whole) if config.select == 1 else 0)


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("cache", CACHES)
def test_sparse_steps_equal_a_brute_force_twin(model, monkeypatch, cache, threshold):
    prompt, config = torch.randint(0, 90, (1, PROMPT_LEN)), SparseDConfig(0.3, 0.4, 16)
    own, whole = cached_sampler(model, prompt, cache, threshold)
    tokens, run = sampled(model, prompt, config, whole, cache, threshold)
    twin = Twin(layers_of(model), config.n_full(whole), PROMPT_LEN)
    monkeypatch.setattr(F, "scaled_dot_product_attention", twin)
    assert torch.equal(tokens, cached_sampler(model, prompt, cache, threshold)[0])
    assert run.tally.sparse and not torch.equal(tokens, own), "nothing was dropped: no test"


@torch.no_grad()
def test_a_cache_that_dropped_keys_is_an_error(model):
    ids = torch.randint(0, 90, (1, PROMPT_LEN + GEN_LENGTH))
    with sparsify(model, SparseDConfig(0.3, 0.4, 16), steps=9, gen_length=GEN_LENGTH) as run:
        past = model(ids).past
        fewer = [tuple(x[:, :, :40] for x in layer) for layer in past]
        with pytest.raises(ValueError, match=r"8 tokens attend to 48 of the sequence's 85 keys: .* cannot be followed"):
            model(ids[:, -8:], past=fewer)
        assert run.step == 1


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_dream, tiny_llada])
def test_windows_of_this_package_s_models_are_no_steps_either(make):
    """In somebody else's sampler: with full attention over the cache, though blocks are selected."""
    model = make()
    ids = torch.cat((torch.randint(0, 90, (1, 96)), torch.full((1, 32), MASK)), 1)
    cache, rows = model.kv_cache(1, 128), model.rows(96, 104, 128, None)
    with sparsify(model, SparseDConfig(0.2, 0.2, 16), steps=4, gen_length=32) as run:
        for step in range(2):
            ids[0, 96 + step] = step + 1
            model(ids, cache=cache)
        before = [layer.clone() for layer in cache._layers]
        inside = model(ids[:, 96:104], rows=rows, cache=cache)
        assert run.step == 2 and run.density < 0.5
        for layer, was in zip(cache._layers, before, strict=True):
            layer.copy_(was)
    assert torch.equal(inside, model(ids[:, 96:104], rows=rows, cache=cache))


@pytest.mark.parametrize(
    ("saving", "says"), [({"cache": "dual"}, "give sparsify steps=4"), ({"threshold": 0.5}, "give the sampler config=")]
)
def test_own_samplers_whose_steps_sparsify_does_not_count_are_refused(saving, says):
    model, ids = tiny_llada(), torch.randint(0, 90, (1, 60))
    options = {"gen_length": 32, "steps": 32, "block_length": 8}
    with sparsify(model, SparseDConfig(0.2, 0.3, 16), steps=32, gen_length=32), pytest.raises(ValueError, match=says):
        llada_generate(model, ids, **options, **saving)
    with sparsify(model, SparseDConfig(0.2, 0.3, 16), steps=4, gen_length=32) as run:
        inside = llada_generate(model, ids, **options, cache="dual")
    assert run.density < 0.6
    assert torch.equal(inside, llada_generate(model, ids, **options, cache="dual", config=SparseDConfig(0.2, 0.3, 16)))
