"""`--show`: the answer as it comes about on a terminal, and the plain progress where there is none."""

import io
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import msgspec
import pytest
import torch

from sparsed import load_tokenizer
from sparsed.chat import Speller
from sparsed.cli import main_dream, main_llada, progress
from sparsed.cli.families import LLADA
from sparsed.report.record import RunRecord
from sparsed.report.view import END, MASK
from sparsed.sampling.common import Step
from tests.helpers.records import made_up_run
from tests.helpers.tiny_folders import tiny_folder

pytest.importorskip("rich", reason='no rich: pip install -e ".[show]"')

ROOT = Path(__file__).parents[2]
MAIN = {"dream": main_dream, "llada": main_llada}
SHORT = ["--prompt_text", "Where is the key?", "--seq_len", "32", "--steps", "8", "--block_size", "16"]
ESCAPE = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_folder(root / family, family) for family in MAIN}


@pytest.fixture
def call(checkpoints, tmp_path, monkeypatch):
    """Run a script's main in this process, its stderr a terminal or not; returns (stderr, record)."""

    def run(family, *words, terminal=True, encoding="utf-8", **environment):
        for name, value in ({"TERM": "xterm", "COLUMNS": "60", "LINES": "12"} | environment).items():
            monkeypatch.setenv(name, value)
        taken = io.BytesIO()
        stream = io.TextIOWrapper(taken, encoding=encoding, write_through=True)
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        words = ["--model_path", str(checkpoints[family]), *SHORT, *words, "--device", "cpu"]
        assert MAIN[family]([*words, "--json", str(tmp_path / "record.json")]) == 0
        return taken.getvalue().decode(encoding), json.loads((tmp_path / "record.json").read_text())

    return run


def screens_of(output):
    """What a terminal shows each time the cursor has come back to the top, and at the end."""
    lines, row, column, screens, begin = [""], 0, 0, [], 0
    for escape in [*ESCAPE.finditer(output), None]:
        for character in output[begin : None if escape is None else escape.start()]:
            if character == "\r":
                column = 0
            elif character == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            else:
                lines[row] = lines[row][:column] + character + lines[row][column + 1 :]
                column += 1
        if escape is None:
            return [*screens, lines]
        private, number, command = escape.groups()
        if command == "A":
            row -= int(number)
        elif command == "K":
            if not screens or screens[-1] != lines:
                screens.append(list(lines))
            lines[row] = ""
        else:
            assert command == "m" or private, f"unexpected {escape.group()!r}"
        begin = escape.end()


@pytest.mark.parametrize("family", MAIN)
def test_the_answer_replaces_the_masks(family, call, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 0)
    monkeypatch.setattr(progress, "REST", 0)
    output, record = call(family, "--show")
    headings = re.findall(r"SparseD  (\w+)  step (\d) of 8  [\d.]+ s  (\d+) of 32 masked", ESCAPE.sub("", output))
    assert [phase for phase, _, _ in headings[:9]] == ["full", "selecting", *["sparse"] * 6, "done"]
    assert [int(step) for _, step, _ in headings[:9]] == [*range(1, 9), 8]
    committed = [len(entry) for entry in record["runs"][0]["history"]]
    assert [int(masked) for _, _, masked in headings[:9]] == [32 - sum(committed[:step]) for step in range(9)]
    last = "\n".join(screens_of(output)[-1])
    assert last.count("SparseD  ") == 1, "what was drawn before is gone"
    assert MASK not in last.split("of 32 masked")[1].split("▒ masked")[0]


def test_tokens_are_those_without_it(call):
    shown, plain = (call("llada", "--temperature", "1", *words)[1]["runs"][0] for words in (["--show"], []))
    assert shown["token_ids"] == plain["token_ids"] and shown["history"] == plain["history"]


def test_every_run_is_shown_under_its_name(call):
    output, _ = call("llada", "--show", "--compare", "--warmup", "1", "--repeat", "2")
    titles = re.findall(r"^(.*)  \w+  step 8 of 8", "\n".join(screens_of(output)[-1]), re.M)
    expected = ["warm-up 1/1, {}", "run 1/2, {}", "run 2/2, {}"]
    assert titles == [title.format(mode) for mode in ("full attention", "SparseD") for title in expected]


