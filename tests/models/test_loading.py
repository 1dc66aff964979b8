"""load_model: every tensor arrives, unchanged and in little memory, on the device and in the dtype asked for."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsed.models import DreamConfig, DreamModel, files, load_model, load_tokenizer
from sparsed.models.loading import resolve_device, resolve_dtype
from sparsed.models.parallel import shard
from sparsed.models.tokenizer import TOKENIZER_FILES
from sparsed.ranks import Place
from tests.helpers.checkpoints import FAMILIES, published_weights, refused, write_checkpoint
from tests.helpers.processes import on_ranks
from tests.helpers.standins import DREAM, LLADA, tiny_llada

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_arrives(tmp_path, family, dtype, shards):
    weights = published_weights(family)
    folder = write_checkpoint(tmp_path / "model", FAMILIES[family][0], weights, shards)
    model = load_model(folder, device="cpu", dtype=dtype)
    loaded = model.state_dict()
    assert isinstance(model, FAMILIES[family][1]) and loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor.to(getattr(torch, dtype)))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_loaded_model_computes_the_same(family, folder):
    model, ids = FAMILIES[family][2](), torch.arange(20).view(2, 10)
    model.load_state_dict(published_weights(family))
    assert torch.equal(load_model(str(folder), device="cpu", dtype="float32")(ids), model(ids))


def test_loaded_model_does_not_depend_on_the_file(dream_folder):
    model, ids = load_model(dream_folder, device="cpu", dtype="bfloat16"), torch.arange(9)[None]
    before = model(ids)
    file = dream_folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("stored_head", [False, True])
def test_tied_dream_head_is_the_embedding(tmp_path, stored_head):
    weights = published_weights("dream")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    weights[head] = weights[embedding].clone()
    if not stored_head:
        del weights[head]
    folder = write_checkpoint(tmp_path / "tied", DREAM | {"tie_word_embeddings": True}, weights)
    model = load_model(folder, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weights[embedding].float())


def test_tied_llada_head_is_the_embedding(tmp_path):
    weights = published_weights("llada")
    del weights["model.transformer.ff_out.weight"]
    folder = write_checkpoint(tmp_path / "tied", LLADA | {"weight_tying": True}, weights)
    model, ids = load_model(folder, device="cpu"), torch.arange(9)[None]
    untied = tiny_llada()
    untied.load_state_dict(weights | {"model.transformer.ff_out.weight": weights["model.transformer.wte.weight"]})
    assert torch.equal(model(ids), untied(ids))


def test_stored_rotary_frequencies_are_ignored(tmp_path):
    weights = published_weights("dream") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    load_model(write_checkpoint(tmp_path / "old", DREAM, weights), device="cpu")


MEASURE = """
import sys
from pathlib import Path
import torch
from sparsed.models import load_model
def peak():  # not ru_maxrss, which a child inherits from a larger parent
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before = peak()
model = load_model(sys.argv[1], device="cpu", dtype=sys.argv[2])
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def large_folders(tmp_path_factory):
    """The same 200 MB of bf16 weights in four shards and in one file."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 4096}
    with torch.device("meta"):
        model = DreamModel(DreamConfig.from_dict(DREAM | sizes))
    weights = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in model.state_dict().items()}
    root = tmp_path_factory.mktemp("large")
    return {shards: write_checkpoint(root / str(shards), DREAM | sizes, weights, shards) for shards in (4, 1)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("shards", "dtype"), [(4, "float32"), (4, "bfloat16"), (1, "float32")])
def test_peak_host_memory_stays_near_the_models_size(large_folders, shards, dtype):
    command = [sys.executable, "-c", MEASURE, str(large_folders[shards]), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.3


def part_of(ranks, large, small):
    """The peak of loading a part of the large model, over its size; the small one's part."""
    before = peak()
    model = load_model(large, device="cpu", dtype="bfloat16", tensor_parallel=ranks.group)
    taken = (peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters())
    return taken, load_model(small, device="cpu", tensor_parallel=ranks.group).state_dict()


def peak():
    """As in MEASURE."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_process_reads_its_part_alone(large_folders, dream_folder):
    for index, (taken, part) in enumerate(on_ranks(2, part_of, large_folders[4], dream_folder)):
        assert 0.9 < taken < 1.3
        whole = load_model(dream_folder, device="cpu")
        shard(whole, Place(index=index, count=2))
        assert part.keys() == whole.state_dict().keys()
        assert all(torch.equal(part[name], tensor) for name, tensor in whole.state_dict().items())


def test_loading_writes_nothing_to_the_terminal(folder):
    code = f"from sparsed.models import load_model; load_model({str(folder)!r}, device='cpu')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# ------------------------------------------------------------------------------------------------- device and dtype


def test_automatic_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:1")
    assert resolve_device(torch.device("cuda:0")) == torch.device("cuda:0")
    with pytest.raises(ValueError, match="cuda:9.*2 CUDA GPUs"):
        resolve_device("cuda:9")
    assert resolve_dtype("auto", torch.device("cuda:0")) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("mps")) == resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype(torch.float16, torch.device("cpu")) == torch.float16


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "xpu", "meta", "", 1.5, None])
def test_unknown_device(dream_folder, device):
    refused(dream_folder, "device", device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_device_that_this_machine_lacks(monkeypatch, dream_folder, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    refused(dream_folder, f"device {device}", "auto", device=device)


@pytest.mark.parametrize("dtype", ["fp8", "int8", "float64", "torch.float32", "", torch.int64, None, 16])
def test_unknown_dtype(dream_folder, dtype):
    refused(dream_folder, "dtype", "bfloat16", "float32", dtype=dtype)


@pytest.mark.gpu
def test_gpu_load(folder):
    model = load_model(folder)
    assert (model.device.type, model.dtype) == ("cuda", torch.bfloat16)
    expected = load_model(folder, device="cpu", dtype="bfloat16").state_dict()
    assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------------------------------------- the hub


def test_hub_id_downloads_only_what_loading_reads(monkeypatch, folder):
    asked = {}

    def download(hub_id, *, allow_patterns, tqdm_class):
        asked.setdefault(hub_id, []).extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(files, "snapshot_download", download)
    assert load_model("owner/name-7B", device="cpu").device.type == "cpu"
    described = ["config.json", "generation_config.json", "adapter_config.json", *TOKENIZER_FILES]
    assert asked == {"owner/name-7B": [*described, "*.safetensors", "model.safetensors.index.json"]}
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer("owner/other")
    assert not any(pattern.endswith(("*", ".py", ".bin")) for pattern in asked["owner/other"])


OFFLINE = """
from sparsed.models import load_model
for name in ("owner/cached", "owner/absent"):
    try:
        print(load_model(name, device="cpu").family)
    except ValueError as error:
        print(error)
"""


def test_hub_id_offline(tmp_path):
    """A cached checkpoint loads without a network; one that is not cached is one clear line."""
    repo = tmp_path / "hub" / "models--owner--cached"
    write_checkpoint(repo / "snapshots" / ("0" * 40), LLADA, published_weights("llada"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (tmp_path / "hub" / "version.txt").write_text("1")  # or old transformers would migrate the cache
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    loaded, absent = done.stdout.splitlines()
    assert loaded == "llada" and absent.startswith("owner/absent: ")
