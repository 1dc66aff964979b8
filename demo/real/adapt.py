"""Adapt a converted checkpoint to masked diffusion in Dream's convention, in which row t predicts token t + 1:

    python -m demo.real.adapt --checkpoint runs/base --tokens runs/text/train.bin.xz --out runs/adapted

From the first step on, nearly every step mixes long and short sequences. Run again with the same --out, it continues
where it last saved, and ends as if it had never stopped (on a GPU: up to rounding). Writes the checkpoint, losses.jsonl
(nats per token, also of --held_out), run.json (settings, and command, versions and machine of every call) and
training.safetensors, from which it continues.
"""

import argparse
import json
import math
import sys
from dataclasses import fields

import numpy as np
import torch

from demo.real.batches import Recipe
from demo.real.folders import copy_tokenizer, folder
from demo.real.text import read_ids
from demo.real.training import Trainer
from sparsed.console.endings import blame, guarded
from sparsed.console.environment import call_of
from sparsed.console.files import write_json
from sparsed.console.parser import Parser, add_value
from sparsed.console.readers import device, number_in, path, whole
from sparsed.console.streams import tell
from sparsed.models import load_model
from sparsed.models.loading import resolve_device

PROGRAM = "python -m demo.real.adapt"
LENGTHS = "1024:50,2048:25,4096:15,8192:10"


def lengths(words: str) -> dict[int, float]:
    """A reader of LENGTH:SHARE, separated by commas."""
    pairs = (word.partition(":") for word in words.split(","))
    return {whole(2, 2**20)(length): number_in(0, math.inf, above=True)(share or "1") for length, _, share in pairs}


def main(argv: list[str] | None = None) -> int:
    """Adapt with these words (None: the process's own); returns the exit code."""
    advice = "try a smaller --at_once"
    return guarded(lambda: _adapt(_parse(argv)), PROGRAM, advice=advice, ending=argv is None)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__)
    for name, read, metavar, text in (
        ("--checkpoint", folder, "FOLDER", "the checkpoint to adapt, in Dream's format"),
        ("--tokens", path, "FILE", "ids to train on, from demo.real.text"),
        ("--out", path, "FOLDER", "the adapted checkpoint"),
    ):
        parser.add_argument(name, type=read, metavar=metavar, required=True, help=text)
    parser.add_argument("--held_out", type=path, metavar="FILE", help="ids to measure the loss on")
    add_value(parser, "--steps", "steps of all calls together", 3600, type=whole(1))
    text = "most minutes of this call; it saves and can be called again"
    add_value(parser, "--minutes", text, math.inf, type=number_in(0, math.inf))
    text = "tokens of a sequence, and the share of the batches that have them: LENGTH:SHARE, separated by commas"
    add_value(parser, "--lengths", text, LENGTHS, type=lengths)
    add_value(parser, "--batch_tokens", "tokens per step", 65536, type=whole(2))
    add_value(parser, "--at_once", "tokens per batch; a step has several batches", 16384, type=whole(2))
    add_value(parser, "--lr", "highest learning rate", 5e-4, type=number_in(0, 1, above=True))
    add_value(parser, "--warmup", "steps in which the rate rises", 100, type=whole(0))
    add_value(parser, "--spans", "share of the sequences masked only in a span", 0.25, type=number_in(0, 1))
    add_value(parser, "--save_every", "save every N steps", 500, type=whole(1))
    add_value(parser, "--seed", "random seed of windows and masks", 0, type=whole(0))
    add_value(parser, "--device", "auto, cuda, cuda:N or cpu", "auto", type=device)
    args = parser.parse_args(argv)
    args.parser = parser
    return args


def _adapt(args: argparse.Namespace) -> None:
    with blame(args, "--checkpoint"):
        model = load_model(args.checkpoint, device="cpu", dtype="float32").to(resolve_device(args.device)).train()
        if model.family != "dream" or args.checkpoint.resolve() == args.out.resolve():
            raise ValueError("must be in Dream's format, and a different folder than --out")
    ids = _ids(args, "--tokens", model.config.vocab_size)
    held_out = None if args.held_out is None else _ids(args, "--held_out", model.config.vocab_size)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    trainer = Trainer(args.checkpoint, args.out, model, recipe, ids, held_out)
    with blame(args, "--out"):
        trainer.restore()
        args.out.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(args.checkpoint, args.out)
        _note_call(trainer)
    with blame(args, "--lr", (FloatingPointError,)):
        trainer.run(args.minutes, args.save_every)
    tell(f"written to {args.out}: step {trainer.step} of {args.steps}")


def _note_call(trainer: Trainer) -> None:
    """Add this call to the run's record; a new run begins a new one."""
    file, device = trainer.out / "run.json", trainer.model.device
    calls = json.loads(file.read_text(encoding="utf-8"))["calls"] if trainer.step and file.is_file() else []
    call = call_of(PROGRAM, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    write_json(file, {**trainer.made_from, "calls": [*calls, call | {"first_step": trainer.step}]})


def _ids(args: argparse.Namespace, option: str, vocabulary: int) -> np.ndarray:
    with blame(args, option):
        ids = read_ids(getattr(args, option.removeprefix("--")), vocabulary)
        if len(ids) < max(args.lengths):
            raise ValueError(f"must hold at least {max(args.lengths)} ids, as many as the longest of --lengths")
    return ids


if __name__ == "__main__":
    sys.exit(main())
