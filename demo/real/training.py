"""One run of the adaptation, which can be stopped and continued."""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from demo.real.batches import Batch, Recipe
from demo.real.folders import digest, read_config, write_checkpoint, write_tensors
from sparsed.console.files import write_text
from sparsed.console.streams import tell

BETAS, DECAY, MOST_NORM = (0.9, 0.95), 0.01, 1.0
TOLD_EVERY = 20  # seconds


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights, by name: all but the biases, which stay zero; of the embedding only the mask's row."""
    embedding = model.model.embed_tokens.weight
    only = torch.zeros(len(embedding), 1, device=embedding.device)
    only[model.config.mask_token_id] = 1
    weights = {name: weight for name, weight in model.named_parameters() if not name.endswith("bias")}
    for weight in weights.values():
        weight.requires_grad_()
    embedding.register_hook(lambda gradient: gradient * only)
    return weights


def adam(model: nn.Module, weights: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """A group for each weight. Matrices decay, except the embedding: its other rows must not change."""
    embedding = model.model.embed_tokens.weight
    decays = [DECAY if weight.dim() == 2 and weight is not embedding else 0.0 for weight in weights]
    groups = [{"params": [weight], "weight_decay": decay} for weight, decay in zip(weights, decays, strict=True)]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=model.device.type == "cuda")


