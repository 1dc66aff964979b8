"""The scripts as `torchrun` starts them: what several processes print and write, and how they end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from sparsed.cli import main_dream, main_llada
from sparsed.console.workers import own_device
from sparsed.ranks import ALONE, Place
from tests.helpers.processes import new_store, outcomes
from tests.helpers.tiny_folders import tiny_folder

ROOT = Path(__file__).parents[2]
MAIN = {"dream": main_dream, "llada": main_llada}
QUESTION = "Where does the old lighthouse keeper, who never learned to swim, keep the spare key of the boat house?"
SHORT = ["--seq_len", "32", "--steps", "8", "--block_size", "16", "--device", "cpu", "--prompt_text", QUESTION]
HEADS = {"dream": {}, "llada": {"n_heads": 4, "n_kv_heads": 4}}

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_folder(root / family, family, **HEADS[family]) for family in MAIN}


CALLS = """
import json, os, sys
from sparsed.cli import main_dream, main_llada
for (family, words), port in zip(json.loads(sys.argv[1]), sys.argv[2:], strict=True):
    os.environ["MASTER_PORT"] = port
    assert {"dream": main_dream, "llada": main_llada}[family](words) == 0
"""
RUNS = {
    "compare": ("dream", ["--compare", "--report", "page.html"]),
    "cached": ("llada", ["--cache", "dual", "--threshold", "0.3", "--dense_answer", "--temperature", "0.5", "--show"]),
    "advise": ("llada", ["--advise"]),
}


def test_two_processes_print_and_write_what_one_does(checkpoints, tmp_path, capsys):
    calls = {"one": [], "two": []}
    for many, folder in ((many, tmp_path / many) for many in calls):
        folder.mkdir()
        for name, (family, flags) in RUNS.items():
            words = ["--model_path", str(checkpoints[family]), *SHORT, "--json", str(folder / f"{name}.json")]
            words += [str(folder / flag) if flag == "page.html" else flag for flag in flags]
            calls[many].append((family, words))
    for family, words in calls["one"]:
        assert MAIN[family](words) == 0
    wanted = capsys.readouterr().out
    stores = [new_store() for _ in calls["two"]]
    first, second = outcomes(2, CALLS, json.dumps(calls["two"]), *(store.port for store in stores))
    assert (first[0], *second) == (0, 0, "", ""), first[2]
    advice = "one step on"
    assert first[1].partition(advice)[0] == wanted.partition(advice)[0] and advice in wanted
    assert "on cpu and 1 more" in first[2] and first[2].count("page") == 0
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == sorted(
        file.name for file in (tmp_path / "one").iterdir()
    )
    for file in (tmp_path / "one").glob("*.json"):
        check_same(*(json.loads((tmp_path / many / file.name).read_text()) for many in ("two", "one")))


def check_same(found, wanted):
    assert (found["environment"]["processes"], wanted["environment"]["processes"]) == (2, 1)
    for one, other in zip(found.get("runs", []), wanted.get("runs", []), strict=True):
        for name in ("token_ids", "text", "pattern", "backend", "backend_reason"):
            assert one[name] == other[name], name
        assert one["density"] == pytest.approx(other["density"])
        for layer, expected in zip(one["layers"] or [], other["layers"] or [], strict=True):
            assert layer == pytest.approx(expected, abs=1e-4)
        for step, expected in zip(one["history"], other["history"], strict=True):
            assert [commit[:2] for commit in step] == [commit[:2] for commit in expected]
    if "advice" in found:
        launched = found["advice"]["command"].partition(" --")
        assert launched[0] == "torchrun" and launched[2].startswith("nproc_per_node 2 ")


FAILING = """
import os, pathlib, sys, time, torch
from sparsed import cli
def without_memory(*_, **__):
    failing, file = sys.argv[-1], pathlib.Path(sys.argv[-2])
    if os.environ["RANK"] == failing:
        file.write_text(str(time.time()))
        raise torch.OutOfMemoryError("Tried to allocate 3.00 GiB")
    torch.distributed.barrier()  # in which the other process would wait for ever
cli.main.load_model = without_memory
sys.argv[0] = "llada_generation.py"
sys.exit(cli.main_llada(sys.argv[1:-2]))
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_all_end_as_the_one_that_fails(checkpoints, failing, tmp_path):
    failed = tmp_path / "failed"
    first, second = outcomes(2, FAILING, "--model_path", checkpoints["llada"], *SHORT, failed, failing)
    assert time.time() - float(failed.read_text()) < 5
    assert (first[:2], second) == ((3, ""), (3, "", ""))
    line = "llada_generation.py: error: out of memory (tried to allocate 3.00 GiB); try a shorter --prompt"
    assert first[2].startswith(line) and first[2].count("\n") == 1


