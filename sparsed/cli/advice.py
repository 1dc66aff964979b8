"""`--advise`: time single steps, and say how long a whole run would take with full attention and with SparseD."""

import math
import shlex
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from ..backends import DENSE
from ..backends.flash import FLASH_FROM
from ..console.workers import with_launcher
from ..patch import sparsify
from ..report.record import Phase, prefix
from ..report.summary import ORDER
from ..sampling.common import Step
from ..sampling.replay import UNTIL_REPLAYED
from ..sampling.runner import REPLAYED_TOKENS, StepRunner
from ..watching import watched
from .arguments import Call
from .losses import ABOUT, ELSEWHERE, loss, lost
from .progress import bar
from .recording import SelectedBlocks
from .running import Job, StepClock
from .ways import Forwards, as_record, canvas_of, no_cache, time_few_rows, way_lines, ways

# prompt tokens of the shorter measurement: on a GPU, enough that the kernels are those of long prompts
SHORT_ON_GPU, SHORT = FLASH_FROM, 1024
# the flags of SparseD, which mean nothing to full attention
SPARSED = ("skip", "select", "block_size", "dense_answer", "backend")
# dense answer rows are timed with as many blocks as the paper's rule keeps (closer to full attention than it), and with
# half as many (as close as it); below the share FEWEST no measurement supports that (docs/results.md, "Dense answer
# rows")
FEWER_BLOCKS, FEWEST = (1, 2), 0.1


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step of each kind on a prompt of `prompt_tokens`; `selecting` is a full step that also selects."""

    prompt_tokens: int
    full: float
    selecting: float
    sparse: float
    density: float | None
    backend: str | None


def fitted_lengths(prompt_tokens: int, device: torch.device) -> tuple[int, int]:
    """Prompt tokens of the two measurements that tell from which length on SparseD pays: one at least twice the other.

    The prompt's own length is one of them, unless it is too short to say anything about longer ones.
    """
    short = SHORT_ON_GPU if device.type == "cuda" else SHORT
    if prompt_tokens >= 2 * short:
        return short, prompt_tokens
    lowest = max(short, prompt_tokens)
    return lowest, 2 * lowest


def advise(job: Job) -> dict[str, Any]:
    """Time steps and put whole runs together, for the record.

    Returns:
        `steps`, the times at each length; `steps_that_run`, how many of the whole run's steps call the model;
        `origin_seconds` and `sparsed_seconds` of the whole run; `fitted_prompt_tokens`, the `fitted_lengths`;
        `pays_from`, the shortest prompt for which SparseD is faster (not below the shortest that was timed), None if
        nothing shows that it ever is; `command`, which runs the faster of the two; `dense_answer`, the same for runs
        with dense answer rows, unless the call has them itself; and what `_ways` gives.

    Raises:
        BackendError: the named backend cannot run.
        FloatingPointError: the model's logits are not finite.
    """
    args, sampler, prompt_tokens = job.args, job.args.sampler.plain(), len(job.input_ids)
    short, long = fitted_lengths(prompt_tokens, job.model.device)
    lengths = sorted({short, long, prompt_tokens})
    for length in lengths[: lengths.index(short) + 1]:  # the first use of a kernel compiles it
        time_steps(job, length)
    times = {length: time_steps(job, length) for length in lengths}
    ran, n_full = [not idle for idle in sampler.idle], args.config.n_full(sampler.steps)
    runs = {length: whole_runs(found, ran, n_full) for length, found in times.items()}
    origin, sparsed = runs[prompt_tokens]
    beyond = break_even(*((length + sampler.gen_length, runs[length][0] - runs[length][1]) for length in (short, long)))
    pays_from = None if beyond is None else max(short, math.ceil(beyond) - sampler.gen_length)
    if sparsed < origin:  # what was timed counts more than what follows from it
        pays_from = min(pays_from or prompt_tokens, prompt_tokens)
    dense = _dense_answer(job, times[prompt_tokens], ran)
    return {
        "steps": [asdict(found) for found in times.values()],
        "steps_that_run": sum(ran),
        "origin_seconds": origin,
        "sparsed_seconds": sparsed,
        "fitted_prompt_tokens": [short, long],
        "pays_from": pays_from,
        "command": command_of(args, job.model.ranks.count, origin=sparsed >= origin),
        "dense_answer": dense,
        **_ways(job, times[prompt_tokens], (origin, sparsed), dense),
    }


def _ways(job: Job, own: StepTimes, whole: tuple[float, float], dense_answer: list[dict[str, Any]]) -> dict[str, Any]:
    """`ways`, the whole runs with caches and without, the fastest first; or `no_cache`, why none was timed."""
    reason = no_cache(job, own.prompt_tokens)
    if reason is not None:
        return {"ways": [], "no_cache": reason}
    answer, cached = time_few_rows(job, own.prompt_tokens)
    forwards = Forwards(own.full, own.selecting, own.sparse, answer, cached)
    dense = {
        found["select"]: replace(forwards, selecting=found["selecting"], sparse=found["sparse"])
        for found in dense_answer
    }
    found = ways(job, forwards, whole, own.backend == DENSE, dense)
    return {
        "ways": as_record(found, partial(command_of, job.args, job.model.ranks.count)),
        "forwards": asdict(forwards),
    }


def _dense_answer(job: Job, own: StepTimes, ran: list[bool]) -> list[dict[str, Any]]:
    """How long whole runs with dense answer rows would take; their full steps last as long as the job's own."""
    found: list[dict[str, Any]] = []
    given = job.args.config
    if own.backend == DENSE or given.dense_answer:
        return found
    for select in (given.select / fewer for fewer in FEWER_BLOCKS):
        if select < FEWEST:
            continue
        config = replace(given, select=select, dense_answer=True)
        times = time_steps(replace(job, args=replace(job.args, config=config)), own.prompt_tokens)
        seconds = whole_runs(replace(times, full=own.full), ran, config.n_full(len(ran)))[1]
        command = command_of(job.args, job.model.ranks.count, origin=False, select=select, dense_answer=True)
        found.append(
            {
                **asdict(times),
                "select": select,
                "seconds": seconds,
                "nats": loss(config, job.args.sampler, own.prompt_tokens),
                "command": command,
            }
        )
    return found


