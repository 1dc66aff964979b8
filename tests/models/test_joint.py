"""Linear layers as one product: the same numbers, and only where nothing else would be called."""

import copy

import pytest
import torch
from torch import nn

from sparsed.models.joint import JOINT_ROWS, joint_product, lay_projections_together, lay_together
from tests.helpers.standins import tiny_dream, tiny_llada


def three(bias):
    layers = [nn.Linear(24, width, bias=bias) for width in (24, 8, 8)]
    before = [copy.deepcopy(layer) for layer in layers]
    lay_together(layers)
    return layers, before


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_is_all_of_them(bias):
    layers, before = three(bias)
    x = torch.randn(2, 5, 24)
    joint = joint_product(x, layers)
    for part, layer, old in zip(joint, layers, before, strict=True):
        assert torch.equal(layer.weight, old.weight), "the values stay"
        torch.testing.assert_close(part, old(x))


def test_changed_weights_are_read():
    layers, _ = three(True)
    layers[1].weight.mul_(2)
    layers[2].bias.add_(1)
    x = torch.randn(2, 5, 24)
    for part, layer in zip(joint_product(x, layers), layers, strict=True):
        torch.testing.assert_close(part, layer(x))


class Adapted(nn.Linear):
    """As an adapter's layer: its result is more than its weight's."""


def replaced(layers):
    layers[1].weight = nn.Parameter(layers[1].weight.clone())


def replaced_bias(layers):
    layers[2].bias = nn.Parameter(layers[2].bias.clone())


def without_bias(layers):
    layers[0].bias = None


def hooked(layers):
    layers[0].register_forward_hook(lambda *_: None)


def patched(layers):
    layers[2].forward = lambda x: x


def adapted(layers):
    layers[1].__class__ = Adapted


def swapped(layers):
    layers.reverse()


def turned(layers):
    """At the same place in memory, with other strides."""
    layers[1].weight.data = layers[1].weight.data.view(24, 8).t()


class Quantised(torch.Tensor):
    """As a quantised weight: a tensor of another kind."""


def quantised(layers):
    weight = layers[2].weight
    del layers[2].weight
    layers[2].weight = nn.Parameter(weight.data.as_subclass(Quantised), requires_grad=False)


@pytest.mark.parametrize(
    "change", [replaced, replaced_bias, without_bias, hooked, patched, adapted, swapped, turned, quantised]
)
def test_no_joint_product_of_other_layers(change):
    layers, _ = three(True)
    x = torch.randn(2, 5, 24)
    assert joint_product(x, layers) is not None
    change(layers)
    assert joint_product(x, layers) is None


def test_whoever_watches_all_modules_sees_every_layer():
    layers, _ = three(True)
    watch = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert joint_product(torch.randn(2, 5, 24), layers) is None
    finally:
        watch.remove()


def test_a_compiler_sees_one_graph():
    model = tiny_llada()
    lay_projections_together(model)
    explained = torch._dynamo.explain(model)(torch.randint(0, 90, (1, 40)))
    assert explained.graph_break_count == 0


def test_not_of_many_rows_and_not_where_a_gradient_is_wanted():
    layers, _ = three(True)
    assert joint_product(torch.randn(1, JOINT_ROWS + 1, 24), layers) is None
    with torch.enable_grad():
        assert joint_product(torch.randn(2, 5, 24), layers) is None


@pytest.mark.parametrize("make", [tiny_dream, tiny_llada])
def test_a_model_s_logits_stay(make):
    model, ids = make(), torch.randint(0, 90, (2, 40))
    names, expected, last = list(model.state_dict()), model(ids), model(ids, first_row=20)
    lay_projections_together(model)
    assert joint_product(torch.randn(1, 3, model.config.sizes.width), projections_of(model)) is not None
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(ids), expected)
    torch.testing.assert_close(model(ids, first_row=20), last)


def projections_of(model):
    module = next(module for module in model.modules() if hasattr(module, "q_proj"))
    return module.q_proj, module.k_proj, module.v_proj
