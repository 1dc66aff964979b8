"""Blocks, caches, thresholds, factors and early stops of both samplers, with SparseD inside, against the float64 twin.

The twin (helpers/reference_blocks.py) is held against the published samplers first. Then every sampler's tokens are
its tokens, step by step; what must equal what; and properties over drawn arguments.
"""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsed import SparseDConfig
from sparsed.sampling import settings_for_answer
from sparsed.sampling.runner import StepRunner
from sparsed.watching import watched
from tests.helpers import reference_blocks, reference_sampling
from tests.helpers.patch_cases import published_config
from tests.helpers.reference import Sparse
from tests.helpers.reference import forward as plain_forward
from tests.helpers.reference_blocks import Model, decided, empty_cache, forward
from tests.helpers.sampling_cases import GENERATE, head_of, inputs_of, redraw
from tests.helpers.standins import EOS, EOT, MASK, tiny_dream, tiny_llada

CLEAR = 2e-5  # a decision that is closer than this may fall otherwise in float32
FAMILIES = ["dream", "llada"]
# as small as they come: the twin is slow, and runs thousands of forwards
DREAM_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
LLADA_SIZES = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 48}
MODELS = {"dream": tiny_dream(**DREAM_SIZES), "llada": tiny_llada(**LLADA_SIZES)}
CACHES = ["none", "prefix", "dual"]
SIZES = {"gen_length": 24, "steps": 12, "block_length": 8}
PROMPT_LEN = 29


@functools.cache
def twin_of(model):
    """The twin's model, and what it has generated so far: many cases are compared with the same other one."""
    return Model.of(model.family, model.state_dict(), published_config(model.family) | vars(model.config)), {}


def twin_names(options):
    """What the twin calls LLaDA's end-of-text flags, and SparseD's config."""
    options = dict(options)
    if options.pop("logits_eos_inf", False):
        options["no_logits"] = (EOS,)
    if options.pop("confidence_eos_eot_inf", False):
        options["no_confidence"] = (EOS, EOT)
    if options.get("sparse"):
        options["sparse"] = Sparse(*options["sparse"])
    return options


def generate(model, prompts, *, valid=None, sparse=None, **options):
    mask = None if valid is None or valid.all() else valid.long()
    config = SparseDConfig(*sparse) if sparse else None
    return GENERATE[model.family](model, prompts, attention_mask=mask, config=config, **options)


