"""Turn text files into token ids for training, and into held-out ones that training never sees:

    python -m demo.real.text docs/ notes.txt --checkpoint runs/base --out runs/text

Every UTF-8 file is a document; other files are skipped. A paragraph that an earlier document already had is left out,
so that no held-out text was trained on; repetitions within a document stay. Only a document's text and --seed decide
whether it is held out. With --apart, documents that share 24 tokens in a row with texts to judge by are left out.
Writes train.bin.xz and held-out.bin.xz, uint16 ids with id 0 after every document, and text.json, which describes them.
"""

import argparse
import hashlib
import lzma
import re
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from demo.real.folders import folder
from sparsed.console.endings import blame, guarded
from sparsed.console.files import replacing, write_json
from sparsed.console.parser import Parser, add_value
from sparsed.console.readers import number_in, path, whole
from sparsed.console.streams import tell
from sparsed.models import load_tokenizer

PROGRAM = "python -m demo.real.text"
END = 0
LONG = 80  # characters of the shortest paragraph that is compared with others; shorter ones are headings and the like
AT_ONCE = 64  # documents
RUN = 24  # tokens in a row that two texts do not share by chance
PARTS = ("train", "held-out")
SHARED = "shared"  # documents that --apart leaves out


def files_in(paths: Iterable[Path]) -> Iterator[Path]:
    """The files, and those in the folders, in order, each once; OSError if one is missing."""
    seen = set()
    for one in paths:
        for file in sorted(one.rglob("*")) if one.is_dir() else [one.resolve(strict=True)]:
            if file.is_file() and file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def read_text(file: Path) -> str | None:
    """None for what is not UTF-8 text."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def deduplicated(texts: Iterable[str]) -> Iterator[str]:
    """The texts without long paragraphs of earlier ones; empty where nothing is left."""
    seen: set[bytes] = set()
    for text in texts:
        kept, own = [], set()
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            mark = hashlib.blake2b(words.encode(), digest_size=16).digest()
            if len(words) < LONG or mark not in seen:
                kept.append(paragraph)
                own.add(mark)
        seen |= own
        yield "\n\n".join(kept).strip("\n")


def is_held_out(text: str, share: float, seed: int) -> bool:
    """Drawn with probability `share`, the same for the same text and seed."""
    drawn = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(drawn, "little") < share * 2**64


def tokenised(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """uint16 ids of each text and END; text that looks like a special token stays text."""
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array([*encoding.ids, END], np.uint16) for encoding in encodings]


def runs_of(ids: np.ndarray) -> Iterator[bytes]:
    """Every `RUN` ids in a row."""
    raw = ids.astype("<u2").tobytes()
    return (raw[start : start + 2 * RUN] for start in range(0, len(raw) - 2 * RUN + 1, 2))


def prepare(
    texts: Iterable[str], tokenizer: Tokenizer, share: float, shortest: int, seed: int, apart: Container[bytes] = ()
) -> dict[str, list]:
    """The documents' ids by part; those shorter than `shortest` tokens, or with a run of `apart`, are in neither, but
    the latter are under "shared"."""
    parts: dict[str, list[np.ndarray]] = {part: [] for part in (*PARTS, SHARED)}
    waiting: list[str] = []

    def take() -> None:
        for text, ids in zip(waiting, tokenised(tokenizer, waiting), strict=True):
            if len(ids) > shortest:
                part = PARTS[is_held_out(text, share, seed)]
                parts[SHARED if any(run in apart for run in runs_of(ids)) else part].append(ids)
        waiting.clear()

    for text in deduplicated(texts):
        waiting.append(text)
        if len(waiting) == AT_ONCE:
            take()
    take()
    return parts


def read_ids(file: Path, vocabulary: int) -> np.ndarray:
    """The uint16 ids of a .bin or .bin.xz file; OSError, or ValueError if it holds none or ids of other tokenizers."""
    raw = file.read_bytes()
    try:
        raw = lzma.decompress(raw) if file.suffix == ".xz" else raw
    except lzma.LZMAError as error:
        raise ValueError(f"{file} is not an xz file: {error}") from None
    if not raw or len(raw) % 2:
        raise ValueError(f"{file} must hold uint16 ids, but has {len(raw)} bytes")
    ids = np.frombuffer(raw, "<u2")
    if ids.max() >= vocabulary:
        raise ValueError(f"{file} has id {ids.max()}, beyond the vocabulary of {vocabulary}")
    return ids


def documents_in(file: Path, vocabulary: int) -> np.ndarray:
    """`read_ids` of documents, which END ends; ValueError if it ends none, as in a file of something else."""
    ids = read_ids(file, vocabulary)
    if END not in ids:
        raise ValueError(f"{file} must hold the ids of documents that end with id {END}, as this command writes them")
    return ids


def main(argv: list[str] | None = None) -> int:
    """Prepare text with these words (None: the process's own); returns the exit code."""
    advice = "take less text at once"
    return guarded(lambda: _prepare(_parse(argv)), PROGRAM, advice=advice, ending=argv is None)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__)
    parser.add_argument("paths", type=path, metavar="PATH", nargs="+", help="text files and folders of them")
    parser.add_argument("--checkpoint", type=folder, metavar="FOLDER", required=True, help="its tokenizer is used")
    parser.add_argument("--out", type=path, metavar="FOLDER", required=True, help="where the ids go")
    add_value(parser, "--held_out", "share of the documents that is held out", 0.01, type=number_in(0, 1))
    add_value(parser, "--shortest", "least tokens of a document", 64, type=whole(1))
    add_value(parser, "--seed", "of what is held out", 0, type=whole(0))
    text = "ids, as this command writes them, that the model will be judged by: documents that share a run are left out"
    parser.add_argument("--apart", type=path, metavar="FILE", nargs="+", default=[], help=text)
    args = parser.parse_args(argv)
    args.parser = parser
    return args


