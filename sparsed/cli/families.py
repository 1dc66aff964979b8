"""The two model families, as the command line sees them."""

from dataclasses import dataclass

from ..sampling.settings import ALGORITHMS, REMASKING


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
    """

    name: str
    title: str
    model_path: str
    algorithms: tuple[str, ...]
    temperature: float
    script: str


DREAM = Family(
    "dream",
    "Dream",
    "Dream-org/Dream-v0-Instruct-7B",
    ALGORITHMS,
    0.05,
    "dream_generation.py",
)
LLADA = Family("llada", "LLaDA", "GSAI-ML/LLaDA-1.5", REMASKING, 0.0, "llada_generation.py")
