"""`python -m sparsed.evaluation`: its results, sums and table, resuming, several processes, bad input."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsed.cli import main_dream
from sparsed.evaluation import answering, command, results, running, wilson
from sparsed.evaluation import folder as folders
from sparsed.evaluation.folder import RUN, SAMPLES, SUMMARY, TABLE, OtherRun, about
from sparsed.evaluation.results import identified, summarize, table
from sparsed.models import identity
from sparsed.prompts import demo_path
from tests.helpers.processes import outcomes

ROOT = Path(__file__).parents[2]
Folder = partial(folders.Folder, identify=identified)
SMALL = ["--demo", "llada", "--lengths", "512", "--seq_len", "8", "--steps", "2", "--block_size", "32", "--quiet"]
METHODS = ("origin", "sparsed")
DREAM = ["dream" if word == "llada" else word for word in SMALL]
CALL = [*SMALL, "--tasks", "qa_1,fwe", "--methods", "origin,sparsed", "--limit", "3"]


def line(name, method, score, task="qa_1", length=512, **changes):
    numbers = {"select": None, "skip": None, "block_size": None}
    if method != "origin":
        numbers = {"select": 0.3, "skip": 0.2, "block_size": 32}
    rest = {"seed": 0, "density": 1.0 if method == "origin" else 0.3, "recall": None, "seconds": 1.0}
    return {"id": name, "task": task, "length": length, "method": method, "score": score, **numbers, **rest, **changes}


# --- sums


def test_a_cell_is_the_mean_of_its_scores():
    lines = [line(f"s{n}", "sparsed", float(n < 15), recall=[0.5, 0.9 if n else 0.7]) for n in range(20)]
    (row,) = summarize(lines)["rows"]
    assert (row["n"], row["accuracy"], row["density"]) == (20, 75.0, pytest.approx(0.3))
    # Wilson's interval of 15 in 20, as published tables have it
    assert (row["low"], row["high"]) == pytest.approx((53.1, 88.8), abs=0.05)
    assert row["recall_layers"] == pytest.approx([0.5, 0.89]) and row["recall"] == pytest.approx(0.695)


def test_differences_are_between_the_same_samples():
    full = [line(f"s{n}", "origin", float(n % 2)) for n in range(40)]
    same = [line(f"s{n}", "sparsed", float(n % 2)) for n in range(40)]
    worse = [line(f"s{n}", "window", float(n % 2 and n > 20)) for n in range(40)]
    _, sparsed, window = summarize([*full, *same, *worse])["averages"]
    # nothing differs in 40: Wilson's upper end of 0 in 40 on both sides
    assert sparsed["difference"] == 0 and sparsed["difference_high"] == pytest.approx(8.76, abs=0.01)
    assert sparsed["difference_low"] == -sparsed["difference_high"]
    assert (
        window["difference"] == pytest.approx(-25.0) and window["difference_low"] < -25 < window["difference_high"] < 0
    )
    alone = summarize(same)["averages"][0]
    assert alone["difference"] is None


def test_methods_are_listed_in_one_order_whichever_ran_first():
    lines = [line("s0", method, 1.0) for method in ("window", "sparsed", "origin")]
    assert [row["method"] for row in summarize(lines)["averages"]] == ["origin", "sparsed", "window"]


def test_an_average_counts_every_task_alike():
    lines = [line(f"a{n}", "sparsed", 1.0) for n in range(30)]
    lines += [line(f"b{n}", "sparsed", 0.0, task="vt") for n in range(10)]
    (average,) = summarize(lines)["averages"]
    assert (average["accuracy"], average["tasks"], average["n"]) == (50.0, 2, 40)


def test_the_table_has_a_line_for_each_variant_and_a_column_for_each_task():
    lines = [line(f"{task}{n}", method, 1.0, task=task) for task in ("qa_1", "vt") for method in ("origin", "sparsed")
             for n in range(4)]  # fmt: skip
    lines += [line("own", "origin", 0.0, task="mine", length=None)]
    text = table(summarize(lines))
    assert "### 512 tokens" in text and "### prompts of your own" in text and "4 samples per cell" in text
    rows = [row for row in text.splitlines() if row.startswith("| ")]
    assert rows[0] == "| method | density | qa_1 | vt | average | to full attention |"
    assert rows[3].startswith("| SparseD, select 0.3, skip 0.2, block_size 32 | 0.30 | 100.0 (51.0 to 100.0) |")
    # nothing differs in two times four: +-49 / sqrt(2)
    assert rows[3].endswith("| +0.0 (-34.6 to +34.6) |") and rows[2].endswith("| - |")


def test_an_early_stop_is_said_above_the_table():
    summary = summarize([line("s0", method, 1.0, length=length) for method in METHODS for length in (512, 1024)])
    stopped = table({**summary, "settings": {"steps": 8, "early_stop": True}})
    assert stopped == "With --early_stop.\n\n" + table({**summary, "settings": {"steps": 8}}), "whatever the lengths"


def test_caches_and_thresholds_are_ways_of_their_own():
    """Each is held against full attention without any, and against full attention with the same."""
    plain, dual = {}, {"cache": "dual", "refresh": 0, "threshold": 0.9}
    right = {("origin", None): 20, ("sparsed", None): 19, ("origin", "dual"): 16, ("sparsed", "dual"): 13}
    lines = [
        line(f"s{n}", method, float(n < right[method, saved.get("cache")]), **saved)
        for saved in (dual, plain)
        for method in METHODS
        for n in range(20)
    ]
    summary = summarize(lines)
    found = {(row["method"], row["cache"]): row for row in summary["averages"]}
    assert {name: round(row["difference"] or 0) for name, row in found.items()} == {
        ("origin", None): 0,
        ("sparsed", None): -5,
        ("origin", "dual"): -20,
        ("sparsed", "dual"): -35,
    }
    same = {name: row["sparse"] for name, row in found.items()}
    assert same.pop(("sparsed", "dual")) == pytest.approx(-15) and set(same.values()) == {None}
    titles = [text.split(" | ")[0] for text in table(summary).splitlines() if text.startswith("| ")][2:]
    assert "| full attention, dual cache, refresh 0, threshold 0.9" in titles and "| full attention" in titles


def test_forwards_are_told_by_phase_where_some_were_none_of_all_rows():
    lines = [line("s0", "origin", 1.0, forwards=32, phases={"full": 32})]
    lines += [line("s0", "origin", 1.0, cache="dual", forwards=n, phases={"full": 8, "cached": n - 8}) for n in (20,)]
    rows = [row for row in table(summarize(lines)).splitlines() if row.startswith("| full")]
    assert rows[0].endswith("| 32 | 1 |") and rows[1].endswith("| 20 (8 full, 12 cached) | 1 |")


def test_the_table_says_that_forwards_are_a_batch_s_and_seconds_a_sample_s():
    lines = [line(f"s{n}", "origin", 1.0, forwards=32, seconds=2.0) for n in range(4)]
    rows = [row for row in table(summarize(lines)).splitlines() if row.startswith("| ")]
    assert rows[0].endswith("| forwards of a batch | seconds per sample |") and rows[2].endswith("| 32 | 2 |")


def test_the_gain_of_dense_answer_rows_is_over_the_same_without():
    plain = [line(f"s{n}", "sparsed", float(n % 2)) for n in range(40)]
    dense = [line(f"s{n}", "sparsed", float(n % 4 > 0), dense_answer=True) for n in range(40)]
    other = [line(f"s{n}", "sparsed", 0.0, dense_answer=True, select=0.1) for n in range(40)]
    summary = summarize([*plain, *dense, *other])
    first, second, third = summary["averages"]
    assert first["gain"] is None and third["gain"] is None, "there is no SparseD with select 0.1 without them"
    # 10 of 40 won and none lost: Wilson's ends of 10 in 40 and of 0 in 40, put together
    assert second["gain"] == pytest.approx(25.0)
    low, high = (25 - wilson(10, 40)[0] * 100, wilson(10, 40)[1] * 100 - 25)
    assert second["gain_low"] == pytest.approx(25 - (low**2 + (100 * wilson(0, 40)[1]) ** 2) ** 0.5)
    assert second["gain_high"] == pytest.approx(25 + high)
    text = table(summary)
    assert "| to the same without dense answer rows |" in text
    assert "| SparseD, dense answer rows, select 0.3, skip 0.2, block_size 32 | 0.30 | 75.0" in text


def test_lines_of_earlier_versions_are_those_without_dense_answer_rows(tmp_path):
    folder = Folder(tmp_path)
    folder.append([line("s0", "sparsed", 1.0), line("s0", "sparsed", 0.0, dense_answer=True)])
    folder.append([line("s1", "sparsed", 1.0, dense_answer="yes")])
    assert [known[-1] for known in folder.finished()] == [None, True]


# --- the folder


def test_a_folder_belongs_to_one_configuration(tmp_path):
    for name in "xy":
        Folder(tmp_path / "new" / "run").claim({"seed": 0}, {"command": name})
    assert about(tmp_path / "new" / "run" / RUN)["calls"] == [{"command": "x"}, {"command": "y"}]
    Folder(tmp_path / "new" / "run").append([line("s0", "origin", 1.0)])
    with pytest.raises(OtherRun, match="seed 0, now 1"):
        Folder(tmp_path / "new" / "run").claim({"seed": 1}, {})
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(OtherRun, match="not empty"):
        Folder(tmp_path).claim({"seed": 0}, {})


def test_settings_that_a_folder_does_not_name_have_their_defaults(tmp_path):
    folder = Folder(tmp_path)
    folder.claim({"steps": None, "cache": "dual", "refresh": 1}, {})
    folder.append([line("s0", "origin", 1.0)])
    folder.claim({"steps": None, "cache": "dual"}, {})
    for changes, says in (
        ({"cache": "prefix"}, "cache 'dual', now 'prefix'"),
        ({"cache": "dual", "refresh": 0}, "refresh 1, now 0"),
        ({"cache": "dual", "threshold": 0.5}, "threshold not given, now 0.5"),
        ({"cache": "dual", "early_stop": True}, "early_stop False, now True"),
        ({}, "cache 'dual', now 'none'"),
    ):
        with pytest.raises(OtherRun, match=f"\\({says}\\)"):
            folder.claim({"steps": None, **changes}, {})


@pytest.mark.parametrize("damage", ["{}\n", "5\n", "[]\n", "\n", "not JSON\n"])
def test_damaged_lines_do_not_count(tmp_path, damage):
    folder = Folder(tmp_path)
    folder.append([line("s0", "origin", 1.0)])
    (tmp_path / f"{SAMPLES}.0").open("ab").write(damage.encode() + b'{"id": "\xc3\n')
    (tmp_path / f"{SAMPLES}.bak").write_text("mine")
    assert [record["id"] for record in folder.finished().values()] == ["s0"]
    folder.close(list(folder.finished().values()))
    assert (tmp_path / f"{SAMPLES}.bak").read_text() == "mine"


@pytest.mark.parametrize("field", line("s0", "origin", 1.0))
def test_a_line_without_what_the_summary_needs_does_not_count(tmp_path, field):
    lines = [line("s0", "origin", 1.0), line("s1", "origin", 1.0)]
    del lines[0][field]
    (tmp_path / SAMPLES).write_text("".join(json.dumps(record) + "\n" for record in lines))
    assert [record["id"] for record in Folder(tmp_path).finished().values()] == ["s1"]


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"settings": 3, "calls": []}', '{"settings": {}}'])
def test_a_file_of_somebody_elses_is_refused(tmp_path, content):
    (tmp_path / RUN).write_text(content)
    with pytest.raises(OtherRun, match="is not an evaluation's"):
        Folder(tmp_path).claim({"seed": 0}, {})
    assert (tmp_path / RUN).read_text() == content


def test_a_line_that_a_crash_cut_off_is_done_again(tmp_path):
    folder = Folder(tmp_path)
    folder.append([line("s0", "origin", 1.0), line("s1", "origin", 1.0)])
    file = tmp_path / f"{SAMPLES}.0"
    file.write_text(file.read_text()[:-9])
    assert [record["id"] for record in folder.finished().values()] == ["s0"]
    folder.mend()
    folder.append([line("s1", "origin", 0.5)])
    assert [record["score"] for record in folder.finished().values()] == [1.0, 0.5]


def test_the_processes_files_become_one(tmp_path):
    lines = [line(f"s{n}", "origin", 1.0) for n in range(4)]
    for process in (1, 0):
        Folder(tmp_path, process=process).append(lines[process::2])
    Folder(tmp_path).close(lines)
    assert [path.name for path in tmp_path.iterdir()] == [SAMPLES]
    assert list(Folder(tmp_path).finished().values()) == lines


# --- the command


def lines_of(folder):
    records = [json.loads(text) for text in (folder / SAMPLES).read_text().splitlines()]
    for record in records:
        record.pop("seconds")
    return records


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    assert command.main([*CALL, "--out", str(folder)]) == 0
    return folder


def test_the_results(done, capsys):
    records = lines_of(done)
    assert [(r["task"], r["method"]) for r in records[:2]] == [("qa_1", "origin"), ("qa_1", "sparsed")]
    assert len(records) == 12 and len({results.key(record) for record in records}) == 12
    for record in records:
        assert record["prompt_tokens"] == 512 and 0 <= record["score"] <= 1
        if record["method"] == "origin":
            assert (record["density"], record["recall"], record["skip"]) == (1.0, None, None)
        else:
            assert 0.3 <= record["density"] < 0.4 and len(record["recall"]) == 8
            assert all(record["density"] < share <= 1 for share in record["recall"]), "worse than chance"
    summary = json.loads((done / SUMMARY).read_text())
    assert {"rows", "averages", "settings", "calls"} <= summary.keys()
    assert {"command", "date", "environment"} == summary["calls"][0].keys()
    for row in summary["rows"]:
        assert {"task", "method", "length", "n", "accuracy", "low", "high", "density"} <= row.keys()
        scores = [r["score"] for r in records if (r["task"], r["method"]) == (row["task"], row["method"])]
        assert (row["n"], row["accuracy"]) == (3, pytest.approx(100 * sum(scores) / 3))
    assert (done / TABLE).read_text() == table(summary)


def test_a_second_call_measures_nothing_again(done, monkeypatch):
    before = (done / SAMPLES).read_bytes()
    monkeypatch.setattr(answering.Answerer, "answer", lambda *_: pytest.fail("measured again"))
    assert command.main([*CALL, "--out", str(done)]) == 0
    assert (done / SAMPLES).read_bytes() == before


def test_an_interrupted_run_goes_on(done, tmp_path, monkeypatch):
    answer, answered = answering.Answerer.answer, []

    def counted(self, samples, variant, *rest):
        if len(answered) == 5:
            answered.append(None)
            raise KeyboardInterrupt
        answered.append((samples[0].id, variant.method))
        return answer(self, samples, variant, *rest)

    monkeypatch.setattr(answering.Answerer, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        command.main([*CALL, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / SUMMARY).exists()
    assert command.main([*CALL, "--out", str(tmp_path / "run")]) == 0
    answered.remove(None)
    assert len(answered) == len(set(answered)) == 12
    assert lines_of(tmp_path / "run") == lines_of(done)


def test_a_larger_limit_adds_to_what_is_there_and_batches_change_nothing(done, tmp_path):
    folder = tmp_path / "run"
    first = [word if word != "3" else "1" for word in CALL]
    assert command.main([*first, "--out", str(folder)]) == 0
    assert command.main([*CALL, "--batch_size", "2", "--out", str(folder)]) == 0
    for found, expected in zip(lines_of(folder), lines_of(done), strict=True):
        assert found.pop("recall") == pytest.approx(expected.pop("recall") or None, abs=1e-5)
        assert found == expected


def test_sweeps_run_every_combination_once(tmp_path):
    sweep = ["--select", "0.2,0.5", "--skip", "0.0,0.5", "--methods", "origin,sparsed,window,no_skip"]
    words = [*SMALL, "--tasks", "qa_1", *sweep, "--limit", "1", "--out", str(tmp_path / "run")]
    assert command.main(words) == 0
    found = [(r["method"], r["select"], r["skip"]) for r in lines_of(tmp_path / "run")]
    expected = [("origin", None, None)]
    expected += [("sparsed", select, skip) for skip in (0.0, 0.5) for select in (0.2, 0.5)]
    expected += [(method, select, None) for method in ("window", "no_skip") for select in (0.2, 0.5)]
    assert found == expected


def test_caches_and_thresholds_are_swept_and_forwards_are_counted(tmp_path, capsys):
    """Of 8 steps in two blocks two compute all rows, or one; with threshold 0 a block takes one step."""
    call = [*SMALL, "--tasks", "qa_1", "--methods", "origin", "--limit", "1", "--steps", "8", "--block_length", "4"]
    call += ["--out", str(tmp_path)]
    sweep = ["--cache", "none,dual", "--refresh", "1,0", "--threshold", "none,0"]
    assert command.main([*call, *sweep]) == 0
    found = {(r.get("cache"), r.get("refresh"), r.get("threshold")): r["phases"] for r in lines_of(tmp_path)}
    assert found == {
        (None, None, None): {"full": 8},
        (None, None, 0.0): {"full": 2},
        ("dual", None, None): {"full": 2, "cached": 6},
        ("dual", None, 0.0): {"full": 2},
        ("dual", 0, None): {"full": 1, "answer": 1, "cached": 6},
        ("dual", 0, 0.0): {"full": 1, "answer": 1},
    }
    assert "| 8 (2 full, 6 cached) |" in capsys.readouterr().out
    before = lines_of(tmp_path)
    assert command.main([*call, *sweep, "--factor", "1"]) == 0, "more ways add to what is there"
    assert [r for r in lines_of(tmp_path) if "factor" not in r] == before and len(lines_of(tmp_path)) == 9


@pytest.mark.parametrize(
    ("words", "bounds"),
    [
        ([], [{}]),
        (["--threshold", "0.9"], [{"threshold": 0.9}]),
        (["--factor", "1,2"], [{"factor": 1.0}, {"factor": 2.0}]),
        (["--threshold", "none,0.9", "--factor", "1"], [{}, {"threshold": 0.9}, {"factor": 1.0}]),
    ],
)
def test_thresholds_and_factors_are_alternatives(tmp_path, words, bounds):
    found = command.parse([*SMALL, "--methods", "origin", "--cache", "none,prefix", *words, "--out", str(tmp_path)])
    expected = [cache | bound for cache in ({}, {"cache": "prefix"}) for bound in bounds]
    assert [variant.saving.given for variant in found.variants] == expected


@pytest.mark.parametrize(
    ("flags", "option"), [(["--refresh", "1"], "--refresh"), (["--cache", "dual", "--steps", "3"], "--steps")]
)
def test_wrong_caches_are_one_line_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, flags, option):
    monkeypatch.setattr(running, "load_model", lambda *_, **__: pytest.fail("loaded"))
    call = [*SMALL, "--tasks", "qa_1", "--block_length", "4", "--out", str(tmp_path)]
    assert command.main([*call, *flags]) == 2
    err = capsys.readouterr().err
    assert f"argument {option}" in err and err.count("\n") == 1


def test_wrong_caches_are_refused_with_the_flags(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.parse([*SMALL, "--refresh", "1", "--out", str(tmp_path)])
    assert capsys.readouterr().err.endswith("argument --refresh: needs a cache to refresh: prefix or dual\n")


@pytest.mark.parametrize(
    ("main", "words", "last"),
    [
        (main_dream, ["--demo"], "factor, or --block_length"),
        (command.main, [*DREAM, "--tasks", "qa_1", "--limit", "1", "--block_length", "4"], "factor"),
    ],
    ids=["script", "evaluation"],
)
def test_an_early_stop_makes_no_blocks_of_dream_s_answer(tmp_path, capsys, main, words, last):
    out = [] if main is main_dream else ["--out", str(tmp_path)]
    assert main([*words, "--early_stop", *out]) == 2
    said = f"argument --early_stop: needs blocks, after which to stop: give a cache, threshold or {last}\n"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith(said)


def test_two_processes_leave_what_one_does(done, tmp_path):
    # what `accelerate launch` starts on several GPUs; on a CPU it starts one process
    options = "--standalone --nproc_per_node 2 -m sparsed.evaluation"
    launch = [sys.executable, "-m", "torch.distributed.run", *options.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    words = [*CALL, "--device", "cpu", "--out", str(tmp_path / "run")]
    with subprocess.Popen([*launch, *words], stderr=subprocess.PIPE, text=True, env=environment) as ended:
        parts = set()
        while ended.poll() is None:
            parts |= {path.name for path in (tmp_path / "run").glob(f"{SAMPLES}.*")}
            time.sleep(0.02)
        assert ended.returncode == 0, ended.stderr.read()[-2000:]
    assert parts == {f"{SAMPLES}.0", f"{SAMPLES}.1"}
    for found, expected in zip(lines_of(tmp_path / "run"), lines_of(done), strict=True):
        assert found.pop("recall") == pytest.approx(expected.pop("recall") or None, abs=1e-5)
        assert found == expected
    assert not list((tmp_path / "run").glob(f"{SAMPLES}.*"))


def test_two_processes_that_share_the_model_leave_what_one_does(done, tmp_path):
    code = "import sys; from sparsed.evaluation.command import main; sys.exit(main())"
    words = [*CALL, "--device", "cpu", "--parallel", "tensor", "--limit", "1", "--out", tmp_path / "run"]
    first, second = outcomes(2, code, *words)
    assert (first[0], *second) == (0, 0, "", ""), first[2]
    wanted = {(record["id"], record["method"]): record for record in lines_of(done)}
    records = lines_of(tmp_path / "run")
    assert len(records) == 4
    for found in records:
        expected = wanted[found["id"], found["method"]]
        assert found.pop("recall") == pytest.approx(expected.pop("recall") or None, abs=1e-5)
        assert found == expected
    assert not list((tmp_path / "run").glob(f"{SAMPLES}.*"))
    of_two, of_one = (json.loads((folder / RUN).read_text())["settings"] for folder in (tmp_path / "run", done))
    assert of_two == of_one


def test_more_seeds_add_to_a_cell(tmp_path):
    words = [*SMALL, "--tasks", "qa_1", "--methods", "origin", "--limit", "1", "--out", str(tmp_path / "run")]
    assert command.main(words) == 0
    assert command.main([*words, "--seed", "0,5"]) == 0
    assert [r["seed"] for r in lines_of(tmp_path / "run")] == [0, 5]
    (row,) = json.loads((tmp_path / "run" / SUMMARY).read_text())["rows"]
    assert (row["n"], row["seeds"]) == (2, [0, 5])


def test_where_no_step_is_sparse(tmp_path):
    words = [*SMALL, "--tasks", "qa_1", "--methods", "sparsed,window", "--skip", "0.5,1", "--limit", "1"]
    assert command.main([*words, "--out", str(tmp_path / "run")]) == 0
    found = {(r["method"], r["skip"]): r["density"] for r in lines_of(tmp_path / "run")}
    # as many blocks, but a window's are seldom the short last one
    assert found["sparsed", 1.0] == 1.0 and found["sparsed", 0.5] < found["window", None] < 0.4


@pytest.mark.parametrize("inside", ["", "run"])
def test_a_file_is_no_folder_of_results(tmp_path, capsys, inside):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        command.parse([*SMALL, "--out", str(file / inside)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"argument --out: {file} is a file; name a folder" in error


@pytest.mark.parametrize(
    ("name", "setting"),
    [("tokenizer_config.json", "config_and_tokenizer"), ("config.json", "config_and_tokenizer"), (None, "weights")],
)
def test_a_changed_checkpoint_is_another_configuration(tmp_path, capsys, name, setting):
    """The order of a matrix's rows in the middle of the file counts, and so does a space in a small file."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(demo_path("llada"), checkpoint)
    words = [word for word in SMALL if word not in ("--demo", "llada")]
    words += ["--model_path", str(checkpoint), "--tasks", "qa_1", "--methods", "origin", "--limit", "1"]
    assert command.main([*words, "--out", str(tmp_path / "run")]) == 0
    if name is None:
        weights = checkpoint / "model.safetensors"
        tensors = load_file(weights)
        matrix = "model.transformer.blocks.1.up_proj.weight"
        tensors[matrix] = tensors[matrix].flip(0)
        save_file(tensors, weights, {"format": "pt"})
    else:
        with open(checkpoint / name, "a") as file:
            file.write(" ")
    assert command.main([*words, "--out", str(tmp_path / "run")]) == 2
    assert f"another configuration ({setting} " in capsys.readouterr().err


