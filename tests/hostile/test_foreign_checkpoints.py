"""Checkpoints that people bring: relatives run, other kinds are refused by name with a way out, in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sparsed import load_model
from sparsed.cli import main_dream, main_llada
from sparsed.models import files
from tests.helpers.checkpoints import FAMILIES, published_weights, refused, tiny_checkpoint, write_checkpoint
from tests.helpers.standins import DREAM, LLADA, MASK
from tests.helpers.tiny_folders import tiny_folder

MAIN = {"dream": main_dream, "llada": main_llada}


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def folder(tmp_path, family):
    return tiny_checkpoint(tmp_path / "model", family)


@pytest.fixture
def script(tmp_path, family, capsys):
    """Run the family's script on a whole folder with changes to config.json; returns (exit code, stderr)."""

    def run(change=None, **changes):
        folder = tiny_folder(tmp_path / "whole", family)
        edit(folder / "config.json", **changes)
        if change is not None:
            change(folder)
        words = ["--model_path", str(folder), "--prompt_text", "Where is it?", "--seq_len", "32", "--steps", "4"]
        code = MAIN[family]([*words, "--block_size", "16", "--device", "cpu", "--quiet"])
        return code, capsys.readouterr().err

    return run


def one_line(result, *named):
    code, err = result
    assert code == 2 and err.count("\n") == 1
    for part in ("--model_path", *named):
        assert part in err, err


# --------------------------------------------------------------------------------------------------------- relatives


