"""First use: the help, shell completion, and what is said of a missing package or a failed download."""

import errno
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from sparsed.cli import arguments, main_dream, main_llada
from sparsed.cli.families import DREAM, LLADA
from sparsed.console.endings import EXIT_BROKEN_PIPE
from sparsed.kernels import flash
from sparsed.models import files

MAIN = {"dream": main_dream, "llada": main_llada}
FAMILIES = {"dream": DREAM, "llada": LLADA}
LACKING = 'pip install ".[{}]"'


@pytest.mark.parametrize("family", MAIN)
def test_help_fits_the_terminal_and_has_the_sections_of_a_manual(family, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert MAIN[family](["--help"]) == 0
    flags, _, epilog = capsys.readouterr().out.partition("\nexamples:\n")
    assert max(map(len, flags.splitlines())) <= 80
    assert all(f"\n{section}:" in epilog for section in ("units", "environment", "exit codes"))
    usage = flags.split("\n\n")[0]
    options = {
        option for action in arguments.build_parser(FAMILIES[family])._actions for option in action.option_strings
    }
    assert set(re.findall(r"--\w+", usage)) <= options
    codes = re.findall(r"^  (\d+) +\w", epilog.partition("\nexit codes:\n")[2], flags=re.MULTILINE)
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    listed = re.findall(r"\d+", " ".join(re.findall(r"^\| (\d[\d, ]*) \|", page, flags=re.MULTILINE)))
    assert sorted(codes) == sorted(listed) and str(EXIT_BROKEN_PIPE) in codes


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_flag(family, shell, capsys):
    pytest.importorskip("shtab")
    assert MAIN[family](["--print-completion", shell]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for action in arguments.build_parser(FAMILIES[family])._actions:
        assert all(option.lstrip("-") in out for option in action.option_strings)
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)
        assert "prompt_file_COMPGEN=_shtab_compgen_files" in out


def test_completion_without_shtab_names_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main_dream(["--print-completion", "bash"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "--print-completion" in err and LACKING.format("completion") in err


def test_flash_without_its_package_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert LACKING.format("flash") in flash._missing.__wrapped__()


def test_the_harness_without_its_package_is_one_line():
    code = (
        "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module('sparsed.evaluation.harness', None, {!r})"
    )
    done = subprocess.run([sys.executable, "-c", code.format("__main__")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert LACKING.format("harness") in done.stderr


def made(kind, cause=None):
    """An error of the hub's client, which would be made from an answer of the hub."""
    error = kind.__new__(kind)
    error.__cause__ = cause
    return error


DOWNLOADS = {
    "restricted": (made(GatedRepoError), ["https://huggingface.co/owner/name", "hf auth login"]),
    "absent": (made(RepositoryNotFoundError), ["no such public model", "spelling", "hf auth login"]),
    "no network": (made(LocalEntryNotFoundError, ConnectionError("DNS\nfails")), ["ConnectionError", "network"]),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), ["disk", "is full", "HF_HOME"]),
    "offline": (made(LocalEntryNotFoundError, OfflineModeIsEnabled()), ["OfflineMode", "unset HF_HUB_OFFLINE"]),
}


@pytest.mark.parametrize("fault", DOWNLOADS)
def test_a_failed_download_is_one_line_with_the_way_out(fault, monkeypatch, capsys):
    error, words = DOWNLOADS[fault]

    def download(*_, **__):
        raise error

    monkeypatch.setattr(files, "snapshot_download", download)
    monkeypatch.setattr(files, "HF_HUB_OFFLINE", fault == "offline")
    assert main_llada(["--model_path", "owner/name", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(word in err for word in ["argument --model_path: owner/name: ", *words]), err