def test_processes_that_do_not_divide_the_heads_end_with_one_line(tmp_path):
    code = "import sys; from sparsed.commands import llada; sys.exit(llada())"
    folder = tiny_folder(tmp_path / "llada", "llada", n_heads=3, n_kv_heads=3)
    first, second = outcomes(2, code, "--model_path", folder, *SHORT)
    assert (first[:2], second) == ((2, ""), (2, "", ""))
    assert first[2].count("\n") == 1 and first[2].endswith("these numbers of processes do: 1\n")
    assert "error: argument --model_path: 2 processes do not divide 3 attention heads" in first[2]


def test_processes_whose_launcher_says_no_address(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert main_llada(["--demo", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "error: WORLD_SIZE is 2: " in err and "RANK" in err


@pytest.mark.parametrize(("given", "said"), [("", "empty"), ("two", "two"), ("0", "0")])
def test_a_launcher_that_counts_no_processes(given, said, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", given)
    assert main_llada(["--demo", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(f"error: WORLD_SIZE is {said}: must be a whole number from 1\n")


def test_processes_that_cannot_meet(monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        for name, value in ({"WORLD_SIZE": "2", "RANK": "0"} | address).items():
            monkeypatch.setenv(name, value)
        assert main_llada(["--demo", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "error: WORLD_SIZE is 2: " in err and "in use" in err


def test_each_process_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local, device in enumerate(["cuda:0", "cuda:1"]):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert {own_device(given, Place(count=2)) for given in ("auto", "cuda")} == {device}
        assert own_device("cpu", Place(count=2)) == "cpu" and own_device("cuda:1", ALONE) == "cuda:1"
    with pytest.raises(ValueError, match="must be auto, cuda or cpu with several processes, got 'cuda:1'"):
        own_device("cuda:1", Place(count=2))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="needs a GPU of its own, and this process sees 2"):
        own_device("auto", Place(count=3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert own_device("auto", Place(count=2)) == "cpu" and own_device("auto", ALONE) == "auto"


def test_ctrl_c_on_one_process_ends_all_within_five_seconds(checkpoints):
    options = ["--standalone", "--nproc_per_node", "2", ROOT / "llada_generation.py"]
    words = ["--model_path", checkpoints["llada"], *SHORT, "--seq_len", "4096", "--steps", "4096"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment) as launcher:
        while not launcher.stderr.readline().startswith("LLaDA"):
            assert launcher.poll() is None
        workers = psutil.Process(launcher.pid).children()
        assert len(workers) == 2
        last = max(workers, key=lambda worker: int(worker.environ()["RANK"]))
        last.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive and time.monotonic() - began < 5
        said = launcher.communicate(timeout=60)[1]
        assert launcher.returncode != 0 and said.count("Traceback") <= 1  # at most the launcher's own


BROKEN = """
import sys, time
from sparsed.console.workers import as_one
def work(ranks):
    if ranks.index == 0:
        raise RuntimeError(sys.argv[1])
    time.sleep(0.5)
    print("program: error: the cause", file=sys.stderr)
    sys.exit(2)
sys.exit(as_one(work, "program", advice="", ending=True))
"""


def test_a_lost_connection_is_no_failure_of_the_process_that_notices_it():
    first, second = outcomes(2, BROKEN, "[pair.cc:547] Connection closed by peer [127.0.0.1]:25101")
    assert (first, second) == ((2, "", "program: error: the cause\n"), (2, "", ""))
    first, second = outcomes(2, BROKEN, "shapes differ")
    assert (first[:2], second) == ((1, ""), (1, "", ""))
    assert first[2].startswith("Traceback") and first[2].endswith("RuntimeError: shapes differ\n")


ATTEMPT = """
import os, sys
from sparsed.console.workers import as_one
os.environ |= {"TORCHELASTIC_RESTART_COUNT": sys.argv[1], "MASTER_PORT": sys.argv[2]}
def work(ranks):
    ranks.gathered(None)
    if sys.argv[1] == "0" and ranks.index == 1:
        sys.exit(2)
sys.exit(as_one(work, "program", advice="", ending=True))
"""


def test_a_second_attempt_does_not_know_the_failure_of_the_first():
    store = new_store()  # the launcher keeps it
    found = [[code for code, *_ in outcomes(2, ATTEMPT, attempt, store.port)] for attempt in range(2)]
    assert found == [[2, 2], [0, 0]]


@pytest.mark.gpu
def test_two_gpus_run_a_script(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    code = "import sys; from sparsed.commands import llada; sys.exit(llada())"
    words = ["--demo", "--dtype", "float32", "--prompt", "4k", "--seq_len", "32", "--steps", "16", "--cache", "dual"]
    words += ["--block_length", "8", "--block_size", "64", "--compare", "--json"]
    first, second = outcomes(2, code, *words, tmp_path / "two.json")
    assert (first[0], *second) == (0, 0, "", ""), first[2]
    assert "on cuda:0 and 1 more" in first[2]
    assert main_llada([*words, str(tmp_path / "one.json")]) == 0
    check_same(*(json.loads((tmp_path / f"{many}.json").read_text()) for many in ("two", "one")))
