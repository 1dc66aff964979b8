"""Masks that people bring: padding on the left is computed, whatever else differs from query to query is refused."""

from types import SimpleNamespace

import pytest
import torch

from sparsed import SparseDConfig, sparsify
from tests.helpers.patch_cases import build
from tests.helpers.standins import HubDream
from tests.helpers.standins_llada import HubLLaDA

LENGTH, GEN_LENGTH = 96, 24
PLACES = torch.arange(LENGTH)
CAUSAL = PLACES[:, None] >= PLACES
BY_QUERY = {
    "causal": CAUSAL,
    "block-causal": PLACES[:, None] // 32 >= PLACES // 32,
    "packed": PLACES[:, None] // 48 == PLACES // 48,
    "sliding": (PLACES[:, None] - PLACES).abs() < 20,
}
WEIGHING = {
    "ALiBi": -0.1 * (PLACES[:, None] - PLACES).abs(),
    "a key's weight": 0.1 * (PLACES % 7).expand(LENGTH, LENGTH),
}


class BiasedLLaDA(HubLLaDA):
    """The hub's class takes an additive attention_bias [B, 1, T, T]; each layer gets a view of its own."""

    def forward(self, input_ids, attention_bias=None):
        parts = self.model.transformer
        x = parts["wte"](input_ids)
        for block in parts["blocks"]:
            x, _ = block(x, None if attention_bias is None else attention_bias[:, :, :LENGTH, :LENGTH])
        return SimpleNamespace(logits=parts["ff_out"](parts["ln_f"](x)))


@pytest.fixture(params=[HubDream, BiasedLLaDA])
def model(request, weights):
    return build(request.param, weights)


def additive(allowed):
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def sparsed(model, **changes):
    """The first forward selects, the next ones are sparse."""
    return sparsify(model, SparseDConfig(0.0, 0.5, 16), **{"steps": 4, "gen_length": GEN_LENGTH} | changes)


@pytest.fixture
def ids():
    return torch.randint(0, 90, (2, LENGTH))


@torch.no_grad()
@pytest.mark.parametrize("kind", BY_QUERY)
def test_a_mask_that_differs_from_query_to_query(model, ids, kind):
    """Dream's is bool."""
    mask = BY_QUERY[kind][None, None]
    with pytest.raises(ValueError, match="differs from query to query"), sparsed(model):
        model(ids, mask if isinstance(model, HubDream) else additive(mask))


@torch.no_grad()
def test_a_mask_that_differs_from_head_to_head(model, ids):
    heads = next(
        module.q_proj.out_features // module.head_dim for module in model.modules() if hasattr(module, "q_proj")
    )
    mask = torch.ones(1, heads, 1, LENGTH, dtype=torch.bool)
    mask[0, 0, 0, 10:20] = False
    with pytest.raises(ValueError, match="differs from query to query"), sparsed(model):
        model(ids, additive(mask))


@torch.no_grad()
@pytest.mark.parametrize("kind", WEIGHING)
def test_a_mask_that_weighs(model, ids, kind):
    with pytest.raises(ValueError, match="weighs keys"), sparsed(model):
        model(ids, WEIGHING[kind][None, None])


@torch.no_grad()
def test_a_mask_that_comes_after_the_blocks_were_selected(model, ids):
    """And one that has changed in place."""
    padded = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    padded[1, :, :, :5] = False
    mask = additive(torch.ones_like(padded))
    with sparsed(model):
        model(ids, mask), model(ids, mask), model(ids)
        mask.copy_(additive(padded))
        for other, line in ((mask, "is not the one with which"), (additive(CAUSAL[None, None]), "differs from query")):
            with pytest.raises(ValueError, match=line):
                model(ids, other)
        model(ids)
    with sparsed(model), pytest.raises(ValueError, match="is not the one with which"):
        model(ids, additive(padded)), model(ids)


@torch.no_grad()
def test_a_layer_with_a_mask_of_its_own(weights, ids):
    """Some models let every other layer slide."""
    model = build(HubDream, weights)
    last, sliding = model.model.layers[-1].self_attn, BY_QUERY["sliding"][None, None]
    last.register_forward_pre_hook(lambda _, args, named: (args, named | {"attention_mask": sliding}), with_kwargs=True)
    with pytest.raises(ValueError, match="differs from query"), sparsed(model):
        model(ids, "full")


# -------------------------------------------------------------------------------------------------------------- padding


@torch.no_grad()
@pytest.mark.parametrize("kind", [HubDream, HubLLaDA])
@pytest.mark.parametrize("heard", [True, False], ids=["honoured", "ignored"])
def test_padding_on_the_right_is_refused(weights, ids, kind, heard):
    """The short row's answer would pass for prompt, also where the model ignores the mask."""
    model = build(kind, weights)
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, -10:] = 0
    if not heard:
        plain = model.forward
        model.forward = lambda input_ids, attention_mask=None: plain(input_ids)
    mask = real.bool()[:, None, None] if kind is HubDream and heard else real
    with pytest.raises(ValueError, match="padded on the right"), sparsed(model):
        model(ids, attention_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("kind", [HubDream, HubLLaDA])
def test_padding_on_the_left_is_computed_in_every_step(weights, ids, kind):
    model = build(kind, weights)
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, :21] = 0
    mask = (real[:, None, :, None] & real[:, None, None]).bool() if kind is HubDream else real
    expected = model(ids, attention_mask=mask).logits
    with sparsify(model, SparseDConfig(0.0, 1.0, 16), steps=4, gen_length=GEN_LENGTH, backend="gather") as run:
        for step in range(3):
            found = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(found[real.bool()], expected[real.bool()], atol=1e-4, rtol=0)
            assert step or torch.equal(found, expected), "the forward that selects has the model's own attention"
        assert run.phase == "sparse"
