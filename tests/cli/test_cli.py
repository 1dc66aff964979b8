"""The scripts' output: the record and its meanings, what goes to stdout and stderr, seeds, interruption."""

import io
import json
import os
import re
import shlex
import sys
from itertools import accumulate
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from sparsed import SparseDConfig, dream_generate, llada_generate, load_model, load_tokenizer, sampling
from sparsed.chat import encode_chat
from sparsed.cli import arguments, flags, main_dream, main_llada, running
from sparsed.cli import main as main_module
from sparsed.cli.families import DREAM, LLADA
from sparsed.console import files
from sparsed.models import loading
from tests.helpers.tiny_folders import tiny_folder

ROOT = Path(__file__).parents[2]
MAIN = {"dream": main_dream, "llada": main_llada}
QUESTION = "Where does the old lighthouse keeper, who never learned to swim, keep the spare key of the boat house?"
STEPS, LENGTH = 10, 32
N_FULL = 2  # ceil(0.2 * 10)
SHORT = ["--seq_len", str(LENGTH), "--steps", str(STEPS), "--block_size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_folder(root / family, family) for family in MAIN}


@pytest.fixture
def call(checkpoints, tmp_path, capsys):
    """Run a script's main in this process; returns (exit code, stdout, stderr, record)."""

    def run(family, *words, own_prompt=True):
        file = tmp_path / "record.json"
        prompt = ["--prompt_text", QUESTION] if own_prompt else []
        code = MAIN[family](
            ["--model_path", str(checkpoints[family]), *prompt, *SHORT, *map(str, words), "--json", str(file)]
        )
        out, err = capsys.readouterr()
        return code, out, err, json.loads(file.read_text()) if file.exists() else None

    return run


def prompt_ids(checkpoint):
    return encode_chat(load_tokenizer(checkpoint), QUESTION)


@pytest.mark.parametrize("family", MAIN)
def test_the_record_of_a_sparse_run(family, call, checkpoints):
    code, out, _, record = call(family)
    assert code == 0
    (run,) = record["runs"]
    ids = prompt_ids(checkpoints[family])
    assert run["mode"] == "sparsed"
    assert run["prompt_tokens"] == len(ids)
    assert len(run["token_ids"]) == LENGTH
    assert out == run["text"] + "\n"
    steps = run["step_seconds"]
    assert len(steps) == STEPS and all(seconds > 0 for seconds in steps)
    assert run["seconds"] == pytest.approx(sum(steps), rel=0.05)
    assert run["full_steps"] == N_FULL
    assert run["selection_seconds"] == pytest.approx(steps[N_FULL - 1] - median(steps[: N_FULL - 1]))
    assert run["backend"] == "gather" and run["backend_reason"]
    assert run["peak_memory_bytes"] is None
    commits = sorted(commit for entry in run["history"] for commit in entry)
    assert len(run["history"]) == STEPS and [token for _, token, _ in commits] == run["token_ids"]
    assert len(run["pieces"]) == LENGTH and "".join(run["pieces"][: run["answer_tokens"]]).strip() == run["text"]
    assert sum(layer["density"] for layer in run["layers"]) / len(run["layers"]) == pytest.approx(run["density"])
    assert run["pattern"]["prompt_tokens"] == len(ids) and run["pattern"]["tokens"] == len(ids) + LENGTH
    assert (run["expected"], run["answer_found"]) == (None, None)
    assert (record["beyond_trained_length"], "comparison" in record) == (False, False)
    assert record["arguments"]["select"] == 0.3 and record["arguments"]["block_size"] == 16
    assert record["arguments"]["model_path"] == str(checkpoints[family])
    environment = record["environment"]
    assert environment["torch"] == torch.__version__ and environment["device"] == "cpu"
    assert environment["dtype"] == "float32" and environment["threads"] == torch.get_num_threads()


def shares(run):
    """How much of the answer is committed after each step, by the history."""
    return [count / LENGTH for count in accumulate(map(len, run["history"]))]


@pytest.mark.parametrize("family", MAIN)
def test_every_forward_is_recorded(family, call):
    _, _, _, record = call(family, "--compare")
    phases = {"origin": ["full"] * STEPS, "sparsed": ["full", "selecting"] + ["sparse"] * (STEPS - 2)}
    for run in record["runs"]:
        forwards = run["forwards"]
        assert [forward["phase"] for forward in forwards] == phases[run["mode"]]
        assert {forward["rows"] for forward in forwards} == {run["prompt_tokens"] + LENGTH}
        assert [forward["seconds"] for forward in forwards] == run["step_seconds"]
        assert [forward["committed"] for forward in forwards] == shares(run) and shares(run)[-1] == 1.0


@pytest.mark.parametrize("family", MAIN)
def test_steps_without_a_forward_are_idle(family, call):
    """Dream's time grid has them at temperature 0 anywhere, LLaDA's even shares at the end."""
    _, _, _, record = call(family, "--steps", 64, "--temperature", 0)
    (run,) = record["runs"]
    idle = [forward for forward in run["forwards"] if forward["phase"] == "idle"]
    assert idle and len(run["forwards"]) == len(run["step_seconds"]) == len(run["history"]) == 64
    assert {(forward["rows"], forward["seconds"]) for forward in idle} == {(0, 0.0)}
    assert all(forward["seconds"] > 0 for forward in run["forwards"] if forward["phase"] != "idle")
    assert run["full_steps"] == 13, "they count as steps"
    assert [forward["committed"] for forward in run["forwards"]] == shares(run)


@pytest.mark.parametrize("skip", [0.1, 0.2], ids=["the first step would select", "a later step would"])
def test_a_run_that_keeps_every_block_has_full_forwards_alone(skip, call):
    _, _, err, record = call("llada", "--select", 1, "--skip", skip)
    (run,) = record["runs"]
    assert [forward["phase"] for forward in run["forwards"]] == ["full"] * STEPS
    assert (run["full_steps"], run["selection_seconds"]) == (STEPS, None)
    assert f"({STEPS} full steps" in err


@pytest.mark.parametrize("family", MAIN)
def test_density_counts_pairs_of_the_sparse_steps(family, call, checkpoints):
    whole = [extra for extra in range(16) if (len(prompt_ids(checkpoints[family])) + extra) % 16 == 0][0]
    text = QUESTION + "?" * whole  # one token each: all blocks are then of one size
    _, _, _, record = call(family, "--select", 0.5, "--prompt_text", text)
    (run,) = record["runs"]
    prompt_blocks = run["prompt_tokens"] // 16
    kept = -(-prompt_blocks // 2) + 1  # half of the prompt's blocks, one of the answer's two
    assert run["density"] == pytest.approx(kept / (prompt_blocks + 2))


@pytest.mark.parametrize("family", MAIN)
def test_a_full_run_has_nothing_sparse(family, call):
    _, _, _, record = call(family, "--origin", "--skip", 0.5)
    (run,) = record["runs"]
    assert run["mode"] == "origin" and run["full_steps"] == STEPS
    assert [run[key] for key in ("selection_seconds", "density", "backend", "layers", "pattern")] == [None] * 5


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize("mode", ["origin", "sparsed"])
def test_tokens_are_the_library_s(family, mode, call, checkpoints):
    _, _, _, record = call(family, "--temperature", 0, *(["--origin"] if mode == "origin" else []))
    ids = torch.tensor([prompt_ids(checkpoints[family])])
    config = SparseDConfig(block_size=16) if mode == "sparsed" else None
    model = load_model(checkpoints[family], device="cpu")
    shared = {"gen_length": LENGTH, "steps": STEPS, "config": config}
    if family == "dream":
        expected = dream_generate(model, ids, top_p=0.95, top_k=50, **shared)
    else:
        expected = llada_generate(model, ids, block_length=32, **shared)
    assert record["runs"][0]["token_ids"] == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", MAIN)
def test_compare_runs_both_and_says_how_they_differ(family, call):
    code, out, err, record = call(family, "--compare")
    origin, sparsed = record["runs"]
    assert code == 0 and [origin["mode"], sparsed["mode"]] == ["origin", "sparsed"]
    assert out == f"{origin['text']}\n{sparsed['text']}\n"
    comparison = record["comparison"]
    different = [i for i in range(LENGTH) if origin["token_ids"][i] != sparsed["token_ids"][i]]
    assert comparison["different_positions"] == different
    assert comparison["tokens_equal"] == LENGTH - len(different) and comparison["tokens"] == LENGTH
    assert comparison["first_difference"] == (different[0] if different else None)
    assert comparison["density"] == sparsed["density"]
    assert comparison["speedup"]["whole"] == pytest.approx(origin["seconds"] / sparsed["seconds"])
    sparse = [sum(run["step_seconds"][N_FULL:]) for run in (origin, sparsed)]
    assert comparison["speedup"]["sparse_steps"] == pytest.approx(sparse[0] / sparse[1])
    assert f"the same tokens: {LENGTH - len(different)} of {LENGTH}" in err
    for phase in ("full steps", "selection", "sparse steps", "whole"):
        assert f"\n{phase} " in err


def test_compare_with_every_block_kept_finds_no_difference(call):
    _, _, err, record = call("llada", "--compare", "--select", 1)
    assert record["comparison"]["tokens_equal"] == LENGTH
    assert record["comparison"]["density"] == 1.0
    assert "[[" not in err


@pytest.mark.parametrize("family", MAIN)
def test_quiet_leaves_the_answer_alone(family, call):
    _, out, err, record = call(family, "--compare", "--quiet")
    assert err == ""
    assert out == "".join(run["text"] + "\n" for run in record["runs"])


def test_skip_1_is_full_attention_to_the_end(call):
    _, _, _, record = call("llada", "--compare", "--skip", 1)
    origin, sparsed = record["runs"]
    assert sparsed["token_ids"] == origin["token_ids"]
    assert sparsed["full_steps"] == STEPS
    assert sparsed["density"] is None and sparsed["selection_seconds"] is None
    assert record["comparison"]["speedup"]["sparse_steps"] is None


@pytest.mark.parametrize("family", MAIN)
def test_the_seed_decides(family, call):
    def tokens(*words):
        return [run["token_ids"] for run in call(family, "--temperature", 1, *words)[3]["runs"]]

    first = tokens("--seed", 3, "--compare", "--skip", 1, "--warmup", 1)
    assert first[0] == first[1]
    assert tokens("--seed", 3, "--skip", 1) == first[:1]
    assert tokens("--seed", 4, "--skip", 1) != first[:1]


def test_warm_up_runs_are_reported_apart(call):
    _, _, _, record = call("llada", "--warmup", 2, "--compare")
    for run in record["runs"]:
        assert len(run["warmup_seconds"]) == 2
        assert len(run["step_seconds"]) == STEPS


def test_repeats_are_timed_and_agree(call):
    _, out, err, record = call("llada", "--repeat", 3, "--compare", "--temperature", 1)
    for run in record["runs"]:
        repeats = run["repeats"]
        assert len(repeats["seconds"]) == 3 and repeats["same_tokens"]
        assert run["seconds"] == repeats["median"] == median(repeats["seconds"])
        assert repeats["spread"] == max(repeats["seconds"]) - min(repeats["seconds"])
    assert err.count("median of 3 runs") == 2 and out.count("\n") == 2
    assert len(call("llada")[3]["runs"][0]["repeats"]["seconds"]) == 1


def test_a_prompt_beyond_the_trained_length_is_a_warning(checkpoints, tmp_path, capsys):
    short = tiny_folder(tmp_path / "short", "llada", max_sequence_length=64)
    words = ["--model_path", str(short), "--prompt_text", QUESTION, *SHORT, "--json", str(tmp_path / "r.json")]
    assert main_llada(words) == 0
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1 and "64" in err
    assert json.loads((tmp_path / "r.json").read_text())["beyond_trained_length"] is True


def test_presets_know_their_answer(call):
    _, _, err, record = call("dream", own_prompt=False)
    (run,) = record["runs"]
    assert record["arguments"]["prompt"] == "short_context"
    assert run["expected"] and run["answer_found"] is (run["expected"].lower() in run["text"].lower())
    assert f"expected answer {run['expected']!r}: {'found' if run['answer_found'] else 'not found'}" in err
    assert call("dream", "--compare", own_prompt=False)[2].count("expected answer") == 1


def test_prompt_file_and_prompt_text_are_the_same_prompt(call, tmp_path):
    (tmp_path / "prompt.txt").write_text(QUESTION)
    from_text = call("dream")[3]["runs"][0]["token_ids"]
    assert call("dream", "--prompt_file", tmp_path / "prompt.txt", own_prompt=False)[3]["runs"][0][
        "token_ids"
    ] == from_text  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="POSIX names")
@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/fd/0"])
def test_a_prompt_from_an_open_stream(name, call, tmp_path, monkeypatch):
    ends = os.pipe()
    os.write(ends[1], QUESTION.encode())
    os.close(ends[1])
    before = os.dup(0)
    os.dup2(ends[0], 0)
    try:
        code, _, _, record = call("dream", "--prompt_file", name, own_prompt=False)
    finally:
        os.dup2(before, 0)
    assert code == 0 and record["runs"][0]["token_ids"] == call("dream")[3]["runs"][0]["token_ids"]


@pytest.mark.parametrize("option", ["--prompt_file", "--chat"])
@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/fd/63"])
def test_several_processes_cannot_share_a_stream(option, name, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        arguments.parse(DREAM, [option, name])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1
    assert err.endswith(f"argument {option}: '{name}' must be a file: several processes cannot share a stream\n")


def test_a_prompt_file_is_read_as_text(tmp_path):
    (tmp_path / "prompt.txt").write_bytes("\ufeffone\r\ntwo\rthree\n".encode())
    assert arguments.parse(DREAM, ["--prompt_file", str(tmp_path / "prompt.txt")]).text == "one\ntwo\nthree\n"


def test_demo_loads_the_bundled_checkpoint(checkpoints, monkeypatch, capsys):
    monkeypatch.setattr(main_module, "demo_path", lambda family: checkpoints[family])
    assert main_llada(["--demo", *SHORT]) == 0
    assert "demo checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "words", "expected"),
    [
        ("dream", "", {"alg": "maskgit_plus", "temperature": 0.05, "top_p": 0.95, "top_k": 50}),
        ("dream", "--top_k 0 --sampling-alg origin", {"alg": "origin", "top_k": None}),
        ("llada", "", {"remasking": "low_confidence", "temperature": 0, "cfg_scale": 0, "block_length": 32}),
        ("llada", "--cfg_scale 1.5 --block_length 16", {"cfg_scale": 1.5, "block_length": 16}),
        ("llada", "--sampling-alg random", {"remasking": "random"}),
    ],
)
def test_the_flags_reach_the_sampler(family, words, expected, call, monkeypatch):
    given = {}
    generate = sampling.generate

    def watched(model, ids, settings, **kwargs):
        given.update(vars(settings))
        return generate(model, ids, settings, **kwargs)

    monkeypatch.setattr(sampling, "generate", watched)
    assert call(family, *words.split())[0] == 0
    expected = {"steps": STEPS, "gen_length": LENGTH, **expected}
    assert {name: given[name] for name in expected} == expected


def test_a_named_backend_is_used_and_the_record_says_so(call):
    reasons = [call("dream", *words)[3]["runs"][0]["backend_reason"] for words in ((), ("--backend", "gather"))]
    assert "named" in reasons[1] and "named" not in reasons[0]


@pytest.mark.parametrize(("quiet", "terminal"), [(False, True), (True, True), (False, False)])
def test_the_progress_bar_names_the_phase_on_a_terminal(quiet, terminal, checkpoints, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    words = ["--model_path", str(checkpoints["dream"]), "--prompt_text", QUESTION, *SHORT]
    assert main_dream(words + ["--quiet"] * quiet) == 0
    shown = {phase for phase in ("full: ", "selecting: ", "sparse: ") if phase in screen.getvalue()}
    assert len(shown) == (3 if terminal and not quiet else 0)


def test_a_record_that_cannot_be_written_leaves_the_old_one(call, tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text('{"old": 1}')

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "replace", full_disk)
    code, _, err, record = call("llada")
    assert code == 2 and record == {"old": 1}
    assert err.splitlines()[-1].endswith("error: argument --json: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_out_of_memory_is_one_line(call, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore advice")

    monkeypatch.setattr(main_module, "run_mode", too_much)
    code, out, err, record = call("llada", "--quiet")
    assert (code, out, record) == (3, "", None)
    assert err.count("\n") == 1 and "out of memory (tried to allocate 20.00 GiB); try" in err


def test_weights_that_the_machine_cannot_hold_are_refused_before_they_are_read(call, checkpoints, monkeypatch):
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=2**40))
    code, out, err, record = call("llada", "--quiet")
    assert (code, out, record) == (3, "", None)
    assert re.fullmatch(r".*: error: out of memory \(this machine has .* GiB of memory, .*\); try a shorter .*\n", err)
    with pytest.raises(ValueError, match="this machine has"):
        load_model(checkpoints["llada"], device="cpu")


