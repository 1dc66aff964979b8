"""Tiny random checkpoints in the published layout, and stand-ins for the hub's remote-code classes.

The stand-ins repeat the module tree, the method names and the call signatures of the classes that
`trust_remote_code` loads, which is all that `sparsify` may rely on, and run the published arithmetic in their own way.
Copies of those classes differ in the field, so the `Extra...` variants take and pass on arguments of their own.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from sparsed.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModel

VOCAB, MASK, EOS, EOT = 97, 96, 95, 94

DREAM = {
    "architectures": ["DreamModel"],
    "model_type": "Dream",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "use_mrope": False,
    "use_cache": True,
    "mask_token_id": MASK,
    "pad_token_id": EOS,
    "eos_token_id": EOS,
    "bos_token_id": EOS,
    "torch_dtype": "bfloat16",
}
LLADA = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "vocab_size": VOCAB,
    "embedding_size": VOCAB,
    "d_model": 96,
    "n_layers": 3,
    "n_heads": 3,
    "n_kv_heads": 3,
    "mlp_hidden_size": 128,
    "mlp_ratio": 4,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 5e5,
    "rope_full_precision": True,
    "max_sequence_length": 512,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "alibi": False,
    "flash_attention": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "weight_tying": False,
    "use_cache": False,
    "mask_token_id": MASK,
    "pad_token_id": EOS,
    "eos_token_id": EOS,
    "eot_token_id": EOT,
}


# ------------------------------------------------------------------------------------------------------ checkpoints


def random_weights(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """float32 weights under which attention is peaked (so that dropping keys shows) and logits are far from ties."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in sorted(model.state_dict().items()):
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() == 2 and "embed" not in name and "wte" not in name:
            values *= tensor.shape[1] ** -0.5 * (1.6 if "q_proj" in name or "k_proj" in name else 1.0)
        elif "norm" in name or "ln_f" in name:
            values = 1 + 0.2 * values
        elif name.endswith("bias"):
            values *= 0.5
        weights[name] = values
    head = "lm_head.weight" if "lm_head.weight" in weights else "model.transformer.ff_out.weight"
    weights[head] *= 3
    embedding = "model.embed_tokens.weight" if head == "lm_head.weight" else "model.transformer.wte.weight"
    weights[embedding][MASK] *= 0.3  # otherwise every masked position says the same
    return weights


def tiny_dream(seed: int = 0, **changes) -> DreamModel:
    """The project's Dream with random weights; grouped-query attention, head_dim 16."""
    model = DreamModel(DreamConfig.from_dict(DREAM | changes))
    model.load_state_dict(random_weights(model, seed))
    return model.eval()


def tiny_llada(seed: int = 0, **changes) -> LLaDAModel:
    """The project's LLaDA with random weights; head_dim 32."""
    model = LLaDAModel(LLaDAConfig.from_dict(LLADA | changes))
    model.load_state_dict(random_weights(model, seed))
    return model.eval()


# ------------------------------------------------------------------------------------------------------ shared bits


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def rope_tables(positions, width, theta):
    angles = positions[..., None].float() / theta ** (
        torch.arange(0, width, 2, device=positions.device).float() / width
    )
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rope(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class ThrowawayCache:
    """What `use_cache=True` hands down: it is filled on every forward and never read."""

    def __init__(self):
        self.layers = {}

    def update(self, key_states, value_states, layer_idx, cache_kwargs=None):
        self.layers[layer_idx] = key_states, value_states
        return key_states, value_states


# ------------------------------------------------------------------------------------------------------------ Dream


class DreamAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.hidden_size = config.hidden_size
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.is_causal, self.attention_dropout = False, config.attention_dropout
        kv_width = self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=True)
        self.k_proj = nn.Linear(self.hidden_size, kv_width, bias=True)
        self.v_proj = nn.Linear(self.hidden_size, kv_width, bias=True)
        self.o_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)

    def rotary_emb(self, x, position_ids):
        return rope_tables(position_ids, self.head_dim, self.config.rope_theta)


