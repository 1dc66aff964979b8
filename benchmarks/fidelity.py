"""How close SparseD stays to full attention on a real text: KL divergence and the likeliest token, in one forward.

    python -m benchmarks.fidelity --model_path FOLDER --tokens FILE.bin.xz --new_tokens 128,256 --out FILE.json

FOLDER is a Dream or LLaDA checkpoint. FILE.bin.xz (or .bin) holds uint16 ids in its vocabulary, of documents that end
with id 0. A window is a run of tokens of one document; the last ones are the generated region. The region is unmasked
in a random order: blocks are selected while all of it is masked, or once the share --skip is unmasked. Each setting's
attention over them is then measured with half of the region masked. Nothing is sampled, so errors do not add up. The
package's own rules select the blocks, and its own kernels read them, in float32.

The settings "only ..." show where the paper's rule loses: under dense masks, only some rows, or only some keys of the
answer's rows, follow the kept blocks. Intervals are 95 % bootstrap intervals over documents.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsed import load_model
from sparsed.backends import SparseAttention, sparse_attention
from sparsed.blocks import BlockGrid
from sparsed.console.endings import blame
from sparsed.console.readers import list_of, number_in, whole
from sparsed.evaluation.fidelity.documents import Document, check_ids, read_ids, split_documents
from sparsed.evaluation.fidelity.measuring import compare
from sparsed.evaluation.fidelity.windows import Window, shuffled
from sparsed.evaluation.methods import METHODS
from sparsed.evaluation.results import markdown, title_of
from sparsed.evaluation.scoring import bootstrap
from sparsed.kernels import block_scores, full_attention
from sparsed.models.common import DiffusionLM
from sparsed.sampling import FAMILIES

from .common import build_parser, new_record, parse_arguments, save

# rows of the full forward, and keys of the answer's, that follow the paper's kept blocks while all others are dense
PARTS = ("the prompt's rows", "the answer's rows", "the answer's rows: prompt keys", "the answer's rows: answer keys")


@dataclass(frozen=True)
class Setting:
    """A measured setting: a method of the evaluation with its numbers, or one of PARTS.

    Args:
        selected_at: share of the generated region that was unmasked when the blocks were selected.
    """

    method: str
    select: float
    block_size: int
    dense_answer: bool = False
    selected_at: float = 0.0
    part: str | None = None

    @property
    def title(self) -> str:
        if self.part is not None:
            return f"only {self.part}, select {self.select:g}, block_size {self.block_size}"
        at = f", selected at {self.selected_at:g}" if self.selected_at else ""
        return title_of({**asdict(self), "skip": None}) + at


def settings(skip: float) -> list[Setting]:
    """Every setting of the table."""
    shares = (0.3, 0.2, 0.15, 0.1, 0.05)
    found = [
        Setting("sparsed", select, size, dense, at)
        for at in (0.0, skip)
        for size in (128, 32)
        for select in shares
        for dense in (False, True)
    ]
    found += [Setting("sparsed", *other, dense) for other in ((0.5, 128), (0.3, 64)) for dense in (False, True)]
    found += [
        Setting(method, 0.3, size, dense)
        for method in ("no_isolation", "window", "streaming")
        for size in (128, 32)
        for dense in (False, True)
    ]
    return found + [Setting("sparsed", 0.3, size, part=part) for size in (128, 32) for part in PARTS]


def windows(ids: np.ndarray, length: int, new_tokens: int, most: int, a_document: int) -> list[Window]:
    """The first windows of every long enough document, next to each other, at most `a_document` per document."""
    found = []
    for number, document in enumerate(split_documents(ids)):
        for start in range(0, min(len(document) // length, a_document) * length, length):
            order = shuffled(length, new_tokens, 1000 * number + start)
            found.append(Window(str(number), torch.from_numpy(document[start : start + length]), order))
    return found[:most]


@contextmanager
def attending(model: DiffusionLM, attention: Callable[..., Tensor]) -> Iterator[None]:
    """Every layer's attention is `attention(layer, q, k, v)`, all of it over all tokens."""
    layers = [module for module in model.modules() if hasattr(module, "attend")]
    for layer, module in enumerate(layers):
        module.attend = lambda q, k, v, *_, layer=layer: attention(layer, q, k, v)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in layers:
            del module.attend


