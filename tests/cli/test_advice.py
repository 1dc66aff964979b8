"""--advise: its arithmetic against hand computation and a fake clock, its steps against the samplers' own."""

import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed import load_model
from sparsed.cli import advice, arguments, main_dream, main_llada, running
from sparsed.cli.advice import StepTimes, advice_lines, advise, break_even, time_steps, whole_runs
from sparsed.cli.families import DREAM, LLADA
from sparsed.cli.running import Job
from sparsed.ranks import ALONE
from sparsed.schedule import FULL, SELECTING, SPARSE
from tests.helpers.tiny_folders import tiny_folder

MAIN = {"dream": main_dream, "llada": main_llada}
FAMILIES = {"dream": DREAM, "llada": LLADA}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_folder(root / family, family) for family in MAIN}


@pytest.fixture(params=MAIN)
def make_job(request, checkpoints):
    """Makes the job of a call with these words, on a prompt of 100 tokens."""
    family = FAMILIES[request.param]
    model = load_model(checkpoints[request.param], device="cpu")
    return lambda words="": Job(model, None, [7] * 100, arguments.parse(family, ["--device", "cpu", *words.split()]))


def seconds_at(prompt_tokens):
    """Steps that take 1 ms a token, and 1 us (full) or 0.4 us (sparse) a squared token."""
    length = prompt_tokens + 128
    full, sparse = (1e-3 * length + square * length**2 for square in (1e-6, 4e-7))
    return StepTimes(prompt_tokens, full, full + 0.02 * length, sparse, 0.4, "gather")


def test_the_whole_runs_and_the_length_by_hand(make_job, monkeypatch):
    job = make_job()
    timed = []
    monkeypatch.setattr(advice, "time_steps", lambda _, length: timed.append(length) or seconds_at(length))
    found = advise(job)
    assert timed == [100, 1024, 100, 1024, 2048, 100, 100]
    assert "--dense_answer" not in found["command"]
    # 100 + 128 tokens: 0.228 s + 0.051984 s, and 0.228 s + 0.0207936 s; 26 of 128 steps are full, the last of them
    # takes 4.56 s more
    assert found["origin_seconds"] == pytest.approx(128 * 0.279984)
    assert found["sparsed_seconds"] == pytest.approx(26 * 0.279984 + 4.56 + 102 * 0.2487936)
    # 102 * 0.6e-6 * length ** 2 = 0.02 * length
    assert found["pays_from"] == 1024  # 326.8 - 128 tokens, below the shorter measurement
    assert found["command"].endswith(f"{job.args.parser.prog} --device cpu --prompt short_context --origin")


def test_a_long_prompt_is_its_own_second_measurement(make_job, monkeypatch):
    job = make_job("--select 0.2")
    job.input_ids.extend([7] * 4900)
    monkeypatch.setattr(advice, "SHORT", 100)
    monkeypatch.setattr(advice, "time_steps", lambda _, length: seconds_at(length))
    found = advise(job)
    assert [times["prompt_tokens"] for times in found["steps"]] == [100, 5000] == found["fitted_prompt_tokens"]
    assert found["pays_from"] == 327 - 128
    assert found["command"].endswith("--device cpu --prompt short_context --select 0.2")


@pytest.mark.parametrize(("tokens", "fitted"), [(100, [1024, 2048]), (1500, [1500, 3000]), (2048, [1024, 2048])])
def test_the_prompt_is_fitted_too_unless_it_is_short(make_job, monkeypatch, tokens, fitted):
    job = make_job()
    job.input_ids.extend([7] * (tokens - 100))
    monkeypatch.setattr(advice, "time_steps", lambda _, length: seconds_at(length))
    assert advise(job)["fitted_prompt_tokens"] == fitted


@settings(max_examples=300)
@given(
    prompt_tokens=st.integers(1, 5000),
    seconds=st.lists(st.tuples(*[st.floats(0.1, 10)] * 3), min_size=3, max_size=3),
)
def test_the_length_and_the_command_agree_whatever_was_timed(prompt_tokens, seconds):
    """Noisy times must not end in advice that contradicts itself."""
    args = arguments.parse(DREAM, ["--device", "cpu"])
    job = Job(SimpleNamespace(device=torch.device("cpu"), ranks=ALONE), None, [7] * prompt_tokens, args)
    timed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            advice,
            "time_steps",
            lambda _, n: StepTimes(n, *timed.setdefault(n, seconds[min(len(timed), 2)]), 0.3, "gather"),
        )
        patch.setattr(advice, "no_cache", lambda *_: "not asked here")
        found = advise(job)
    faster = found["sparsed_seconds"] < found["origin_seconds"]
    assert ("--origin" in found["command"]) != faster
    if faster:
        assert found["pays_from"] <= prompt_tokens
    elif found["pays_from"] is not None:
        assert found["pays_from"] >= prompt_tokens


