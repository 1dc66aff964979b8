"""Where the attention of a module can be taken: by what the module has, whoever wrote its class."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .run import SparseRun

# (run, index of the module, its method as it was) -> what stands in for the method
Maker = Callable[[SparseRun, int, Callable], Callable]


def seams_of(model: nn.Module) -> list[tuple[nn.Module, str, Maker]]:
    """(module, method to replace, maker of its replacement) of every module that owns attention.

    Raises:
        ValueError: there is none, or one says that it is causal.
    """
    seams = [(module, *seam) for module in model.modules() if (seam := _seam_of(module))]
    if not seams:
        raise ValueError(f"{type(model).__name__} holds no attention of Dream or LLaDA")
    return seams


def _seam_of(module: nn.Module) -> tuple[str, Maker] | None:
    if hasattr(module, "attend") and hasattr(module, "q_proj"):
        return "attend", _attend
    if hasattr(module, "_scaled_dot_product_attention"):
        return "_scaled_dot_product_attention", _sdpa_method
    if all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")):
        if getattr(module, "is_causal", False):
            name = type(module).__name__
            raise ValueError(f"{name} is causal (is_causal), and SparseD is for models that attend to both sides")
        return "forward", _forward
    return None


def _attend(run: SparseRun, layer: int, original: Callable) -> Callable:
    """`attend` of this package's models."""

    def attention(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, start: int) -> Tensor:
        return run.attend(layer, q, k, v, key_valid, lambda: original(q, k, v, key_valid, start), start)

    return attention


def _sdpa_method(run: SparseRun, layer: int, original: Callable) -> Callable:
    """The hub's LLaDA block's method (q, k, v, attn_mask, dropout_p, is_causal, ...) -> heads."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        full = partial(original, q, k, v, *args, **kwargs)
        return _attend_foreign(run, layer, full, q, k, v, *args[:3], **kwargs)

    return attention


def _forward(run: SparseRun, layer: int, original: Callable) -> Callable:
    """The forward of an attention module that hands its final heads to `F.scaled_dot_product_attention`.

    What it does to them before (norms, rotation, a cache) and afterwards stays its own.
    """

    @torch.compiler.disable  # compiled, the calls inside would not be seen one by one
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _OwnCall(partial(_attend_foreign, run, layer)) as own:
            out = original(*args, **kwargs)
        if own.calls != 1:
            raise RuntimeError(
                f"sparsify: an attention module called F.scaled_dot_product_attention {own.calls} times, not once; "
                'load the model with attn_implementation="sdpa", and without output_attentions'
            )
        return out

    return forward


class _OwnCall(TorchFunctionMode):
    """Passes calls of `F.scaled_dot_product_attention` on to `attend`, with what computes them at the front."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend, self.calls = attend, 0

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        return self.attend(partial(func, *args, **kwargs), *args, **kwargs)


def _attend_foreign(
    run: SparseRun,
    layer: int,
    full: Callable[[], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """`run.attend_foreign` with the arguments of `F.scaled_dot_product_attention`.

    Raises:
        ValueError: they ask for another attention than the one that SparseD computes over blocks.
    """
    if is_causal:
        raise ValueError(
            "sparsify: the model's attention is causal, and SparseD is for models that attend to both sides"
        )
    if dropout_p:
        raise ValueError("sparsify: the model's attention has dropout: call eval() on the model")
    if scale is not None and not math.isclose(scale, query.shape[-1] ** -0.5, rel_tol=1e-6):
        raise ValueError(f"sparsify: the model's attention is scaled by {scale}, not by 1 / sqrt(head size)")
    return run.attend_foreign(layer, query, key, value, attn_mask, full)
