"""Caches, thresholds and early stop in the scripts: the record, the page, the comparison, memory, `--advise`."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shapes import meta_model
from sparsed import SparseDConfig, load_model
from sparsed.cli import arguments, main_dream, main_llada, memory, running, ways
from sparsed.cli.families import LLADA
from sparsed.cli.running import Job
from sparsed.cli.ways import Forwards
from sparsed.models.loading import weight_bytes
from sparsed.report.page import page
from sparsed.report.record import read
from sparsed.sampling.settings import DreamSettings, LLaDASettings
from tests.helpers.tiny_folders import tiny_folder

MAIN = {"dream": main_dream, "llada": main_llada}
QUESTION = "Where does the old lighthouse keeper, who never learned to swim, keep the spare key of the boat house?"
SHIFT = {"dream": 1, "llada": 0}
SETTINGS = {"dream": DreamSettings, "llada": LLaDASettings}
ROOT = Path(__file__).parents[2]
FORWARDS = Forwards(full=10.0, selecting=17.0, sparse=4.0, answer=2.0, cached=1.0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_folder(root / family, family) for family in MAIN}


@pytest.fixture(params=MAIN)
def call(request, checkpoints, tmp_path, capsys):
    """Runs the family's script; returns (family, stderr, record)."""

    def run(words):
        file = tmp_path / "record.json"
        given = ["--model_path", checkpoints[request.param], "--prompt_text", QUESTION, "--device", "cpu"]
        given += ["--block_size", "16", "--block_length", "8", "--json", file, *words.split()]
        assert MAIN[request.param]([str(word) for word in given]) == 0
        return request.param, capsys.readouterr().err, json.loads(file.read_text())

    return run


def phases_of(run):
    return [forward["phase"] for forward in run["forwards"]]


def test_the_record_of_a_cached_run_beside_full_attention(call):
    """Of four refreshes at skip 0.5, two have full attention, of which the second selects."""
    family, err, record = call("--cache dual --seq_len 32 --steps 32 --skip 0.5 --compare")
    plain, cached = record["runs"]
    length = cached["prompt_tokens"] + 32
    assert set(phases_of(plain)) <= {"full", "idle"}, "what it is compared with has no cache"
    refresh = ["full", "selecting", "sparse", "sparse"]
    assert phases_of(cached) == [phase for first in refresh for phase in (first, *["cached"] * 7)]
    assert [forward["rows"] for forward in cached["forwards"]] == 4 * [length, *[8 + SHIFT[family]] * 7]
    assert "full_steps" not in cached and "step_seconds" not in cached, "no prefix of full steps"
    times, speedup = record["comparison"]["seconds"]["sparsed"], record["comparison"]["speedup"]
    assert times["cached_steps"] == pytest.approx(
        sum(f["seconds"] for f in cached["forwards"] if f["phase"] == "cached")
    )
    assert {name for name, value in speedup.items() if value is not None} == {"whole"}
    assert (
        "28 cached steps" in err
        and "32 forwards (1 full, 28 cached, 1 selecting, 2 sparse) for 32 tokens, 1 each" in err
    )
    assert (plain["cached_kernels"], cached["cached_kernels"]) == ([], ["torch"])
    assert err.count("cached steps by the kernel torch") == 1
    shown = page(record)
    assert 'class="cached_steps"' in shown and "over cached keys" in shown
    assert not any(forward.phase == "idle" for forward in read(record).runs[1].forwards)


def test_refreshes_of_the_answer_s_rows(call):
    family, err, record = call("--cache prefix --refresh 2 --seq_len 32 --steps 16 --origin")
    (run,) = record["runs"]
    assert phases_of(run) == 2 * ["full", *["cached"] * 3, "answer", *["cached"] * 3]
    length, shift = run["prompt_tokens"] + 32, SHIFT[family]
    rows = [forward["rows"] for forward in run["forwards"]]
    assert rows[4] == rows[12] == 32 + shift, "the generated region"
    assert [rows[i] for i in (0, 1, 5, 8, 9, 13)] == [length, 32 + shift, 24 + shift, length, 16 + shift, 8 + shift]
    assert "2 answer steps" in err and "12 cached steps" in err


