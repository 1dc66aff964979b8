"""`benchmarks.fidelity`: its windows, its sums and intervals by hand, its attention against the package's own runs."""

import json
import lzma

import numpy as np
import pytest
import torch

from benchmarks import fidelity
from benchmarks.fidelity import PARTS, Setting, Window, interval, measure, settings, windows
from sparsed import SparseDConfig, load_model, sparsify
from sparsed.blocks import BlockGrid
from sparsed.evaluation.methods import METHODS
from tests.helpers.tiny_folders import tiny_folder

LENGTH, NEW = 96, 20


@pytest.fixture(params=["dream", "llada"])
def model(request, tmp_path):
    return load_model(tiny_folder(tmp_path / request.param, request.param), device="cpu", dtype="float32")


def window_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 200, (LENGTH,), generator=generator)
    return Window("0", tokens, LENGTH - NEW + torch.randperm(NEW, generator=generator))


def test_windows_are_cut_from_whole_documents():
    documents = [np.arange(1, n, dtype=np.uint16) for n in (25, 8, 41)]
    ids = np.concatenate([np.append(document, np.uint16(0)) for document in documents])
    found = windows(ids, 10, 4, 100, 3)
    assert [window.document for window in found] == ["0", "0", "2", "2", "2"]
    assert [window.tokens[0].item() for window in found] == [1, 11, 1, 11, 21]
    assert all(sorted(window.order.tolist()) == [6, 7, 8, 9] for window in found)
    assert len(windows(ids, 10, 4, 4, 3)) == 4 and windows(ids, 50, 4, 9, 9) == []


def test_a_canvas_hides_what_is_not_yet_revealed():
    window = Window("0", torch.arange(1, 11), torch.tensor([9, 6, 8, 7]))
    assert window.canvas(1, 99).tolist() == [[1, 2, 3, 4, 5, 6, 99, 99, 99, 99]]
    assert window.canvas(0.5, 99).tolist() == [[1, 2, 3, 4, 5, 6, 7, 99, 99, 10]]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("method", ["sparsed", "no_isolation", "window"])
