"""Keep an adapted checkpoint as its difference to the checkpoint that it was adapted from, and rebuild it:

    python -m demo.real.delta make --base runs/base --adapted runs/adapted --out runs/delta.bin
    python -m demo.real.delta apply --base runs/base --delta runs/delta.bin --out runs/rebuilt

A matrix's changes are rounded to whole steps of --step times their own root mean square, and compressed. No weight is
off by more than half a step. Vectors are kept exactly, and so is a row that is the only one of its matrix to change.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.real.folders import copy_tokenizer, digest, folder, read_config, read_weights, write_checkpoint
from sparsed.console.endings import blame, guarded
from sparsed.console.files import output_path, replacing
from sparsed.console.parser import Parser, add_value
from sparsed.console.readers import number_in, path
from sparsed.console.streams import tell
from sparsed.models.loading import DTYPES

PROGRAM = "python -m demo.real.delta"
FEW_ROWS = 8
Weights = Mapping[str, Tensor]


def encode(base: Weights, adapted: Weights, step: float) -> bytes:
    """The delta: a line of JSON that describes the changed tensors, then their bytes one after the other.

    Args:
        base, adapted: float32 tensors of the same names and shapes.
        step: of the root mean square of a matrix's changes.

    Raises:
        ValueError: names or shapes differ.
    """
    if {name: x.shape for name, x in base.items()} != {name: x.shape for name, x in adapted.items()}:
        raise ValueError("the two checkpoints do not have the same tensors")
    entries, blobs = [], []
    for name, before in base.items():
        after = adapted[name]
        rows = (after != before).reshape(len(before), -1).any(1).nonzero()[:, 0].tolist()
        if not rows:
            continue
        if before.dim() == 1 or len(rows) <= FEW_ROWS:
            kept = None if before.dim() == 1 else rows
            entry, raw = {"rows": kept, "size": 0.0, "dtype": "<f4"}, (after if kept is None else after[kept]).numpy()
        else:
            raw, size = _in_steps((after - before).numpy(), step)
            entry = {"rows": None, "size": size, "dtype": raw.dtype.str}
        blobs.append(_compressed(raw.tobytes()) if entry["size"] else raw.tobytes())
        entries.append({"name": name, **entry, "bytes": len(blobs[-1])})
    body = b"".join(blobs)
    header = {"base": digest(base), "body": sha256(body).hexdigest(), "step": step, "tensors": entries}
    return json.dumps(header).encode() + b"\n" + body


def _in_steps(change: np.ndarray, step: float) -> tuple[np.ndarray, float]:
    """The changes as whole numbers of the smallest type that holds them, and the size of a step."""
    size = float(step * np.sqrt(np.square(change, dtype=np.float64).mean()))
    steps = np.rint(change / size)
    most = np.abs(steps).max()
    if not most <= np.iinfo(np.int32).max:  # which not-a-number is not either
        raise ValueError(f"changes of up to {most:.3g} steps are too large")
    return steps.astype(next(kind for kind in ("<i1", "<i2", "<i4") if most <= np.iinfo(kind).max)), size


def _compressed(raw: bytes) -> bytes:
    """By Huffman's code only: the changes hardly repeat, so LZMA took 4 % more bytes and a hundred times longer."""
    compressor = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    return compressor.compress(raw) + compressor.flush()


def decode(base: Weights, delta: bytes) -> dict[str, Tensor]:
    """The adapted checkpoint's float32 tensors.

    Raises:
        ValueError: it is no delta, is damaged, or is of another base.
    """
    line, _, rest = delta.partition(b"\n")
    try:
        header = json.loads(line)
        if header.get("base") not in (None, digest(base)):
            raise LookupError("it is of another base")
        if header.get("body") not in (None, sha256(rest).hexdigest()):
            raise LookupError("it is damaged, or a part of it is missing")
        weights = dict(base)
        for entry in _entries(header):
            blob, rest = rest[: entry["bytes"]], rest[entry["bytes"] :]
            weights[entry["name"]] = _changed(base[entry["name"]], entry, blob)
    except (ValueError, TypeError, AttributeError, LookupError, zlib.error) as error:
        raise ValueError(f"this is not a whole delta of this base: {error}") from None
    return weights