def test_a_threshold_saves_forwards_and_the_record_says_so(call):
    _, err, record = call("--threshold 0 --seq_len 32 --steps 32 --skip 0.5 --temperature 0")
    (run,) = record["runs"]
    phases, committed = phases_of(run), [0.0, *(forward["committed"] for forward in run["forwards"])]
    first = phases.index("selecting")
    assert phases == ["full"] * first + ["selecting"] + ["sparse"] * (len(phases) - first - 1)
    assert committed[first - 1] < 0.5 <= committed[first], "the share that --skip says was there before"
    # a block a forward, but for one whose model draws the mask token
    assert 4 <= len(phases) <= 6
    work, kinds = run["work"], {phase: phases.count(phase) for phase in phases}
    assert work["forwards"] == kinds and (work["tokens"], work["filled"]) == (32, 0)
    assert work["tokens_per_forward"] == 32 / len(phases)
    assert work["tokens_per_second"] == pytest.approx(32 / run["seconds"])
    counted = ", ".join(f"{count} {phase}" for phase, count in kinds.items())
    assert f"{len(phases)} forwards ({counted}) for 32 tokens, {32 / len(phases):.3g} each" in err


@pytest.mark.parametrize(
    "words",
    [
        "--steps 16 --skip 0.5 --cache dual",
        "--steps 16 --skip 0.5 --cache prefix --refresh 2 --origin",
        "--steps 16 --skip 0.5 --cache dual --refresh 0",
        "--steps 32 --skip 0.5 --threshold 0",
        "--steps 32 --skip 0.5 --cache prefix --factor 1.9",
        "--steps 64 --skip 0.2 --temperature 0",
    ],
)
def test_what_is_shown_of_a_step_is_its_phase(words, call, monkeypatch):
    shown = []

    @contextmanager
    def bar(*_):
        yield lambda phase, done, seconds: shown.append((len(done), phase))

    monkeypatch.setattr(running, "bar", bar)
    (run,) = call(f"--seq_len 32 {words}")[2]["runs"]
    ran = [(index, phase) for index, phase in enumerate(phases_of(run)) if phase != "idle"]
    assert shown == [*ran, (len(run["forwards"]), "done")]


def test_an_early_stop_is_in_the_last_step_without_a_probability(checkpoints, tmp_path, capsys):
    """The bundled checkpoint ends its answer in the first block."""
    file = tmp_path / "record.json"
    words = "--demo --prompt short_context --seq_len 64 --steps 64 --cache dual --early_stop --device cpu --json"
    assert main_llada([*words.split(), str(file)]) == 0
    record = json.loads(file.read_text())
    (run,) = record["runs"]
    filled = [commit for commit in run["history"][-1] if commit[0] >= 32]
    assert len(run["forwards"]) == 32 == len(filled) and {probability for _, _, probability in filled} == {None}
    assert run["answer_found"] and run["forwards"][-1]["committed"] == 1.0
    assert (run["work"]["tokens"], run["work"]["filled"], run["work"]["tokens_per_forward"]) == (32, 32, 1.0)
    for said in (capsys.readouterr().err, page(record)):
        assert (
            "32 forwards (1 full, 31 cached) for 32 tokens, 1 each, " in said
            and " tokens per second, and 32 filled in" in said
        )


@pytest.mark.parametrize("family", ["dream", "llada"])
@pytest.mark.parametrize("guided", [False, True])
def test_the_memory_of_a_cache_is_the_cache_s(family, guided):
    model = meta_model(family).to(torch.bfloat16)
    sampler = SETTINGS[family](64, 64, block_length=32)
    halves = 1
    if guided and family == "llada":
        sampler, halves = replace(sampler, cfg_scale=1.0), 2
    plain, cached = (
        memory.peak_bytes(model, one, None, torch.device("cpu"), 4096)
        for one in (sampler, replace(sampler, cache="dual"))
    )
    assert cached - plain == model.kv_cache(halves, 4096 + 64).bytes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--refresh 2", "selecting blocks does not pay; --origin leaves it out"),
        ("--refresh 2 --compare", "selecting blocks does not pay\n"),
        ("--refresh 0", None),
        ("--refresh 2 --skip 1", None),
        ("--refresh 2 --select 1", None),
        ("--refresh 2 --origin", None),
        ("--refresh 1", None),
    ],
)
def test_that_selecting_does_not_pay_is_said_where_something_is_selected(words, said, call):
    """Four blocks, of which half begin with a forward of all rows."""
    err = call(f"--cache dual --seq_len 32 --steps 16 {words}")[1]
    assert "does not pay" not in err if said is None else said in err


