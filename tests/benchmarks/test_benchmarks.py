"""The benchmarks' arithmetic, gates, arguments and processes, on a CPU; what they measure needs a GPU."""

import ast
import json
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import (
    agreement,
    attention,
    fast_dllm_worker,
    few_queries,
    generation,
    kernels,
    latency,
    phases,
    plot,
    reference,
    reference_worker,
    selection,
)
from benchmarks.common import LENGTHS, summary
from sparsed import SparseDConfig, dream_generate, llada_generate, load_model, sparsify
from sparsed.backends import BACKENDS
from sparsed.blocks import BlockGrid, Pattern
from sparsed.kernels import block_scores_torch
from sparsed.watching import watched
from tests.helpers import standins
from tests.helpers.checkpoints import tiny_checkpoint

CONFIG = SparseDConfig()
ROOT = Path(__file__).parents[2]


def run_of(full, choosing=None, sparse=None, **fields):
    """A run of a record, one sample a phase."""
    names = ("full_step", "selection", "sparse_step")
    found = {name: None if x is None else summary([x]) for name, x in zip(names, (full, choosing, sparse), strict=True)}
    return found | {"peak_memory_bytes": 30_000_000_000, **fields}


RUNS = {
    "origin": run_of(4.0),
    "sparsed": run_of(4.0, 20.0, 1.0, backend="triton"),
    "released_origin": run_of(6.0),
    "released_sparsed": run_of(6.0, 100.0, 3.0),
}


def record_of(runs, **fields):
    row = {"length": "64k", "prompt_tokens": 65536, "runs": runs, **phases.derive(runs, CONFIG), **fields}
    return json.loads(json.dumps({"family": "llada", "rows": [row]}))


# --- from phases to whole runs


def test_whole_runs_of_both_codes():
    whole = phases.derive(RUNS, CONFIG)["whole_seconds"]
    # ours is full for ceil(0.2 * T) steps, the released code for int(0.2 * T) + 2
    assert whole["128"] == {
        "origin": 128 * 4.0,
        "sparsed": 26 * 4.0 + 20.0 + 102 * 1.0,
        "released_origin": 128 * 6.0,
        "released_sparsed": 27 * 6.0 + 100.0 + 101 * 3.0,
    }
    assert whole["1024"]["sparsed"] == 205 * 4.0 + 20.0 + 819 * 1.0
    assert whole["1024"]["released_sparsed"] == 206 * 6.0 + 100.0 + 818 * 3.0


def test_speedup_is_over_each_other_run():
    derived = phases.derive(RUNS, CONFIG)
    assert derived["speedup"]["128"] == pytest.approx(
        {"origin": 512 / 226, "released_origin": 768 / 226, "released_sparsed": 565 / 226}
    )


def test_bound_is_the_limit_of_many_steps():
    assert phases.bound(0.2, 4.0, 1.0) == pytest.approx(2.5)
    assert phases.bound(0.2, 4.0, 4.0) == pytest.approx(1.0)
    steps = 10**7
    gain = steps * 4.0 / phases.whole_run(RUNS["sparsed"], steps, CONFIG.n_full(steps))
    assert gain == pytest.approx(phases.derive(RUNS, CONFIG)["bound"], rel=1e-4)


@pytest.mark.parametrize("names", [["origin"], ["sparsed"], [], ["released_origin", "released_sparsed"]])
def test_what_was_not_measured_is_left_out(names):
    derived = phases.derive({name: RUNS[name] for name in names}, CONFIG)
    assert list(derived["whole_seconds"]["128"]) == names
    assert derived["bound"] is None
    assert not any(derived["speedup"].values())


def test_whole_run_without_its_selection_is_unknown():
    assert phases.whole_run(run_of(4.0, None, 1.0), 128, 26) is None


def test_steps_by_phase():
    steps = phases.split([0.0, 1.0, 1.2, 5.0, 0.5, 0.0, 0.4], n_full=4)
    assert (steps.full, steps.sparse) == ([1.0, 1.2], [0.5, 0.4])
    assert steps.selection == pytest.approx(5.0 - 1.1)
    assert phases.split([0.0, 2.0, 3.0]) == phases.Steps([2.0, 3.0], None, [])