DIFFUCODER = {"use_mrope": False, "max_window_layers": 28, "sliding_window": None, "auto_map": {}, "_name_or_path": "x"}
RELATIVES = {
    "UltraLLaDA": ("llada", {"rope_theta": 3.5e7, "max_sequence_length": 131072}),
    "a research LLaDA": (
        "llada",
        {"n_kv_heads": None, "eos_token_id": None, "pad_token_id": None, "eot_token_id": None},
    ),
    "DiffuCoder": ("dream", DIFFUCODER),
    "Dream-Coder": ("dream", {"mrope_section": None, "full_attn_mask": True, "eos_token_id": [95, 94]}),
    "saved by transformers 5": (
        "dream",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": None},
    ),
    "scaled by one": ("dream", {"rope_scaling": {"type": "linear", "factor": 1.0}}),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_the_same_shape_run(tmp_path, name):
    family, changes = RELATIVES[name]
    values, _, make = FAMILIES[family]
    folder = write_checkpoint(tmp_path / "model", values | changes, published_weights(family))
    model, ids = load_model(folder, device="cpu"), torch.arange(40)[None]
    twin = make(**({"rope_theta": changes["rope_theta"]} if changes.get("rope_theta") else {}))
    twin.load_state_dict(published_weights(family))
    assert torch.equal(model(ids), twin(ids))
    assert model.config.mask_token_id == MASK
    assert model.config.max_length == changes.get("max_sequence_length", model.config.max_length)


def test_a_larger_rope_theta_changes_the_logits(tmp_path):
    plain = load_model(tiny_checkpoint(tmp_path / "plain", "llada"), device="cpu")
    ultra = write_checkpoint(tmp_path / "ultra", LLADA | {"rope_theta": 3.5e7}, published_weights("llada"))
    ids = torch.arange(40)[None]
    assert not torch.allclose(load_model(ultra, device="cpu")(ids), plain(ids), atol=1e-3)


# ---------------------------------------------------------------------------------------------- refused by config.json


OTHERS = [
    ("num_experts", 64, "mixture of experts", "dense"),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised", "were made from"),
    ("quantization", {"group_size": 64, "bits": 4}, "quantised", "were made from"),
    ("compression_config", {"format": "pack-quantized"}, "quantised", "were made from"),
    ("vision_config", {"depth": 32}, "images", "text-only"),
]


@pytest.mark.parametrize(("key", "value", "what", "advice"), OTHERS, ids=[key for key, *_ in OTHERS])
def test_other_networks_are_refused_by_name(script, key, value, what, advice):
    one_line(script(**{key: value}), "config.json", f"'{key}'", what, advice)


def test_keys_that_say_no_do_not_matter(script):
    assert script(quantization_config=None, num_experts=0, vision_config={})[0] == 0


def test_llada_under_llama_s_names_is_refused(tmp_path):
    renamed = {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
    values = {renamed.get(key, key): value for key, value in LLADA.items()}
    weights = published_weights("dream")
    refused(write_checkpoint(tmp_path / "both", values, weights), "Llama's names", "d_model")
    refused(write_checkpoint(tmp_path / "weights", LLADA, weights), "Llama's names", "model.transformer.blocks")


@pytest.mark.parametrize(
    "scaling",
    [{"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}, {"type": "dynamic", "factor": 1.0}]
    + [{"rope_type": "default", "mrope_section": [16, 24, 24]}, {"rope_type": "default", "partial_rotary_factor": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_rotary_embeddings_are_refused(script, key, scaling):
    one_line(script(**{key: scaling}), f"'{key}'", "plain rotary embeddings")


def test_two_rope_thetas_are_refused(folder):
    edit(folder / "config.json", rope_parameters={"rope_theta": 7.0})
    refused(folder, "'rope_theta'", "'rope_parameters'", "7.0")


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_a_number_of_the_forward_is_not_made_up(folder, key):
    edit(folder / "config.json", **{key: None})
    refused(folder, "config.json", f"'{key}'")


# ------------------------------------------------------------------------------------------------------------ adapters


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct"}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a model"])
def test_an_adapter_names_its_model(script, beside):
    def change(folder):
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
        save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
        if not beside:
            (folder / "config.json").unlink()
            (folder / "model.safetensors").unlink()

    one_line(script(change), "adapter", "'GSAI-ML/LLaDA-8B-Instruct'", "merge_and_unload")


def test_what_is_refused_by_its_description_is_not_downloaded(folder, monkeypatch):
    asked = []

    def download(hub_id, *, allow_patterns, tqdm_class):
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(files, "snapshot_download", download)
    edit(folder / "config.json", num_experts=64)
    refused("owner/name", "mixture of experts")
    assert "config.json" in asked and not any("safetensors" in pattern for pattern in asked)


# ------------------------------------------------------------------------------------------------- names of the weights


PREFIXES = ["module.", "_orig_mod.", "base_model.model.", "model.", "module._orig_mod.", "_orig_mod.module.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_wrapper_s_prefix_is_taken_off(tmp_path, family, prefix):
    weights = published_weights(family)
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    model = load_model(write_checkpoint(tmp_path / "model", FAMILIES[family][0], wrapped, shards=3), device="cpu")
    assert all(torch.equal(tensor, weights[name].float()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("inner", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_a_wrapper_of_layers_is_taken_off(tmp_path, inner):
    wrapped = {name.replace(".layers.1.", f".layers.1.{inner}"): x for name, x in published_weights("dream").items()}
    assert load_model(write_checkpoint(tmp_path / "model", DREAM, wrapped), device="cpu")


def test_a_prefix_that_leaves_a_doubt_is_refused(tmp_path):
    weights = published_weights("dream")
    norm = {"_orig_mod.model.norm.weight": weights["model.norm.weight"].clone()}
    refused(write_checkpoint(tmp_path / "twice", DREAM, weights | norm), "_orig_mod.model.norm.weight", "both")
    some = {("module." + name if "layers.1" in name else name): tensor for name, tensor in weights.items()}
    refused(write_checkpoint(tmp_path / "some", DREAM, some), "lack tensor 'model.layers.1")
    other = {"student." + name: tensor for name, tensor in weights.items()}
    refused(write_checkpoint(tmp_path / "other", DREAM, other), "lack tensor")
    refused(write_checkpoint(tmp_path / "none", DREAM, {}), "lack tensor")


STRANGERS = {
    "model.layers.0.self_attn.q_proj.lora_A.default.weight": ("adapter", "merge_and_unload"),
    "model.layers.0.self_attn.q_proj.base_layer.weight": ("adapter", "merge_and_unload"),
    "model.layers.0.mlp.down_proj.qweight": ("quantised", "were made from"),
    "model.layers.0.mlp.down_proj.weight.absmax": ("quantised", "were made from"),
    "model.layers.0.mlp.down_proj.weight_scale_inv": ("quantised", "were made from"),
    "model.layers.0.mlp.experts.3.up_proj.weight": ("mixture of experts",),
    "model.vision_tower.patch.weight": ("images",),
}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("instead", [False, True], ids=["added", "instead"])
def test_tensors_of_another_kind_name_it(script, stranger, instead, family):
    def change(folder):
        weights = published_weights(family)
        if instead:
            weights = dict(list(weights.items())[1:])
        save_file({name: x.contiguous() for name, x in (weights | {stranger: torch.ones(1)}).items()},
                  folder / "model.safetensors")  # fmt: skip

    one_line(script(change), stranger, *STRANGERS[stranger])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_of_few_bits_are_called_quantised(tmp_path, dtype):
    weights = published_weights("dream")
    weights["model.layers.0.mlp.down_proj.weight"] = torch.ones(3, 5).to(dtype)
    refused(write_checkpoint(tmp_path / "few", DREAM, weights), "model.layers.0.mlp.down_proj.weight", "quantised")


def test_a_tied_head_that_is_another_tensor_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "d", DREAM | {"tie_word_embeddings": True}, published_weights("dream"))
    refused(folder, "'lm_head.weight'", "'model.embed_tokens.weight'", "ties")
    folder = write_checkpoint(tmp_path / "l", LLADA | {"weight_tying": True}, published_weights("llada"))
    refused(folder, "'model.transformer.ff_out.weight'", "'model.transformer.wte.weight'", "ties")