@pytest.mark.parametrize(("cache", "graphs"), [("dual", 2), ("prefix", 4)])
def test_the_graphs_of_cached_steps_keep_their_logits_on_a_gpu(cache, graphs):
    """With prefix of four window sizes, one a block."""
    model = meta_model("llada").to(torch.bfloat16)

    def peak(device, cache):
        sampler = LLaDASettings(128, 128, 32, cache=cache, cfg_scale=1.0)
        return memory.peak_bytes(model, sampler, None, torch.device(device), 4096)

    cached = {device: peak(device, cache) - peak(device, "none") for device in ("cpu", "cuda:0")}
    assert cached["cuda:0"] - cached["cpu"] == graphs * 2 * 32 * model.config.sizes.vocabulary * 2


@pytest.mark.parametrize(("family", "said"), [("llada", "34.5 GB (LLaDA)"), ("dream", "3.8 GB (Dream)")])
def test_what_the_pages_say_that_a_cache_takes(family, said):
    """In bfloat16, of 65,536 tokens and 256 new ones."""
    model, sampler = meta_model(family).to(torch.bfloat16), SETTINGS[family](256, 256, block_length=32)
    cached, plain = (
        memory.peak_bytes(model, replace(sampler, cache=cache), None, torch.device("cpu"), 65536)
        for cache in ("dual", "none")
    )
    assert f"{(cached - plain) / 1e9:.1f} GB" == said.rpartition(" ")[0]
    for name in ("README.md", "docs/decoding.md"):
        text = re.sub("<!--=.*?-->", "", (ROOT / name).read_text(encoding="utf-8"))
        assert said in " ".join(text.split())


@pytest.mark.parametrize("family", MAIN)
def test_a_cache_is_timed_only_where_its_forwards_fit_too(family, checkpoints, monkeypatch):
    model = load_model(checkpoints[family], device="cpu")
    sampler = SETTINGS[family](64, 64, block_length=32)
    job = SimpleNamespace(model=model, args=SimpleNamespace(sampler=sampler, device="cpu"))
    taken = memory.peak_bytes(model, replace(sampler, cache="dual"), None, model.device, 1000)
    free = [taken - weight_bytes(model), model.kv_cache(1, 1064).bytes]
    monkeypatch.setattr(memory, "available_bytes", lambda device: free[0])
    assert ways.no_cache(job, 1000) is None
    monkeypatch.setattr(memory, "available_bytes", lambda device: free[1])
    assert "GiB are free" in ways.no_cache(job, 1000)


def test_too_little_memory_says_that_it_fits_without_a_cache(call, monkeypatch, checkpoints, capsys):
    needed, real = [], memory.peak_bytes

    def peak(*given, **named):
        needed.append(real(*given, **named))
        return needed[-1]

    monkeypatch.setattr(memory, "peak_bytes", peak)
    family, _, _ = call("--seq_len 32 --steps 32")
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed[0])
    words = ["--model_path", str(checkpoints[family]), "--prompt_text", QUESTION, "--device", "cpu", "--cache", "dual"]
    words += ["--seq_len", "32", "--steps", "32", "--block_size", "16", "--block_length", "8"]
    assert MAIN[family](words) == 3
    assert "without --cache it fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "words", "must"),
    [
        ("dream", "--sampling-alg origin --factor 1", "not allowed with the algorithm origin"),
        ("dream", "--factor nan", "a number above 0, got 'nan'"),
        ("llada", "--factor nan", "a number above 0, got 'nan'"),
        ("llada", "--threshold nan", "a number at least 0, got 'nan'"),
        ("dream", "--cache dual --refresh nan", "whole number"),
    ],
)
def test_a_wrong_bound_or_refresh_is_one_line(family, words, must, capsys):
    assert MAIN[family](words.split()) == 2
    out, err = capsys.readouterr()
    option = words.split()[-2]
    assert out == "" and err.count("\n") == 1 and f"argument {option}: " in err and must in err