def _prepare(args: argparse.Namespace) -> None:
    with blame(args, "--checkpoint"):
        tokenizer = load_tokenizer(args.checkpoint)
        if tokenizer.eos_token_id != END or len(tokenizer) > 2**16:
            raise ValueError(f"the tokenizer must end documents with id {END} and have at most 65,536 tokens")
    counts: Counter[str] = Counter()

    def texts() -> Iterator[str]:
        for file in files_in(args.paths):
            text = read_text(file)
            counts["skipped" if text is None else "files"] += 1
            if text is not None:
                yield text

    with blame(args, "--apart"):
        apart = {run for file in args.apart for run in runs_of(documents_in(file, len(tokenizer)))}
    with blame(args, "PATH"):
        parts = prepare(texts(), tokenizer.backend_tokenizer, args.held_out, args.shortest, args.seed, apart)
    shared = parts.pop(SHARED)
    with blame(args, "--apart" if shared else "PATH"):
        if not any(parts.values()):
            if shared:
                raise ValueError(f"every document of {args.shortest} tokens and more shares {RUN} in a row with them")
            raise ValueError(f"no document of {args.shortest} tokens and more")
    with blame(args, "--out"):
        args.out.mkdir(parents=True, exist_ok=True)
        for part, documents in parts.items():
            counts[f"{part} documents"], counts[f"{part} tokens"] = len(documents), sum(map(len, documents))
            with replacing(args.out / f"{part}.bin.xz") as temporary:
                temporary.write_bytes(lzma.compress(b"".join(ids.astype("<u2").tobytes() for ids in documents)))
        if args.apart:
            counts["documents left out"] = len(shared)
        options = {"held_out": args.held_out, "shortest": args.shortest, "seed": args.seed}
        options["apart"] = list(map(str, args.apart))
        write_json(args.out / "text.json", {"paths": list(map(str, args.paths)), **options, **counts})
    tell(f"written to {args.out}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