def test_advice_for_people():
    steps = [vars(seconds_at(tokens)) for tokens in (1024, 4096)]
    found = {"steps": steps, "origin_seconds": 30.0, "sparsed_seconds": 20.0, "command": "run it", "dense_answer": []}
    found |= {"steps_that_run": 128, "ways": [], "no_cache": "there is no room"}
    found |= {"fitted_prompt_tokens": [1024, 4096], "pays_from": 2000}
    text = "\n".join(advice_lines(found, 4096, 128))
    parts = (
        "4096 prompt tokens",
        "22.066 s",
        "backend gather",
        "1.50x as fast",
        "about 2000",
        "run it",
        "no room",
        "--seq_len 256, without",
    )
    for part in parts:
        assert part in text
    assert "128 steps with full attention" in text and text.endswith("\nuse: run it")
    assert "1024 steps (896 of them commit nothing" in "\n".join(advice_lines(found, 4096, 1024))
    assert "or fewer" in "\n".join(advice_lines(found | {"pays_from": 1024}, 4096, 128))
    assert "nothing shows" in "\n".join(advice_lines(found | {"pays_from": None}, 4096, 128))
    steps[1] |= {"backend": FULL, "density": 1.0}
    assert "every block would be kept" in "\n".join(advice_lines(found, 4096, 128))


class FakeRunner:
    """Takes 4, 7 and 2 seconds for the three kinds of steps, on a clock of its own."""

    now = 0.0

    def __init__(self, model, run, mask, first_row, most_rows):
        self.model, self.run = model, run

    @property
    def phase(self):
        return self.run.phase

    def __call__(self, ids, rows):
        FakeRunner.now += {FULL: 4.0, SELECTING: 7.0, SPARSE: 2.0}[self.run.phase]
        with self.run.forward(tuple(ids.shape)):
            pass

    def check(self):
        pass


def test_each_kind_of_step_is_timed_as_what_it_is(make_job, monkeypatch):
    monkeypatch.setattr(advice, "StepRunner", FakeRunner)
    monkeypatch.setattr(running.time, "perf_counter", lambda: FakeRunner.now)
    found = time_steps(make_job("--block_size 16"), 300)
    assert (found.prompt_tokens, found.full, found.selecting, found.sparse) == (300, 4.0, 7.0, 2.0)


def test_the_real_steps_run_at_the_length_that_is_asked_for(make_job, monkeypatch):
    job = make_job("--block_size 16 --seq_len 64")
    shapes = []
    job.model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    found = time_steps(job, 250)
    assert shapes == [(1, 314)] * 3
    assert found.backend == "gather" and 0.3 < found.density < 0.4
    assert min(found.full, found.selecting, found.sparse) > 0


def test_guidance_doubles_the_batch(checkpoints):
    model = load_model(checkpoints["llada"], device="cpu")
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    args = arguments.parse(LLADA, ["--device", "cpu", "--cfg_scale", "1", "--seq_len", "32", "--block_size", "16"])
    time_steps(Job(model, None, [7] * 100, args), 100)
    assert shapes == [(2, 132)] * 3


@pytest.mark.parametrize("words", ["--seq_len 32 --steps 128 --temperature 0", "--seq_len 32 --steps 64"])
def test_the_steps_that_run_are_the_sampler_s(words, make_job):
    job, seen = make_job(words), []

    class Watcher:
        def begin(self, phase):
            pass

        def tick(self, step):
            seen.append(step.ran)

    running.generate(job, job.args.sampler, Watcher())
    assert [not idle for idle in job.args.sampler.idle] == seen
    assert len(seen) == job.args.sampler.steps


def test_idle_steps_take_no_time():
    times = StepTimes(4096, 4.0, 7.0, 2.0, 0.3, "gather")
    ran = [False, False, True, True, True, False, True, False]
    assert whole_runs(times, ran, 4) == (16.0, 4.0 + 7.0 + 2 * 2.0)
    assert whole_runs(times, ran, 2) == (16.0, 7.0 + 4 * 2.0)  # the step that selects runs in any case
    assert whole_runs(times, ran, 8) == (16.0, 16.0)
    assert whole_runs(StepTimes(64, 4.0, 4.0, 4.0, 1.0, FULL), ran, 4) == (16.0, 16.0)