def test_an_answer_stops_early_at_what_the_tokenizer_says_too(call, checkpoints, monkeypatch):
    """A chat ends by a token that the model's config need not name."""
    given = []
    plain = running.sampling.generate
    monkeypatch.setattr(
        running.sampling,
        "generate",
        lambda *args, end_token_ids, **kw: given.append(end_token_ids) or plain(*args, **kw),
    )
    monkeypatch.setattr(running, "stop_ids", lambda config, tokenizer: {5})
    call("--cache dual --seq_len 32 --steps 32 --origin --early_stop")
    call("--cache dual --seq_len 32 --steps 32 --origin")
    assert given == [{5}, None]


# --- --advise, by hand


def ranked(sampler, whole_runs=(1280.0, 711.0)):
    found = ways.every_way(sampler, SparseDConfig(skip=0.25), 4096, FORWARDS, whole_runs)
    return {way.name: way for way in found}


def test_whole_runs_of_every_way_by_hand():
    found = ranked(LLaDASettings(128, 128, 32))
    assert (found["full attention"].most, found["SparseD"].most) == (1280.0, 711.0), "as told of all steps"
    # four blocks of 32 steps, the first of which is a refresh
    assert found["cache"].most == 4 * 10.0 + 124 * 1.0
    assert found["cache and SparseD"].most == 17.0 + 3 * 4.0 + 124 * 1.0  # the first of four is full, and selects
    assert found["cache, all rows once"].most == 10.0 + 3 * 2.0 + 124 * 1.0
    assert all(way.fewest == way.most for way in found.values())
    assert all(way.tokens_per_forward == (1.0, 1.0) for way in found.values())
    assert (found["cache"].whole, found["cache, all rows once"].whole) == (4, 1)
    assert found["cache, all rows once"].flags == {"origin": True, "cache": "dual", "refresh": 0}


def test_dense_answer_rows_are_ranked_with_a_cache_too():
    dense = {select: replace(FORWARDS, sparse=sparse, selecting=18.0) for select, sparse in ((0.3, 5.0), (0.15, 3.0))}
    found = list(
        ways.every_way(LLaDASettings(128, 128, 32), SparseDConfig(skip=0.25), 4096, FORWARDS, (1.0, 1.0), dense=dense)
    )
    assert len(found) == 7
    for way, select, sparse in zip(found[5:7], (0.3, 0.15), (5.0, 3.0), strict=True):
        assert way.name == f"cache and dense answer rows, select {select}"
        assert way.most == 18.0 + 3 * sparse + 124 * 1.0
        assert way.flags["select"] == select and way.flags["dense_answer"] and not way.flags["origin"]
    assert "dense_answer" not in found[3].flags


def test_where_every_block_is_kept_sparsed_loses_what_full_attention_does():
    found = {
        way.name: way.nats
        for way in ways.every_way(
            LLaDASettings(256, 256, 32), SparseDConfig(), 4096, FORWARDS, (1.0, 1.0), keeps_all=True
        )
    }
    assert found["SparseD"] == found["full attention"] == 0.0
    assert found["cache and SparseD"] == found["cache"] > 0.0
    assert ranked(LLaDASettings(128, 128, 32))["SparseD"].nats is None, "skip 0.25 was not measured"


def test_a_threshold_leaves_a_range():
    found = ranked(LLaDASettings(128, 128, 32, threshold=0.9))
    assert (found["full attention"].fewest, found["full attention"].most) == (40.0, 1280.0)
    assert (found["cache"].fewest, found["cache"].most) == (40.0, 40.0 + 124.0)
    # nothing is committed at the first forward of four, a quarter, as much as `skip`, at the second, which selects
    assert found["SparseD"].fewest == 10.0 + 17.0 + 2 * 4.0
    assert found["cache"].tokens_per_forward == found["full attention"].tokens_per_forward == (32.0, 1.0)
    (line,) = (line for line in as_lines(found) if " cache: " in line)
    assert "40.0 to 164.0 s, if a forward commits 32 tokens or 1, 7.8x" in line


