"""The selected blocks of a run as FlexAttention's BlockMask, for kernels of your own.

    python examples/flex_block_mask.py

It takes every layer's pattern from a run of the bundled demo LLaDA on a CPU, and attends with the first one.
"""

import torch
from torch.nn.attention.flex_attention import flex_attention

from sparsed import SparseDConfig, llada_generate, load_model, load_tokenizer
from sparsed.prompts import build_document, demo_path
from sparsed.watching import watched


def main(length: int = 1024) -> None:
    model, tokenizer = load_model(demo_path("llada")), load_tokenizer(demo_path("llada"))
    _, prompt = build_document(tokenizer, length, seed=0)
    ids = torch.tensor([prompt.input_ids], device=model.device)
    patterns = []  # of every layer in turn, in the step that selects the blocks
    rule = watched(lambda scores, pattern: patterns.append(pattern))
    llada_generate(model, ids, gen_length=32, steps=2, block_length=32, config=SparseDConfig(), rule=rule)
    for layer, pattern in enumerate(patterns):
        print(f"layer {layer}: {pattern.block_mask().sparsity():.0f} % of the block pairs are left out")
    sizes = model.config.sizes
    shape = (1, sizes.heads, ids.shape[1] + 32, sizes.width // sizes.heads)
    q, k, v = (torch.randn(shape, device=model.device) for _ in range(3))
    attend = torch.compile(flex_attention, dynamic=True) if q.is_cuda else flex_attention
    print("attended:", tuple(attend(q, k, v, block_mask=patterns[0].block_mask()).shape))


if __name__ == "__main__":
    main()
