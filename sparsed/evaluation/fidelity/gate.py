"""Whether a model and a text can judge at all.

On tokens with evidence far back, full attention must beat a window that reads as many keys as the measured methods.

Otherwise losing what lies far back costs nothing, and every method looks good. This happens if the model never learned
to read far back, or if nothing far back matters in the text.
"""

from dataclasses import dataclass, replace

from ...blocks import BlockGrid
from ...config import SparseDConfig
from ..folder import Record
from ..methods import Variant, variants
from ..results import VARIANT, groups, title_of
from ..scoring import bootstrap
from .measuring import FULL, key
from .windows import LEAD, PLANTED, REPEATED, TEXT, window_id

FAR = 1024  # tokens from a passage to its repetition; in windows shorter than 2 * FAR, half of the window
MARGIN = 0.1  # nats per token; the interval of full attention's advantage must lie above
FEWEST = 5  # documents: without an advantage, all of five would seldom show one
SAID = {
    PLANTED: "where the evidence was planted",
    "copy": "by what the planted copy tells",
    REPEATED: "where a passage of the text happens to be repeated",
}


@dataclass(frozen=True)
class Gate:
    """A window, and how far back evidence is beyond its reach.

    Args:
        window: as dense as the densest measured variant that leaves room for such evidence.
        far: the least number of tokens from the evidence to the token.
    """

    window: Variant
    far: int

    @staticmethod
    def of(configs: list[SparseDConfig], length: int, new_tokens: int) -> "Gate | None":
        """The gate for texts of `length` tokens; None if no evidence could be beyond any window's reach."""
        shortest = max(min(FAR, length // 2), LEAD + new_tokens)
        windows = variants(["window"], [replace(config, dense_answer=False) for config in configs])
        reaches = {window: _reach(window, length, new_tokens) for window in windows}
        room = length - new_tokens - LEAD
        found = [window for window, reach in reaches.items() if max(shortest, reach) <= room]
        if not found:
            return None
        densest = max(found, key=reaches.__getitem__)
        return Gate(densest, max(shortest, reaches[densest]))


def _reach(window: Variant, length: int, new_tokens: int) -> int:
    """Tokens that a window reads."""
    assert window.config is not None
    grid = BlockGrid(length, length - new_tokens, window.config.block_size)
    return sum(grid.budgets(window.config.select)[0]) * grid.block_size


def judge(records: list[Record]) -> list[Record]:
    """The results of the gates of one length: one for each window and mask rate with planted passages.

    Args:
        records: lines of results of this length.

    Returns:
        mask_rate, far, the variant, and `planted`, `copy` and `repeated`: documents, n, and `advantage`: how much lower
        full attention's negative log-likelihood is than the window's, in nats per token, with its 95 % interval (None
        without documents). `copy` is the advantage in `planted` minus that of the same tokens without a copy.
    """
    lines = {key(record): record for record in records}
    evidence = [record for record in records if record["kind"] != TEXT and record["method"] != "origin"]
    return [_judged(group, lines) for group in groups(evidence, "mask_rate", "far", *VARIANT)]


def _judged(group: list[Record], lines: dict[tuple, Record]) -> Record:
    planted, repeated = ([record for record in group if record["kind"] == kind] for kind in (PLANTED, REPEATED))
    gained, found = ([_advantage(record, lines) for record in part] for part in (planted, repeated))
    anyway = [_advantage({**record, "id": _text_id(record)}, lines) for record in planted]
    return {
        **{name: group[0].get(name) for name in ("mask_rate", "far", *VARIANT)},
        "planted": _mean(planted, gained),
        "copy": _mean(planted, [gain - other for gain, other in zip(gained, anyway, strict=True)]),
        "repeated": _mean(repeated, found),
    }


def _text_id(record: Record) -> str:
    """The name of the same window without a copy."""
    return window_id(TEXT, record["length"], None, record["document"])


def _advantage(record: Record, lines: dict[tuple, Record]) -> float:
    """How many nats likelier full attention finds the tokens of a window's line."""
    return lines[key(record)]["nll"] - lines[key({**record, **FULL.names})]["nll"]


def _mean(records: list[Record], sums: list[float]) -> Record:
    counts = [record["n"] for record in records]
    return {"documents": len(sums), "n": sum(counts), "advantage": bootstrap(sums, counts) if sums else None}


def why_not(gates: list[Record]) -> str | None:
    """Why a length's figures say nothing about quality; None if they do."""
    if not gates:
        return "no evidence can lie beyond a window's reach"
    for gate in gates:
        documents = gate["planted"]["documents"]
        if documents < FEWEST:
            return f"there are {documents} documents, and it takes {FEWEST}"
        for kind, said in SAID.items():
            if gate[kind]["documents"] >= FEWEST and gate[kind]["advantage"][1] <= MARGIN:
                return f"full attention does not clearly beat the {title_of(gate)}, {said}"
    return None


def report(gate: Record) -> str:
    """A gate in a sentence."""
    parts = []
    for kind, said in SAID.items():
        if gate[kind]["documents"]:
            value, low, high = gate[kind]["advantage"]
            count = f"{gate[kind]['n']} tokens of {gate[kind]['documents']} documents"
            parts.append(f"{value:.2f} ({low:.2f} to {high:.2f}) {said} ({count})")
    few = "" if gate["repeated"]["documents"] >= FEWEST else " Too few documents repeat themselves to judge by that."
    return (
        f"The gate, {gate['mask_rate']:.0%} masked, evidence {gate['far']:,} or more tokens back: full attention's NLL"
        f" is lower than that of the {title_of(gate)}, in nats per token, by {'; '.join(parts)}.{few}"
    )