def test_whole_run_pays_for_its_setup_once():
    run = run_of(4.0, 5.0, 1.0) | {"setup_seconds": 0.5}
    assert phases.whole_run(run, 128, None) == 128 * 4.0 + 0.5
    assert phases.whole_run(run, 128, 26) == 26 * 4.0 + 5.0 + 102 * 1.0 + 0.5


def test_setup_is_what_the_medians_do_not_explain():
    steps = phases.Steps([3.0, 1.0, 1.0], 2.0, [0.5, 0.5, 0.75])
    assert phases.setup_seconds([steps]) == pytest.approx(2.25)


def test_summary():
    found = summary([4.0, 1.0, 2.0, 3.0])
    assert (found["median"], found["range"], found["quartiles"]) == (2.5, [1.0, 4.0], [1.75, 3.25])
    assert summary([7.0])["quartiles"] == [7.0, 7.0]
    assert summary([]) is None


# --- how many steps are run


def generations(full, sparse):
    """First generations of both modes; steps that select or compile take longer."""
    return {
        "origin": latency.Generation([9 * full, full], None, 0.0, 0, {}),
        "sparsed": latency.Generation([9 * full, 5 * sparse, sparse], 1, 0.0, 0, {}),
    }


@pytest.mark.parametrize(
    ("full", "sparse", "steps", "origin", "sparsed", "rounds"),
    [
        (5.0, 2.3, None, (3, 0), (3, 4), 1),
        (0.5, 0.25, None, (10, 0), (10, 20), 1),
        (0.01, 0.008, None, (128, 0), (26, 102), 3),
        (5.0, 2.3, 10, (10, 0), (2, 8), 1),
    ],
)
def test_plan_fills_the_budget(full, sparse, steps, origin, sparsed, rounds):
    settings = latency.Settings(CONFIG, "auto", 5.0, steps)
    schedules, count = latency.plan(generations(full, sparse), settings)
    assert schedules == {"origin": latency.Schedule(*origin), "sparsed": latency.Schedule(*sparsed)}
    assert count == rounds


def test_a_schedule_is_what_its_skip_gives():
    for full in range(1, 27):
        for sparse in range(1, 103):
            assert SparseDConfig(skip=full / (full + sparse)).n_full(full + sparse) == full


# --- a run of the command


