"""The samplers against the published ones written out token by token, dense and sparse."""

import pytest
import torch

from sparsed import SparseDConfig, dream_generate
from tests.helpers.reference import Sparse
from tests.helpers.reference_sampling import decided, dream_counts, generate
from tests.helpers.sampling_cases import CONFIG, GENERATE, inputs_of, options_of, redraw
from tests.helpers.standins import DREAM, EOS, EOT, LLADA, MASK, tiny_dream, tiny_llada


def published_names(options):
    """What the reference calls LLaDA's end-of-text flags."""
    options = dict(options)
    if options.pop("logits_eos_inf", False):
        options["no_logits"] = (EOS,)
    if options.pop("confidence_eos_eot_inf", False):
        options["no_confidence"] = (EOS, EOT)
    return options


def check(model, *, prompt_len, padding=(0,), sparse=None, published=None, unlike=None, **options):
    """Our tokens are the reference's. `published`: the config.json. Returns (prompts, valid, tokens, Batch)."""
    family, weights = model.family, model.state_dict()
    options = options_of(family, options)
    config = SparseDConfig(*sparse) if sparse else None
    prompts, valid, batch = decided(
        family, weights, published or CONFIG[family], prompt_len=prompt_len, padding=padding,
        sparse=sparse and Sparse(*sparse), unlike=unlike, **published_names(options),
    )  # fmt: skip
    mask = None if valid.all() else valid.long()
    tokens = GENERATE[family](model, prompts, attention_mask=mask, config=config, **options)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == batch.tokens.tolist()
    return prompts, valid, tokens, batch


# ------------------------------------------------------------------------------------------------------- dense tokens


@pytest.mark.parametrize("alg", ["maskgit_plus", "entropy", "topk_margin"])
@pytest.mark.parametrize(
    "case",
    [
        {"prompt_len": 17, "gen_length": 12, "steps": 12},
        {"prompt_len": 33, "gen_length": 24, "steps": 10, "top_p": 0.9},
        {"prompt_len": 5, "gen_length": 16, "steps": 16, "top_k": 5},
        {"prompt_len": 40, "gen_length": 16, "steps": 7, "top_p": 0.8, "top_k": 10},
        {"prompt_len": 1, "gen_length": 8, "steps": 20},
        {"prompt_len": 20, "gen_length": 6, "steps": 1},
        {"prompt_len": 20, "gen_length": 10, "steps": 5, "eps": 0.1, "top_p": 1.0},
    ],
    ids=str,
)
def test_dream_dense(dream, alg, case):
    check(dream, alg=alg, **case)


def test_dream_filters_decide_what_is_committed_first(dream):
    """On a case that a sampler without them gets wrong."""
    for filters in ({"top_p": 0.8}, {"top_k": 3}):
        check(dream, prompt_len=33, gen_length=24, steps=6, unlike=dict.fromkeys(filters), **filters)


PUBLISHED_COUNTS = {  # (new tokens, steps): tokens committed at each step, from runs of the published sampler
    (128, 128): [0] + [1] * 126 + [2],
    (128, 64): [1] + [2] * 62 + [3],
    (32, 64): [0] * 33 + [1] * 30 + [2],
    (256, 256): [0] + [1] * 254 + [2],
    (1024, 1024): [0, 0] + [1] * 1021 + [3],
}


@pytest.mark.parametrize("masks_and_steps", PUBLISHED_COUNTS)
def test_reference_schedule_as_published(masks_and_steps):
    assert dream_counts(*masks_and_steps) == PUBLISHED_COUNTS[masks_and_steps]


@pytest.mark.parametrize("masks_and_steps", list(PUBLISHED_COUNTS)[:3])
def test_dream_schedule_as_published(dream, masks_and_steps):
    masks, steps = masks_and_steps
    with inputs_of(dream) as seen:
        tokens = dream_generate(dream, torch.arange(4)[None], gen_length=masks, steps=steps)
    left = [int((ids == MASK).sum()) for ids in [*seen, tokens]]
    assert left[-1] == 0, "the mask token was drawn: choose another prompt"
    # a step that commits nothing runs no forward
    counts = [count for count in PUBLISHED_COUNTS[masks_and_steps] if count]
    assert [before - after for before, after in zip(left, left[1:], strict=False)] == counts


