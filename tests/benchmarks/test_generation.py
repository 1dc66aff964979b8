"""The benchmark of whole generations, on a CPU: what it runs, checks, counts and prints; its times need a GPU."""

import json

import pytest
import torch

from benchmarks import fast_dllm, generation
from benchmarks.common import LENGTHS
from benchmarks.generation import WAYS, Way, put_together, run
from sparsed import SparseDConfig, load_model
from sparsed.kernels import full_attention
from tests.helpers.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")
ATTENTION = SparseDConfig(0.25, 0.3, 16)


class Played:
    """A call of the benchmark whose GPU and model are played by the CPU and a tiny model."""

    def __init__(self, tmp_path, monkeypatch, family):
        self.out = tmp_path / "record.json"
        self.flags = ["--family", family, "--lengths", "4k,64k", "--repeats", "2", "--out", str(self.out)]
        model = load_model(tiny_checkpoint(tmp_path / "model", family), device="cpu")
        ways = [Way(way.name, way.config and ATTENTION, way.saving, way.flag) for way in WAYS]
        for name, value in {
            "require_gpu": lambda parser: CPU,
            "random_model": lambda family, device: model,
            "WAYS": tuple(ways),
            "NEW_TOKENS": 16,
            "BLOCK_LENGTH": 4,
            "STEPS": (16, 8),
            "RUN_WHOLE": 100,
        }.items():
            monkeypatch.setattr(generation, name, value)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
        monkeypatch.setitem(LENGTHS, "4k", 90)
        monkeypatch.setitem(LENGTHS, "64k", 170)

    def run(self):
        """The exit code and the record."""
        try:
            generation.main(self.flags)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, json.loads(self.out.read_text())


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_from_end_to_end(family, tmp_path, monkeypatch, capsys):
    played = Played(tmp_path, monkeypatch, family)
    checked = []
    monkeypatch.setattr(generation, "check", lambda way, model, length: checked.append((way.name, length)) or {})
    code, record = played.run()
    assert checked == [(way.name, tokens + 16) for tokens in (90, 170) for way in WAYS]
    assert code == 0 and [row["length"] for row in record["rows"]] == ["4k", "64k"]
    full, sparsed, _, dual, both, _, once, prefix = (way.name for way in WAYS)
    for row, whole in zip(record["rows"], (True, False), strict=True):
        counts = {
            (name, steps): {phase: part["count"] for phase, part in entry["forwards"].items()}
            for name, way in row["ways"].items()
            for steps, entry in way["steps"].items()
        }
        assert counts[full, "16"] == {"full": 16} and counts[full, "8"] == {"full": 8}
        # a quarter of the steps are full, the last of them selects
        assert counts[sparsed, "16"] == {"full": 3, "selecting": 1, "sparse": 12}
        assert counts[sparsed, "8"] == {"full": 1, "selecting": 1, "sparse": 6}
        assert counts[dual, "16"] == {"full": 4, "cached": 12} and counts[dual, "8"] == {"full": 4, "cached": 4}
        assert counts[both, "16"] == {"selecting": 1, "sparse": 3, "cached": 12}  # of four refreshes one is full
        assert counts[prefix, "16"] == counts[dual, "16"]
        assert counts[once, "16"] == {"full": 1, "answer": 3, "cached": 12}
        measured = {key: entry["measured"] for key, entry in row["ways"][full]["steps"].items()}
        assert measured == {"16": whole, "8": False}, "fewer steps are made of the same forwards"
        assert all(entry["measured"] for entry in row["ways"][both]["steps"].values())
        for way in row["ways"].values():
            for entry in way["steps"].values():
                assert entry["speedup"] == row["ways"][full]["steps"]["16"]["seconds"] / entry["seconds"]
    assert capsys.readouterr().out.endswith(generation.table([record]) + "\n")


def test_some_ways(tmp_path, monkeypatch):
    played = Played(tmp_path, monkeypatch, "dream")
    monkeypatch.setattr(generation, "check", lambda *_: {})
    played.flags += ["--ways", "once,dual-dense"]
    code, record = played.run()
    names = ["full attention", "dual cache, dense answer rows, select 0.15", "dual cache, all rows once"]
    assert code == 0 and all(list(row["ways"]) == names for row in record["rows"])


def test_what_is_checked(tmp_path, monkeypatch):
    Played(tmp_path, monkeypatch, "llada")
    model = load_model(tmp_path / "model", device="cpu")
    few, both = ["cached", "answer"], ["sparse", "cached", "answer"]
    expected = [], ["sparse"], ["sparse"], few, both, both, few, few
    for way, kinds in zip(generation.WAYS, expected, strict=True):
        gates = generation.check(way, model, 122)
        assert list(gates) == ["full", *kinds]
        assert all(gate["error"] <= gate["allowed"] for gate in gates.values())
        assert {kind: gate["kernel"] for kind, gate in gates.items()} == {
            kind: {"full": "full", "sparse": "gather", "cached": "torch", "answer": "torch"}[kind] for kind in gates
        }


