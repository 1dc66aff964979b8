"""What `--advise` says that settings lost: the committed measurement's own figures, and nothing where none was made."""

import json
from pathlib import Path

import pytest

from sparsed import SparseDConfig
from sparsed.cli.losses import ROWS_ONCE, WITH_CACHE, WITHOUT_CACHE, loss, lost

RESULTS = Path(__file__).parents[2] / "demo/real/results"
NAMES = ("method", "select", "skip", "block_size", "cache", "refresh", "dense_answer")


def measured(name):
    """Of one table, {what a row is of: its loss}, at 4,096 tokens and half masked."""
    rows = json.loads((RESULTS / name / "summary.json").read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if (row["length"], row["mask_rate"]) == (4096, 0.5) and row["difference"]]
    return {tuple(row[name] for name in NAMES): row["difference"][0] for row in rows}


def test_every_loss_is_the_record_s():
    table, caches = measured("table"), measured("caches")
    for (select, dense), nats in WITHOUT_CACHE.items():
        assert nats == pytest.approx(table["sparsed", select, 0.2, 128, None, None, dense or None], abs=5e-4)
    for rule, nats in WITH_CACHE.items():
        of = ("origin", None, None, None) if rule is None else ("sparsed", rule[0], 0.2, 128)
        assert nats == pytest.approx(caches[(*of, "dual", None, (rule and rule[1]) or None)], abs=5e-4)
    assert pytest.approx(caches["origin", None, None, None, "dual", 0, None], abs=5e-4) == ROWS_ONCE


def test_a_way_has_its_own_loss():
    paper, dense = SparseDConfig(), SparseDConfig(select=0.3, dense_answer=True)
    assert (loss(None), loss(paper), loss(dense)) == (0.0, 0.035, 0.007)
    assert (loss(None, cached=True), loss(paper, cached=True), loss(dense, cached=True)) == (0.021, 0.060, 0.031)
    assert (loss(None, cached=True, once=True), loss(paper, cached=True, once=True)) == (0.033, None)
    assert lost(0.021) == ", loss 0.021 nats" and lost(None) == ""


@pytest.mark.parametrize("other", [{"block_size": 64}, {"skip": 0.05}, {"select": 0.25}])
def test_what_was_not_measured_is_not_said(other):
    assert loss(SparseDConfig(**other)) is None and loss(SparseDConfig(**other), cached=True) is None
