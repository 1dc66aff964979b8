"""The scripts at the published shapes, random weights, on a GPU: every backend and cache runs, as the record says."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

from benchmarks.shapes import DREAM_7B, LLADA_8B, meta_model, random_weight
from sparsed.cli import main_dream, main_llada
from sparsed.prompts import demo_path
from tests.helpers.checkpoints import write_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

FAMILIES = {
    "dream": (DREAM_7B, main_dream, 7_615_616_512),
    "llada": (LLADA_8B, main_llada, 8_015_581_184),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A folder with a checkpoint of the published shapes, in memory where the machine has a place for that."""
    config, main, count = FAMILIES[request.param]
    model = meta_model(request.param)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    shared = Path("/dev/shm")
    base = shared if shared.is_dir() and shutil.disk_usage(shared).free > 3 * count else tmp_path_factory.getbasetemp()
    folder = base / f"sparsed-{request.param}-{os.getpid()}"  # another run of the tests may use the same memory
    if shutil.disk_usage(base).free < 2.5 * count:
        pytest.skip(f"needs {2.5 * count / 1e9:.0f} GB of disk")
    try:
        weights = {name: random_weight(p.shape, "cuda").cpu() for name, p in model.state_dict().items()}
        write_checkpoint(folder, config, weights, shards=4)
        for file in demo_path(request.param).iterdir():
            if "token" in file.name or file.name in ("vocab.json", "merges.txt", "chat_template.jinja"):
                shutil.copy(file, folder)
        yield folder, main
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("backend", ["flash", "triton", "flex", "gather"])
def test_compare_at_4k(family, backend, tmp_path, capsys):
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs the package flash-attn-4")
    folder, main = family
    record_file = tmp_path / "record.json"
    flags = ["--model_path", str(folder), "--compare", "--prompt", "4k", "--seq_len", "32", "--steps", "10"]
    code = main([*flags, "--backend", backend, "--json", str(record_file)])
    assert code == 0, capsys.readouterr().err
    dense, sparse = json.loads(record_file.read_text())["runs"]
    assert dense["prompt_tokens"] == sparse["prompt_tokens"] == 4096
    assert sparse["backend"] == backend and sparse["full_steps"] == 2
    # 33 blocks of which 10 + 1 are kept, the last one ragged
    assert sparse["density"] == pytest.approx(0.3, abs=0.05)
    assert sparse["peak_memory_bytes"] < 20e9
    print(f"{backend}: full {dense['step_seconds'][-1]:.3f} s, sparse {sparse['step_seconds'][-1]:.3f} s a step")


@pytest.mark.parametrize(
    ("words", "refreshes"),
    [("prefix", 4), ("dual", 4), ("dual --refresh 2", 2), ("dual --refresh 0", 1), ("dual --dense_answer", 4)],
)
def test_caches_at_4k(family, words, refreshes, tmp_path, capsys):
    folder, main = family
    record_file = tmp_path / "record.json"
    flags = ["--model_path", str(folder), "--prompt", "4k", "--seq_len", "64", "--steps", "64", "--block_length", "16"]
    assert main([*flags, "--cache", *words.split(), "--json", str(record_file)]) == 0, capsys.readouterr().err
    (run,) = json.loads(record_file.read_text())["runs"]
    rows = [forward["rows"] for forward in run["forwards"]]
    assert len(rows) == 64 and rows.count(4096 + 64) == refreshes, "one forward a step, whole ones at refreshes only"
    assert run["work"]["forwards"]["cached"] == 60 and run["cached_kernels"]
    assert run["peak_memory_bytes"] < 25e9
