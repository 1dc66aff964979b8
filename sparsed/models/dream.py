"""Dream (Dream-v0-7B, Dream-Coder): a bidirectional transformer shaped as Qwen2. Row t of its logits predicts t + 1."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import silu_product
from .cache import KVCache
from .common import (
    DiffusionLM,
    ForwardContext,
    RMSNorm,
    Sizes,
    attend,
    check_heads,
    check_special_ids,
    check_supported,
    config_from_dict,
    in_chunks,
    rope_tables,
    take_rows,
    with_plain_rope,
)
from .rows import Rows


@dataclass(frozen=True)
class DreamConfig:
    """The keys of a published Dream config.json that the forward and the sampler read.

    `end_token_ids` are all ids that end an answer, of which `eos_token_id` and `pad_token_id` are the first of a kind.
    """

    # what this forward computes; a config.json that asks for anything else describes another network
    supported: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}
    qkv_bias: ClassVar[bool] = True

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mask_token_id: int
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    end_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        check_heads("hidden_size", self.hidden_size, self.num_attention_heads, self.num_key_value_heads)
        check_special_ids(self, "mask_token_id", "pad_token_id", "eos_token_id")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DreamConfig":
        """From config.json's dict; ValueError names a missing, invalid or unsupported key."""
        check_supported(values, cls.supported)
        return config_from_dict(cls, with_plain_rope(values))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def max_length(self) -> int:
        """Longest sequence, in tokens, that the model was made for."""
        return self.max_position_embeddings

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            width=self.hidden_size,
            kv_width=self.num_key_value_heads * self.head_dim,
            mlp_width=self.intermediate_size,
            vocabulary=self.vocab_size,
        )


class DreamAttention(nn.Module):
    """Grouped-query attention, Dream's with biases; `attend` is the one seam that other attention replaces."""

    def __init__(self, config: DreamConfig):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        kv_width = self.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, start: int) -> Tensor:
        """Attention of the tokens from `start` on over all tokens."""
        return attend(q, k, v, key_valid)

    def forward(self, x: Tensor, given: ForwardContext, layer: int, first: int) -> Tensor:
        """Attention of the computed tokens x [B, n, width], from the `first` of them on -> [B, n - first, width]."""
        return self.o_proj(given.attended(self, layer, x, first))


class DreamMLP(nn.Module):
    def __init__(self, config: DreamConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_product(self.gate_proj(x), self.up_proj(x)))


class DreamLayer(nn.Module):
    def __init__(self, config: DreamConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DreamAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DreamMLP(config)

    def forward(self, x: Tensor, given: ForwardContext, layer: int, first: int) -> Tensor:
        """One layer: x [B, n, width] -> [B, n - first, width], the tokens before `first` serving as keys only."""
        attended = self.self_attn(self.input_layernorm(x), given, layer, first)
        return in_chunks(self._add_mlp, x[:, first:], attended)

    def _add_mlp(self, x: Tensor, attended: Tensor) -> Tensor:
        x, normed = self.post_attention_layernorm(x, attended)
        return x + self.mlp(normed)


class DreamBackbone(nn.Module):
    def __init__(self, config: DreamConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, given: ForwardContext, logit_rows: Tensor | None) -> Tensor:
        """Hidden rows for the head."""
        x = given.through(self.layers, self.embed_tokens(input_ids))
        return self.norm(take_rows(x, logit_rows, given.rows.slots, given.rows.length))


class DreamModel(DiffusionLM):
    """Dream with its head; parameter names are those of the published checkpoints."""

    family = "dream"

    def __init__(self, config: DreamConfig):
        super().__init__()
        self.config = config
        self.model = DreamBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def positions(self, length: int, device: torch.device, attention_mask: Tensor | None) -> Tensor:
        """As Dream counts: the real tokens."""
        if attention_mask is None:
            return torch.arange(length, device=device)[None]
        real = attention_mask.bool().long()
        return (real.cumsum(-1) - 1).masked_fill(real == 0, 1)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables in the model's dtype, in which Dream rotates."""
        cos, sin = rope_tables(positions[:, None], self.config.head_dim, self.config.rope_theta)
        dtype = self.model.embed_tokens.weight.dtype
        return cos.to(dtype), sin.to(dtype)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        logit_rows: Tensor | None = None,
        first_row: int | None = None,
        rows: Rows | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits in the model's dtype; row t predicts token t + 1.

        Args:
            input_ids: [B, n] int64, the tokens of `rows`.
            attention_mask: [B, T], 1 = real, 0 = left padding; None if every token of the sequence is real.
            logit_rows: [m] int64 flat positions b * T + t whose logits are wanted, with t >= first_row; None for all.
            first_row: no logits are wanted of the tokens before it, and the last layer computes only their keys and
                values; None for the first of `rows`.
            rows: what is computed, by `self.rows`; None for all of the sequence.
            cache: the sequence's keys and values, by `self.kv_cache`: those of `rows` are written, all are attended to.

        Returns:
            [B, n, vocab_size] without what lies before first_row, or [m, vocab_size] with `logit_rows`.

        Raises:
            ValueError: shapes, rows and cache do not fit each other.
        """
        given = self.given(input_ids, attention_mask, rows, cache, first_row)
        return self.lm_head(self.model(input_ids, given, logit_rows))