def test_what_is_put_together():
    times = {phase: {"median": seconds} for phase, seconds in {"full": 10.0, "selecting": 17.0, "sparse": 4.0}.items()}
    assert put_together(times, WAYS[0], 72)["seconds"] == 720.0
    # ceil(.2 * 72) = 15
    assert put_together(times, WAYS[1], 72)["seconds"] == 14 * 10.0 + 17.0 + 57 * 4.0


def test_the_first_forwards_alone(tmp_path, monkeypatch):
    Played(tmp_path, monkeypatch, "llada")
    model = load_model(tmp_path / "model", device="cpu")
    way = Way("", ATTENTION)
    assert [phase for phase, *_ in run(model, 90, way, way.settings("llada", 16), 2).forwards] == [
        "selecting",
        "sparse",
    ]


def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch, capsys):
    played = Played(tmp_path, monkeypatch, "llada")

    def wrong(q, k, v):
        return full_attention(q, k[:, :, 1:], v[:, :, 1:]) if q.shape[2] < k.shape[2] else full_attention(q, k, v)

    monkeypatch.setattr(generation, "full_attention", wrong)
    code, record = played.run()
    assert code == 1 and "a kernel is wrong" in capsys.readouterr().err
    for row in record["rows"]:
        assert "cached attention errs" in row["error"] and "steps" not in row["ways"][WAYS[3].name]


def test_no_memory_for_it_is_said(tmp_path, monkeypatch, capsys):
    played, plain = Played(tmp_path, monkeypatch, "dream"), generation.run

    def limited(model, tokens, way, *args):
        if tokens == 170 and way.config is None:
            raise torch.OutOfMemoryError
        return plain(model, tokens, way, *args)

    monkeypatch.setattr(generation, "run", limited)
    monkeypatch.setattr(generation, "check", lambda *_: {})
    code, record = played.run()
    assert code == 0
    ways = record["rows"][1]["ways"]
    assert ways[WAYS[0].name]["error"] == "out of memory" and "ran out of memory" in ways[WAYS[1].name]["error"]
    assert "full attention: out of memory" in capsys.readouterr().out


# --- Fast-dLLM beside ours


def test_its_forwards_in_our_terms():
    run = {"forwards": [[122, 10.0], [8, 1.0], [8, 3.0], [122, 12.0]], "peak_memory_bytes": 7}
    theirs = fast_dllm.converted(run, 122)
    assert theirs["seconds"] == 26.0 and theirs["peak_memory_bytes"] == 7
    assert {phase: part["count"] for phase, part in theirs["forwards"].items()} == {"full": 2, "cached": 2}
    assert theirs["forwards"]["cached"]["seconds"]["median"] == 2.0
    ours = {"forwards": {phase: {"seconds": {"median": each}} for phase, each in {"full": 4.0, "cached": 0.5}.items()}}
    assert fast_dllm.ratio(theirs, ours) == 26.0 / (2 * 4.0 + 2 * 0.5)


@pytest.mark.parametrize("fails", [False, True])
def test_it_runs_after_ours_and_is_held_against_the_cache_alone(fails, tmp_path, monkeypatch, capsys):
    played = Played(tmp_path, monkeypatch, "llada")
    monkeypatch.setattr(generation, "check_reference", lambda *_: None)

    def ours(model, row, ways, repeats):
        full = {"full": {"count": 4, "seconds": {"median": 0.5}}}
        entry = {"measured": True, "seconds": 8.0, "forwards": full, "peak_memory_bytes": 7}
        for name in (WAYS[0].name, generation.CACHE_ALONE):
            row["ways"][name] = {"steps": {"16": dict(entry), "8": dict(entry)}}
        yield "done"

    monkeypatch.setattr(generation, "measure", ours)
    monkeypatch.setattr(generation, "warm", lambda *_: {})
    played.flags += ["--reference", str(tmp_path)]

    def measure(folder, family, lengths, *sizes):
        assert (folder, family, lengths, sizes) == (tmp_path, "llada", ["4k", "64k"], (16, 4, (16, 8)))
        yield {"versions": {"torch": "x"}}
        full = {"full": {"count": 4, "seconds": {"median": 1.0}}}
        entry = {"measured": True, "seconds": 4.0, "forwards": full, "peak_memory_bytes": 7}
        yield {"length": "4k", "steps": {"16": dict(entry), "8": dict(entry)}}
        if fails:
            raise RuntimeError("ended with exit code 1")
        yield {"length": "64k", "error": "out of memory"}

    monkeypatch.setattr(fast_dllm, "measure", measure)
    code, record = played.run()
    out, err = capsys.readouterr()
    assert code == fails and ("exit code 1" in err) == fails
    assert record["reference"]["versions"] == {"torch": "x"}
    found = record["rows"][0]["ways"][fast_dllm.NAME]["steps"]["16"]
    assert found["ours_faster"] == 2.0 and found["speedup"] == 2.0
    assert fast_dllm.NAME in out and (fails or f"{fast_dllm.NAME}: out of memory" in out)


@pytest.mark.parametrize(("flags", "named"), [([], "llada/generate.py"), (["--family", "illada"], "does not run")])
def test_a_folder_that_is_no_reference(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        generation.main(["--out", str(tmp_path / "x.json"), "--reference", str(tmp_path), *flags])
    assert stop.value.code == 2 and named in capsys.readouterr().err
