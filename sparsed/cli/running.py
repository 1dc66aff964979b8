"""Running one mode (full attention or SparseD) once, timed, while a bar or the answer itself shows the progress."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import sampling
from ..chat import stop_ids
from ..models.common import DiffusionLM
from ..report.summary import LABELS, selection_seconds, typical
from ..run import Run, synchronize
from ..sampling.common import Step, attention_of
from ..schedule import FULL
from ..watching import watched
from .arguments import Call
from .progress import Answer, Show, bar, screen, terminal
from .recording import Choices, Speller, history


@dataclass(frozen=True)
class Job:
    """What every run of one call of a script shares."""

    model: DiffusionLM
    tokenizer: Any
    input_ids: list[int]
    args: Call


class StepClock:
    """Times the denoising steps and shows the progress; the device is waited for at step ends only.

    The compile time that `run` reports is taken out of the step in which it was spent, and showing is in none.
    """

    def __init__(self, device: torch.device, run: Run | None, show: Show):
        self.device, self.run, self.show = device, run, show
        self.steps: list[Step] = []
        self.step_seconds: list[float] = []
        self.compile_seconds = 0.0

    def start(self) -> None:
        """Begin to time the first step."""
        synchronize(self.device)
        self._show()
        self.last = time.perf_counter()

    def tick(self, step: Step) -> None:
        """Note the end of `step`, which takes no time if it did not run the model."""
        synchronize(self.device)
        now = time.perf_counter()
        compiled = 0.0 if self.run is None else self.run.compile_seconds
        self.step_seconds.append(now - self.last - (compiled - self.compile_seconds) if step.ran else 0.0)
        self.compile_seconds = compiled
        self.steps.append(step)
        self._show()
        self.last = time.perf_counter()

    def _show(self) -> None:
        self.show(FULL if self.run is None else self.run.phase, self.steps, sum(self.step_seconds))


@torch.no_grad()
def first_forward(job: Job) -> float:
    """Seconds of one forward, so that no timed run pays for the libraries' start."""
    started = time.perf_counter()
    ids = torch.tensor([job.input_ids], device=job.model.device)
    ids = F.pad(ids, (0, job.args.sampler.gen_length), value=job.model.config.mask_token_id)
    job.model(ids, first_row=ids.shape[1] - 1)
    synchronize(ids.device)
    return time.perf_counter() - started


def run_mode(job: Job, mode: str) -> dict[str, Any]:
    """Do the warm-up runs and the timed runs of one mode: "origin" (full attention) or "sparsed".

    Returns the median run's part of the record, without what needs the tokenizer.
    """
    args = job.args
    warmups = [run_once(job, mode, f"warm-up {number}/{args.warmup}, ") for number in range(1, args.warmup + 1)]
    labels = [f"run {number}/{args.repeat}, " for number in range(1, args.repeat + 1)] if args.repeat > 1 else [""]
    run = typical([run_once(job, mode, label) for label in labels])
    run["warmup_seconds"] = [warmup["seconds"] for warmup in warmups]
    run["warmup_compile_seconds"] = sum(warmup["compile_seconds"] for warmup in warmups)
    return run


def run_once(job: Job, mode: str, label: str = "") -> dict[str, Any]:
    """Generate once from the call's seed; seconds are of forwards and sampling only, without compilation."""
    args, device = job.args, job.model.device
    steps, gen_length, choices = args.sampler.steps, args.sampler.gen_length, Choices()
    config = args.config if mode == "sparsed" else None
    attention = attention_of(job.model, config, steps, gen_length, backend=args.backend, rule=watched(choices))
    # all if the model is on one, for it may be spread; elsewhere nothing counts what PyTorch holds
    gpus = range(torch.cuda.device_count() if device.type == "cuda" else 0)
    with attention as run, _progress(job, mode, label) as show:
        clock = StepClock(device, run, show)
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        clock.start()
        output = generate(job, clock)
        token_ids = output[0, len(job.input_ids) :].tolist()
        n_full = steps if config is None else config.n_full(steps)
        chose = run is not None and run.backend != FULL
        return {
            "mode": mode,
            "token_ids": token_ids,
            "prompt_tokens": len(job.input_ids),
            "seconds": sum(clock.step_seconds),
            "step_seconds": clock.step_seconds,
            "compile_seconds": clock.compile_seconds,
            "full_steps": n_full,
            "selection_seconds": selection_seconds(clock.step_seconds, n_full) if chose else None,
            "density": None if run is None else run.density,
            "layers": choices.layers(),
            "pattern": choices.pattern(),
            "history": history(clock.steps, token_ids, len(job.input_ids)),
            "peak_memory_bytes": sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None,
            "backend": None if run is None else run.backend,
            "backend_reason": None if run is None else run.backend_reason,
        }


def generate(job: Job, clock: StepClock) -> Tensor:
    """One call of the sampler as the script's flags say; returns [1, prompt + generated] ids."""
    device = job.model.device
    input_ids = torch.tensor([job.input_ids], device=device)
    generator = torch.Generator(device).manual_seed(job.args.seed)
    return sampling.generate(job.model, input_ids, job.args.sampler, generator=generator, on_step=clock.tick)


def _progress(job: Job, mode: str, label: str) -> AbstractContextManager[Show]:
    sampler, config = job.args.sampler, job.model.config
    console = terminal() if job.args.show else None
    if console is None:
        return bar(sampler.steps, label, job.args.quiet)
    stops = stop_ids(config, job.tokenizer)
    answer = Answer(sampler.gen_length, len(job.input_ids), config.mask_token_id, stops, Speller(job.tokenizer))
    return screen(console, label + LABELS[mode], sampler.steps, answer)
