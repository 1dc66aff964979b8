"""The two model families, as the command line sees them."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..console.parser import add_value
from ..console.readers import number_in, whole
from ..sampling import Settings
from ..sampling.saving import BLOCK_LENGTH
from ..sampling.settings import ALGORITHMS, REMASKING, DreamSettings, LLaDASettings
from ..saving_flags import add_saving, saving_of


@dataclass(frozen=True)
class Family:
    """What differs between the two scripts.

    Args:
        name: "dream" or "llada", as `model.family` says it.
        title: the name as it is printed.
        model_path: the published checkpoint that the script loads by default.
        script: file name of the script, for the help's examples.
        add_sampling: adds the flags that say how it samples to a group of the parser.
        settings: those flags and the lengths as the sampler takes them.
    """

    name: str
    title: str
    model_path: str
    script: str
    add_sampling: Callable[[Any], None]
    settings: Callable[[argparse.Namespace], Settings]


def _add_common(group, algorithms: tuple[str, ...], temperature: float) -> None:
    which = "which masked tokens a step commits"
    add_value(group, "--sampling-alg", which, algorithms[0], choices=algorithms)
    likeliest = "sampling temperature; 0 takes the likeliest token"
    add_value(group, "--temperature", likeliest, temperature, type=number_in(0, math.inf), metavar="T")


def _add_dream(group) -> None:
    _add_common(group, ALGORITHMS, 0.05)
    together = "sample from the likeliest tokens that together reach this probability; 1 switches it off"
    add_value(group, "--top_p", together, 0.95, type=number_in(0, 1, above=True), metavar="P")
    add_value(group, "--top_k", "sample from the K likeliest tokens; 0 switches it off", 50, type=whole(0), metavar="K")
    blocks = (
        "write the answer in blocks of N tokens; divides --seq_len, and the number of blocks divides "
        f"--steps (default: the whole answer at once; {BLOCK_LENGTH} with --cache, --threshold or --factor)"
    )
    group.add_argument("--block_length", type=whole(1), metavar="N", help=blocks)
    add_saving(group, stop="; needs blocks: --block_length, --cache, --threshold or --factor")


def _add_llada(group) -> None:
    blocks = "tokens of a semi-autoregressive block; divides --seq_len, and the number of blocks divides --steps"
    add_value(group, "--block_length", blocks, 32, type=whole(1), metavar="N")
    _add_common(group, REMASKING, 0.0)
    weight = "classifier-free guidance weight; 0 is off, anything else doubles the batch"
    add_value(group, "--cfg_scale", weight, 0.0, type=number_in(0, math.inf), metavar="W")
    group.add_argument("--logits_eos_inf", action="store_true", help="never choose the end token")
    last = "commit end tokens last, so that answers do not end too early"
    group.add_argument("--confidence_eos_eot_inf", action="store_true", help=last)
    add_saving(group)


def _dream_settings(flags: argparse.Namespace) -> Settings:
    filters = {"temperature": flags.temperature, "top_p": flags.top_p, "top_k": flags.top_k or None}
    more = {"block_length": flags.block_length, **saving_of(flags)}
    return DreamSettings(flags.seq_len, flags.steps, flags.sampling_alg, **filters, **more)


def _llada_settings(flags: argparse.Namespace) -> Settings:
    names = ("temperature", "cfg_scale", "logits_eos_inf", "confidence_eos_eot_inf")
    more = {"remasking": flags.sampling_alg, **{name: getattr(flags, name) for name in names}}
    return LLaDASettings(flags.seq_len, flags.steps, flags.block_length, **more, **saving_of(flags))


DREAM = Family("dream", "Dream", "Dream-org/Dream-v0-Instruct-7B", "dream_generation.py", _add_dream, _dream_settings)
LLADA = Family("llada", "LLaDA", "GSAI-ML/LLaDA-1.5", "llada_generation.py", _add_llada, _llada_settings)
FAMILIES = {family.name: family for family in (DREAM, LLADA)}
