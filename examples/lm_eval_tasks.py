"""A task of lm-evaluation-harness under full attention and under SparseD (`pip install ".[harness]"`).

python examples/lm_eval_tasks.py GSAI-ML/LLaDA-1.5 gsm8k
"""

import sys
from typing import Any

from lm_eval import simple_evaluate

from sparsed.evaluation.harness import SparseDLM

WAYS: dict[str, dict[str, Any]] = {
    "full attention": {"origin": True},
    "SparseD": {"select": 0.5, "block_size": 32, "dense_answer": True},
    "SparseD and a block cache": {"select": 0.5, "block_size": 32, "dense_answer": True, "cache": "dual"},
}


def main(pretrained: str, task: str, **options: Any) -> None:
    """Print the task's metrics for each way; `options` are the harness' own, such as `limit=20`."""
    for name, settings in WAYS.items():
        lm = SparseDLM(pretrained=pretrained, **settings)
        found = simple_evaluate(lm, tasks=[task], apply_chat_template=True, **options)
        metrics = {key: value for key, value in found["results"][task].items() if isinstance(value, float)}
        print(f"{name}: {metrics}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
