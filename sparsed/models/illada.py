"""iLLaDA (iLLaDA-8B): Dream's layers without biases, and a head that is the embedding. Row t predicts token t."""

from dataclasses import dataclass
from typing import Any, ClassVar

from .common import check_special_ids
from .dream import DreamConfig, DreamModel


@dataclass(frozen=True)
class ILLaDAConfig(DreamConfig):
    """The keys of a published iLLaDA config.json that the forward and the sampler read.

    The published file does not name the mask; `loading` finds it in the tokenizer.
    """

    supported: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "layer_norm_eps": None,  # or its norms would be LayerNorms
    }
    qkv_bias: ClassVar[bool] = False

    max_position_embeddings: int = 8192
    # transformers leaves it out of the file where it is true
    tie_word_embeddings: bool = True
    eot_token_id: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_special_ids(self, "eot_token_id")


class ILLaDAModel(DreamModel):
    """iLLaDA with its head, sampled as LLaDA; parameter names are those of the published checkpoints.

    Dream counts positions over real tokens, the published iLLaDA over all: rotary embeddings see only distances, which
    left padding does not change.
    """

    family = "llada"
