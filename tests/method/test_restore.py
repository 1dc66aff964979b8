"""sparsify() leaves nothing behind: after the end, an exception, a nested try, or bad input."""

import gc
from types import SimpleNamespace

import pytest
import torch

from sparsed import dream_generate
from tests.helpers.patch_cases import (
    CONFIG,
    GEN_LENGTH,
    PROMPT_LEN,
    STEPS,
    build,
    logits_of,
    outputs,
    run,
    sequences,
    snapshot,
)
from tests.helpers.standins import LLADA, HubDream
from tests.helpers.standins_llada import HubLLaDA

# -------------------------------------------------------------------------------------------------------- restoration


def test_everything_is_restored(any_model):
    model, _ = any_model
    before, ids = snapshot(model), sequences(STEPS)
    dense = outputs(model, ids)
    with run(model):
        outputs(model, ids)
    assert snapshot(model) == before
    assert torch.equal(outputs(model, ids), dense)


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at_step", [0, 1, 3])
def test_everything_is_restored_after_an_exception_inside_a_forward(any_model, raised, at_step):
    model, family = any_model
    layers = model.model.layers if family == "dream" else model.model.transformer["blocks"]
    ids, before = sequences(STEPS), snapshot(model)
    with pytest.raises(raised), run(model):
        for step in range(STEPS):
            if step == at_step:
                interrupt = getattr(layers[-1], "mlp", layers[-1].ff_out if family == "llada" else None)
                handle = interrupt.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(raised()))
            try:
                logits_of(model, ids[step])
            finally:
                if step == at_step:
                    handle.remove()
    assert snapshot(model) == before


def test_an_instance_attribute_that_was_there_comes_back(any_model):
    """accelerate, for one, puts a `forward` of its own on the instance."""
    model, _ = any_model
    original, calls = model.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = forward
    with run(model):
        outputs(model, sequences(STEPS))
    assert vars(model)["forward"] is forward and len(calls) == STEPS


def test_nested_use_is_an_error_and_leaves_the_outer_one_working(any_model):
    model, family = any_model
    before, ids = snapshot(model), sequences(STEPS)
    with run(model):
        alone = outputs(model, ids)
    with run(model):
        first = outputs(model, ids[:3])
        with pytest.raises((ValueError, RuntimeError)) as error, run(model):
            raise AssertionError("the second sparsify was let in")
        assert "\n" not in str(error.value)
        rest = outputs(model, ids[3:])
    assert torch.equal(torch.cat([first, rest]), alone)
    assert snapshot(model) == before


def test_a_sampler_with_config_inside_sparsify_is_an_error(dream):
    prompts = torch.randint(0, 90, (1, PROMPT_LEN))
    with run(dream), pytest.raises((ValueError, RuntimeError)):
        dream_generate(dream, prompts, gen_length=GEN_LENGTH, steps=STEPS, config=CONFIG)


def test_two_models_may_be_patched_at_once(weights):
    models = [build(HubDream, weights), build(HubLLaDA, weights)]
    ids = sequences(STEPS)
    alone = []
    for model in models:
        with run(model):
            alone.append(outputs(model, ids))
    with run(models[0]), run(models[1]):
        together = [torch.stack(pair) for pair in zip(*([logits_of(m, x) for m in models] for x in ids), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def live_elements():
    gc.collect()
    return sum(thing.numel() for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))


def test_no_memory_is_kept_after_the_exit(any_model):
    model, _ = any_model
    ids = sequences(STEPS)
    with run(model):
        outputs(model, ids)
    before = live_elements()
    with run(model) as state:
        outputs(model, ids)
    assert live_elements() - before < 10, "the pattern outlives the run, which the caller still holds"
    assert state.schedule.n_full == 2


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"steps": -1},
        {"gen_length": 0},
        {"gen_length": -4},
        {"backend": "fast"},
        {"backend": "flash"},
        {"backend": "triton"},
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line_and_changes_nothing(any_model, bad):
    model, _ = any_model
    if torch.cuda.is_available() and bad.get("backend") in ("flash", "triton"):
        pytest.skip("the backend may exist here")
    before = snapshot(model)
    with pytest.raises(ValueError) as error, run(model, **bad):
        outputs(model, sequences(STEPS))
    assert "\n" not in str(error.value) and next(iter(bad)) in str(error.value)
    assert snapshot(model) == before


def test_a_model_without_known_attention_is_refused():
    for stranger in (torch.nn.Linear(4, 4), torch.nn.TransformerEncoderLayer(8, 2)):
        before = snapshot(stranger)
        with pytest.raises(ValueError) as error, run(stranger):
            pass
        assert "\n" not in str(error.value)
        assert snapshot(stranger) == before


def test_arguments_of_a_copy_are_passed_on(weights):
    """At the top: positional, keyword and unknown ones reach the model's own forward as they came."""
    received = []

    class Wrapped(HubLLaDA):
        def forward(self, input_ids, flavour, *more, attention_mask=None, **named):
            received.append((flavour, more, named))
            return SimpleNamespace(
                logits=super().forward(input_ids, attention_mask=attention_mask).logits, extra=flavour
            )

    model, ids = Wrapped(LLADA, weights["llada"]), sequences(STEPS)
    with torch.no_grad(), run(model):
        for step in ids:
            assert model(step, "a", "b", dual=3).extra == "a"
        model(input_ids=ids[0], flavour="c")
    assert received == [("a", ("b",), {"dual": 3})] * STEPS + [("c", (), {})]