@torch.no_grad()
def time_steps(job: Job, prompt_tokens: int) -> StepTimes:
    """Time one step of each kind, the real forward without sampling, on the prompt repeated or cut to that length."""
    model, device, args, sampler = job.model, job.model.device, job.args, job.args.sampler.plain()
    canvas = canvas_of(job, prompt_tokens)
    # as many as the first step of a generation reads
    rows = prompt_tokens - 1 + torch.arange(sampler.most_rows, device=device)
    each = UNTIL_REPLAYED if canvas.numel() <= REPLAYED_TOKENS and device.type == "cuda" else 1
    steps = 2 * each + 1  # the full ones, one that selects the blocks, the sparse ones
    config = replace(args.config, skip=(each + 1) / steps)
    sparsed = sparsify(
        model,
        config,
        steps=steps,
        gen_length=sampler.gen_length,
        backend=args.backend,
        rule=watched(SelectedBlocks(model.ranks)),
    )
    with sparsed as run, run.sequence(canvas.shape), bar(steps, f"{prompt_tokens} tokens, ", args.quiet) as show:
        runner = StepRunner(model, run, None, prompt_tokens - 1, len(rows))
        clock = StepClock(device, run, show)
        clock.start()
        for index in range(steps):
            phase = runner.phase
            clock.begin(phase)
            runner(canvas, rows)
            clock.tick(Step(index, phase, canvas.shape[1]))
        runner.check()
        seconds = dict(zip(clock.phases, clock.step_seconds(), strict=True))  # of the last step of each phase
        full, selecting, sparse = (seconds.get(phase, seconds[Phase.FULL]) for phase in ORDER)
        return StepTimes(prompt_tokens, full, selecting, sparse, run.density, run.backend)


def whole_runs(times: StepTimes, ran: list[bool], n_full: int) -> tuple[float, float]:
    """Seconds of a whole run with full attention, and of one with SparseD that begins with `n_full` full steps.

    Args:
        ran: which of the steps call the model; the one that selects the blocks always does.
    """
    origin = sum(ran) * times.full
    if times.backend == DENSE or n_full == len(ran):
        return origin, origin
    seconds = dict(zip(ORDER, (times.full, times.selecting, times.sparse), strict=True)) | {Phase.IDLE: 0.0}
    return origin, sum(seconds[phase] for phase in prefix(ran, n_full, selects=True))


