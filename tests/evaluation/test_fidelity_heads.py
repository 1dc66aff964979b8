"""`python -m sparsed.evaluation.fidelity.heads`: a line against brute force in float64, sums by hand, the command."""

import json

import numpy as np
import pytest
import torch

from sparsed import SparseDConfig, load_model
from sparsed.evaluation.fidelity import heads
from sparsed.evaluation.folder import SAMPLES, SUMMARY, TABLE
from sparsed.pictures import View, denoise, look
from tests.evaluation.test_fidelity import ids_file
from tests.helpers import reference
from tests.helpers.tiny_folders import tiny_folder

LENGTH, NEW, BLOCK = 96, 16, 16


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_shares_are_what_brute_force_finds(tmp_path, family):
    folder = tiny_folder(tmp_path / "model", family)
    model = load_model(folder, device="cpu", dtype="float32")
    prompt = torch.randint(1, 200, (1, LENGTH - NEW), generator=torch.Generator().manual_seed(0))
    view = View(NEW, NEW, SparseDConfig(0.0, 0.4, BLOCK), 4)
    found = heads.shares(look(model, denoise(model, prompt, view), view))
    masked = torch.nn.functional.pad(prompt, (0, NEW), value=model.config.mask_token_id)
    config = json.loads((folder / "config.json").read_text())
    _, rotated = reference.forward(family, model.state_dict(), config, masked)
    for layer, (q, k) in enumerate(rotated):
        keep, gap = reference.select(q, k, prompt_len=LENGTH - NEW, block_size=BLOCK, select=0.4)
        assert gap > 1e-6, "a tie decides: take another seed"
        mask = reference.expand(keep, BLOCK, LENGTH)[0]
        count = len(mask)
        for head in range(count):
            scores = q[0, head] @ k[0, head // (count // k.shape[1])].T / q.shape[-1] ** 0.5
            held = (scores.softmax(-1) * mask[head]).sum(-1).mean().item()
            assert found["held"][layer][head] == pytest.approx(held, rel=1e-5)
        pairs = [(a, b) for a in range(count) for b in range(a)]
        common = [(keep[0, a] & keep[0, b]).sum().item() / keep[0, a].sum().item() for a, b in pairs]
        assert found["heads"][layer] == pytest.approx(sum(common) / len(common))
    assert np.shape(found["later"]) == np.shape(found["steps_alike"]) == np.shape(found["held"])


def line(document, held, **changes):
    """A line of a model of one layer with two heads."""
    names = {"method": "sparsed", "select": 0.3, "skip": 0.2, "block_size": 32, "dense_answer": None}
    about = {"id": f"4096-{document}", "document": document, "length": 4096}
    return about | names | {"held": [held], "later": [held], "heads": [0.5], "steps_alike": [[1.0, 0.5]]} | changes


def test_sums_are_means_over_documents():
    lines = [line("a", [0.8, 0.6]), line("b", [0.6, 0.2])]
    (row,) = heads.summarize(lines)["rows"]
    assert row["held"] == pytest.approx((0.55, 0.4, 0.7)) and row["documents"] == 2
    assert row["by_head"]["held"] == [[pytest.approx(0.7), pytest.approx(0.4)]]
    assert row["steps_alike"][0] == 0.75 and all(map(heads.identified, lines))
    assert "| 4,096 | 2 | SparseD, select 0.3, skip 0.2, block_size 32 | 55.0 (40.0 to 70.0) |" in (
        heads.table({"rows": [row]})
    )
    with pytest.raises(LookupError):
        heads.identified({"id": "x"})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    tiny_folder(folder / "model", "dream")
    words = ["--model_path", str(folder / "model"), "--texts", str(ids_file(folder / "ids.bin", 3)), "--lengths", "256"]
    words += ["--seq_len", "16", "--steps", "8", "--block_size", "16,32", "--limit", "2", "--quiet", "--device", "cpu"]
    assert heads.main([*words, "--out", str(folder / "run")]) == 0
    return words, folder / "run"


def test_the_command_leaves_figures_and_pictures(done, tmp_path, monkeypatch):
    words, folder = done
    lines = list(map(json.loads, (folder / SAMPLES).read_text().splitlines()))
    assert [(one["document"], one["block_size"]) for one in lines] == [
        (f"ids.bin:{number}", size) for number in range(2) for size in (16, 32)
    ]
    summary = json.loads((folder / SUMMARY).read_text())
    assert [row["block_size"] for row in summary["rows"]] == [16, 32]
    assert (folder / TABLE).read_text() == heads.table(summary)
    monkeypatch.setattr(heads, "look", lambda *_: pytest.fail("looked again"))
    assert heads.main([*words, "--out", str(folder)]) == 0
    pytest.importorskip("matplotlib")
    for name in ("heads.png", "steps.png", "recall.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_a_document_is_continued_from_where_the_new_tokens_begin(done, monkeypatch, tmp_path):
    words, _ = done
    prompts = []

    def noted(model, ids, view):
        prompts.append(ids)
        return denoise(model, ids, view)

    monkeypatch.setattr(heads, "denoise", noted)
    assert heads.main([*words, "--limit", "1", "--out", str(tmp_path / "run")]) == 0
    assert [ids.shape for ids in prompts] == [(1, 240)], "once for both settings"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--skip", "1"], "--skip: 1 leaves no later step of 8 to look at"),
        (["--select", "0"], "--select: must be above 0"),
        (["--select", "0.3,1"], "--select: 1 keeps every block of 256 tokens with --block_size 16"),
        (["--block_size", "128"], "--select: 0.3 keeps every block of 256 tokens with --block_size 128"),
        (["--seq_len", "256"], "--seq_len: 256 new tokens leave nothing of 256 before them"),
        (["--dense_answer"], "unrecognized arguments: --dense_answer"),
    ],
)
def test_a_wrong_call_is_one_line(done, tmp_path, capsys, changes, says):
    words, _ = done
    assert heads.main([*words, *changes, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error and not (tmp_path / "run").exists()


def test_too_little_memory_advises_no_flag_that_it_lacks(monkeypatch, capsys):
    def parse(argv):
        raise MemoryError

    monkeypatch.setattr(heads, "parse", parse)
    assert heads.main([]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--lengths" in err and "--parallel" not in err
