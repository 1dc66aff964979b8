"""Stand-ins for copies of the hub's classes with a cache of keys and values, called as other people's samplers do.

The first forward gives each layer's unrotated keys and values; a later one gets those of other tokens as `past`, which
its own follow, or take the places of where `replace` says so.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from tests.helpers.standins import DreamAttention, DreamDecoderLayer, HubDream, rope, rope_tables
from tests.helpers.standins_llada import HubLLaDA, LLaDALlamaBlock


def joined(past, replace, k, v):
    """Keys and values of all tokens, and the places of those that are computed."""
    if past is None:
        return k, v, torch.arange(k.shape[2])
    if replace is None:
        k, v = (torch.cat(both, 2) for both in zip(past, (k, v), strict=True))
        return k, v, torch.arange(past[0].shape[2], k.shape[2])
    for old, new in zip(past, (k, v), strict=True):
        old[:, :, replace] = new
    return *past, replace.nonzero().squeeze(-1)


def rotated(q, k, places, theta):
    tables = rope_tables(torch.arange(k.shape[2]), k.shape[3], theta)
    return rope(q, *(table[places] for table in tables)), rope(k, *tables)


class CachedLLaDABlock(LLaDALlamaBlock):
    def forward(self, x, past=None, replace=None):
        h = self.attn_norm(x)
        q, k, v = (
            project(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v, places = joined(past, replace, k, v)
        q, keys = rotated(q, k, places, self.config.rope_theta)
        x = x + self.attn_out(self._scaled_dot_product_attention(q, keys, v).transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h)), (k, v)


class CachedHubLLaDA(HubLLaDA):
    block_class = CachedLLaDABlock

    def forward(self, input_ids, past=None, replace=None):
        parts, kept = self.model.transformer, []
        x = parts["wte"](input_ids)
        for index, block in enumerate(parts["blocks"]):
            x, layer = block(x, past and past[index], replace)
            kept.append(layer)
        return SimpleNamespace(logits=parts["ff_out"](parts["ln_f"](x)), past=kept)


class CachedDreamAttention(DreamAttention):
    def forward(self, hidden_states, past=None, replace=None):
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v, places = joined(past, replace, k, v)
        q, keys = rotated(q, k, places, self.config.rope_theta)
        keys, values = (x.repeat_interleave(self.num_key_value_groups, 1) for x in (keys, v))
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=False, dropout_p=0.0)
        return self.o_proj(out.transpose(1, 2).flatten(2)), (k, v)


class CachedDreamLayer(DreamDecoderLayer):
    attention_class = CachedDreamAttention

    def forward(self, x, past=None, replace=None):
        out, kept = self.self_attn(self.input_layernorm(x), past, replace)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class CachedHubDream(HubDream):
    layer_class = CachedDreamLayer

    def forward(self, input_ids, past=None, replace=None):
        x, kept = self.model.embed_tokens(input_ids), []
        for index, layer in enumerate(self.model.layers):
            x, own = layer(x, past and past[index], replace)
            kept.append(own)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)), past=kept)
