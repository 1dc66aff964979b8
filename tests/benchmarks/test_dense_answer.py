"""The benchmark of dense answer rows, on a CPU: what it runs, checks, derives and prints; its times need a GPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import dense_answer, latency
from benchmarks.common import LENGTHS, summary
from benchmarks.latency import Generation
from benchmarks.shapes import model_config
from sparsed import SparseDConfig, load_model
from sparsed.backends import BACKENDS, sparse_attention
from sparsed.kernels import full_attention
from tests.helpers.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")
NAMES = ["full attention", "the paper's, select 0.3", "dense answer rows, select 0.3", "dense answer rows, select 0.15"]
FLAGS = ["--random_weights", "--lengths", "16k,128k", "--select", "0.3,0.15", "--skip", "0.2,0.05"]


class Played:
    """A call of the benchmark whose GPU and model are played by the CPU and a tiny model.

    Attributes:
        generations: (prompt tokens, schedule, config) of each, in their order.
        states: the record whenever it was saved.
    """

    def __init__(self, tmp_path, monkeypatch, family):
        self.generations, self.states, self.fails = [], [], lambda config: False
        self.flags = ["--family", family, "--out", str(tmp_path / "record.json"), *FLAGS]
        model = load_model(tiny_checkpoint(tmp_path / "model", family), device="cpu")
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
        monkeypatch.setattr(dense_answer, "require_gpu", lambda parser: CPU)
        monkeypatch.setattr(dense_answer, "load", lambda parser, args, device: model)
        monkeypatch.setattr(dense_answer, "generation", self.generation)
        monkeypatch.setattr(dense_answer, "save", lambda path, record: self.states.append(json.dumps(record)))
        monkeypatch.setattr(dense_answer, "LONG", 512)
        monkeypatch.setitem(LENGTHS, "16k", 512)
        monkeypatch.setitem(LENGTHS, "128k", 640)

    def generation(self, model, prompt, schedule, settings):
        self.generations.append((prompt.shape[1], (schedule.full, schedule.sparse), settings.config))
        if self.fails(settings.config):
            raise torch.OutOfMemoryError
        return latency.generation(model, prompt, schedule, settings)

    def run(self, *flags):
        """The exit code, and the record as it was saved last."""
        try:
            dense_answer.main([*self.flags, *flags])
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, json.loads(self.states[-1])


@pytest.fixture
def played(tmp_path, monkeypatch):
    return Played(tmp_path, monkeypatch, "llada")


@pytest.fixture
def unchecked(played, monkeypatch):
    """Without the gates, which take most of the time."""

    def check(setting, config, length, device):
        return {"config": None, "gate": {"backend": "full" if setting.config is None else "gather"}}

    monkeypatch.setattr(dense_answer, "check", check)
    return played


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_from_end_to_end(family, tmp_path, monkeypatch, capsys):
    played = Played(tmp_path, monkeypatch, family)
    code, record = played.run("--repeats", "2")
    assert code == 0 and record["family"] == family
    assert list(record["warm_up"]) == NAMES and record["warm_up"][NAMES[0]] == 0 < record["warm_up"][NAMES[1]]
    for row, (name, steps) in zip(record["rows"], {"16k": 3, "128k": 2}.items(), strict=True):
        assert (row["length"], list(row["runs"])) == (name, NAMES)
        full, *others = row["runs"].values()
        assert full["full_step"]["count"] == 2 * steps and "error" not in row
        for run in others:
            counts = [run[phase]["count"] for phase in ("selecting_step", "selection", "sparse_step")]
            assert counts == [2, 2, 2 * steps] and "full_step" not in run
            assert run["backend"] == run["gate"]["backend"] == "gather" and run["peak_memory_bytes"] == 5
            assert len(run["compile_seconds"]) == 2
        for run in row["runs"].values():
            assert 0 < run["gate"]["error"] <= run["gate"]["allowed"] < 0.05
        paper, dense, fewer = (run["density"] for run in others)
        assert fewer < dense and paper < dense < 1
        assert [list(run["skips"]) for run in others] == [["0.2"], ["0.2", "0.05"], ["0.2", "0.05"]]
    printed = capsys.readouterr().out
    assert printed.endswith(dense_answer.table([record]) + "\n")
    assert all(printed.count(f"{length}, {name}: ") == 2 for length in ("16k", "128k") for name in NAMES)


def test_nothing_more_runs_than_is_asked(unchecked):
    """All settings once at the first length, then in turn at each; the record is saved after every one."""
    unchecked.run("--repeats", "2")
    paper = SparseDConfig()
    dense = [SparseDConfig(select=select, dense_answer=True) for select in (0.3, 0.15)]

    def turn(tokens, steps):
        return [(tokens, (steps, 0), paper), *((tokens, (1, steps), config) for config in (paper, *dense))]

    assert unchecked.generations == turn(512, 1) + 2 * turn(512, 3) + 2 * turn(640, 2)
    measured = [
        [sum("peak_memory_bytes" in run for run in row["runs"].values()) for row in json.loads(state)["rows"]]
        for state in unchecked.states
    ]
    assert measured == [[n] for n in (1, 2, 3, 4, 4, 4, 4, 4, 4)] + [[4, n] for n in (1, 2, 3, 4, 4, 4, 4, 4, 4)]


def test_all_settings_get_the_same_prompt(played, monkeypatch):
    prompts = []
    monkeypatch.setattr(dense_answer, "generation", lambda model, prompt, *rest: prompts.append(prompt))
    model = dense_answer.load(None, None, CPU)
    for setting in dense_answer.settings([0.3], [0.2]):
        setting.generate(model, 640, 2)
    assert all(torch.equal(prompt, prompts[0]) for prompt in prompts) and prompts[0].max() < model.config.mask_token_id


# --- what cannot be measured


def test_out_of_memory_ends_one_setting(unchecked, capsys):
    unchecked.fails = lambda config: config.select == 0.15
    code, record = unchecked.run("--repeats", "2")
    assert code == 0 and NAMES[3] not in record["warm_up"]
    for row in record["rows"]:
        assert [run.get("error") for run in row["runs"].values()] == [None, None, None, "out of memory"]
        assert all(run["skips"] for name, run in row["runs"].items() if name in NAMES[1:3])
    tried = [tokens for tokens, _, config in unchecked.generations if config.select == 0.15]
    assert tried == [512, 512, 640]  # to warm up, and then once at a length
    assert capsys.readouterr().out.count(f"| {NAMES[3]}: out of memory | - |") == 2


def test_without_full_steps_there_are_samples_alone(unchecked):
    unchecked.fails = lambda config: unchecked.generations[-1][1][1] == 0
    code, record = unchecked.run()
    assert code == 0
    for row in record["rows"]:
        assert row["runs"][NAMES[0]]["error"] == "out of memory"
        for name in NAMES[1:]:
            run = row["runs"][name]
            assert run["sparse_step"]["count"] >= 2 and run["selection"] is None and not run["skips"]


def test_out_of_memory_in_a_gate_ends_a_length(unchecked, monkeypatch):
    check = dense_answer.check

    def too_much(setting, config, length, device):
        if length == 512 + 128:
            raise torch.OutOfMemoryError
        return check(setting, config, length, device)

    monkeypatch.setattr(dense_answer, "check", too_much)
    code, record = unchecked.run()
    short, long = record["rows"]
    assert (code, short["error"], short["runs"], len(long["runs"])) == (0, "out of memory", {}, 4)


def forgets_the_answer(name, pattern):
    return BACKENDS[name].build(pattern)


def forgets_the_blocks(name, pattern):
    return lambda q, k, v, start=0: full_attention(q, k, v)[0]


def forgets_how_few_come(name, pattern):
    """Wrong where the last rows come alone, as in the last layer."""
    right = sparse_attention(name, pattern)
    return lambda q, k, v, start=0: right(q, k, v, start) if start == 0 else torch.zeros_like(q)


@pytest.mark.parametrize(
    ("attention", "rows"),
    [
        (forgets_the_answer, "the answer's rows"),
        (forgets_the_blocks, "the prompt's rows"),
        (forgets_how_few_come, "the last layer's rows"),
    ],
)
def test_the_gate_sees_what_is_wrong(attention, rows, monkeypatch):
    config = SparseDConfig(dense_answer=True)
    gate = dense_answer.checked_dense_answer("gather", model_config("dream"), 640, config, CPU)
    assert gate.passed
    monkeypatch.setattr(dense_answer, "sparse_attention", attention)
    with pytest.raises(latency.WrongKernel, match=f"gather, dense answer: {rows} err by"):
        dense_answer.checked_dense_answer("gather", model_config("dream"), 640, config, CPU)


@pytest.mark.parametrize("module", ["dense_answer", "latency"])
def test_a_wrong_kernel_is_never_timed(module, played, monkeypatch, capsys):
    """Neither that of dense answer rows, nor full attention's."""
    if module == "dense_answer":
        monkeypatch.setattr(dense_answer, "sparse_attention", forgets_the_answer)
    else:
        monkeypatch.setattr(latency, "full_attention", lambda q, k, v: (torch.zeros_like(q), None))
    code, record = played.run()
    assert code == 1
    assert [schedule for _, schedule, _ in played.generations] == [(1, 0), (1, 1), (1, 1), (1, 1)]  # all of them warm
    for row in record["rows"]:
        assert "err" in row["error"] and row["runs"] == {}
    out, error = capsys.readouterr()
    assert out.count("| every setting: ") == 2 and "a kernel is wrong" in error