def _entries(header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tensors in order; the first delta had lists for them, and a name of its own for the mask's row."""
    for entry in header["tensors"]:
        if isinstance(entry, dict):
            yield entry
            continue
        name, _, size, count = entry
        rows = [header["mask_id"]] if name == "mask" else None
        name = "model.embed_tokens.weight" if name == "mask" else name
        yield {"name": name, "rows": rows, "size": size, "dtype": "<i1" if size else "<f4", "bytes": count}


def _changed(before: Tensor, entry: dict[str, Any], blob: bytes) -> Tensor:
    rows, dtype = entry["rows"], np.dtype(entry["dtype"])
    shape = before.shape if rows is None else (len(rows), *before.shape[1:])
    count = int(np.prod(shape)) * dtype.itemsize
    raw = zlib.decompressobj().decompress(blob, count + 1) if entry["size"] else blob
    if len(raw) != count:
        raise ValueError(f"'{entry['name']}' has {len(raw)} bytes of {count}")
    values = torch.from_numpy(np.frombuffer(raw, dtype).astype(np.float32)).reshape(shape)
    if entry["size"]:
        return before + entry["size"] * values
    after = before.clone()
    after[slice(None) if rows is None else rows] = values
    return after


def main(argv: list[str] | None = None) -> int:
    """Make or apply with these words (None: the process's own); returns the exit code."""
    advice = "close other programs"
    return guarded(lambda: _work(_parse(argv)), PROGRAM, advice=advice, ending=argv is None)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="make|apply")
    make = actions.add_parser("make", help="write the delta of two checkpoints")
    apply = actions.add_parser("apply", help="rebuild the adapted checkpoint")
    for one in (make, apply):
        one.add_argument("--base", type=folder, metavar="FOLDER", required=True, help="what was adapted")
    make.add_argument("--adapted", type=folder, metavar="FOLDER", required=True, help="what came out")
    make.add_argument("--out", metavar="FILE", required=True, help="the delta")
    add_value(make, "--step", "of the changes' root mean square", 1.0, type=number_in(0, 100, above=True))
    text = "the delta; several files are its parts"
    apply.add_argument("--delta", type=path, metavar="FILE", nargs="+", required=True, help=text)
    apply.add_argument("--out", type=path, metavar="FOLDER", required=True, help="the checkpoint")
    add_value(apply, "--dtype", "of its weights", "bfloat16", choices=tuple(DTYPES))
    args = parser.parse_args(argv)
    args.parser = make if args.action == "make" else apply
    if args.action == "make":
        args.out = output_path(make, "--out", args.out)
    return args


def _work(args: argparse.Namespace) -> None:
    with blame(args, "--base"):
        base = read_weights(args.base)
    if args.action == "make":
        _make(args, base)
    else:
        _apply(args, base)


def _make(args: argparse.Namespace, base: Weights) -> None:
    with blame(args, "--adapted"):
        delta = encode(base, read_weights(args.adapted), args.step)
    with blame(args, "--out"), replacing(args.out) as temporary:
        temporary.write_bytes(delta)
    tell(f"written to {args.out}: {len(delta) / 1e6:.1f} MB")


def _apply(args: argparse.Namespace, base: Weights) -> None:
    with blame(args, "--delta"):
        weights = decode(base, b"".join(Path(part).read_bytes() for part in args.delta))
    with blame(args, "--out"):
        args.out.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(args.base, args.out)
        write_checkpoint(args.out, {**read_config(args.base), "torch_dtype": args.dtype}, weights)
    tell(f"written to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
