"""The cost of watching: whole runs of a demo checkpoint with --show and with the progress bar, in turn.

    python -m benchmarks.show --family llada --out benchmarks/results/show-llada-cpu.json

The short_context preset and the scripts' own settings: the shorter a step, the more the drawing weighs. Stderr is a
pseudo-terminal, which another process empties. One thread: with a model this small, two threads only wait for each
other. Seconds are wall time, including what a run's record leaves out.
"""

import contextlib
import os
import pty
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sparsed import load_model, load_tokenizer
from sparsed.cli.arguments import parse
from sparsed.cli.families import FAMILIES
from sparsed.cli.progress import terminal
from sparsed.cli.running import Job, run_once
from sparsed.console.readers import whole
from sparsed.prompts import build_prompt, demo_path

from .common import build_parser, new_record, parse_arguments, save, summary


@contextlib.contextmanager
def pseudo_terminal() -> Iterator[None]:
    """Stderr is a terminal that accepts everything, like a real one in another process."""
    main, child = pty.openpty()
    with subprocess.Popen(["cat"], stdin=main, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as reader:
        os.close(main)
        with open(child, "w", encoding="utf-8") as stream, contextlib.redirect_stderr(stream):
            yield
        reader.terminate()


def seconds_of(job: Job, show: bool) -> float:
    """Seconds of one run of SparseD."""
    job = replace(job, args=replace(job.args, show=show))
    begun = time.perf_counter()
    run_once(job, "sparsed")
    return time.perf_counter() - begun


def measure(job: Job, pairs: int) -> dict[str, Any]:
    """`pairs` runs with and without --show, in turn, after an untimed one of each."""
    samples: dict[bool, list[float]] = {True: [], False: []}
    with pseudo_terminal():
        if terminal() is None:
            raise RuntimeError("TERM is a terminal that --show cannot draw on")
        for number in range(pairs + 1):
            for show in samples:
                seconds = seconds_of(job, show)
                if number:
                    samples[show].append(seconds)
    shown, plain = summary(samples[True]), summary(samples[False])
    return {"shown_seconds": shown, "plain_seconds": plain, "cost": shown["median"] / plain["median"] - 1}


def main(argv: list[str] | None = None) -> None:
    parser = build_parser("show", __doc__)
    parser.add_argument("--pairs", type=whole(1), default=15, metavar="N", help="(default: %(default)s)")
    args = parse_arguments(parser, argv)
    torch.set_num_threads(1)
    folder = str(demo_path(args.family))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompt = build_prompt("short_context", tokenizer)
    job = Job(model, tokenizer, prompt.input_ids, parse(FAMILIES[args.family], ["--demo"]))
    sampler = job.args.sampler
    record = new_record(parser, args, model.device, model.dtype)
    record |= {"prompt_tokens": len(prompt.input_ids), "new_tokens": sampler.gen_length, "steps": sampler.steps}
    record |= measure(job, args.pairs)
    save(args.out, record)
    print(f"{args.family}: watching costs {record['cost']:.1%} of {record['plain_seconds']['median']:.2f} s")


if __name__ == "__main__":
    main()