class Selector:
    """Block scores of all layers in one forward with full attention, by block size; every setting selects from them."""

    def __init__(self, model: DiffusionLM, canvas: Tensor, sizes: set[int]):
        self.scores: dict[int, list[Tensor]] = {size: [] for size in sizes}
        self.shape: torch.Size | None = None

        def look(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.shape = q.shape
            for size, layers in self.scores.items():
                layers.append(block_scores(q, k, block_size=size, compiled=False))
            return full_attention(q, k, v)[0]

        with attending(model, look):
            model(canvas)

    def attention(self, setting: Setting, new_tokens: int) -> list[SparseAttention]:
        """Each layer's attention under a setting."""
        scores = self.scores[setting.block_size]
        length = self.shape[2]
        grid = BlockGrid(length, length - new_tokens, setting.block_size, None, setting.dense_answer)
        rule = METHODS[setting.method].rule
        q = scores[0].new_empty(self.shape)  # rules use only its shape and device
        patterns = [rule.select(q, lambda layer=layer: layer, grid, setting.select) for layer in scores]
        if setting.part is not None:
            return [masked(part_mask(pattern.as_mask(), grid, setting.part)) for pattern in patterns]
        # plain torch: in float32 it is several times as fast as the Triton kernel
        return [sparse_attention("gather", pattern) for pattern in patterns]


def part_mask(kept: Tensor, grid: BlockGrid, part: str) -> Tensor:
    """Which pairs [B, H, T, T] are read if only `part` follows the kept blocks [B, H, nQ, nK]."""
    size, length, first = grid.block_size, grid.length, grid.prompt_len
    mask = kept.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :length, :length]
    if part == "the prompt's rows":
        mask[:, :, first - 1 :] = True
    else:
        mask[:, :, : first - 1] = True
    if part == "the answer's rows: prompt keys":
        mask[..., first:] = True
    if part == "the answer's rows: answer keys":
        mask[..., :first] = True
    return mask


def masked(mask: Tensor) -> SparseAttention:
    """Dense attention under a mask of pairs."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@torch.no_grad()
def measure(model: DiffusionLM, window: Window, wanted: list[Setting], mask_id: int) -> list[dict[str, float]]:
    """For full attention and every setting, `compare`'s sums over the masked tokens."""
    new_tokens = len(window.order)
    canvas = window.canvas(0.5, mask_id).to(model.device)
    places = window.masked(0.5)
    rows = FAMILIES[model.family].sources(places, canvas.shape[1]).to(model.device)
    truth = window.tokens[places].to(model.device)
    full = model(canvas, logit_rows=rows).log_softmax(-1)
    sums = [compare(full, full, truth)]
    selectors: dict[float, Selector] = {}
    for at in {setting.selected_at for setting in wanted}:
        sizes = {setting.block_size for setting in wanted if setting.selected_at == at}
        selectors[at] = Selector(model, window.canvas(1 - at, mask_id).to(model.device), sizes)
    for setting in wanted:
        layers = selectors[setting.selected_at].attention(setting, new_tokens)
        with attending(model, lambda layer, q, k, v, layers=layers: layers[layer](q, k, v)):
            sums.append(compare(full, model(canvas, logit_rows=rows).log_softmax(-1), truth))
    return sums


def interval(values: np.ndarray, n: np.ndarray, documents: np.ndarray) -> list[float]:
    """Mean per token, and its 95 % bootstrap interval over documents.

    Args:
        values, n: [windows] sums, and tokens.
        documents: [windows] the document of each.
    """
    one = documents[:, None] == np.unique(documents)
    return list(bootstrap(values @ one, n @ one))


