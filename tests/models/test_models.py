"""The two forwards: published names, float32 logits against a float64 oracle, bf16 results bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from sparsed.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModel, common
from sparsed.models.common import RMSNorm
from tests.helpers.reference import forward, rotate
from tests.helpers.standins import DREAM, LLADA, random_weights, tiny_dream, tiny_llada

MODELS = {"dream": (DREAM, DreamConfig, DreamModel), "llada": (LLADA, LLaDAConfig, LLaDAModel)}
PUBLISHED = {
    "dream": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "mask_token_id": 151666,
    },
    "llada": {
        "vocab_size": 126464,
        "embedding_size": 126464,
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "mask_token_id": 126336,
    },
}


def build(family, **changes):
    values, config_class, model_class = MODELS[family]
    model = model_class(config_class.from_dict(values | changes))
    model.load_state_dict(random_weights(model, seed=1) if not tied(changes) else model.state_dict())
    return model.eval()


def tied(changes):
    return changes.get("tie_word_embeddings") or changes.get("weight_tying")


def tokens(*shape, seed=3):
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- names and shapes


@pytest.mark.parametrize(
    ("family", "tensors", "parameters"), [("dream", 339, 7_615_616_512), ("llada", 291, 8_015_581_184)]
)
def test_published_sizes(family, tensors, parameters):
    _, config_class, model_class = MODELS[family]
    with torch.device("meta"):
        model = model_class(config_class.from_dict(PUBLISHED[family]))
    shapes = [tensor.numel() for tensor in model.state_dict().values()]
    assert (len(shapes), sum(shapes)) == (tensors, parameters)
    assert not list(model.buffers())


def test_published_names_of_dream():
    width, kv_width, mlp, vocab = 64, 32, 96, 97
    layer = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.q_proj.bias": (width,),
        "self_attn.k_proj.weight": (kv_width, width),
        "self_attn.k_proj.bias": (kv_width,),
        "self_attn.v_proj.weight": (kv_width, width),
        "self_attn.v_proj.bias": (kv_width,),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (mlp, width),
        "mlp.up_proj.weight": (mlp, width),
        "mlp.down_proj.weight": (width, mlp),
    }
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    expected |= {"model.norm.weight": (width,)}
    assert {name: tuple(tensor.shape) for name, tensor in tiny_dream().state_dict().items()} == expected


def test_published_names_of_llada():
    width, mlp, vocab = 96, 128, 97
    layer = {f"{name}.weight": (width, width) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
    layer |= {f"{name}.weight": (width,) for name in ("attn_norm", "ff_norm")}
    layer |= {"ff_proj.weight": (mlp, width), "up_proj.weight": (mlp, width), "ff_out.weight": (width, mlp)}
    expected = {f"model.transformer.blocks.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    expected |= {f"model.transformer.{name}.weight": (vocab, width) for name in ("wte", "ff_out")}
    expected |= {"model.transformer.ln_f.weight": (width,)}
    assert {name: tuple(tensor.shape) for name, tensor in tiny_llada().state_dict().items()} == expected


# ------------------------------------------------------------------------------------------------- float32 logits


HEADS = {
    "dream": [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"rope_theta": 1e4, "rms_norm_eps": 1e-2}],
    "llada": [{}, {"n_heads": 6, "n_kv_heads": 2}, {"embedding_size": 101}, {"rope_theta": 1e4, "rms_norm_eps": 1e-2}],
}


@pytest.mark.parametrize(("family", "changes"), [(family, c) for family in MODELS for c in HEADS[family]], ids=str)
@pytest.mark.parametrize("length", [1, 37])
def test_logits_equal_the_float64_oracle(family, changes, length):
    model, ids = build(family, **changes), tokens(2, length)
    expected, _ = forward(family, model.state_dict(), MODELS[family][0] | changes, ids)
    assert (model(ids).double() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("chunk", "most"), [(1, 1), (14, 7), (73, 19), (74, 37)])
def test_the_mlp_of_long_sequences_is_computed_in_chunks(family, chunk, most, monkeypatch):
    """Of two rows of 37 tokens; the logits of the last 30 are wanted."""
    monkeypatch.setattr(common, "CHUNK", chunk)
    model, ids = build(family), tokens(2, 37)
    ups, computed = [module for name, module in model.named_modules() if name.endswith("up_proj")], []
    for up in ups:
        up.register_forward_pre_hook(lambda module, inputs: computed.append(inputs[0].shape[1]))
    expected, _ = forward(family, model.state_dict(), MODELS[family][0], ids)
    assert (model(ids, first_row=7).double() - expected[:, 7:]).abs().max() < 1e-4
    assert computed[0] == most and sum(computed) == 37 * (len(ups) - 1) + 30


@pytest.mark.parametrize("family", MODELS)
def test_left_padded_rows_equal_the_oracle(family):
    model, ids = build(family), tokens(3, 29)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :28] = 0
    expected, _ = forward(family, model.state_dict(), MODELS[family][0], ids, mask.bool())
    difference = (model(ids, mask).double() - expected).abs().amax(-1)
    assert difference[mask.bool()].max() < 1e-4


@pytest.mark.parametrize("family", MODELS)
def test_padding_tokens_do_not_matter(family):
    model, ids = build(family), tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    other = ids.clone()
    other[0, :6] = 7
    assert torch.equal(model(ids, mask)[mask.bool()], model(other, mask)[mask.bool()])


def test_dream_left_padding_equals_the_unpadded_row():
    model, ids = build("dream"), tokens(1, 20)
    padded = torch.cat([torch.full((1, 9), 95), ids], dim=1)
    mask = (torch.arange(29) >= 9).long()[None]
    assert (model(padded, mask)[:, 9:] - model(ids)).abs().max() < 1e-4


def first_queries(model, ids, mask=None):
    """Projected [B, H, T, D] queries of the first layer, before and after RoPE."""
    layer = model.model.layers[0].self_attn if model.family == "dream" else model.model.transformer["blocks"][0]
    seen = {}
    layer.q_proj.register_forward_hook(lambda module, inputs, output: seen.update(projected=output))
    layer.attend = lambda q, k, v, key_valid, start: seen.update(rotated=q) or torch.zeros_like(q)
    model(ids, mask)
    return seen["projected"].view(*ids.shape, layer.heads, -1).transpose(1, 2), seen["rotated"]


@pytest.mark.parametrize("family", MODELS)
def test_positions_under_left_padding(family):
    """Dream counts real tokens and puts pads at 1; LLaDA counts all. Logits would not tell, since RoPE is relative."""
    mask = (torch.arange(29) >= 9).long()[None]
    positions = torch.tensor([[1] * 9 + list(range(20))] if family == "dream" else [list(range(29))])
    projected, rotated = first_queries(build(family), tokens(1, 29), mask)
    expected = rotate(projected.double(), positions, MODELS[family][0]["rope_theta"])
    assert (rotated.double() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", MODELS)
def test_chosen_rows_of_the_logits(family):
    model, ids = build(family), tokens(2, 11)
    rows = torch.tensor([21, 0, 3, 3])
    everything = model(ids)
    assert everything.shape[:2] == (2, 11)
    assert torch.allclose(model(ids, logit_rows=rows), everything.flatten(0, 1)[rows], atol=1e-5)


def test_attention_looks_both_ways():
    for model in (build("dream"), build("llada")):
        ids = tokens(1, 16)
        changed = ids.clone()
        changed[0, -1] = 5
        assert (model(ids)[0, 0] - model(changed)[0, 0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "flag", "embedding", "head"),
    [
        ("dream", "tie_word_embeddings", "model.embed_tokens.weight", "lm_head.weight"),
        ("llada", "weight_tying", "model.transformer.wte.weight", "model.transformer.ff_out.weight"),
    ],
)
def test_tied_head_is_the_embedding(family, flag, embedding, head):
    model, ids = build(family, **{flag: True}), tokens(1, 9)
    weights = dict(model.state_dict())
    weights[head] = weights[embedding]
    expected, _ = forward(family, weights, MODELS[family][0], ids)
    assert (model(ids).double() - expected).abs().max() < 1e-4 * expected.abs().max()


# ------------------------------------------------------------------------------------------------- bf16, bit for bit


def published_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).bfloat16()


def published_rope(family, x, theta):
    """Dream: bf16 tables and arithmetic; LLaDA: float32 tables and arithmetic, then back to bf16."""
    width, precision = x.shape[-1], torch.bfloat16 if family == "dream" else torch.float32
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    angles = torch.arange(x.shape[-2]).float()[:, None] * frequencies
    cos, sin = angles.cos().repeat(1, 2).to(precision), angles.sin().repeat(1, 2).to(precision)
    x = x.to(precision)
    turned = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
    return ((x * cos) + (turned * sin)).bfloat16()


def published_layer(family, config, weights, x):
    """One layer on bf16 x [B, T, width], rounding to bf16 after every operation as the published models do."""
    dream = family == "dream"
    names = (
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
        if dream
        else "q_proj k_proj v_proj attn_out ff_proj up_proj ff_out"
    ).split()
    heads, kv_heads = config["num_attention_heads" if dream else "n_heads"], config.get("num_key_value_heads", 3)
    norms = ("input_layernorm", "post_attention_layernorm") if dream else ("attn_norm", "ff_norm")

    def linear(x, name):
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    h = published_norm(x, weights[norms[0] + ".weight"], config["rms_norm_eps"])
    q, k, v = (
        linear(h, name).view(*h.shape[:2], count, -1).transpose(1, 2)
        for name, count in zip(names, (heads, kv_heads, kv_heads), strict=False)
    )
    q, k = (published_rope(family, y, config["rope_theta"]) for y in (q, k))
    k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    x = x + linear(out.transpose(1, 2).reshape(x.shape), names[3])
    h = published_norm(x, weights[norms[1] + ".weight"], config["rms_norm_eps"])
    return x + linear(F.silu(linear(h, names[4])) * linear(h, names[5]), names[6])


@pytest.mark.parametrize("family", MODELS)
def test_bf16_layer_rounds_as_published(family):
    config, model = MODELS[family][0], build(family).bfloat16()
    layer = model.model.layers[0] if family == "dream" else model.model.transformer["blocks"][0]
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model(tokens(2, 150))
    x, output = seen[0]
    expected = published_layer(family, config, layer.state_dict(), x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


@pytest.mark.parametrize("family", MODELS)
def test_bf16_rope_is_the_familys_own(family):
    heads, rotated = first_queries(build(family).bfloat16(), tokens(1, 150))
    other = {"dream": "llada", "llada": "dream"}[family]
    theta = MODELS[family][0]["rope_theta"]
    assert torch.equal(rotated, published_rope(family, heads, theta))
    assert (rotated != published_rope(other, heads, theta)).float().mean() > 0.1


def test_bf16_norm_casts_before_the_weight():
    norm = RMSNorm(256, 1e-6).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(64, 256).bfloat16()
    late = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight.float()).bfloat16()
    assert torch.equal(norm(x), published_norm(x, norm.weight, 1e-6))
    assert (norm(x) != late).float().mean() > 0.1


# ------------------------------------------------------------------------------------------------- config


BAD_CONFIGS = [
    ("dream", {"hidden_size": None}, "hidden_size"),
    ("dream", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("dream", {"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ("dream", {"vocab_size": "many"}, "vocab_size"),
    ("dream", {"num_attention_heads": 5}, "hidden_size"),
    ("dream", {"num_key_value_heads": 3}, "key-value heads"),
    ("dream", {"mask_token_id": 97}, "mask_token_id"),
    ("dream", {"mask_token_id": -1}, "mask_token_id"),
    ("dream", {"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    ("dream", {"hidden_act": "gelu"}, "hidden_act"),
    ("dream", {"rms_norm_eps": 0}, "rms_norm_eps"),
    ("dream", {"rope_theta": True}, "rope_theta"),
    ("dream", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ("llada", {"d_model": None}, "d_model"),
    ("llada", {"n_heads": -4}, "n_heads"),
    ("llada", {"n_heads": 32, "n_kv_heads": 32}, "d_model"),
    ("llada", {"embedding_size": 90}, "embedding_size"),
    ("llada", {"eot_token_id": 126348}, "eot_token_id"),
    ("llada", {"activation_type": "swiglu"}, "activation_type"),
    ("llada", {"rope_full_precision": False}, "rope_full_precision"),
    ("llada", {"block_type": "sequential"}, "block_type"),
]


@pytest.mark.parametrize(("family", "changes", "named"), BAD_CONFIGS, ids=str)
def test_bad_config_values_are_named_in_one_line(family, changes, named):
    values, config_class, _ = MODELS[family]
    with pytest.raises(ValueError, match=named) as caught:
        config_class.from_dict(values | changes)
    assert "\n" not in str(caught.value)


def test_llada_fills_in_what_its_config_may_leave_out():
    values = {key: value for key, value in LLADA.items() if key not in ("n_kv_heads", "embedding_size")}
    config = LLaDAConfig.from_dict(values)
    assert (config.n_kv_heads, config.embedding_size) == (3, 97)
    assert (config.max_length, DreamConfig.from_dict(DREAM).max_length) == (512, 2048)


@pytest.mark.parametrize("first_row", [0, 1, 7, 11])
def test_the_last_layer_computes_only_the_rows_that_are_wanted(family, first_row):
    model, ids = build(family), tokens(2, 12)
    layers = [module for module in model.modules() if hasattr(module, "attend")]
    queries = []

    def watched(attend):
        def attention(q, k, v, key_valid, start):
            queries.append((q.shape[2], k.shape[2]))
            assert start == k.shape[2] - q.shape[2]
            return attend(q, k, v, key_valid, start)

        return attention

    for layer in layers:
        layer.attend = watched(layer.attend)
    with torch.no_grad():
        everything = model(ids)
        queries.clear()
        tail = model(ids, first_row=first_row)
        rows = torch.tensor([first_row, 11, 12 + first_row, 23])
        some = model(ids, logit_rows=rows, first_row=first_row)
    torch.testing.assert_close(tail, everything[:, first_row:], atol=1e-5, rtol=0)
    torch.testing.assert_close(some, everything.flatten(0, 1)[rows], atol=1e-5, rtol=0)
    assert queries == [(12, 12)] * (len(layers) - 1) + [(12 - first_row, 12)] + queries[len(layers) :]


@pytest.mark.parametrize("first_row", [-1, 12, 100])
def test_a_first_row_that_is_not_there(family, first_row):
    with pytest.raises(ValueError, match="first_row"):
        build(family)(tokens(1, 12), first_row=first_row)


def test_every_module_is_called_so_that_hooks_and_offloading_work(family):
    from accelerate import cpu_offload

    model, called = build(family), set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in model.named_modules()
    ]
    with torch.no_grad():
        expected = model(tokens(1, 12))
        leaves = {name for name, module in model.named_modules() if not list(module.children())}
        assert leaves <= called
        for hook in hooks:
            hook.remove()
        cpu_offload(model, torch.device("cpu"))
        assert torch.equal(model(tokens(1, 12)), expected)
