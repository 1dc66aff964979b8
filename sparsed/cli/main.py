"""From the flags to the answer: load, run, report, and turn what goes wrong into one line and an exit code."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import torch

from ..backends import BackendError
from ..chat import ChatTemplateError, TurnsError
from ..console.endings import blame
from ..console.environment import environment
from ..console.files import check_apart, write_json, write_text
from ..console.streams import Stdout, tell
from ..console.workers import as_one, own_device
from ..models import load_model, load_tokenizer
from ..models.common import DiffusionLM
from ..models.description import DESCRIPTION_FILES
from ..models.files import checkpoint_folder
from ..models.loading import empty_model, model_family, resolve_device, resolve_dtype
from ..models.parallel import check_count
from ..models.weights import WEIGHT_FILES
from ..prompts import demo_path, make_prompt
from ..ranks import Ranks
from ..report.page import page
from ..report.record import Mode, Record
from ..report.summary import compare, comparison_lines, expected_line, run_lines, selected_in_vain
from ..sampling.canvas import PromptError, check_prompt
from .advice import advice_lines, advise, fitted_lengths
from .arguments import Call, parse
from .families import DREAM, FAMILIES, LLADA, Family
from .memory import check_memory
from .running import Job, first_forward, run_mode


def main_dream(argv: list[str] | None = None) -> int:
    """Run `dream_generation.py` with these words (None: the process's own); returns the exit code."""
    return _main(DREAM, argv)


def main_llada(argv: list[str] | None = None) -> int:
    """Run `llada_generation.py` with these words (None: the process's own); returns the exit code."""
    return _main(LLADA, argv)


def _main(family: Family, argv: list[str] | None) -> int:
    advice = "try a shorter --prompt or --seq_len, --dtype bfloat16, or a device with more memory"
    program = os.path.basename(sys.argv[0])

    def work(ranks: Ranks) -> None:
        _generate(_of_rank(parse(family, argv), ranks), ranks)

    return as_one(work, program, advice=advice, ending=argv is None)


def _of_rank(args: Call, ranks: Ranks) -> Call:
    """The call for one of several processes: on its own device; only the first process writes files."""
    if ranks.count == 1:
        return args
    with blame(args, "--device"):
        args = replace(args, device=own_device(args.device, ranks))
    return args if ranks.index == 0 else replace(args, json=None, report=None)


def _generate(args: Call, ranks: Ranks) -> None:
    """One call of a script: everything between the checked flags and the record."""
    if args.quiet:
        huggingface_hub.utils.disable_progress_bars()
    path = _model_path(args)
    _check_checkpoint_kept(args, path)
    with blame(args, args.source):
        tokenizer = load_tokenizer(path)
    turns = "--chat" if args.prompt_option == "--chat" else "--system"
    with blame(args, args.prompt_option), blame(args, turns, (TurnsError,)):
        with blame(args, args.source, (ChatTemplateError,)):
            prompt = make_prompt(tokenizer, args.prompt, args.text, args.earlier, raw=args.raw)
    device = resolve_device(args.device)
    with blame(args, args.source):
        outline = empty_model(checkpoint_folder(path, DESCRIPTION_FILES)).to(resolve_dtype(args.dtype, device))
        check_count(outline, ranks.count)
    with blame(args, args.prompt_option, (PromptError,)):
        check_prompt(torch.tensor([prompt.input_ids]), outline.config.mask_token_id, outline.config.vocab_size)
    tokens = len(prompt.input_ids)
    check_memory(outline, ranks, args, fitted_lengths(tokens, device)[1] if args.advise else tokens)
    started = time.perf_counter()
    with blame(args, args.source):
        model = load_model(path, device=args.device, dtype=args.dtype, tensor_parallel=ranks.group)
    load_seconds = time.perf_counter() - started
    trained = model.config.max_length
    if not args.quiet:
        tell(_heading(args, tokens, model))
        if tokens > trained:
            tell(f"warning: the prompt has {tokens} tokens, this model was trained on at most {trained}")
    job = Job(model, tokenizer, prompt.input_ids, args, prompt.expected)
    # a record is worth writing without stdout too
    stdout = Stdout(keep_going=args.json is not None or args.report is not None)
    with blame(args, "--backend", (BackendError,)), blame(args, "--dtype", (FloatingPointError,)):
        made = {"advice": advise(job)} if args.advise else _answers(job, stdout)
    if args.advise:
        stdout.say("\n".join(advice_lines(made["advice"], tokens, args.sampler.steps)))
    made |= {
        "trained_length": trained,
        "beyond_trained_length": tokens > trained,
        "load_seconds": load_seconds,
        "environment": {**environment(model.device, model.dtype), "processes": ranks.count},
        "arguments": {**args.flags, "model_path": path},
    }
    record = made if args.advise else msgspec.to_builtins(Record(**made))
    if args.json is not None:
        with blame(args, "--json"):
            write_json(args.json, record)
    if args.report is not None:
        with blame(args, "--report"):
            write_text(args.report, page(record))
    stdout.finish()


def _model_path(args: Call) -> str:
    """The folder or hub id to load; refused early if it holds the other family or something unsupported."""
    family = args.family
    if args.demo:
        with blame(args, "--demo"):
            return str(demo_path(family.name))
    path = args.model_path or family.model_path
    with blame(args, "--model_path"):
        other = FAMILIES[model_family(path)]
    if other != family:
        args.parser.error(f"argument --model_path: {path} is a {other.title} checkpoint; use {other.script}")
    return path


def _check_checkpoint_kept(args: Call, checkpoint: str) -> None:
    """Refuse to overwrite, or to add, a file that is read as part of the checkpoint's folder."""
    folder = Path(os.path.realpath(Path(checkpoint).expanduser()))
    patterns = (*DESCRIPTION_FILES, *WEIGHT_FILES)
    read = [file for pattern in patterns for file in (folder / pattern, *folder.glob(pattern))]
    for option, output in (("--json", args.json), ("--report", args.report)):
        for file in read:
            check_apart(args.parser, option, output, args.source, file)


def _answers(job: Job, stdout: Stdout) -> dict[str, Any]:
    """Generate, print each answer as soon as it is there, and how they differ; the record's fields about them."""
    args = job.args
    found: dict[str, Any] = {"runs": [], "first_forward_seconds": first_forward(job)}
    modes: list[Mode] = ["origin", "sparsed"] if args.compare else ["origin" if args.origin else "sparsed"]
    for mode in modes:
        run = run_mode(job, mode)
        found["runs"].append(run)
        if not args.quiet:
            tell("\n".join(run_lines(run)))
            if args.sampler.cached and selected_in_vain(run):
                hint = "" if args.compare else "; --origin leaves it out"
                tell(f"note: for one sparse forward or none, selecting blocks does not pay{hint}")
            if not run.answer_tokens:
                tell("warning: the answer is empty: its tokens are only ends and masks")
            if run.expected is not None and not args.compare:  # the comparison says it about both
                tell(expected_line(run))
        stdout.say(run.text)
    if args.compare:
        origin, sparsed = found["runs"]
        found["comparison"] = compare(origin, sparsed)
        if not args.quiet:
            tell("\n".join(comparison_lines(origin, sparsed, found["comparison"])))
    return found


def _heading(args: Call, tokens: int, model: DiffusionLM) -> str:
    family, sampler = args.family, args.sampler
    kinds = {"raw": ", raw", "system": " after a system turn", "chat": ", the last turn of a chat"}
    kind = "".join(text for name, text in kinds.items() if args.flags[name])
    source = "demo checkpoint" if args.demo else args.model_path or family.model_path
    others = f" and {model.ranks.count - 1} more" if model.ranks.count > 1 else ""
    return (
        f"{family.title} ({source}) on {model.device}{others}, {str(model.dtype).removeprefix('torch.')}; "
        f"prompt {args.prompt or 'of your own'}{kind}: {tokens} tokens; "
        f"{sampler.gen_length} new tokens in {sampler.steps} steps"
    )
