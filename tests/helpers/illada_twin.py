"""iLLaDA once more, in plain float64 and from its description: the twin that the package's iLLaDA must agree with."""

import math

import torch
from torch import Tensor

# the keys of the published config.json at tiny sizes; it names no mask, and no tie_word_embeddings, which is true
ILLADA = {
    "architectures": ["ILLaDAForCausalLM"],
    "model_type": "illada",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": None,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def random_illada(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """float32 weights under the published names, without a head, which is the embedding."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"embed_tokens": (config["vocab_size"], width), "norm": (width,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"layers.{layer}.input_layernorm": (width,),
            f"layers.{layer}.self_attn.q_proj": (width, width),
            f"layers.{layer}.self_attn.k_proj": (kv_width, width),
            f"layers.{layer}.self_attn.v_proj": (kv_width, width),
            f"layers.{layer}.self_attn.o_proj": (width, width),
            f"layers.{layer}.post_attention_layernorm": (width,),
            f"layers.{layer}.mlp.gate_proj": (mlp, width),
            f"layers.{layer}.mlp.up_proj": (mlp, width),
            f"layers.{layer}.mlp.down_proj": (width, mlp),
        }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        scaled = 1 + 0.2 * values if len(shape) == 1 else values * 2 * shape[1] ** -0.5
        weights[f"model.{name}.weight"] = scaled
    return weights


def twin_logits(weights: dict[str, Tensor], config: dict, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] in float64; row t predicts token t. `valid` [B, T] says which keys are real."""
    w = {name.removeprefix("model.").removesuffix(".weight"): x.double() for name, x in weights.items()}
    x = w["embed_tokens"][ids]
    for layer in range(config["num_hidden_layers"]):
        own = {name.split(".", 2)[2]: value for name, value in w.items() if name.startswith(f"layers.{layer}.")}
        x = x + _attention(own, config, _norm(x, own["input_layernorm"], config), valid)
        h = _norm(x, own["post_attention_layernorm"], config)
        gate = h @ own["mlp.gate_proj"].T
        x = x + (gate / (1 + torch.exp(-gate)) * (h @ own["mlp.up_proj"].T)) @ own["mlp.down_proj"].T
    return _norm(x, w["norm"], config) @ w["embed_tokens"].T


def _norm(x: Tensor, weight: Tensor, config: dict) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"])


def _attention(w: dict[str, Tensor], config: dict, x: Tensor, valid: Tensor | None) -> Tensor:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    q, k, v = (x @ w[f"self_attn.{name}_proj"].T for name in "qkv")
    out = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        query = _rotated(q[..., head * size : (head + 1) * size], config["rope_theta"])
        key = _rotated(k[..., shared * size : (shared + 1) * size], config["rope_theta"])
        scores = query @ key.transpose(-1, -2) / math.sqrt(size)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None].bool(), -torch.inf)
        out.append(scores.softmax(-1) @ v[..., shared * size : (shared + 1) * size])
    return torch.cat(out, -1) @ w["self_attn.o_proj"].T


def _rotated(x: Tensor, theta: float) -> Tensor:
    """Channels i and i + size / 2 of token t as a complex number, turned by t * theta ** (-2 i / size)."""
    size = x.shape[-1]
    speeds = torch.tensor([theta ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * speeds
    first, second = x.chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(angles.cos(), angles.sin())
    return torch.cat((turned.real, turned.imag), -1)