@pytest.mark.parametrize(
    "case",
    [
        {"prompt_len": 17, "gen_length": 24, "steps": 24, "block_length": 24},
        {"prompt_len": 33, "gen_length": 24, "steps": 12, "block_length": 8},
        {"prompt_len": 9, "gen_length": 24, "steps": 10, "block_length": 12},
        {"prompt_len": 1, "gen_length": 8, "steps": 16, "block_length": 4},
        {"prompt_len": 21, "gen_length": 16, "steps": 8, "block_length": 8, "cfg_scale": 1.5},
        {"prompt_len": 21, "gen_length": 16, "steps": 2, "block_length": 8, "cfg_scale": 0.5},
    ],
    ids=str,
)
def test_llada_dense(llada, case):
    check(llada, **case)


@pytest.fixture(scope="module")
def ending_llada():
    """A LLaDA that would often end its text."""
    model = tiny_llada()
    redraw(model, EOS, 0)
    redraw(model, EOT, 1)
    return model


FLAGS = [{"logits_eos_inf": True}, {"confidence_eos_eot_inf": True},
         {"logits_eos_inf": True, "confidence_eos_eot_inf": True}]  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_llada_end_of_text_flags(ending_llada, flags):
    case = {"prompt_len": 15, "gen_length": 12, "steps": 6, "block_length": 6}
    *_, tokens, _ = check(ending_llada, unlike={"no_logits": (), "no_confidence": ()}, **case, **flags)
    if "logits_eos_inf" in flags:
        assert not (tokens == EOS).any()


@pytest.mark.parametrize("family", ["dream", "llada"])
@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 5, 11)])
def test_each_row_of_a_batch_equals_its_own_unpadded_run(request, family, padding):
    model = request.getfixturevalue(family)
    prompts, _, tokens, _ = check(model, prompt_len=23, padding=padding, gen_length=16, steps=8)
    for row, pad in enumerate(padding):
        alone = prompts[row : row + 1, pad:]
        options = options_of(family, {"gen_length": 16, "steps": 8})
        expected = generate(family, model.state_dict(), CONFIG[family], alone, **options).tokens
        assert GENERATE[family](model, alone, **options).tolist() == expected.tolist()
        assert tokens[row, pad:].tolist() == expected[0].tolist()


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_an_all_ones_mask_is_no_mask(request, family):
    model = request.getfixturevalue(family)
    prompts = torch.randint(0, 90, (2, 19))
    options = options_of(family, {"gen_length": 16, "steps": 8})
    plain = GENERATE[family](model, prompts, **options)
    assert torch.equal(GENERATE[family](model, prompts, attention_mask=torch.ones(2, 19), **options), plain)


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_the_mask_token_may_be_drawn(family):
    """A row that draws the mask itself has more masks left than its neighbours; none may overwrite a real token."""
    model = {"dream": tiny_dream, "llada": tiny_llada}[family]()
    redraw(model, MASK, 2)
    drawn = False
    for seed in range(6):
        prompts = torch.randint(0, 90, (3, 14), generator=torch.Generator().manual_seed(seed))
        options = options_of(family, {"gen_length": 16, "steps": 8})
        tokens = GENERATE[family](model, prompts, **options)
        assert torch.equal(tokens[:, :14], prompts)
        for row in range(3):
            alone = GENERATE[family](model, prompts[row : row + 1], **options)
            published = generate(family, model.state_dict(), CONFIG[family], prompts[row : row + 1], **options)
            if published.gap > 2e-5:
                assert alone.tolist() == published.tokens.tolist()
                assert tokens[row].tolist() == alone[0].tolist()
        drawn = drawn or bool((tokens == MASK).any())
    assert drawn, "no row drew the mask token: the case tests nothing"


