"""The flags of the two scripts, their help, and every check that needs no model.

A wrong call ends in one line on stderr that names the option, and exit code 2.
"""

import argparse
import importlib.util
import math

from ..backends import BACKENDS, Problem
from ..config import SparseDConfig
from ..console.files import check_apart, output_path
from ..console.parser import SHELLS, Parser, PrintCompletion
from ..console.readers import config_field, device, non_empty, number_in, whole
from ..models.loading import DTYPES, resolve_device, resolve_dtype
from ..prompts import PRESETS
from ..sampling.unmasking import BlocksError
from .families import DREAM, LLADA, Family
from .manual import EPILOG, USAGE
from .paths import own_prompt

DEFAULT_PROMPT = "short_context"


def parse(family: Family, argv: list[str] | None) -> argparse.Namespace:
    """Read and check the flags of one family's script.

    Args:
        family: `DREAM` or `LLADA`.
        argv: the words after the script's name; None takes them from the process.

    Returns:
        The values, with four more: `config` (a `SparseDConfig`, None with --origin), `text` (the user's own prompt,
        None for a preset), `prompt_option` (the flag that gave the prompt) and `parser` (for later errors).

    Raises:
        SystemExit: code 2 after a wrong call, 0 after --help.
    """
    parser = build_parser(family)
    args = parser.parse_args(argv)
    _check_lengths(parser, args, family)
    _check_backend(parser, args)
    _check_advise(parser, args)
    if args.show and importlib.util.find_spec("rich") is None:
        parser.error('argument --show: rich is not installed (pip install ".[show]")')
    args.json = output_path(parser, "--json", args.json)
    args.report = output_path(parser, "--report", args.report)
    check_apart(parser, "--json", args.json, "--prompt_file", args.prompt_file)
    check_apart(parser, "--report", args.report, "--prompt_file", args.prompt_file)
    check_apart(parser, "--report", args.report, "--json", args.json)
    given = [name for name in ("prompt_text", "prompt_file") if getattr(args, name) is not None]
    args.prompt_option = f"--{given[0]}" if given else "--prompt"
    args.text = own_prompt(parser, args)
    if args.text is None:
        args.prompt = args.prompt or DEFAULT_PROMPT
    args.config = None if args.origin else SparseDConfig(args.skip, args.select, args.block_size, args.dense_answer)
    args.parser = parser
    return args


def build_parser(family: Family) -> Parser:
    """The parser of one family's script, in groups: model, prompt, generation, SparseD, running, output."""
    parser = Parser(
        description=f"Generate text with {family.title}, a masked diffusion language model, using SparseD sparse "
        "attention (arXiv 2509.24014): full attention in the first denoising steps, then, for every head, only the "
        "blocks of keys that mattered there. The answer goes to stdout, everything else to stderr.",
        usage=USAGE,
        epilog=EPILOG.format(script=family.script),
    )
    _add_model(parser.add_argument_group("model"), family)
    _add_prompt(parser.add_argument_group("prompt (one of)"))
    _add_generation(parser.add_argument_group("generation"), family)
    _add_sparsed(
        parser.add_argument_group(
            "SparseD",
            "The first steps use full attention. The last of them chooses, for every head, the blocks of keys that "
            "matter to each block of queries; the remaining steps attend to those.",
        )
    )
    _add_running(parser.add_argument_group("running"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_model(group, family: Family) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--model_path",
        type=non_empty,
        metavar="PATH",
        help=f"hub id, or a local folder in the hub's format (default: {family.model_path})",
    )
    which.add_argument(
        "--demo",
        action="store_true",
        help=f"the bundled small {family.title} demo checkpoint: no download, runs on a CPU",
    )
    group.add_argument(
        "--device",
        type=device,
        default="auto",
        help="auto, cuda, cuda:N, cpu or mps; auto takes a GPU if there is one (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="number format of the weights; auto is bfloat16 on a GPU, float32 elsewhere (default: %(default)s)",
    )


def _add_prompt(group) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--prompt",
        choices=PRESETS,
        help="a preset: short_context is a small word problem; 4k to 64k are a document and a question, exactly 4,096 "
        f"to 65,536 tokens with the chat template (default: {DEFAULT_PROMPT})",
    )
    which.add_argument("--prompt_text", metavar="TEXT", help="a prompt of your own, put into the model's chat template")
    which.add_argument("--prompt_file", metavar="FILE", help="the same, read from a UTF-8 text file")


