"""Whole tiny checkpoints for the scripts: random weights, a byte-level tokenizer and the family's chat template."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.illada_twin import ILLADA, random_illada
from tests.helpers.standins import DREAM, LLADA, tiny_dream, tiny_llada

SPECIALS = {
    "dream": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"],
    "llada": [
        "<|startoftext|>",
        "<|endoftext|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|mdm_mask|>",
    ],
    "illada": ["<s>", "<pad>", "</s>", "<[MASK]>"],
}
TEMPLATES = {
    "dream": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llada": "<|startoftext|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n",
    "illada": "<s>{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
}
BYTES = 256


def special_id(family: str, token: str) -> int:
    """The special tokens stand behind the 256 bytes; the mask is the last."""
    return BYTES + SPECIALS[family].index(token)


def tiny_folder(folder: Path, family: str, **changes) -> Path:
    """A random model of `family` with its tokenizer; `changes` go into config.json."""
    eos, vocabulary = special_id(family, "<|endoftext|>"), BYTES + len(SPECIALS[family])
    ids = {"vocab_size": vocabulary, "mask_token_id": vocabulary - 1, "eos_token_id": eos, "pad_token_id": eos}
    if family == "llada":
        ids |= {"embedding_size": vocabulary, "eot_token_id": special_id(family, "<|eot_id|>")}
    base, make = (DREAM, tiny_dream) if family == "dream" else (LLADA, tiny_llada)
    write_checkpoint(folder, base | ids | changes, make(**(ids | changes)).state_dict())
    _tokenizer(family).save(str(folder / "tokenizer.json"))
    described = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATES[family]}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def tiny_illada_folder(folder: Path, **changes) -> Path:
    """A random iLLaDA with its tokenizer, which alone knows the mask, as in the published one; `changes` as above."""
    vocabulary = BYTES + len(SPECIALS["illada"])
    eos, pad = (special_id("illada", token) for token in ("</s>", "<pad>"))
    config = ILLADA | {"vocab_size": vocabulary, "eos_token_id": eos, "pad_token_id": pad} | changes
    write_checkpoint(folder, config, random_illada(config))
    _tokenizer("illada").save(str(folder / "tokenizer.json"))
    described = {"eos_token": "</s>", "pad_token": "<pad>", "chat_template": TEMPLATES["illada"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def _tokenizer(family: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS[family]])
    return tokenizer
