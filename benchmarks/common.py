"""Shared by the benchmarks: arguments, the record on disk, summaries of samples, tables."""

import argparse
import statistics
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparsed.console.environment import call_of, environment
from sparsed.console.files import write_json
from sparsed.console.parser import Parser
from sparsed.console.readers import some_of

NEW_TOKENS = 128
LENGTHS = {"short_context": 64} | {f"{k}k": 1024 * k for k in (1, 2, 4, 8, 16, 32, 64, 96, 128)}  # prompt tokens
KERNEL_PACKAGES = ("triton", "flash-attn-4", "nvidia-cutlass-dsl")


def build_parser(
    name: str, doc: str, lengths: str | None = None, families: Collection[str] = ("dream", "llada")
) -> Parser:
    """The parser of `python -m benchmarks.NAME`: --family, --out, and --lengths if it has a default."""
    parser = Parser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
    )
    parser.add_argument("--family", choices=families, default="llada")
    if lengths is not None:
        help_text = f"prompts, some of {', '.join(LENGTHS)}, separated by commas (default: %(default)s)"
        parser.add_argument("--lengths", type=some_of(LENGTHS), default=lengths, metavar="NAMES", help=help_text)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="where the record goes")
    return parser


def parse_arguments(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """The values, after a check that --out can be written to; a wrong call exits with code 2."""
    args = parser.parse_args(argv)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error.strerror}: {args.out.parent}")
    if args.out.is_dir():
        parser.error(f"argument --out: is a folder: {args.out}")
    return args


def require_gpu(parser: Parser) -> torch.device:
    """The current CUDA device; exits with code 2 if there is none."""
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    return torch.device("cuda", torch.cuda.current_device())


def reset_peak(device: torch.device) -> None:
    """Forget the largest memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The largest memory since, in bytes; 0 where PyTorch counts none."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def new_record(parser: Parser, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """How, when, where and with which versions the record is made."""
    call = call_of(parser.prog, device, dtype)
    machine = call["environment"]
    machine["processor"] = environment(torch.device("cpu"), dtype)["device_name"]
    machine["packages"] = {name: _version(name) for name in KERNEL_PACKAGES}
    return call | {"family": args.family}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(path: Path, record: dict[str, Any]) -> None:
    """Write the record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def summary(samples: list[float]) -> dict[str, Any] | None:
    """Median and spread of some samples, and the samples; None if there are none."""
    if not samples:
        return None
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {
        "median": statistics.median(samples),
        "quartiles": [low, high],
        "range": [min(samples), max(samples)],
        "count": len(samples),
        "samples": samples,
    }


def brief(samples: list[float]) -> dict[str, Any] | None:
    """`summary` without the samples: there may be thousands."""
    found = summary(samples)
    return found and {name: value for name, value in found.items() if name != "samples"}


def clamp(value: float, low: int, high: int) -> int:
    """The whole part of `value`, but at least `low` and at most `high`."""
    return max(low, min(high, int(value)))


def seconds(value: float) -> str:
    """A time as a table's cell has it."""
    if value < 0.1:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"
