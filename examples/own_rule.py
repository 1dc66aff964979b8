"""A selection rule of your own: blocks count less the farther they lie from the query.

    python examples/own_rule.py

A rule gets a layer's queries, a function that computes the block scores, the grid of blocks and the share to keep. It
returns a `Pattern`. `isolated_top_k` makes the paper's of any scores. The model is the bundled demo LLaDA, on a CPU.
"""

from collections.abc import Callable

import torch

from sparsed import SparseDConfig, llada_generate, load_model, load_tokenizer
from sparsed.blocks import BlockGrid, Pattern
from sparsed.prompts import build_document, demo_path
from sparsed.selection import SPARSED, Rule, isolated_top_k


def near_first(q: torch.Tensor, score: Callable[[], torch.Tensor], grid: BlockGrid, select: float) -> Pattern:
    place = torch.arange(grid.n_blocks, device=q.device)
    return isolated_top_k(score() / (1 + (place[:, None] - place).abs()), grid, select)


def main(length: int = 1024) -> None:
    model, tokenizer = load_model(demo_path("llada")), load_tokenizer(demo_path("llada"))
    _, prompt = build_document(tokenizer, length, seed=0)
    ids = torch.tensor([prompt.input_ids], device=model.device)
    config = SparseDConfig(block_size=32, dense_answer=True)
    for name, rule in {"the paper's rule": SPARSED, "near blocks first": Rule(near_first)}.items():
        out = llada_generate(model, ids, gen_length=32, steps=32, block_length=32, config=config, rule=rule)
        print(f"{name}: {tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
