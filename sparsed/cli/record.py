"""What a run leaves behind: the decoded answer, the comparison of two runs, lines for people, and the JSON record."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

CHAT_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>")
MARKS = ("[[", "]]")
LABELS = {"origin": "full attention", "sparsed": "SparseD"}


def stop_ids(config: Any, tokenizer: Any) -> set[int]:
    """The ids at which an answer ends: the model's EOS and pad, and the ends of a chat turn that the tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary[token] for token in CHAT_ENDS if token in vocabulary}
    return ends | {config.eos_token_id, config.pad_token_id}


def answer_length(token_ids: list[int], stops: set[int]) -> int:
    """How many tokens stand before the first stop id."""
    return next((position for position, token in enumerate(token_ids) if token in stops), len(token_ids))


def decode(tokenizer: Any, token_ids: list[int], *, special: bool = False) -> str:
    """The text of some ids, with or without special tokens; ids that the tokenizer lacks are skipped."""
    known = len(tokenizer)
    return tokenizer.decode([token for token in token_ids if token < known], skip_special_tokens=not special)


def phases(run: dict[str, Any]) -> dict[str, float | None]:
    """Seconds of a run's full steps (without the selection), of the selection, and of its sparse steps.

    The selection is None where no pattern was chosen, or where a lone full step leaves nothing to compare it with; its
    time then counts among the full steps.
    """
    steps, n_full = run["step_seconds"], run["full_steps"]
    selection = run["selection_seconds"]
    if selection is not None:
        selection = max(0.0, selection)  # a difference of noisy times
    return {
        "full_steps": sum(steps[:n_full]) - (selection or 0.0),
        "selection": selection,
        "sparse_steps": sum(steps[n_full:]) if n_full < len(steps) else None,
    }


def selection_seconds(step_seconds: list[float], n_full: int) -> float | None:
    """How much longer the step that selects took than the median of the other full steps; None if there is no such."""
    others = [seconds for seconds in step_seconds[: n_full - 1] if seconds > 0]  # a step that ran no model took 0.0
    if not others or n_full == len(step_seconds):
        return None
    return step_seconds[n_full - 1] - median(others)


def compare(origin: dict[str, Any], sparsed: dict[str, Any]) -> dict[str, Any]:
    """How two runs on the same prompt differ, in tokens and in time.

    A speed-up is full attention's time over SparseD's: for the whole run, and for each phase of the SparseD run
    against the same steps of the full run.
    """
    pairs = list(zip(origin["token_ids"], sparsed["token_ids"], strict=True))
    different = [position for position, (one, other) in enumerate(pairs) if one != other]
    n_full = sparsed["full_steps"]
    before = origin["step_seconds"]
    seconds = {
        "origin": {"full_steps": sum(before[:n_full]), "selection": None, "sparse_steps": sum(before[n_full:]) or None},
        "sparsed": phases(sparsed),
    }
    for run in (origin, sparsed):
        seconds[run["mode"]]["whole"] = run["seconds"]
    return {
        "tokens": len(pairs),
        "tokens_equal": len(pairs) - len(different),
        "different_positions": different,
        "first_difference": different[0] if different else None,
        "density": sparsed["density"],
        "seconds": seconds,
        "speedup": {phase: _ratio(seconds["origin"][phase], seconds["sparsed"][phase]) for phase in seconds["origin"]},
    }


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def mark(tokenizer: Any, token_ids: list[int], different: list[int], length: int) -> str:
    """The first `length` tokens as text, every stretch that differs from the other answer between [[ and ]]."""
    stretches: list[tuple[bool, list[int]]] = []
    marked = set(different)
    for position, token in enumerate(token_ids[:length]):
        differs = position in marked
        if not stretches or stretches[-1][0] != differs:
            stretches.append((differs, []))
        stretches[-1][1].append(token)
    texts = ((differs, decode(tokenizer, tokens)) for differs, tokens in stretches)
    return "".join(text.join(MARKS) if differs else text for differs, text in texts)


def run_lines(run: dict[str, Any]) -> list[str]:
    """One run, for people."""
    seconds, steps = phases(run), len(run["step_seconds"])
    parts = [f"{run['full_steps']} full steps {seconds['full_steps']:.2f} s"]
    if seconds["selection"] is not None:
        parts.append(f"selection {seconds['selection']:.2f} s")
    if seconds["sparse_steps"] is not None:
        parts.append(f"{steps - run['full_steps']} sparse steps {seconds['sparse_steps']:.2f} s")
    lines = [f"{LABELS[run['mode']]}: {run['seconds']:.2f} s ({', '.join(parts)})"]
    if run["compile_seconds"]:
        lines.append(f"  first use of the kernel, not counted: {run['compile_seconds']:.2f} s")
    if run["density"] is not None:
        lines.append(f"  density {run['density']:.1%} of the (query, key) pairs")
    if run["backend"] is not None:
        lines.append(f"  backend {run['backend']} ({run['backend_reason']})")
    if run["expected"] is not None:
        lines.append(f"  expected answer {run['expected']!r}: {'found' if run['answer_found'] else 'not found'}")
    return lines


def comparison_lines(comparison: dict[str, Any], texts: dict[str, str]) -> list[str]:
    """The comparison, for people; `texts` are the marked answers by mode."""
    equal, total = comparison["tokens_equal"], comparison["tokens"]
    lines = [f"the same tokens: {equal} of {total} ({equal / total:.1%})"]
    if comparison["different_positions"]:
        lines[0] += f"; the first that differs is number {comparison['first_difference'] + 1}, marked [[ ]]:"
        lines += [f"  {LABELS[mode]}: {' '.join(text.split())}" for mode, text in texts.items()]
    return lines + _speed_table(comparison)


def _speed_table(comparison: dict[str, Any]) -> list[str]:
    def cell(value: float | None, unit: str) -> str:
        return "-" if value is None else f"{value:.2f}{unit}"

    lines = [f"{'':14}{'full attention':>16}{'SparseD':>12}{'speed-up':>10}"]
    for phase, speedup in comparison["speedup"].items():
        one, other = (cell(comparison["seconds"][mode][phase], " s") for mode in LABELS)
        lines.append(f"{phase.replace('_', ' '):14}{one:>16}{other:>12}{cell(speedup, 'x'):>10}")
    return lines


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, device, number format and threads, for the record."""
    cuda = device.type == "cuda"
    return {
        "sparsed": _version(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "platform": platform.platform(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "device_name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The processor's name; Linux keeps it in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version() -> str | None:
    """The installed package's version, None in a checkout that is not installed."""
    try:
        return metadata.version("sparsed")
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file is in, -dirty if its files have changed since; None without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def temporary_beside(path: Path) -> Path:
    """Where this process writes a file before it gets its name, on the same disk."""
    return path.with_name(f".sparsed-{os.getpid()}.tmp")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write the record, whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    temporary = temporary_beside(path)
    try:
        # a file name that is not UTF-8 holds lone surrogates; with a backslash they are JSON's own escapes
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
