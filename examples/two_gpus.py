"""One model on two GPUs: each of two processes has half of the heads of every layer (tensor parallelism).

    torchrun --nproc_per_node 2 examples/two_gpus.py GSAI-ML/LLaDA-1.5

Without a checkpoint it takes the bundled demo LLaDA. Without two GPUs both processes compute on the CPU.
"""

import os
import sys

import torch
import torch.distributed as dist

from sparsed import SparseDConfig, llada_generate, load_model, load_tokenizer
from sparsed.prompts import build_document, demo_path


def main(path: str = str(demo_path("llada")), length: int = 1024, steps: int = 32) -> None:
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # by NCCL between GPUs, by gloo between CPUs
    model = load_model(path, device="cuda" if gpus else "cpu", tensor_parallel=dist.group.WORLD)
    tokenizer = load_tokenizer(path)
    _, prompt = build_document(tokenizer, length, seed=0)
    ids = torch.tensor([prompt.input_ids], device=model.device)
    config = SparseDConfig(block_size=32, dense_answer=True)
    # every process makes the same calls, and gets all tokens
    out = llada_generate(model, ids, gen_length=32, steps=steps, block_length=32, config=config)
    if dist.get_rank() == 0:
        print(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:2])