# ------------------------------------------------------------------------------------------------------ sparse tokens


@pytest.mark.parametrize("family", ["dream", "llada"])
@pytest.mark.parametrize(
    "case",
    [
        {"prompt_len": 61, "gen_length": 24, "steps": 12, "sparse": (0.2, 0.3, 16)},
        {"prompt_len": 96, "gen_length": 32, "steps": 8, "sparse": (0.3, 0.4, 32)},
        {"prompt_len": 110, "gen_length": 16, "steps": 8, "sparse": (0.0, 0.3, 16)},
        {"prompt_len": 100, "gen_length": 56, "steps": 14, "sparse": (0.2, 0.5, 48)},
        {"prompt_len": 7, "gen_length": 40, "steps": 10, "sparse": (0.5, 0.01, 16)},
        {"prompt_len": 150, "gen_length": 8, "steps": 4, "sparse": (0.25, 0.3, 64)},
        {"prompt_len": 20, "gen_length": 8, "steps": 4, "sparse": (0.2, 0.3, 128)},
    ],
    ids=str,
)
def test_sparse(request, family, case):
    drops = -(-(case["prompt_len"] + case["gen_length"]) // case["sparse"][2]) > 1
    check(request.getfixturevalue(family), unlike={"sparse": None} if drops else None, **case)


def test_sparse_with_grouped_key_value_heads_in_both_families():
    case = {"prompt_len": 70, "gen_length": 16, "steps": 8, "sparse": (0.2, 0.3, 16)}
    check(tiny_llada(n_kv_heads=1), published=LLADA | {"n_kv_heads": 1}, **case)
    wide = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3}
    check(tiny_dream(**wide), published=DREAM | wide, **case)


@pytest.mark.parametrize("block_size", [16, 48])
def test_sparse_under_guidance_has_a_pattern_for_each_half(llada, block_size):
    case = {"gen_length": 16, "steps": 8, "cfg_scale": 1.0, "sparse": (0.2, 0.3, block_size)}
    check(llada, prompt_len=75, **case)
    check(llada, prompt_len=75, padding=(0, block_size), **case)


@pytest.mark.parametrize("family", ["dream", "llada"])
@pytest.mark.parametrize("block_size", [16, 32])
def test_sparse_batch_padded_by_whole_blocks_equals_the_unpadded_rows(request, family, block_size):
    model = request.getfixturevalue(family)
    padding, case = (0, block_size, 3 * block_size), {"gen_length": 24, "steps": 12}
    sparse = (0.2, 0.3, block_size)
    prompts, _, tokens, _ = check(model, prompt_len=119, padding=padding, sparse=sparse, **case)
    for row, pad in enumerate(padding):
        alone = generate(family, model.state_dict(), CONFIG[family], prompts[row : row + 1, pad:],
                         sparse=Sparse(*sparse), **options_of(family, case))  # fmt: skip
        assert tokens[row, pad:].tolist() == alone.tokens[0].tolist()


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_sparse_batch_with_any_padding(request, family):
    model = request.getfixturevalue(family)
    check(model, prompt_len=90, padding=(0, 5, 37, 70), gen_length=16, steps=8, sparse=(0.2, 0.3, 16))


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_keeping_everything_equals_full_attention(request, family):
    model = request.getfixturevalue(family)
    for sparse in ((0.2, 1, 16), (1, 0.3, 16)):
        *_, tokens, _ = check(model, prompt_len=61, gen_length=16, steps=8)
        check(model, prompt_len=61, gen_length=16, steps=8, sparse=sparse)
        prompts = tokens[:, :61]
        again = GENERATE[family](
            model, prompts, config=SparseDConfig(*sparse), **options_of(family, {"gen_length": 16, "steps": 8})
        )
        assert torch.equal(again, tokens)