def _add_generation(group, family: Family) -> None:
    group.add_argument(
        "--seq_len", type=whole(1), default=128, metavar="N", help="new tokens to generate (default: %(default)s)"
    )
    group.add_argument(
        "--steps",
        type=whole(1),
        default=128,
        metavar="N",
        help="denoising steps, each one forward pass over prompt and answer (default: %(default)s)",
    )
    if family is LLADA:
        group.add_argument(
            "--block_length",
            type=whole(1),
            default=32,
            metavar="N",
            help="tokens of a semi-autoregressive block; divides --seq_len, and the number of blocks divides --steps "
            "(default: %(default)s)",
        )
    group.add_argument(
        "--sampling-alg",
        choices=family.algorithms,
        default=family.algorithms[0],
        help="which masked tokens a step commits (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=number_in(0, math.inf),
        default=family.temperature,
        metavar="T",
        help="sampling temperature; 0 takes the likeliest token (default: %(default)s)",
    )
    if family is DREAM:
        group.add_argument(
            "--top_p",
            type=number_in(0, 1, above=True),
            default=0.95,
            metavar="P",
            help="sample from the likeliest tokens that together reach this probability; 1 switches it off "
            "(default: %(default)s)",
        )
        group.add_argument(
            "--top_k",
            type=whole(0),
            default=50,
            metavar="K",
            help="sample from the K likeliest tokens; 0 switches it off (default: %(default)s)",
        )
    else:
        group.add_argument(
            "--cfg_scale",
            type=number_in(0, math.inf),
            default=0.0,
            metavar="W",
            help="classifier-free guidance weight; 0 is off, anything else doubles the batch (default: %(default)s)",
        )
    group.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="random seed, set again before every run (default: %(default)s)",
    )


def _add_sparsed(group) -> None:
    group.add_argument(
        "--skip",
        type=config_field("skip", float),
        default=SparseDConfig.skip,
        metavar="FRACTION",
        help="share of the steps that use full attention first, 0 to 1 (default: %(default)s)",
    )
    group.add_argument(
        "--select",
        type=config_field("select", float),
        default=SparseDConfig.select,
        metavar="FRACTION",
        help="share of the key blocks that every query block keeps, above 0 to 1, taken apart for the prompt and for "
        "the generated region (default: %(default)s)",
    )
    group.add_argument(
        "--block_size",
        type=config_field("block_size", int),
        default=SparseDConfig.block_size,
        metavar="N",
        help="tokens of a block, a multiple of 16; smaller blocks select more finely (default: %(default)s)",
    )
    group.add_argument(
        "--dense_answer",
        action="store_true",
        help="in the sparse steps, the answer's queries read every key, and only the prompt's their kept blocks: much "
        "nearer to full attention, at next to no cost; not part of the paper's method",
    )
    group.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="kernel of the sparse steps: flash and triton need a GPU, gather runs anywhere; auto takes the fastest "
        "that works here (default: %(default)s)",
    )


def _add_running(group) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--origin", action="store_true", help="the original model: full attention in every step, no SparseD"
    )
    which.add_argument(
        "--compare",
        action="store_true",
        help="run full attention, then SparseD, and say where the answers differ and how the times compare",
    )
    which.add_argument(
        "--advise",
        action="store_true",
        help="generate nothing: time a step of each kind, and print what the whole run would take with full attention "
        "and with SparseD, from which length on SparseD pays, and the flags to use",
    )
    group.add_argument(
        "--warmup",
        type=whole(0),
        default=0,
        metavar="N",
        help="untimed whole runs first, of each mode; the first use of a GPU kernel compiles it (default: %(default)s)",
    )
    group.add_argument(
        "--repeat",
        type=whole(1),
        default=1,
        metavar="N",
        help="timed runs of each mode, all with the same seed; the one of median time counts, of an even number the "
        "faster of the middle two (default: %(default)s)",
    )


def _add_output(group) -> None:
    group.add_argument(
        "--json", metavar="FILE", help="write the complete record (tokens, times, settings, versions) to this file"
    )
    group.add_argument(
        "--report", metavar="FILE", help="write a page about the run, to be looked at in a browser, to this HTML file"
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--show",
        action="store_true",
        help='watch the answer come about in the terminal, step by step (needs rich: pip install ".[show]")',
    )
    which.add_argument("--quiet", action="store_true", help="only the answer: nothing on stderr but errors")
    group.add_argument(
        "--print-completion",
        choices=SHELLS,
        action=PrintCompletion,
        default=argparse.SUPPRESS,
        help="print the completion of the flags for a shell, and end",
    )


def _check_lengths(parser: Parser, args: argparse.Namespace, family: Family) -> None:
    try:
        family.settings(args)
    except BlocksError as error:
        parser.error(f"argument --{error.argument}: {error.must}")


def _check_advise(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what is about answers or whole runs, of which --advise makes none."""
    for name in ("report", "warmup", "repeat", "show"):
        if args.advise and getattr(args, name) != parser.get_default(name):
            parser.error(f"argument --{name}: not allowed with argument --advise")


def _check_backend(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse a named backend that the device, the number format or the block size rules out, whatever the model."""
    if args.backend == "auto":
        return
    device = resolve_device(args.device)
    problem = Problem(
        device,
        resolve_dtype(args.dtype, device),
        batch=1,
        heads=1,
        kv_heads=1,
        head_dim=128,
        block_size=args.block_size,
        padded=False,
    )
    fault = BACKENDS[args.backend].fault(problem)
    if fault is not None:
        parser.error(f"argument --backend: {args.backend} {fault}")
