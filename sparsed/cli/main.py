"""From the flags to the answer: load, run, report, and turn what goes wrong into one line and an exit code."""

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import torch
import transformers

from ..attention import BackendError
from ..models import load_model, load_tokenizer
from ..models.files import checkpoint_folder, read_json
from ..prompts import ChatTemplateError, Prompt, answer_found, build_prompt, demo_path, encode_chat
from ..sampling.common import PromptError, check_prompt
from . import report
from .arguments import parse
from .families import DREAM, LLADA, Family
from .running import Job, first_forward, run_mode
from .streams import Stdout, StdoutLost, settle, tell

EXIT_WRONG, EXIT_OUT_OF_MEMORY, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE, EXIT_TERMINATED = 2, 3, 130, 141, 143
# seconds in which a second Ctrl-C means no more than the first; later ones count, lest a callback swallows the only one
ONE_WISH = 1.0


class Terminated(KeyboardInterrupt):
    """SIGTERM, to be handled as Ctrl-C is."""


def main_dream(argv: list[str] | None = None) -> int:
    """Run `dream_generation.py` with these words (None: the process's own); returns the exit code."""
    return _main(DREAM, argv)


def main_llada(argv: list[str] | None = None) -> int:
    """Run `llada_generation.py` with these words (None: the process's own); returns the exit code."""
    return _main(LLADA, argv)


def _main(family: Family, argv: list[str] | None) -> int:
    program = os.path.basename(sys.argv[0])
    try:
        with _interruptible(ending=argv is None), _quiet_libraries():
            args = parse(family, argv)
            _generate(family, args)
    except SystemExit as stop:  # argparse's way to end
        return int(stop.code or 0)
    except KeyboardInterrupt as signalled:
        terminated = isinstance(signalled, Terminated)
        tell(f"{program}: {'terminated' if terminated else 'interrupted'}")
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    except StdoutLost as lost:
        if isinstance(lost.__cause__, BrokenPipeError):  # the reader has left, as `head` does
            return EXIT_BROKEN_PIPE
        tell(f"{program}: error: cannot write to stdout: {lost.__cause__.strerror}")
        return EXIT_WRONG
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        advice = "try a shorter --prompt or --seq_len, --dtype bfloat16, or a device with more memory"
        tell(f"{program}: error: out of memory; {advice}")
        return EXIT_OUT_OF_MEMORY
    finally:
        settle()
    return 0


def _generate(family: Family, args: argparse.Namespace) -> None:
    """One call of a script: everything between the checked flags and the record."""
    if args.quiet:
        huggingface_hub.utils.disable_progress_bars()
    path = _model_path(family, args)
    source = "--demo" if args.demo else "--model_path"
    with _blame(args, source):
        tokenizer = load_tokenizer(path)
    with _blame(args, args.prompt_option), _blame(args, source, (ChatTemplateError,)):
        prompt = _prompt(tokenizer, args)
    started = time.perf_counter()
    with _blame(args, source):
        model = load_model(path, device=args.device, dtype=args.dtype)
    load_seconds = time.perf_counter() - started
    beyond = len(prompt.input_ids) > model.config.max_length
    if not args.quiet:
        tell(_heading(family, args, prompt, model))
        if beyond:
            tell(
                f"warning: the prompt has {len(prompt.input_ids)} tokens, this model was trained on at most "
                f"{model.config.max_length}"
            )
    job = Job(family, model, prompt.input_ids, args)
    with _blame(args, args.prompt_option, (PromptError,)):
        check_prompt(torch.tensor([prompt.input_ids]), model.config.mask_token_id, model.config.vocab_size)
    first_forward_seconds = first_forward(job)
    # a record is worth writing without stdout too
    stdout = Stdout(keep_going=args.json is not None)
    runs = _runs(job, tokenizer, prompt, stdout)
    record = {
        "runs": runs,
        **({"comparison": report.compare(*runs)} if args.compare else {}),
        "trained_length": model.config.max_length,
        "beyond_trained_length": beyond,
        "load_seconds": load_seconds,
        "first_forward_seconds": first_forward_seconds,
        "environment": report.environment(model.device, model.dtype),
        "arguments": _arguments(args, path),
    }
    if args.compare and not args.quiet:
        tell("\n".join(_comparison(record, model, tokenizer)))
    if args.json is not None:
        with _blame(args, "--json"):
            report.write_json(args.json, record)
    stdout.finish()


