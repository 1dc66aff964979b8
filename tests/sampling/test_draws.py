"""The samplers' randomness, what they run through the head, and their input checks."""

from contextlib import contextmanager

import pytest
import torch

from sparsed import SparseDConfig, dream_generate, llada_generate
from sparsed.run import SparseRun
from tests.helpers.reference import forward
from tests.helpers.reference_sampling import dream_counts, filtered_probabilities
from tests.helpers.sampling_cases import CONFIG, GENERATE, head_of, inputs_of, options_of
from tests.helpers.standins import MASK

# ------------------------------------------------------------------------------------------------- randomness


def filled(model, prompt, **options):
    """What a large batch of one prompt draws: [rows, gen_length]."""
    prompts = prompt.expand(3000, -1)
    generator = torch.Generator().manual_seed(1)
    return GENERATE[model.family](model, prompts, generator=generator, **options)[:, prompt.shape[1] :]


def check_frequencies(drawn, probabilities):
    """Pearson's statistic, five standard deviations wide; nothing outside the support."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(drawn)
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]]).clamp_min(1e-9)
    statistic = ((counts - expected) ** 2 / expected.clamp_min(1)).sum().item()
    freedom = len(counts) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5


def first_logits(model, prompt, gen_length):
    """Logits of the generated positions at step 0, float64 [gen_length, V], aligned with the tokens."""
    ids = torch.cat([prompt, torch.full((1, gen_length), MASK)], 1)
    logits, _ = forward(model.family, model.state_dict(), CONFIG[model.family], ids)
    shift = 1 if model.family == "dream" else 0
    return logits[0, prompt.shape[1] - shift : ids.shape[1] - shift]


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 1.0},
        {"temperature": 2.5},
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 2.0, "top_k": 7},
        {"temperature": 2.0, "top_p": 0.8, "top_k": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("alg", ["maskgit_plus", "origin"])
def test_dream_draws_from_the_filtered_distribution(dream, filters, alg):
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9]])
    drawn = filled(dream, prompt, gen_length=1, steps=1, alg=alg, **filters)[:, 0]
    check_frequencies(drawn, filtered_probabilities(first_logits(dream, prompt, 1)[0], **filters))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_llada_draws_from_the_tempered_distribution(llada, temperature, remasking):
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9]])
    options = {"gen_length": 1, "steps": 1, "block_length": 1, "temperature": temperature, "remasking": remasking}
    drawn = filled(llada, prompt, **options)[:, 0]
    check_frequencies(drawn, (first_logits(llada, prompt, 1)[0] / temperature).softmax(-1))


def first_committed(model, **options):
    """Which generated position every row of a large batch commits first, and the step-0 logits."""
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with inputs_of(model) as seen:
        filled(model, prompt, **options)
    committed = seen[1][:, prompt.shape[1] :] != MASK
    return committed, first_logits(model, prompt, options["gen_length"])


def chance_of_being_first(drawn, confidence):
    """P(position j has the highest confidence), positions drawing independently. Both [positions, V]."""
    first = []
    for j in range(len(drawn)):
        chance = drawn[j].clone()
        for other in set(range(len(drawn))) - {j}:
            chance *= (drawn[other] * (confidence[other] < confidence[j][:, None])).sum(-1)
        first.append(chance.sum())
    return torch.stack(first) / sum(first)


def test_dream_commits_the_position_with_the_most_confident_draw(dream):
    committed, logits = first_committed(dream, gen_length=3, steps=2, temperature=1.5)
    probabilities = (logits / 1.5).softmax(-1)  # a draw's confidence is its own tempered probability
    check_frequencies(committed.long().argmax(-1), chance_of_being_first(probabilities, probabilities))


def test_llada_ranks_draws_by_their_untempered_probability(llada):
    committed, logits = first_committed(llada, gen_length=3, steps=3, block_length=3, temperature=1.5)
    expected = chance_of_being_first((logits / 1.5).softmax(-1), logits.softmax(-1))
    check_frequencies(committed.long().argmax(-1), expected)


def test_llada_random_remasking_is_uniform(llada):
    committed, _ = first_committed(llada, gen_length=4, steps=4, block_length=4, remasking="random")
    check_frequencies(committed.long().argmax(-1), torch.full((4,), 0.25, dtype=torch.float64))


def test_dream_alg_temp_draws_the_position(dream):
    committed, logits = first_committed(dream, gen_length=3, steps=2, alg_temp=0.2)
    confidence = logits.softmax(-1).max(-1).values
    check_frequencies(committed.long().argmax(-1), (confidence / 0.2).softmax(-1))


def test_dream_origin_commits_each_position_by_the_schedule(dream):
    committed, _ = first_committed(dream, gen_length=4, steps=3, alg="origin")
    times = torch.linspace(1, 1e-3, 4).double()
    share = (1 - times[1] / times[0]).item()
    binomial = [(1 - share) ** 4, 4 * share * (1 - share) ** 3, 6 * share**2 * (1 - share) ** 2,
                4 * share**3 * (1 - share), share**4]  # fmt: skip
    check_frequencies(committed.sum(-1), torch.tensor(binomial, dtype=torch.float64))


RANDOM = {
    "dream": [{"temperature": 1.0}, {"alg": "origin"}, {"alg_temp": 0.5}],
    "llada": [{"temperature": 1.0}, {"remasking": "random"}],
}


@pytest.mark.parametrize(
    ("family", "options"), [(family, options) for family, cases in RANDOM.items() for options in cases], ids=str
)
def test_a_generator_decides_every_draw(request, family, options):
    model, options = request.getfixturevalue(family), options_of(family, {"gen_length": 16, "steps": 8} | options)
    prompts, state = torch.randint(0, 90, (2, 11)), torch.get_rng_state()
    runs = [
        GENERATE[family](model, prompts, generator=torch.Generator().manual_seed(seed), **options).tolist()
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(5)
    first = GENERATE[family](model, prompts, **options)
    torch.manual_seed(5)
    assert torch.equal(GENERATE[family](model, prompts, **options), first)


# -------------------------------------------------------------------------------------------- steps, rows, bad input


@pytest.mark.parametrize("config", [None, SparseDConfig(block_size=16)])
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_on_step_follows_every_step(request, family, config):
    model, steps = request.getfixturevalue(family), []
    options = options_of(family, {"gen_length": 16, "steps": 8})
    GENERATE[family](model, torch.randint(0, 90, (1, 40)), config=config, on_step=steps.append, **options)
    assert [(step.index, step.ran) for step in steps] == [(index, True) for index in range(8)]


WATCHED = [
    ("dream", {}),
    ("dream", {"alg": "entropy"}),
    ("dream", {"alg": "topk_margin", "temperature": 1.5, "top_p": 0.9}),
    ("dream", {"alg": "origin", "temperature": 1.5, "top_k": 7}),
    ("llada", {}),
    ("llada", {"remasking": "random", "temperature": 1.0}),
    ("llada", {"cfg_scale": 1.0}),
    ("llada", {"confidence_eos_eot_inf": True}),
]


@pytest.mark.parametrize(("family", "options"), WATCHED, ids=str)
def test_a_step_tells_what_it_committed_and_how_likely_that_was(request, family, options):
    """Commit by commit the prompts become the output, and a probability is the reference model's, in float64."""
    model, steps = request.getfixturevalue(family), []
    prompts = torch.randint(0, 90, (2, 14))
    options = options_of(family, {"gen_length": 16, "steps": 8} | options)
    tokens = GENERATE[family](model, prompts, on_step=steps.append, **options)
    temperature = options.get("temperature") or 1.0
    filters = {name: options.get(name) for name in ("top_p", "top_k")}
    canvas = torch.cat([prompts, torch.full((2, 16), MASK)], 1)
    for step in steps:
        logits, _ = forward(family, model.state_dict(), CONFIG[family], canvas)
        if "cfg_scale" in options:
            blind = torch.cat([torch.full_like(prompts, MASK), canvas[:, 14:]], 1)
            logits = 2 * logits - forward(family, model.state_dict(), CONFIG[family], blind)[0]
        commits = step.commits()
        for flat, token, probability in commits:
            row, place = divmod(flat, 30)
            if family == "dream":
                expected = filtered_probabilities(logits[row, place - 1], temperature=temperature, **filters)
            else:
                expected = logits[row, place].softmax(-1)
            assert probability == pytest.approx(expected[token].item(), abs=1e-4)
            assert canvas[row, place] == MASK
        for flat, token, _ in commits:
            canvas.view(-1)[flat] = token
    assert torch.equal(canvas, tokens)