@pytest.mark.parametrize("terminal", [False, True])
def test_control_characters_of_an_answer_do_not_reach_a_terminal(terminal, call, monkeypatch):
    monkeypatch.setattr(running, "decode", lambda *_: "a\x1b[2Jb\tc\nd\x9be")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    _, out, _, record = call("dream")
    assert record["runs"][0]["text"] == "a\x1b[2Jb\tc\nd\x9be"
    assert out == ("a?[2Jb\tc\nd?e\n" if terminal else "a\x1b[2Jb\tc\nd\x9be\n")


@pytest.mark.parametrize("family", MAIN)
def test_logits_that_are_not_finite_name_the_dtype(family, call, monkeypatch):
    class Overflowing(torch.nn.Module):
        def forward(self, x):
            return x / 0

    def spoiled(*args, **named):
        model = load_model(*args, **named)
        if family == "dream":
            model.model.norm = Overflowing()
        else:
            model.model.transformer["ln_f"] = Overflowing()
        return model

    monkeypatch.setattr(main_module, "load_model", spoiled)
    code, out, err, record = call(family, "--quiet")
    assert (code, out, record) == (2, "", None)
    assert err.count("\n") == 1 and "--dtype" in err and "not finite" in err


@pytest.mark.parametrize("family", MAIN)
def test_help_is_complete(family, capsys):
    assert MAIN[family](["--help"]) == 0
    out, err = capsys.readouterr()
    flags = "model_path demo device dtype prompt prompt_text prompt_file seq_len steps sampling-alg temperature seed"
    flags += " skip select block_size backend origin compare advise warmup json show quiet"
    flags += " top_p top_k" if family == "dream" else " block_length cfg_scale"
    assert all(f"--{flag}" in out for flag in flags.split())
    assert all(f"\n{group}:\n" in out for group in ("model", "generation", "SparseD", "running", "output", "examples"))
    assert err == ""


@pytest.mark.parametrize("family", [DREAM, LLADA], ids=lambda family: family.name)
def test_the_pages_and_the_help_show_calls_that_work(family):
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    for text, fewest in ((pages[0], 3), (flags.EPILOG.format(script=family.script), 3), ("\n".join(pages[1:]), 0)):
        calls = re.findall(rf"python {family.script}( .*)?", text)
        assert len(calls) >= fewest
        for words in calls:
            arguments.parse(family, shlex.split(words, comments=True))  # SystemExit if a flag is wrong
    table = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for action in arguments.build_parser(family)._actions:
        assert all(f"`{flag}" in table for flag in action.option_strings if flag not in ("-h", "--help"))
