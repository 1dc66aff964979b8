"""Stand-ins for the hub's remote-code LLaDA classes, and the published sampler around them (see standins.py)."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.standins import RMSNorm, rope, rope_tables


class LLaDALlamaBlock(nn.Module):
    def __init__(self, config, layer_id):
        super().__init__()
        self.config, self.layer_id = config, layer_id
        self.head_dim = config.d_model // config.n_heads
        kv_width = config.n_kv_heads * self.head_dim
        self.attn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)

    def _scaled_dot_product_attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        shared = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=False)

    def attention(self, q, k, v, attention_bias=None, layer_past=None, use_cache=False):
        batch, length, width = q.shape
        q, k, v = (x.view(batch, length, -1, self.head_dim).transpose(1, 2) for x in (q, k, v))
        present = (k, v) if use_cache else None
        tables = rope_tables(torch.arange(length), self.head_dim, self.config.rope_theta)
        out = self._scaled_dot_product_attention(
            rope(q, *tables), rope(k, *tables), v, attn_mask=attention_bias, dropout_p=0.0, is_causal=False
        )
        return self.attn_out(out.transpose(1, 2).reshape(batch, length, width)), present

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False):
        h = self.attn_norm(x)
        out, cache = self.attention(
            self.q_proj(h), self.k_proj(h), self.v_proj(h), attention_bias, layer_past=layer_past, use_cache=use_cache
        )
        x = x + out
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h)), cache


class ExtraLLaDABlock(LLaDALlamaBlock):
    """A copy that got one more positional and one more keyword argument, and insists on them."""

    def _scaled_dot_product_attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, extra=None, *,
                                      named=None):  # fmt: skip
        assert (extra, named) == ("extra", 7), "arguments of the copy were lost"
        return super()._scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal)

    def attention(self, q, k, v, attention_bias=None, layer_past=None, use_cache=False):
        batch, length, width = q.shape
        q, k, v = (x.view(batch, length, -1, self.head_dim).transpose(1, 2) for x in (q, k, v))
        tables = rope_tables(torch.arange(length), self.head_dim, self.config.rope_theta)
        q, k = rope(q, *tables), rope(k, *tables)
        out = self._scaled_dot_product_attention(q, k, v, attention_bias, 0.0, False, "extra", named=7)
        return self.attn_out(out.transpose(1, 2).reshape(batch, length, width)), None


class LLaDAInner(nn.Module):
    def __init__(self, config, block_class):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(block_class(config, i) for i in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
                "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
            }
        )

    def forward(self, input_ids, attention_mask=None):
        bias = None
        if attention_mask is not None and not attention_mask.all():
            bias = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        x = self.transformer["wte"](input_ids)
        for block in self.transformer["blocks"]:
            x, _ = block(x, bias)
        return self.transformer["ff_out"](self.transformer["ln_f"](x))


class HubLLaDA(nn.Module):
    """`LLaDAModelLM` of the hub: it calls the inner model's forward directly and returns an object with `.logits`."""

    block_class = LLaDALlamaBlock

    def __init__(self, config: dict, weights: dict):
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.model = LLaDAInner(self.config, self.block_class)
        self.load_state_dict(weights)
        self.eval()

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, attention_bias=None, use_cache=None):
        return SimpleNamespace(logits=self.model.forward(input_ids, attention_mask))


class ExtraHubLLaDA(HubLLaDA):
    block_class = ExtraLLaDABlock

    def forward(self, input_ids, *extra, attention_mask=None, **named):
        return super().forward(input_ids, attention_mask=attention_mask)


@torch.no_grad()
def llada_sampler(model, prompt, *, attention_mask=None, steps, gen_length, block_length, cfg_scale=0.0):
    """Greedy low_confidence, as the published script runs it around a `LLaDAModelLM`."""
    mask_id, (batch, prompt_len) = model.config.mask_token_id, prompt.shape
    ids = torch.cat([prompt, torch.full((batch, gen_length), mask_id)], 1)
    real = None if attention_mask is None else F.pad(attention_mask, (0, gen_length), value=1)
    steps_per_block = steps * block_length // gen_length
    for step in range(steps):
        end = prompt_len + (step // steps_per_block + 1) * block_length
        if cfg_scale > 0:
            without = torch.cat([torch.full_like(prompt, mask_id), ids[:, prompt_len:]], 1)
            mask = None if real is None else torch.cat([real, real])
            logits, unconditional = model(torch.cat([ids, without]), attention_mask=mask).logits.chunk(2)
            logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
        else:
            logits = model(ids, attention_mask=real).logits
        confidence, drawn = logits.softmax(-1).max(-1)
        confidence[:, end:] = -torch.inf
        confidence.masked_fill_(ids != mask_id, -torch.inf)
        count = block_length // steps_per_block + (step % steps_per_block < block_length % steps_per_block)
        chosen = confidence.topk(count).indices
        ids.scatter_(1, chosen, drawn.gather(1, chosen))
    return ids
