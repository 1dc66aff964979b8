"""Measure the demo checkpoints on short word problems and on the presets: python -m demo.evaluate --out FILE.json

Every problem has numbers that training never saw. An answer is right if the whole generated text, up to its end token,
is the expected sentence. Decoding is greedy. For long prompts there is `python -m sparsed.evaluation`.
"""

import argparse
import itertools
import json
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from demo.tokenizer import write_json
from sparsed import sampling
from sparsed.chat import encode_chat
from sparsed.config import SparseDConfig
from sparsed.console.readers import whole
from sparsed.models import load_model, load_tokenizer
from sparsed.prompts import answer_found, build_prompt, language

TASKS = ("word_problems", "presets")
SEED = 1_000_000
# a word problem is two blocks of 32 long: keep half of its blocks, as in the paper's commands
PROBLEM_MODES = {"origin": None, "sparsed": SparseDConfig(skip=0.2, select=0.5, block_size=32)}
PRESET_MODES = {
    "short_context": {**PROBLEM_MODES, "default": SparseDConfig()},
    "4k": {"origin": None, "default": SparseDConfig()},
}
PRESET_LENGTHS = (32, 128)


@dataclass(frozen=True)
class Question:
    """A prompt's ids and the exact answer."""

    input_ids: list[int]
    answer: str


def problem_questions(tokenizer, count: int) -> list[Question]:
    """Word problems with triples of numbers that training never saw."""
    rng = random.Random(SEED)
    problems = [language().problem(rng, held_out=True) for _ in range(count)]
    return [Question(encode_chat(tokenizer, text), answer) for text, answer, _ in problems]


def equal_lengths(questions: list[Question], tokens: int) -> Iterator[list[Question]]:
    """Batches of prompts of one length, at most `tokens` tokens each, so that nothing is padded."""
    groups = defaultdict(list)
    for question in questions:
        groups[len(question.input_ids)].append(question)
    for length, group in groups.items():
        size = max(1, tokens // length)
        yield from (group[i : i + size] for i in range(0, len(group), size))


def generate(model: nn.Module, prompts: Tensor, config: SparseDConfig | None, length: int) -> Tensor:
    """The generated region [B, length], greedy, one denoising step per token."""
    settings = sampling.settings_for(model.family, gen_length=length, steps=length, block_length=32)
    return sampling.generate(model, prompts, settings, config=config, backend="gather")[:, prompts.shape[1] :]


def answer_text(tokenizer, ids: list[int]) -> str:
    """The generated text up to its first end token, without special tokens."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def accuracy(model: nn.Module, tokenizer, questions: list[Question], config, options) -> dict[str, float]:
    """Share of exact answers in percent, and the seconds it took."""
    right, start = 0, time.perf_counter()
    for batch in equal_lengths(questions, options.tokens):
        prompts = torch.tensor([question.input_ids for question in batch], device=model.device)
        for question, ids in zip(batch, generate(model, prompts, config, options.seq_len).tolist(), strict=True):
            right += answer_text(tokenizer, ids) == question.answer
    seconds = round(time.perf_counter() - start, 1)
    return {"exact_percent": round(100 * right / len(questions), 2), "seconds": seconds}


def check_presets(model: nn.Module, tokenizer) -> dict[str, dict[str, dict]]:
    """The bundled prompts that the models were made for, at the scripts' default block size."""
    results = {}
    for preset, modes in PRESET_MODES.items():
        prompt = build_prompt(preset, tokenizer)
        ids = torch.tensor([prompt.input_ids], device=model.device)
        results[preset] = {}
        for (mode, config), length in itertools.product(modes.items(), PRESET_LENGTHS):
            text = answer_text(tokenizer, generate(model, ids, config, length)[0].tolist())
            found = answer_found(text, prompt.expected)
            results[preset][f"{mode} {length}"] = {"text": text, "answer_found": found}
    return results


def evaluate(family: str, options: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """(task, its figures) of one checkpoint."""
    folder = options.checkpoints / family
    model, tokenizer = load_model(folder, device=options.device), load_tokenizer(folder)
    if "presets" in options.tasks:
        yield "presets", check_presets(model, tokenizer)
    if "word_problems" in options.tasks:
        questions = problem_questions(tokenizer, options.questions)
        results = {"questions": len(questions), "seed": SEED, "seq_len": options.seq_len, "steps": options.seq_len}
        for mode, config in PROBLEM_MODES.items():
            settings = {} if config is None else vars(config)
            results[mode] = accuracy(model, tokenizer, questions, config, options) | settings
        yield "word_problems", results


def environment(device: str) -> dict[str, str]:
    on_gpu = torch.cuda.is_available() and device != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, "python": platform.python_version(), **versions}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=("dream", "llada"), default=["dream", "llada"])
    parser.add_argument("--checkpoints", type=Path, default=Path(__file__).parent, help="folder of both")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; other entries in it stay")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--questions", type=whole(1), default=200, help="word problems")
    parser.add_argument("--seq_len", type=whole(1), default=32, help="new tokens, and denoising steps")
    parser.add_argument("--tokens", type=whole(1), default=8192, help="tokens per batch")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    run = {"command": " ".join(["python -m demo.evaluate", *sys.argv[1:]]), "environment": environment(options.device)}
    for family in options.families:
        for task, figures in evaluate(family, options):
            print(f"{family} {task}: {figures}", flush=True)
            results.setdefault(family, {})[task] = figures | run
            write_json(options.out, results)


if __name__ == "__main__":
    main()
