"""The two model families, as the command line sees them."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from ..sampling import Settings
from ..sampling.settings import ALGORITHMS, REMASKING, DreamSettings, LLaDASettings


@dataclass(frozen=True)
class Family:
    """What differs between the two scripts.

    Args:
        name: "dream" or "llada", as `model.family` says it.
        title: the name for people.
        model_path: the published checkpoint that the script loads by default.
        algorithms: orders in which masked tokens are committed; the first is the default.
        temperature: default sampling temperature.
        script: file name of the script, for the help's examples.
        settings: how it samples, from the script's flags.
    """

    name: str
    title: str
    model_path: str
    algorithms: tuple[str, ...]
    temperature: float
    script: str
    settings: Callable[[argparse.Namespace], Settings]


def _dream(args: argparse.Namespace) -> Settings:
    filters = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k or None}
    return DreamSettings(args.seq_len, args.steps, args.sampling_alg, **filters)


def _llada(args: argparse.Namespace) -> Settings:
    more = {"temperature": args.temperature, "cfg_scale": args.cfg_scale, "remasking": args.sampling_alg}
    return LLaDASettings(args.seq_len, args.steps, args.block_length, **more)


DREAM = Family(
    "dream",
    "Dream",
    "Dream-org/Dream-v0-Instruct-7B",
    ALGORITHMS,
    0.05,
    "dream_generation.py",
    _dream,
)
LLADA = Family("llada", "LLaDA", "GSAI-ML/LLaDA-1.5", REMASKING, 0.0, "llada_generation.py", _llada)
