"""A tiny Llama in GGUF, written from the format's description, and the same Llama of transformers."""

import functools
import struct

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, MLP, HEADS, KV_HEADS, LAYERS, THETA, EPS = 64, 96, 4, 2, 2, 50000.0, 1e-5
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"]
TOKENS = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["Ġt", "Ġth"]
MERGES = ["Ġ t", "Ġt h"]
KINDS = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8}
INNER = {
    "attn_norm": ("input_layernorm", (WIDTH,)),
    "ffn_norm": ("post_attention_layernorm", (WIDTH,)),
    "attn_q": ("self_attn.q_proj", (WIDTH, WIDTH)),
    "attn_k": ("self_attn.k_proj", (WIDTH // HEADS * KV_HEADS, WIDTH)),
    "attn_v": ("self_attn.v_proj", (WIDTH // HEADS * KV_HEADS, WIDTH)),
    "attn_output": ("self_attn.o_proj", (WIDTH, WIDTH)),
    "ffn_gate": ("mlp.gate_proj", (MLP, WIDTH)),
    "ffn_up": ("mlp.up_proj", (MLP, WIDTH)),
    "ffn_down": ("mlp.down_proj", (WIDTH, MLP)),
}


def metadata(**changes):
    """Name -> (type, value), or (9, type, values); `changes` by name with __ for a dot, None to leave it out."""
    found = {
        "general.architecture": (8, "llama"),
        "llama.vocab_size": (4, len(TOKENS)),
        "llama.embedding_length": (4, WIDTH),
        "llama.feed_forward_length": (4, MLP),
        "llama.block_count": (4, LAYERS),
        "llama.attention.head_count": (4, HEADS),
        "llama.attention.head_count_kv": (4, KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": (6, EPS),
        "llama.rope.freq_base": (6, THETA),
        "llama.context_length": (10, 512),
        "tokenizer.ggml.model": (8, "gpt2"),
        "tokenizer.ggml.pre": (8, "smollm"),
        "tokenizer.ggml.tokens": (9, 8, TOKENS),
        "tokenizer.ggml.token_type": (9, 5, [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS))),
        "tokenizer.ggml.merges": (9, 8, MERGES),
        "tokenizer.chat_template": (8, "{{ messages[0]['content'] }}"),
    }
    found |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in found.items() if value is not None}


def stored_row(values, kind):
    """The bytes of one row, and the float32 numbers that they mean."""
    if kind in ("F32", "F16"):
        exact = values.astype(np.float32 if kind == "F32" else np.float16)
        return exact.tobytes(), exact.astype(np.float32)
    raw, means = b"", []
    for block in values.reshape(-1, 32):
        if kind == "Q8_0":
            lowest, scale = np.float32(0), np.float16(np.abs(block).max() / 127)
            steps = np.rint(block / np.float32(scale)).clip(-127, 127).astype(int)
            raw += struct.pack("<e32b", scale, *steps)
        else:
            lowest, scale = np.float16(block.min()), np.float16((block.max() - block.min()) / 15)
            steps = np.rint((block - np.float32(lowest)) / np.float32(scale)).clip(0, 15).astype(int)
            raw += struct.pack("<ee16B", scale, lowest, *(steps[:16] + 16 * steps[16:]))
        means.append(np.float32(scale) * steps.astype(np.float32) + np.float32(lowest))
    return raw, np.concatenate(means)


def stored(tensor, kind):
    """(type, sizes, bytes) of a tensor, and what it reads as."""
    rows = [stored_row(row, kind) for row in tensor.reshape(-1, tensor.shape[-1])]
    raw, means = b"".join(row for row, _ in rows), np.stack([mean for _, mean in rows])
    return (KINDS[kind], tensor.shape[::-1], raw), means.reshape(tensor.shape)


def interleaved(tensor, heads):
    """Rows of a query or key projection as llama.cpp has them: the two of each rotated pair side by side."""
    size = len(tensor) // heads
    order = [
        head * size + half * size // 2 + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]
    return tensor[order]


def _string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(kind, value):
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    return _string(value) if kind == 8 else struct.pack(f"<{codes.get(kind, 'I')}", value)


def write_gguf(path, described, tensors, alignment=32, version=3):
    """Metadata as those of `metadata`, tensors name -> (type, sizes, bytes)."""
    if alignment != 32:
        described = {**described, "general.alignment": (4, alignment)}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(described))
    for name, (kind, *value) in described.items():
        head += _string(name) + struct.pack("<I", kind)
        if kind == 9:
            inner, values = value
            head += struct.pack("<IQ", inner, len(values)) + b"".join(_value(inner, one) for one in values)
        else:
            head += _value(kind, *value)
    body = b""
    for name, (kind, sizes, raw) in tensors.items():
        body += b"\0" * (-len(body) % alignment)
        head += _string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, len(body))
        body += raw
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + body)
    return path


@functools.cache
def tiny_llama(tied=True):
    """GGUF tensors of a random Llama, and the state dict of transformers' own with the numbers that they mean."""
    generator, tensors, state = np.random.default_rng(0), {}, {}

    def add(source, target, shape, kind, heads=None):
        values = generator.normal(size=shape) * (0.3 if len(shape) == 2 else 0.1) + (len(shape) == 1)
        tensor, means = stored(values, kind)
        tensors[f"{source}.weight"] = stored(interleaved(values, heads), kind)[0] if heads else tensor
        state[f"{target}.weight"] = torch.from_numpy(means)

    add("token_embd", "model.embed_tokens", (len(TOKENS), WIDTH), "Q8_0")
    add("output_norm", "model.norm", (WIDTH,), "F32")
    if not tied:
        add("output", "lm_head", (len(TOKENS), WIDTH), "F16")
    for layer in range(LAYERS):
        for source, (target, shape) in INNER.items():
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(source)
            kind = "F32" if len(shape) == 1 else "Q4_1"
            add(f"blk.{layer}.{source}", f"model.layers.{layer}.{target}", shape, kind, heads)
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return tensors, state


def transformers_llama(state, tied=True):
    """transformers' Llama with these weights."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=EPS,
        rope_theta=THETA,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model