@pytest.fixture
def on_cpu(monkeypatch):
    """The GPU's part of the latency benchmark, played by the CPU."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    monkeypatch.setattr(latency, "require_gpu", lambda parser: torch.device("cpu"))


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_latency_from_end_to_end(family, on_cpu, monkeypatch, tmp_path, capsys):
    model = load_model(tiny_checkpoint(tmp_path / "model", family), device="cpu")
    monkeypatch.setattr(latency, "load", lambda parser, args, device: model)
    monkeypatch.setattr(latency, "save", lambda path, record: states.append(json.loads(json.dumps(record))))
    monkeypatch.setattr(latency, "draw", lambda records, path: "no plot")
    monkeypatch.setitem(LENGTHS, "4k", 96)
    states = []
    flags = ["--family", family, "--random_weights", "--lengths", "short_context,4k", "--backend", "gather"]
    latency.main([*flags, "--steps", "10", "--out", str(tmp_path / "record.json")])
    saved = [[row["length"] for row in state["rows"]] for state in states]
    assert saved == [["short_context"], ["short_context", "4k"]]
    record = states[-1]
    for row in record["rows"]:
        dense, sparse = row["runs"]["origin"], row["runs"]["sparsed"]
        assert dense["full_step"]["count"] == 10 and dense["sparse_step"] is None
        counts = [sparse[name]["count"] for name in ("full_step", "selection", "sparse_step")]
        assert counts == [1, 1, 8]
        for run in (dense, sparse):
            assert 0 < run["gate"]["error"] <= run["gate"]["allowed"] < 0.05
        assert sparse["backend"] == "gather" and 0 < sparse["density"] <= 1 and sparse["peak_memory_bytes"] == 5
        assert row["speedup"]["128"]["origin"] == pytest.approx(
            row["whole_seconds"]["128"]["origin"] / row["whole_seconds"]["128"]["sparsed"]
        )
    printed = capsys.readouterr().out
    assert printed.endswith(plot.table([record]) + "\n")
    assert record["command"].startswith("python -m benchmarks.latency") and record["environment"]["torch"]


@pytest.fixture
def tiny_dream(tmp_path):
    return load_model(tiny_checkpoint(tmp_path / "model", "dream"), device="cpu")


def test_a_step_without_a_forward_takes_no_time(tiny_dream):
    seconds = latency.step_seconds(tiny_dream, torch.zeros(1, 16, dtype=torch.int64), 128)
    assert seconds[0] == 0.0 and min(seconds[1:]) > 0 and len(seconds) == 128


def test_a_generation_follows_its_schedule(tiny_dream, on_cpu):
    settings = latency.Settings(CONFIG, "gather", 5.0, None)
    prompt = torch.zeros(1, 16, dtype=torch.int64)
    sparse = latency.generation(tiny_dream, prompt, latency.Schedule(3, 4), settings)
    assert (sparse.n_full, len(sparse.seconds)) == (3, 7)
    dense = latency.generation(tiny_dream, prompt, latency.Schedule(2), settings)
    assert (dense.n_full, len(dense.seconds), dense.kernel) == (None, 2, {})


def test_out_of_memory_is_a_row(on_cpu, monkeypatch, tmp_path):
    def measure(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(latency, "measure", measure)
    record = {"rows": []}
    args = SimpleNamespace(lengths=["4k"], modes=["origin"], out=tmp_path / "record.json")
    latency.run_ours(None, args, latency.Settings(CONFIG, "auto", 5.0, None), record)
    assert json.loads(args.out.read_text())["rows"][0]["error"] == "out of memory"


def test_a_wrong_kernel_is_not_timed(tiny_dream, on_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(latency, "full_attention", lambda q, k, v: (torch.zeros_like(q), None))
    monkeypatch.setattr(latency, "run_record", lambda *runs: pytest.fail("timed"))
    monkeypatch.setitem(LENGTHS, "4k", 96)
    record = {"rows": []}
    args = SimpleNamespace(lengths=["4k"], modes=["origin", "sparsed"], out=tmp_path / "record.json")
    settings = latency.Settings(SparseDConfig(block_size=32), "gather", 5.0, None)
    assert not latency.run_ours(tiny_dream, args, settings, record)
    assert record["rows"][0]["error"].startswith("full attention errs by") and not record["rows"][0]["runs"]


OUT = ["--out", "record.json"]
LATENCY = [*OUT, "--random_weights"]


@pytest.mark.parametrize(
    ("main", "flags", "named"),
    [
        (latency.main, [], "--out"),
        (latency.main, OUT, "--random_weights"),
        (latency.main, [*LATENCY, "--model_path", "x"], "--model_path"),
        (latency.main, [*LATENCY, "--family", "bert"], "bert"),
        (latency.main, [*LATENCY, "--lengths", "4k,5k"], "'5k'"),
        (latency.main, [*LATENCY, "--lengths", ""], "--lengths"),
        (latency.main, [*LATENCY, "--modes", "dense"], "'dense'"),
        (latency.main, [*LATENCY, "--steps", "5"], "at least 6"),
        (latency.main, [*LATENCY, "--budget", "0"], "--budget"),
        (latency.main, [*LATENCY, "--backend", "cudnn"], "cudnn"),
        (latency.main, [*LATENCY, "--reference", "."], "models/LLaDA/generate.py"),
        (latency.main, [*OUT, "--model_path", "x", "--reference", "."], "--reference"),
        (latency.main, [*LATENCY, "--family", "illada", "--reference", "."], "does not run illada"),
        (latency.main, [*LATENCY[2:], "--out", "."], "--out"),
        (latency.main, LATENCY, "CUDA"),
        (attention.main, OUT, "CUDA"),
        (few_queries.main, OUT, "CUDA"),
        (generation.main, [*OUT, "--ways", "dual,once,half"], "'half'"),
        (attention.main, [*OUT, "--backends", "flash,xformers"], "'xformers'"),
        (attention.main, [*OUT, "--block_sizes", "48"], "'48'"),
        (selection.main, OUT, "CUDA"),
        (selection.main, [*OUT, "--lengths", "1m"], "'1m'"),
        (plot.main, ["missing.json", "--out", "plot.png"], "missing.json"),
        (plot.main, ["other.json", "--out", "plot.png"], "no record"),
    ],
)
def test_a_wrong_call_is_one_line(main, flags, named, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("other.json").write_text('{"rows": [{"kernel": "triton"}]}')
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1, error
    assert not Path("record.json").exists()


# --- the released code


def test_released_rule():
    for steps in range(6, 300):
        for skip in (0.0, 0.1, 0.2, 0.3, 0.5):
            selecting = int(steps * skip) + 1  # its `end_time`: full up to and including this step
            full = [step for step in range(steps) if step <= selecting]
            assert reference_worker.released_n_full(steps, skip) == len(full)
    assert reference_worker.released_n_full(128, 0.2) == 27


@pytest.mark.parametrize("name", ["4k", "16k", "64k"])
def test_released_generations_hold_every_phase(name):
    plan = reference.plan(name)
    n_full = reference_worker.released_n_full(plan["sparsed_steps"], CONFIG.skip)
    assert n_full - 1 >= 2 and plan["sparsed_steps"] - n_full >= 2
    assert (plan["generations"] == 1) == (name == "64k")


class FakeModel(torch.nn.Module):
    """Answers as the released LLaDA, notes its phases by the released rule and takes 4, 20 and 1 ms for them."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.phases = []

    def forward(self, ids, SparseD_param=None):
        step, end = 0, 1
        if SparseD_param is not None:
            step, end = SparseD_param["now_step"], int(SparseD_param["whole_steps"] * SparseD_param["skip"]) + 1
        self.phases.append("full" if step < end else "selecting" if step == end else "sparse")
        time.sleep({"full": 4e-3, "selecting": 20e-3, "sparse": 1e-3}[self.phases[-1]])


