"""A call of one of the scripts, with every check that needs no model.

A wrong call ends in one line on stderr that names the option, and exit code 2.
"""

import argparse
import importlib.util
import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..backends import BACKENDS, Problem
from ..chat import Turn, check_text, turns_of
from ..config import SparseDConfig
from ..console.files import check_apart, output_path, text_of
from ..console.parser import Parser
from ..console.readers import shown
from ..console.workers import launched
from ..models.loading import resolve_device, resolve_dtype
from ..sampling import Settings
from ..sampling.unmasking import SettingError
from .families import Family
from .flags import DEFAULT_PROMPT, build_parser

# far beyond any model's context; an endless file is not read to its end
LONGEST_PROMPT = 2**24
# names of streams that are already open, such as a shell's <(...); opening another pipe could wait forever
OPEN_STREAMS = ("/dev/stdin", "/dev/fd/")


@dataclass(frozen=True)
class Call:
    """What a call asks for; the fields that are not listed here are the flags of that name.

    Args:
        family: of the script.
        parser: words the errors that are found only later.
        flags: all flags by name, as they were used, for the record and for a command that does the same.
        sampler: how the family samples, with the number of new tokens and of steps.
        config: SparseD's settings, which nothing reads with --origin.
        text: the user's own prompt, None for a preset.
        earlier: the turns before it.
        prompt_option: the flag that gave the prompt.
        prompt: the preset, empty if the prompt is the user's own.
        json, report: real paths.
    """

    family: Family
    parser: Parser
    flags: dict[str, Any]
    sampler: Settings
    config: SparseDConfig
    text: str | None
    earlier: list[Turn]
    prompt_option: str
    prompt: str
    raw: bool
    json: Path | None
    report: Path | None
    model_path: str | None
    demo: bool
    device: str
    dtype: str
    seed: int
    backend: str
    origin: bool
    compare: bool
    advise: bool
    warmup: int
    repeat: int
    show: bool
    quiet: bool

    @property
    def source(self) -> str:
        """The flag that says which checkpoint to load."""
        return "--demo" if self.demo else "--model_path"


def parse(family: Family, argv: list[str] | None) -> Call:
    """Read and check the flags of one family's script.

    Args:
        family: `DREAM` or `LLADA`.
        argv: the words after the script's name; None takes them from the process.

    Raises:
        SystemExit: code 2 after a wrong call, 0 after --help.
    """
    parser = build_parser(family)
    args = parser.parse_args(argv)
    try:
        sampler = family.settings(args)
    except SettingError as error:
        parser.error(f"argument --{error.argument}: {error.must}")
    _check_backend(parser, args)
    # --advise makes no answers and no whole runs, and ranks caches itself
    for name in ("report", "warmup", "repeat", "show", "cache", "early_stop"):
        if args.advise and getattr(args, name) != parser.get_default(name):
            parser.error(f"argument --{name}: not allowed with argument --advise")
    if args.show and importlib.util.find_spec("rich") is None:
        parser.error('argument --show: rich is not installed (pip install ".[show]")')
    args.json, args.report = output_path(parser, "--json", args.json), output_path(parser, "--report", args.report)
    for name in ("prompt_file", "chat"):
        check_apart(parser, "--json", args.json, f"--{name}", getattr(args, name))
        check_apart(parser, "--report", args.report, f"--{name}", getattr(args, name))
    check_apart(parser, "--report", args.report, "--json", args.json)
    given = next((name for name in ("prompt_text", "prompt_file", "chat") if getattr(args, name) is not None), "prompt")
    text, earlier = _own_prompt(parser, f"--{given}", args)
    if text is None:
        args.prompt = args.prompt or DEFAULT_PROMPT
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    plain = {field.name: getattr(args, field.name) for field in fields(Call) if field.name in flags}
    return Call(
        family=family,
        parser=parser,
        flags=flags,
        sampler=sampler,
        config=SparseDConfig(args.skip, args.select, args.block_size, args.dense_answer),
        text=text,
        earlier=earlier,
        prompt_option=f"--{given}",
        **plain | {"prompt": args.prompt or ""},
    )


def _check_backend(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse a named backend that the device, the number format or the block size rules out for any model."""
    if args.backend == "auto":
        return
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    problem = Problem(
        device, dtype, batch=1, heads=1, kv_heads=1, head_dim=128, block_size=args.block_size, padded=False
    )
    fault = BACKENDS[args.backend].fault(problem)
    if fault is not None:
        parser.error(f"argument --backend: {args.backend} {fault}")


def _own_prompt(parser: Parser, option: str, args: argparse.Namespace) -> tuple[str | None, list[Turn]]:
    """The user's message, None for a preset, and the turns before it; `option` is the flag that gave the message."""
    earlier: list[Turn] = []
    text, file = args.prompt_text, args.prompt_file if args.chat is None else args.chat
    if args.raw and (args.chat is not None or option == "--prompt"):
        parser.error("argument --raw: needs --prompt_text or --prompt_file")
    try:
        if file is not None:
            if launched() > 1 and file.startswith(OPEN_STREAMS):
                raise ValueError(f"{shown(file)} must be a file: several processes cannot share a stream")
            text = text_of(file, encoding="utf-8-sig", most=LONGEST_PROMPT, streams=OPEN_STREAMS)
            text = io.StringIO(text, newline=None).read()  # with line ends as Python reads them
        if args.chat is not None:
            earlier, text = turns_of(text)
        if text is not None:
            check_text(text, "the prompt")
        if args.system is not None:
            option = "--system"
            check_text(args.system, "the system turn")
            if args.chat is not None:
                raise ValueError("not allowed with argument --chat: its file may begin with a system turn")
            earlier = [{"role": "system", "content": args.system}]
    except ValueError as error:
        parser.error(f"argument {option}: {error}")
    return text, earlier
