"""What a checkpoint says of itself, and the kinds that are refused by it, before any weights are downloaded."""

from pathlib import Path
from reprlib import repr as shown
from typing import Any

from .files import read_json
from .tokenizer import TOKENIZER_FILES

DESCRIPTION_FILES = ["config.json", "generation_config.json", "adapter_config.json", *TOKENIZER_FILES]
# keys of config.json, what a checkpoint with one of them is, and what to do
REFUSED = (
    (
        ("quantization_config", "quantization", "compression_config"),
        "its weights are quantised",
        "load the checkpoint that they were made from (--dtype bfloat16 takes 2 bytes a weight)",
    ),
    (
        ("num_experts", "n_routed_experts", "num_local_experts"),
        "it is a mixture of experts",
        "load a dense Dream or LLaDA, such as GSAI-ML/LLaDA-8B-Instruct",
    ),
    (
        ("vision_config", "mm_vision_tower", "vision_tower"),
        "it reads images too",
        "load a text-only Dream or LLaDA",
    ),
)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json's dict.

    Raises:
        ValueError: one line; there is none that can be read, or the folder holds an adapter, quantised weights or
            another kind of network, whatever its model_type.
    """
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        base = shown(read_json(adapter).get("base_model_name_or_path"))
        merge = "merge it with PEFT (merge_and_unload, then save_pretrained) and load that"
        raise ValueError(f"{folder} holds an adapter (adapter_config.json) of the model {base}; {merge}")
    values = read_json(folder / "config.json")
    for keys, what, advice in REFUSED:
        for key in keys:
            if values.get(key):
                raise ValueError(f"{folder}: config.json has '{key}': {what}, which is not supported; {advice}")
    return values
