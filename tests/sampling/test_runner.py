"""Steps replayed as CUDA graphs give the tokens of steps that run as they are."""

import copy
import importlib
import importlib.util
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from sparsed import SparseDConfig, sparsify
from sparsed.models.llada import LLaDAModel
from sparsed.sampling import replay, runner
from sparsed.sampling.common import Step
from sparsed.sampling.replay import Replays
from sparsed.sampling.runner import StepRunner
from sparsed.watching import watched
from tests.helpers.sampling_cases import GENERATE, head_of, options_of
from tests.helpers.standins import tiny_dream, tiny_llada

if importlib.util.find_spec("triton"):
    import triton

MODELS = {"dream": tiny_dream, "llada": tiny_llada}
SPARSE = SparseDConfig(0.2, 0.4, 16)


@pytest.fixture
def captured(monkeypatch):
    """How many forwards were captured so far, one entry each."""
    calls, capture = [], Replays._capture
    monkeypatch.setattr(Replays, "_capture", lambda self, *args: calls.append(args) or capture(self, *args))
    return calls


class FakeGraph:
    """Stands for a CUDA graph where there is no GPU: computes what was captured, over the blocks of that time."""

    def __init__(self, run, forward, inputs, logits):
        self.run, self.forward, self.inputs, self.logits = run, forward, inputs, logits
        self.then = None if run is None else copy.copy(run._generations.now)

    def replay(self):
        if self.run is not None:
            now, self.run._generations.now = self.run._generations.now, copy.copy(self.then)
        self.logits.copy_(self.forward(*self.inputs))
        if self.run is not None:
            self.run._generations.now = now


@pytest.fixture
def faked(monkeypatch):
    """Steps are replayed on the CPU; a list with an entry for every capture: the number of tokens."""
    captures = []

    def capture(self, known, forward):
        captures.append(known.inputs[0].numel())
        known.inputs = tuple(x.clone() for x in known.inputs)
        with self.aside():
            known.logits = forward(*known.inputs).clone()
        run = getattr(self.aside, "__self__", None)
        known.graph = FakeGraph(run, forward, known.inputs, known.logits)

    monkeypatch.setattr(replay, "replayable", lambda model: True)
    monkeypatch.setattr(Replays, "_capture", capture)
    return captures


CASES = [
    ("dream", {}, 1),
    ("dream", {"temperature": 1.0, "top_p": 0.9, "top_k": 20}, 1),
    ("dream", {"alg": "origin"}, 1),
    ("llada", {}, 1),
    ("llada", {"cfg_scale": 1.0}, 1),
    ("llada", {"temperature": 1.0, "remasking": "random"}, 1),
    ("llada", {"block_length": 24}, 3),
    ("dream", {}, 3),
]


@pytest.mark.parametrize("config", [None, SPARSE, SparseDConfig(0.2, 1.0, 16)], ids=["full", "sparse", "all kept"])
@pytest.mark.parametrize(("family", "options", "batch"), CASES, ids=str)
def test_what_is_loaded_and_counted_around_a_replay(monkeypatch, faked, family, options, batch, config):
    model = MODELS[family]()
    prompts = torch.randint(0, 90, (batch, 61))
    options = options_of(family, {"gen_length": 48, "steps": 24} | options)

    def generate():
        return GENERATE[family](model, prompts, config=config, generator=torch.Generator().manual_seed(3), **options)

    replayed = generate()
    assert len(faked) == (2 if config is SPARSE else 1), "one graph a phase"
    monkeypatch.setattr(runner, "REPLAYED_TOKENS", 0)
    assert torch.equal(generate(), replayed)


