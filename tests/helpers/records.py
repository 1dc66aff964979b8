"""Records as the scripts write them, made up: for pages about runs that no test could wait for."""

import base64

import numpy as np

WORDS = " The old lighthouse keeper hides the spare key of the boat house under a loose stone by the door .".split(" ")
END = "<|eot_id|>"


def made_up_run(mode, tokens=32, steps=16, layers=2, heads=4, blocks=(24, 24), prompt_tokens=700, seed=0):
    """One entry of `runs`; `blocks` are the pattern's rows and columns of cells, its cells random."""
    random = np.random.default_rng(seed)
    sparse = mode == "sparsed"
    answer = min(tokens - 1, len(WORDS) - 1)
    pieces = [f" {word}" for word in WORDS[1 : answer + 1]] + [END] * (tokens - answer)
    ids = [100 + position for position in range(tokens)]
    order, history = random.permutation(tokens).tolist(), []
    for step in np.array_split(order, steps):
        history.append([[int(at), ids[at], round(float(random.uniform(0.2, 1)), 4)] for at in step])
    n_full = 4 if sparse else steps
    seconds = [0.12] * (n_full - 1) + [0.2 if sparse else 0.12] + [0.05] * (steps - n_full)
    phases = ["full"] * n_full + ["sparse"] * (steps - n_full)
    if sparse:
        phases[n_full - 1] = "selecting"
    committed = np.cumsum([len(commits) for commits in history]) / tokens
    cells = random.random((layers, heads, *blocks)) < 0.3
    kept = [{"density": 0.3, "recall": float(random.uniform(0.8, 1))} for _ in range(layers)]
    return {
        "mode": mode,
        "token_ids": ids,
        "prompt_tokens": prompt_tokens,
        "seconds": sum(seconds),
        "forwards": [
            {"phase": phase, "rows": prompt_tokens + tokens, "seconds": taken, "committed": float(share)}
            for phase, taken, share in zip(phases, seconds, committed, strict=True)
        ],
        "step_seconds": seconds,
        "compile_seconds": 0.5,
        "full_steps": n_full,
        "selection_seconds": 0.08 if sparse else None,
        "density": 0.3 if sparse else None,
        "peak_memory_bytes": None,
        "backend": "gather" if sparse else None,
        "backend_reason": "fastest available" if sparse else None,
        "warmup_seconds": [],
        "warmup_compile_seconds": 0,
        "repeats": {"seconds": [sum(seconds)], "median": sum(seconds), "spread": 0.0, "same_tokens": True},
        "history": history,
        "pieces": pieces,
        "answer_tokens": answer,
        "text": "".join(pieces[:answer]).strip(),
        "expected": "a loose stone",
        "answer_found": True,
        "layers": kept if sparse else None,
        "pattern": {
            "block_size": 32,
            "prompt_tokens": prompt_tokens,
            "tokens": prompt_tokens + tokens,
            "query_blocks": -(-(prompt_tokens + tokens) // 32),
            "key_blocks": -(-(prompt_tokens + tokens) // 32),
            "rows": blocks[0],
            "columns": blocks[1],
            "layers": layers,
            "heads": heads,
            "cells": base64.b64encode(np.packbits(cells).tobytes()).decode(),
        }
        if sparse
        else None,
    }


def of_an_earlier_version(run):
    """The same run as the first versions wrote it."""
    later = ("forwards", "history", "pieces", "answer_tokens", "layers", "pattern", "repeats")
    return {name: value for name, value in run.items() if name not in later}


def made_up_record(*modes, **sizes):
    """The record of a call that ran these modes."""
    return {
        "runs": [made_up_run(mode, seed=seed, **sizes) for seed, mode in enumerate(modes)],
        "trained_length": 4096,
        "beyond_trained_length": False,
        "load_seconds": 1.5,
        "first_forward_seconds": 0.25,
        "environment": {"sparsed": "0.1.0", "torch": "2.13.0", "device": "cpu", "dtype": "float32", "cuda": None},
        "arguments": {"model_path": "GSAI-ML/LLaDA-1.5", "demo": False, "select": 0.3, "prompt_text": None},
    }