def positions(step, batch, length):
    """Per row of the batch, where a step committed."""
    committed = [[] for _ in range(batch)]
    for flat, _, _ in step.commits():
        committed[flat // length].append(flat % length)
    return committed


def check(model, *, prompt_len=PROMPT_LEN, padding=(0,), unlike=(), where=None, **options):
    """Our tokens are the twin's, and so are the steps and the rows that were computed. Returns (prompts, valid, Batch).

    Args:
        unlike: other options, of each of which the twin's tokens differ: the case can tell them apart.
        where: what must hold of the twin's batch.
    """
    twin, known = twin_of(model)
    prompts, valid, batch = decided(
        twin, prompt_len=prompt_len, padding=padding, clear=CLEAR, where=where, known=known,
        unlike=[twin_names(other) for other in unlike], **twin_names(options),
    )  # fmt: skip
    steps = []
    with inputs_of(model) as seen:
        tokens = generate(model, prompts, valid=valid, on_step=steps.append, **options)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == batch.tokens.tolist()
    ran = [positions(step, *tokens.shape) for step in steps if step.ran]
    expected = [
        [committed + filled for committed, filled in zip(step.committed, step.filled, strict=True)]
        for step in batch.forwards
    ]
    assert ran == expected
    if not options.get("early_stop"):  # a row that has stopped may be computed or left out
        sequences = len(prompts) * (2 if options.get("cfg_scale") else 1)
        rows = [sequences * (step.last - step.first) for step in batch.forwards]
        assert sum(ids.numel() for ids in seen) == sum(rows)
    return prompts, valid, batch


# ------------------------------------------------------------------------------------------------------ the twin alone


def random_batch(prompt_len=PROMPT_LEN, padding=(0, 5, 13)):
    valid = torch.tensor([[t >= pad for t in range(prompt_len)] for pad in padding])
    return torch.randint(0, 90, valid.shape), valid


@pytest.mark.parametrize("sparse", [None, Sparse(0.3, 0.3, 16)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {"gen_length": 24, "steps": 12, "block_length": 8},
        {"gen_length": 12, "steps": 12, "block_length": 6, "cfg_scale": 0.7, "no_confidence": (EOS, EOT)},
        {"gen_length": 8, "steps": 12, "block_length": 4},
    ],
    ids=str,
)
def test_the_twin_is_llada_s_published_sampler(case, sparse):
    prompts, valid = random_batch()
    model, _ = twin_of(MODELS["llada"])
    published = reference_sampling.generate(*model, prompts, valid=valid, sparse=sparse, **case)
    batch = reference_blocks.generate(model, prompts, valid=valid, sparse=sparse, **case)
    assert batch.tokens.tolist() == published.tokens.tolist()


@pytest.mark.parametrize("sparse", [None, Sparse(0.3, 0.3, 16)], ids=str)
@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_the_twin_is_dream_s_published_sampler_where_its_shares_are_even(alg, sparse):
    """An eps just below 0 makes the shares of its time grid even ones, which come out just above whole numbers."""
    prompts, valid = random_batch()
    model, _ = twin_of(MODELS["dream"])
    case = {"gen_length": 24, "steps": 6, "alg": alg, "top_p": 0.9}
    assert reference_sampling.dream_counts(24, 6, -1e-4) == [4] * 6
    published = reference_sampling.generate(*model, prompts, valid=valid, sparse=sparse, eps=-1e-4, **case)
    batch = reference_blocks.generate(model, prompts, valid=valid, sparse=sparse, block_length=24, **case)
    assert batch.tokens.tolist() == published.tokens.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_s_rows_over_fresh_keys_are_those_of_the_whole_forward(family):
    model, _ = twin_of(MODELS[family])
    ids, valid = random_batch(40, (0, 9))
    expected, _ = plain_forward(*model, ids, valid)
    for b in range(2):
        cache = empty_cache(model, 40)
        real = valid[b]
        whole, _ = forward(model, ids[b], real, 0, 40, cache)
        torch.testing.assert_close(whole[real], expected[b][real], atol=1e-12, rtol=0)
        some, _ = forward(model, ids[b], real, 20, 31, cache)
        torch.testing.assert_close(some, expected[b, 20:31], atol=1e-12, rtol=0)
        again, _ = forward(model, ids[b], real, 0, 40, cache)
        torch.testing.assert_close(again[real], expected[b][real], atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_s_old_keys_are_old(family):
    """Other tokens in the window: in the first layer the rest of the keys stay exactly as they were."""
    model, _ = twin_of(MODELS[family])
    ids, valid = torch.randint(0, 90, (40,)), torch.ones(40, dtype=torch.bool)
    cache = empty_cache(model, 40)
    forward(model, ids, valid, 0, 40, cache)
    old = [[tensor.clone() for tensor in layer] for layer in cache]
    changed = ids.clone()
    changed[20:31] = torch.randint(0, 90, (11,))
    out, _ = forward(model, changed, valid, 20, 31, cache)
    for layer, before in zip(cache, old, strict=True):
        for now, then in zip(layer, before, strict=True):
            assert torch.equal(now[:, :, :20], then[:, :, :20]) and torch.equal(now[:, :, 31:], then[:, :, 31:])
            assert (now[:, :, 20:31] != then[:, :, 20:31]).all()
    fresh, _ = forward(model, changed, valid, 0, 40, empty_cache(model, 40))
    assert (out - fresh[20:31]).abs().max() > 0.01, "the others' keys would be as good as new"


# -------------------------------------------------------------------------------------------------- blocks and caches


@pytest.fixture(params=[False, True], ids=["", "ahead"])
def ahead(request, monkeypatch):
    """Cached steps as a GPU takes them, launched before their candidates are counted, and as other devices do."""
    monkeypatch.setattr(StepRunner, "ahead", request.param)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("refresh", [None, 2, 0])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches(family, cache, refresh):
    others = [{"cache": name} for name in CACHES if name != cache]
    others += [{"refresh": n} for n in (1, 2, 0) if n != (1 if refresh is None else refresh)]
    check(MODELS[family], padding=(0, 9), unlike=others, cache=cache, refresh=refresh, **SIZES)


SHAPES = [  # (prompt tokens, new tokens, steps, block length)
    (1, 8, 8, 4),
    (17, 12, 12, 12),
    (33, 36, 12, 12),
    (20, 21, 9, 7),
    (40, 10, 10, 1),
    (25, 40, 30, 8),
    (21, 12, 24, 4),
    (12, 18, 3, 6),
    (44, 20, 10, 10),
    (3, 39, 6, 13),
]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family, shape, cache):
    prompt_len, gen_length, steps, block_length = shape
    check(MODELS[family], prompt_len=prompt_len, gen_length=gen_length, steps=steps, block_length=block_length,
          cache=cache)  # fmt: skip


@pytest.mark.parametrize("options", [{"cache": "dual"}, {"threshold": 0.5}, {"factor": 1.5}], ids=str)
@pytest.mark.parametrize("gen_length", [20, 64])
def test_dream_s_blocks_are_of_32_tokens_unless_it_is_told(gen_length, options):
    _, _, batch = check(MODELS["dream"], prompt_len=9, gen_length=gen_length, steps=16, **options)
    assert batch.forwards[0].last == 9 + gen_length


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("options", [{}, {"refresh": 0}, {"threshold": 0.5}, {"factor": 1.5, "refresh": 2}], ids=str)
@pytest.mark.parametrize("cache", CACHES[1:])
def test_under_guidance_both_halves_have_a_cache(cache, options):
    unlike = [{"cfg_scale": 0.0}, {"cache": "none"}]
    check(MODELS["llada"], padding=(0, 11), unlike=unlike, cache=cache, cfg_scale=0.8, **SIZES, **options)


# ---------------------------------------------------------------------------------------------- thresholds and factors

PARALLEL = [{"threshold": 0.3}, {"threshold": 0.9}, {"factor": 0.5}, {"factor": 1.0}, {"factor": 2.5}]


@pytest.fixture(scope="module")
def sure():
    """Models that are often sure of a token."""
    models = {"dream": tiny_dream(**DREAM_SIZES), "llada": tiny_llada(**LLADA_SIZES)}
    for model in models.values():
        head_of(model).weight.data *= 2
    return models


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", PARALLEL, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_and_factors(sure, family, options, cache):
    never, always = dict.fromkeys(options), {"threshold": 0, "factor": None}
    check(sure[family], padding=(0, 9), unlike=[never, always], cache=cache, **SIZES, **options)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", [{"threshold": 2}, {"threshold": 0}, {"factor": 0.01}, {"factor": 1e6}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_and_factors_that_almost_none_or_all_pass(family, options, cache):
    check(MODELS[family], padding=(0, 7), cache=cache, **SIZES, **options)


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("options", [{"threshold": 0.7}, {"factor": 0.6}], ids=str)
@pytest.mark.parametrize("steps", [3, 9, 36])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_floor_is_the_step_s_share_and_at_least_one(family, steps, options, cache):
    """Shares of 8; of 3, 3 and 2; of 1 and, in a block's last steps, 0."""
    check(MODELS[family], gen_length=24, steps=steps, block_length=8, cache=cache, **options)


ALGORITHMS = ["maskgit_plus", "topk_margin", "entropy"]
FILTERS = [{}, {"top_p": 0.8}, {"top_p": 0.9, "top_k": 12}]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(
    "options", [{"cache": "dual"}, {"threshold": 0.6}, {"cache": "prefix", "factor": 0.8}], ids=str
)
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_dream_s_algorithms_rank_the_floor(alg, options, filters):
    unlike = [{"alg": other} for other in ALGORITHMS if other != alg] if not filters else [dict.fromkeys(filters)]
    check(MODELS["dream"], unlike=unlike, alg=alg, **SIZES, **options, **filters)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_the_probability_is_taken_before_the_filters(alg, cache):
    """Of two tokens that are left one would have at least half of it, and each block be written in one step."""
    check(MODELS["dream"], where=lambda batch: len(batch.forwards) > 6, alg=alg, cache=cache, threshold=0.5, top_k=2,
          **SIZES)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- end tokens

OTHER_END = 7  # may stand in a prompt, where it ends nothing


@pytest.fixture(scope="module")
def ending():
    """Models that would often end their text, with either of two tokens."""
    dream, llada = tiny_dream(end_token_ids=(OTHER_END, EOS), **DREAM_SIZES), tiny_llada(**LLADA_SIZES)
    redraw(dream, EOS, 0)
    redraw(dream, OTHER_END, 1)
    redraw(llada, EOS, 0)
    redraw(llada, EOT, 1)
    return {"dream": dream, "llada": llada}


def written(batch):
    """Tokens of each row that steps committed; fewer than all if it has stopped before the last block."""
    return [sum(len(step.committed[b]) for step in batch.forwards) for b in range(len(batch.tokens))]


def some_stop(batch):
    """One row stops early, another does not."""
    return len({count == SIZES["gen_length"] for count in written(batch)}) == 2


ENDS = [
    {"cache": "none"},
    {"cache": "prefix", "refresh": 2},
    {"cache": "dual"},
    {"cache": "dual", "refresh": 0, "threshold": 0.5},
    {"threshold": 0.7},
    {"factor": 1.0, "cache": "prefix"},
]


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("options", ENDS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_early_stops(ending, family, options):
    case = {**SIZES, "early_stop": True, **options}
    check(ending[family], padding=(0, 11), unlike=[{"early_stop": False}], where=some_stop, **case)


@pytest.mark.parametrize("family", FAMILIES)
def test_when_all_rows_have_stopped_nothing_more_is_computed(ending, family):
    def all_stop(batch):
        return max(written(batch)) < SIZES["gen_length"] and len(set(written(batch))) == 2

    case = {**SIZES, "early_stop": True, "cache": "dual"}
    _, _, batch = check(ending[family], padding=(0, 5), where=all_stop, **case)
    assert len(batch.forwards) < SIZES["steps"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stop_fills_with_the_first_end_token_of_its_block(ending, family):
    """First by its place, not by when it was committed; both orders."""
    ends = {"dream": [EOS, OTHER_END], "llada": [EOS, EOT]}[family]
    for first in ends:

        def both(batch, first=first):
            stop = PROMPT_LEN + written(batch)[0]
            block = batch.tokens[0, stop - 8 : stop].tolist()
            return stop < batch.tokens.shape[1] and set(ends) <= set(block) and batch.tokens[0, stop] == first

        check(ending[family], where=both, early_stop=True, cache="dual", **SIZES | {"steps": 6})


FLAGS = [{"logits_eos_inf": True}, {"confidence_eos_eot_inf": True},
         {"logits_eos_inf": True, "confidence_eos_eot_inf": True}]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}, {"factor": 1.5}], ids=str)
