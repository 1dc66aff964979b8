"""Attention modules that people bring: their own final heads are taken, or they are refused with the reason."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from sparsed import SparseDConfig, sparsify
from tests.helpers.foreign_cases import Twin
from tests.helpers.patch_cases import build
from tests.helpers.standins import DREAM, DreamAttention, DreamDecoderLayer, HubDream, RMSNorm, rope, rope_tables
from tests.helpers.standins_llada import HubLLaDA, LLaDALlamaBlock

LENGTH, GEN_LENGTH = 96, 24


@pytest.fixture
def ids():
    return torch.randint(0, 90, (1, LENGTH))


def sparsed(model, skip=0.0, select=0.4, **changes):
    """The first forward selects, the next ones are sparse."""
    options = {"steps": 4, "gen_length": GEN_LENGTH, "backend": "gather"}
    return sparsify(model, SparseDConfig(skip, select, 16), **options | changes)


class NormedAttention(DreamAttention):
    """A copy of another family under Dream's names: norms on q and k, clipped projections, `sdpa` its last call."""

    clip_qkv, sdpa = 1.5, staticmethod(F.scaled_dot_product_attention)

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, 1e-6) for _ in "qk")

    def forward(self, hidden_states, position_embeddings=None, **_):
        q, k, v = (
            project(hidden_states).clamp(-self.clip_qkv, self.clip_qkv).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (table[:, None] for table in position_embeddings)
        q, k, v = rope(self.q_norm(q).transpose(1, 2), cos, sin), rope(self.k_norm(k).transpose(1, 2), cos, sin), v
        shared = self.num_key_value_groups
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v.transpose(1, 2)))
        return self.o_proj(self.sdpa(query=q, key=k, value=v).transpose(1, 2).flatten(2)), None, None


def copy_with(weights, **members):
    """A Dream whose attention is a NormedAttention with other members."""
    attention = type("Attention", (NormedAttention,), members)
    layer = type("Layer", (DreamDecoderLayer,), {"attention_class": attention})
    unnormed = type("Copy", (HubDream,), {"layer_class": layer, "load_state_dict": nn.Module.load_state_dict})
    norms = {f"model.layers.{i}.self_attn.{x}_norm.weight": torch.rand(16) + 0.5 for i in range(2) for x in "qk"}
    return unnormed(DREAM, weights["dream"] | norms)


# -------------------------------------------------------------------------------------------------------- what is right


@torch.no_grad()
def test_norms_and_clipping_are_the_copy_s_own(weights, ids):
    model = copy_with(weights)
    expected = model(ids).logits
    with sparsed(model, select=1.0) as run:
        for _ in range(3):
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
        assert run.tally.sparse == 2
    with sparsed(model):
        model(ids)
        assert (model(ids).logits - expected).abs().max() > 0.05, "nothing was dropped: no test"


