"""Wrapped models, ids that are no tensor, weights that lie elsewhere: it runs, or one line says what to do."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import BatchEncoding

from sparsed import SparseDConfig, sparsify
from tests.helpers.patch_cases import build, logits_of, run, sequences
from tests.helpers.sampling_cases import GENERATE, options_of
from tests.helpers.standins import MASK, HubDream, tiny_dream, tiny_llada

PROMPT_LEN, GEN_LENGTH, STEPS = 61, 24, 6
CONFIG = SparseDConfig(0.2, 0.4, 16)
OWN = {"dream": tiny_dream, "llada": tiny_llada}


@pytest.fixture(params=OWN)
def family(request):
    return request.param


def generate(family, model, prompt):
    options = options_of(family, {"gen_length": GEN_LENGTH, "steps": STEPS, "config": CONFIG})
    return GENERATE[family](model, prompt, **options)


class Peft(torch.nn.Module):
    """PEFT's wrapper: it hands on what it does not have itself, the inner model's sampler among it."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.ModuleDict({"model": model})

    def get_base_model(self):
        return self.base_model["model"]

    def forward(self, *args, **kwargs):
        return self.get_base_model()(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.get_base_model(), name)


def inner_sampler(wrapped):
    return wrapped.module if isinstance(wrapped, torch.nn.DataParallel) else wrapped


@pytest.mark.parametrize("wrap", [Peft, torch.nn.DataParallel, lambda model: Peft(torch.nn.DataParallel(model))])
def test_a_wrapped_dream_samples_by_itself(weights, wrap):
    """Its sampler is the inner model's, and calls that."""
    model, prompt = build(HubDream, weights), torch.randint(0, 90, (1, PROMPT_LEN))
    options = {"max_new_tokens": GEN_LENGTH, "steps": STEPS}
    with sparsify(model, CONFIG, steps=STEPS, gen_length=GEN_LENGTH):
        expected = model.diffusion_generate(prompt, **options)
    wrapped = wrap(model)
    with sparsify(wrapped, CONFIG, steps=STEPS, gen_length=GEN_LENGTH) as run:
        found = model.diffusion_generate(prompt, **options)
        assert run.step == STEPS and run.tally.sparse
        with torch.no_grad():
            wrapped(prompt, "full")
        assert run.step == 1
    assert torch.equal(found, expected)


def test_a_compiled_dream_samples_by_itself(weights):
    model = build(HubDream, weights)
    wrapped = torch.compile(model, backend="eager")
    with sparsify(wrapped, CONFIG, steps=STEPS, gen_length=GEN_LENGTH) as run:
        wrapped.diffusion_generate(torch.randint(0, 90, (1, PROMPT_LEN)), max_new_tokens=GEN_LENGTH, steps=STEPS)
    assert run.tally.sparse


def test_the_own_sampler_inside_a_wrapped_model_s_context(family):
    """It tells of its sequence, as without the wrapper."""
    model, prompt = OWN[family](), torch.randint(0, 90, (1, PROMPT_LEN))
    expected = generate(family, model, prompt)
    wrapped, options = Peft(model), options_of(family, {"gen_length": GEN_LENGTH, "steps": STEPS})
    with sparsify(wrapped, CONFIG, steps=STEPS, gen_length=GEN_LENGTH) as run:
        assert torch.equal(GENERATE[family](wrapped, prompt, **options), expected)
    assert run.tally.told


def test_a_wrapper_that_hands_nothing_on(family):
    with pytest.raises(ValueError, match=r"needs the model inside the DataParallel: pass its \.module"):
        generate(family, torch.nn.DataParallel(OWN[family]()), torch.randint(0, 90, (1, PROMPT_LEN)))


@pytest.mark.parametrize(
    ("ids", "name"),
    [
        (BatchEncoding({"input_ids": torch.ones(1, 5, dtype=torch.long)}), "BatchEncoding"),
        ({"input_ids": torch.ones(1, 5, dtype=torch.long)}, "dict"),
        ([[1, 2, 3]], "list"),
        (np.ones((1, 3), dtype=np.int64), "ndarray"),
    ],
    ids=["encoding", "dict", "list", "array"],
)
def test_ids_that_are_no_tensor(family, ids, name):
    with pytest.raises(ValueError, match=rf"got a {name}: pass encoding\['input_ids'\]") as error:
        generate(family, OWN[family](), ids)
    assert "\n" not in str(error.value)


def test_a_mask_inside_the_prompt_says_what_to_do(family):
    prompt = torch.randint(0, 90, (1, PROMPT_LEN))
    prompt[0, 7] = MASK
    with pytest.raises(ValueError, match="take it out, or fill it in by a sampler of your own inside `sparsify`"):
        generate(family, OWN[family](), prompt)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_computed_with_where_the_hooks_say(family, where, tmp_path):
    """Between forwards accelerate keeps them on the meta device."""
    model, prompt = OWN[family](), torch.randint(0, 90, (1, PROMPT_LEN))
    expected = generate(family, model, prompt)
    device = torch.device("cpu")
    if where == "cpu":
        cpu_offload(model, execution_device=device)
    else:
        disk_offload(model, str(tmp_path), execution_device=device)
    assert next(model.parameters()).is_meta and model.device == device
    assert torch.equal(generate(family, model, prompt), expected)


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize(
    "devices", [("cpu", "cpu"), pytest.param(("cuda:0", "cuda:1"), marks=pytest.mark.gpu)], ids=["cpu", "gpus"]
)
def test_a_model_whose_owner_spread_its_layers_over_devices(weights, devices, padding):
    """By accelerate, as the hub's models are with `device_map="auto"`: each layer's blocks stay where the layer is."""
    first, second = devices
    if torch.cuda.device_count() < 2 and second == "cuda:1":
        pytest.skip("needs two CUDA devices")
    model, steps = build(HubDream, weights), sequences(STEPS, rows=2)
    valid = torch.ones(steps[0].shape, dtype=torch.bool)
    valid[1, :padding] = False

    def sparse_logits():
        with run(model, backend="gather") as state:
            found = torch.stack([logits_of(model, ids, valid).cpu() for ids in steps])
            assert state.tally.sparse
        return found[:, valid]

    expected = sparse_logits()
    placement = dict.fromkeys(["model.embed_tokens", "model.layers.0"], first)
    placement |= dict.fromkeys(["model.layers.1", "model.norm", "lm_head"], second)
    dispatch_model(model, placement, main_device=first, force_hooks=True)
    torch.testing.assert_close(sparse_logits(), expected, atol=1e-4, rtol=0)