@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_llada_s_end_of_text_flags(ending, flags, cache, options):
    """An end token whose confidence is suppressed passes no threshold: it is committed by the floor alone."""
    none = {"no_logits": (), "no_confidence": ()}
    check(ending["llada"], unlike=[none], cache=cache, **SIZES, **flags, **options)


# ------------------------------------------------------------------------------------------------------ SparseD inside

SPARSE_SIZES = {"prompt_len": 40, "gen_length": 32, "steps": 16, "block_length": 8}


def kinds(batch):
    return [step.kind for step in batch.forwards]


@pytest.mark.parametrize("dense_answer", [False, True], ids=["", "dense answer"])
@pytest.mark.parametrize("skip", [0, 0.3, 0.6])
@pytest.mark.parametrize("options", [{"cache": "none"}, {"cache": "prefix"}, {"cache": "dual"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_sparsed_counts_whole_refreshes_or_steps(family, options, skip, dense_answer):
    unlike = [{"sparse": None}, {"sparse": (skip, 0.3, 16, not dense_answer)}]
    sparse = (skip, 0.3, 16, dense_answer)
    *_, batch = check(MODELS[family], unlike=unlike, sparse=sparse, **SPARSE_SIZES, **options)
    full = {0: 1, 0.3: 2 if "none" not in options.values() else 5, 0.6: 3 if "none" not in options.values() else 10}
    whole = [kind for kind in kinds(batch) if kind != "rows"]
    assert whole[: full[skip]] == ["full"] * (full[skip] - 1) + ["selecting"] and set(whole[full[skip] :]) == {"sparse"}


@pytest.mark.parametrize("cache", CACHES[1:])
@pytest.mark.parametrize(("refresh", "skip"), [(2, 0), (2, 0.6), (3, 0.5), (4, 0), (0, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_sparsed_selects_only_if_a_later_refresh_uses_it(family, refresh, skip, cache):
    refreshes = {0: 1, 2: 2, 3: 2, 4: 1}[refresh]
    used = refreshes == 2 and skip < 0.6
    sparse, case = (skip, 0.3, 16), SPARSE_SIZES | {"cache": cache, "refresh": refresh}
    prompts, _, batch = check(MODELS[family], unlike=[{"sparse": None}] if used else [], sparse=sparse, **case)
    assert ("selecting" in kinds(batch), "sparse" in kinds(batch)) == (used, used)
    selections = []
    rule = watched(lambda scores, pattern: selections.append(pattern))
    generate(
        MODELS[family], prompts, sparse=sparse, rule=rule, **{key: case[key] for key in case if key != "prompt_len"}
    )
    assert len(selections) == (2 if used else 0), "one for each layer"


@pytest.mark.parametrize("dense_answer", [False, True], ids=["", "dense answer"])
@pytest.mark.parametrize("skip", [0, 0.3, 0.6])
@pytest.mark.parametrize("options", [{"threshold": 0.4}, {"factor": 1.2}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_sparsed_counts_committed_tokens(family, options, skip, dense_answer):
    sparse = (skip, 0.3, 16, dense_answer)
    unlike = [{"sparse": None}, {"sparse": (skip, 0.3, 16, not dense_answer)}]
    *_, batch = check(MODELS[family], unlike=unlike, sparse=sparse, **SPARSE_SIZES, **options)
    before = kinds(batch).index("selecting")
    assert sum(len(step.committed[0]) for step in batch.forwards[:before]) >= skip * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fifth_committed_is_what_skip_waits_for(family):
    """Block after block in one step each: the second forward selects, not the third."""
    case = {"gen_length": 40, "steps": 40, "block_length": 8, "threshold": 0}
    *_, batch = check(MODELS[family], unlike=[{"sparse": None}], sparse=(0.2, 0.3, 16), **case)
    assert kinds(batch) == ["full", "selecting", "sparse", "sparse", "sparse"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_that_end_an_answer_can_be_given(family):
    """As a tokenizer knows more of them than the model's config."""
    options = {**SIZES, "cache": "dual", "early_stop": True}
    prompts = torch.randint(0, 90, (1, PROMPT_LEN))
    plain = GENERATE[family](MODELS[family], prompts, end_token_ids=(), **options)[0]
    end = plain[PROMPT_LEN + 3].item()
    early = GENERATE[family](MODELS[family], prompts, end_token_ids={end}, **options)[0]
    assert early.tolist() == plain[: PROMPT_LEN + 8].tolist() + [end] * 16


@pytest.mark.parametrize("family", FAMILIES)
def test_the_least_committed_row_says_when_sparsed_selects(family):
    def one_waits(batch):
        """A row has the share a forward before the other has it."""
        done = [0, 0]
        for step in batch.forwards:
            if step.kind == "selecting":
                return False
            done = [count + len(row) for count, row in zip(done, step.committed, strict=True)]
            if max(done) >= 0.5 * 32:
                return min(done) < 0.5 * 32
        return False

    check(MODELS[family], padding=(0, 9), where=one_waits, unlike=[{"sparse": None}], sparse=(0.5, 0.3, 16),
          threshold=0.4, **SPARSE_SIZES)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_has_stopped_does_not_keep_sparsed_from_selecting(ending, family):
    def stopped_below(batch):
        return min(written(batch)) < 0.5 * 32 and "sparse" in kinds(batch)

    check(ending[family], padding=(0, 9), where=stopped_below, unlike=[{"sparse": None}], sparse=(0.5, 0.3, 16),
          early_stop=True, threshold=0.5, **SPARSE_SIZES)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"cache": "prefix"}, {"cache": "dual", "threshold": 0.5}, {"threshold": 0.5}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_sparsed_over_a_batch(family, options):
    """By whole blocks padded and not; each row has its own kept blocks."""
    check(MODELS[family], padding=(16, 5), unlike=[{"sparse": None}], sparse=(0.3, 0.3, 16), **SPARSE_SIZES,
          **options)  # fmt: skip


@pytest.mark.parametrize("dense_answer", [False, True], ids=["", "dense answer"])
@pytest.mark.parametrize(
    "options", [{"cache": "prefix"}, {"cache": "dual", "threshold": 0.5}, {"factor": 1.0}], ids=str
)
def test_sparsed_under_guidance(options, dense_answer):
    sparse = (0.3, 0.3, 16, dense_answer)
    unlike = [{"sparse": None}, {"cfg_scale": 0.0}]
    check(MODELS["llada"], unlike=unlike, cfg_scale=1.0, sparse=sparse, **SPARSE_SIZES, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_only_select(family):
    """By steps the fifth of a block's six selects, though the block is complete after four."""
    case = {"prompt_len": 40, "gen_length": 16, "steps": 24, "block_length": 4, "sparse": (0.2, 0.3, 16)}
    *_, batch = check(MODELS[family], unlike=[{"sparse": None}], **case)
    assert [step.step for step in batch.forwards][:6] == [0, 1, 2, 3, 4, 6] and kinds(batch)[4] == "selecting"


@pytest.mark.parametrize("cache", CACHES[1:])
@pytest.mark.parametrize("sparse", [None, (0, 0.3, 16), (0, 0.3, 16, True)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_happen_to_be_all_rows_are_no_refresh(family, sparse, cache):
    """After a prompt of one token Dream's rows from the one before the block on are the whole sequence."""
    case = {"prompt_len": 1, "gen_length": 48, "steps": 24, "block_length": 12, "cache": cache, "sparse": sparse}
    for refresh in (1, 2):
        check(MODELS[family], refresh=refresh, **case)


# ------------------------------------------------------------------------------------------------ what must equal what


def tokens_of(model, prompt_len=PROMPT_LEN, padding=(0, 6), **options):
    """Of a fixed batch: the same work done otherwise gives the same numbers to the last bits, and ties play no part."""
    prompts, valid = random_batch(prompt_len, padding)
    return generate(model, prompts, valid=valid, **options)


def check_equal(family, *all_options, differs=None, **shared):
    """The same tokens under all options, and others under those of `differs`."""
    out = []
    for options in all_options if differs is None else [*all_options, differs]:
        torch.manual_seed(0)
        out.append(tokens_of(MODELS[family], **shared | options).tolist())
    if differs is not None:
        assert out.pop() != out[0], "the case tells nothing"
    assert all(tokens == out[0] for tokens in out)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refresh_before_every_step_is_no_cache(family):
    """Where each block is written in one step, too."""
    caches = [{"cache": cache} for cache in CACHES]
    for sizes in ({"steps": 30, "block_length": 1}, {"steps": 5, "block_length": 6}):
        check_equal(family, *caches, differs={"cache": "dual", "refresh": 0}, gen_length=30, **sizes)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_that_none_passes_is_the_fixed_schedule(family, cache):
    check_equal(family, {}, {"threshold": 1.5}, {"threshold": 1e9}, differs={"threshold": 0.2}, cache=cache, **SIZES)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_that_all_pass_is_a_step_a_block(family, cache):
    shared = SIZES | {"cache": cache}
    check_equal(family, {"threshold": 0}, {"threshold": 0.0}, {"factor": 1e6}, {"steps": 3}, differs={}, **shared)
    for options in ({"threshold": 0}, {"factor": 1e6}):
        steps = []
        tokens_of(MODELS[family], on_step=steps.append, **shared, **options)
        assert sum(step.ran for step in steps) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_is_refreshed_once(family):
    options = [{"cache": cache, "refresh": n} for cache in CACHES[1:] for n in (None, 1, 2, 0)]
    check_equal(family, *options, differs={"cache": "none"}, gen_length=24, steps=12, block_length=24)


@pytest.mark.parametrize("cache", CACHES[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_how_often_all_rows_are_computed(family, cache):
    shared = SIZES | {"cache": cache}
    check_equal(family, {}, {"refresh": None}, {"refresh": 1}, differs={"refresh": 2}, **shared)
    check_equal(family, {"refresh": 0}, {"refresh": 3}, {"refresh": 99}, differs={"refresh": 2}, **shared)


@pytest.mark.parametrize(
    "options", [{"cache": "dual"}, {"cache": "prefix", "threshold": 0.5}, {"factor": 1.2}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_or_skipping_all_is_full_attention(family, options):
    whole = [{"sparse": (0.3, 1, 16)}, {"sparse": (0, 1, 16, True)}, {"sparse": (1, 0.3, 16)}]
    check_equal(family, {}, *whole, differs={"sparse": (0, 0.3, 16)}, **SIZES, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stop_changes_nothing_before_it(ending, family):
    """Nor anything where no end token comes."""
    check_equal(family, {"early_stop": False}, {"early_stop": True}, padding=(0,), prompt_len=20, **SIZES)
    stopped = 0
    for cache in CACHES:
        case = {**SIZES, "cache": cache, "padding": (0, 2, 4, 6)}
        torch.manual_seed(1)
        plain = tokens_of(ending[family], **case)
        torch.manual_seed(1)
        early = tokens_of(ending[family], early_stop=True, **case)
        ends = {EOS, *((EOT,) if family == "llada" else (OTHER_END,))}
        for with_stop, without in zip(early.tolist(), plain.tolist(), strict=True):
            expected = list(without)
            for end in range(PROMPT_LEN + 8, len(without), 8):
                found = [token for token in without[end - 8 : end] if token in ends]
                if found:
                    expected[end:] = [found[0]] * (len(without) - end)
                    stopped += 1
                    break
            assert with_stop == expected
    assert stopped, "no row ended early: the case tells nothing"


def test_dream_s_published_sampler_is_one_region():
    """The time grid is not even shares; what makes blocks makes even shares of one block, too."""
    shared = {"gen_length": 24, "steps": 16}
    check_equal("dream", {}, {"cache": "none"}, differs={"block_length": 24}, **shared)
    shared["cache"] = "dual"
    check_equal("dream", {}, {"block_length": 24}, differs={"block_length": 12}, **shared)


# ---------------------------------------------------------------------------------------------------------- properties

DRAWN = {
    "dream": st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.0, 0.7])},
        optional={
            "alg": st.sampled_from(ALGORITHMS),
            "top_p": st.sampled_from([0.5, 0.9]),
            "top_k": st.integers(1, 20),
            "alg_temp": st.just(0.3),
        },
    ),
    "llada": st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.0, 0.7])},
        optional={
            "remasking": st.sampled_from(["low_confidence", "random"]),
            "cfg_scale": st.just(0.8),
            "logits_eos_inf": st.booleans(),
            "confidence_eos_eot_inf": st.booleans(),
        },
    ),
}


@st.composite
def generations(draw):
    """(family, prompt length, padding, options) of a small batch; about half of them at temperature 0."""
    family, prompt_len = draw(st.sampled_from(FAMILIES)), draw(st.integers(1, 24))
    padding = [draw(st.integers(0, prompt_len - 1)) for _ in range(draw(st.integers(1, 3)))]
    block_length, blocks = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    options = {
        "block_length": block_length,
        "gen_length": blocks * block_length,
        "steps": blocks * draw(st.integers(1, block_length + 2)),
        "cache": draw(st.sampled_from(CACHES)),
        "early_stop": draw(st.booleans()),
    }
    if options["cache"] != "none":
        options["refresh"] = draw(st.sampled_from([None, 0, 1, 2, 3]))
    parallel = draw(st.sampled_from([None, "threshold", "factor"]))
    if parallel:
        options[parallel] = draw(st.sampled_from([0.3, 0.8, 1.5]))
    if draw(st.integers(0, 2)) == 0:
        options["sparse"] = (draw(st.sampled_from([0, 0.4])), 0.3, 16, draw(st.booleans()))
    options |= draw(DRAWN[family])
    if family == "dream" and not parallel and draw(st.integers(0, 4)) == 0:
        options["alg"] = "origin"
    return family, prompt_len, padding, options


def is_greedy(options):
    """Whether nothing is drawn."""
    drawn = options["temperature"] > 0 or options.get("alg_temp") or options.get("alg") == "origin"
    return not drawn and options.get("remasking") != "random"


@given(generations(), st.integers(0, 2**16))
def test_every_generation_keeps_its_promises(ending, case, seed):
    family, prompt_len, padding, options = case
    model, generator = ending[family], torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, 94, (len(padding), prompt_len), generator=generator)
    valid = torch.arange(prompt_len) >= torch.tensor(padding)[:, None]

    def run(rows=slice(None), pad=0, **more):
        return generate(
            model, prompts[rows, pad:], valid=valid[rows, pad:], generator=torch.Generator().manual_seed(seed),
            **options, **more,
        )  # fmt: skip

    steps = []
    tokens = run(on_step=steps.append)
    batch, length = tokens.shape
    assert length == prompt_len + options["gen_length"] and torch.equal(tokens[:, :prompt_len], prompts)
    assert torch.equal(run(), tokens), "the same seed, other tokens"
    assert sum(step.ran for step in steps) <= options["steps"]

    # commit by commit: no committed token is overwritten, block comes after block
    ends = {EOS, *((EOT,) if family == "llada" else (OTHER_END,))}
    block_length, open_masks = options["block_length"], False  # whether the model has written the mask itself
    canvas = torch.cat([prompts, torch.full((batch, length - prompt_len), MASK)], 1).tolist()
    reached, stopped = [0] * batch, [False] * batch
    for step in steps:
        written = [[] for _ in range(batch)]
        for flat, token, _ in step.commits():
            written[flat // length].append((flat % length, token))
            open_masks = open_masks or token == MASK
        for row, places in enumerate(written):
            assert not places or not stopped[row], "a row that has stopped commits nothing"
            blocks = sorted({(place - prompt_len) // block_length for place, _ in places})
            for place, token in places:
                assert place >= prompt_len and canvas[row][place] == MASK
                canvas[row][place] = token
            if len(blocks) > 1 and not open_masks:  # the block's last tokens, and those that its end fills in
                end = prompt_len + (blocks[0] + 1) * block_length
                first = next(token for token in canvas[row][end - block_length : end] if token in ends)
                assert options["early_stop"] and canvas[row][end:] == [first] * (length - end)
                stopped[row] = True
            if blocks and not open_masks:
                assert blocks[0] >= reached[row]
                reached[row] = blocks[0]
    assert canvas == tokens.tolist()
    assert open_masks or not (tokens == MASK).any()

    if not is_greedy(options) or "sparse" in options:
        return
    for row, pad in enumerate(padding):
        alone = run(slice(row, row + 1), pad)
        if not torch.equal(alone[0], tokens[row, pad:]):
            # rounding may decide a tie, nothing else
            given_alone = {name: value for name, value in options.items() if name not in ("temperature", "remasking")}
            twin, _ = twin_of(model)
            assert reference_blocks.generate(twin, prompts[row : row + 1, pad:], **twin_names(given_alone)).gap < CLEAR


@pytest.mark.parametrize("saving", [{"cache": "dual"}, {"threshold": 0}, {"factor": 1, "early_stop": True}])
def test_dream_s_answers_fill_their_last_block_where_it_has_blocks(saving):
    assert settings_for_answer("dream", 40, None, 32).gen_length == 40
    found = settings_for_answer("dream", 40, None, 32, **saving)
    assert (found.gen_length, found.block_length, found.steps) == (64, 32, 64)


def test_a_ranking_that_overflows_still_ranks_candidates():
    model = MODELS["dream"]
    options = {"gen_length": 16, "steps": 16, "block_length": 8, "alg": "entropy", "alg_temp": 1e-42}
    out = GENERATE["dream"](model, torch.randint(0, 90, (1, 20)), **options, on_step=None)
    assert (out == MASK).sum() < 16
