"""What a record says: the phases of a run, its repeats, how two runs differ, and the lines that say so."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import Any

from msgspec import UNSET, structs

from .record import Commit, Forward, Phase, Repeats, RunRecord, Work, prefix

LABELS = {"origin": "full attention", "sparsed": "SparseD"}
ORDER = (Phase.FULL, Phase.SELECTING, Phase.SPARSE)
# steps of a run with a cache that compute only some rows, under the names of their times
FEW_ROWS = {Phase.ANSWER: "answer_steps", Phase.CACHED: "cached_steps"}


def attention(forwards: Sequence[Forward]) -> list[Phase]:
    """The phase of each step: an idle one counts as sparse once blocks are selected, else as full."""
    kinds, idle = [], Phase.FULL
    for forward in forwards:
        idle = Phase.SPARSE if forward.phase == Phase.SELECTING else idle
        kinds.append(idle if forward.phase == Phase.IDLE else forward.phase)
    return kinds


def phases(run: RunRecord) -> dict[str, float | None]:
    """Seconds of a run's full steps (without the selection), of the selection, of its sparse steps, and where it has
    any, of those of few rows.

    The selection is None where no pattern was selected, or where there is no other full step to compare with; its time
    then counts as that of a full step.
    """
    kinds = attention(run.forwards)
    full, selecting, sparse = (_seconds(kind, kinds, run.forwards) for kind in ORDER)
    # earlier versions call a step selecting that found every block to be kept, but record no time for it
    selection = selection_seconds(run.forwards) if run.selection_seconds is UNSET else run.selection_seconds
    selection = selection and max(0.0, selection)  # a difference of noisy times
    return {
        "full_steps": full + selecting - (selection or 0.0),
        "selection": selection,
        "sparse_steps": sparse if Phase.SPARSE in kinds else None,
        **{name: _seconds(kind, kinds, run.forwards) for kind, name in FEW_ROWS.items() if kind in kinds},
    }


def _seconds(kind: Phase, kinds: list[Phase], forwards: Sequence[Forward]) -> float:
    """Seconds of the forwards that stand where `kinds` has this one."""
    return sum(forward.seconds for forward, found in zip(forwards, kinds, strict=True) if found == kind)


def selection_seconds(forwards: Sequence[Forward]) -> float | None:
    """How much longer selecting forwards took than full ones of as many rows, by median; None without one of each."""
    selecting = [forward for forward in forwards if forward.phase == Phase.SELECTING]
    sizes = {forward.rows for forward in selecting}
    full = [forward.seconds for forward in forwards if forward.phase == Phase.FULL and forward.rows in sizes]
    return sum(forward.seconds - median(full) for forward in selecting) if full and selecting else None


def prefix_fields(forwards: Sequence[Forward]) -> dict[str, Any]:
    """What a record also says if its `forwards` are a prefix of full ones, the last selecting, then sparse ones."""
    kinds = attention(forwards)
    n_full, seconds = len(kinds) - kinds.count(Phase.SPARSE), [forward.seconds for forward in forwards]
    if kinds != prefix([True] * len(kinds), n_full, Phase.SELECTING in kinds):
        return {}
    return {"step_seconds": seconds, "full_steps": n_full, "selection_seconds": selection_seconds(forwards)}


def work_of(forwards: Sequence[Forward], history: list[list[Commit]]) -> Work:
    """What the forwards of a run with this history gave."""
    ran: Counter[Phase] = Counter(forward.phase for forward in forwards if forward.phase != Phase.IDLE)
    probabilities = [probability for step in history for _, _, probability in step]
    tokens, seconds = len(probabilities) - probabilities.count(None), sum(forward.seconds for forward in forwards)
    per_second = tokens / seconds if seconds else None
    return Work(dict(ran), tokens, probabilities.count(None), tokens / max(1, ran.total()), per_second)


def selected_in_vain(run: RunRecord) -> bool:
    """Whether blocks were selected for one sparse forward or none, too few to make up for it."""
    kinds = [forward.phase for forward in run.forwards]
    return Phase.SELECTING in kinds and kinds.count(Phase.SPARSE) <= 1


def typical(runs: list[RunRecord]) -> RunRecord:
    """The median run by time (of an even number, the faster of the two middle ones), with all of them as `repeats`.

    `repeats.seconds` are in the order they were run; `compile_seconds` are those of all.
    """
    chosen = sorted(runs, key=lambda run: run.seconds)[(len(runs) - 1) // 2]
    seconds = [run.seconds for run in runs]
    same = all(run.token_ids == chosen.token_ids for run in runs)
    repeats = Repeats(seconds, chosen.seconds, max(seconds) - min(seconds), same)
    return structs.replace(chosen, compile_seconds=sum(run.compile_seconds for run in runs), repeats=repeats)


def compare(origin: RunRecord, sparsed: RunRecord) -> dict[str, Any]:
    """How two runs on the same prompt differ, in tokens and in time."""
    return {**compare_tokens(origin, sparsed), "density": sparsed.density, **compare_times(origin, sparsed)}


def compare_tokens(origin: RunRecord, sparsed: RunRecord) -> dict[str, Any]:
    """How the answers differ: as texts, and token by token.

    `tokens` and `tokens_equal` count the whole generated region, `answer_tokens` and `answer_tokens_equal` what stands
    before the longer answer's end.
    """
    pairs = list(zip(origin.token_ids, sparsed.token_ids, strict=True))
    different = [position for position, (one, other) in enumerate(pairs) if one != other]
    first = different[0] if different else None
    length = max(run.answer_tokens or 0 for run in (origin, sparsed))
    return {
        "same_answer": origin.text == sparsed.text,
        "answer_tokens": length,
        "answer_tokens_equal": length - sum(position < length for position in different),
        "tokens": len(pairs),
        "tokens_equal": len(pairs) - len(different),
        "different_positions": different,
        "first_difference": first,
        "first_different_texts": None if first is None else [run.pieces[first] for run in (origin, sparsed)],
    }


def compare_times(origin: RunRecord, sparsed: RunRecord) -> dict[str, Any]:
    """`seconds` of each mode, and `speedup`, full attention's time over SparseD's.

    Both for the whole run, and for each phase of the SparseD run and the same steps of the full run. If the two have
    different numbers of steps, or one computes few rows in some, no steps are the same: the phases are each run's own,
    and have no speed-up.
    """
    one, other = phases(origin), phases(sparsed)
    few_rows = any(forward.phase in FEW_ROWS for run in (origin, sparsed) for forward in run.forwards)
    alike = len(origin.forwards) == len(sparsed.forwards) and not few_rows
    if alike:
        full, selecting, sparse = (_seconds(kind, attention(sparsed.forwards), origin.forwards) for kind in ORDER)
        one = {"full_steps": full + selecting, "selection": None, "sparse_steps": sparse or None}
    none = dict.fromkeys(one | other)
    one, other = none | one | {"whole": origin.seconds}, none | other | {"whole": sparsed.seconds}
    pairs = [(phase, one[phase] if alike or phase == "whole" else None, other[phase]) for phase in one]
    speedup = {phase: long / short if long is not None and short else None for phase, long, short in pairs}
    return {"seconds": {"origin": one, "sparsed": other}, "speedup": speedup}


def single_times(run: RunRecord) -> dict[str, Any]:
    """The same of a run that there is no other to compare with."""
    return {"seconds": {run.mode: {**phases(run), "whole": run.seconds}}, "speedup": {}}


def stretches(run: RunRecord, different: list[int]) -> list[tuple[bool, str]]:
    """A run's answer in stretches of text, each with whether its tokens differ from the other run's."""
    marked = set(different)
    tokens = [(position in marked, piece) for position, piece in enumerate(run.pieces[: run.answer_tokens])]
    groups = groupby(tokens, key=lambda token: token[0])
    return [(differs, "".join(piece for _, piece in group)) for differs, group in groups]


def run_lines(run: RunRecord) -> list[str]:
    """One run's times, density and backend, as they are printed."""
    seconds, kinds = phases(run), attention(run.forwards)
    sparse, few_rows = kinds.count(Phase.SPARSE), {kind: kinds.count(kind) for kind in FEW_ROWS}
    full = len(kinds) - sparse - sum(few_rows.values())
    alone = full == kinds.count(Phase.SELECTING) == 1  # the step that selects blocks is the only full one
    parts = [f"{_counted(full, 'selecting step' if alone else 'full step')} {seconds['full_steps']:.2f} s"]
    if seconds["selection"] is not None:
        parts.append(f"selection {seconds['selection']:.2f} s")
    if seconds["sparse_steps"] is not None:
        parts.append(f"{_counted(sparse, 'sparse step')} {seconds['sparse_steps']:.2f} s")
    parts += [
        f"{_counted(few_rows[kind], name.replace('_', ' ').removesuffix('s'))} {seconds[name]:.2f} s"
        for kind, name in FEW_ROWS.items()
        if few_rows[kind]
    ]
    lines = [f"{LABELS[run.mode]}: {run.seconds:.2f} s ({', '.join(parts)})"]
    if run.work is not None:
        lines.append(f"  {work_line(run.work)}")
    if run.repeats is not None and len(run.repeats.seconds) > 1:
        lines.append(f"  {repeats_line(run.repeats)}")
    if run.compile_seconds:
        lines.append(f"  first use of the kernel, not counted: {run.compile_seconds:.2f} s")
    if run.density is not None:
        lines.append(f"  density {run.density:.1%} of the (query, key) pairs")
    if run.backend is not None:
        lines.append(f"  backend {run.backend} ({run.backend_reason})")
    if run.cached_kernels:
        lines.append(f"  cached steps by the kernel {' and '.join(run.cached_kernels)}")
    return lines