CACHED_CASES = [
    ("llada", {"cache": "dual"}, [12]),
    ("llada", {"cache": "dual", "refresh": 2, "early_stop": True}, [12, 48]),
    ("llada", {"cache": "dual", "cfg_scale": 1.0, "temperature": 1.0}, [24]),
    ("llada", {"cache": "prefix", "threshold": 0.9}, [48, 36, 24, 12]),
    ("dream", {"cache": "dual", "block_length": 12}, [13]),
    ("dream", {"cache": "dual", "block_length": 8, "refresh": 0, "alg": "entropy"}, [9, 49]),
    ("dream", {"cache": "prefix", "block_length": 24, "factor": 0.3}, [49, 25]),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", [None, SPARSE], ids=["full", "sparse"])
@pytest.mark.parametrize(("family", "options", "windows"), CACHED_CASES, ids=str)
def test_one_graph_serves_the_windows_of_all_blocks(monkeypatch, faked, family, options, windows, config, padded):
    """Each of the first window's size; a graph that read the first block's rows or positions gives other tokens."""
    model = MODELS[family]()
    prompts, mask = torch.randint(0, 90, (2, 61)), torch.ones(2, 61, dtype=torch.long)
    mask[1, : 20 if padded else 0] = 0
    options = options_of(family, {"gen_length": 48, "steps": 48, "block_length": 12} | options)

    def generate():
        generator = torch.Generator().manual_seed(3)
        return GENERATE[family](model, prompts, attention_mask=mask, config=config, generator=generator, **options)

    replayed = generate()
    assert faked == [2 * size for size in windows]
    monkeypatch.setattr(runner, "REPLAYED_TOKENS", 0)
    assert torch.equal(generate(), replayed)


@pytest.mark.parametrize("every", [9, 12, 13, 17])
def test_no_replay_over_blocks_that_were_chosen_anew(monkeypatch, faked, every):
    """The caller resets in the sampler's midst, and calls the model itself."""
    model, prompts, tokens = MODELS["dream"](), torch.randint(0, 90, (1, 61)), []
    for most in (2048, 0):
        monkeypatch.setattr(runner, "REPLAYED_TOKENS", most)
        with sparsify(model, SPARSE, steps=48, gen_length=48) as run:

            def call(step, run=run):
                if step.index % every == every - 1:
                    run.reset()
                if step.index % 7 == 3:
                    model(torch.full((1, 109), 5))

            tokens.append(GENERATE["dream"](model, prompts, gen_length=48, steps=48, on_step=call))
    assert faked and torch.equal(*tokens)


@pytest.mark.parametrize("steps", [9, 48])
def test_a_sampler_s_generation_is_its_own(steps):
    """Whatever steps `sparsify` was told, and whatever else the model is asked meanwhile: blocks are selected once, by
    a sampler that ended early as well."""
    model, prompts, selected = MODELS["dream"](), torch.randint(0, 90, (2, 61)), []
    rule = watched(lambda scores, pattern: selected.append(pattern))
    aside = torch.randint(0, 90, (1, 77))
    with torch.no_grad():
        expected = model(aside)

    def call(step):
        torch.testing.assert_close(model(aside), expected, atol=0, rtol=0)

    def stop(step):
        if step.index == 20:
            raise KeyboardInterrupt

    with sparsify(model, SPARSE, steps=steps, gen_length=48, rule=rule) as run:
        with pytest.raises(KeyboardInterrupt):
            GENERATE["dream"](model, prompts[:1], gen_length=48, steps=48, on_step=stop)
        first = len(selected)
        tokens = GENERATE["dream"](model, prompts[1:], gen_length=48, steps=48, on_step=call)
        assert run.step == 48 and len(selected) == 2 * first
        with pytest.raises(RuntimeError, match="inside another one"), run.sequence((1, 109)):
            GENERATE["dream"](model, prompts[1:], gen_length=48, steps=48)
    alone = GENERATE["dream"](
        model, prompts[1:], gen_length=48, steps=48, config=replace(SPARSE, skip=steps * 0.2 / 48)
    )
    assert torch.equal(tokens, alone)


def test_a_step_with_more_rows_than_the_graphs_take_runs_as_it_is(faked):
    model = MODELS["llada"]()
    ids = torch.randint(0, 90, (1, 40))
    one = StepRunner(model, None, None, 20, 4)
    with torch.no_grad():
        for rows in ([20, 21, 22, 23], [21, 22, 30], [20, 25, 30, 35, 39], [39]):
            rows = torch.tensor(rows)
            torch.testing.assert_close(one(ids, rows), model(ids, logit_rows=rows), atol=1e-5, rtol=0)
    assert len(faked) == 1


def test_a_model_that_cannot_be_captured_runs_as_it_is(monkeypatch):
    monkeypatch.setattr(replay, "replayable", lambda model: True)
    model, prompts = MODELS["llada"](), torch.randint(0, 90, (1, 30))
    options = {"gen_length": 16, "steps": 16, "block_length": 16, "config": SPARSE}
    tries = []

    def failing(self, known, forward):
        tries.append(known)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(Replays, "_capture", failing)
    tokens = GENERATE["llada"](model, prompts, **options)
    monkeypatch.setattr(runner, "REPLAYED_TOKENS", 0)
    assert len(tries) == 1 and torch.equal(GENERATE["llada"](model, prompts, **options), tokens)


def test_a_capture_that_fails_at_its_end_counts_no_step(monkeypatch):
    """As where there is no memory for the graph: the forward was run through by then."""

    @contextmanager
    def failing(*_, **__):
        yield
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(replay, "replayable", lambda model: True)
    monkeypatch.setattr(torch.cuda, "graph", failing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    for name in ("device", "stream", "current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    model, prompts, steps = MODELS["llada"](), torch.randint(0, 90, (1, 30)), []
    options = {"gen_length": 16, "steps": 16, "block_length": 16}
    with sparsify(model, SPARSE, steps=16, gen_length=16) as run:
        tokens = GENERATE["llada"](model, prompts, on_step=lambda _: steps.append(run.step), **options)
    assert steps == list(range(1, 17))
    monkeypatch.setattr(runner, "REPLAYED_TOKENS", 0)
    assert torch.equal(GENERATE["llada"](model, prompts, config=SPARSE, **options), tokens)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("at_step", [0, 5, 15])
def test_logits_that_are_not_finite_end_in_one_line(monkeypatch, family, temperature, at_step, ahead):
    """Even the last step's, which are not looked at by the time the next one would be launched."""
    monkeypatch.setattr(StepRunner, "ahead", ahead)
    model = MODELS[family]()
    head = head_of(model)
    options = options_of(family, {"gen_length": 16, "steps": 16, "temperature": temperature})

    def spoil(step):
        if step.index + 1 >= at_step:
            head.weight.data[3] = float("nan")

    if at_step == 0:
        spoil(Step(0, "full"))
    with pytest.raises(FloatingPointError, match="not finite"):
        GENERATE[family](model, torch.randint(0, 90, (1, 30)), on_step=spoil, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, SPARSE, SparseDConfig(0.2, 1.0, 16)], ids=["full", "sparse", "all kept"])
@pytest.mark.parametrize(("family", "options", "batch"), CASES, ids=str)
def test_replayed_tokens_are_the_same(monkeypatch, captured, family, options, batch, config):
    model = MODELS[family]().cuda()
    prompts = torch.randint(0, 90, (batch, 61)).cuda()
    options = options_of(family, {"gen_length": 48, "steps": 24} | options)

    def generate():
        return GENERATE[family](
            model, prompts, config=config, generator=torch.Generator("cuda").manual_seed(3), **options
        )

    replayed = generate()
    assert len(captured) == (2 if config is SPARSE else 1), "one graph a phase"
    monkeypatch.setattr(runner, "REPLAYED_TOKENS", 0)
    assert torch.equal(generate(), replayed)
    assert len(captured) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", [None, SPARSE], ids=["full", "sparse"])
@pytest.mark.parametrize(("family", "options", "windows"), CACHED_CASES, ids=str)
def test_one_cuda_graph_serves_the_windows_of_all_blocks(
    monkeypatch, captured, family, options, windows, config, padded
):
    model = MODELS[family]().cuda()
    prompts, mask = torch.randint(0, 90, (2, 61)).cuda(), torch.ones(2, 61, dtype=torch.long).cuda()
    mask[1, : 20 if padded else 0] = 0
    options = options_of(family, {"gen_length": 48, "steps": 48, "block_length": 12} | options)

    def generate():
        generator = torch.Generator("cuda").manual_seed(3)
        return GENERATE[family](model, prompts, attention_mask=mask, config=config, generator=generator, **options)

    replayed = generate()
    assert len(captured) == len(windows)
    monkeypatch.setattr(runner, "REPLAYED_TOKENS", 0)
    assert torch.equal(generate(), replayed)


@pytest.mark.gpu
def test_a_capture_that_waits_leaves_the_stream_of_before(monkeypatch):
    model, plain = MODELS["llada"]().cuda(), LLaDAModel.forward

    def waiting(self, ids, *args, **kwargs):
        ids.sum().item()  # which no capture allows
        return plain(self, ids, *args, **kwargs)

    monkeypatch.setattr(LLaDAModel, "forward", waiting)
    before = torch.cuda.current_stream()
    prompts = torch.randint(0, 90, (1, 30)).cuda()
    tokens = GENERATE["llada"](model, prompts, gen_length=16, steps=16, block_length=16)
    assert torch.cuda.current_stream() == before
    monkeypatch.setattr(runner, "REPLAYED_TOKENS", 0)
    assert torch.equal(GENERATE["llada"](model, prompts, gen_length=16, steps=16, block_length=16), tokens)


@pytest.mark.gpu
def test_a_compiled_backend_is_replayed_too(monkeypatch, captured):
    model, prompts = MODELS["dream"]().cuda(), torch.randint(0, 90, (1, 61)).cuda()
    options = options_of("dream", {"gen_length": 48, "steps": 24, "config": SPARSE, "backend": "flex"})
    monkeypatch.setattr(runner, "REPLAYED_TOKENS", 2048)
    replayed = GENERATE["dream"](model, prompts, **options)
    assert len(captured) == 2, "one graph a phase"
    monkeypatch.setattr(runner, "REPLAYED_TOKENS", 0)
    assert torch.equal(GENERATE["dream"](model, prompts, **options), replayed)


@pytest.mark.gpu
def test_padded_batches_are_replayed_too(monkeypatch, captured):
    for family in MODELS:
        model = MODELS[family]().cuda()
        prompts, mask = torch.randint(0, 90, (2, 61)).cuda(), torch.ones(2, 61).cuda()
        mask[1, :20] = 0
        options = options_of(family, {"gen_length": 24, "steps": 12, "attention_mask": mask, "config": SPARSE})
        monkeypatch.setattr(runner, "REPLAYED_TOKENS", 2048)
        replayed = GENERATE[family](model, prompts, **options)
        monkeypatch.setattr(runner, "REPLAYED_TOKENS", 0)
        assert torch.equal(GENERATE[family](model, prompts, **options), replayed)
    assert captured


@pytest.mark.gpu
def test_a_graph_is_not_replayed_over_blocks_of_another_generation(monkeypatch):
    """One sampler call, in whose midst the caller resets: it selects blocks twice."""
    model, prompts = MODELS["dream"]().cuda(), torch.randint(0, 90, (1, 61)).cuda()
    tokens = []
    for most in (2048, 0):
        monkeypatch.setattr(runner, "REPLAYED_TOKENS", most)
        with sparsify(model, SPARSE, steps=24, gen_length=48) as run:
            reset = lambda step, run=run: run.reset() if step.index == 11 else None  # noqa: E731
            tokens.append(GENERATE["dream"](model, prompts, gen_length=48, steps=24, on_step=reset))
    assert torch.equal(*tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("family", MODELS)
def test_kernels_run_on_the_gpu_that_their_tensors_are_on(family):
    """Not on the current one: Triton would read the wrong GPU's memory."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model, prompt = MODELS[family](), torch.randint(0, 90, (1, 200))
    options = options_of(family, {"gen_length": 24, "steps": 12, "config": SparseDConfig(0.2, 0.4, 32)})
    first, second = (GENERATE[family](model.cuda(gpu), prompt, **options).cpu() for gpu in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_hooks_are_called_at_every_step(captured):
    model, calls = MODELS["llada"]().cuda(), []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    GENERATE["llada"](model, torch.randint(0, 90, (1, 30)).cuda(), gen_length=16, steps=16, block_length=16)
    hook.remove()
    assert len(calls) == 16 and not captured


@pytest.mark.gpu
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("block_size", [32, 128])
def test_prompts_of_other_lengths_compile_nothing(family, block_size):
    kernels = [
        kernel
        for module in ("block_scores_triton", "block_sparse_triton", "elementwise_triton", "few_queries_triton")
        for kernel in vars(importlib.import_module(f"sparsed.kernels.{module}")).values()
        if isinstance(kernel, triton.runtime.JITFunction)
    ]
    assert len(kernels) > 6

    def variants():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    model, counts = MODELS[family]().cuda(), []
    options = options_of(family, {"gen_length": 16, "steps": 8, "config": SparseDConfig(0.2, 0.3, block_size)})
    for length in (333, 517, 1000, 1024, 3000):
        GENERATE[family](model, torch.randint(0, 90, (1, length)).cuda(), **options)
        counts.append(variants())
    assert counts[0] > 0 and len(set(counts)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("block_size", [16, 128])
def test_no_forward_waits_for_the_gpu(family, block_size):
    """Full, selecting and sparse, once its kernels are compiled; what the sampler reads is its own affair.

    Of a sampler that tells its sequence: one from elsewhere is followed by its tokens, once a forward.
    """
    model, ids = MODELS[family]().cuda(), torch.randint(0, 90, (1, 1000)).cuda()
    config = replace(SPARSE, block_size=block_size)
    try:
        with torch.no_grad(), sparsify(model, config, steps=10, gen_length=48) as run:
            for mode in ("default", "error"):
                with run.sequence(tuple(ids.shape)):
                    torch.cuda.set_sync_debug_mode(mode)
                    for _ in range(10):
                        model(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("family", MODELS)
def test_no_cached_step_waits_for_the_gpu(captured, family, cache):
    """From a block's third cached step on, which only replays, to its last but one."""
    model, prompts, inside = MODELS[family]().cuda(), torch.randint(0, 90, (2, 61)).cuda(), []

    def watch(step):
        place = step.index % 16
        inside.append(3 <= place < 14)
        torch.cuda.set_sync_debug_mode("error" if inside[-1] else "default")

    options = {"gen_length": 32, "steps": 32, "block_length": 16, "cache": cache, "config": SPARSE}
    try:
        GENERATE[family](model, prompts, **options, on_step=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert captured and sum(inside) == 22


def test_nothing_is_captured_on_the_cpu(captured):
    for family, make in MODELS.items():
        options = options_of(family, {"gen_length": 16, "steps": 8, "config": SPARSE})
        GENERATE[family](make(), torch.randint(0, 90, (1, 30)), **options)
    assert not captured
