"""How far a kernel may be from the truth: twice as far as plain torch in the same dtype."""

import torch
from torch import Tensor


def error_and_bound(out: Tensor, dense: Tensor, exact: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The largest error of `out`, and the largest that passes.

    Args:
        out: what is checked.
        dense: the same from the same inputs by torch's own means.
        exact: the same in a wider dtype, which both errors are taken in.
        dtype: of the inputs. Kernels add up in float32 at least, and one rounding of that is allowed in addition: plain
            torch can be right by chance.
    """
    error, dense_error = ((x.to(exact.dtype) - exact).abs().max().item() for x in (out, dense))
    rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * exact.abs().max().item()
    return error, 2 * dense_error + rounding
