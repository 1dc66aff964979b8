"""The published models' shapes, and models of these shapes with random weights: no weight's value changes the time."""

from typing import Any

import torch

from sparsed.models import DreamConfig, LLaDAConfig
from sparsed.models.joint import lay_projections_together
from sparsed.models.loading import MODELS

ModelConfig = DreamConfig | LLaDAConfig

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
# rms_norm_eps and rope_theta are not known here, and change no time
ILLADA_8B = {
    "model_type": "illada",
    "vocab_size": 155136,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 8192,
    "mask_token_id": 5,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {"dream": DREAM_7B, "llada": LLADA_8B, "illada": ILLADA_8B}


def published_config(family: str) -> dict[str, Any]:
    """The sizes in the published config.json of "dream" (7B), "llada" or "illada" (8B)."""
    return SHAPES[family]


def model_config(family: str) -> ModelConfig:
    """The published sizes as the model's config."""
    values = published_config(family)
    return MODELS[values["model_type"]][0].from_dict(values)


def attention_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Query heads, key heads and head size of a model's attention."""
    sizes = config.sizes
    head_dim = sizes.width // sizes.heads
    return sizes.heads, sizes.kv_width // head_dim, head_dim


def meta_model(family: str) -> torch.nn.Module:
    """The published shape of "dream" (7B), "llada" or "illada" (8B), without memory."""
    with torch.device("meta"):
        return MODELS[SHAPES[family]["model_type"]][1](model_config(family))


def random_weight(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """bfloat16: matrices normal and scaled so that activations stay of order one, norm weights and biases one."""
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=torch.bfloat16)
    return torch.randn(shape, device=device, dtype=torch.bfloat16) * shape[-1] ** -0.5


def random_model(family: str, device: torch.device) -> torch.nn.Module:
    """The published shape with random weights, made on the device."""
    model = meta_model(family).to(torch.bfloat16)
    made = {id(p): random_weight(p.shape, device) for p in model.parameters()}  # one for a tied head and embedding
    weights = {name: made[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    model.load_state_dict(weights, assign=True)
    lay_projections_together(model)  # as `load_model` does on a GPU
    return model.eval().requires_grad_(False)
