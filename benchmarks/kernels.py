"""Shared by the benchmarks of single kernels: random heads, gates, timing on the GPU, the loop over lengths.

Every kernel is first checked against float64 on some rows: its error may be twice that of dense attention in bfloat16.
Only a kernel that passes is timed.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsed import SparseDConfig
from sparsed.blocks import Pattern
from sparsed.console.parser import Parser
from sparsed.console.readers import some_of
from sparsed.evaluation.results import markdown
from sparsed.kernels import error_and_bound

from .common import LENGTHS, NEW_TOKENS, build_parser, clamp, new_record, parse_arguments, require_gpu, save, summary
from .shapes import SHAPES, ModelConfig, attention_shape, model_config

BLOCK_SIZES = ("128", "64", "32")
PROBES = 16  # query rows of a head that a gate checks
WARM_CALLS, FEWEST_CALLS, MOST_CALLS = 3, 5, 100
BUDGET = 2.0  # seconds for the timed calls of one kernel
HEAD_START = 1_000_000  # cycles of the GPU's clock, about half a millisecond, that the host gets to queue one call
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Heads:
    """Random q [1, Hq, T, D], k and v [1, Hkv, T, D] of one layer, laid out as the models do."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def matmul_flops(self) -> float:
        """Operations of q k^T over all pairs; attention has two products of this size."""
        _, heads, length, head_dim = self.q.shape
        return 2.0 * heads * length**2 * head_dim

    def pair(self, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """One query head with its key head, each [T, D]."""
        kv_head = head * self.k.shape[1] // self.q.shape[1]
        return self.q[0, head], self.k[0, kv_head], self.v[0, kv_head]

    @property
    def probed(self) -> tuple[int, int]:
        """The query heads that a gate checks."""
        return 0, self.q.shape[1] - 1


@dataclass(frozen=True)
class Gate:
    """The largest error, and the largest that passes."""

    error: float
    allowed: float

    @staticmethod
    def of(out: Tensor, dense: Tensor, exact: Tensor) -> "Gate":
        """The error of `out` may be twice that of `dense`, which is plain bfloat16."""
        return Gate(*error_and_bound(out, dense, exact, DTYPE))

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def random_heads(config: ModelConfig, length: int, device: torch.device) -> Heads:
    """Normal q, k and v: with zeros the GPU would run faster than with real numbers."""
    heads, kv_heads, head_dim = attention_shape(config)
    q, k, v = (
        torch.randn(1, length, h, head_dim, device=device, dtype=DTYPE).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    )
    return Heads(q, k, v)


def attention_gate(out: Tensor, heads: Heads, pattern: Pattern | None = None) -> Gate:
    """Some rows of attention, over a pattern's blocks or over all keys, against float64."""
    rows = torch.linspace(0, out.shape[2] - 1, PROBES, device=out.device).round().long()
    gates = []
    for head in heads.probed:
        q, k, v = heads.pair(head)
        kept = None if pattern is None else kept_keys(pattern, head, rows)
        dense, exact = (
            F.scaled_dot_product_attention(q[None, rows].to(t), k[None].to(t), v[None].to(t), attn_mask=kept)[0]
            for t in (DTYPE, torch.float64)
        )
        gates.append(Gate.of(out[0, head, rows], dense, exact))
    return max(gates, key=lambda gate: gate.error / gate.allowed)


def kept_keys(pattern: Pattern, head: int, rows: Tensor) -> Tensor:
    """Which keys some query rows of a head attend to, bool [rows, T]."""
    grid = pattern.grid
    blocks = torch.zeros(len(rows), grid.n_blocks, dtype=torch.bool, device=rows.device)
    blocks.scatter_(1, pattern.indices[0, head, rows // grid.block_size].long(), True)
    return blocks.repeat_interleave(grid.block_size, 1)[:, : grid.length]


def gpu_seconds(work: Callable[[], Any]) -> list[float]:
    """Seconds of single calls by the GPU's clock, after some warm-up calls, as many as the budget allows.

    The GPU is kept busy until the host has queued them, so that a short call is not timed by its launch.
    """
    warm = _timed_calls(work, WARM_CALLS)
    return _timed_calls(work, clamp(BUDGET / min(warm), FEWEST_CALLS, MOST_CALLS))


def _timed_calls(work: Callable[[], Any], count: int) -> list[float]:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    torch.cuda._sleep(HEAD_START * count)
    for start, end in marks:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def entry(name: str, work: Callable[[], Any], gate: Callable[[Any], Gate], flops: float | None) -> dict[str, Any]:
    """The row of one kernel: checked on its first call, then timed; `fault` says why it was not."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    try:
        out = work()
        torch.cuda.synchronize()
    except Exception as error:  # a compiler can fail in any way; the reason is reported, and the exit code is 1
        return {"kernel": name, "fault": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    first = time.perf_counter() - start
    found = gate(out)
    del out
    row = {"kernel": name, "first_use_seconds": first, "error": found.error, "allowed_error": found.allowed}
    if not found.passed:
        return row | {"fault": f"error {found.error:.1e} where {found.allowed:.1e} is allowed"}
    row["seconds"] = summary(gpu_seconds(work))
    if flops is not None:
        row["tflops"] = flops / row["seconds"]["median"] / 1e12
    return row


def matmul_tflops(device: torch.device) -> float:
    """The GPU's speed on a large matrix product of random numbers: the upper bound for the kernels here."""
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=DTYPE) for _ in range(2))
    return 2 * n**3 / summary(gpu_seconds(lambda: a @ b))["median"] / 1e12


def kernel_parser(name: str, doc: str) -> Parser:
    parser = build_parser(name, doc, lengths="4k,16k", families=SHAPES)
    help_text = f"some of {', '.join(BLOCK_SIZES)}, separated by commas (default: %(default)s)"
    parser.add_argument("--block_sizes", type=some_of(BLOCK_SIZES), default="128", metavar="SIZES", help=help_text)
    return parser


Measure = Callable[[Heads, SparseDConfig, argparse.Namespace], list[dict[str, Any]]]


def run(parser: Parser, argv: list[str] | None, measure: Measure, ratio: str) -> None:
    """Measure every length, save after each, print a table; exit code 1 if a kernel failed its gate.

    Args:
        measure: the rows of one length for all block sizes.
        ratio: name of the rows' `ratio` in the table.
    """
    args = parse_arguments(parser, argv)
    device = require_gpu(parser)
    torch.manual_seed(0)
    record = new_record(parser, args, device, DTYPE) | {"matmul_tflops": matmul_tflops(device), "rows": []}
    for name in args.lengths:
        heads = random_heads(model_config(args.family), LENGTHS[name] + NEW_TOKENS, device)
        for row in measure(heads, SparseDConfig(), args):
            record["rows"].append({"length": name, "tokens": heads.q.shape[2], **row})
        save(args.out, record)
        print(f"{name}: done", flush=True)
    print(f"a matrix product runs at {record['matmul_tflops']:.0f} TFLOP/s here")
    print(table(record["rows"], ratio))
    if any("fault" in row for row in record["rows"]):
        parser.exit(1, f"{parser.prog}: error: a kernel failed, see the table\n")


def table(rows: list[dict[str, Any]], ratio: str) -> str:
    """A line for each kernel: time, speed, or why it was not timed."""
    columns = [
        "prompt", "kernel", "block", "density", "first use", "ms", "quartiles", "TFLOP/s", ratio, "error (allowed)",
    ]  # fmt: skip
    return markdown(columns, [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> list[str]:
    def cell(name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    line = [row["length"], row["kernel"], cell("block_size", "d"), cell("density", ".3f")]
    if "seconds" not in row:
        return [*line, *["-"] * 5, row.get("fault") or row["unavailable"]]
    median, quartiles = row["seconds"]["median"], row["seconds"]["quartiles"]
    spread = " to ".join(f"{1e3 * value:.3f}" for value in quartiles)
    times = [f"{row['first_use_seconds']:.1f} s", f"{1e3 * median:.3f}", spread]
    return [
        *line,
        *times,
        cell("tflops", ".0f"),
        cell("ratio", ".2f"),
        f"{row['error']:.1e} ({row['allowed_error']:.1e})",
    ]