def _model_path(family: Family, args: argparse.Namespace) -> str:
    """The folder or hub id to load, refused early if it holds the other family."""
    if args.demo:
        with _blame(args, "--demo"):
            return str(demo_path(family.name))
    path = args.model_path or family.model_path
    with _blame(args, "--model_path"):
        found = read_json(checkpoint_folder(path, ["config.json"]) / "config.json").get("model_type")
    other = LLADA if family is DREAM else DREAM
    if str(found).lower() == other.name:
        args.parser.error(f"argument --model_path: {path} is a {other.title} checkpoint; use {other.script}")
    return path


def _prompt(tokenizer: Any, args: argparse.Namespace) -> Prompt:
    if args.text is None:
        return build_prompt(args.prompt, tokenizer)
    return Prompt(args.text, None, encode_chat(tokenizer, args.text))


def _runs(job: Job, tokenizer: Any, prompt: Prompt, stdout: Stdout) -> list[dict[str, Any]]:
    """Run the modes that were asked for; each answer is printed as soon as it is there."""
    args, stops = job.args, report.stop_ids(job.model.config, tokenizer)
    runs = []
    for mode in ["origin", "sparsed"] if args.compare else ["origin" if args.origin else "sparsed"]:
        with _blame(args, "--backend", (BackendError,)), _blame(args, "--dtype", (FloatingPointError,)):
            run = run_mode(job, mode)
        ids = run["token_ids"]
        run["text"] = report.decode(tokenizer, ids[: report.answer_length(ids, stops)]).strip()
        run["expected"] = prompt.expected
        run["answer_found"] = None if prompt.expected is None else answer_found(run["text"], prompt.expected)
        if not args.quiet:
            tell("\n".join(report.run_lines(run)))
        stdout.say(run["text"])
        runs.append(run)
    return runs


def _comparison(record: dict[str, Any], model: torch.nn.Module, tokenizer: Any) -> list[str]:
    runs, comparison = record["runs"], record["comparison"]
    stops = report.stop_ids(model.config, tokenizer)
    length = max(report.answer_length(run["token_ids"], stops) for run in runs)
    marked = {
        run["mode"]: report.mark(tokenizer, run["token_ids"], comparison["different_positions"], length) for run in runs
    }
    return report.comparison_lines(comparison, marked)


def _heading(family: Family, args: argparse.Namespace, prompt: Prompt, model: torch.nn.Module) -> str:
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
    return {**values, "model_path": path, "json": None if args.json is None else str(args.json)}


@contextlib.contextmanager
def _blame(
    args: argparse.Namespace, option: str, errors: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[None]:
    """Turn these errors of the library into a wrong-call line about `option`."""
    try:
        yield
    except errors as error:
        args.parser.error(f"argument {option}: {error}")


@contextlib.contextmanager
def _interruptible(ending: bool) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM unwind the stack, so that nothing half-written stays; once, if they come in a burst.

    Args:
        ending: whether only Python's own exit comes afterwards, which is then not to be interrupted.
    """
    latest = -math.inf

    def stop(number: int, _: object) -> None:
        nonlocal latest
        before, latest = latest, time.monotonic()
        if latest - before > ONE_WISH:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # what is ignored stays ignored: Ctrl-C is not meant for a shell's background job
            if signal.getsignal(number) is not signal.SIG_IGN:
                handlers[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if ending else handler)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No advice and no warnings from the libraries: what the user should know, this module says."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)