def break_even(shorter: tuple[int, float], longer: tuple[int, float]) -> float | None:
    """The length beyond which a run saves time, from the seconds saved at two lengths; None if there is none.

    Sparse attention saves in proportion to the square of the length, and costs in proportion to the length: seconds
    saved = a * length + b * length ** 2.
    """
    (one, saved_one), (other, saved_other) = shorter, longer
    square = (saved_other / other - saved_one / one) / (other - one)
    if square <= 0:
        return None
    return max(0.0, one - saved_one / one / square)


def advice_lines(advice: dict[str, Any], prompt_tokens: int, steps: int) -> list[str]:
    """The advice as it is printed."""
    own = next(found for found in advice["steps"] if found["prompt_tokens"] == prompt_tokens)
    origin, sparsed, pays_from = advice["origin_seconds"], advice["sparsed_seconds"], advice["pays_from"]
    short, long = advice["fitted_prompt_tokens"]
    idle = steps - advice["steps_that_run"]
    some = f"{steps} steps ({idle} of them commit nothing and run no model)" if idle else f"{steps} steps"
    some = f"at most {some}" if any(way["fewest"] < way["most"] for way in advice["ways"]) else some
    whole = f"{some} with full attention (--origin) would take {origin:.1f} s"
    if own["backend"] == DENSE:
        lines = [
            f"one step on {prompt_tokens} prompt tokens: {own['full']:.3f} s",
            f"{whole}, with SparseD the same: every block would be kept (use a longer prompt or smaller blocks)",
        ]
    else:
        lines = [
            f"one step on {prompt_tokens} prompt tokens: full {own['full']:.3f} s, full and selecting the blocks "
            f"{own['selecting']:.3f} s, sparse {own['sparse']:.3f} s (backend {own['backend']}, "
            f"density {own['density']:.1%})",
            f"{whole}, with SparseD {sparsed:.1f} s: {origin / sparsed:.2f}x as fast",
        ]
    if pays_from is None:
        lines.append("nothing shows that SparseD would pay with these settings, however long the prompt")
    else:
        about, fewer = ("", " or fewer") if pays_from <= short else ("about ", "")
        least = f"{about}{pays_from} prompt tokens on{fewer}"
        lines.append(f"with these settings SparseD pays from {least}, as steps at {short} and {long} tokens tell")
    others = advice["dense_answer"]
    for other in others:
        lines.append(
            f"with --dense_answer --select {other['select']:g}: a sparse step {other['sparse']:.3f} s, the whole run "
            f"{other['seconds']:.1f} s, {origin / other['seconds']:.2f}x as fast as full attention{lost(other['nats'])}"
        )
    lines += way_lines(advice["ways"]) if advice["ways"] else [f"no cache was timed: {advice['no_cache']}"]
    # full attention loses nothing, which says nothing
    lines.append(ABOUT if any(found["nats"] for found in (*others, *advice["ways"])) else ELSEWHERE)
    lines.append("(estimates from a single forward pass of each kind; loading, compiling and sampling are not in them)")
    lines.append(f"{'without a cache, ' if advice['ways'] else ''}use: {advice['command']}")
    fastest = min(others, key=lambda other: other["seconds"], default=None)
    if fastest is not None and fastest["seconds"] < min(origin, sparsed):
        lines.append(f"or, the fastest without a cache, though not the paper's method: {fastest['command']}")
    return lines


def command_of(args: Call, processes: int, *, origin: bool, **changes: Any) -> str:
    """The command that runs the call with full attention or SparseD; flags with their default value are left out.

    Flags that only say what becomes of the output are left out too, and those of SparseD with full attention.

    Args:
        processes: that run it together.
        changes: flags to be given another value.
    """
    parser = args.parser
    values = {**args.flags, **changes, "advise": False, "json": None, "quiet": False, "origin": origin}
    if origin:
        values |= {name: parser.get_default(name) for name in SPARSED}
    script = parser.prog.endswith(".py")
    words = with_launcher(["python", parser.prog] if script else [parser.prog], processes)
    for action in parser._actions:
        value = values.get(action.dest, action.default)
        if value != action.default:
            words += action.option_strings if value is True else [action.option_strings[0], str(value)]
    return shlex.join(words)
