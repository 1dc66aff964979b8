"""Dense answer rows: from the token before the generated region on, queries read every key; all against the twin."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from sparsed import SparseDConfig, select_blocks
from sparsed.backends import BACKENDS, Problem, flash, sparse_attention
from sparsed.blocks import BlockGrid, Pattern
from sparsed.evaluation.methods import METHODS
from sparsed.kernels import block_scores, full_attention
from sparsed.sampling import runner
from sparsed.sampling.replay import Replays
from sparsed.schedule import FULL
from sparsed.selection import isolated_top_k
from sparsed.watching import pooled, recall, watched
from tests.backends.test_attention import SHAPES, check_error, exact, flash_twin, problem
from tests.helpers import reference
from tests.helpers.interpreter import interpret
from tests.helpers.patch_cases import (
    GEN_LENGTH,
    PROMPT_LEN,
    SPARSE,
    STEPS,
    logits_of,
    published_config,
    run,
    sequences,
    snapshot,
)
from tests.helpers.reference_sampling import StepRunner
from tests.helpers.sampling_cases import GENERATE, options_of
from tests.helpers.standins import tiny_dream, tiny_llada
from tests.method.test_properties import probabilities
from tests.method.test_properties import sequences as shapes
from tests.method.test_selection import BORDERS, attention_inputs, left_padding
from tests.method.test_watching import random_pattern
from tests.sampling.test_sampling import check

DENSE = SPARSE._replace(dense_answer=True)
LENGTH = PROMPT_LEN + GEN_LENGTH


# ---------------------------------------------------------------------------------------------------------- one layer


def dense_problem(length, prompt_len, *shape, **options):
    """A `problem` of test_attention with dense answer rows: (q, k, v, valid, the twin's token mask, the Pattern)."""
    q, k, v, valid, keep, pattern = problem(length, prompt_len, *shape, **options)
    allowed = reference.dense_rows(reference.expand(keep, shape[0], length), prompt_len)
    return q, k, v, valid, allowed, replace(pattern, grid=replace(pattern.grid, dense_answer=True))


def windows(length, prompt_len, block_size):
    """Queries: all, the last one, those that read everything and some before; windows up to where these begin, and over
    it."""
    border = max(prompt_len - 1, 0)
    pairs = [(start, length) for start in {0, length - 1, border, border - block_size // 2}]
    pairs += [(border - 9, border), (border - 9, border + 4)]
    return [slice(start, stop) for start, stop in sorted(pairs) if 0 <= start < stop <= length]


def check_layer(name, *case):
    """The backend's attention equals float64 attention under the twin's mask, of all queries and of windows."""
    q, k, v, valid, allowed, pattern = dense_problem(*case)
    expected = exact(q, k, v, valid, allowed, 1)
    attend = sparse_attention(name, pattern)
    for window in windows(*case[:3]):
        out = attend(q[:, :, window], k, v, window.start)
        assert out.shape == q[:, :, window].shape and out.isfinite().all()
        real = valid[:, None, window, None].expand_as(out)
        torch.testing.assert_close(out[real].double(), expected[:, :, window][real], atol=2e-6, rtol=0)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("border", ["inside", "no prompt", "one token", "no region"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_equals_the_twin(shape, border):
    length, prompt_len, *rest = shape
    check_layer("gather", length, {"no prompt": 0, "one token": 1, "no region": length}.get(border, prompt_len), *rest)


@pytest.mark.parametrize("prompt_len", [0, 65, 150, 200])
@pytest.mark.parametrize("block_size", [64, 128])
def test_flash_answers_for_the_prompt_alone(monkeypatch, block_size, prompt_len):
    monkeypatch.setattr(flash, "flash_block_sparse", flash_twin)
    check_layer("flash", 200, prompt_len, block_size, (4, 2), (0,))


def test_triton_kernel_interpreted():
    interpret("""
from tests.method.test_dense_answer import check_layer
check_layer("triton", 203, 150, 32, (4, 2), (0,))
check_layer("triton", 70, 40, 16, (2, 1), (0, 5, 35))
check_layer("triton", 97, 96, 48, (2, 2), (0, 50))
""")


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("pads", [None, (0, 0), (0, 40), (5, 76)])
@pytest.mark.parametrize("last", [77, 20, 1])
def test_full_attention_of_shared_heads_and_padding(heads, pads, last):
    q, k, v = (torch.randn(2, n, h, 20).transpose(1, 2) for n, h in ((last, heads[0]), (77, heads[1]), (77, heads[1])))
    valid = None if pads is None else left_padding(77, pads)
    out, lse = full_attention(q, k, v, valid)
    assert out.shape == q.shape and out.dtype == q.dtype and lse is None
    torch.testing.assert_close(out.double(), reference.attention(q, k, v, valid), atol=2e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("pads", [(0,), (0, 150)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("name", "block_size"),
    [("triton", 32), ("triton", 128), ("flash", 64), ("flash", 128), ("flex", 32), ("flex", 128), ("gather", 48)],
)
def test_backends_on_the_gpu(name, block_size, width, pads):
    q, k, v, valid, allowed, pattern = dense_problem(589, 400, block_size, (8, 2), pads, width=width)
    q, k, v = (x.cuda().bfloat16() for x in (q, k, v))
    why = BACKENDS[name].fault(Problem(q.device, q.dtype, len(pads), 8, 2, width, block_size, any(pads)))
    if why is not None:
        assert name == "flash" and ("package" in why or "padding" in why), why
        pytest.skip(f"{name} {why}")
    attend = sparse_attention(name, Pattern(pattern.indices.cuda(), pattern.counts, pattern.grid.to(q.device)))
    for window in windows(589, 400, block_size):
        out = attend(q, k, v)
        out[:, :, window] = attend(q[:, :, window], k, v, window.start)
        check_error(out, q, k, v, valid.cuda(), allowed.cuda(), 1)


# ------------------------------------------------------------------------------------------------ what is said of it


@pytest.mark.parametrize("pads", [(0,), (0, 9, 48)])
@pytest.mark.parametrize(("length", "prompt_len", "block_size"), BORDERS)
def test_selected_blocks_of_dense_rows_are_all_that_are_real(length, prompt_len, block_size, pads):
    pads = tuple(min(pad, max(prompt_len - 1, 0)) for pad in pads)
    q, k = attention_inputs(length, batch=len(pads))
    valid = left_padding(length, pads)
    options = {"prompt_len": prompt_len, "block_size": block_size, "select": 0.3, "key_valid": valid}
    plain, dense = select_blocks(q, k, **options), select_blocks(q, k, **options, dense_answer=True)
    first = max(prompt_len - 1, 0) // block_size
    assert torch.equal(dense[:, :, :first], plain[:, :, :first])
    for b, pad in enumerate(pads):
        assert dense[b, :, first:, pad // block_size :].all() and not dense[b, :, first:, : pad // block_size].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_density_and_blocks_read_are_those_of_the_token_mask(shape):
    length, prompt_len, block_size, _, pads = shape
    for border in {0, 1, prompt_len, prompt_len - prompt_len % block_size + 1, length}:
        *_, valid, allowed, pattern = dense_problem(length, border, *shape[2:])
        rows = [slice(row, row + 1) for row in range(len(pads))]
        shares = [reference.density([allowed[row]], 1, length, valid[row]) for row in rows]
        assert pattern.density == pytest.approx(sum(shares) / len(shares), abs=1e-6)
        pairs = (valid[:, None, :, None] & valid[:, None, None]).expand_as(allowed)
        real, read = (reference.pooled(x.double(), block_size) > 0 for x in (pairs, allowed & pairs))
        assert torch.equal(pattern.read_mask()[real.any(-1)], read[real.any(-1)])


@pytest.mark.parametrize(("length", "prompt_len"), [(85, 49), (85, 65), (96, 1), (85, 61), (85, 48), (90, 82)])
def test_recall_counts_every_key_of_the_dense_rows(length, prompt_len):
    q, k = attention_inputs(length, batch=2)
    valid = left_padding(length, (0, 20 if prompt_len > 20 else 0))
    scores = reference.block_scores(q, k, 16, valid).float()
    plain = isolated_top_k(scores, BlockGrid(length, prompt_len, 16, valid), 0.3)
    dense = replace(plain, grid=replace(plain.grid, dense_answer=True))
    kept, first = reference.expand(plain.as_mask(), 16, length), prompt_len - 1
    for b, found in enumerate(recall(scores, dense).tolist()):
        mass = [reference.head_probabilities(q[b, h], k[b, h // 2], valid[b]) for h in range(4)]
        held = (torch.stack(mass) * kept[b]).sum(-1)  # [H, T]
        border = slice(first - first % 16, first - first % 16 + 16)  # here the mean of all queries stands for each
        held[:, border] = held[:, border].sum(-1, keepdim=True) / valid[b, border].sum()
        held[:, first:] = 1
        assert found == pytest.approx(held[:, valid[b]].mean().item(), abs=1e-5)
        assert recall(scores, plain)[b] <= found <= 1 + 1e-6


@pytest.mark.parametrize(("blocks", "most"), [(9, 128), (37, 8), (129, 128)])
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_pooled_rows_with_a_dense_query_are_on(blocks, most, share):
    pattern, _ = random_pattern(3, blocks, 3)
    prompt_len = int(share * blocks * 16)
    dense = replace(pattern, grid=replace(pattern.grid, prompt_len=prompt_len, dense_answer=True))
    side, first = min(blocks, most), max(prompt_len - 1, 0) // 16
    plain, picture = pooled(pattern, most), pooled(dense, most)
    for row in range(side):
        on = (row + 1) * blocks // side > first  # its last query block is the first dense one, or behind it
        assert picture[:, row].all() if on else torch.equal(picture[:, row], plain[:, row])


@given(shapes(longest=600))
def test_any_shape_equals_the_twin_and_reads_more_than_without(case):
    length, size = case.valid.shape[1], case.block_size
    grid = BlockGrid(length, case.prompt_len, size, case.key_valid)
    scores = block_scores(case.q, case.k, block_size=size, key_valid=case.key_valid)
    plain = isolated_top_k(scores, grid, case.select)

    def dense(prompt_len):
        return replace(plain, grid=replace(grid, prompt_len=prompt_len, dense_answer=True))

    out = sparse_attention("gather", dense(case.prompt_len))(case.q, case.k, case.v)
    allowed = reference.dense_rows(reference.expand(plain.as_mask(), size, length), case.prompt_len)
    mask = allowed & case.valid[:, None, None]
    v = case.v.repeat_interleave(case.q.shape[1] // case.k.shape[1], dim=1).double()
    expected = probabilities(case, allowed) @ v
    alike = F.scaled_dot_product_attention(case.q, case.k, case.v, attn_mask=mask, enable_gqa=True)
    real = case.valid[:, None, :, None].expand_as(out)
    error, dense_error = ((x.double() - expected)[real].abs().max() for x in (out, alike))
    assert out.isfinite().all() and error <= 2 * dense_error + torch.finfo(out.dtype).eps * v.abs().max()
    attended = (mask & case.valid[:, None, :, None]).double().sum((2, 3)).mean(1)
    densities = [dense(prompt).density.item() for prompt in (0, case.prompt_len, length)]
    assert densities[0] == pytest.approx(1) and densities == sorted(densities, reverse=True)
    assert densities[1] == pytest.approx((attended / case.valid.sum(-1) ** 2).mean().item(), abs=1e-5)
    assert densities[2] >= plain.density.item() - 1e-6


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_what_is_no_bool_is_refused(value):
    with pytest.raises(ValueError, match="dense_answer"):
        SparseDConfig(dense_answer=value)


# -------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("pads", [(0,), (0, 9, 33)])
def test_every_forward_equals_the_twin(any_model, weights, pads):
    model, family = any_model
    valid, before = left_padding(LENGTH, pads), snapshot(model)
    mask = None if valid.all() else valid
    options = {"prompt_len": PROMPT_LEN, "steps": STEPS, "sparse": DENSE}
    twins = [StepRunner(family, weights[family], published_config(family), valid=row[None], **options) for row in valid]
    steps = sequences(STEPS, rows=len(pads))
    with run(model):
        plain = [logits_of(model, ids, mask) for ids in steps]
    with run(model, config=SparseDConfig(*DENSE)) as state:
        for step, ids in enumerate(steps):
            logits = logits_of(model, ids, mask)
            assert step > 1 or torch.equal(logits, plain[step]), "full and selecting steps are as they were"
            assert step < 2 or (logits - plain[step])[valid].abs().max() > 0.05, "dense rows change nothing: no test"
            for row, twin in enumerate(twins):
                expected = twin(ids[row], step)[valid[row]]
                torch.testing.assert_close(logits[row][valid[row]].double(), expected, atol=1e-4, rtol=0)
    assert min(twin.gap for twin in twins) > 1e-6 and state.schedule.n_full == 2
    densities = [reference.density(twin.masks(LENGTH), 1, LENGTH, twin.valid) for twin in twins]
    assert state.density == pytest.approx(sum(densities) / len(densities), abs=1e-6)
    assert snapshot(model) == before


@pytest.mark.parametrize("gen_length", [1, 20, 21, 22, LENGTH - 1, LENGTH])
def test_a_generated_region_of_any_length(any_model, weights, gen_length):
    """Its border on both sides of a block's, one token of it, one of the prompt, and no prompt."""
    model, family = any_model
    options = {"prompt_len": LENGTH - gen_length, "steps": 2, "sparse": DENSE}
    twin = StepRunner(family, weights[family], published_config(family), **options)
    ids = sequences(1)[0]
    full = logits_of(model, ids)
    with run(model, config=SparseDConfig(*DENSE), steps=2, gen_length=gen_length) as state:
        for step in range(2):
            logits = logits_of(model, ids)
            torch.testing.assert_close(logits[0].double(), twin(ids[0], step), atol=1e-4, rtol=0)
    assert state.density == pytest.approx(reference.density(twin.masks(LENGTH), 1, LENGTH), abs=1e-6)
    alike = torch.allclose(logits, full, atol=1e-4)
    assert alike == (gen_length >= LENGTH - 1) == (state.density == 1), "without a prompt's row all is full attention"


@pytest.mark.parametrize("backend", ["auto", "gather"])
def test_keeping_every_block_is_full_attention(any_model, backend):
    model, _ = any_model
    steps, config = sequences(STEPS), SparseDConfig(0.2, 1.0, 16, dense_answer=True)
    dense = [logits_of(model, ids) for ids in steps]
    with run(model, config=config, backend=backend) as state:
        torch.testing.assert_close([logits_of(model, ids) for ids in steps], dense, atol=1e-4, rtol=0)
    assert state.backend == {"auto": FULL}.get(backend, backend) and state.density == pytest.approx(1)


@pytest.mark.parametrize("pads", [(0,), (0, 37)])
@pytest.mark.parametrize("build", [tiny_dream, tiny_llada])
@pytest.mark.parametrize("name", ["no_isolation", "window", "streaming"])
def test_under_every_rule_the_prompt_s_rows_alone_follow_it(name, build, pads):
    model, rule, selected = build(), METHODS[name].rule, []
    twin = model.family, model.state_dict(), published_config(model.family)
    steps, valid = sequences(3, rows=len(pads)), left_padding(LENGTH, pads)
    mask = None if valid.all() else valid
    sizes = {"steps": 3, "gen_length": GEN_LENGTH, "config": METHODS[name].config(SparseDConfig(*SPARSE))}
    with run(model, **sizes, rule=watched(lambda scores, pattern: selected.append(pattern.as_mask()), rule)):
        for ids in steps:
            logits_of(model, ids, mask)
    allowed = [reference.dense_rows(reference.expand(keep, 16, LENGTH), PROMPT_LEN) for keep in selected]
    sizes["config"] = replace(sizes["config"], dense_answer=True)
    with run(model, **sizes, rule=rule) as state:
        found = [logits_of(model, ids, mask) for ids in steps]
    for step, (ids, logits) in enumerate(zip(steps, found, strict=True)):
        expected, _ = reference.forward(*twin, ids, valid, allowed if step >= state.schedule.n_full else None)
        torch.testing.assert_close(logits[valid].double(), expected[valid], atol=1e-4, rtol=0)
    assert state.schedule.n_full == (1 if rule.needs_scores else 0)


# ------------------------------------------------------------------------------------------------------------ samplers


def check_tokens(model, sparse, **case):
    """Our tokens are the twin's, and other ones than those without dense answer rows."""
    return check(model, sparse=(*sparse, True), unlike={"sparse": reference.Sparse(*sparse)}, **case)


@pytest.mark.parametrize("family", ["dream", "llada"])
@pytest.mark.parametrize(
    "case",
    [
        {"prompt_len": 61, "gen_length": 24, "steps": 12, "sparse": (0.2, 0.3, 16)},
        {"prompt_len": 65, "gen_length": 32, "steps": 8, "sparse": (0.0, 0.3, 32)},
        {"prompt_len": 7, "gen_length": 40, "steps": 10, "sparse": (0.5, 0.01, 16)},
        {"prompt_len": 1, "gen_length": 40, "steps": 10, "sparse": (0.2, 0.3, 16)},
        {"prompt_len": 90, "padding": (0, 5, 70), "gen_length": 16, "steps": 8, "sparse": (0.2, 0.3, 16)},
    ],
    ids=str,
)
def test_sampled_tokens_are_the_twin_s(request, family, case):
    check_tokens(request.getfixturevalue(family), **case)


@pytest.mark.parametrize("padding", [(0,), (0, 16)])
def test_guided_tokens_are_the_twin_s(llada, padding):
    check_tokens(llada, (0.2, 0.3, 16), prompt_len=75, padding=padding, gen_length=16, steps=8, cfg_scale=1.0)


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_a_row_padded_by_whole_blocks_equals_the_row_alone(request, family):
    model, padding, case = request.getfixturevalue(family), (0, 16, 48), {"gen_length": 24, "steps": 12}
    prompts, _, tokens, _ = check_tokens(model, (0.2, 0.3, 16), prompt_len=99, padding=padding, **case)
    for row, pad in enumerate(padding):
        config = SparseDConfig(0.2, 0.3, 16, dense_answer=True)
        alone = GENERATE[family](model, prompts[row : row + 1, pad:], config=config, **options_of(family, case))
        assert tokens[row, pad:].tolist() == alone[0].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("pads", [(0,), (0, 20)])
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_replayed_tokens_are_the_same(monkeypatch, family, pads):
    model = (tiny_dream if family == "dream" else tiny_llada)().cuda()
    prompts, mask = torch.randint(0, 90, (len(pads), 61)).cuda(), left_padding(61, pads).long().cuda()
    config, captured, capture = SparseDConfig(0.2, 0.4, 16, dense_answer=True), [], Replays._capture
    monkeypatch.setattr(Replays, "_capture", lambda self, *args: captured.append(args) or capture(self, *args))
    options = options_of(family, {"gen_length": 48, "steps": 24, "attention_mask": mask, "config": config})
    replayed = GENERATE[family](model, prompts, **options)
    assert len(captured) == 2, "one graph a phase"
    monkeypatch.setattr(runner, "REPLAYED_TOKENS", 0)
    assert torch.equal(GENERATE[family](model, prompts, **options), replayed)