def fake_generate(model, prompt, *, steps, SparseD_param, **_):
    for step in range(steps):
        if SparseD_param is None:
            model(prompt)
        else:
            SparseD_param["now_step"] = step
            model(prompt, SparseD_param=SparseD_param)


def test_released_steps_are_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "models", ModuleType("models"))
    sys.modules["models"].generate = fake_generate
    job = {"family": "llada", "shape": {"mask_token_id": 1}, "new_tokens": 8, "modes": ["origin", "sparsed"]}
    job["config"] = {"skip": 0.2, "select": 0.3, "block_size": 128}
    model, plan = FakeModel(), {"origin_steps": 4, "sparsed_steps": 10, "generations": 2}
    measured = reference_worker.measure(model, job, torch.zeros(1, 4), plan)
    answer = reference._converted(json.loads(json.dumps({"length": "4k", "runs": measured})))
    dense, sparse = answer["runs"]["released_origin"], answer["runs"]["released_sparsed"]
    assert dense["full_step"]["count"] == 3  # the first of them is a warm-up
    expected = [model.phases[4:14].count(phase) for phase in ("full", "selecting", "sparse")]
    assert [sparse[name]["count"] for name in ("full_step", "selection", "sparse_step")] == expected == [3, 1, 6]
    assert min(sparse["full_step"]["samples"]) >= 4e-3
    assert sparse["selection"]["median"] > 5e-3
    assert "forward" not in model.__dict__


def test_compile_time_of_a_lone_generation_is_taken_out():
    generation = {"seconds": [2.0, 2.0, 30.0, 11.0, 1.0, 1.0], "compile_seconds": [0, 0, 8.0, 10.0, 0, 0]}
    run = reference._run({"generations": [generation], "n_full": 3, "peak_memory_bytes": 1}, "sparsed")
    assert run["selection"]["median"] == 20.0 and run["sparse_step"]["samples"] == [1.0, 1.0, 1.0]
    assert run["first_use_seconds"] == 18.0 and "compile" in run["note"]


