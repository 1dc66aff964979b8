"""Running one mode (full attention or SparseD) once, timed, while a bar or the answer itself shows the progress."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from msgspec import structs
from torch import Tensor

from .. import sampling
from ..chat import Speller, answer_length, decode, stop_ids
from ..laps import Laps
from ..models.common import DiffusionLM
from ..prompts import answer_found
from ..report.record import Mode, Phase, RunRecord, forwards_of
from ..report.summary import LABELS, prefix_fields, typical, work_of
from ..report.view import DONE
from ..run import SparseRun, synchronize
from ..sampling import Settings, schedule_of
from ..sampling.common import CACHED, Step, attention_of
from ..watching import watched
from .arguments import Call
from .progress import Answer, Show, bar, screen, terminal
from .recording import SelectedBlocks, history

# prompt tokens of forwards that are run only to compile kernels
SHORT = 256


@dataclass(frozen=True)
class Job:
    """What all runs of one call share; `expected` is the answer that the prompt asks for, if known."""

    model: DiffusionLM
    tokenizer: Any
    input_ids: list[int]
    args: Call
    expected: str | None = None


class StepClock:
    """Times the denoising steps and shows the progress.

    The compile time that `run` reports is taken out of the step in which it was spent. Showing counts in no step.
    """

    def __init__(self, device: torch.device, run: SparseRun | None, show: Show):
        self.laps, self.run, self.show = Laps(device), run, show
        self.steps: list[Step] = []

    def start(self) -> None:
        """Begin to time the first step."""
        self.laps.mark()

    def begin(self, phase: str) -> None:
        """Show the phase that begins: what the next forward computes, or DONE."""
        self.laps.pause()
        self.show(phase, self.steps, sum(self._of_forwards(self.laps.finished)))
        self.laps.resume()

    def tick(self, step: Step) -> None:
        """Note the end of `step`, which takes no time if it did not run the model."""
        self.laps.deduct(0.0 if self.run is None else self.run.compile_seconds)
        self.laps.mark()
        self.steps.append(step)

    def step_seconds(self) -> list[float]:
        """Of all steps; waits for the last one."""
        return self._of_forwards(self.laps.seconds())

    def _of_forwards(self, laps: list[float]) -> list[float]:
        """Of the steps whose laps are known."""
        return [lap if step.ran else 0.0 for step, lap in zip(self.steps, laps, strict=False)]

    @property
    def phases(self) -> list[Phase]:
        """Of the steps that are over."""
        return [Phase(step.phase) for step in self.steps]


@torch.no_grad()
def first_forward(job: Job) -> float:
    """Seconds of one forward, and of cached ones if the run has some: so no timed run pays for the libraries' start."""
    started = time.perf_counter()
    ids = torch.tensor([job.input_ids], device=job.model.device)
    ids = F.pad(ids, (0, job.args.sampler.gen_length), value=job.model.config.mask_token_id)
    job.model(ids, first_row=ids.shape[1] - 1)
    if job.args.sampler.cached:
        first_cached_forwards(job, ids)
    synchronize(ids.device)
    return time.perf_counter() - started


def first_cached_forwards(job: Job, ids: Tensor) -> None:
    """Run a block's rows and the generated region's over a cache: the kernels are those of any length."""
    sampler = job.args.sampler
    ids = ids[:, -sampler.gen_length - SHORT :].repeat(sampler.sequences, 1)
    cache, start = job.model.kv_cache(*ids.shape), ids.shape[1] - sampler.gen_length
    job.model(ids, first_row=ids.shape[1] - 1, cache=cache)
    for stop in (start + sampler.most_rows, ids.shape[1]):
        rows = job.model.rows(start - sampler.shift, stop, ids.shape[1], None)
        job.model(ids[:, rows.start : rows.stop], rows=rows, cache=cache)


def run_mode(job: Job, mode: Mode) -> RunRecord:
    """Do the warm-up runs and the timed runs of one mode, "origin" (full attention) or "sparsed"; the median run's."""
    args = job.args
    warmups = [run_once(job, mode, f"warm-up {number}/{args.warmup}, ") for number in range(1, args.warmup + 1)]
    labels = [f"run {number}/{args.repeat}, " for number in range(1, args.repeat + 1)] if args.repeat > 1 else [""]
    return structs.replace(
        typical([run_once(job, mode, label) for label in labels]),
        warmup_seconds=[warmup.seconds for warmup in warmups],
        warmup_compile_seconds=sum(warmup.compile_seconds for warmup in warmups),
    )


