"""Full and sparse steps of a demo checkpoint in turn on this machine, so that a drifting speed affects both.

    python -m benchmarks.demo_steps --family llada --out benchmarks/results/demo-steps-llada.json

The 4k preset, 32 new tokens, the scripts' default select and block size. Two copies of the model: one runs sparse steps
under `sparsify`, the other full ones.
"""

import statistics
import time

import torch
import torch.nn.functional as F

from sparsed import SparseDConfig, load_model, load_tokenizer, sparsify
from sparsed.console.readers import whole
from sparsed.prompts import build_prompt, demo_path
from sparsed.run import synchronize

from .common import build_parser, new_record, parse_arguments, save

NEW_TOKENS = 32


@torch.no_grad()
def measure(family: str, pairs: int) -> dict:
    """Seconds of `pairs` sparse and full steps, sparse first, after the step that selects the blocks."""
    folder = str(demo_path(family))
    sparse_model, full_model = load_model(folder), load_model(folder)
    prompt = build_prompt("4k", load_tokenizer(folder))
    ids = torch.tensor([prompt.input_ids], device=full_model.device)
    canvas = F.pad(ids, (0, NEW_TOKENS), value=full_model.config.mask_token_id)
    # as many rows of logits as the first step of a generation reads
    rows = torch.arange(len(prompt.input_ids), canvas.shape[1], device=ids.device)
    samples = {"sparse": [], "full": []}

    def step(model: torch.nn.Module) -> float:
        synchronize(ids.device)
        start = time.perf_counter()
        model(canvas, logit_rows=rows)
        synchronize(ids.device)
        return time.perf_counter() - start

    with sparsify(sparse_model, SparseDConfig(skip=0), steps=pairs + 1, gen_length=NEW_TOKENS) as run:
        step(sparse_model), step(full_model)
        for _ in range(pairs):
            samples["sparse"].append(step(sparse_model))
            samples["full"].append(step(full_model))
    sparse, full = (statistics.median(samples[kind]) for kind in ("sparse", "full"))
    return {
        "device": full_model.device,
        "dtype": full_model.dtype,
        "prompt_tokens": len(prompt.input_ids),
        "full_step_seconds": full,
        "sparse_step_seconds": sparse,
        "speedup": full / sparse,
        "density": run.density,
        "backend": run.backend,
        "samples": samples,
    }


def main() -> None:
    parser = build_parser("demo_steps", __doc__)
    parser.add_argument("--pairs", type=whole(1), default=15, metavar="N", help="(default: %(default)s)")
    args = parse_arguments(parser, None)
    found = measure(args.family, args.pairs)
    record = new_record(parser, args, found.pop("device"), found.pop("dtype")) | found
    save(args.out, record)
    shown = ("full_step_seconds", "sparse_step_seconds", "speedup", "density")
    print(args.family, *(f"{name} {record[name]:.3f}" for name in shown))


if __name__ == "__main__":
    main()
