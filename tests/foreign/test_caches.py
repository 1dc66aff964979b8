"""Cached samplers from elsewhere: forwards of all tokens are SparseD's steps, others attend to all that is cached."""

import pytest
import torch
import torch.nn.functional as F

from sparsed import SparseDConfig, sparsify
from tests.helpers.foreign_cases import Twin, cached_sampler
from tests.helpers.patch_cases import build
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
