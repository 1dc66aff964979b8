"""The Monte Carlo estimate of a target's log-likelihood, against brute force in float64 and exact probabilities."""

import copy
import math

import pytest
import torch

from sparsed import SparseDConfig
from sparsed.sampling.likelihood import draw_masks, is_greedy, log_likelihood
from tests.helpers.sampling_cases import GENERATE, inputs_of
from tests.helpers.standins import EOS, MASK, VOCAB

PROMPT, TARGET = list(range(5, 45)), [3, 1, 4, 15, 9, 2, 6]


@pytest.fixture
def model(request, family):
    return request.getfixturevalue(family)


def seeded():
    return torch.Generator().manual_seed(3)


def brute_force(model, prompt, target, masks):
    """The estimate with loops in float64: one whole forward a draw, probabilities by the definition of softmax."""
    twin = copy.deepcopy(model).double()
    total = 0.0
    for mask in masks.tolist():
        seen = [MASK if hides else token for token, hides in zip(target, mask, strict=True)]
        logits = twin(torch.tensor([prompt + seen]))[0]
        loss = 0.0
        for place, hides in enumerate(mask):
            if hides:
                row = len(prompt) + place - (1 if model.family == "dream" else 0)
                loss -= logits[row, target[place]].item() - math.log(logits[row].exp().sum().item())
        total += loss * len(target) / sum(mask)
    return -total / len(masks)


@torch.no_grad()
def test_the_estimate_is_brute_forces(model):
    masks = draw_masks(12, len(TARGET), seeded())
    expected = brute_force(model, PROMPT, TARGET, masks)
    assert log_likelihood(model, PROMPT, TARGET, samples=12, generator=seeded()) == pytest.approx(expected, rel=1e-5)


def table_model(model, monkeypatch):
    """The model with logits that do not look at its input: one row of a table for each place. Returns the table."""
    table = torch.randn(len(PROMPT) + len(TARGET), VOCAB)
    monkeypatch.setattr(model, "forward", lambda ids, mask, *, logit_rows, first_row: table[logit_rows])
    return table


def exact(model, table, target):
    first = len(PROMPT) - (model.family == "dream")
    return sum(table[first + i].log_softmax(-1)[token].item() for i, token in enumerate(target))


def test_blind_models_are_estimated_without_bias(model, monkeypatch):
    """Where tokens do not depend on each other, the exact log-probability is expected; a lone one needs no luck."""
    table = table_model(model, monkeypatch)
    one = log_likelihood(model, PROMPT, TARGET[:1], samples=3, generator=seeded())
    assert one == pytest.approx(exact(model, table, TARGET[:1]), rel=1e-6)
    estimates = torch.tensor(
        [
            log_likelihood(model, PROMPT, TARGET, samples=8, generator=torch.Generator().manual_seed(i))
            for i in range(300)
        ]
    )
    error = estimates.std().item() / math.sqrt(len(estimates))
    assert 0 < error < 0.3
    assert estimates.mean().item() == pytest.approx(exact(model, table, TARGET), abs=4 * error)


def test_the_draws_hide_every_number_of_tokens_alike():
    masks = draw_masks(35, 7, seeded())
    hidden = masks.sum(-1)
    assert hidden.tolist() == sorted(hidden.tolist(), reverse=True)
    assert torch.bincount(hidden, minlength=8).tolist() == [0] + [5] * 7
    # of few draws, each is uniform all the same, and so is every place
    many = torch.cat([draw_masks(3, 7, torch.Generator().manual_seed(i)) for i in range(2000)])
    counts = torch.bincount(many.sum(-1), minlength=8)[1:] / len(many)
    assert counts.tolist() == pytest.approx([1 / 7] * 7, abs=0.02)
    assert many.float().mean(0).tolist() == pytest.approx([4 / 7] * 7, abs=0.02)


@pytest.mark.parametrize("config, forwards", [(None, 1), (SparseDConfig(0.5, 0.3, 16), 3)])
def test_a_lone_token_takes_one_forward_of_each_kind(model, config, forwards):
    """Full, selecting the blocks, sparse."""
    with inputs_of(model) as seen:
        log_likelihood(model, PROMPT, [7], samples=10, generator=seeded(), config=config, backend="gather")
    assert len(seen) == forwards


@torch.no_grad()
def test_repeated_draws_count_as_steps(model):
    """The estimate of a lone token is the mean of its full and its sparse loss, by their steps."""
    options = {"generator": seeded(), "backend": "gather"}
    full = log_likelihood(model, PROMPT, [7], samples=1, **options)
    half, most = (
        log_likelihood(model, PROMPT, [7], samples=10, config=SparseDConfig(skip, 0.3, 16), **options)
        for skip in (0.5, 0.1)
    )
    sparse = 2 * half - full
    assert sparse != pytest.approx(full, abs=1e-4)
    assert most == pytest.approx(0.1 * full + 0.9 * sparse, rel=1e-5)


@pytest.mark.parametrize("config", [None, SparseDConfig(0.2, 0.5, 16)])
def test_greedy_is_what_the_sampler_writes(model, config):
    """LLaDA's sampler with one block and a token a step; Dream's own schedule may commit two, so by its first token."""
    length = 6 if model.family == "llada" else 1
    options = {"block_length": length} if model.family == "llada" else {}
    ids = torch.tensor([PROMPT])
    out = GENERATE[model.family](model, ids, gen_length=length, steps=length, config=config, **options)
    written = out[0, len(PROMPT) :].tolist()
    assert is_greedy(model, PROMPT, written, config=config)
    for place in range(length):
        other = [(token + 1) % EOS if i == place else token for i, token in enumerate(written)]
        assert not is_greedy(model, PROMPT, other, config=config)


@pytest.mark.parametrize("prompt, target", [([], [1]), ([1], []), ([1], [MASK]), ([MASK], [1]), ([1], [VOCAB])])
def test_what_has_no_likelihood_is_refused(model, prompt, target):
    with pytest.raises(ValueError):
        log_likelihood(model, prompt, target, samples=2, generator=seeded())
    with pytest.raises(ValueError):
        is_greedy(model, prompt, target)


def test_the_samples_are_a_positive_number(model):
    with pytest.raises(ValueError, match="samples"):
        log_likelihood(model, PROMPT, TARGET, samples=0, generator=seeded())
