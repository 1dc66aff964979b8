"""Linear layers of one input as one product: of few rows, several small products leave a GPU waiting."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# above this many rows each product fills the GPU by itself
JOINT_ROWS = 512


def lay_together(layers: Sequence[nn.Linear]) -> None:
    """Move the layers' weights, and biases, behind one another in memory; their names and values stay."""
    for name in ("weight", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        if any(part is None for part in parts):
            continue
        whole = torch.cat([part.data for part in parts])
        for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = place


def lay_projections_together(model: nn.Module) -> None:
    """`lay_together` of the query, key and value projections of every attention.

    They share their memory then: safetensors' `save_model` refuses that, `save_file(model.state_dict(), ...)` does not.
    """
    for module in model.modules():
        found = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        layers = [layer for layer in found if isinstance(layer, nn.Linear)]
        if len(layers) == len(found):
            lay_together(layers)


def projections(x: Tensor, first: int, q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module) -> tuple[Tensor, ...]:
    """Queries of the tokens x [B, n, width] from the `first` on, keys and values of all."""
    joint = joint_product(x, (q_proj, k_proj, v_proj))
    if joint is None:
        return q_proj(x[:, first:]), k_proj(x), v_proj(x)
    return joint[0][:, first:], *joint[1:]


def joint_product(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...] | None:
    """What each layer makes of x [..., n, width], from one product; None where they must be called one by one.

    They must if their weights do not lie together, if a layer or its weight is another one than torch's own, as an
    adapter's or a quantised one is, or if it has hooks; and a compiler does better by itself.
    """
    if x.shape[-2] > JOINT_ROWS or torch.compiler.is_compiling() or any_global_hook():
        return None
    plain = [layer for layer in layers if type(layer) is nn.Linear and _is_plain(layer)]
    if len(plain) < len(layers):
        return None
    weight = _together([layer.weight for layer in plain])
    biases = [layer.bias for layer in plain if layer.bias is not None]
    bias = _together(biases) if biases else None
    if weight is None or (biases and (bias is None or len(biases) < len(plain))):
        return None
    return F.linear(x, weight, bias).split([layer.out_features for layer in plain], dim=-1)


def any_global_hook() -> bool:
    """Whether hooks watch the calls of all modules."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def _is_plain(layer: nn.Linear) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    own = type(layer.weight) is nn.Parameter and (layer.bias is None or type(layer.bias) is nn.Parameter)
    return own and not hooked


def _together(parts: Iterable[Tensor]) -> Tensor | None:
    """The tensors as one, if they lie one behind the other in memory and want no gradient."""
    first, *others = parts
    end = first.data_ptr() + first.nbytes
    for part in others:
        same_memory = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        alike = part.dtype == first.dtype and part.stride() == first.stride()
        if part.data_ptr() != end or not same_memory or not alike:
            return None
        end += part.nbytes
    if torch.is_grad_enabled() and any(part.requires_grad for part in (first, *others)):
        return None
    rows = len(first) + sum(map(len, others))
    return first.as_strided((rows, *first.shape[1:]), first.stride())
