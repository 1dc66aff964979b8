"""A model larger than one GPU: where its layers go, and that the spread model computes the same."""

import pytest
import torch

from sparsed import SparseDConfig
from sparsed.models import loading
from sparsed.models.loading import plan_placement
from tests.helpers.checkpoints import FAMILIES
from tests.helpers.sampling_cases import GENERATE, options_of


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def no_devices_needed(monkeypatch):
    """accelerate drops GPUs that the machine lacks from a memory budget; the plan is arithmetic without them."""
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", dict)


def model_bytes(model):
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def deep(family):
    return FAMILIES[family][2](**{"dream": {"num_hidden_layers": 12}, "llada": {"n_layers": 12}}[family])


def test_placement_keeps_layers_whole_and_respects_the_memory(no_devices_needed, family):
    model = deep(family)
    budget = {i: model_bytes(model) * 45 // 100 for i in range(3)}
    placement = plan_placement(model, budget)
    used = dict.fromkeys(budget, 0)
    for name, parameter in model.named_parameters():
        owners = [key for key in placement if name == key or name.startswith(key + ".")]
        assert len(owners) == 1
        used[placement[owners[0]].index] += parameter.numel() * parameter.element_size()
    assert all(0 < used[i] <= budget[i] for i in budget)
    # no module inside a layer is placed apart from it
    assert max(name.count(".") for name in placement) == {"dream": 2, "llada": 3}[family]


def test_placement_uses_an_uneven_pair(no_devices_needed, family):
    model = deep(family)
    placement = plan_placement(model, {0: model_bytes(model) * 9 // 10, 1: model_bytes(model) * 4 // 10})
    assert {device.index for device in placement.values()} == {0, 1}


def test_placement_that_does_not_fit(no_devices_needed, family):
    model = deep(family)
    with pytest.raises(ValueError, match="does not fit into .* 2 GPUs"):
        plan_placement(model, {0: model_bytes(model) // 3, 1: model_bytes(model) // 3})


def test_dispatched_model_computes_the_same(no_devices_needed, family):
    from accelerate import dispatch_model

    model, ids = deep(family), torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    rows = torch.tensor([4, 23])
    expected = model(ids, mask), model(ids, logit_rows=rows)
    placement = plan_placement(model, {i: model_bytes(model) * 7 // 10 for i in range(2)})
    dispatch_model(model, dict.fromkeys(placement, "cpu"), main_device="cpu", force_hooks=True)
    assert torch.equal(model(ids, mask), expected[0]) and torch.equal(model(ids, logit_rows=rows), expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda:1", "both"])
def test_kernels_run_on_the_gpu_that_their_tensors_are_on(family, where):
    """Not on the current one: Triton would read the wrong GPU's memory."""
    from accelerate import dispatch_model

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model = deep(family).cuda(0)
    options = options_of(family, {"gen_length": 24, "steps": 12, "config": SparseDConfig(0.2, 0.4, 32)})
    prompt = torch.randint(0, 90, (1, 200))
    expected = GENERATE[family](model, prompt.cuda(0), **options)
    if where == "both":
        placement = plan_placement(model.cpu(), {i: model_bytes(model) * 7 // 10 for i in range(2)})
        assert {device.index for device in placement.values()} == {0, 1}
        dispatch_model(model, placement)
    else:
        model.cuda(1)
    assert torch.equal(GENERATE[family](model, prompt, **options).cpu(), expected.cpu())


@pytest.mark.parametrize(("free", "spread", "wanted"), [((100, 1), True, 1), ((1, 1), True, 2), ((1, 1), False, None)])
def test_model_is_spread_only_when_it_must(monkeypatch, free, spread, wanted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(loading, "free_bytes", lambda index: free[index] * 2**20 // 10)
    monkeypatch.setattr(loading, "plan_placement", lambda model, budget: budget)
    model, target = deep("dream"), torch.device("cuda:0")
    if wanted is None:
        with pytest.raises(ValueError, match="cuda:0 has .* GiB free"):
            loading._place(model, target, spread=spread)
    else:
        assert len(loading._place(model, target, spread=spread)) == wanted
