"""The flags of the two scripts, and their help."""

import argparse

from ..backends import BACKENDS
from ..config import SparseDConfig
from ..console.parser import SHELLS, Parser, PrintCompletion, add_value
from ..console.readers import config_field, device, non_empty, whole
from ..models.loading import DTYPES
from ..prompts import PRESETS
from .families import Family

DEFAULT_PROMPT = "short_context"
USAGE = """%(prog)s [--demo | --model_path PATH]
       [--prompt NAME | --prompt_text TEXT | --prompt_file FILE | --chat FILE]
       [--origin | --compare | --advise] [option ...]"""
SPARSED = (
    "The first steps use full attention. The last of them selects, for every head, the blocks of keys that matter to "
    "each block of queries; the remaining steps attend to those."
)
EPILOG = """\
examples:
  python {script} --demo --compare --prompt 4k --seq_len 32 --steps 32
      the bundled demo checkpoint on a 4,096-token document, full attention against SparseD
  python {script} --demo --show --report run.html --prompt short_context
      watch the answer appear, and keep the run as a page for the browser
  python {script} --prompt 16k --warmup 1 --json run.json
      the published checkpoint with SparseD; times and tokens go to run.json
  python {script} --prompt 64k --advise
      how long such a run would take with full attention and with SparseD, from a few steps
  python {script} --origin --prompt_text "What is a prime number?"
      full attention in every step, on a prompt of your own
  torchrun --nproc_per_node 2 {script} --prompt 64k
      two GPUs, each with half of the heads of every layer

which settings (speed over full attention: 256 tokens in 256 steps after 64k, one H200; loss: nats per token on a real
model of 135M at 4k; beyond, measure dense answer rows first; more in docs/decoding.md):
  --cache dual --refresh 0 --origin             151 to 165x, loss 0.033: a long answer to a long prompt
  --cache dual --dense_answer --select 0.15     44x, loss 0.050: refreshed at every block; slower
  --cache dual --origin                         29 to 30x, loss 0.021: closer
  --dense_answer                                close without a cache, loss 0.024 (the paper's rule, the default: 0.150)

units: lengths are in tokens, shares are numbers from 0 to 1, all times are seconds

environment:
  HF_HOME            folder of downloaded models (default: ~/.cache/huggingface)
  HF_HUB_OFFLINE     1: use what is downloaded, and no network
  HF_TOKEN           for models with restricted access; or log in once with: hf auth login

exit codes:
  0    done
  2    wrong call or input, or an output that cannot be written
  3    out of memory
  130  interrupted (Ctrl-C)
  141  what read stdout has ended, as head does
  143  terminated
"""


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
    _add_prompt(parser.add_argument_group("prompt"))
    _add_generation(parser.add_argument_group("generation"), family)
    _add_sparsed(parser.add_argument_group("SparseD", SPARSED))
    _add_running(parser.add_argument_group("running"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_model(group, family: Family) -> None:
    which = group.add_mutually_exclusive_group()
    path = f"hub id, or a local folder in the hub's format (default: {family.model_path})"
    which.add_argument("--model_path", type=non_empty, metavar="PATH", help=path)
    demo = f"the bundled small {family.title} demo checkpoint: no download, runs on a CPU"
    which.add_argument("--demo", action="store_true", help=demo)
    add_value(
        group, "--device", "auto, cuda, cuda:N, cpu or mps; auto takes a GPU if there is one", "auto", type=device
    )
    dtype = "number format of the weights; auto is bfloat16 on a GPU, float32 elsewhere"
    add_value(group, "--dtype", dtype, "auto", choices=("auto", *DTYPES))


def _add_prompt(group) -> None:
    which = group.add_mutually_exclusive_group()
    preset = (
        "a preset: short_context is a small word problem; 4k to 64k are a document and a question, exactly 4,096 "
        f"to 65,536 tokens with the chat template (default: {DEFAULT_PROMPT})"
    )
    which.add_argument("--prompt", choices=PRESETS, help=preset)
    which.add_argument("--prompt_text", metavar="TEXT", help="a prompt of your own, put into the model's chat template")
    which.add_argument("--prompt_file", metavar="FILE", help="the same, read from a UTF-8 text file")
    chat = 'a chat whose last turn is the user\'s: a JSON list of {"role": ..., "content": ...}'
    which.add_argument("--chat", metavar="FILE", help=chat)
    around = group.add_mutually_exclusive_group()
    system = "a system turn before the prompt; a sized preset keeps its length with it"
    around.add_argument("--system", metavar="TEXT", help=system)
    raw = "a prompt of your own as it is, without the chat template, for base models"
    around.add_argument("--raw", action="store_true", help=raw)


def _add_generation(group, family: Family) -> None:
    add_value(group, "--seq_len", "new tokens to generate", 128, type=whole(1), metavar="N")
    steps = (
        "denoising steps, each one forward pass over prompt and answer; with --cache most compute few rows, and with "
        "--threshold, --factor or --early_stop there may be fewer"
    )
    add_value(group, "--steps", steps, 128, type=whole(1), metavar="N")
    family.add_sampling(group)
    add_value(group, "--seed", "random seed, set again before every run", 0, type=whole(0, 2**63 - 1), metavar="N")


def _add_sparsed(group) -> None:
    kept = (
        "share of the key blocks that every query block keeps, in (0, 1], applied separately to the prompt and the "
        "generated region"
    )
    first = (
        "share of the steps that use full attention first, 0 to 1; with --cache, of the steps that compute all rows; "
        "with --threshold or --factor and no cache, of the committed tokens"
    )
    fields = {
        "skip": (float, "FRACTION", first),
        "select": (float, "FRACTION", kept),
        "block_size": (int, "N", "tokens of a block, a multiple of 16; smaller blocks select more finely"),
    }
    for name, (kind, metavar, text) in fields.items():
        default = getattr(SparseDConfig, name)
        add_value(group, f"--{name}", text, default, type=config_field(name, kind), metavar=metavar)
    group.add_argument(
        "--dense_answer",
        action="store_true",
        help="in the sparse steps, the answer's queries read every key, and only the prompt's follow their kept "
        "blocks: mostly closer to full attention (beyond 4k with blocks of 128, measure it), at nearly the same speed; "
        "not part of the paper's method",
    )
    kernel = (
        "kernel of the sparse steps: flash, triton and flex need a GPU, gather runs anywhere; auto takes the fastest "
        "that works here"
    )
    add_value(group, "--backend", kernel, "auto", choices=("auto", *BACKENDS))


def _add_running(group) -> None:
    modes = {
        "--origin": "the original model: full attention in every step, no SparseD",
        "--compare": "run full attention as published (no cache, threshold, factor or early stop), then this call with "
        "SparseD, and say where the answers differ and how the times compare",
        "--advise": "generate nothing: time a step of each kind, and print how long the whole run would take with full "
        "attention, with SparseD and with a dual cache, from which length on SparseD pays, and the flags to use",
    }
    which = group.add_mutually_exclusive_group()
    for name, text in modes.items():
        which.add_argument(name, action="store_true", help=text)
    warmup = "untimed whole runs first, of each mode; the first use of a GPU kernel compiles it"
    add_value(group, "--warmup", warmup, 0, type=whole(0), metavar="N")
    repeat = (
        "timed runs of each mode, with the same seed; the median run is reported (for an even count, the faster of the "
        "two middle runs)"
    )
    add_value(group, "--repeat", repeat, 1, type=whole(1), metavar="N")


def _add_output(group) -> None:
    record = "write the complete record (tokens, times, settings, versions) to this file"
    group.add_argument("--json", metavar="FILE", help=record)
    page = "write a page about the run, for a browser, to this HTML file"
    group.add_argument("--report", metavar="FILE", help=page)
    which = group.add_mutually_exclusive_group()
    watch = 'watch the answer appear in the terminal, step by step (needs rich: pip install ".[show]")'
    which.add_argument("--show", action="store_true", help=watch)
    which.add_argument("--quiet", action="store_true", help="print only the answer, and errors on stderr")
    completion = "print the flags' completion for a shell, and exit"
    hidden = argparse.SUPPRESS
    group.add_argument("--print-completion", choices=SHELLS, action=PrintCompletion, default=hidden, help=completion)
