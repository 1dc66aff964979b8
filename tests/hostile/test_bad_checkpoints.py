"""Wrong or incomplete model folders: load_model names the culprit in one line, and executes nothing."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsed.models import files, load_model
from tests.helpers.checkpoints import refused, tiny_checkpoint


def edit_json(file, **changes):
    values = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (values | changes).items() if v is not ...}))


def test_missing_folder_and_file(tmp_path):
    refused(tmp_path / "nothing", "nothing", "no such folder")
    refused("a/b/c", "a/b/c", "no such folder")
    refused("~nobody/x y", "no such folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")


def test_missing_or_malformed_config(tmp_path):
    refused(tmp_path, str(tmp_path), "config.json")
    for content in ("", "{", "[]", '"x"', "null"):
        (tmp_path / "config.json").write_text(content)
        refused(tmp_path, "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    refused(tmp_path, "config.json", "UTF-8")


@pytest.mark.parametrize("model_type", ["llama", "dream", "LLaDA", None, 3, ["Dream"], ...])
def test_unknown_model_type(dream_folder, model_type):
    edit_json(dream_folder / "config.json", model_type=model_type)
    refused(dream_folder, "model_type", "Dream", "llada")


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("dream", "num_hidden_layers", 0),
        ("dream", "num_hidden_layers", 200_000),
        ("llada", "n_layers", 200_000),
        ("dream", "rms_norm_eps", 10**400),
        ("llada", "rope_theta", 10**400),
        ("dream", "rope_parameters", [1]),
        ("dream", "rope_parameters", "default"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_config_value_names_the_folder_and_the_key(family, key, value, tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", family)
    edit_json(folder / "config.json", **{key: value})
    refused(folder, str(folder), key)


def pickled(folder, shards):
    """Turn the weights into that many pickles, with what safetensors cannot store: shared and transposed tensors."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["lm_head.weight"].T.contiguous().T
    weights["model.layers.0.input_layernorm.weight"] = weights["model.norm.weight"]
    for number in range(shards):
        part = {name: weights[name] for name in list(weights)[number::shards]}
        of = f"-{number + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        torch.save(part, folder / f"pytorch_model{of}.bin")
    return weights


@pytest.mark.parametrize("shards", [1, 3])
def test_pickle_weights_are_refused_with_the_way_out(dream_folder, shards):
    weights = pickled(dream_folder, shards)
    (dream_folder / "training_args.bin").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="pytorch_model.*bin is refused because unpickling can execute code") as caught:
        load_model(dream_folder)
    code = str(caught.value).split('python -c "')[1].rstrip('"')
    subprocess.run([sys.executable, "-c", code], cwd=dream_folder, check=True)
    loaded = load_model(dream_folder, device="cpu", dtype="bfloat16").state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_no_pickle_no_advice(dream_folder):
    (dream_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor model.safetensors.index.json$"):
        load_model(dream_folder)


def test_a_hub_id_with_pickles_alone_is_refused_with_the_same_advice(dream_folder, monkeypatch):
    """Its pickles are never downloaded, so the hub is asked for their names."""
    (dream_folder / "model.safetensors").unlink()
    monkeypatch.setattr(files, "snapshot_download", lambda *_, **__: str(dream_folder))
    names = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "a/b.bin"]
    monkeypatch.setattr(files, "list_repo_files", lambda hub_id: names)
    refused("owner/name", "owner/name has neither", "pytorch_model-00001-of-00002.bin is refused", "python -c")

    def no_network(_):
        raise ConnectionError

    monkeypatch.setattr(files, "list_repo_files", no_network)
    refused("owner/name", "owner/name has neither")


def test_pickle_is_never_executed(dream_folder):
    class Trap:
        def __reduce__(self):
            return (dream_folder.joinpath("trapped").touch, ())

    (dream_folder / "model.safetensors").unlink()
    (dream_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(dream_folder, "pytorch_model.bin")
    assert not (dream_folder / "trapped").exists()


@pytest.mark.parametrize("weight_map", [..., None, {}, [], "model.safetensors", {"lm_head.weight": 3}])
def test_malformed_index(folder, weight_map):
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    refused(folder, "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("name", ["../m.safetensors", "/tmp/m.safetensors", "a\\m.safetensors", "..", "m.bin", ""])
def test_index_may_not_lead_out_of_the_folder(folder, name):
    save_file({"x": torch.ones(1)}, folder.parent / "m.safetensors")
    edit_json(folder / "model.safetensors.index.json", weight_map={"lm_head.weight": name})
    refused(folder, "index.json", repr(name))


def test_missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "model-00002-of-00003.safetensors", "not in the folder")


def rewrite(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def test_missing_tensors(dream_folder):
    rewrite(dream_folder, lambda weights: weights.pop("model.norm.weight"))
    refused(dream_folder, "'model.norm.weight'")
    rewrite(dream_folder, lambda weights: weights.pop("model.layers.1.self_attn.k_proj.bias"))
    refused(dream_folder, "'model.layers.1.self_attn.k_proj.bias'", "1 more")


def test_unexpected_tensor(dream_folder):
    rewrite(dream_folder, lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}))
    refused(dream_folder, "'model.layers.2.mlp.up_proj.weight'")


def test_tensor_in_two_shards(folder):
    file = folder / "model-00001-of-00003.safetensors"
    name = next(iter(load_file(folder / "model-00002-of-00003.safetensors")))
    save_file(load_file(file) | {name: torch.ones(1)}, file)
    refused(folder, name, "model-00002-of-00003.safetensors")


def test_wrong_shape(dream_folder):
    rewrite(dream_folder, lambda weights: weights.update({"model.norm.weight": torch.ones(65)}))
    refused(dream_folder, "'model.norm.weight'", "[65]", "[64]")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_must_be_floats(dream_folder, dtype):
    rewrite(dream_folder, lambda weights: weights.update({"model.norm.weight": torch.ones(64).to(dtype)}))
    refused(dream_folder, "'model.norm.weight'", "dtype")


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_truncated_weights(dream_folder, kept):
    file = dream_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(dream_folder, "model.safetensors", "cut off")


def test_git_lfs_pointer(dream_folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    (dream_folder / "model.safetensors").write_text(pointer)
    refused(dream_folder, "model.safetensors", "Git LFS")