class DreamSdpaAttention(DreamAttention):
    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None,
                output_attentions=False, use_cache=False, cache_position=None, position_embeddings=None):  # fmt: skip
        shape = *hidden_states.shape[:2], -1, self.head_dim
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = position_embeddings or self.rotary_emb(value, position_ids)
        query, key = rope(query, cos[:, None], sin[:, None]), rope(key, cos[:, None], sin[:, None])
        if past_key_value is not None:
            key, value = past_key_value.update(key, value, self.layer_idx, {"sin": sin, "cos": cos})
        key = key.repeat_interleave(self.num_key_value_groups, 1)
        value = value.repeat_interleave(self.num_key_value_groups, 1)
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).nan_to_num(0)
        return self.o_proj(out.transpose(1, 2).reshape(hidden_states.shape)), None, past_key_value


class ExtraDreamAttention(DreamSdpaAttention):
    """A copy that got one more positional and one more keyword argument, insists on them, and bags the rest."""

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, dual_cache=None, *,
                replace_position=None, **flash_kwargs):  # fmt: skip
        assert (dual_cache, replace_position) == ("dual", 7), "arguments of the copy were lost"
        return super().forward(hidden_states, attention_mask, position_ids, past_key_value, **flash_kwargs)


class DreamMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DreamDecoderLayer(nn.Module):
    attention_class = DreamSdpaAttention

    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = self.attention_class(config, layer_idx)
        self.mlp = DreamMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, **kwargs):
        out, _, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + out
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class ExtraDreamLayer(DreamDecoderLayer):
    """The copy passes its arguments by position, its own included."""

    attention_class = ExtraDreamAttention

    def forward(self, hidden_states, attention_mask, position_ids, past_key_value, use_cache, position_embeddings):
        out, _, _ = self.self_attn(self.input_layernorm(hidden_states), attention_mask, position_ids, past_key_value,
                                   "dual", replace_position=7, use_cache=use_cache,
                                   position_embeddings=position_embeddings)  # fmt: skip
        hidden_states = hidden_states + out
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class DreamBaseModel(nn.Module):
    def __init__(self, config, layer_class=DreamDecoderLayer):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        tables = rope_tables(position_ids, head_dim, self.config.rope_theta)
        hidden_states = self.embed_tokens(input_ids)
        cache = ThrowawayCache() if use_cache else past_key_values
        for layer in self.layers:
            (hidden_states,) = layer(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_value=cache,
                use_cache=use_cache,
                position_embeddings=tables,
            )
        return self.norm(hidden_states)


class HubDream(nn.Module):
    """`DreamModel` of the hub: top-level forward to an object with `.logits`, and its own `diffusion_generate`."""

    layer_class = DreamDecoderLayer

    def __init__(self, config: dict, weights: dict):
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.model = DreamBaseModel(self.config, self.layer_class)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.load_state_dict(weights)
        self.eval()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                output_attentions=None, num_logits_to_keep=0):  # fmt: skip
        use_cache = self.config.use_cache if use_cache is None else use_cache
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        return SimpleNamespace(logits=self.lm_head(hidden[:, -num_logits_to_keep:]))

    @torch.no_grad()
    def diffusion_generate(self, input_ids, attention_mask=None, *, max_new_tokens, steps, mask_kind="bool"):
        """Greedy maskgit_plus. `mask_kind` is the form in which the padding reaches the attention."""
        new = torch.full((len(input_ids), max_new_tokens), self.config.mask_token_id)
        ids, mask, position_ids = torch.cat([input_ids, new], 1), "full", None
        if attention_mask is not None:
            real = F.pad(attention_mask, (0, max_new_tokens), value=1).bool()
            position_ids = (real.long().cumsum(-1) - 1).masked_fill(~real, 1)
            mask = real[:, None, :, None] & real[:, None, None, :]
            if mask_kind == "additive":
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        elif mask_kind == "none":
            mask = None
        times = torch.linspace(1, 1e-3, steps + 1)
        for i in range(steps):
            logits = self(ids, mask, position_ids).logits
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
            confidence, drawn = logits.softmax(-1).max(-1)
            masked = ids == self.config.mask_token_id
            left = masked.sum() / len(ids)
            count = int(left * (1 - times[i + 1] / times[i])) if i < steps - 1 else int(left)
            chosen = confidence.masked_fill(~masked, -torch.inf).topk(count).indices
            ids.scatter_(1, chosen, drawn.gather(1, chosen))
        return ids


class ExtraHubDream(HubDream):
    """A copy whose every level takes arguments that the hub's class does not have."""

    layer_class = ExtraDreamLayer

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, *extra, **named):
        assert not extra and not named, "only the sampler's three arguments are expected"
        return super().forward(input_ids, attention_mask, position_ids)
