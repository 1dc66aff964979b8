"""What a step trains on: masks, weights, lengths; and its learning rate."""

import numpy as np
import torch

from demo.real.batches import masked
from tests.helpers.real_recipe import recipe


def test_masked_tokens_are_targets_and_weigh_what_makes_the_bound_unbiased():
    tokens = torch.randint(4, 100, (64, 256))
    seen = 0.0
    for seed in range(20):
        batch = masked(tokens, 3, 0.25, torch.Generator().manual_seed(seed))
        places = (batch.ids == 3).nonzero()
        assert (places[:, 1] > 0).all() and torch.equal(places[:, 0] * 256 + places[:, 1] - 1, batch.rows)
        assert torch.equal(tokens[places[:, 0], places[:, 1]], batch.targets)
        assert torch.equal(torch.where(batch.ids == 3, tokens, batch.ids), tokens)
        assert batch.weights.min() >= 1 and batch.weights.max() <= 50.01
        seen += batch.weights.sum().item() / batch.places / 20
    assert abs(seen - 1) < 0.03  # a token that may be masked counts once on average


def test_rates_spread_evenly_and_spans_leave_the_rest_clean():
    tokens = torch.full((400, 512), 9)
    share = (masked(tokens, 3, 0.0, torch.Generator().manual_seed(0)).ids == 3).float().mean(1).sort().values
    assert (share - torch.linspace(0.02, 1, 400)).abs().max() < 0.08
    spans = masked(tokens, 3, 1.0, torch.Generator().manual_seed(0)).ids == 3
    for row in spans[spans.any(1)]:
        first, last = row.nonzero()[[0, -1], 0].tolist()
        assert last - first < 257
    assert spans.any(1).float().mean() > 0.95 and spans.float().mean() < 0.2


def test_steps_mix_lengths_from_the_first_on_and_are_drawn_anew():
    ids = np.arange(4, 2000, dtype=np.uint16)
    counts = {32: 0, 64: 0}
    for step in range(50):
        batches = recipe().batches(ids, step, 3)
        assert len(batches) == 4
        for batch in batches:
            count, length = batch.ids.shape
            counts[length] += 1
            assert count * length == 128
    assert 110 < counts[32] < 155
    one, again, other = (recipe().batches(ids, step, 3)[0] for step in (7, 7, 8))
    assert torch.equal(one.ids, again.ids) and not (
        one.ids.shape == other.ids.shape and torch.equal(one.ids, other.ids)
    )


def test_the_rate_rises_and_falls():
    rates = [recipe(steps=100, warmup=10).rate(step) for step in range(100)]
    assert rates.index(max(rates)) == 9 and rates[0] < 0.0011 and rates[-1] < 2.2 * 0.02 * 1e-2