@pytest.mark.parametrize(
    "changes", [{"terminal": False}, {"terminal": False, "FORCE_COLOR": "1"}, {"TERM": "dumb"}, {"encoding": "ascii"}]
)
def test_without_a_fit_terminal_there_is_the_plain_progress(changes, call):
    output, _ = call("llada", "--show", **changes)
    assert "masked" not in output and "\x1b[2K" not in output
    assert ("sparse: " in output) == changes.get("terminal", True)


def test_no_color_is_obeyed(call):
    colours = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    assert colours.search(call("llada", "--show")[0])
    output, _ = call("llada", "--show", NO_COLOR="1")
    assert not colours.search(output) and "masked" in output and "probability" not in output


def test_drawing_takes_a_small_share_of_the_time(monkeypatch):
    """On a clock of our own: steps of 10 ms, and drawings that take 8."""
    now, drawn, steps = [0.0], [], []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    class Live:
        console = None

        def update(self, *_, **__):
            now[0] += 0.008
            drawn.append(now[0])

    monkeypatch.setattr(progress, "drawn", lambda view, console: steps.append(view.step))
    answer = SimpleNamespace(follow=lambda done: None, tokens=lambda: [], newest=set())
    screen = progress.Screen(Live(), "SparseD", 1000, answer)
    for step in range(1000):
        screen.show("full" if step < 503 else "sparse", [None] * step, 0.0)
        now[0] += 0.01
    screen.show("done", [None] * 1000, 0.0)
    assert 0.008 * len(drawn) < 0.05 * now[0]
    pauses = [later - earlier for earlier, later in zip(drawn, drawn[1:], strict=False)]
    assert sum(pause < 0.1 for pause in pauses) <= 2, "the change of phase and the end alone do not wait"
    assert 504 in steps and steps[-1] == 1000


def test_the_answer_follows_the_steps(checkpoints):
    tokenizer = load_tokenizer(checkpoints["llada"])
    a, b = tokenizer.encode("ab", add_special_tokens=False)
    stop, mask = 250, 251
    answer = progress.Answer(6, 100, mask, {stop}, Speller(tokenizer))

    def step(index, **commits):
        rows, tokens = [100 + int(name[1:]) for name in commits], list(commits.values())
        columns = (torch.tensor(rows), torch.tensor(tokens), torch.full((len(rows),), 0.5))
        return Step(index, "full", 0, *columns, torch.ones(len(rows), dtype=torch.bool))

    def shown():
        return [token if token is None else token.piece or END for token in answer.tokens()]

    done = [step(0, _1=a, _4=mask)]
    answer.follow(done)
    assert shown() == [None, "a", None, None, None, None] and answer.newest == {1}
    done += [Step(1, "idle")]
    answer.follow(done)
    assert answer.newest == {1}, "a step that commits nothing leaves the mark where it is"
    done += [step(2, _0=b), step(3, _5=stop)]
    answer.follow(done)
    assert shown() == ["b", "a", None, None, None, END] and answer.newest == {0, 5}
    assert answer.tokens()[0].probability == 0.5


