"""sparsify() on the project's models and on stand-ins for the hub's classes, against the brute-force twin."""

import pytest
import torch

from sparsed import SparseDConfig
from sparsed.kernels import block_scores
from sparsed.masks import only_pads, valid_keys
from sparsed.schedule import ByStep
from tests.helpers import reference
from tests.helpers.patch_cases import (
    GEN_LENGTH,
    HUB_DREAMS,
    HUB_LLADAS,
    PROMPT_LEN,
    SPARSE,
    STEPS,
    build,
    logits_of,
    outputs,
    published_config,
    run,
    sequences,
)
from tests.helpers.reference_sampling import StepRunner, decided
from tests.helpers.standins import DREAM, LLADA, MASK, HubDream
from tests.helpers.standins_llada import llada_sampler

# -------------------------------------------------------------------------------------------------- same as the twin


def test_every_forward_equals_the_twin(any_model, weights):
    model, family = any_model
    twin = StepRunner(
        family, weights[family], published_config(family), prompt_len=PROMPT_LEN, steps=STEPS, sparse=SPARSE
    )
    dense = StepRunner(family, weights[family], published_config(family), prompt_len=PROMPT_LEN, steps=STEPS)
    with run(model) as state:
        for step, ids in enumerate(sequences(STEPS)):
            assert state.step == step
            expected = twin(ids[0], step)
            torch.testing.assert_close(logits_of(model, ids)[0].double(), expected, atol=1e-4, rtol=0)
            if step >= 2:
                assert (expected - dense(ids[0], step)).abs().max() > 0.05, "nothing was dropped: no test"
    assert twin.gap > 1e-6 and twin.n_full == 2


