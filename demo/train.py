"""Train a demo checkpoint: python -m demo.train --family dream --out runs/dream --minutes 8

Stops by itself after --minutes. Run again with the same --out, it continues from the weights, with a short warm-up.
Weights are saved every half minute.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from demo.data import HEADS, IGNORE, KINDS, NUMBERS, Builder, batches
from demo.model import build, prepare, save
from sparsed.models import load_tokenizer
from sparsed.prompts import language

STAGES = (256, 512, 1056, 4128, 8224)  # lengths of texts, in tokens
LATEST = (0.22, 0.32, 0.45, 0.75)  # shares of the time at which the stages end at the latest
READY = 0.97  # the share of right answers that these kinds must exceed to end a stage earlier
NEEDED = ("documents", "code", "codes", "things")
UNKNOWN = 0.5  # the share before anything is measured; from there it takes a dozen right batches
LONG = 4096  # on texts of this length, attention is supervised less
# (layer, head, offset): heads that attend to a token nearby
OFFSETS = ((0, 0, -1), (0, 1, -2), (0, 2, -3), (0, 3, 1), (1, 1, -4), (1, 2, -8))
OFFSET_ROWS = 128
# layer and head of the rows with known sources
PLACES = {
    "names": (1, 0),
    "sets": (1, 3),
    "number_0": (2, 0),
    "number_1": (2, 1),
    "number_2": (2, 2),
    "chains": (2, 3),
    "copies": (3, 0),
    "digits": (3, 1),
    "keys": (3, 2),
    "steps": (3, 3),
    "late": (5, 0),
}
BALANCE_EVERY = 20


class Stream(IterableDataset):
    """Endless batches; `stage`, shared with the workers, is the curriculum's present stage."""

    def __init__(self, folder: Path, family: str, seed: str, stages: tuple[int, ...], tokens: int):
        self.folder, self.family, self.seed, self.stages, self.tokens = folder, family, seed, stages, tokens
        self.stage = multiprocessing.Value("i", 0)

    def __iter__(self) -> Iterator[dict]:
        info = torch.utils.data.get_worker_info()
        tokenizer = load_tokenizer(self.folder).backend_tokenizer
        seed = f"{self.seed} {info.id if info else 0}"
        builder = Builder(language(), tokenizer, self.family, seed)
        for batch in batches(builder, lambda: self.stages[self.stage.value], self.tokens):
            yield {key: torch.from_numpy(value) for key, value in batch.items()}


class Attention:
    """Records the queries and keys of some layers in the forward, to supervise a few heads' attention."""

    def __init__(self, model: nn.Module):
        self.seen = {}
        self.losses: dict[str, Tensor] = {}  # by head, the latest
        layers = model.model.layers if model.family == "dream" else model.model.transformer.blocks
        for index in {layer for layer, *_ in (*OFFSETS, *PLACES.values())}:
            module = layers[index].self_attn if model.family == "dream" else layers[index]
            module.attend = self._recorder(index, module.attend)

    def _recorder(self, index: int, attend):
        def record(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, start: int) -> Tensor:
            self.seen[index] = (q, k)
            return attend(q, k, v, key_valid, start)

        return record

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the supervised heads' attention rows against their known sources."""
        self.losses = {"nearby": sum(self._offset_loss(*place) for place in OFFSETS) / len(OFFSETS)}
        for name, pairs in zip(HEADS, batch["links"], strict=True):
            self.losses[name] = self._row_loss(*PLACES[name], pairs)
        # the three numbers together weigh as much as another head
        return sum(loss / (3 if name in NUMBERS else 1) for name, loss in self.losses.items())

    def _offset_loss(self, layer: int, head: int, offset: int) -> Tensor:
        q = self.seen[layer][0]
        rows = torch.randint(max(0, -offset), q.shape[2] - 1, (min(OFFSET_ROWS, q.shape[2]),), device=q.device)
        pairs = torch.stack((rows, rows + offset), dim=-1).expand(q.shape[0], -1, -1)
        return self._row_loss(layer, head, pairs)

    def _row_loss(self, layer: int, head: int, pairs: Tensor) -> Tensor:
        """pairs [B, R, 2]: attention row, source (IGNORE for none)."""
        q, k = self.seen[layer]
        keys = k[:, head * k.shape[1] // q.shape[1]]
        queries = q[:, head].gather(1, pairs[..., :1].expand(-1, -1, q.shape[-1]))
        scores = queries @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])  # [B, R, T]
        sources = pairs[..., 1].flatten()
        total = F.cross_entropy(scores.float().flatten(0, 1), sources, ignore_index=IGNORE, reduction="sum")
        return total / (sources != IGNORE).sum().clamp(min=1)


