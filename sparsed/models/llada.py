"""LLaDA (LLaDA-8B, LLaDA-1.5): a Llama-shaped bidirectional transformer. Row t of its logits predicts token t."""

from dataclasses import dataclass
from typing import Any

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

Rope = tuple[Tensor, Tensor]

# what this forward computes; a config.json that asks for anything else describes another network
SUPPORTED = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "scale_logits": False,
}


@dataclass(frozen=True)
class LLaDAConfig:
    """The keys of a published LLaDA config.json that the forward and the sampler read.

    `end_token_ids` are all ids that end an answer, of which the named ones are the first of a kind.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    mlp_hidden_size: int
    n_kv_heads: int
    embedding_size: int
    rms_norm_eps: float
    rope_theta: float
    mask_token_id: int
    max_sequence_length: int = 4096
    weight_tying: bool = False
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None
    end_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        check_heads("d_model", self.d_model, self.n_heads, self.n_kv_heads)
        check_special_ids(self, "mask_token_id", "pad_token_id", "eos_token_id", "eot_token_id")
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"config.json: 'embedding_size' {self.embedding_size} is less than 'vocab_size' {self.vocab_size}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LLaDAConfig":
        """From config.json's dict; ValueError names a missing, invalid or unsupported key."""
        if "hidden_size" in values and "d_model" not in values:
            raise ValueError(
                "config.json describes LLaDA under Llama's names; load the published layout ('d_model', ...)"
            )
        check_supported(values, SUPPORTED)
        filled = with_plain_rope(dict(values))
        for key, stands_in in (("n_kv_heads", "n_heads"), ("embedding_size", "vocab_size")):
            if filled.get(key) is None:
                filled[key] = values.get(stands_in)
        return config_from_dict(cls, filled)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def max_length(self) -> int:
        """Longest sequence, in tokens, that the model was trained on."""
        return self.max_sequence_length

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            layers=self.n_layers,
            heads=self.n_heads,
            width=self.d_model,
            kv_width=self.n_kv_heads * self.head_dim,
            mlp_width=self.mlp_hidden_size,
            vocabulary=self.embedding_size,
        )


class LLaDABlock(nn.Module):
    """One layer, attention and MLP in one module as published; `attend` is the seam that other attention replaces."""

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        width, kv_width = config.d_model, config.n_kv_heads * config.head_dim
        self.heads, self.kv_heads = config.n_heads, config.n_kv_heads
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, width, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, start: int) -> Tensor:
        """Attention of the tokens from `start` on over all tokens."""
        return attend(q, k, v, key_valid)

    def forward(self, x: Tensor, given: ForwardContext, layer: int, first: int) -> Tensor:
        """One layer: x [B, n, width] -> [B, n - first, width], the tokens before `first` serving as keys only."""
        attended = self.attn_out(given.attended(self, layer, self.attn_norm(x), first))
        return in_chunks(self._add_mlp, x[:, first:], attended)

    def _add_mlp(self, x: Tensor, attended: Tensor) -> Tensor:
        x, normed = self.ff_norm(x, attended)
        return x + self.ff_out(silu_product(self.ff_proj(normed), self.up_proj(normed)))


class LLaDABackbone(nn.Module):
    """`model` of the published names; its parts sit in a dict called `transformer`."""

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        self.config = config
        parts = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
        }
        if config.weight_tying:
            parts["ff_out"].weight = parts["wte"].weight
        self.transformer = nn.ModuleDict(parts)

    def forward(self, input_ids: Tensor, given: ForwardContext, logit_rows: Tensor | None) -> Tensor:
        """The head's logits."""
        x = given.through(self.transformer["blocks"].children(), self.transformer["wte"](input_ids))
        x = self.transformer["ln_f"](take_rows(x, logit_rows, given.rows.slots, given.rows.length))
        return self.transformer["ff_out"](x)


class LLaDAModel(DiffusionLM):
    """LLaDA with its head; parameter names are those of the published checkpoints."""

    family = "llada"

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        self.config = config
        self.model = LLaDABackbone(config)

    def positions(self, length: int, device: torch.device, attention_mask: Tensor | None) -> Tensor:
        """As LLaDA counts: every token, padding included."""
        return torch.arange(length, device=device)[None]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables in float32, in which LLaDA rotates."""
        return rope_tables(positions[:, None], self.config.head_dim, self.config.rope_theta)

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
        """Logits in the model's dtype; row t predicts token t.

        Args:
            input_ids: [B, n] int64, the tokens of `rows`.
            attention_mask: [B, T], 1 = real, 0 = padding; None if every token of the sequence is real.
            logit_rows: [m] int64 flat positions b * T + t whose logits are wanted, with t >= first_row; None for all.
            first_row: no logits are wanted of the tokens before it, and the last layer computes only their keys and
                values; None for the first of `rows`.
            rows: what is computed, by `self.rows`; None for all of the sequence.
            cache: the sequence's keys and values, by `self.kv_cache`: those of `rows` are written, all are attended to.

        Returns:
            [B, n, embedding_size] without what lies before first_row, or [m, embedding_size] with `logit_rows`.

        Raises:
            ValueError: shapes, rows and cache do not fit each other.
        """
        given = self.given(input_ids, attention_mask, rows, cache, first_row)
        return self.model(input_ids, given, logit_rows)
