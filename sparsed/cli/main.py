"""From the flags to the answer: load, run, report, and turn what goes wrong into one line and an exit code."""

import argparse
import os
import sys
import time
from typing import Any

import huggingface_hub
import torch

from ..backends import BackendError
from ..chat import ChatTemplateError, answer_length, decode, encode_chat, stop_ids
from ..console.endings import blame, guarded
from ..console.environment import environment
from ..console.files import write_json, write_text
from ..console.streams import Stdout, tell
from ..models import load_model, load_tokenizer
from ..models.common import DiffusionLM
from ..models.files import checkpoint_folder, read_json
from ..models.loading import empty_model, resolve_device, resolve_dtype
from ..prompts import Prompt, answer_found, build_prompt, demo_path
from ..report.page import page
from ..report.summary import compare, comparison_lines, expected_line, run_lines
from ..sampling.canvas import PromptError, check_prompt
from .advice import advice_lines, advise, fitted_lengths
from .arguments import parse
from .families import DREAM, LLADA, Family
from .history import Speller
from .memory import check_memory
from .paths import check_checkpoint_kept
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
    return guarded(lambda: _generate(family, parse(family, argv)), program, advice=advice, ending=argv is None)


def _generate(family: Family, args: argparse.Namespace) -> None:
    """One call of a script: everything between the checked flags and the record."""
    if args.quiet:
        huggingface_hub.utils.disable_progress_bars()
    path = _model_path(family, args)
    source = "--demo" if args.demo else "--model_path"
    check_checkpoint_kept(args.parser, "--json", args.json, source, path)
    check_checkpoint_kept(args.parser, "--report", args.report, source, path)
    with blame(args, source):
        tokenizer = load_tokenizer(path)
    with blame(args, args.prompt_option), blame(args, source, (ChatTemplateError,)):
        prompt = _prompt(tokenizer, args)
    device = resolve_device(args.device)
    with blame(args, source):
        outline = empty_model(checkpoint_folder(path, ["config.json"])).to(resolve_dtype(args.dtype, device))
    tokens = len(prompt.input_ids)
    check_memory(outline, args, fitted_lengths(tokens, device)[1] if args.advise else tokens)
    started = time.perf_counter()
    with blame(args, source):
        model = load_model(path, device=args.device, dtype=args.dtype)
    load_seconds = time.perf_counter() - started
    beyond = tokens > model.config.max_length
    if not args.quiet:
        tell(_heading(family, args, prompt, model))
        if beyond:
            trained = f"this model was trained on at most {model.config.max_length}"
            tell(f"warning: the prompt has {tokens} tokens, {trained}")
    job = Job(family, model, tokenizer, prompt.input_ids, args)
    with blame(args, args.prompt_option, (PromptError,)):
        check_prompt(torch.tensor([prompt.input_ids]), model.config.mask_token_id, model.config.vocab_size)
    # a record is worth writing without stdout too
    stdout = Stdout(keep_going=args.json is not None or args.report is not None)
    record = {
        **(_advice(job, stdout) if args.advise else _answers(job, prompt, stdout)),
        "trained_length": model.config.max_length,
        "beyond_trained_length": beyond,
        "load_seconds": load_seconds,
        "environment": environment(model.device, model.dtype),
        "arguments": _arguments(args, path),
    }
    if args.json is not None:
        with blame(args, "--json"):
            write_json(args.json, record)
    if args.report is not None:
        with blame(args, "--report"):
            write_text(args.report, page(record))
    stdout.finish()


def _model_path(family: Family, args: argparse.Namespace) -> str:
    """The folder or hub id to load, refused early if it holds the other family."""
    if args.demo:
        with blame(args, "--demo"):
            return str(demo_path(family.name))
    path = args.model_path or family.model_path
    with blame(args, "--model_path"):
        found = read_json(checkpoint_folder(path, ["config.json"]) / "config.json").get("model_type")
    other = LLADA if family is DREAM else DREAM
    if str(found).lower() == other.name:
        args.parser.error(f"argument --model_path: {path} is a {other.title} checkpoint; use {other.script}")
    return path


def _prompt(tokenizer: Any, args: argparse.Namespace) -> Prompt:
    if args.text is None:
        return build_prompt(args.prompt, tokenizer)
    return Prompt(args.text, None, encode_chat(tokenizer, args.text))


def _advice(job: Job, stdout: Stdout) -> dict[str, Any]:
    """Print what a run would take; the record's part about it."""
    with blame(job.args, "--backend", (BackendError,)), blame(job.args, "--dtype", (FloatingPointError,)):
        advice = advise(job)
    stdout.say("\n".join(advice_lines(advice, len(job.input_ids), job.args.steps)))
    return {"advice": advice}


def _answers(job: Job, prompt: Prompt, stdout: Stdout) -> dict[str, Any]:
    """Generate and print the answers, and how they differ; the record's part about them."""
    first_forward_seconds = first_forward(job)
    runs = _runs(job, prompt, stdout)
    found: dict[str, Any] = {"runs": runs, "first_forward_seconds": first_forward_seconds}
    if job.args.compare:
        origin, sparsed = runs
        comparison = found["comparison"] = compare(origin, sparsed)
        if not job.args.quiet:
            tell("\n".join(comparison_lines(origin, sparsed, comparison)))
    return found


def _runs(job: Job, prompt: Prompt, stdout: Stdout) -> list[dict[str, Any]]:
    """Run the modes that were asked for; each answer is printed as soon as it is there."""
    args, tokenizer = job.args, job.tokenizer
    stops = stop_ids(job.model.config, tokenizer)
    runs = []
    for mode in ["origin", "sparsed"] if args.compare else ["origin" if args.origin else "sparsed"]:
        with blame(args, "--backend", (BackendError,)), blame(args, "--dtype", (FloatingPointError,)):
            run = run_mode(job, mode)
        ids = run["token_ids"]
        run["pieces"] = Speller(tokenizer).pieces(ids)
        run["answer_tokens"] = answer_length(ids, stops)
        run["text"] = decode(tokenizer, ids[: run["answer_tokens"]]).strip()
        run["expected"] = prompt.expected
        run["answer_found"] = None if prompt.expected is None else answer_found(run["text"], prompt.expected)
        if not args.quiet:
            tell("\n".join(run_lines(run)))
            if prompt.expected is not None and not args.compare:  # which says it of both
                tell(expected_line(run))
        stdout.say(run["text"])
        runs.append(run)
    return runs


def _heading(family: Family, args: argparse.Namespace, prompt: Prompt, model: DiffusionLM) -> str:
    source = "demo checkpoint" if args.demo else args.model_path or family.model_path
    name = args.prompt or "of your own"
    return (
        f"{family.title} ({source}) on {model.device}, {str(model.dtype).removeprefix('torch.')}; prompt {name}: "
        f"{len(prompt.input_ids)} tokens; {args.seq_len} new tokens in {args.steps} steps"
    )


def _arguments(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """The flags as they were used, defaults filled in."""
    hidden = ("config", "parser", "text", "prompt_option")
    values = {name: value for name, value in vars(args).items() if name not in hidden}
    files = {name: None if values[name] is None else str(values[name]) for name in ("json", "report")}
    return {**values, **files, "model_path": path}
