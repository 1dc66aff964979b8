"""The published models' shapes, and models of those shapes with random weights: time depends on no weight's value."""

from typing import Any

import torch

from sparsed.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModel

DREAM_7B = {
    "model_type": "Dream",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "mask_token_id": 151666,
    "pad_token_id": 151643,
    "eos_token_id": 151643,
}
LLADA_8B = {
    "model_type": "llada",
    "vocab_size": 126464,
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_sequence_length": 4096,
    "mask_token_id": 126336,
    "pad_token_id": 126081,
    "eos_token_id": 126081,
}


def published_config(family: str) -> dict[str, Any]:
    """The sizes in the published config.json of "dream" (7B) or "llada" (8B)."""
    return DREAM_7B if family == "dream" else LLADA_8B


def attention_shape(family: str) -> tuple[int, int, int]:
    """Query heads, key heads and head size of the published shape."""
    names = {
        "dream": ("num_attention_heads", "num_key_value_heads", "hidden_size"),
        "llada": ("n_heads", "n_kv_heads", "d_model"),
    }
    heads, kv_heads, width = (published_config(family)[name] for name in names[family])
    return heads, kv_heads, width // heads


def meta_model(family: str) -> torch.nn.Module:
    """The published shape of "dream" (7B) or "llada" (8B), without memory."""
    with torch.device("meta"):
        if family == "dream":
            return DreamModel(DreamConfig.from_dict(DREAM_7B))
        return LLaDAModel(LLaDAConfig.from_dict(LLADA_8B))


def random_weight(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """bfloat16: matrices normal and scaled so that activations stay of order one, norm weights and biases one."""
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=torch.bfloat16)
    return torch.randn(shape, device=device, dtype=torch.bfloat16) * shape[-1] ** -0.5


def random_model(family: str, device: torch.device) -> torch.nn.Module:
    """The published shape with random weights, made on the device."""
    model = meta_model(family).to(torch.bfloat16)
    weights = {name: random_weight(p.shape, device) for name, p in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)
