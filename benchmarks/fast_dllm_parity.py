"""Whether our sampler writes what Fast-dLLM's own LLaDA and samplers write: tokens and forwards, tiny random weights.

    python -m benchmarks.fast_dllm_parity --reference DIR --out FILE.json

DIR is as for benchmarks.generation; its code needs transformers 4.46. Full attention in
float32, greedy: no cache, prefix and dual, with thresholds and without, several block lengths, prompts and seeds.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sparsed import llada_generate
from sparsed.console.environment import environment
from sparsed.console.files import write_json
from sparsed.console.parser import Parser
from sparsed.console.readers import path
from sparsed.models import LLaDAConfig, LLaDAModel

from .fast_dllm import NEEDED
from .fast_dllm_worker import build
from .reference import check_reference

MASK, VOCABULARY, TOKENS = 96, 97, 90  # prompts have ids below the last
SHAPE = {
    "vocab_size": VOCABULARY,
    "d_model": 96,
    "n_heads": 3,
    "n_kv_heads": 3,
    "n_layers": 3,
    "mlp_hidden_size": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_sequence_length": 512,
    "mask_token_id": MASK,
    "include_bias": False,
}
SEEDS, PROMPTS, THRESHOLDS = range(10), (23, 37), (None, 0.05, 0.2, 0.9)
CACHES = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}
BLOCKS = ((24, 8), (32, 16), (12, 12))  # new tokens, and tokens of a block


def models() -> tuple[torch.nn.Module, LLaDAModel]:
    """Theirs and ours, with the same weights."""
    theirs = build("llada", SHAPE, "cpu").float()
    theirs.model.transformer.ff_out.weight[MASK] = 0  # the mask is never the likeliest token
    ours = LLaDAModel(LLaDAConfig.from_dict(SHAPE | {"embedding_size": VOCABULARY}))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval()


def cases() -> Iterator[tuple]:
    """Seed, prompt length, cache, (new tokens, block length), threshold, steps.

    With fewer steps than tokens and a threshold, the two differ: theirs commits at least one token per step, ours the
    block's share. So fewer steps have no threshold.
    """
    for seed, length, cache, sizes, threshold in product(SEEDS, PROMPTS, CACHES, BLOCKS, THRESHOLDS):
        fewer = threshold is None and seed % 2
        yield seed, length, cache, sizes, threshold, sizes[0] // 2 if fewer else sizes[0]


@torch.no_grad()
def compare() -> dict[str, Any]:
    """In how many of all cases the tokens are the same, and the number of forwards; and the largest gap."""
    samplers = importlib.import_module("generate")
    theirs, ours = models()
    count, same, as_many, largest = 0, 0, 0, 0
    for seed, length, cache, (new_tokens, block_length), threshold, steps in cases():
        prompt = torch.randint(0, TOKENS, (1, length), generator=torch.Generator().manual_seed(seed))
        shared = {"steps": steps, "gen_length": new_tokens, "block_length": block_length, "threshold": threshold}
        written, forwards = getattr(samplers, CACHES[cache])(theirs, prompt, mask_id=MASK, **shared)
        ran: list[bool] = []
        own = llada_generate(ours, prompt, cache=cache, on_step=lambda step, ran=ran: ran.append(step.ran), **shared)
        count, same = count + 1, same + torch.equal(written, own)
        as_many, largest = as_many + (sum(ran) == forwards), max(largest, forwards - sum(ran))
    return {"generations": count, "same_tokens": same, "as_many_forwards": as_many, "most_forwards_saved": largest}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.fast_dllm_parity", description=__doc__)
    parser.add_argument("--reference", type=Path, metavar="DIR", required=True, help="folder of Fast-dLLM's code")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="the record")
    args = parser.parse_args(argv, argparse.Namespace(family="llada"))
    check_reference(parser, args, "Fast-dLLM's code", NEEDED)
    sys.path[:0] = [str(args.reference / "llada")]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = compare()
    record = {
        "command": f"{parser.prog} --reference DIR",
        "environment": environment(torch.device("cpu"), torch.float32),
    }
    write_json(args.out, record | {"shape": SHAPE} | found)
    print(found)


if __name__ == "__main__":
    main()