def summarize(wanted: list[Setting], found: list[list[dict[str, float]]], documents: list[str]) -> list[dict[str, Any]]:
    """A row for full attention and each setting: means per masked token with intervals.

    `kl_to_paper` is the paired difference of KL to the paper's own setting (select .3, blocks of 128).
    """
    sums = {name: np.array([[one[name] for one in window] for window in found]) for name in ("n", "kl", "same", "nll")}
    whose, n = np.array(documents), sums["n"][:, 0]
    paper = sums["kl"][:, 1 + wanted.index(Setting("sparsed", 0.3, 128))]
    rows = []
    for column, setting in enumerate([None, *wanted]):
        kl, same, loss = (sums[name][:, column] for name in ("kl", "same", "nll"))
        rows.append(
            {
                "title": "full attention" if setting is None else setting.title,
                "setting": None if setting is None else asdict(setting),
                "kl": interval(kl, n, whose),
                "same_token": interval(same, n, whose),
                "loss": interval(loss, n, whose),
                "kl_to_paper": interval(kl - paper, n, whose),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line for each setting; KL and loss in nats per masked token."""
    columns = ["setting", "KL to full attention", "to the paper's", "same likeliest token, %", "loss"]
    return markdown(columns, [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> list[str]:
    kl, paper, same, loss = (row[name] for name in ("kl", "kl_to_paper", "same_token", "loss"))
    return [
        row["title"],
        "{:.4f} ({:.4f} to {:.4f})".format(*kl),
        "{:+.4f} ({:+.4f} to {:+.4f})".format(*paper),
        "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value for value in same)),
        f"{loss[0]:.3f}",
    ]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(argv: list[str] | None = None) -> None:
    args, model, ids = prepare(argv)
    wanted = settings(args.skip)
    record = new_record(args.parser, args, model.device, model.dtype) | {
        "weights_sha256": [digest(file) for file in sorted(Path(args.model_path).glob("*.safetensors"))],
        "tokens_sha256": digest(args.tokens),
        "length": args.length,
        "rows": [],
    }
    for new_tokens in args.new_tokens:
        chosen = windows(ids, args.length, new_tokens, args.windows, args.a_document)
        found = []
        for number, window in enumerate(chosen):
            found.append(measure(model, window, wanted, model.config.mask_token_id))
            print(f"{new_tokens} new tokens, window {number + 1}/{len(chosen)}", flush=True)
        documents = [window.document for window in chosen]
        rows = summarize(wanted, found, documents)
        record["rows"].append(
            {
                "new_tokens": new_tokens,
                "windows": len(chosen),
                "documents": len(set(documents)),
                "masked_tokens": sum(window[0]["n"] for window in found),
                "settings": rows,
            }
        )
        save(args.out, record)
        print(f"\n{new_tokens} new tokens\n\n{table(rows)}\n", flush=True)


def prepare(argv: list[str] | None) -> tuple[argparse.Namespace, DiffusionLM, np.ndarray]:
    """The flags, the model in float32 and the ids; a wrong call exits with code 2."""
    parser = build_parser("fidelity", __doc__)
    parser.add_argument("--model_path", required=True, metavar="FOLDER")
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="uint16 ids, .bin or .bin.xz")
    parser.add_argument("--device", default="auto")
    for name, default, what in (
        ("length", 4096, "tokens of a window"),
        ("windows", 100, "windows, at most"),
        ("a_document", 3, "most windows of one document"),
    ):
        parser.add_argument(f"--{name}", type=whole(1), default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--new_tokens", type=list_of(whole(2)), default=[128], help="of a window (default: 128)")
    parser.add_argument("--skip", type=number_in(0, 0.5, above=True), default=0.2, help="(default: %(default)s)")
    args = parse_arguments(parser, argv)
    args.parser = parser
    with blame(args, "--tokens"):
        ids = read_ids(args.tokens)
    with blame(args, "--model_path"):
        model = load_model(args.model_path, device=args.device, dtype="float32")
    args.family = model.family
    for new_tokens in args.new_tokens:
        if new_tokens >= args.length:
            parser.error(f"argument --new_tokens: {new_tokens} must be below --length, {args.length}")
        if not windows(ids, args.length, new_tokens, 1, 1):
            parser.error(f"argument --tokens: no document of {args.length} tokens")
    with blame(args, "--tokens"):
        check_ids([Document(args.tokens.name, ids)], model.config.vocab_size)
    return args, model, ids


if __name__ == "__main__":
    main()
