"""The demo models' shapes, their initialisation, and their checkpoint folders in the published format."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from demo.tokenizer import train_bpe, write_json, write_tokenizer
from sparsed.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModel
from sparsed.prompts import Language


def dream_config(width: int, layers: int, heads: int, vocabulary: int, ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a Dream of that size, with two query heads per key-value head."""
    return {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "use_mrope": False,
        "use_cache": False,
        "mask_token_id": ids["<|mask|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "torch_dtype": "bfloat16",
    }


def llada_config(width: int, layers: int, heads: int, vocabulary: int, ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a LLaDA of that size."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "vocab_size": vocabulary,
        "embedding_size": vocabulary,
        "d_model": width,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": heads,
        "mlp_hidden_size": 3 * width,
        "mlp_ratio": 4,
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_theta": 500000.0,
        "rope_full_precision": True,
        "max_sequence_length": 8192,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "alibi": False,
        "scale_logits": False,
        "input_emb_norm": False,
        "attention_layer_norm": False,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "use_cache": False,
        "mask_token_id": ids["<|mdm_mask|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "eot_token_id": ids["<|eot_id|>"],
        "torch_dtype": "bfloat16",
    }


FAMILIES = {"dream": (dream_config, DreamConfig, DreamModel), "llada": (llada_config, LLaDAConfig, LLaDAModel)}


def prepare(family: str, folder: Path, language: Language, width: int, layers: int, heads: int) -> None:
    """Write config.json and the tokenizer files of a new checkpoint into `folder`."""
    bpe = train_bpe(language)
    ids = write_tokenizer(family, bpe, folder)
    vocabulary = 64 * math.ceil((max(ids.values()) + 1) / 64)
    write_json(folder / "config.json", FAMILIES[family][0](width, layers, heads, vocabulary, ids))


def build(family: str, folder: Path) -> nn.Module:
    """The float32 model of `folder`, with its weights if it has any, otherwise initialised for training."""
    _, config_class, model_class = FAMILIES[family]
    model = model_class(config_class.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    if (folder / "model.safetensors").is_file():
        model.load_state_dict(load_file(folder / "model.safetensors"))
    else:
        initialise(model)
    return model


def initialise(model: nn.Module) -> None:
    """Embeddings of standard deviation 1: at 0.02 the blocks' outputs drown the token. Output projections x 0.3."""
    head = {"lm_head", "model.transformer.ff_out"}
    outputs = {"o_proj", "down_proj", "attn_out", "ff_out"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
        elif isinstance(module, nn.Linear):
            scale = 0.3 if name not in head and name.rsplit(".", 1)[-1] in outputs else 1.0
            nn.init.normal_(module.weight, std=0.02 if name in head else scale * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def save(model: nn.Module, folder: Path, state: dict[str, Any]) -> None:
    """Write the weights in bfloat16 under their published names, and the training's state; each whole or not at all."""
    weights = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    temporary = folder / "model.part"
    save_file(weights, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    write_json(folder / "training.json", state)