def as_lines(found):
    return ways.way_lines([vars(way) | {"command": way.name} for way in found.values()])


def test_steps_that_commit_nothing_are_left_out():
    """Of 256 steps for 128 tokens, every block leaves out half of its 64; Dream is given blocks of 32."""
    assert ranked(LLaDASettings(128, 256, 32))["cache"].most == 40.0 + 4 * 31.0
    assert ranked(DreamSettings(128, 128))["cache"].most == 40.0 + 124.0


def test_selecting_that_does_not_pay_is_said():
    """With two refreshes one selects at 17 and one is sparse at 4, against two full ones of 10."""

    def lines(gen_length):
        return "\n".join(as_lines(ranked(LLaDASettings(gen_length, gen_length, 32))))

    assert "selecting blocks does not pay with 2 forwards of all rows: add --origin" in lines(64)
    assert "does not pay" not in lines(128)


def test_selecting_pays_if_it_does_with_dense_answer_rows():
    slow = replace(FORWARDS, sparse=12.0)  # than a full one
    found = {
        name: [way for way in ways.every_way(LLaDASettings(128, 128, 32), SparseDConfig(0.25), 4096, slow, (1.0, 1.0),
                                             dense=dense)]
        for name, dense in (("without", {}), ("with", {0.15: FORWARDS}))
    }  # fmt: skip
    said = {name: "does not pay" in as_lines({way.name: way for way in ranked})[-1] for name, ranked in found.items()}
    assert said == {"without": True, "with": False}


def test_advice_ranks_them_and_times_few_rows(call):
    _, _, record = call("--advise --seq_len 32 --steps 128")
    advice = record["advice"]
    names = {"full attention", "SparseD", "cache", "cache and SparseD", "cache, all rows once"}
    dense = {f"cache and dense answer rows, select {select}" for select in (0.3, 0.15)}
    assert {way["name"] for way in advice["ways"]} == names | dense
    assert [way["most"] for way in advice["ways"]] == sorted(way["most"] for way in advice["ways"])
    assert advice["forwards"]["cached"] > 0 < advice["forwards"]["answer"]
    took = {way["name"]: way["most"] for way in advice["ways"]}
    assert (took["full attention"], took["SparseD"]) == (advice["origin_seconds"], advice["sparsed_seconds"])
    commands = {way["name"]: way["command"] for way in advice["ways"]}
    assert "--cache dual --refresh 0 " in commands["cache, all rows once"] + " "
    assert all({"--dense_answer", "--cache"} <= {*commands[name].split()} for name in dense)
    assert "--select 0.15 " in commands["cache and dense answer rows, select 0.15"]
    assert "--cache" not in commands["SparseD"] and "--origin" not in commands["cache and SparseD"]


def test_where_blocks_do_not_fit_no_cache_is_timed(checkpoints, tmp_path, capsys):
    words = ["--model_path", str(checkpoints["dream"]), "--prompt_text", QUESTION, "--device", "cpu", "--advise"]
    assert main_dream([*words, "--seq_len", "40", "--steps", "40"]) == 0
    assert (
        "no cache was timed: a cache needs blocks: --block_length must divide the 40 new tokens"
        in capsys.readouterr().out
    )


def test_few_rows_are_timed_as_they_are_replayed(checkpoints):
    """The first of a kind runs as it is, the second is captured: the later ones are like most steps."""
    model, shapes = load_model(checkpoints["llada"], device="cpu"), []
    model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[1]))
    words = "--device cpu --seq_len 32 --steps 32 --block_length 8"
    ways.time_few_rows(Job(model, None, [7] * 100, arguments.parse(LLADA, words.split())), 100)
    assert shapes == [132, *[32] * 4, *[8] * 4]