@pytest.mark.parametrize("pads", [(0, 16, 48), (0, 5, 37)])
def test_padded_batches_equal_the_twin(any_model, weights, pads):
    model, family = any_model
    length = PROMPT_LEN + GEN_LENGTH
    valid = torch.tensor([[t >= pad for t in range(length)] for pad in pads])
    twins = [
        StepRunner(
            family,
            weights[family],
            published_config(family),
            prompt_len=PROMPT_LEN,
            steps=STEPS,
            valid=row[None],
            sparse=SPARSE,
        )  # fmt: skip
        for row in valid
    ]
    with run(model):
        for step, ids in enumerate(sequences(STEPS, rows=3)):
            logits = logits_of(model, ids, valid)
            for row, twin in enumerate(twins):
                expected = twin(ids[row], step)[valid[row]]
                torch.testing.assert_close(logits[row][valid[row]].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", HUB_DREAMS)
@pytest.mark.parametrize("mask_kind", ["bool", "additive"])
@pytest.mark.parametrize("padding", [(0,), (0, 16), (3, 40)])
def test_hub_dream_sampler_runs_sparsed_unchanged(kind, weights, mask_kind, padding):
    prompts, valid, batch = decided(
        "dream", weights["dream"], DREAM, prompt_len=PROMPT_LEN, padding=padding, sparse=SPARSE, steps=STEPS,
        gen_length=GEN_LENGTH, alg="maskgit_plus",
    )  # fmt: skip
    model = build(kind, weights)
    mask = None if valid.all() else valid.long()
    with run(model) as state:
        tokens = model.diffusion_generate(prompts, mask, max_new_tokens=GEN_LENGTH, steps=STEPS, mask_kind=mask_kind)
    assert tokens.tolist() == batch.tokens.tolist()
    if len(padding) == 1:
        block_size, length = SPARSE.block_size, PROMPT_LEN + GEN_LENGTH
        expected = reference.density(batch.keeps[0], block_size, length)
        assert state.density == pytest.approx(expected, abs=1e-6)


def test_hub_dream_without_any_mask(weights):
    model = build(HubDream, weights)
    prompts, _, batch = decided("dream", weights["dream"], DREAM, prompt_len=PROMPT_LEN, sparse=SPARSE, steps=STEPS,
                                gen_length=GEN_LENGTH, alg="maskgit_plus")  # fmt: skip
    with run(model):
        tokens = model.diffusion_generate(
            prompts, torch.ones(1, PROMPT_LEN), max_new_tokens=GEN_LENGTH, steps=STEPS, mask_kind="none"
        )
    assert tokens.tolist() == batch.tokens.tolist()


@pytest.mark.parametrize("kind", HUB_LLADAS)
@pytest.mark.parametrize("padding", [(0,), (0, 16), (3, 40)])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_hub_llada_sampler_runs_sparsed_unchanged(kind, weights, padding, cfg_scale):
    options = {"steps": STEPS, "gen_length": GEN_LENGTH, "block_length": 8, "cfg_scale": cfg_scale}
    prompts, valid, batch = decided(
        "llada", weights["llada"], LLADA, prompt_len=PROMPT_LEN, padding=padding, sparse=SPARSE, **options
    )
    model = build(kind, weights)
    with run(model):
        mask = None if valid.all() else valid.long()
        tokens = llada_sampler(model, prompts, attention_mask=mask, **options)
    assert tokens.tolist() == batch.tokens.tolist()


MASKED = torch.tensor([[False, False, True, True, True], [True] * 5])
LOWEST = torch.finfo(torch.bfloat16).min
PAIRS = MASKED[:, None, :, None] & MASKED[:, None, None, :]  # rows of padded queries attend to nothing


@pytest.mark.parametrize(
    "mask",
    [
        MASKED,
        MASKED.long(),
        MASKED[:, None, None],
        PAIRS,
        PAIRS.expand(2, 4, 5, 5),
        torch.zeros(2, 1, 1, 5).masked_fill(~MASKED[:, None, None], -torch.inf),
        torch.zeros(2, 1, 1, 5).masked_fill(~MASKED[:, None, None], -1e9),
        torch.zeros(2, 1, 1, 5).masked_fill(~MASKED[:, None, None], -1e4),
        torch.zeros(2, 1, 5, 5).masked_fill(~PAIRS, torch.finfo(torch.float32).min),
        torch.zeros(2, 1, 1, 5, dtype=torch.bfloat16).masked_fill(~MASKED[:, None, None], LOWEST),
    ],
    ids=lambda mask: f"{mask.dtype}-{list(mask.shape)}",
)
def test_valid_keys_from_any_form_of_mask(mask):
    assert torch.equal(valid_keys(mask, torch.zeros(2, 2, 5, 16)), MASKED)


def test_a_mask_of_pairs_is_not_taken_for_padding():
    """Nor one of another shape, which the model's own attention may read in its own way."""
    k = torch.zeros(2, 2, 5, 16)
    assert all(only_pads(mask, k) for mask in (None, "full", MASKED))
    for mask in (torch.ones(5, 5).bool(), MASKED[:1], MASKED[:, None, None], PAIRS, MASKED.long()):
        assert not only_pads(mask, k)


@pytest.mark.parametrize(
    "mask", [None, "full", torch.ones(2, 5).bool(), torch.zeros(1, 1, 1, 5), torch.ones(1, 1, 5, 5).bool()]
)
def test_no_padding_is_no_mask(mask):
    assert valid_keys(mask, torch.zeros(2, 2, 5, 16)) is None


def test_a_row_without_a_real_token_is_finite_and_leaves_the_others_alone(any_model):
    model, _ = any_model
    steps, valid = sequences(STEPS, rows=2), torch.ones(2, PROMPT_LEN + GEN_LENGTH, dtype=torch.bool)
    valid[0] = False
    valid[1, :16] = False
    with run(model):
        alone = [logits_of(model, ids[1:], valid[1:]) for ids in steps]
    with run(model):
        together = [logits_of(model, ids, valid) for ids in steps]
    for both, one in zip(together, alone, strict=True):
        assert both.isfinite().all()
        torch.testing.assert_close(both[1:, 16:], one[:, 16:], atol=1e-4, rtol=1e-4)


def test_one_row_of_mask_stands_for_the_batch():
    assert torch.equal(valid_keys(MASKED[:1, None, None], torch.zeros(2, 2, 5, 16)), MASKED[:1].expand(2, 5))


def test_density_is_the_share_of_pairs(any_model, weights):
    model, family = any_model
    twin = StepRunner(
        family, weights[family], published_config(family), prompt_len=PROMPT_LEN, steps=STEPS, sparse=SPARSE
    )
    ids = sequences(STEPS)
    with run(model) as state:
        for step in range(3):
            assert (state.density is None) == (step < 2)
            twin(ids[step][0], step)
            logits_of(model, ids[step])
        expected = reference.density(twin.keeps, SPARSE.block_size, PROMPT_LEN + GEN_LENGTH)
        assert state.density == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("config", [SparseDConfig(1.0, 0.3, 16), SparseDConfig(0.2, 1.0, 16)], ids=["skip", "select"])
def test_skipping_or_selecting_everything_is_dense(any_model, config):
    model, _ = any_model
    steps = sequences(STEPS)
    dense = [logits_of(model, ids) for ids in steps]
    with run(model, config=config) as state:
        for ids, expected in zip(steps, dense, strict=True):
            torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=0)
    assert state.schedule.n_full == (STEPS if config.skip == 1 else 2)
    assert state.density is None if config.skip == 1 else state.density == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------ one generation


