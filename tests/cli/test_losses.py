"""What `--advise` says that settings lost: the committed measurement's own figures, and nothing where none was made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparsed import SparseDConfig
from sparsed.cli.losses import ROWS_ONCE, WITH_CACHE, WITHOUT_CACHE, loss, lost
from sparsed.sampling.settings import LLaDASettings

RESULTS = Path(__file__).parents[2] / "demo/real/results"
CACHES = ({}, {"cached": True}, {"cached": True, "once": True})
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


LIKE = LLaDASettings(256, 256, 32)


def test_a_way_has_its_own_loss():
    paper, dense = SparseDConfig(), SparseDConfig(select=0.3, dense_answer=True)
    plain, every, once = ([loss(config, LIKE, **cache) for config in (None, paper, dense)] for cache in CACHES)
    assert (plain, every, once) == ([0.0, 0.035, 0.007], [0.021, 0.060, 0.031], [0.033, None, None])
    assert lost(0.021) == ", loss 0.021 nats" and lost(None) == ""


@pytest.mark.parametrize("other", [{"block_size": 64}, {"skip": 0.05}, {"select": 0.25}])
def test_what_was_not_measured_is_not_said(other):
    assert [loss(SparseDConfig(**other), LIKE, **cache) for cache in CACHES] == [None] * 3


@pytest.mark.parametrize("change", [{"steps": 128}, {"threshold": 0.9}, {"factor": 1.0}])
def test_other_steps_were_not_measured(change):
    assert [loss(None, replace(LIKE, **change), **cache) for cache in CACHES] == [None] * 3


@pytest.mark.parametrize("change", [{"block_length": 64}, {"gen_length": 128, "steps": 128}])
def test_other_blocks_were_not_measured_under_a_cache(change):
    assert [loss(None, replace(LIKE, **change), **cache) for cache in CACHES] == [0.0, None, None]
