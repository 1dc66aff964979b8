"""What people do to a model inside `sparsify`: it works, or ends in one clear error, and the model is as before."""

import copy
import gc
import inspect
import io
import pickle
import threading
import time
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from sparsed import patch
from tests.helpers.patch_cases import STEPS, build, logits_of, outputs, run, sequences, snapshot
from tests.helpers.standins import HubDream


@pytest.fixture
def alone(any_model):
    """(steps, what the model gives for them under SparseD, undisturbed)."""
    steps = sequences(STEPS)
    with run(any_model[0]):
        return steps, outputs(any_model[0], steps)


def embedding(model):
    """A module that every forward calls, before its attention."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))


class Wrapper(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def wrapped_outputs(wrapper, model, steps):
    arguments = ("full",) if isinstance(model, HubDream) else ()
    answers = [wrapper(ids, *arguments) for ids in steps]
    return torch.stack([getattr(answer, "logits", answer) for answer in answers])


@pytest.mark.parametrize("wrap", [Wrapper, torch.nn.DataParallel])
@pytest.mark.parametrize("patched", ["the wrapper", "the model"])
@torch.no_grad()
def test_a_wrapped_model(any_model, alone, wrap, patched):
    (model, _), (steps, expected) = any_model, alone
    wrapper = wrap(model)
    before = snapshot(wrapper)
    with run(wrapper if patched == "the wrapper" else model):
        found = wrapped_outputs(wrapper, model, steps)
    assert torch.equal(found, expected)
    assert snapshot(wrapper) == before


@pytest.mark.parametrize("kind", ["llada", HubDream])
@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@torch.no_grad()
def test_a_compiled_model(weights, kind, when):
    model, steps = build(kind, weights), sequences(STEPS)
    with run(model):
        expected = outputs(model, steps)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with run(compiled if when == "before" else model):
        torch.testing.assert_close(wrapped_outputs(compiled, model, steps), expected)
    assert not any(hasattr(value, "sparsed_run") for m in model.modules() for value in vars(m).values())


def test_a_hook_of_accelerate_stays(any_model, alone):
    (model, _), (steps, expected) = any_model, alone
    add_hook_to_module(model, ModelHook())
    before = snapshot(model)
    with run(model):
        assert torch.equal(outputs(model, steps), expected)
    assert snapshot(model) == before


def test_a_hook_that_comes_inside_stays_too(any_model, alone):
    (model, _), (steps, expected) = any_model, alone
    before, dense = snapshot(model), outputs(model, steps)
    with run(model):
        add_hook_to_module(model, ModelHook())
        assert torch.equal(outputs(model, steps), expected)
    assert torch.equal(outputs(model, steps), dense)
    with run(model):
        assert torch.equal(outputs(model, steps), expected)
    remove_hook_from_module(model)
    assert torch.equal(outputs(model, steps), dense)
    vars(model).pop("forward")  # accelerate leaves the method where the hook was
    assert snapshot(model) == before


def test_a_hook_that_goes_inside_is_gone(any_model, alone):
    (model, _), (steps, expected) = any_model, alone
    dense = outputs(model, steps)
    add_hook_to_module(model, ModelHook())
    with run(model):
        remove_hook_from_module(model)
    assert torch.equal(outputs(model, steps), dense)
    with run(model):
        assert torch.equal(outputs(model, steps), expected)


def test_a_shallow_copy_made_inside_is_free_afterwards(any_model, alone):
    (model, _), (steps, expected) = any_model, alone
    with run(model):
        twin = copy.copy(model)
    with run(twin):
        assert torch.equal(outputs(twin, steps), expected)


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_a_copy_would_compute_with_the_weights_of_the_original(any_model, alone, way):
    (model, _), (steps, expected) = any_model, alone
    with run(model):
        first = outputs(model, steps[:3])
        with pytest.raises(RuntimeError, match="neither copied nor pickled"):
            way(model)
        assert torch.equal(torch.cat([first, outputs(model, steps[3:])]), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(logits_of(twin, steps[0]), logits_of(model, steps[0]))


def test_its_weights_can_be_saved_inside(any_model):
    model, _ = any_model
    names = set(model.state_dict())
    with run(model):
        assert set(model.state_dict()) == names


def test_two_threads_do_not_share_a_step(any_model, alone):
    """The second is turned away at once, and the first goes on as if it had been alone."""
    (model, _), (steps, expected) = any_model, alone
    entered, go_on, found = threading.Event(), threading.Event(), []

    def wait(*_):
        entered.set()
        assert go_on.wait(20)

    with run(model):
        thread = threading.Thread(target=lambda: found.append(outputs(model, steps)))
        hook = embedding(model).register_forward_pre_hook(wait)
        thread.start()
        assert entered.wait(20)
        with pytest.raises(RuntimeError, match="another thread"):
            logits_of(model, steps[0])
        hook.remove()
        go_on.set()
        thread.join()
    assert torch.equal(found[0], expected)


def test_of_two_threads_one_gets_in(any_model, monkeypatch):
    model, _ = any_model
    before, look, refused, inside = snapshot(model), patch._is_patched, [], threading.Barrier(2)

    def slowly(model):
        found = look(model)
        time.sleep(0.1)  # the other thread may look, too
        return found

    def enter():
        try:
            with run(model):
                inside.wait(20)
        except RuntimeError as error:
            refused.append(str(error))
            inside.wait(20)

    monkeypatch.setattr(patch, "_is_patched", slowly)
    threads = [threading.Thread(target=enter) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1 and "another sparsify" in refused[0]
    assert snapshot(model) == before


def test_the_context_must_not_end_inside_another_thread_s_forward(any_model):
    model, _ = any_model
    before, entered, go_on = snapshot(model), threading.Event(), threading.Event()

    def wait(*_):
        entered.set()
        assert go_on.wait(20)

    with pytest.raises(RuntimeError, match="another thread was inside a forward"), run(model):
        thread = threading.Thread(target=lambda: logits_of(model, sequences(1)[0]))
        hook = embedding(model).register_forward_pre_hook(wait)
        thread.start()
        assert entered.wait(20)
    go_on.set()
    thread.join()
    hook.remove()
    assert snapshot(model) == before


def test_a_forward_inside_a_forward_is_an_error(any_model, alone):
    (model, _), (steps, expected) = any_model, alone
    with run(model):
        hook = embedding(model).register_forward_pre_hook(lambda *_: logits_of(model, steps[0]))
        with pytest.raises(RuntimeError, match="inside another one"):
            logits_of(model, steps[0])
        hook.remove()
        assert torch.equal(outputs(model, steps), expected), "the step that failed is tried again"


def test_a_model_that_changes_its_dtype_goes_on(any_model, alone):
    (model, _), (steps, expected) = any_model, alone
    with run(model):
        outputs(model, steps[:4])
        model.double()
        rest = outputs(model, steps[4:])
    assert rest.dtype == torch.float64
    torch.testing.assert_close(rest.float(), expected[4:], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("make", ["dream", "llada"])
def test_a_model_that_moved_to_another_device_says_so(make, request):
    """The meta device stands for a second one."""
    model = copy.deepcopy(request.getfixturevalue(make))
    steps = sequences(STEPS)
    with run(model) as state, state.sequence(steps[0].shape):
        outputs(model, steps[:4])
        model.to("meta")
        with pytest.raises(RuntimeError, match=r"on meta .*reset\(\)"):
            logits_of(model, steps[4].to("meta"))
        state.reset()
        assert logits_of(model, steps[4].to("meta")).is_meta


def test_a_model_lives_as_long_as_its_context(weights):
    model = build("llada", weights)
    reference = weakref.ref(model)
    with run(model):
        logits_of(model, sequences(1)[0])
        del model
        gc.collect()
        assert reference() is not None
    gc.collect()
    assert reference() is None


def test_a_signature_is_still_the_models(any_model):
    """Samplers and libraries look at it for the arguments that a model takes."""
    model, _ = any_model
    before = inspect.signature(model.forward)
    with run(model):
        assert inspect.signature(model.forward) == before
