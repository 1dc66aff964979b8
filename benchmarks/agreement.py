"""Whether selecting later changes the blocks, on a demo checkpoint: the first step's choice and the last full one's.

    python -m benchmarks.agreement --family llada --out FILE.json

Retrieval, tracing and question tasks of the evaluation at 4,096 tokens, 64 new tokens in 64 greedy steps, the default
select, skip and block size. Full attention runs throughout. Both choices are compared with the attention of later
steps: the share of it that the kept blocks hold, mean over layers and heads, of all queries and of the answer's. For
random blocks, this share is the density.
"""

from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsed import SparseDConfig, load_model, load_tokenizer, sparsify
from sparsed.blocks import Pattern
from sparsed.console.readers import whole
from sparsed.evaluation.tasks import TASKS, make_sample
from sparsed.models.common import DiffusionLM
from sparsed.pictures import common
from sparsed.prompts import demo_path
from sparsed.sampling import generate, settings_for
from sparsed.sampling.common import Step
from sparsed.watching import recall, watched

from .common import build_parser, new_record, parse_arguments, save

SOLVED = (
    "niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multivalue", "niah_multiquery", "vt",
    "qa_1",
)  # fmt: skip
PROMPT, NEW_TOKENS, STEPS, BLOCK_LENGTH = 4096, 64, 64, 32
CONFIG = SparseDConfig()
EARLY, LATE = 0, CONFIG.n_full(STEPS) - 1
LATER = (LATE + 1, 25, 38, 51, STEPS - 1)  # sparse steps

Layers = list[tuple[Tensor, Pattern]]  # block scores [1, Hq, nQ, nK] and kept blocks of every layer


@torch.no_grad()
def watch(model: DiffusionLM, input_ids: Tensor) -> dict[int, Layers]:
    """Scores and selection of each counting step in a generation with full attention; input_ids [1, T]."""
    seen: Layers = []
    found: dict[int, Layers] = {}
    rule = watched(lambda scores, pattern: seen.append((scores, pattern)))
    settings = settings_for(model.family, gen_length=NEW_TOKENS, steps=STEPS, block_length=BLOCK_LENGTH)
    # every step is the first of a run of two: it selects, and the second never comes
    with sparsify(model, replace(CONFIG, skip=0), steps=2, gen_length=NEW_TOKENS, rule=rule) as run:

        def begin_anew(step: Step) -> None:
            if step.index in (EARLY, LATE, *LATER):
                found[step.index] = list(seen)
            seen.clear()
            run.reset()

        generate(model, input_ids, settings, on_step=begin_anew)
    return found


def held(scores: Tensor, pattern: Pattern, first: int) -> float:
    """`recall` of the query blocks from `first` on."""
    later = torch.cat((torch.zeros_like(scores[:, :, :first]), scores[:, :, first:]), 2)
    return recall(later, pattern).item()


def compare(found: dict[int, Layers]) -> dict[str, Any]:
    """Both choices of one sample, means over layers: the share of the late choice's blocks that the early one also has,
    and, for each later step, the share of its attention that each choice holds."""
    early, late = ([pattern for _, pattern in found[step]] for step in (EARLY, LATE))
    answer = early[0].grid.parts[1].start  # its first block
    shares = [common(one.as_mask(), other.as_mask()).mean().item() for one, other in zip(late, early, strict=True)]
    record: dict[str, Any] = {"common": fmean(shares)}
    for name, patterns in (("early", early), ("late", late)):
        for queries, first in (("all", 0), ("answer", answer)):
            record[f"{name}_{queries}"] = [
                fmean(held(scores, kept, first) for kept, (scores, _) in zip(patterns, found[step], strict=True))
                for step in LATER
            ]
    return record


def measure(model: DiffusionLM, tokenizer: Any, count: int) -> dict[str, Any]:
    """The samples of every task, and their means."""
    samples = []
    for task in SOLVED:
        for index in range(count):
            sample = make_sample(TASKS[task], tokenizer, PROMPT, 0, index)
            found = watch(model, torch.tensor([sample.input_ids], device=model.device))
            samples.append({"id": sample.id, **compare(found)})
        print(f"{task}: done", flush=True)
    density = found[LATE][0][1].density.item()  # of any sample: it depends only on the length
    means = {name: fmean(np.ravel([sample[name] for sample in samples])) for name in samples[0] if name != "id"}
    return {"later_steps": LATER, "density": density, "means": means, "samples": samples}


def main(argv: list[str] | None = None) -> None:
    parser = build_parser("agreement", __doc__)
    parser.add_argument("--samples", type=whole(1), default=4, metavar="N", help="of each task (default: %(default)s)")
    args = parse_arguments(parser, argv)
    folder = str(demo_path(args.family))
    model = load_model(folder, dtype="float32")
    record = new_record(parser, args, model.device, model.dtype)
    record |= measure(model, load_tokenizer(folder), args.samples)
    save(args.out, record)
    print(args.family, *(f"{name} {value:.3f}" for name, value in record["means"].items()))


if __name__ == "__main__":
    main()
