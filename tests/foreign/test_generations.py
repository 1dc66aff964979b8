"""Which generation a forward belongs to, where the sampler does not say: its tokens show it."""

import pytest
import torch

from sparsed import SparseDConfig, sparsify
from sparsed.watching import watched
from tests.helpers.foreign_cases import commit, masked_behind, placed, threshold_sampler
from tests.helpers.patch_cases import build
from tests.helpers.standins import LLADA, MASK, HubDream, tiny_llada
from tests.helpers.standins_llada import HubLLaDA

PROMPT_LEN, GEN_LENGTH, STEPS = 61, 24, 12
CONFIG = SparseDConfig(0.25, 0.3, 16)
ANSWER = slice(PROMPT_LEN, None)


@pytest.fixture(params=[HubDream, HubLLaDA])
def model(request, weights):
    return build(request.param, weights)


@pytest.fixture
def prompts():
    return torch.randint(0, 90, (3, 1, PROMPT_LEN))


def sparsed(model, steps=STEPS, **options):
    return sparsify(model, CONFIG, steps=steps, gen_length=GEN_LENGTH, **options)


@torch.no_grad()
def answers(model, sequences):
    return [model(ids).logits for ids in sequences]


def same(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def denoised(prompt, count=8):
    """Ids of `count` forwards of one generation, two tokens committed in each."""
    answer, found = torch.randint(0, 90, (len(prompt), GEN_LENGTH)), []
    for step in range(count):
        ids = masked_behind(prompt, GEN_LENGTH)
        ids[:, PROMPT_LEN : PROMPT_LEN + 2 * step] = answer[:, : 2 * step]
        found.append(ids)
    return found


# ----------------------------------------------------------------------------------------------------- a new one begins


def test_prompts_in_one_context_are_answered_as_alone(model, prompts):
    """By a sampler that takes as many forwards as the text needs; the last prompt comes twice."""
    alone, forwards = [], []
    for prompt in prompts:
        with sparsed(model) as run:
            tokens, count = threshold_sampler(model, prompt, GEN_LENGTH)
        assert run.step == count and run.tally.sparse
        alone.append(tokens)
        forwards.append(count)
    assert len({*forwards, STEPS}) > 2, "all take as many forwards as `steps`: no test"
    with sparsed(model) as run:
        together = [threshold_sampler(model, prompt, GEN_LENGTH)[0] for prompt in [*prompts, prompts[-1]]]
    assert same(together, [*alone, alone[-1]]) and run.step == forwards[-1]


@pytest.mark.parametrize(("at", "then"), [(1, 1), (3, 1), (6, 1), (3, 0), (6, 0)])
def test_a_prompt_after_one_that_was_broken_off(model, prompts, at, then):
    """Another one, or the same again."""
    first, second = denoised(prompts[0]), denoised(prompts[then])
    with sparsed(model):
        expected = answers(model, second)
    with sparsed(model):
        answers(model, first[:at])
        assert same(answers(model, second), expected)


def test_an_answer_after_a_likelihood_of_another(model, prompts):
    """Of the same prompt, whose first forward was not all masked."""
    first, second = denoised(prompts[0]), denoised(prompts[0])
    with sparsed(model):
        expected = answers(model, second)
    with sparsed(model):
        answers(model, [first[3], first[5], first[2], first[7]])
        assert same(answers(model, second), expected)


@torch.no_grad()
def test_embeddings_are_known_as_well_as_ids(prompts):
    """The same prompt again, too."""

    class Embedded(HubLLaDA):
        def forward(self, input_ids=None, inputs_embeds=None):
            parts = self.model.transformer
            x = parts["wte"](input_ids) if inputs_embeds is None else inputs_embeds
            for block in parts["blocks"]:
                x, _ = block(x)
            return parts["ff_out"](parts["ln_f"](x))

    model = Embedded(LLADA, tiny_llada().state_dict())
    embed = model.model.transformer["wte"]
    sequences = [denoised(prompts[0]), denoised(prompts[1]), denoised(prompts[1])]
    with sparsed(model):
        expected = [[model(inputs_embeds=embed(ids)) for ids in one] for one in sequences[1:]]
    with sparsed(model):
        found = [[model(inputs_embeds=embed(ids)) for ids in one] for one in sequences]
    assert same(found[1], expected[0]) and same(found[2], expected[1])


def test_a_mask_token_that_the_config_does_not_name(model, prompts):
    """What a generation began with shows it."""
    del model.config.mask_token_id
    ids = denoised(prompts[0])
    with sparsed(model) as run:
        for again, expected in ((ids, 8), (ids[1:], 15), (ids, 8)):
            answers(model, again)
            assert run.step == expected, "all masked again, and nothing else, begins one"


# ----------------------------------------------------------------------------------------------------------- it goes on


def test_more_forwards_than_steps_stay_sparse(model, prompts):
    with sparsed(model, steps=4) as run:
        answers(model, denoised(prompts[0], 12))
        assert (run.step, run.phase, run.tally.sparse) == (12, "sparse", 11)


def test_steps_that_commit_nothing_begin_nothing(model, prompts):
    """Dream's time grid has some at its start."""
    ids = masked_behind(prompts[0], GEN_LENGTH)
    with sparsed(model) as run:
        answers(model, [ids] * 5)
        assert run.step == 5 and run.phase == "sparse"


@torch.no_grad()
def test_a_sampler_that_masks_tokens_again(model, prompts):
    """And writes in place, as all do."""
    selected = []
    rule = watched(lambda scores, pattern: selected.append(pattern))
    ids = masked_behind(prompts[0], GEN_LENGTH)
    with sparsed(model, rule=rule) as run:
        for step in range(10):
            commit(ids, placed(model, model(ids).logits), 0.2)
            written = (ids[0, ANSWER] != MASK).nonzero().squeeze(-1)
            ids[0, PROMPT_LEN + written[: len(written) // 2]] = MASK
            assert run.step == step + 1
    assert len(selected) == sum(hasattr(module, "q_proj") for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_a_likelihood_by_random_masks(model, prompts, rows):
    ids = torch.cat([prompts[0], torch.randint(0, 90, (1, GEN_LENGTH))], 1).repeat(rows, 1)
    hidden = torch.rand(10, rows, GEN_LENGTH) < torch.linspace(0.1, 0.9, 10)[torch.randperm(10), None, None]
    with sparsed(model) as run:
        for step, mask in enumerate(hidden):
            draw = ids.clone()
            draw[:, ANSWER][mask] = MASK
            model(draw)
            assert run.step == step + 1


@torch.no_grad()
@pytest.mark.parametrize("gen_length", [1, GEN_LENGTH])
def test_gaps_in_the_text_are_generated_too(model, prompts, gen_length):
    ids = masked_behind(prompts[0], GEN_LENGTH)
    ids[0, 20:36] = ids[0, 50:58] = MASK
    ids[0, ANSWER] = 7
    begun = ids.clone()
    with sparsify(model, CONFIG, steps=STEPS, gen_length=gen_length) as run:
        while (ids == MASK).any():
            commit(ids, placed(model, model(ids).logits))
        assert run.step == 24 and run.tally.generations == 1
        model(begun)
        assert run.step == 1, "they are open again"


# -------------------------------------------------------------------------------------------------- two that take turns


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["conditional first", "unconditional first"])
@pytest.mark.parametrize("kept", [0, 9], ids=["all of the prompt", "but a few tokens"])
def test_guidance_in_two_forwards_has_a_state_for_each(model, prompts, order, kept):
    """Also where one prompt follows another, and the half whose prompt is hidden looks the same for both."""
    pairs = []
    for prompt in prompts[:2]:
        prompt[:, :kept] = 5
        conditional = denoised(prompt)
        hidden = [ids.clone() for ids in conditional]
        for ids in hidden:
            ids[:, kept:PROMPT_LEN] = MASK
        pairs.append([conditional, hidden])
    alone = []
    for pair in pairs:
        halves = []
        for half in pair:
            with sparsed(model):
                halves.append(answers(model, half))
        alone.append(halves)
    with sparsed(model) as run:
        for pair, expected in zip(pairs, alone, strict=True):
            for step in range(8):
                for half in order:
                    assert same(answers(model, [pair[half][step]]), [expected[half][step]])
                    assert run.step == step + 1


def test_a_third_one_in_turn_is_never_another_s(model, prompts):
    """There is room for two: of three, each forward is full."""
    sequences = [denoised(prompt) for prompt in prompts]
    dense = [answers(model, one) for one in sequences]
    with pytest.warns(UserWarning, match="each of the 24 forwards began a generation"), sparsed(model):
        for step in range(8):
            for one, expected in zip(sequences, dense, strict=True):
                assert same(answers(model, [one[step]]), [expected[step]])


def test_what_another_prompt_kept_is_freed(model, prompts):
    """From the second forward in a row on."""
    with sparsed(model) as run:
        answers(model, denoised(prompts[0]))
        first = run._generations.now
        answers(model, denoised(prompts[1])[:1])
        assert run._generations.before is first
        answers(model, denoised(prompts[1])[1:2])
        assert run._generations.before is None