def test_a_setting_is_what_a_run_would_compute(model, method, dense):
    """The same forward under `sparsify`: blocks selected on the masked region, read with half of it revealed."""
    window, mask_id = window_of(model), model.config.mask_token_id
    canvases = [window.canvas(share, mask_id) for share in (1, 0.5)]
    rule = METHODS[method].rule
    config = SparseDConfig(skip=0.5 if rule.needs_scores else 0.0, select=0.3, block_size=16, dense_answer=dense)
    with torch.no_grad():
        full = model(canvases[1]).log_softmax(-1)
        with sparsify(model, config, steps=2, gen_length=NEW, rule=rule):
            sparse = [model(canvas) for canvas in canvases][1].log_softmax(-1)
    masked = (canvases[1][0] == mask_id).nonzero()[:, 0]
    rows = masked - int(model.family == "dream")
    kl = (full[0, rows].exp() * (full[0, rows] - sparse[0, rows])).sum().item()
    baseline, found = measure(model, window, [Setting(method, 0.3, 16, dense)], mask_id)
    assert found["n"] == NEW / 2 and found["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7) and kl > 1e-5
    assert found["same"] == (full[0, rows].argmax(-1) == sparse[0, rows].argmax(-1)).sum()
    nll = -sparse[0, rows].gather(1, window.tokens[masked][:, None]).sum().item()
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
    assert baseline["kl"] == 0 and baseline["same"] == baseline["n"]


def test_the_prompts_rows_alone_are_dense_answer_rows(model):
    window, mask_id = window_of(model), model.config.mask_token_id
    wanted = [Setting("sparsed", 0.3, 16, True), *(Setting("sparsed", 0.3, 16, part=part) for part in PARTS)]
    dense, prompt, answer, prompt_keys, answer_keys = (s["kl"] for s in measure(model, window, wanted, mask_id)[1:])
    assert prompt == pytest.approx(dense, rel=1e-3)
    assert len({round(kl, 7) for kl in (prompt, answer, prompt_keys, answer_keys)}) == 4
    everything = [Setting("sparsed", 1.0, 16, part=part) for part in PARTS]
    assert all(s["kl"] == pytest.approx(0, abs=1e-6) for s in measure(model, window, everything, mask_id))


def test_part_masks_by_hand():
    grid = BlockGrid(6, 4, 2)
    kept = torch.eye(3, dtype=torch.bool)[None, None]
    for part, rows in zip(
        PARTS,
        (
            ["110000", "110000", "001100", "111111", "111111", "111111"],
            ["111111", "111111", "111111", "001100", "000011", "000011"],
            ["111111", "111111", "111111", "001111", "000011", "000011"],
            ["111111", "111111", "111111", "111100", "111111", "111111"],
        ),
        strict=True,
    ):
        mask = fidelity.part_mask(kept, grid, part)[0, 0]
        assert ["".join(str(int(bit)) for bit in row) for row in mask] == rows, part


def test_intervals_draw_documents():
    values, n, documents = np.array([1.0, 3.0, 8.0]), np.array([1.0, 1.0, 2.0]), np.array([4, 4, 7])
    mean, low, high = interval(values, n, documents)
    # two documents of the same size, whose means are 2 and 4
    assert (mean, low, high) == (3.0, 2.0, 4.0)
    assert interval(values[:2], n[:2], documents[:2]) == [2.0, 2.0, 2.0]


def test_from_end_to_end(model, tmp_path, capsys):
    folder = next(tmp_path.iterdir())
    ids = np.append(np.random.default_rng(0).integers(1, 200, 400), 0).astype(np.uint16)
    file = tmp_path / "ids.bin.xz"
    file.write_bytes(lzma.compress(np.tile(ids, 2).tobytes()))
    flags = ["--model_path", str(folder), "--tokens", str(file), "--length", "192", "--new_tokens", "20,40"]
    fidelity.main([*flags, "--windows", "2", "--a_document", "1", "--device", "cpu", "--out", str(tmp_path / "r.json")])
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["family"] == model.family and record["environment"]["torch"] and len(record["tokens_sha256"]) == 64
    assert [(rows["new_tokens"], rows["windows"], rows["documents"]) for rows in record["rows"]] == [
        (20, 2, 2),
        (40, 2, 2),
    ]
    for rows in record["rows"]:
        found = {row["title"]: row for row in rows["settings"]}
        assert len(found) == 1 + len(settings(0.2)) and found["full attention"]["kl"] == [0, 0, 0]
        paper = found["SparseD, select 0.3, block_size 128"]
        assert paper["kl_to_paper"] == [0, 0, 0]
    assert "| SparseD, dense answer rows, select 0.1, block_size 128, selected at 0.2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--new_tokens", "192"], "--new_tokens"),
        (["--new_tokens", "1"], "--new_tokens"),
        (["--length", "5000"], "--tokens"),
        (["--skip", "0.9"], "--skip"),
        (["--tokens", "none.bin"], "argument --tokens:"),
        (["--tokens", "odd.bin"], "argument --tokens: odd.bin must hold ids of two bytes each"),
        (["--tokens", "broken.bin.xz"], "argument --tokens:"),
        (["--model_path", "nowhere/at/all"], "argument --model_path:"),
    ],
)
def test_wrong_calls_end_in_one_line(tmp_path, capsys, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "broken.bin.xz").write_bytes(b"abcd")
    folder = tiny_folder(tmp_path / "dream", "dream")
    (tmp_path / "ids.bin").write_bytes(np.append(np.ones(400, np.uint16), np.uint16(0)).tobytes())
    call = ["--model_path", str(folder), "--tokens", str(tmp_path / "ids.bin"), "--length", "192", *flags]
    with pytest.raises(SystemExit) as ending:
        fidelity.main([*call, "--device", "cpu", "--out", str(tmp_path / "r.json")])
    err = capsys.readouterr().err
    assert ending.value.code == 2 and named in err and "Traceback" not in err