def run_once(job: Job, mode: Mode, label: str = "") -> RunRecord:
    """Generate once from the call's seed; seconds are of forwards and sampling only, without compilation."""
    args, device = job.args, job.model.device
    sampler, choices = sampler_of(job, mode), SelectedBlocks(job.model.ranks)
    config, rule = args.config if mode == "sparsed" else None, watched(choices)
    how = {"backend": args.backend, "rule": rule, "schedule": schedule_of(sampler, config, rule)}
    attention = attention_of(job.model, config, sampler.steps, sampler.gen_length, **how)
    on_gpu = device.type == "cuda"  # elsewhere nothing counts what PyTorch holds
    with attention as run, _progress(job, mode, label) as show:
        clock = StepClock(device, run, show)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        clock.start()
        output = generate(job, sampler, clock)
        step_seconds = clock.step_seconds()
        clock.begin(DONE)
        token_ids = output[0, len(job.input_ids) :].tolist()
        committed = history(clock.steps, token_ids, len(job.input_ids))
        forwards = forwards_of(clock.phases, step_seconds, [step.computed for step in clock.steps], committed)
        length = answer_length(token_ids, stop_ids(job.model.config, job.tokenizer), job.model.config.mask_token_id)
        text = decode(job.tokenizer, token_ids[:length]).strip()
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
        return RunRecord(
            mode=mode,
            token_ids=token_ids,
            prompt_tokens=len(job.input_ids),
            seconds=sum(step_seconds),
            forwards=forwards,
            work=work_of(forwards, committed),
            **prefix_fields(forwards),
            compile_seconds=clock.laps.deducted,
            density=None if run is None else run.density,
            layers=choices.layers(),
            pattern=choices.pattern(),
            history=committed,
            pieces=Speller(job.tokenizer).pieces(token_ids),
            answer_tokens=length,
            text=text,
            expected=job.expected,
            answer_found=None if job.expected is None else answer_found(text, job.expected),
            peak_memory_bytes=sum(job.model.ranks.gathered(peak)) if on_gpu else None,
            backend=None if run is None else run.backend,
            backend_reason=None if run is None else run.backend_reason,
            cached_kernels=cached_kernels(job, sampler, clock.steps),
        )


def cached_kernels(job: Job, sampler: Settings, steps: list[Step]) -> list[str]:
    """The kernels that computed the cached steps' attention; with prefix, later steps have fewer rows."""
    length, rows = len(job.input_ids) + sampler.gen_length, {step.computed for step in steps if step.phase == CACHED}
    return sorted({job.model.attention_kernel(sampler.sequences, count, length) for count in rows})


def sampler_of(job: Job, mode: Mode) -> Settings:
    """How a mode samples; full attention in a comparison has no cache, threshold or early stop."""
    sampler = job.args.sampler
    return sampler.plain() if job.args.compare and mode == "origin" else sampler


def generate(job: Job, sampler: Settings, clock: StepClock) -> Tensor:
    """One call of the sampler as the script's flags say; returns [1, prompt + generated] ids."""
    device = job.model.device
    input_ids = torch.tensor([job.input_ids], device=device)
    generator = torch.Generator(device).manual_seed(job.args.seed)
    return sampling.generate(
        job.model,
        input_ids,
        sampler,
        end_token_ids=stop_ids(job.model.config, job.tokenizer) if sampler.early_stop else None,
        generator=generator,
        on_step=clock.tick,
        on_phase=clock.begin,
    )


def _progress(job: Job, mode: Mode, label: str) -> AbstractContextManager[Show]:
    sampler, config = sampler_of(job, mode), job.model.config
    console = terminal() if job.args.show else None
    if console is None:
        return bar(sampler.steps, label, job.args.quiet)
    stops = stop_ids(config, job.tokenizer)
    answer = Answer(sampler.gen_length, len(job.input_ids), config.mask_token_id, stops, Speller(job.tokenizer))
    return screen(console, label + LABELS[mode], sampler.steps, answer)
