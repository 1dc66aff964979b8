"""The pictures of heads and steps: what is drawn, against the samplers and by hand, and the command."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from sparsed import dream_generate, llada_generate, pictures, sparsify
from sparsed.pictures import CONFIG, NEW_TOKENS, STEPS, View, between_heads, common, denoise, look, selection_of
from sparsed.watching import watched
from tests.helpers.standins import tiny_dream, tiny_llada
from tests.helpers.tiny_folders import tiny_folder

ROOT = Path(__file__).parents[1]
MODELS = {"dream": tiny_dream, "llada": tiny_llada}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def prompt(model):
    return torch.randint(0, model.config.mask_token_id, (1, 200))


def generate(model, prompt):
    shared = {"gen_length": NEW_TOKENS, "steps": STEPS}
    if model.family == "dream":
        return dream_generate(model, prompt, **shared)
    return llada_generate(model, prompt, block_length=NEW_TOKENS, **shared)


def test_the_canvases_are_what_the_model_reads(model, prompt):
    read = []
    with model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].clone())):
        canvases = denoise(model, prompt, View())
    assert len(canvases) == STEPS
    # steps that commit nothing run no forward; the canvas stays then
    assert [ids.tolist() for ids in read] == [ids.tolist() for ids in canvases][STEPS - len(read) :]
    assert canvases[0][0, 200:].eq(model.config.mask_token_id).all()


def test_what_is_drawn_is_what_a_sparse_run_chooses(model, prompt):
    seen, real = look(model, denoise(model, prompt, View()), View()), []
    rule = watched(lambda scores, pattern: real.append((scores, pattern)))
    with sparsify(model, CONFIG, steps=STEPS, gen_length=NEW_TOKENS, rule=rule):
        generate(model, prompt)
    assert torch.equal(seen.selected, torch.stack([pattern.as_mask()[0] for _, pattern in real]))
    torch.testing.assert_close(seen.scores, torch.stack([scores[0] for scores, _ in real]))
    # 264 tokens are 9 blocks of 32; the prompt's 200 end inside of the seventh
    assert seen.border == 7 and seen.kept.shape[-2:] == (9, 9)
    assert View().selecting in View().looked_at and len(seen.kept) == len(View().looked_at) == STEPS // 2
    at = View().looked_at.index(View().selecting)
    held = [[(head * kept).sum() / head.sum() for head, kept in zip(*layer, strict=True)]
            for layer in zip(seen.scores, seen.selected, strict=True)]  # fmt: skip
    torch.testing.assert_close(seen.held[at], torch.tensor(held))
    assert len(seen.held[seen.later]) == STEPS // 2 - at - 1 and (seen.held < 1).all()


def test_choosing_leaves_no_trace(model, prompt):
    before = generate(model, prompt)
    selection_of(model, before, View())
    assert torch.equal(generate(model, prompt), before)


def test_blocks_in_common_by_hand():
    kept = torch.rand(3, 2, 4, 5, 5).argsort(-1) < 2  # every query block keeps two
    sets = [
        [[{(q, k) for q, row in enumerate(head) for k, on in enumerate(row) if on} for head in layer] for layer in step]
        for step in kept.tolist()
    ]
    alike = common(kept[1], kept[2])
    for layer in range(2):
        for head in range(4):
            one, other = sets[1][layer][head], sets[2][layer][head]
            assert alike[layer, head].item() == pytest.approx(len(one & other) / len(one))
        pairs = [(a, b) for a in range(4) for b in range(a)]
        shares = [len(sets[0][layer][a] & sets[0][layer][b]) / 10 for a, b in pairs]
        assert between_heads(kept[0])[layer].item() == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize("family", MODELS)
def test_the_command_writes_both_pictures(family, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    folder = tiny_folder(tmp_path / "model", family)
    monkeypatch.setattr(pictures, "demo_path", lambda _: folder)
    out = tmp_path / "pictures"
    out.mkdir()
    assert pictures.main(["--demo", family, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["heads.png", "steps.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in out.iterdir())
    assert capsys.readouterr().err.count("written to ") == 2


@pytest.mark.parametrize(("words", "said"), [("--out {}/absent", "no folder"), ("", "--out"), ("--demo gpt", "llada")])
def test_a_wrong_call_is_one_line(words, said, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert pictures.main(words.format(tmp_path).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_without_matplotlib_one_line_names_the_command(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    assert pictures.main(["--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and 'pip install ".[plots]"' in err


def test_the_pages_show_them_and_say_how_they_are_made():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert "python -m sparsed.pictures --out assets" in page
    for name in pictures.FILES:
        assert f"(../assets/{name})" in page and (ROOT / "assets" / name).is_file()