@pytest.mark.parametrize(("slope", "square", "length"), [(-20.0, 0.01, 2000), (3.0, 0.5, 0), (1.0, -0.1, None)])
def test_the_length_from_which_on_it_pays(slope, square, length):
    found = break_even(*((tokens, slope * tokens + square * tokens**2) for tokens in (1152, 65664)))
    assert found == (None if length is None else pytest.approx(length))


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (DREAM, "--demo --prompt 4k --skip 0.3 --sampling-alg entropy --top_k 0"),
        (LLADA, "--model_path my/model --cfg_scale 1.5 --seed 3 --backend gather --seq_len 64"),
        (DREAM, "--prompt_text 'one $HOME two'"),
    ],
)
def test_the_command_describes_the_same_call(family, words):
    args = arguments.parse(family, [*shlex.split(words), "--advise", "--quiet"])
    command = shlex.split(advice.command_of(args, 1, origin=False))
    again = arguments.parse(family, command[command.index(args.parser.prog) + 1 :])
    assert {**again.flags, "advise": True, "quiet": True} == args.flags
    assert replace(again, flags=args.flags, parser=args.parser, advise=True, quiet=True) == args
    assert not again.advise and not again.quiet
    dense = shlex.split(advice.command_of(args, 1, origin=True))
    assert "--origin" in dense and not {"--skip", "--backend"} & set(dense)


@pytest.mark.parametrize("family", MAIN)
def test_advice_from_the_script(family, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(advice, "SHORT", 128)
    record = tmp_path / "advice.json"
    words = ["--model_path", checkpoints[family], "--device", "cpu", "--block_size", 16, "--json", record, "--quiet"]
    assert MAIN[family]([*map(str, words), "--prompt_text", "Where is the key?" * 20, "--advise"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(record.read_text())
    assert err == "" and "runs" not in found and found["environment"]["torch"] == torch.__version__
    lines = out.splitlines()
    assert len(lines) in (16, 17, 18) and f"without a cache, use: {found['advice']['command']}" in lines[-2:]
    own = found["advice"]["steps"][-1]
    assert own["backend"] == "gather" and own["prompt_tokens"] == found["advice"]["fitted_prompt_tokens"][1]
    assert found["advice"]["origin_seconds"] == pytest.approx(128 * own["full"])


@pytest.mark.parametrize("select", ["0.3", "1"])
def test_where_every_block_is_kept_both_are_the_same(select, make_job, monkeypatch):
    monkeypatch.setattr(advice, "SHORT", 64)
    found = advise(make_job(f"--select {select} --block_size 1024"))
    assert found["origin_seconds"] == found["sparsed_seconds"] and found["pays_from"] is None
    assert "--origin" in found["command"]


@pytest.mark.parametrize("words", ["--dense_answer", "--dense_answer --select 0.15", "--select 0.05"])
def test_no_dense_answer_rows_are_timed_beside_themselves_or_with_too_few_blocks(make_job, monkeypatch, words):
    monkeypatch.setattr(advice, "time_steps", lambda _, length: seconds_at(length))
    found = advise(make_job(words))
    assert found["dense_answer"] == [] and "--dense_answer" not in found["command"], "full attention is the faster"
    assert advice_lines(found, 100, 128)[-1].startswith("without a cache, use:")


def test_dense_answer_rows_are_timed_with_fewer_blocks(make_job, monkeypatch):
    timed = []

    def fake(job, length):
        timed.append((job.args.config.select, job.args.config.dense_answer))
        found = replace(seconds_at(length), full=99.0)
        return replace(found, sparse=found.sparse / 2) if job.args.config.dense_answer else found

    job = make_job("--select 0.5 --skip 0.5 --steps 4 --seq_len 128")
    monkeypatch.setattr(advice, "time_steps", fake)
    found = advise(job)
    assert timed[-2:] == [(0.5, True), (0.25, True)] and not any(dense for _, dense in timed[:-2])
    own = seconds_at(100)
    for other, select in zip(found["dense_answer"], ("0.5", "0.25"), strict=True):
        # two of four steps are full, as long as the job's own; the second selects
        assert other["seconds"] == pytest.approx(99.0 + own.selecting + 2 * own.sparse / 2)
        assert f"--select {select}" in other["command"] and "--dense_answer" in other["command"]
    lines = advice_lines({**found, "origin_seconds": 400.0, "sparsed_seconds": 300.0}, 100, 4)
    assert lines[-1].endswith(found["dense_answer"][0]["command"]) and "with --dense_answer --select 0.25" in lines[4]