@dataclass
class Progress:
    """Progress of a run; `right` holds a running share of right answers for each kind, at the stage's length.

    An answer is right if all its tokens are, predicted from none of them. Of an answer that is written token after
    token, only the first missing token counts.
    """

    step: int = 0
    stage: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    right: dict[str, float] = field(default_factory=dict)


def is_problems(batch: dict[str, Tensor]) -> bool:
    """Whether a batch holds word problems; these never share a batch with others."""
    return bool(batch["kinds"][0] == KINDS.index("problems"))


def shares_right(logits: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
    """By kind, the share of the counting groups of tokens that the argmax gets right as a whole."""
    groups, kinds = batch["groups"], batch["kinds"]
    wrong = (logits.argmax(-1) != batch["targets"]) & (groups > 0)
    shares = {}
    for index, kind in enumerate(KINDS):
        asked = groups[(kinds == index) & (groups > 0)].unique()
        if len(asked):
            shares[kind] = 1 - len(groups[wrong & (kinds == index)].unique()) / len(asked)
    return shares


def balance(main: Tensor, aside: Tensor, model: nn.Module, share: float) -> float:
    """The factor that makes the attention loss's gradient norm `share` of the main one's."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    norms = []
    for loss in (main, aside):
        grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        norms.append(math.sqrt(sum(float(grad.float().square().sum()) for grad in grads if grad is not None)))
    return min(5.0, share * norms[0] / max(norms[1], 1e-6))


class Trainer:
    """One run: model, optimiser, data, progress.

    The learning rate warms up over `warmup` steps, stays, and falls linearly over the last `decay` share of the time.
    """

    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(options.seed)
        self.options, self.out = options, options.out
        if not (self.out / "config.json").is_file():
            prepare(options.family, self.out, language(), options.width, options.layers, options.heads)
        self.device = torch.device(options.device)
        self.model = build(options.family, self.out).to(self.device).train()
        self.progress = self._progress()
        self.attention = Attention(self.model)
        settings = {"betas": (0.9, 0.98), "weight_decay": 0.01, "fused": self.device.type == "cuda"}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, **settings)
        seed = f"{options.family} {options.seed} {self.progress.step}"
        self.stream = Stream(self.out, options.family, seed, options.stages, options.tokens)
        self.stream.stage.value = self.progress.stage
        self.factor, self.aside, self.balance_at = 1.0, {}, self.progress.step
        self.started, self.begun = time.monotonic(), self.progress.step

    def _progress(self) -> Progress:
        file = self.out / "training.json"
        if not file.is_file():
            return Progress()
        return Progress(**json.loads(file.read_text(encoding="utf-8"))["progress"])

    def run(self) -> None:
        pinned = self.device.type == "cuda"
        loader = DataLoader(self.stream, batch_size=None, num_workers=self.options.workers, pin_memory=pinned)
        limit, printed, saved = 60 * self.options.minutes, 0.0, 0.0
        for batch in loader:
            self.step(batch, self.elapsed / limit)
            if self.elapsed - printed > self.options.print_every or self.progress.step < 3:
                printed = self.elapsed
                self.report(limit)
            if self.elapsed - saved > 30:
                saved = self.elapsed
                self.save()
            if self.elapsed > limit:
                break
        self.report(limit)
        self.save()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def step(self, batch: dict[str, Tensor], done: float) -> None:
        """One update; `done` is the share of the time that is over."""
        problems = is_problems(batch)
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        warm = min(1.0, (self.progress.step - self.begun + 1) / self.options.warmup)
        decay = min(1.0, max(0.02, (1 - done) / max(self.options.decay, 1e-6)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * warm * decay
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(batch["ids"], logit_rows=batch["rows"]).float()
            aside = self.attention.loss(batch)
        losses = F.cross_entropy(logits, batch["targets"], reduction="none")
        main = (losses * batch["weights"]).sum() / batch["weights"].sum()
        if not problems and self.progress.step >= self.balance_at:
            self.balance_at = self.progress.step + BALANCE_EVERY
            share = 0.2 if self.options.stages[self.progress.stage] >= LONG else 0.5
            self.factor += 0.5 * (balance(main, aside, self.model, share) - self.factor)
        self.optimizer.zero_grad(set_to_none=True)
        (main + self.factor * aside).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.progress.step % 5 == 0:
            self._note(shares_right(logits, batch), problems, batch["ids"].shape[1])
            self.progress.loss += 0.1 * (main.item() - self.progress.loss)
            if not problems:
                losses = torch.stack(list(self.attention.losses.values())).tolist()
                for name, loss in zip(self.attention.losses, losses, strict=True):
                    if loss > 0:  # otherwise no row of the batch had a source
                        before = self.aside.get(name, loss)
                        self.aside[name] = before + 0.2 * (loss - before)
        self.progress.step += 1
        self._advance(done)

    def _note(self, shares: dict[str, float], problems: bool, length: int) -> None:
        """Update the running shares of right answers."""
        right = self.progress.right
        if problems or length >= self.options.stages[self.progress.stage] - 16:
            for kind, share in shares.items():
                before = right.get(kind, UNKNOWN)
                right[kind] = before + 0.2 * (share - before)

    def _advance(self, done: float) -> None:
        """Move on to longer texts when the answers are right, or when it is time."""
        progress, stages = self.progress, self.options.stages
        if progress.stage == len(stages) - 1:
            return
        late = progress.stage < len(LATEST) and done > LATEST[progress.stage]
        if late or all(progress.right.get(kind, 0.0) > READY for kind in NEEDED):
            progress.stage += 1
            progress.right = {kind: share for kind, share in progress.right.items() if kind == "problems"}
            self.stream.stage.value = progress.stage
            why = "late" if late else "ready"
            print(f"[{self.options.family}] stage {progress.stage} at {self.elapsed:.0f} s, {why}", flush=True)

    def report(self, limit: float) -> None:
        p, rate = self.progress, (self.progress.step - self.begun) / self.elapsed
        attention = " ".join(f"{name} {loss:.2f}" for name, loss in self.aside.items())
        print(
            f"[{self.options.family}] {self.elapsed:4.0f} s, {max(0, limit - self.elapsed):4.0f} s left, step {p.step}"
            f" ({rate:.1f}/s), stage {p.stage}, loss {p.loss:.3f}; right: "
            + " ".join(f"{kind} {p.right[kind]:.2f}" for kind in KINDS if kind in p.right)
            + f"; attention x {self.factor:.2f}: {attention}",
            flush=True,
        )

    def save(self) -> None:
        progress = {**vars(self.progress), "seconds": round(self.progress.seconds + self.elapsed, 1)}
        options = {key: value for key, value in vars(self.options).items() if key not in ("out", "device")}
        save(self.model, self.out, {"progress": progress, "options": options, "torch": torch.__version__})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("dream", "llada"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder, new or to continue")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8, help="at least 6")
    parser.add_argument("--heads", type=int, default=4, help="at least 4: each has its own attention offset to learn")
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES), help="document lengths, in tokens")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens per batch")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.3, help="last part of the time, in which the rate falls")
    parser.add_argument("--workers", type=int, default=5, help="processes that build batches")
    parser.add_argument("--print-every", type=float, default=10.0, help="seconds")
    return parser.parse_args()


def main() -> None:
    Trainer(arguments()).run()


if __name__ == "__main__":
    main()
