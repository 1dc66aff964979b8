"""Kernels compiled for a GPU that need not be there."""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from sparsed.kernels.block_scores_triton import _block_scores_kernel

POINTERS = {"q_ptr": "*bf16", "k_ptr": "*bf16", "lse_ptr": "*fp32", "out_ptr": "*fp32"}
STRIDES = ("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row")


def scores_kernel(tile, cell, head_dim, capability):
    """The block scores' kernel with the log-sum-exp given, compiled for compute capability `capability` / 10."""
    names = _block_scores_kernel.arg_names
    constants = {
        "valid_ptr": None, "group": 1, "GIVEN": True, "PADDED": False, "D": head_dim, "D_TILE": tile.width,
        "CELL": cell, "TILE": tile.rows, "HELD": tile.held,
    }  # fmt: skip
    kinds = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names} | {
        "scale": "fp32"
    }
    aligned = [name for name in names if kinds[name].startswith("*") or name in STRIDES]
    source = ASTSource(
        _block_scores_kernel,
        kinds,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": 8 if tile.rows == 128 else 4, "num_stages": tile.stages}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)