IDLE = [  # case, the steps that run no forward with full attention
    ("dream", {"gen_length": 32, "steps": 64}, range(33)),
    ("dream", {"gen_length": 16, "steps": 16}, range(1)),
    ("dream", {"gen_length": 16, "steps": 24, "alg": "entropy", "alg_temp": 0.5}, range(9)),
    ("dream", {"gen_length": 32, "steps": 64, "alg": "topk_margin"}, range(33)),
    ("dream", {"gen_length": 32, "steps": 64, "temperature": 1.0}, ()),
    ("dream", {"gen_length": 32, "steps": 64, "alg": "origin"}, ()),
    ("llada", {"gen_length": 8, "steps": 12, "block_length": 4}, (4, 5, 10, 11)),
    ("llada", {"gen_length": 8, "steps": 12, "block_length": 4, "cfg_scale": 1.0}, (4, 5, 10, 11)),
    ("llada", {"gen_length": 8, "steps": 12, "block_length": 4, "temperature": 1.0}, ()),
]


@pytest.mark.parametrize(("family", "options", "idle"), IDLE, ids=str)
@pytest.mark.parametrize("skip", [None, 0.0, 0.1, 0.5])
def test_steps_that_commit_nothing_run_no_forward_but_count(request, family, options, idle, skip):
    """The step that selects blocks always runs, and the sparse steps begin where the schedule says."""
    model, told, steps = request.getfixturevalue(family), [], options["steps"]
    options = options_of(family, options)
    prompts = torch.randint(0, 90, (2, 40))
    config = None if skip is None else SparseDConfig(skip, 0.3, 16)
    selecting = None if skip is None else config.n_full(steps) - 1
    with inputs_of(model) as forwards, looking_at_runs() as runs:
        GENERATE[family](model, prompts, config=config, on_step=told.append, **options)
    ran = [step.index for step in told if step.ran]
    assert [step.index for step in told] == list(range(steps))
    assert ran == [step for step in range(steps) if step not in idle or step == selecting]
    assert len(forwards) == len(ran)
    if skip is not None:
        assert runs[0].step == steps and runs[0].density is not None