def test_a_generation_after_the_last_step_starts_anew(any_model):
    model, _ = any_model
    first, second = sequences(STEPS), sequences(STEPS)
    with run(model):
        alone = outputs(model, second)
    with run(model) as state:
        outputs(model, first)
        again = outputs(model, second)
        assert state.step in (0, STEPS)
    assert torch.equal(again, alone)


@pytest.mark.parametrize("change", ["batch", "length", "reset"])
@pytest.mark.parametrize("done", [1, 4])
def test_a_generation_cut_short_starts_anew(any_model, change, done):
    """By another batch size, another length, or reset(); before and after the pattern exists."""
    model, _ = any_model
    first = sequences(STEPS, rows=2 if change == "batch" else 1)
    if change == "length":
        first = first[:, :, 5:]
    second = sequences(STEPS)
    with run(model):
        alone = outputs(model, second)
    with run(model) as state:
        outputs(model, first[:done])
        assert state.step == done
        if change == "reset":
            state.reset()
            assert state.step == 0 and state.density is None
        again = outputs(model, second)
    assert torch.equal(again, alone)


@pytest.mark.parametrize("at_step", [0, 1, 3])
def test_a_step_that_failed_can_be_tried_again(any_model, at_step):
    """Out of memory, for one; what the first try selected must not count."""
    model, family = any_model
    layers = model.model.layers if family == "dream" else model.model.transformer["blocks"]
    early = layers[0].mlp if family == "dream" else layers[0].ff_out
    ids = sequences(STEPS)  # so many generated blocks that layers differ in how often they keep the short last one
    with run(model, gen_length=72) as state:
        alone, density = outputs(model, ids), state.density
    with run(model, gen_length=72) as state:
        first = outputs(model, ids[:at_step]) if at_step else alone[:0]
        handle = early.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits_of(model, ids[at_step])
        handle.remove()
        assert state.step == at_step
        assert torch.equal(torch.cat([first, outputs(model, ids[at_step:])]), alone)
        assert state.density == density


def test_state_tells_the_schedule_and_the_backend(any_model):
    model, _ = any_model
    with run(model) as state:
        assert (state.step, state.schedule, state.density, state.backend) == (0, ByStep(STEPS, 2), None, None)
        outputs(model, sequences(STEPS))
        assert state.backend == "gather" and isinstance(state.backend_reason, str) and state.backend_reason


@pytest.mark.parametrize("config", [SparseDConfig(0.2, 1.0, 16), SparseDConfig(0.2, 0.3, 128)], ids=["all", "few"])
def test_where_every_block_is_kept_auto_keeps_full_attention(monkeypatch, any_model, config):
    """Nothing is scored, and nothing sparse computed; a backend that is named does its work all the same."""
    model, _ = any_model
    steps = sequences(STEPS)
    dense = outputs(model, steps)
    scored = []
    score = lambda *args, **named: scored.append(1) or block_scores(*args, **named)  # noqa: E731
    monkeypatch.setattr("sparsed.kept.block_scores", score)
    with run(model, config=config) as state:
        assert torch.equal(outputs(model, steps), dense)
    assert not scored and (state.backend, state.density, state.step) == ("full", 1.0, STEPS)
    with run(model, config=config, backend="gather") as state:
        torch.testing.assert_close(outputs(model, steps), dense, atol=1e-4, rtol=0)
    assert scored and state.backend == "gather" and state.density == pytest.approx(1.0)


def test_attention_outside_a_counted_forward_is_an_error(any_model):
    """A sampler that calls a part of what was given to sparsify would otherwise stay dense, in silence."""
    model, _ = any_model

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, *args, **named):
            return self.inner(*args, **named)

    wrapper, ids = Wrapper(), sequences(STEPS)
    with run(wrapper) as state:
        with pytest.raises(RuntimeError, match="outside a forward"):
            logits_of(model, ids[0])
        assert state.step == 0


def test_a_sequence_no_longer_than_the_generated_region(any_model):
    """No prompt at all is fine; a forward shorter than gen_length is one clear line."""
    model, _ = any_model
    with run(model, gen_length=GEN_LENGTH):
        outputs(model, torch.full((STEPS, 1, GEN_LENGTH), MASK))
    with run(model, gen_length=GEN_LENGTH), pytest.raises(ValueError) as error:
        outputs(model, torch.full((STEPS, 1, GEN_LENGTH - 1), MASK))
    assert "\n" not in str(error.value)
