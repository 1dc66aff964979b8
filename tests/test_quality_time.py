"""The picture of quality against time: the committed file, its arithmetic by hand, and rows that are not there."""

from xml.etree import ElementTree

import pytest

from docs.make import quality_time
from docs.make.quality_time import CACHES, FILE, counts, forced, picture, read, row_of, seconds, ways, written

DENSE = {"skip": 0.2, "select": 0.15, "block_size": 128, "dense_answer": True}


def row(refresh=None, **forwards):
    return {"refresh": refresh, "forwards": forwards}


def test_the_committed_picture_is_the_script_s():
    text = FILE.read_text(encoding="utf-8")
    assert text == picture(), "run python -m docs.make.quality_time"
    assert len(text) < 40_000 and "prefers-color-scheme: dark" in text
    names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert names == {"svg", "title", "style", "text", "tspan", "circle", "path"}


@pytest.mark.parametrize(
    ("counted", "config", "expected"),
    [
        (row(full=111.95), None, {"full": 223.9}),
        # of 256 steps a fifth, rounded up, are 52
        (row(full=25, selecting=1, sparse=102), DENSE, {"full": 51, "selecting": 1, "sparse": 204}),
        (row(full=4, cached=124), None, {"full": 8, "cached": 248}),
        # of four refreshes one is full, and it selects; of eight there are two
        (row(selecting=1, sparse=3, cached=86.4), DENSE, {"full": 1, "selecting": 1, "sparse": 6, "cached": 172.8}),
        (row(0, full=1, answer=3, cached=124), None, {"full": 1, "answer": 7, "cached": 248}),
        (row(2, full=2, answer=2, cached=124), None, {"full": 4, "answer": 4, "cached": 248}),
        # a window needs no full step
        (row(full=128), {name: DENSE[name] for name in DENSE if name != "skip"}, {"sparse": 256}),
    ],
)
def test_forwards_for_twice_the_tokens_by_hand(counted, config, expected):
    assert counts(counted, config, tokens=128) == pytest.approx(expected)


def test_other_refreshes_are_refused():
    """Of four blocks, every third computes all rows twice; of eight, three times."""
    with pytest.raises(ValueError, match="refresh 3"):
        counts(row(3, full=2, answer=2, cached=124), None, tokens=128)


def test_seconds_with_a_refresh_by_hand():
    forwards = {name: way["steps"]["256"]["forwards"] for name, way in ways().items()}
    dual, once, sparse = (forwards[name] for name in (quality_time.DUAL, quality_time.ONCE, quality_time.DUAL_DENSE))
    full, cached, answer = (part["seconds"]["median"] for part in (dual["full"], dual["cached"], once["answer"]))
    drawn = {(point.way, point.variant): point.seconds for point in forced()}
    assert drawn[quality_time.DUAL, "2"] == pytest.approx(4 * full + 4 * answer + 248 * cached)
    # of two forwards of all rows the first is full, and selects
    selecting, kept, cached = (sparse[kind]["seconds"]["median"] for kind in ("selecting", "sparse", "cached"))
    assert drawn[quality_time.DUAL_DENSE, "4"] == pytest.approx(selecting + kept + 6 * answer + 248 * cached)
    alone = forwards[quality_time.PAPER]["sparse"]["seconds"]["median"]
    assert drawn[quality_time.WINDOW, ""] == pytest.approx(256 * alone)


def test_seconds_by_hand():
    medians = {"full": 5.0, "selecting": 7.0, "sparse": 2.0, "cached": 0.01}
    way = {"steps": {"256": {"forwards": {kind: {"seconds": {"median": value}} for kind, value in medians.items()}}}}
    # 1 x 5 + 1 x 7 + 6 x 2 + 172.8 x 0.01
    assert seconds(way, {"full": 1, "selecting": 1, "sparse": 6, "cached": 172.8}) == pytest.approx(25.728)


def test_points_by_hand_and_as_timed():
    drawn = {(point.way, point.variant): point.seconds for point in written()}
    # medians of the record: 1 x 5.0309 + 1 x 7.3670 + 6 x 2.2159 + 172.8 x 0.01290
    assert drawn["dual cache, dense answer rows, select 0.15", "0.7"] == pytest.approx(27.92, abs=0.03)
    assert drawn["full attention", "64 steps"] == pytest.approx(128 * 4.99423, rel=1e-4)
    timed = {name: way["steps"]["256"]["seconds"] for name, way in ways().items()}
    whole = {name: time for (name, variant), time in drawn.items() if not variant}
    assert len(whole) == 8 and whole == pytest.approx({name: timed[name] for name in whole}, rel=0.02)


def test_every_way_is_in_a_panel_and_has_a_label():
    left, right = forced(), written()
    assert {point.way for point in [*left, *right]} == set(ways())
    for panel, points in ((quality_time.FORCED, left), (quality_time.TEXTS, right)):
        assert {(point.way, "") for point in points} <= panel.labels.keys()
        assert all(panel.low < point.loss[1] for point in points)
    assert {point.variant for point in [*left, *right]} == {"", *quality_time.VARIANTS}


def test_a_row_is_taken_from_where_it_is(monkeypatch):
    """SparseD without a cache is drawn from the caches' summary as soon as that has it."""
    name = "SparseD, dense answer rows, select 0.15"
    records = {path: read(path) for path in (CACHES, quality_time.TABLE)}
    rows = records[CACHES]["rows"]
    uncached = [one for one in rows if not (one["method"] == "sparsed" and one["cache"] is None)]
    monkeypatch.setattr(quality_time, "read", records.get)
    records[CACHES] = {"rows": uncached}
    before = {point.way: point for point in forced()}
    assert before[name].elsewhere and before["SparseD, the paper's"].elsewhere
    cached = row_of(records[CACHES], {"method": "sparsed", **DENSE, "cache": "dual"}, mask_rate=0.5)
    plain = {**cached, "cache": None, "difference": [0.02, 0.01, 0.03]}
    records[CACHES] = {"rows": [*uncached, plain, {**plain, "select": 0.3, "dense_answer": None}]}
    after = {point.way: point for point in forced()}
    assert after[name].loss == (0.02, 0.01, 0.03) and after[name].seconds == pytest.approx(721.72, abs=0.01)
    assert not after[name].elsewhere and not after["SparseD, the paper's"].elsewhere


def test_the_command_writes_the_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality_time, "FILE", tmp_path / "picture.svg")
    with pytest.raises(SystemExit, match="0"):
        quality_time.main(["--help"])
    assert "python -m docs.make.quality_time" in capsys.readouterr().out and not quality_time.FILE.exists()
    quality_time.main([])
    assert quality_time.FILE.read_text(encoding="utf-8") == picture()