def test_missing_rich_is_one_line(checkpoints, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main_llada(["--model_path", str(checkpoints["llada"]), *SHORT, "--show"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "argument --show: " in err and "pip install" in err


def test_the_benchmark_runs_both_in_turn_on_a_terminal(monkeypatch):
    benchmark = pytest.importorskip("benchmarks.show", reason="POSIX terminals")
    monkeypatch.setenv("TERM", "xterm")
    runs = []

    def run_once(job, mode):
        runs.append((job.args.show, sys.stderr.isatty(), mode))
        print("something to read", file=sys.stderr)

    monkeypatch.setattr(benchmark, "run_once", run_once)
    found = benchmark.measure(benchmark.Job(None, None, [], benchmark.parse(LLADA, ["--demo"])), pairs=2)
    assert runs == [(True, True, "sparsed"), (False, True, "sparsed")] * 3
    assert found["shown_seconds"]["count"] == found["plain_seconds"]["count"] == 2


def test_the_recording_shows_the_run(tmp_path):
    """One frame before the first step and one after each, in an SVG that fetches nothing and runs nothing."""
    recording = pytest.importorskip("docs.make.recording")
    run = made_up_run("sparsed")
    shown = recording.frames(msgspec.convert(run, RunRecord))
    assert len(shown) == 17
    texts = ["".join(segment.text for line in frame for segment in line) for frame in shown]
    masked = [int(re.search(r"(\d+) of 32 masked", text).group(1)) for text in texts]
    assert masked == [32 - 2 * step for step in range(17)]
    assert [re.search("full|selecting|sparse", text).group() for text in texts[2:5]] == ["full", "selecting", "sparse"]
    assert run["text"] in " ".join(texts[-1].split())
    for made in (recording.animation(shown, [0.1] * 17), recording.FILE.read_text(encoding="utf-8")):
        names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(made).iter()}
        assert names == {"svg", "title", "style", "rect", "text", "g"} and "url(" not in made and "href" not in made
    assert recording.FILE.stat().st_size < 500_000


def test_ctrl_c_leaves_the_terminal_with_its_cursor_and_its_own_colours(checkpoints):
    pty = pytest.importorskip("pty", reason="POSIX terminals")
    main, child = pty.openpty()
    words = [*SHORT[:2], "--seq_len", "512", "--steps", "512", "--block_size", "16", "--device", "cpu", "--show"]
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "PYTHONUNBUFFERED")}
    process = subprocess.Popen(
        [sys.executable, ROOT / "llada_generation.py", "--model_path", checkpoints["llada"], *words],
        stdout=subprocess.PIPE,
        stderr=child,
        env=environment | {"TERM": "xterm-256color"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    output = b""
    while output.count(b" masked") < 10:
        output += os.read(main, 65536)
    process.send_signal(signal.SIGINT)
    while process.poll() is None or select.select([main], [], [], 0.1)[0]:
        if select.select([main], [], [], 0.1)[0]:
            output += os.read(main, 65536)
    os.close(main)
    os.close(child)
    assert process.returncode == -signal.SIGINT and process.stdout.read() == b"" and b"Traceback" not in output
    escapes = [escape.group() for escape in ESCAPE.finditer(output.decode(errors="replace"))]
    assert [escape for escape in escapes if escape.endswith("m")][-1] == "\x1b[0m"
    assert [escape for escape in escapes if "?25" in escape][-1] == "\x1b[?25h"


@pytest.mark.slow
def test_the_demo_on_a_terminal(tmp_path):
    """Through a pseudo-terminal of 50 columns and 9 lines, in a process of its own."""
    fcntl, pty, termios = (pytest.importorskip(name, reason="POSIX terminals") for name in ("fcntl", "pty", "termios"))
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 9, 50, 0, 0))
    words = ["--demo", "--show", "--seq_len", "64", "--steps", "16", "--block_size", "16", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, ROOT / "llada_generation.py", *words, "--json", tmp_path / "record.json"],
        stdout=subprocess.PIPE,
        stderr=child,
        env=environment | {"TERM": "xterm-256color"},
    )
    os.close(child)
    output = b""
    try:
        while chunk := os.read(main, 65536):
            output += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(main)
    assert process.wait(timeout=60) == 0
    screens = screens_of(output.decode().replace("\r\n", "\n"))
    views = [screen for screen in screens if any("SparseD  " in line for line in screen)]
    assert len(views) > 2
    begin = next(number for number, line in enumerate(views[0]) if "SparseD  " in line)
    for view in views[:-1]:
        assert len(view) - begin <= 9 and max(map(len, view[begin:])) <= 50
    assert "step 1 of" in views[0][begin] and "masked" not in views[-1][begin], "cut off, unlike the time"
    assert re.search(r"step (\d+) of \1  \d+\.\d s", views[-1][begin])
    (run,) = json.loads((tmp_path / "record.json").read_text())["runs"]
    body = "\n".join(views[-1][begin + 1 :])
    assert " ".join(run["text"].split()) in " ".join(body.split())
    assert process.stdout.read().decode() == run["text"] + "\n"
    cursor = [output.index(b"\x1b[?25l"), output.index(b"\x1b[?25h"), output.index(b"SparseD")]
    assert cursor == sorted(cursor), "hidden by rich, the cursor is back before the first step"
    assert output.count(b"\x1b[?25l") == 1
