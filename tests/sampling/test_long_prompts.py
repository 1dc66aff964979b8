"""The memory of long prompts on the CPU grows with their tokens, not with the square, so that 64k tokens fit 6 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# a step of full attention that selects, then a sparse one; one process, for the longer run comes last
PEAKS = """
import json, sys
from pathlib import Path
import torch
from sparsed import SparseDConfig, dream_generate, llada_generate, load_model
from sparsed.prompts import demo_path

def peak():  # not ru_maxrss, which a child inherits from a larger parent
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
model = load_model(demo_path(sys.argv[1]), device="cpu")
peaks = []
for length in json.loads(sys.argv[2]):
    settings = {"gen_length": 32, "steps": 2, "config": SparseDConfig(skip=0.5)}
    ids = torch.randint(0, 200, (1, length))
    if sys.argv[1] == "dream":
        dream_generate(model, ids, **settings)
    else:
        llada_generate(model, ids, block_length=32, **settings)
    peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_64k_tokens_fit_6_gigabytes(family):
    """Extrapolated from prompts that take seconds; benchmarks/cpu_memory.py measures it."""
    lengths = [1024, 3072]
    command = [sys.executable, "-c", PEAKS, family, json.dumps(lengths)]
    # tensors in maps of their own, which go back when they are freed: what malloc keeps of them varies from run to run
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=300)
    short, long = json.loads(done.stdout)
    growth = (long - short) / (lengths[1] - lengths[0])  # bytes a token
    assert long + growth * (65536 - lengths[1]) < 6e9
    # the square of the length is still small here: two bytes for each pair of tokens would be 8e3 more
    assert 0 < growth < 25e3
