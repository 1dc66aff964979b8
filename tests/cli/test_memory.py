"""The estimate of a run's memory against the peaks that were measured, and what is said when it is too much."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import meta_model
from sparsed import SparseDConfig
from sparsed.cli import main as main_module
from sparsed.cli import main_dream, main_llada, memory
from sparsed.console import endings
from sparsed.models import loading
from sparsed.models.loading import GIB, weight_bytes
from sparsed.models.parallel import shard
from sparsed.ranks import Place
from sparsed.sampling import settings_for
from tests.helpers.tiny_folders import tiny_folder

MAIN = {"dream": main_dream, "llada": main_llada}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RECORDS = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("generation-*.json"))]
OURS = [
    (record["family"], row["prompt_tokens"], name, way)
    for record in RECORDS
    for row in record["rows"]
    for name, way in row["ways"].items()
    if "config" in way and "steps" in way
]


def peak(model, tokens, device="cpu", seq_len=128, config=None, **more):
    """The estimate for a generation, in one block unless told; its number of steps does not count."""
    shared = {"gen_length": seq_len, "steps": seq_len, "block_length": seq_len} | more
    return memory.peak_bytes(model, settings_for(model.family, **shared), config, torch.device(device), tokens)


@pytest.mark.parametrize(
    ("family", "tokens", "way"),
    [(family, tokens, way) for family, tokens, _, way in OURS],
    ids=[f"{family}-{tokens}-{name}" for family, tokens, name, _ in OURS],
)
def test_the_estimate_is_near_the_peaks_on_a_gpu(family, tokens, way):
    config = way["config"] and SparseDConfig(**way["config"])
    saving = {"block_length": 32, **way["saving"]}
    model = meta_model(family).to(torch.bfloat16)
    measured = way.get("peak_memory_bytes") or way["steps"]["256"]["peak_memory_bytes"]
    assert peak(model, tokens, "cuda:0", 256, config, **saving) == pytest.approx(measured, rel=0.02)


SHARED = [
    (record["family"], row["prompt_tokens"], row["all"])
    for record in (json.loads(path.read_text()) for path in sorted(RESULTS.glob("parallel-*.json")))
    for row in record["rows"]
]


@pytest.mark.parametrize(
    ("family", "tokens", "found"), SHARED, ids=[f"{family}-{tokens}" for family, tokens, _ in SHARED]
)
def test_the_estimate_is_near_the_peaks_of_each_of_two_gpus(family, tokens, found):
    part = meta_model(family).to(torch.bfloat16)
    shard(part, Place(count=2))
    saving = {"block_length": 32, "cache": "dual" if "cached" in found["forwards"] else "none"}
    estimate = peak(part, tokens, "cuda:0", 256, SparseDConfig(), **saving)
    assert estimate == pytest.approx(found["peak_memory_bytes"], rel=0.02)


def test_what_small_blocks_and_guidance_add():
    model = meta_model("llada").to(torch.bfloat16)
    dense = peak(model, 65536)
    # 65,664 tokens are 2,052 blocks of 32, of which 615 of the prompt's 2,048 are kept, and 2 of the answer's 4
    kept = peak(model, 65536, config=SparseDConfig(block_size=32)) - dense
    assert kept == 32 * (2052 * 617 * 32 * 4 + 2052 * 2052 * 4)
    short, guided = peak(model, 4096), peak(model, 4096, cfg_scale=1.0)
    assert guided - weight_bytes(model) == 2 * (short - weight_bytes(model))


def test_what_one_of_two_processes_takes():
    """Half of the cache and of the kept blocks, and its own part of the weights."""
    whole, half = (meta_model("llada").to(torch.bfloat16) for _ in range(2))
    shard(half, Place(count=2))
    weights, replicated = weight_bytes(whole), 2 * 126464 * 4096 * 2  # embedding and head; norms are next to nothing
    assert weight_bytes(half) == pytest.approx((weights + replicated) / 2, rel=1e-3)
    for more in ({"cache": "dual"}, {"config": SparseDConfig(block_size=32)}):
        added = [peak(model, 65536, **more) - peak(model, 65536) for model in (whole, half)]
        assert added[0] == 2 * added[1]


@pytest.fixture(params=MAIN)
def checkpoint(request, tmp_path):
    return request.param, tiny_folder(tmp_path / request.param, request.param)


def call(checkpoint, *words):
    family, folder = checkpoint
    return MAIN[family](["--model_path", str(folder), "--device", "cpu", "--seq_len", "32", "--steps", "4", *words])


def test_too_little_memory_is_said_before_loading(checkpoint, monkeypatch, capsys):
    model = main_module.empty_model(checkpoint[1])
    free = peak(model, 16384, seq_len=32, config=SparseDConfig())
    monkeypatch.setattr(memory, "available_bytes", lambda *_, **__: free)
    monkeypatch.setattr(main_module, "load_model", lambda *_, **__: pytest.fail("loaded"))
    assert call(checkpoint, "--prompt", "64k") == endings.EXIT_OUT_OF_MEMORY
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    needed = peak(model, 65536, seq_len=32, config=SparseDConfig())
    assert f"about {needed / GIB:.1f} GiB" in err and f"cpu has {free / GIB:.1f} GiB free" in err
    assert "--prompt 16k is the largest preset that fits" in err


def test_a_model_that_does_not_fit_at_all(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_bytes", lambda *_, **__: 1000)
    assert call(checkpoint) == endings.EXIT_OUT_OF_MEMORY
    assert "no preset fits" in capsys.readouterr().err


def test_enough_memory_says_nothing(checkpoint, capsys):
    assert call(checkpoint, "--quiet") == 0
    assert capsys.readouterr().err == ""


SHARED = "2 GPUs can share it: torchrun --nproc_per_node 2"


@pytest.mark.parametrize(
    ("tokens", "lacking", "says"),
    [
        (65536, 0, f"{SHARED}; --prompt 32k is the largest preset that fits"),
        (65536, 1, "--prompt 32k is the largest preset that fits"),
        (4096, 0, f"{SHARED}, with --prompt 4k"),
        (0, 1, "no preset fits: try a shorter --seq_len, --dtype bfloat16, or a device with more memory"),
    ],
)
def test_two_gpus_that_can_share_a_run_are_named(tmp_path, monkeypatch, capsys, tokens, lacking, says):
    """Each has what a process of two takes with so many tokens, or a byte less; one process takes more."""
    folder = tiny_folder(tmp_path / "dream", "dream")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 120}))  # so that weights count
    half = main_module.empty_model(folder).to(torch.bfloat16)
    shard(half, Place(count=2))
    free = [peak(half, tokens, "cuda", seq_len=32, config=SparseDConfig())] * 2
    free[1] -= lacking
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for module in (memory, loading):
        monkeypatch.setattr(module, "free_bytes", free.__getitem__)
    monkeypatch.setattr(main_module, "load_model", lambda *_, **__: pytest.fail("loaded"))
    assert call(("dream", folder), "--device", "auto", "--prompt", "64k") == endings.EXIT_OUT_OF_MEMORY
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith(f"; cuda:0 has {free[0] / GIB:.1f} GiB free; {says}\n")