class RowsOfLLaDA(HubLLaDA):
    """As dLLM-Cache: the first layer computes all tokens, deeper ones some of them, against keys that they keep."""

    def forward(self, input_ids, places=None):
        parts = self.model.transformer
        x = parts["wte"](input_ids)
        for index, block in enumerate(parts["blocks"]):
            some = torch.arange(LENGTH) if places is None or index == 0 else places
            if len(some):
                x = x.index_add(1, some, self.attended(block, x, some))
        return parts["ff_out"](parts["ln_f"](x))

    def attended(self, block, x, some):
        h = block.attn_norm(x)
        q, k, v = (
            project(h).unflatten(-1, (-1, block.head_dim)).transpose(1, 2)
            for project in (block.q_proj, block.k_proj, block.v_proj)
        )
        tables = rope_tables(torch.arange(LENGTH), block.head_dim, self.config.rope_theta)
        q = rope(q[:, :, some], *(table[some] for table in tables))
        return block.attn_out(block._scaled_dot_product_attention(q, rope(k, *tables), v).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_scattered_rows_attend_to_every_key(weights, ids, monkeypatch):
    """Their forward is no step and selects nothing; a layer that computes all tokens is sparse once blocks are kept."""
    model, places, none = build(RowsOfLLaDA, weights), torch.tensor([3, 40, 41, 77]), torch.tensor([], dtype=torch.long)
    own, first_layer = model(ids, places), model(ids, none)
    with sparsed(model, skip=0.5) as run:
        model(ids)
        for rows, expected in ((places, own), (none, first_layer)):
            assert torch.equal(model(ids, rows), expected) and run.step == 1, "the first layer alone selects nothing"
        model(ids)
        found = model(ids, places)
        assert run.step == 2 and run.phase == "sparse"
    monkeypatch.setattr(F, "scaled_dot_product_attention", Twin(3, 2, LENGTH - GEN_LENGTH))
    model(ids), model(ids)
    torch.testing.assert_close(found, model(ids, places), atol=1e-4, rtol=0)
    assert (found - own).abs().max() > 0.05, "nothing was dropped: no test"


@torch.no_grad()
def test_a_filled_cache_is_read(weights, ids):
    """The hub's Dream appends to what `past_key_values` holds."""

    class Cache:
        def __init__(self):
            self.layers = {}

        def update(self, k, v, layer, _):
            if layer in self.layers:
                k, v = (torch.cat(both, 2) for both in zip(self.layers[layer], (k, v), strict=True))
            self.layers[layer] = k, v
            return k, v

    model = build(HubDream, weights)
    rest = dict(attention_mask="full", position_ids=torch.arange(72, LENGTH)[None], use_cache=False)

    def generated():
        cache = Cache()
        model(ids[:, :72], "full", past_key_values=cache, use_cache=False)
        return model(ids[:, 72:], past_key_values=cache, **rest).logits

    expected = generated()
    with sparsed(model) as run:
        assert torch.equal(generated(), expected) and run.step == 1
    assert (expected - model(ids[:, 72:], **rest).logits).abs().max() > 1, "the cache matters"


@torch.no_grad()
def test_a_layer_that_attends_to_more_than_the_model_was_given(weights, ids):
    class PrefixedDream(HubDream):
        def forward(self, input_ids):
            return super().forward(torch.cat([input_ids[:, :5], input_ids], 1), "full")

    model = build(PrefixedDream, weights)
    with pytest.raises(ValueError, match="attends to 101 tokens where the model was given 96"), sparsed(model):
        model(ids)


# ------------------------------------------------------------------------------------------------------ what is refused


def scaled(factor):
    return staticmethod(lambda **heads: F.scaled_dot_product_attention(**heads, scale=factor))


def eager(query, key, value):
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


def twice(query, key, value):
    halves = zip(*(x.chunk(2, 1) for x in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*half) for half in halves], 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("sdpa", "line"),
    [
        (lambda **heads: F.scaled_dot_product_attention(**heads, is_causal=True), "is causal"),
        (lambda **heads: F.scaled_dot_product_attention(**heads, dropout_p=0.1), r"call eval\(\)"),
        (lambda **heads: F.scaled_dot_product_attention(**heads, scale=1.0), "scaled by 1.0"),
        (eager, "0 times, not once"),
        (twice, "2 times, not once"),
    ],
    ids=["causal", "dropout", "scale", "eager", "twice"],
)
def test_another_attention_is_refused_in_the_first_forward(weights, ids, sdpa, line):
    model = copy_with(weights, sdpa=staticmethod(sdpa))
    with pytest.raises((ValueError, RuntimeError), match=line) as error, sparsed(model, steps=100):
        model(ids)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_the_usual_scale_may_be_named(weights, ids):
    model = copy_with(weights, sdpa=staticmethod(lambda **heads: F.scaled_dot_product_attention(**heads, scale=0.25)))
    with sparsed(model) as run:
        model(ids), model(ids)
    assert run.tally.sparse == 1


def test_a_causal_block_under_llada_s_names(weights, ids):
    """As OLMo's, from which LLaDA's was made."""

    class OLMoBlock(LLaDALlamaBlock):
        def _scaled_dot_product_attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

        def attention(self, q, k, v, attention_bias=None, layer_past=None, use_cache=False):
            heads = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
            return self._scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2), None

    class OLMo(HubLLaDA):
        block_class = OLMoBlock

    model = build(OLMo, weights)
    with pytest.raises(ValueError, match="is causal"), sparsed(model):
        model(ids)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral", "Gemma", "Olmo"])
def test_models_of_transformers_are_causal(name):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, f"{name}Model")(config)
    with pytest.raises(ValueError, match=f"^{name}(Sdpa)?Attention is causal"), sparsed(model):
        pass
