"""The demo tokenizers: a byte-level BPE over the words of `prompts/`, written in the file format of each family."""

import json
import os
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sparsed.models.tokenizer import QWEN2_PIECES
from sparsed.prompts import Language

VOCABULARY = 2560
REPLIES = ("It is x.", "They are x and x.")  # the evaluation's answers, see `sparsed.evaluation.puzzles.reply`
SPECIALS = {
    "dream": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
    "llada": (
        "<|startoftext|>",
        "<|endoftext|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|mdm_mask|>",
    ),
}
TEMPLATES = {
    "dream": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llada": (
        "{{ '<|startoftext|>' }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
        " + '<|eot_id|>' }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
}
CONFIGS = {
    "dream": {
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    },
    "llada": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
}


def corpus(language: Language) -> list[str]:
    """Every word after a space equally often, and the templates: the BPE then makes each word one token."""
    words = [f" {word}" for group in language.words.values() for word in group]
    templates = [language.filler["intro"], *language.filler["sentences"]]
    for kind in language.kinds.values():
        templates += [*kind["facts"], *("Question: " + question for question in kind["questions"]), kind["answer"]]
    templates += [problem["text"] for problem in language.problems["problems"]] + [language.problems["answer"]]
    tasks = language.tasks
    for group in (tasks["intro"], tasks["question"], tasks["needle"], tasks["person"]):
        templates += group.values()
    templates += [*tasks["noise"], *REPLIES]
    plain = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    plain += [" And and and.", "x.\n\nQuestion:", "\n\n"]
    starts = [word.capitalize() for sentence in templates for word in sentence.split() if word.isalpha()]
    words += language.words["first"]  # a word problem may begin with one
    return words * 8 + (templates + plain) * 16 + starts * 4


def train_bpe(language: Language, vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` tokens; all 256 bytes are among them, so that any text encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(language), trainer)
    return tokenizer


def write_tokenizer(family: str, tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Write the tokenizer files of `family` into `folder`; returns the special tokens' ids, which follow the BPE's."""
    folder.mkdir(parents=True, exist_ok=True)
    first = tokenizer.get_vocab_size()
    specials = {token: first + index for index, token in enumerate(SPECIALS[family])}
    if family == "dream":
        tokenizer.model.save(str(folder))
    else:
        whole = Tokenizer.from_str(tokenizer.to_str())
        whole.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
        whole.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(index): {"content": token, **flags} for token, index in specials.items()},
        "additional_special_tokens": [],
        "chat_template": TEMPLATES[family],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072 if family == "dream" else 4096,
        **CONFIGS[family],
    }
    write_json(folder / "tokenizer_config.json", config)
    return specials


def write_json(file: Path, content: dict) -> None:
    """Write `content` whole or not at all."""
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)
