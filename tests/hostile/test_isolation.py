"""A run on a local folder opens no connection, unpickles nothing and runs no code that came with the checkpoint."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from sparsed.models import files
from tests.helpers.checkpoints import refused
from tests.helpers.tiny_folders import tiny_folder

ROOT = Path(__file__).parents[2]
# an audit hook sees what any library does, and cannot be taken away
AUDITED = """
import sys
import sparsed.cli
folder, family, *words = sys.argv[1:]
seen = []

def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "pickle.find_class", "os.system"):
        seen.append(f"{event} {arguments}")
        raise PermissionError(event)
    if event == "exec" and arguments[0].co_filename.startswith(folder):
        seen.append(arguments[0].co_filename)

sys.addaudithook(hook)
code = getattr(sparsed.cli, "main_" + family)(words)
print("seen:", *seen)
sys.exit(code)
"""
SHORT = ["--seq_len", "32", "--steps", "4", "--block_size", "16", "--device", "cpu", "--compare", "--quiet"]


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


def audited(folder, family, cache, *words):
    """(exit code, what the audit saw, stderr) of a script with an empty cache of the hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AUDITED, str(folder), family, *SHORT, *map(str, words)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.rpartition("seen:")[2].strip(), done.stderr


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_a_local_folder_needs_no_network_and_runs_none_of_its_code(family, tmp_path):
    folder = tiny_folder(
        tmp_path / "model",
        family,
        _name_or_path="owner/name",
        auto_map={"AutoConfig": "modeling.Config", "AutoModel": "owner/other--modeling.Model"},
    )
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["modeling.Own", "modeling.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    code = f"import os\nos.mkdir({str(tmp_path / 'trapped')!r})\n"
    for name in ("modeling.py", "__init__.py", "sitecustomize.py", "configuration.py"):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pth"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    outputs = ["--json", tmp_path / "run.json", "--report", tmp_path / "run.html"]
    result = audited(folder, family, tmp_path / "hub", "--model_path", folder, "--prompt_text", "Who?", *outputs)
    assert result == (0, "", "")
    # transformers 4 makes the folder of the cache when it is imported
    assert {path.name for path in tmp_path.iterdir()} - {"hub"} == {"model", "run.html", "run.json"}


def test_the_hub_is_asked_for_a_hub_id_alone(tmp_path):
    """The audit does see a connection, where one is due."""
    code, seen, error = audited(tmp_path, "dream", tmp_path / "hub", "--model_path", "owner/name")
    assert code == 2 and seen.startswith("socket.") and "owner/name" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["no/such/folder", "./name", "../owner/name", "/owner/name", "https://host/name", "a"])
def test_what_is_no_hub_id_is_not_looked_up(name, monkeypatch):
    asked = []
    monkeypatch.setattr(files, "snapshot_download", lambda *words, **_: asked.append(words))
    refused(name, "no such folder")
    assert asked == []