def test_the_digest_of_weights_is_that_of_their_bits():
    """As whole numbers times their places, added up here one by one."""
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    expected = hashlib.sha256()
    for name, parameter in model.named_parameters():
        bits = [int.from_bytes(struct.pack(">f", x)[:2], "big", signed=True) for x in parameter.flatten().tolist()]
        total = sum(place * number for place, number in enumerate(bits, 1))
        expected.update(f"{name} {list(parameter.shape)} [{total}]\n".encode())
    assert identity.weights_digest(model.named_parameters()) == expected.hexdigest()[:16]


def test_a_changed_file_is_another_configuration(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file, words = tmp_path / "mine.jsonl", [*SMALL, "--methods", "origin", "--out", "~/run"]
    for answers, code in (("a", 0), ("a", 0), ("b", 2)):
        file.write_text(json.dumps({"prompt": "What is a boat?", "answers": [answers]}))
        assert command.main([*words, "--tasks_file", "~/mine.jsonl"]) == code
    assert "another configuration (tasks_file" in capsys.readouterr().err
    assert lines_of(tmp_path / "run")


def test_a_folder_without_a_sample_is_free(tmp_path):
    """A backend that cannot run here is found out once the folder is claimed."""
    words = [*SMALL, "--tasks", "qa_1", "--methods", "sparsed", "--limit", "1", "--out", str(tmp_path / "run")]
    assert command.main([*words, "--backend", "flash"]) == 2
    assert command.main(words) == 0
    run = json.loads((tmp_path / "run" / RUN).read_text())
    assert run["settings"]["backend"] == "auto" and len(run["calls"]) == 1


def test_another_dtype_is_named_as_such(done, capsys):
    assert command.main([*CALL, "--dtype", "bfloat16", "--out", str(done)]) == 2
    assert "(dtype 'float32', now 'bfloat16')" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "foo"},
        {"score": "x"},
        {"score": 7.0},
        {"recall": ["x"]},
        {"length": "1k"},
        {"skip": "x"},
        {"id": 1},
        {"cache": "both"},
        {"threshold": "x"},
        {"phases": {"full": "x"}},
    ],
)
def test_a_damaged_line_does_not_count(tmp_path, changes):
    good = line("s0", "sparsed", 1.0)
    nested = "[" * 100_000
    (tmp_path / SAMPLES).write_text(f"{json.dumps(good)}\n{json.dumps(good | {'id': 's1'} | changes)}\n{nested}\n")
    assert list(Folder(tmp_path).finished().values()) == [good]
    (tmp_path / RUN).write_text(nested)
    with pytest.raises(OtherRun, match="is not an evaluation's"):
        Folder(tmp_path).claim({"seed": 0}, {})


