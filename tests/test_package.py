"""The wheel: what is in it, and both console commands run from it in a fresh environment, in another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    "sparsed",
    "prompts",
    "demo",
    "pyproject.toml",
    "requirements.txt",
    "README.md",
    "LICENSE",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built offline with this environment's setuptools, from a copy: no build folder stays in the checkout."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, copy]
    subprocess.run(command, check=True)
    (built,) = out.glob("sparsed-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin folder of a fresh environment that holds the wheel and sees this environment's libraries."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder)  # without a pip, which would take longer than all the rest
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    own = run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    # a path line adds the libraries alone: an editable install of this checkout stays out of sight
    Path(own, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def run(*command, cwd=None):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def test_the_wheel_holds_the_package_the_prompts_and_the_demos(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sparsed").rglob("*.py")}
    assert modules <= names
    assert {f"sparsed/report/page.{kind}" for kind in ("html", "css", "js")} <= names
    for folder in ("prompts", "demo/dream", "demo/llada"):
        files = {f"sparsed/data/{folder}/{path.name}" for path in (ROOT / folder).iterdir()}
        assert files and files <= names
    assert {f"sparsed/data/demo/{family}/model.safetensors" for family in ("dream", "llada")} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sparsed"}


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_the_console_command_runs_the_demo_from_another_folder(family, installed, tmp_path):
    options = ["--seq_len", "32", "--steps", "32", "--device", "cpu"]
    outputs = ["--json", "record.json", "--report", "run.html"]
    done = run(installed / f"sparsed-{family}", "--demo", *options, *outputs, cwd=tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    assert done.stdout == record["runs"][0]["text"] + "\n"
    assert record["runs"][0]["answer_found"]
    assert "site-packages" in record["arguments"]["model_path"]
    assert "</html>" in (tmp_path / "run.html").read_text(encoding="utf-8")
