"""Pictures of a summary: KL to full attention and negative log-likelihood against density."""

from functools import partial
from operator import itemgetter
from pathlib import Path

from ..folder import Record
from ..plots import chart, curves

DRAWN = {"kl": "KL to full attention, nats", "nll": "negative log-likelihood, nats"}


def draw(summary: Record, folder: Path) -> None:
    """Write `kl.png` and `nll.png`, with a panel for each mask rate of each length that can tell; none without one."""
    able = [found["length"] for found in summary["lengths"] if not found["cannot_tell"]]
    panels: dict[str, list[Record]] = {}
    for row in summary["rows"]:
        if row["length"] in able:
            panels.setdefault(f"{row['length']:,} tokens, {row['mask_rate']:.0%} masked", []).append(row)
    for name, label in DRAWN.items():
        (folder / f"{name}.png").unlink(missing_ok=True)
        if panels:
            chart(folder / f"{name}.png", panels, partial(curves, itemgetter(name), label))