def test_the_kernel_that_is_checked_is_the_one_that_runs(played):
    """Full attention where the budgets hold every block of a short prompt."""
    model = dense_answer.load(None, None, CPU)
    for setting in dense_answer.settings([0.3], [0.2]):
        for tokens, expected in ((64, "full"), (512, "gather")):
            checked = dense_answer.check(setting, model.config, tokens + 128, CPU)["gate"]["backend"]
            ran = setting.generate(model, tokens, 1).kernel.get("backend", "full")
            assert checked == ran == (expected if setting.config else "full")


# --- from samples to whole runs


def dense_run(full=(4.0, 4.5, 3.5), skips=(0.2, 0.05)):
    """The record of two generations, worked out by hand below."""
    generations = [
        Generation([7.0, 1.0, 0.5, 1.5], 1, 0.25, 10, {"density": 0.2, "backend": "flash", "backend_reason": "best"}),
        Generation([8.0, 1.0, 1.0, 3.0], 1, 0.0, 30, {"density": 0.2, "backend": "flash", "backend_reason": "best"}),
    ]
    setting = dense_answer.settings([0.15], skips)[-1]
    return dense_answer.run_record(setting, generations, summary(list(full)))


def test_phases_by_hand():
    run = dense_run()
    assert run["selecting_step"]["samples"] == [7.0, 8.0] and run["selection"]["samples"] == [3.0, 4.0]
    assert run["sparse_step"]["samples"] == [1.0, 0.5, 1.5, 1.0, 1.0, 3.0] and run["sparse_step"]["median"] == 1.0
    assert (run["compile_seconds"], run["peak_memory_bytes"], run["backend"]) == ([0.25, 0.0], 30, "flash")