def test_the_reference_is_a_process_of_its_own(monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys\n"
        "job = json.loads(sys.argv[1])\n"
        "print('noise'); print(json.dumps({'versions': os.environ['PYTHONPATH'].split(os.pathsep)}))\n"
        "print(json.dumps({'length': job['plans'][0]['length'], 'error': os.getcwd()}), flush=True)\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setattr(reference_worker, "__file__", str(worker))
    monkeypatch.setenv("PYTHONPATH", "/ours")
    answers = reference.measure(tmp_path, "llada", ["64k"], ["origin"], CONFIG)
    assert next(answers) == {"versions": [str(tmp_path / "site"), str(tmp_path)]}
    assert next(answers) == {"length": "64k", "error": str(tmp_path)}
    with pytest.raises(RuntimeError, match="exit code 3"):
        next(answers)


@pytest.mark.parametrize("worker", [reference_worker, fast_dllm_worker])
def test_the_workers_import_nothing_of_ours(worker):
    for node in ast.walk(ast.parse(Path(worker.__file__).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module]
        assert not any(name.split(".")[0] in ("sparsed", "benchmarks") for name in names)


# --- table and plot


def test_table():
    record = record_of(RUNS, reference_error="out of memory")
    header, _, *lines = plot.table([record]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in [header, *lines]]
    assert {len(line) for line in cells} == {len(plot.COLUMNS)}
    assert cells[1][:3] == ["llada", "64k", "ours, --origin"] and cells[1][-3:] == ["2.27x", "2.47x", "2.50x"]
    assert cells[2][2:9] == ["ours, SparseD (triton)", "4 s", "20 s", "1 s", "226 s", "1659 s", "30.0 GB"]
    assert cells[4][-3:] == ["2.50x", "2.28x", "-"]
    assert cells[5][2] == "released: out of memory"


def test_table_of_one_mode():
    assert len(plot.table([record_of({"sparsed": RUNS["sparsed"]})]).splitlines()) == 3


def test_without_matplotlib_a_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert "matplotlib" in plot.draw([record_of(RUNS)], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "record.json").write_text(json.dumps(record_of(RUNS)))
    plot.main([str(tmp_path / "record.json"), "--out", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --- gates


@pytest.fixture
def heads():
    q, k, v = (torch.randn(1, h, 1000, 32, dtype=torch.bfloat16) for h in (4, 2, 2))
    return kernels.Heads(q, k, v)


def test_few_rows_by_every_kernel(heads, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(kernels, "gpu_seconds", lambda work: [2.0, 2.0, 2.0])
    rows = few_queries.measure(heads, SparseDConfig(), SimpleNamespace(family="dream"))
    assert [row["queries"] for row in rows] == [33] * 4 + [257] * 4
    for own in (rows[0], rows[4]):
        assert own["kernel"].startswith("the package's choice: torch") and own["ratio"] == 1.0
        assert own["bytes_per_second"] == 2 * heads.k.numel() * 2 / 2.0
    assert all("unavailable" in row for row in rows if row["kernel"].startswith("split")), "no Triton kernel on a CPU"


def test_attention_gate(heads):
    pattern = attention.random_pattern(heads, CONFIG.select, 128)
    sparse = BACKENDS["gather"].build(pattern)(heads.q, heads.k, heads.v)
    full = attention.torch_kernel(attention.SDPBackend.MATH)(heads.q, heads.k, heads.v)
    assert kernels.attention_gate(sparse, heads, pattern).passed
    assert kernels.attention_gate(full, heads).passed
    # a kernel that drops the pattern in silence
    assert not kernels.attention_gate(full, heads, pattern).passed


def test_score_gate(heads):
    scores = block_scores_torch(heads.q, heads.k, block_size=128)
    assert selection.score_gate(scores, heads, 128).passed
    assert not selection.score_gate(1.05 * scores, heads, 128).passed


def test_top_k_gate(heads):
    pattern = attention.random_pattern(heads, CONFIG.select, 128)
    scores = torch.zeros(1, 4, 8, 8).scatter_(-1, pattern.indices.long(), 1.0)
    assert selection.top_k_gate(pattern, scores, CONFIG.select).passed
    assert not selection.top_k_gate(pattern, -scores, CONFIG.select).passed
    fewer = Pattern(pattern.indices[..., :-1], (pattern.counts[0] - 1,), pattern.grid)
    assert not selection.top_k_gate(fewer, scores, CONFIG.select).passed


def test_a_kernel_that_fails_is_not_timed(heads, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(kernels, "gpu_seconds", lambda work: [1e-3])
    zeros = torch.zeros_like(heads.q)
    wrong = kernels.entry("zeros", lambda: zeros, lambda out: kernels.attention_gate(out, heads), 1.0)
    assert "fault" in wrong and "seconds" not in wrong
    broken = kernels.entry("broken", lambda: 1 / 0, None, 1.0)
    assert broken["fault"].startswith("ZeroDivisionError")
    right = kernels.entry("right", lambda: heads.q, lambda out: kernels.Gate(0.0, 0.0), 1e9)
    assert right["tflops"] == pytest.approx(1.0)
    assert "ZeroDivisionError" in kernels.table([broken | {"length": "4k"}, right | {"length": "4k"}], "ratio")


@pytest.mark.parametrize(("row", "code"), [({"unavailable": "needs a GPU"}, 0), ({"fault": "error 1e-1"}, 1)])
def test_a_failed_gate_is_the_exit_code(row, code, heads, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "require_gpu", lambda parser: torch.device("cpu"))
    monkeypatch.setattr(kernels, "matmul_tflops", lambda device: 700.0)
    monkeypatch.setattr(kernels, "random_heads", lambda config, length, device: heads)
    parser, flags = kernels.kernel_parser("attention", ""), ["--lengths", "4k", "--out", str(tmp_path / "record.json")]
    try:
        kernels.run(parser, flags, lambda *args: [{"kernel": "flash", **row}], "ratio")
        stopped = 0
    except SystemExit as stop:
        stopped = stop.code
    assert stopped == code
    assert json.loads((tmp_path / "record.json").read_text())["rows"][0]["tokens"] == 1000
    assert list(row.values())[0] in capsys.readouterr().out


def test_pattern_has_the_density_of_a_run(heads):
    pattern = attention.random_pattern(heads, CONFIG.select, 32)
    assert pattern.density.item() == pytest.approx(0.3, abs=0.05)
    assert heads.matmul_flops == 2 * 4 * 1000**2 * 32


# --- agreement


def test_agreement_is_held_against_the_later_steps():
    """Two heads of four blocks, the last one the answer: counted here by hand."""
    grid = BlockGrid(length=16, prompt_len=12, block_size=4)
    early, late = ([[0, 3]] * 4, [[0, 3]] * 2 + [[1, 3]] * 2)
    patterns = [Pattern(torch.tensor([[rows, rows]], dtype=torch.int32), (2,), grid) for rows in (early, late)]
    scores = torch.zeros(1, 2, 4, 4)
    scores[..., 0], scores[:, 0, :, 1], scores[:, 1, :, 2] = 1, 3, 3
    layers = {step: [(scores, patterns[1])] for step in (agreement.LATE, *agreement.LATER)}
    found = agreement.compare({agreement.EARLY: [(scores, patterns[0])]} | layers)
    assert found["common"] == 0.75  # the last block everywhere, the first one in half of the rows
    assert found["early_all"] == found["early_answer"] == [0.25] * len(agreement.LATER)
    # block 0 in the first two rows; in the others block 1, which only one head looks at
    assert found["late_all"] == [(0.25 + 0.75 / 2) / 2] * len(agreement.LATER)
    assert found["late_answer"] == [0.75 / 2] * len(agreement.LATER)


@pytest.mark.parametrize("make", [standins.tiny_dream, standins.tiny_llada])
def test_the_late_choice_is_that_of_a_sparse_run(make):
    model, real = make(), []
    prompt = torch.randint(0, model.config.mask_token_id, (1, 400))
    found = agreement.watch(model, prompt)
    assert set(found) == {0, 12, *agreement.LATER}
    rule = watched(lambda scores, pattern: real.append((scores, pattern)))
    options = {"gen_length": 64, "steps": 64, **({"block_length": 32} if model.family == "llada" else {})}
    with sparsify(model, CONFIG, steps=64, gen_length=64, rule=rule):
        (dream_generate if model.family == "dream" else llada_generate)(model, prompt, **options)
    for (scores, pattern), (expected, chosen) in zip(found[12], real, strict=True):
        torch.testing.assert_close(scores, expected)
        assert torch.equal(pattern.indices, chosen.indices)


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_watching_costs_less_than_a_twentieth(family):
    record = json.loads((ROOT / f"benchmarks/results/show-{family}-cpu.json").read_text())
    shown, plain = (statistics.median(record[f"{kind}_seconds"]["samples"]) for kind in ("shown", "plain"))
    assert record["cost"] == shown / plain - 1 < 0.05


def test_the_medians_of_latency_are_those_of_its_samples():
    for path in (ROOT / "benchmarks/results").glob("latency-*.json"):
        for row in json.loads(path.read_text())["rows"]:
            for run, phase in product(row["runs"].values(), ("full_step", "selection", "sparse_step")):
                assert run[phase] is None or run[phase]["median"] == statistics.median(run[phase]["samples"])
