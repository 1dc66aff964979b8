"""What `--advise` says that settings lost: the committed measurement's own figures, and nothing where none was made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparsed import SparseDConfig
from sparsed.cli.losses import ABOUT, ROWS_ONCE, WITH_CACHE, WITHOUT_CACHE, loss, lost
from sparsed.cli.ways import Forwards, every_way
from sparsed.sampling.settings import LLaDASettings

RESULTS = Path(__file__).parents[2] / "demo/real/results"
CACHES = ({}, {"cached": True}, {"cached": True, "once": True})
NAMES = ("method", "select", "skip", "block_size", "cache", "refresh", "dense_answer")


def measured(name, length=4096):
    """Of one table, {what a row is of: its loss}, at half masked."""
    rows = json.loads((RESULTS / name / "summary.json").read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if (row["length"], row["mask_rate"]) == (length, 0.5) and row["difference"]]
    return {tuple(row[name] for name in NAMES): row["difference"][0] for row in rows}


def test_every_loss_is_the_record_s():
    caches = measured("caches")
    for tokens, folder in ((128, "table"), (256, "table-256")):
        table = measured(folder)
        for (select, dense), nats in WITHOUT_CACHE[tokens].items():
            assert nats == pytest.approx(table["sparsed", select, 0.2, 128, None, None, dense or None], abs=5e-4)
    for rule, nats in WITH_CACHE.items():
        of = ("origin", None, None, None) if rule is None else ("sparsed", rule[0], 0.2, 128)
        assert nats == pytest.approx(caches[(*of, "dual", None, (rule and rule[1]) or None)], abs=5e-4)
    assert pytest.approx(caches["origin", None, None, None, "dual", 0, None], abs=5e-4) == ROWS_ONCE
    longer = [measured(f, 8192)["sparsed", 0.15, 0.2, 128, None, None, True] for f in ("table-mixed", "table-clean")]
    assert "select 0.15 lost {:.2f} and {:.2f} on two others".format(*longer) in ABOUT


LIKE, PLAIN, PROMPT = LLaDASettings(256, 256, 32), LLaDASettings(128, 128, 128), 4096 - 256


def losses(config, like=LIKE, prompt=PROMPT):
    """With every cache."""
    return [loss(config, like, prompt, **cache) for cache in CACHES]


def test_a_way_has_its_own_loss():
    paper, dense = SparseDConfig(), SparseDConfig(select=0.3, dense_answer=True)
    assert [losses(config) for config in (None, paper, dense)] == [
        [0.0, 0.021, 0.033],
        [0.150, 0.060, None],
        [0.024, 0.033, None],
    ]
    assert [losses(config, PLAIN) for config in (None, paper, dense)] == [
        [0.0, None, None],
        [0.035, None, None],
        [0.007, None, None],
    ]
    assert lost(0.021) == ", loss 0.021 nats" and lost(None) == ""


@pytest.mark.parametrize("like", [LIKE, PLAIN])
@pytest.mark.parametrize("other", [{"block_size": 64}, {"skip": 0.05}, {"select": 0.25}])
def test_what_was_not_measured_is_not_said(other, like):
    assert losses(SparseDConfig(**other), like) == [None] * 3


@pytest.mark.parametrize("like", [LIKE, PLAIN])
def test_with_short_prompts_sparsed_was_not_measured(like):
    assert losses(SparseDConfig(), like, 1024) == [None] * 3 and losses(SparseDConfig(), like, 65536) != [None] * 3
    assert losses(None, like, 1024) == [0.0, None, None], "nor were caches"


@pytest.mark.parametrize("change", [{"steps": 128}, {"threshold": 0.9}, {"factor": 1.0}])
def test_other_steps_were_not_measured(change):
    assert losses(None, replace(LIKE, **change)) == [None] * 3


@pytest.mark.parametrize("change", [{"block_length": 64}, {"gen_length": 128, "steps": 128}])
def test_other_blocks_were_not_measured_under_a_cache(change):
    assert losses(None, replace(LIKE, **change)) == [0.0, None, None]


@pytest.mark.parametrize("change", [{"threshold": 0.9}, {"factor": 1.0}])
def test_open_ended_runs_are_ranked_without_a_loss(change):
    times = Forwards(1.0, 2.0, 0.5, 0.1, 0.01)
    found = list(every_way(replace(LIKE, **change), SparseDConfig(), PROMPT, times, (256.0, 140.0)))
    assert len(found) == 5 and {way.nats for way in found} == {None}
    assert {way.nats for way in every_way(LIKE, SparseDConfig(), PROMPT, times, (256.0, 140.0))} > {0.0, 0.021}
