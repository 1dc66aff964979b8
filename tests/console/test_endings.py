"""How the scripts end: interrupted, however often, and with output that cannot be written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.tiny_folders import tiny_folder

ROOT = Path(__file__).parents[2]
SHORT = ["--seq_len", "32", "--steps", "4", "--block_size", "16", "--device", "cpu", "--prompt_text", "Where is it?"]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and devices")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("checkpoint") / "llada", "llada")


def heed_ctrl_c():
    """In a new process: SIGINT is not ignored, as it is where the tests themselves run in a shell's background job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(script, *words, **options):
    """The running script."""
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
        **options,
    )


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(sent, checkpoint, tmp_path):
    words = ["--prompt_text", "Where is it?", "--seq_len", 4096, "--steps", 4096, "--device", "cpu"]
    words += ["--model_path", checkpoint, "--json", tmp_path / "record.json"]
    process = start(ROOT / "llada_generation.py", *words, cwd=tmp_path)
    assert process.stderr.readline().startswith("LLaDA")  # the heading: generation begins
    process.send_signal(sent)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 2
    assert (process.returncode, out, err) == (-sent, "", "")
    assert list(tmp_path.iterdir()) == []


LONG_CALL = """
import sys, torch
from sparsed.console.endings import guarded
from sparsed.console.streams import tell
torch.set_num_threads(1)
matrix = torch.rand(4000, 4000)
def work():
    tell("working")
    torch.linalg.svd(matrix)
sys.exit(guarded(work, "it", advice="", ending=True))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_long_call_of_pytorch_within_two_seconds(sent, tmp_path):
    (tmp_path / "long.py").write_text(LONG_CALL)
    process = start(tmp_path / "long.py", env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stderr.readline() == "working\n"
    time.sleep(0.2)  # into the call, which takes many seconds
    process.send_signal(sent)
    started = time.monotonic()
    out, err = process.communicate(timeout=120)
    assert time.monotonic() - started < 2
    assert (process.returncode, out, err) == (-sent, "", "")


def test_a_ctrl_c_that_is_ignored_stays_so(tmp_path):
    """As in a shell's background job, which a Ctrl-C at the terminal is not meant for."""
    (tmp_path / "it.py").write_text(
        "import os, signal, sys\nfrom sparsed.console.endings import guarded\n"
        "sys.exit(guarded(lambda: os.kill(os.getpid(), signal.SIGINT), 'it', advice='', ending=True))\n"
    )
    background = ["sh", "-c", 'trap "" INT; "$@"', "sh", sys.executable, tmp_path / "it.py"]
    done = subprocess.run(background, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


DRAWING = """
import os, signal, sys
from sparsed.console.endings import guarded, unbroken
def work(sent):
    with unbroken():
        os.kill(os.getpid(), sent)
        print("drawn", flush=True)
    print("alive", flush=True)
for sent in (signal.SIGINT, signal.SIGTERM):
    child = os.fork()
    if not child:
        sys.exit(guarded(lambda: work(sent), "it", advice="", ending=True))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_signal_waits_for_the_end_of_a_drawing(tmp_path):
    (tmp_path / "it.py").write_text(DRAWING)
    process = start(tmp_path / "it.py", env=os.environ | {"PYTHONPATH": str(ROOT)})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, f"drawn\n{-signal.SIGINT}\ndrawn\n{-signal.SIGTERM}\n", "")


@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_during_the_imports_as_a_shell_sees_it(sent, code, tmp_path):
    """A package that signals its own process stands in for PyTorch's seconds."""
    shutil.copy(ROOT / "llada_generation.py", tmp_path)
    package = tmp_path / "sparsed"
    (package / "cli").mkdir(parents=True)
    shutil.copy(ROOT / "sparsed" / "commands.py", package)
    (package / "__init__.py").touch()
    (package / "cli" / "__init__.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{sent})\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (tmp_path / "shell.sh").write_text('"$@" 2> stderr\necho $?\n')
    words = ["sh", "shell.sh", sys.executable, "llada_generation.py"]
    options = {"stdout": subprocess.PIPE, "text": True, "timeout": 60, "preexec_fn": heed_ctrl_c}
    done = subprocess.run(words, cwd=tmp_path, env=environment, **options)
    assert done.stdout == f"{code}\n"
    assert (tmp_path / "stderr").read_text() in ("", "Terminated\n")  # the shell's own word


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("full", "code"), [("stdout", 2), ("stderr", 0)])
def test_a_full_stream_costs_neither_the_record_nor_a_traceback(full, code, checkpoint, tmp_path):
    command = [sys.executable, str(ROOT / "llada_generation.py"), "--model_path", str(checkpoint), *SHORT]
    with open("/dev/full", "w") as device:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, full: device}
        done = subprocess.run([*command, "--json", "record.json"], text=True, cwd=tmp_path, **streams)
    text = json.loads((tmp_path / "record.json").read_text())["runs"][0]["text"]
    assert done.returncode == code
    if full == "stdout":
        last = done.stderr.splitlines()[-1]
        assert last == "llada_generation.py: error: cannot write to stdout: No space left on device"
        assert done.stderr.count("error") == 1 and "Traceback" not in done.stderr
    else:
        assert done.stdout == text + "\n"


def test_a_reader_that_leaves_ends_the_run_quietly_but_for_the_record(checkpoint, tmp_path):
    words = [*SHORT, "--quiet", "--json", tmp_path / "record.json"]
    process = start(ROOT / "llada_generation.py", "--model_path", checkpoint, *words)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141
    assert json.loads((tmp_path / "record.json").read_text())["runs"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_file_names_that_are_not_utf_8_reach_the_record(checkpoint, tmp_path):
    prompt, record = (os.fsencode(tmp_path) + name for name in (b"/prompt\xff", b"/record\xff"))
    with open(prompt, "w") as file:
        file.write("Where is it?")
    words = [*SHORT[:-2], "--quiet", "--prompt_file", os.fsdecode(prompt), "--json", os.fsdecode(record)]
    process = start(ROOT / "llada_generation.py", "--model_path", checkpoint, *words)
    assert process.communicate(timeout=60)[1] == ""
    with open(record, encoding="utf-8") as file:
        arguments = json.load(file)["arguments"]
    assert [os.fsencode(arguments[name]) for name in ("prompt_file", "json")] == [prompt, record]


# the second one is refused by the estimate, the first one by the system
LIMITED = """
import resource, sys
from pathlib import Path
from sparsed.cli import main_llada
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
lengths = ["100000", "2000000000"]
sys.exit([main_llada([*sys.argv[1:], "--seq_len", n, "--block_length", n]) for n in lengths] != [3, 3])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_too_little_memory_is_one_line_with_what_was_asked_for(checkpoint):
    command = [sys.executable, "-c", LIMITED, "--model_path", str(checkpoint), *SHORT, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    lines = [
        r"-c: error: out of memory \(tried to allocate \d+ bytes\); try a shorter .*",
        r"-c: error: too little memory: .* would take about [\d.]+ GiB, .* try a shorter .*",
    ]
    assert re.fullmatch("\n".join(lines) + "\n", done.stderr)
