"""A hundred runs in one process: nothing grows, neither its memory nor what the package and its libraries keep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_folders import tiny_folder

ROOT = Path(__file__).parents[2]
# half of the runs of each family, prompts and blocks of many sizes, a report now and then
RUNS = """
import gc, json, os, sys, threading
from pathlib import Path
import torch
from sparsed.cli import main_dream, main_llada

def state():
    gc.collect()
    kept = gc.get_objects()
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "sparsed"]
    values = [value for module in modules for value in vars(module).values()]
    return {
        "resident bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "objects": len(kept),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in kept),
        "in globals": sum(len(value) for value in values if isinstance(value, (dict, list, set))),
        "in caches": sum(value.cache_info().currsize for value in values if hasattr(value, "cache_info")),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }

torch.set_num_threads(1)
states = []
for number in range(101):
    if number in (40, 100):
        states.append(state())
    family, main = [("dream", main_dream), ("llada", main_llada)][number % 2]
    words = ["--model_path", family, "--prompt_text", "a" * (7 * number % 100 + 1)]
    words += ["--block_size", 16 + 16 * (number % 3), "--seq_len", 32, "--steps", 3, "--device", "cpu", "--quiet"]
    words += ["--json", "run.json"]
    words += ["--report", "run.html", "--compare"] if number % 10 == 0 else []
    assert main([str(word) for word in words]) == 0
print("states:", json.dumps(states))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_a_hundred_runs_leave_nothing_behind(tmp_path):
    for family in ("dream", "llada"):
        tiny_folder(tmp_path / family, family)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "errors": "replace", "timeout": 300}
    done = subprocess.run([sys.executable, "-c", RUNS], cwd=tmp_path, env=environment, **options)
    assert done.returncode == 0, done.stderr
    early, late = json.loads(done.stdout.rpartition("states:")[2])
    assert late.pop("resident bytes") < 1.02 * early.pop("resident bytes")
    # far less than one in each of the 60 runs between
    assert late.pop("objects") < early.pop("objects") + 30
    assert late == early
