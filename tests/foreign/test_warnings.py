"""Where nothing of a sampler from elsewhere was sparse, one warning at the end of the context says why."""

import warnings

import pytest
import torch

from sparsed import SparseDConfig, sparsify
from sparsed.evaluation.methods import METHODS
from tests.helpers.foreign_cases import cached_sampler
from tests.helpers.patch_cases import build
from tests.helpers.sampling_cases import GENERATE, options_of
from tests.helpers.standins import MASK, HubDream, tiny_llada
from tests.helpers.standins_cached import CachedHubDream
from tests.helpers.standins_llada import HubLLaDA

GEN_LENGTH = 24
IDS = torch.arange(96)[None] % 90
IDS[:, -GEN_LENGTH:] = MASK


@pytest.fixture(params=[HubDream, HubLLaDA])
def model(request, weights):
    return build(request.param, weights)


def warned(model, config, sample, steps=10, **options):
    """The one line that came at the end of a context around a sampler, and from this file; None if none came."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with torch.no_grad(), sparsify(model, config, steps=steps, gen_length=GEN_LENGTH, **options):
            sample()
    assert len(seen) < 2 and all(one.filename == __file__ for one in seen)
    return str(seen[0].message) if seen else None


SPARSE = SparseDConfig(0.2, 0.4, 16)


def test_attention_that_was_replaced_inside(weights):
    model = build(HubDream, weights)

    def sample():
        for layer in model.model.layers:
            layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None, None)
        for _ in range(10):
            model(IDS, "full")

    assert "attention was replaced" in warned(model, SPARSE, sample)


def test_a_length_that_changes_in_every_forward(model):
    line = warned(model, SPARSE, lambda: [model(IDS[:, step:]) for step in range(10)])
    assert "each of the 10 forwards began a generation" in line


def test_every_block_is_kept(model):
    """The sequence is shorter than it takes; blocks that were asked for are no surprise."""
    line = warned(model, SparseDConfig(0.2, 0.3, 128), lambda: [model(IDS) for _ in range(10)])
    assert "every block is kept" in line
    assert warned(model, SparseDConfig(0.2, 1.0, 16), lambda: [model(IDS) for _ in range(10)]) is None


def test_fewer_forwards_than_full_steps(model):
    line = warned(model, SPARSE, lambda: [model(IDS) for _ in range(3)], steps=100)
    assert line.endswith("no more whole forwards (3) than have full attention (20 of `steps` 100)")


def test_a_cached_sampler_whose_steps_were_told(weights):
    """They are its forwards of all tokens."""
    model = build(CachedHubDream, weights)
    line = warned(model, SPARSE, lambda: cached_sampler(model, IDS[:, :-GEN_LENGTH], "dual"), steps=24)
    assert "forwards (3) than have full attention (5 of `steps` 24); 18 more computed some of their tokens" in line


def test_forwards_of_some_tokens_alone(weights):
    """Against a cache that was filled outside."""
    model = build(CachedHubDream, weights)
    with torch.no_grad():
        past = model(IDS).past
    line = warned(model, SPARSE, lambda: [model(IDS[:, -8:], [tuple(x[:, :, :88] for x in one) for one in past])])
    assert "every forward computed only some of its tokens" in line


def test_another_model_was_called(model):
    assert "no forward of the model" in warned(model, SPARSE, lambda: None)


def test_nothing_to_say(model):
    """A sparse step was there, none was wanted, or the package's own sampler ran, which says itself what ran."""
    assert warned(model, SPARSE, lambda: [model(IDS) for _ in range(3)]) is None
    assert warned(model, SparseDConfig(1.0, 0.4, 16), lambda: [model(IDS) for _ in range(10)]) is None
    assert warned(model, SPARSE, lambda: model(IDS), rule=METHODS["window"].rule) is None, "it selects without scores"
    own = tiny_llada()
    options = options_of("llada", {"gen_length": GEN_LENGTH, "steps": 6})
    assert warned(own, SPARSE, lambda: GENERATE["llada"](own, IDS[:, :40], **options), steps=100) is None