def test_a_log_gets_lines_with_the_time_left(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(running, "EVERY", 0.0)
    words = [word for word in SMALL if word != "--quiet"]
    words += ["--tasks", "qa_1", "--methods", "origin", "--limit", "1", "--out", str(tmp_path / "r")]
    assert command.main(words) == 0
    told = capsys.readouterr().err.splitlines()
    assert sum("the same command continues from there" in text for text in told) == 1
    lines = [text for text in told if "step" in text]
    assert len(lines) == 2 and "qa_1 origin 1/1" in lines[0] and "1/2 [" in lines[0] and "\r" not in lines[0]


def test_steps_that_a_batch_does_not_need_are_done_with_it(monkeypatch, tmp_path, capsys):
    """With threshold 0 each of two blocks takes one step of its four."""
    bars, close = [], running.Progress.close
    monkeypatch.setattr(running, "EVERY", 0.0)
    monkeypatch.setattr(running.Progress, "close", lambda bar: bars.append((bar.n, bar.total)) or close(bar))
    words = [word for word in SMALL if word != "--quiet"] + ["--steps", "8", "--block_length", "4", "--threshold", "0"]
    words += ["--tasks", "qa_1", "--methods", "origin", "--limit", "2", "--out", str(tmp_path / "r")]
    assert command.main(words) == 0
    lines = [text for text in capsys.readouterr().err.splitlines() if "/16 [" in text]
    assert [re.search(r"(\d+)/16 ", line)[1] for line in lines] == ["1", "2", "9", "10"]
    assert bars[0] == (16, 16)


def test_the_time_left_is_at_the_mean_speed_of_what_is_done(monkeypatch):
    """Four batches of 100 steps took 20 of them, a second each, and four are left."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    bar = running.Progress(800, hidden=False)
    for batch in range(1, 5):
        for _ in range(20):
            now[0] += 1
            bar.step(None)
        bar.reach(100 * batch)
    assert "400/800 [01:20<01:20" in str(bar)
    bar.close()


def test_tasks_of_a_users_own(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '{"prompt": "What is a boat?", "answers": ["ship"]}\n{"prompt": "And now?", "answers": ["x", "y"]}\n'
    )
    words = [*SMALL, "--tasks_file", str(file), "--methods", "origin", "--out", str(tmp_path / "run")]
    assert command.main(words) == 0
    assert [r["task"] for r in lines_of(tmp_path / "run")] == ["mine", "mine"]
    assert "prompts of your own" in capsys.readouterr().out


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    found = running.importlib.util.find_spec
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    words = [*SMALL, "--tasks", "qa_1", "--methods", "origin", "--limit", "1", "--out", str(tmp_path / "run")]
    assert command.main(words) == 0
    assert capsys.readouterr().err.count("matplotlib") == 1


def test_plots(done, tmp_path):
    pytest.importorskip("matplotlib")
    from sparsed.evaluation import plots

    summary = json.loads((done / SUMMARY).read_text())
    several = [row | {"density": 0.1 * n, "select": 0.1 * n} for row in summary["averages"] for n in (1, 2)]
    rows = [row | dict(zip(("accuracy", "low", "high"), (100.0, *(100 * x for x in wilson(n, n))), strict=True))
            for n, row in enumerate(summary["rows"], 20)]  # fmt: skip
    plots.draw({"rows": rows, "averages": several}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "density.png", "recall.png"]


# --- wrong calls


@pytest.mark.parametrize(
    ("changes", "option", "says"),
    [
        (["--tasks", "niah_single_9"], "--tasks", "niah_single_1"),
        (["--methods", "origin,sparse"], "--methods", "streaming"),
        (["--lengths", "4m"], "--lengths", "4k"),
        (["--lengths", "100"], "--lengths", "256"),
        (["--tasks", "cwe", "--lengths", "256"], "--lengths", "cwe"),
        (["--limit", "0"], "--limit", "at least 1"),
        (["--select", "0.3,2"], "--select", "at most 1"),
        (["--block_length", "3"], "--block_length", "divide the 8 new tokens"),
        (["--seq_len", "64", "--steps", "3"], "--steps", "multiple of the 2 blocks"),
        (["--tasks_file", "nowhere.jsonl"], "--tasks_file", "nowhere.jsonl"),
        (["--tasks_file", "/dev/zero"], "--tasks_file", "not an ordinary file"),
        (["--backend", "flash"], "--backend", "flash"),
        (["--tasks", "niah_multikey_3", "--lengths", "375", "--limit", "9"], "--lengths", "niah_multikey_3"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, capsys, changes, option, says):
    words = [
        *SMALL,
        "--tasks",
        "qa_1",
        "--methods",
        "sparsed",
        "--limit",
        "1",
        "--out",
        str(tmp_path / "run"),
        *changes,
    ]
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"argument {option}: " in error and says in error
    assert not (tmp_path / "run" / SUMMARY).exists()


def test_a_line_without_its_fields_is_named(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a", "answers": ["b"]}\n{"prompt": "a"}\n')
    assert command.main([*SMALL, "--tasks_file", str(file), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "line 2" in error and "answers" in error


def test_results_of_another_configuration_stay(done, capsys):
    before = {path.name: path.read_bytes() for path in done.iterdir()}
    assert command.main([*CALL, "--steps", "4", "--out", str(done)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "argument --out: " in error and "steps 2, now 4" in error
    assert {path.name: path.read_bytes() for path in done.iterdir()} == before
