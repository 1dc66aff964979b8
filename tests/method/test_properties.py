"""Properties over drawn shapes and arguments (hypothesis): attention, selection, samplers.

The examples are the same in every run; `--hypothesis-profile=campaign` draws many new ones.
"""

import copy
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsed import SparseDConfig, select_blocks
from sparsed.backends import BACKENDS
from sparsed.blocks import BlockGrid
from sparsed.kernels import block_scores
from sparsed.sampling import settings as sampling_settings
from sparsed.sampling import unmasking
from sparsed.selection import isolated_top_k
from tests.helpers import reference
from tests.helpers.sampling_cases import GENERATE
from tests.helpers.standins import tiny_dream, tiny_llada

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARES = st.integers(1, 100).map(lambda percent: percent / 100)
BLOCK_SIZES = st.integers(1, 16).map(lambda sixteenths: 16 * sixteenths)
CPU_MODELS = {"dream": tiny_dream(), "llada": tiny_llada()}


@st.composite
def sequences(draw, longest=3000):
    """q, k, v of drawn shape and dtype, which of the tokens are real, and the sizes of the method."""
    size = draw(BLOCK_SIZES)
    if draw(st.sampled_from([True, True, False])):  # several blocks, the last of any length
        length = min(longest, size * draw(st.integers(2, 12)) - draw(st.integers(0, size - 1)))
    else:
        length = draw(st.integers(1, 40) | st.integers(1, longest))
    few = length > 600  # the twin holds [batch, heads, length, length] in float64
    kv_heads, shared = draw(st.sampled_from([(1, 1), (1, 2)] if few else [(1, 4), (2, 1), (2, 3), (3, 2), (1, 7)]))
    batch, width = 1 if few else draw(st.integers(1, 3)), draw(st.sampled_from([32, 64, 80, 128]))
    pads = [draw(st.just(0) | st.integers(0, length // 3) | st.integers(0, length - 1)) for _ in range(batch)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    q, k, v = (
        torch.randn(batch, heads, length, width, generator=generator).to(dtype)
        for heads in (kv_heads * shared, kv_heads, kv_heads)
    )
    valid = torch.arange(length) >= torch.tensor(pads)[:, None]
    return SimpleNamespace(
        q=q,
        k=k,
        v=v,
        valid=valid,
        key_valid=None if valid.all() and draw(st.booleans()) else valid,
        prompt_len=draw(st.integers(0, length)),
        block_size=size,
        select=draw(SHARES),
    )


def probabilities(case, allowed=None):
    """softmax over the real (and the allowed) keys in float64 [B, Hq, T, T]; padded queries are rows of zeros."""
    k = case.k.double().repeat_interleave(case.q.shape[1] // case.k.shape[1], dim=1)
    logits = case.q.double() @ k.mT / math.sqrt(case.q.shape[-1])
    keys = case.valid[:, None, None] if allowed is None else allowed & case.valid[:, None, None]
    logits = logits.masked_fill(~keys, -torch.inf).softmax(-1)
    return logits.masked_fill(~case.valid[:, None, :, None], 0)


def kept_counts(case):
    """Section 3.2's budget of each part, in each batch row: (part's blocks, how many of them are kept)."""
    length, size = case.valid.shape[1], case.block_size

    def budget(row, part):
        held = sum(bool(row[j * size : (j + 1) * size].any()) for j in part)
        return reference.exact_share(case.select, held) if held else 0

    parts = reference.parts(length, case.prompt_len, size)
    return [[(part, budget(row, part)) for part in parts] for row in case.valid]


@given(sequences())
def test_selection_keeps_the_highest_scores_and_exactly_as_many(case):
    sizes = {"prompt_len": case.prompt_len, "block_size": case.block_size, "select": case.select}
    keep = select_blocks(case.q, case.k, key_valid=case.key_valid, **sizes)
    scores = reference.pooled(probabilities(case), case.block_size)
    n = keep.shape[-1]
    real_queries = F.pad(case.valid, (0, n * case.block_size - case.valid.shape[1])).unflatten(1, (n, -1)).any(-1)
    for b, parts in enumerate(kept_counts(case)):
        for part, budget in parts:
            kept = keep[b, :, :, part]
            assert (kept.sum(-1) == budget).all()
            if budget:
                mine = scores[b, :, :, part]
                lowest = mine.sort(-1, descending=True).values[..., budget - 1, None]
                close = (mine >= lowest * (1 - 1e-4) - 1e-9) | ~kept
                assert close[:, real_queries[b]].all()


@given(sequences())
def test_sparse_attention_equals_the_twin(case):
    sizes = {"prompt_len": case.prompt_len, "block_size": case.block_size}
    grid = BlockGrid(case.valid.shape[1], **sizes, key_valid=case.key_valid)
    scores = block_scores(case.q, case.k, block_size=case.block_size, key_valid=case.key_valid)
    pattern = isolated_top_k(scores, grid, case.select)
    out = BACKENDS["gather"].build(pattern)(case.q, case.k, case.v)
    allowed = reference.expand(pattern.as_mask(), case.block_size, case.valid.shape[1])
    v = case.v.repeat_interleave(case.q.shape[1] // case.k.shape[1], dim=1)
    exact = probabilities(case, allowed) @ v.double()
    mask = allowed & case.valid[:, None, None]
    dense = F.scaled_dot_product_attention(case.q, case.k, case.v, attn_mask=mask, enable_gqa=True)
    real = case.valid[:, None, :, None].expand_as(out)
    error, dense_error = ((x.double() - exact)[real].abs().max() for x in (out, dense))
    assert out.isfinite().all(), "also of queries that are padding"
    # and what one rounding of the largest value that is summed may add
    assert error <= 2 * dense_error + torch.finfo(out.dtype).eps * case.v.double().abs().max()
    share = mask.float().sum((-1, -2)) if case.valid.all() else None
    if share is not None:
        assert pattern.density.item() == pytest.approx((share / case.valid.shape[1] ** 2).mean().item(), abs=1e-5)


@given(sequences(longest=600))
def test_selecting_everything_is_full_attention(case):
    grid = BlockGrid(case.valid.shape[1], case.prompt_len, case.block_size, case.key_valid)
    scores = block_scores(case.q, case.k, block_size=case.block_size, key_valid=case.key_valid)
    pattern = isolated_top_k(scores, grid, 1)
    assert pattern.density.item() == pytest.approx(1, abs=1e-6)
    wide = SimpleNamespace(**vars(case) | {name: getattr(case, name).float() for name in "qkv"})
    out = BACKENDS["gather"].build(pattern)(wide.q, wide.k, wide.v)
    v = wide.v.repeat_interleave(case.q.shape[1] // case.k.shape[1], dim=1)
    real = case.valid[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[real].double(), (probabilities(wide) @ v.double())[real], atol=5e-6, rtol=0)


@given(st.integers(1, 3000), st.integers(0, 1000).map(lambda thousandths: thousandths / 1000))
def test_the_schedule(steps, skip):
    n_full = SparseDConfig(skip, 0.3, 128).n_full(steps)
    assert n_full == min(steps, max(1, math.ceil(Fraction(str(skip)) * steps))) == reference.n_full(skip, steps)


# ------------------------------------------------------------------------------------------------------------ samplers


@st.composite
def generations(draw, by_chance=False):
    """A sampler's arguments with a tiny model, and SparseD's numbers; `by_chance` also those that draw."""
    family = draw(st.sampled_from(["dream", "llada"]))
    blocks, block_length = draw(st.integers(1, 3)), draw(st.integers(1, 16))
    gen_length = blocks * block_length
    if family == "llada":
        options = {"steps": blocks * draw(st.integers(1, 2 * block_length)), "block_length": block_length}
        options["cfg_scale"] = draw(st.sampled_from([0.0, 0.0, 1.5]))
        if by_chance:
            options["remasking"] = draw(st.sampled_from(["low_confidence", "random"]))
    else:
        algorithms = ["maskgit_plus", "entropy", "topk_margin", *(["origin"] if by_chance else [])]
        options = {"steps": draw(st.integers(1, 2 * gen_length)), "alg": draw(st.sampled_from(algorithms))}
        options["top_k"] = draw(st.none() | st.integers(1, 100))
        options["top_p"] = draw(st.none() | st.floats(0.1, 1))
        if by_chance:
            options["alg_temp"] = draw(st.sampled_from([0.0, 0.5]))
    if by_chance:
        options["temperature"] = draw(st.just(0.0) | st.floats(0.1, 2))
    return SimpleNamespace(
        family=family,
        lengths=draw(st.lists(st.integers(1, 90) | st.integers(1, 300), min_size=2, max_size=3)),
        options=options | {"gen_length": gen_length},
        skip=draw(st.integers(0, 100)) / 100,
        select=draw(SHARES),
        block_size=draw(st.sampled_from([16, 32, 48, 64, 128])),
        seed=draw(st.integers(0, 2**32)),
    )


def prompts_of(case):
    generator = torch.Generator().manual_seed(case.seed)
    return [torch.randint(0, 90, (1, length), generator=generator) for length in case.lengths]


def generate(case, prompt, **changes):
    return GENERATE[case.family](CPU_MODELS[case.family], prompt, **case.options | changes)


def generate_alone(case, prompt, config=None):
    """Tokens of one prompt. Examples in which two tokens or two positions were level but for rounding are left out."""
    margins = [torch.tensor(1.0)]
    look, rank = sampling_settings.probability_of, unmasking.most_confident

    def looking(tokens, probabilities):
        first, second = probabilities.topk(2).values.unbind(-1)
        margins.extend(first - second)  # none in a step that runs only to choose blocks
        return look(tokens, probabilities)

    def ranking(shape, rows, confidence, counts):
        ordered, count = confidence.sort(descending=True).values, int(counts[0])
        if 0 < count < len(ordered):
            margins.append(ordered[count - 1] - ordered[count])
        return rank(shape, rows, confidence, counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_settings, "probability_of", looking)
        patch.setattr(unmasking, "most_confident", ranking)
        tokens = generate(case, prompt, config=config)[0]
    assume(min(margins) > 1e-5)
    return tokens


def padded(prompts, multiple):
    """One batch, left-padded to a common length by multiples of `multiple`; ids and mask [B, T]."""
    longest = max(prompt.shape[1] for prompt in prompts)
    pads = [multiple * math.ceil((longest - prompt.shape[1]) / multiple) for prompt in prompts]
    ids = torch.cat([F.pad(prompt, (pad, 0), value=7) for pad, prompt in zip(pads, prompts, strict=True)])
    return ids, torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]


@given(generations(by_chance=True))
def test_skipping_everything_is_full_attention_token_for_token(case):
    prompt = prompts_of(case)[0]
    full, skipping = (
        generate(case, prompt, config=config, generator=torch.Generator().manual_seed(case.seed))
        for config in (None, SparseDConfig(1.0, case.select, case.block_size))
    )
    assert torch.equal(skipping, full)
    assert torch.equal(full[:, : prompt.shape[1]], prompt)


@given(generations())
def test_selecting_everything_gives_the_tokens_of_full_attention(case):
    prompt = prompts_of(case)[0]
    config = SparseDConfig(case.skip, 1.0, case.block_size)
    assert torch.equal(generate(case, prompt, config=config), generate(case, prompt))


@given(generations(by_chance=True))
def test_one_seed_gives_the_same_tokens_twice(case):
    prompt, config = prompts_of(case)[0], SparseDConfig(case.skip, case.select, case.block_size)
    once, again = (
        generate(case, prompt, config=config, generator=torch.Generator().manual_seed(case.seed)) for _ in range(2)
    )
    assert torch.equal(once, again)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", CPU_MODELS)
def test_one_seed_gives_the_same_tokens_twice_on_a_gpu(family, temperature):
    model = copy.deepcopy(CPU_MODELS[family]).to("cuda", torch.bfloat16)
    prompts = torch.randint(0, 90, (2, 500), device="cuda")
    options = {"gen_length": 32, "steps": 32, "temperature": temperature, "config": SparseDConfig(0.2, 0.3, 32)}
    options |= {"block_length": 16} if family == "llada" else {}
    once, again = (
        GENERATE[family](model, prompts, generator=torch.Generator("cuda").manual_seed(7), **options) for _ in range(2)
    )
    assert torch.equal(once, again)


@given(generations())
def test_full_attention_knows_neither_neighbours_nor_padding(case):
    prompts = prompts_of(case)
    ids, mask = padded(prompts, 1)
    together = generate(case, ids, attention_mask=mask)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate_alone(case, prompt)
        assert torch.equal(row[len(row) - len(alone) :], alone)


@given(generations())
def test_sparsed_knows_neither_neighbours_nor_padding_by_whole_blocks(case):
    config = SparseDConfig(case.skip, case.select, case.block_size)
    ragged = case.lengths[0] % case.block_size  # the same for all: then whole blocks pad them to one length
    case.lengths = [length // 16 % 4 * case.block_size + (ragged or case.block_size) for length in case.lengths]
    prompts = prompts_of(case)
    ids, mask = padded(prompts, case.block_size)
    together = generate(case, ids, attention_mask=mask, config=config)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate_alone(case, prompt, config)
        assert torch.equal(row[len(row) - len(alone) :], alone)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", CPU_MODELS)
@pytest.mark.parametrize("length", [61, 245, 502, 517, 931, 1003, 2049])
def test_blocks_of_32_at_the_ragged_lengths_of_an_evaluation(family, length, device):
    """The released code stopped there with a device-side assert, an index out of bounds."""
    model = CPU_MODELS[family].to(device)
    options = {"dream": {}, "llada": {"block_length": 20}}[family] | {"gen_length": 20, "steps": 20}
    prompt = torch.randint(0, 90, (1, length), device=device)
    try:
        out = GENERATE[family](model, prompt, config=SparseDConfig(0.2, 0.3, 32), **options)
        out = out.cpu()  # a device-side assert shows here at the latest
    finally:
        model.cpu()
    assert out.shape == (1, length + 20) and ((out >= 0) & (out < model.config.vocab_size)).all()
    assert torch.equal(out[:, :length], prompt.cpu())