@contextmanager
def looking_at_runs():
    """The runs that the samplers open meanwhile."""
    runs, make = [], SparseRun.__init__

    def noting(run, *args):
        runs.append(run)
        make(run, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseRun, "__init__", noting)
        yield runs


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_inputs_are_left_alone(request, family):
    model = request.getfixturevalue(family)
    prompts, mask = torch.randint(0, 90, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = 0
    copies = prompts.clone(), mask.clone()
    GENERATE[family](model, prompts, attention_mask=mask, **options_of(family, {"gen_length": 8, "steps": 4}))
    assert torch.equal(prompts, copies[0]) and torch.equal(mask, copies[1])
    assert all(parameter.grad_fn is None for parameter in model.parameters())


def head_rows(model, run):
    """Rows that went through the head at each forward of `run()`."""
    rows = []
    hook = head_of(model).register_forward_pre_hook(lambda _, args: rows.append(args[0].numel() // args[0].shape[-1]))
    try:
        run()
    finally:
        hook.remove()
    return rows


def test_dream_head_sees_masked_rows_only(dream):
    prompts = torch.randint(0, 90, (2, 30))
    rows = head_rows(dream, lambda: dream_generate(dream, prompts, gen_length=16, steps=8))
    left = 16
    for seen, count in zip(rows, dream_counts(16, 8), strict=True):
        assert seen <= 2 * left
        left -= count
    assert rows[-1] < 2 * 16


@pytest.mark.parametrize(("cfg_scale", "halves"), [(0.0, 1), (1.0, 2)])
def test_llada_head_sees_masked_rows_of_the_block_only(llada, cfg_scale, halves):
    prompts = torch.randint(0, 90, (2, 30))
    options = {"gen_length": 16, "steps": 8, "block_length": 8, "cfg_scale": cfg_scale}
    rows = head_rows(llada, lambda: llada_generate(llada, prompts, **options))
    assert all(seen <= limit for seen, limit in zip(rows, [2 * halves * n for n in (8, 6, 4, 2) * 2], strict=True))


PROMPT = torch.arange(12)[None].repeat(2, 1)
BOTH = [
    {"input_ids": PROMPT.clone().index_fill(1, torch.tensor([3]), MASK)},
    {"input_ids": PROMPT[0]},
    {"input_ids": PROMPT[None]},
    {"input_ids": PROMPT.float()},
    {"input_ids": PROMPT[:, :0]},
    {"input_ids": PROMPT - 1},
    {"input_ids": PROMPT + 10**6},
    {"attention_mask": torch.ones(2, 11)},
    {"attention_mask": torch.ones(12)},
    {"attention_mask": torch.ones(2, 12).index_fill(1, torch.tensor([11]), 0)},  # right padding
    {"attention_mask": torch.ones(2, 12).index_fill(1, torch.tensor([5]), 0)},  # a hole
    {"attention_mask": torch.zeros(2, 12)},
    {"gen_length": 0},
    {"gen_length": -8},
    {"steps": 0},
    {"steps": -1},
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"config": {"skip": 0.2}},
    {"config": True},
    {"mask_id": -1},
    {"mask_id": 10**6},
]
DREAM_ONLY = [
    {"alg": "greedy"},
    {"alg_temp": -1.0},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"top_p": -0.2},
    {"top_k": -1},
    {"eps": 0.0},
    {"eps": 1.0},
]
LLADA_ONLY = [
    {"remasking": "high_confidence"},
    {"cfg_scale": -1.0},
    {"block_length": 0},
    {"block_length": 5},
    {"block_length": 16},
    {"block_length": 4, "steps": 3},
]


@pytest.mark.parametrize(
    ("family", "bad"),
    [("dream", bad) for bad in BOTH + DREAM_ONLY] + [("llada", bad) for bad in BOTH + LLADA_ONLY],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_one_clear_line(request, family, bad):
    model = request.getfixturevalue(family)
    options = options_of(family, {"input_ids": PROMPT, "gen_length": 8, "steps": 4} | bad)
    with inputs_of(model) as forwards, pytest.raises(ValueError) as error:
        GENERATE[family](model, options.pop("input_ids"), **options)
    message = str(error.value)
    assert message and "\n" not in message
    assert any(word in message for word in [*bad, "mask", "prompt"]), message
    assert not forwards, "bad input is found before the first forward"


@pytest.mark.parametrize(("family", "other"), [("dream", "llada"), ("llada", "dream")])
def test_a_model_of_the_other_family_is_refused(request, family, other):
    options = options_of(family, {"gen_length": 8, "steps": 4})
    with pytest.raises(ValueError, match=f"{family}_generate needs a {family} model"):
        GENERATE[family](request.getfixturevalue(other), PROMPT, **options)


@pytest.mark.parametrize("family", ["dream", "llada"])
@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-20])
def test_a_tiny_temperature_is_greedy(request, family, temperature):
    model = request.getfixturevalue(family)
    options = options_of(family, {"gen_length": 8, "steps": 4})
    greedy = GENERATE[family](model, PROMPT, **options)
    assert torch.equal(GENERATE[family](model, PROMPT, **options, temperature=temperature), greedy)
