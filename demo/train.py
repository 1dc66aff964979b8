"""Train a demo checkpoint: python -m demo.train --family dream --out runs/dream --minutes 8

Stops by itself after --minutes. Run again with the same --out it goes on, from the weights and with a short warm-up.
Weights are saved every half minute.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from demo.data import IGNORE, Builder, batches
from demo.model import build, prepare, save
from sparsed.models import load_tokenizer
from sparsed.prompts import language

STAGES = (256, 512, 1056, 4128)  # document lengths, in tokens
READY = 0.97  # share of right answers that ends a stage
OFFSETS = (-1, -2, -3, 1)  # what layer 0's heads look at
NAME_LAYER, NUMBER_LAYER, COPY_LAYER = 1, 2, 3
OFFSET_ROWS = 128
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
        layers = model.model.layers if model.family == "dream" else model.model.transformer.blocks
        for index in (0, NAME_LAYER, NUMBER_LAYER, COPY_LAYER):
            module = layers[index].self_attn if model.family == "dream" else layers[index]
            module.attend = self._recorder(index, module.attend)

    def _recorder(self, index: int, attend):
        def record(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None) -> Tensor:
            self.seen[index] = (q, k)
            return attend(q, k, v, key_valid)

        return record

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the supervised heads' attention rows against their known sources."""
        offsets = [self._offset_loss(head, offset) for head, offset in enumerate(OFFSETS)]
        names, copies = self._row_loss(NAME_LAYER, batch["names"]), self._row_loss(COPY_LAYER, batch["copies"])
        numbers = [self._row_loss(NUMBER_LAYER, pairs, head) for head, pairs in enumerate(batch["numbers_seen"])]
        return sum(offsets) / len(OFFSETS) + names + copies + sum(numbers) / len(numbers)

    def _offset_loss(self, head: int, offset: int) -> Tensor:
        length = self.seen[0][0].shape[2]
        rows = torch.randint(3, length - 1, (min(OFFSET_ROWS, length),), device=self.seen[0][0].device)
        pairs = torch.stack((rows, rows + offset), dim=-1).expand(self.seen[0][0].shape[0], -1, -1)
        return self._row_loss(0, pairs, head)

    def _row_loss(self, layer: int, pairs: Tensor, head: int = 0) -> Tensor:
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
    """Where a run is; `documents` and `problems` are running shares of wholly masked answers that are right."""

    step: int = 0
    stage: int = 0
    seconds: float = 0.0
    documents: float = 0.0
    problems: float = 0.0
    loss: float = 0.0


def is_documents(batch: dict[str, Tensor]) -> bool:
    """Whether a batch holds documents; word problems have no sources to copy from."""
    return bool((batch["copies"][..., 1] != IGNORE).any())


def answer_accuracy(logits: Tensor, batch: dict[str, Tensor]) -> float | None:
    """Share of the wholly masked answers whose every token the argmax gets right; None if there is no such answer."""
    numbers = batch["numbers"]
    whole = numbers > 0
    if not whole.any():
        return None
    wrong = (logits.argmax(-1) != batch["targets"]) & whole
    asked, failed = numbers[whole].unique(), numbers[wrong].unique()
    return 1 - len(failed) / len(asked)


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
        self.factor, self.aside, self.balance_at = 1.0, 0.0, self.progress.step
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
        documents = is_documents(batch)
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
        if documents and self.progress.step >= self.balance_at:
            self.balance_at = self.progress.step + BALANCE_EVERY
            share = 0.2 if self.progress.stage == len(self.options.stages) - 1 else 0.5
            self.factor += 0.5 * (balance(main, aside, self.model, share) - self.factor)
        self.optimizer.zero_grad(set_to_none=True)
        (main + self.factor * aside).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.progress.step % 5 == 0:
            self._note(answer_accuracy(logits, batch), documents, batch["ids"].shape[1])
            self.progress.loss += 0.1 * (main.item() - self.progress.loss)
            self.aside = aside.item()
        self.progress.step += 1

    def _note(self, accuracy: float | None, documents: bool, length: int) -> None:
        """Update the running accuracies; a curriculum stage ends when its documents' accuracy is high enough."""
        progress, stages = self.progress, self.options.stages
        if accuracy is None:
            return
        if not documents:
            progress.problems += 0.1 * (accuracy - progress.problems)
        elif length >= stages[progress.stage] - 16:
            progress.documents += 0.1 * (accuracy - progress.documents)
        if progress.documents > READY and progress.stage < len(stages) - 1:
            progress.stage, progress.documents = progress.stage + 1, 0.0
            self.stream.stage.value = progress.stage
            print(f"[{self.options.family}] stage {progress.stage} at {self.elapsed:.0f} s", flush=True)

    def report(self, limit: float) -> None:
        p, rate = self.progress, (self.progress.step - self.begun) / self.elapsed
        print(
            f"[{self.options.family}] {self.elapsed:4.0f} s, {max(0, limit - self.elapsed):4.0f} s left, step {p.step}"
            f" ({rate:.1f}/s), stage {p.stage}, loss {p.loss:.3f}, attention {self.aside:.2f} x {self.factor:.2f},"
            f" documents {p.documents:.3f}, problems {p.problems:.3f}",
            flush=True,
        )

    def save(self) -> None:
        progress = {**vars(self.progress), "seconds": round(self.progress.seconds + self.elapsed, 1)}
        options = {key: value for key, value in vars(self.options).items() if key not in ("out", "device")}
        save(self.model, self.out, {"progress": progress, "options": options, "torch": torch.__version__})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("dream", "llada"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder, made or gone on with")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6, help="at least 4")
    parser.add_argument("--heads", type=int, default=4, help="at least 4, each has its own attention offset to learn")
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES), help="document lengths, in tokens")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens a batch")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.3, help="share of the time in which the rate falls")
    parser.add_argument("--workers", type=int, default=7, help="processes that build batches")
    parser.add_argument("--print-every", type=float, default=10.0, help="seconds")
    return parser.parse_args()


if __name__ == "__main__":
    Trainer(arguments()).run()