class Trainer:
    """A run in the folder `out`, as far as it has come.

    Args:
        base: the folder of the checkpoint that `model` is.
        ids: uint16, to train on.
        held_out: uint16, to measure the loss on; None for nothing.
    """

    def __init__(
        self,
        base: Path,
        out: Path,
        model: nn.Module,
        recipe: Recipe,
        ids: np.ndarray,
        held_out: np.ndarray | None = None,
    ):
        self.out, self.config, self.model, self.recipe = out, read_config(base), model, recipe
        self.ids, self.held_out = ids, held_out
        self.step, self.seconds, self.lines = 0, 0.0, []
        checkpoint = digest({name: weight.cpu() for name, weight in model.named_parameters()})
        made_from = {**asdict(recipe), "checkpoint": checkpoint, "tokens": hashlib.sha256(ids.tobytes()).hexdigest()}
        self.made_from = json.loads(json.dumps(made_from))  # as it is when read
        self.weights = trainable(model)
        if model.device.type == "cuda":
            for layer in model.model.layers:
                layer.compile()
        self.optimizer = adam(model, self.weights.values(), recipe.lr)
        self.state, self.losses = out / "training.safetensors", out / "losses.jsonl"

    def restore(self) -> None:
        """Continue from the state on disk, if there is one; ValueError if it is another run's."""
        if not self.state.exists():
            return
        try:
            with safe_open(self.state, framework="pt") as file:
                run = json.loads(file.metadata()["run"])
                stored = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{self.state} is not the state of a training: {error}") from None
        for name, value in self.made_from.items():
            if run["made_from"].get(name) != value:
                raise ValueError(f"{self.out} holds a run with another --{name}: {run['made_from'].get(name)}")
        self.step, self.seconds = run["step"], run["seconds"]
        moments = {}
        for index, (name, weight) in enumerate(self.weights.items()):
            weight.data.copy_(stored[f"weight {name}"])
            first, second = stored[f"first {name}"], stored[f"second {name}"]
            moments[index] = {"step": torch.tensor(float(self.step)), "exp_avg": first, "exp_avg_sq": second}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        lines = self.losses.read_text(encoding="utf-8").splitlines()
        self.lines = [line for line in lines if json.loads(line)["step"] <= self.step]

    def save(self) -> None:
        """The losses and the checkpoint, then the state, from which both can be made again."""
        write_text(self.losses, "".join(f"{line}\n" for line in self.lines))
        write_checkpoint(self.out, self.config, dict(self.model.named_parameters()))
        tensors = {}
        for name, weight in self.weights.items():
            state = self.optimizer.state[weight]
            named = {"weight": weight.detach(), "first": state["exp_avg"], "second": state["exp_avg_sq"]}
            tensors |= {f"{kind} {name}": tensor.cpu().contiguous() for kind, tensor in named.items()}
        run = {"made_from": self.made_from, "step": self.step, "seconds": self.seconds}
        write_tensors(self.state, tensors, {"run": json.dumps(run)})

    def run(self, minutes: float, save_every: int) -> None:
        """Train until all steps or `minutes` are over; save at the end and every `save_every` steps."""
        begun, until, told = time.monotonic() - self.seconds, self.seconds + 60 * minutes, 0.0
        over = self.step == self.recipe.steps
        if self.step == 0:
            self.check_held_out()
        while not over:
            line = self.update()
            self.seconds = round(time.monotonic() - begun, 3)
            self.lines.append(json.dumps({**line, "seconds": self.seconds}))
            over = self.step == self.recipe.steps or self.seconds >= until
            if over or self.step % save_every == 0:
                self.check_held_out()
                self.save()
            if over or self.seconds - told > TOLD_EVERY:
                told = self.seconds
                tell(f"step {self.step} of {self.recipe.steps}, {self.seconds:.0f} s: loss {line['loss']:.3f}")

    def update(self) -> dict[str, Any]:
        """One step; its line of the log has the bound in nats per token, over all its tokens and by length.

        Raises:
            FloatingPointError: the gradients are not finite; the weights are left as they were.
        """
        rate, batches = self.recipe.rate(self.step), self.recipe.batches(self.ids, self.step, self._mask)
        places, sums = sum(batch.places for batch in batches), []
        for batch in batches:
            loss = self.loss(batch)
            (loss / places).backward()
            sums.append(loss.detach())
        sums = torch.stack(sums).tolist()  # the first wait for the GPU
        norm = float(nn.utils.clip_grad_norm_(list(self.weights.values()), MOST_NORM))
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {self.step + 1} has gradients that are not finite: try a smaller one")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        line = {"step": self.step, "lr": rate, "norm": round(norm, 4), "loss": _bound(batches, sums)}
        return {**line, "by_length": _by_length(batches, sums)}

    @property
    def _mask(self) -> int:
        return self.model.config.mask_token_id

    def loss(self, batch: Batch) -> Tensor:
        """The masked tokens' cross-entropy in nats, weighted and summed; on a GPU the forward is in bfloat16."""
        batch = batch.to(self.model.device)
        cuda = self.model.device.type == "cuda"
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=cuda):
            logits = self.model(batch.ids, logit_rows=batch.rows)
        losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
        return (losses * batch.weights).sum()

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def check_held_out(self) -> None:
        """Log the bound by length on held-out ids, as many as a step has, always with the same windows and masks."""
        if self.held_out is None:
            return
        batches, generator = [], torch.Generator().manual_seed(0)
        for length in self.recipe.lengths:
            for _ in range(max(1, self.recipe.batch_tokens // self.recipe.at_once)):
                batches.append(self.recipe.batch(self.held_out, length, self._mask, 0.0, generator))
        found = _by_length(batches, [float(self.loss(batch)) for batch in batches])
        self.lines.append(json.dumps({"step": self.step, "held_out": found}))
        tell(f"step {self.step}, held out: " + ", ".join(f"{loss:.3f} at {length}" for length, loss in found.items()))


def _bound(batches: Sequence[Batch], sums: Sequence[float]) -> float:
    return round(sum(sums) / sum(batch.places for batch in batches), 5)


def _by_length(batches: list[Batch], sums: list[float]) -> dict[str, float]:
    """For each length the bound in nats per token: the masked tokens' cost over all tokens that could be masked."""
    found = {}
    for length in sorted({batch.ids.shape[1] for batch in batches}):
        pairs = [pair for pair in zip(batches, sums, strict=True) if pair[0].ids.shape[1] == length]
        found[str(length)] = _bound(*zip(*pairs, strict=True))
    return found
