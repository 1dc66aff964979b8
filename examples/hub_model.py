"""SparseD under the hub's own Dream and its own sampler, which know nothing of it (transformers 4.46 to 4.57).

python examples/hub_model.py
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

from sparsed import SparseDConfig, sparsify


def main(name: str = "Dream-org/Dream-v0-Instruct-7B", gen_length: int = 128, sentences: int = 500) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = AutoModel.from_pretrained(name, trust_remote_code=True, torch_dtype="auto").eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    chat = [{"role": "user", "content": "Why is the sky blue?\n" + "The sky is blue today. " * sentences}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    config = SparseDConfig(dense_answer=True)
    with sparsify(model, config, steps=gen_length, gen_length=gen_length) as run:
        out = model.diffusion_generate(ids.to(device), max_new_tokens=gen_length, steps=gen_length)
    sequences = getattr(out, "sequences", out)  # by the model's `return_dict_in_generate`
    print(tokenizer.decode(sequences[0, ids.shape[1] :].tolist(), skip_special_tokens=True))
    print(f"sparse steps read {run.density:.0%} of the pairs, by {run.backend}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:2])