def test_whole_runs_by_hand():
    skips = dense_run()["skips"]
    # ceil(0.2 * 128) = 26 full steps, ceil(0.05 * 128) = 7; selecting takes 3.5 s
    seconds = {
        "0.2": {"128": 26 * 4.0 + 3.5 + 102 * 1.0, "1024": 205 * 4.0 + 3.5 + 819 * 1.0},
        "0.05": {"128": 7 * 4.0 + 3.5 + 121 * 1.0, "1024": 52 * 4.0 + 3.5 + 972 * 1.0},
    }
    assert {skip: found["whole_seconds"] for skip, found in skips.items()} == seconds
    assert skips["0.2"]["speedup"] == pytest.approx({"128": 512 / 209.5, "1024": 4096 / 1642.5})
    assert skips["0.05"]["speedup"] == pytest.approx({"128": 512 / 152.5, "1024": 4096 / 1183.5})
    assert skips["0.2"]["bound"] == pytest.approx(2.5)
    assert skips["0.05"]["bound"] == pytest.approx(1 / (0.05 + 0.95 / 4))


def test_settings():
    full, paper, *dense = dense_answer.settings([0.3, 0.1], [0.05])
    assert (full.config, full.skips) == (None, ())
    assert (paper.config, paper.skips) == (SparseDConfig(), (0.2,))  # under its own skip alone
    assert [one.config for one in dense] == [SparseDConfig(select=s, dense_answer=True) for s in (0.3, 0.1)]
    assert {one.skips for one in dense} == {(0.05,)}


def test_table():
    full = {"full_step": summary([4.0, 4.5, 3.5]), "whole_seconds": {"128": 512.0, "1024": 4096.0}}
    runs = {NAMES[0]: full, NAMES[1]: dense_run(skips=(0.2,)), NAMES[3]: dense_run(), "one": {"error": "out of memory"}}
    rows = [{"length": "64k", "runs": runs}, {"length": "128k", "runs": {}, "error": "flash errs"}]
    header, _, *lines = dense_answer.table([{"family": "llada", "skips": ["0.2", "0.05"], "rows": rows}]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in [header, *lines]]
    assert cells == [
        ["model", "prompt", "setting", "density", "full step", "sparse step", "selecting",
         "128 steps, skip 0.2", "1,024 steps, skip 0.2", "128 steps, skip 0.05", "1,024 steps, skip 0.05"],
        ["llada", "64k", NAMES[0], "-", "4 s", "-", "-", "512 s", "4096 s", "512 s", "4096 s"],
        ["llada", "64k", NAMES[1], "0.200", "-", "1 s", "3.5 s", "210 s (2.44x)", "1642 s (2.49x)", "-", "-"],
        ["llada", "64k", NAMES[3], "0.200", "-", "1 s", "3.5 s", "210 s (2.44x)", "1642 s (2.49x)", "152 s (3.36x)",
         "1184 s (3.46x)"],
        ["llada", "64k", "one: out of memory", *["-"] * 8],
        ["llada", "128k", "every setting: flash errs", *["-"] * 8],
    ]  # fmt: skip


# --- wrong calls

OUT = ["--out", "record.json"]
CALL = [*OUT, "--random_weights"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--out"),
        (OUT, "--random_weights"),
        ([*CALL, "--family", "bert"], "--family"),
        ([*CALL, "--lengths", "64k,5k"], "--lengths"),
        ([*CALL, "--select", "0.3,0"], "--select"),
        ([*CALL, "--select", ""], "--select"),
        ([*CALL, "--select", "0.3,few"], "'few'"),
        ([*CALL, "--skip", "1"], "--skip"),
        ([*CALL, "--skip", "0.2,-0.1"], "--skip"),
        ([*CALL, "--repeats", "0"], "--repeats"),
        ([*CALL, "--model_path", "x"], "--model_path"),
        (["--random_weights", "--out", "."], "--out"),
        (CALL, "CUDA"),
    ],
)
def test_a_wrong_call_is_one_line(flags, named, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        dense_answer.main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1, error
    assert not Path("record.json").exists()