def work_line(work: Work) -> str:
    """How many forwards a run took, and what each forward and each second gave, as printed."""
    ran = _counted(sum(work.forwards.values()), "forward")
    kinds = ", ".join(f"{count} {phase.value}" for phase, count in work.forwards.items())
    speed = f", {work.tokens_per_second:.3g} tokens per second" if work.tokens_per_second is not None else ""
    filled = f", and {work.filled} filled in" if work.filled else ""
    return f"{ran} ({kinds}) for {work.tokens} tokens, {work.tokens_per_forward:.3g} each{speed}{filled}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def expected_line(run: RunRecord) -> str:
    """Whether a run's answer holds the expected one, as it is printed."""
    return f"  expected answer {run.expected!r}: {'found' if run.answer_found else 'not found'}"


def repeats_line(repeats: Repeats) -> str:
    """The times of several runs, and whether they agree, in one line."""
    seconds = repeats.seconds
    line = f"median of {len(seconds)} runs, which took {min(seconds):.2f} to {max(seconds):.2f} s"
    return line if repeats.same_tokens else f"{line}; their tokens differ, with the same seed"


def verdict(comparison: dict[str, Any], expected: str | None, found: list[bool | None]) -> list[str]:
    """Sentences without full stops that say how two answers differ: as texts, against the expected one, in tokens.

    Args:
        expected: the answer that the prompt asks for, None if it is not known.
        found: whether full attention's answer holds it, and SparseD's.
    """
    lines = ["the same answer" if comparison["same_answer"] else "the answers differ"]
    if expected is not None:
        holding = [label for label, holds in zip(LABELS.values(), found, strict=True) if holds]
        only = f"found with {holding[0]} only" if holding else "found in neither"
        lines.append(f"expected answer {expected!r} {'found in both' if all(found) else only}")
    equal, total = comparison["tokens_equal"], comparison["tokens"]
    answer = f"{comparison['answer_tokens_equal']} of the answer's {comparison['answer_tokens']}"
    lines.append(f"the same tokens: {equal} of {total} ({equal / total:.1%}), {answer}")
    if comparison["different_positions"]:
        one, other = comparison["first_different_texts"]
        lines.append(
            f"the first that differs is number {comparison['first_difference'] + 1}: "
            f"{one!r} with {LABELS['origin']}, {other!r} with {LABELS['sparsed']}"
        )
    return lines


def comparison_lines(origin: RunRecord, sparsed: RunRecord, comparison: dict[str, Any]) -> list[str]:
    """The comparison of two runs as it is printed: the answers with what differs between [[ and ]], and the times."""
    lines = verdict(comparison, origin.expected, [origin.answer_found, sparsed.answer_found])
    if comparison["different_positions"]:
        for run in (origin, sparsed):
            parts = stretches(run, comparison["different_positions"])
            text = "".join(f"[[{text}]]" if differs else text for differs, text in parts)
            lines.append(f"  {LABELS[run.mode]}: {' '.join(text.split())}")
    lines.append(f"{'':14}{'full attention':>16}{'SparseD':>12}{'speed-up':>10}")
    for phase, speedup in comparison["speedup"].items():
        one, other = (_cell(comparison["seconds"][mode][phase], " s") for mode in LABELS)
        lines.append(f"{phase.replace('_', ' '):14}{one:>16}{other:>12}{_cell(speedup, 'x'):>10}")
    return lines


def _cell(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.2f}{unit}"
