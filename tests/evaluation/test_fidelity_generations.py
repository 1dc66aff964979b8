"""`python -m sparsed.evaluation.fidelity.generations`: lines against the float64 sampler, sums by hand, the command."""

import json

import numpy as np
import pytest
import torch

from sparsed import SparseDConfig, load_model
from sparsed.evaluation.fidelity import generations
from sparsed.evaluation.fidelity.agreement import common_prefix, identified, repeated_share, summarize, table
from sparsed.evaluation.fidelity.documents import Document
from sparsed.evaluation.fidelity.measuring import FULL
from sparsed.evaluation.fidelity.writing import DRAWS, Task, Writer
from sparsed.evaluation.folder import SAMPLES, SUMMARY, TABLE
from sparsed.evaluation.methods import Variant
from sparsed.sampling.likelihood import draw_masks
from sparsed.sampling.saving import Saving
from tests.evaluation.test_fidelity import ids_file
from tests.helpers import reference_blocks
from tests.helpers.tiny_folders import tiny_folder

PROMPT, NEW, BLOCK = 64, 16, 8
SPARSE = SparseDConfig(0.2, 0.4, 16)
WAYS = {
    "full": (FULL, {}),
    "dual": (Variant("origin", None, Saving(cache="dual", refresh=0)), {"cache": "dual", "refresh": 0}),
    "threshold": (Variant("origin", None, Saving(threshold=0.006)), {"threshold": 0.006}),
    "sparse": (Variant("sparsed", SPARSE, Saving(cache="prefix", refresh=1)),
               {"cache": "prefix", "refresh": 1, "sparse": SPARSE}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_a_line_is_what_the_reference_writes(tmp_path, family, way):
    folder = tiny_folder(tmp_path / "model", family)
    model = load_model(folder, device="cpu", dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    twin = reference_blocks.Model.of(family, model.state_dict(), config)
    variant, options = WAYS[way]
    prompts, _, batch = reference_blocks.decided(
        twin, prompt_len=PROMPT, gen_length=NEW, steps=8, block_length=BLOCK, clear=1e-6, **options
    )
    # a document goes on where the prompt ends, with tokens that are not read
    document = Document("d", np.concatenate([prompts[0].numpy(), np.full(NEW + 5, 7)]))
    steps = []
    line = Writer(model, NEW, BLOCK).write(Task(document, PROMPT + NEW, 8, variant), lambda: steps.append(None))
    assert line["tokens"] == batch.tokens[0, PROMPT:].tolist()
    kinds = [one.kind for one in batch.forwards]
    whole = [kind for kind in kinds if kind != "rows"]
    assert sum(line["forwards"].values()) == len(kinds) and len(steps) >= len(kinds)
    assert sorted(kind for kind, n in line["forwards"].items() for _ in range(n) if kind in whole) == sorted(whole)
    assert line["seconds"] > 0 and line["id"] == f"{PROMPT + NEW}-d" and identified(line)
    assert line["bound"] == pytest.approx(bound(twin, prompts[0], line["tokens"]), rel=1e-5)


def bound(twin, prompt, tokens):
    """LLaDA's estimate from the same maskings, in float64 and loops."""
    ids, total = torch.cat([prompt, torch.tensor(tokens)]), 0.0
    valid = torch.ones(len(ids), dtype=torch.bool)
    for mask in draw_masks(DRAWS, len(tokens), torch.Generator().manual_seed(0)):
        hidden = [len(prompt) + n for n in range(len(tokens)) if mask[n]]
        seen = torch.tensor([twin.config["mask_token_id"] if j in hidden else ids[j] for j in range(len(ids))])
        cache = reference_blocks.empty_cache(twin, len(ids))
        logits, _ = reference_blocks.forward(twin, seen, valid, 0, len(ids), cache)
        for j in hidden:
            row = logits[j - (twin.family == "dream")].log_softmax(-1)
            total -= row[ids[j]].item() * len(tokens) / len(hidden)
    return total / DRAWS


# --- sums, by hand


def written(document, tokens, bound=8.0, steps=4, forwards=None, **changes):
    """A line of a text of four tokens."""
    names = {"method": "origin", "select": None, "skip": None, "block_size": None, "dense_answer": None}
    about = {"id": f"4096-{document}", "document": document, "length": 4096, "steps": steps}
    sums = {"tokens": tokens, "forwards": forwards or {"full": steps}, "seconds": 2.0, "bound": bound}
    return about | names | sums | changes


def test_texts_are_compared_with_full_attentions():
    lines = [written("a", [1, 2, 3, 4]), written("b", [5, 6, 7, 8], bound=4.0)]
    dual = {"cache": "dual", "refresh": 1, "threshold": 0.9, "forwards": {"full": 1, "cached": 2}}
    lines += [written("a", [1, 2, 9, 4], 12.0, seconds=0.5, **dual), written("b", [5, 6, 7, 8], 8.0, **dual)]
    lines += [written("a", [1, 2, 3, 9], steps=2), written("b", [5, 1, 1, 1], bound=None, steps=2)]
    full, dual, few = summarize(lines)["rows"]
    assert all(map(identified, lines))
    assert full["same"] == (1.0, 1.0, 1.0) and full["prefix"][0] == 4 and full["difference"] is None
    assert full["bound"] == pytest.approx((12 / 8, 1.0, 2.0))
    assert dual["same"] == pytest.approx((7 / 8, 3 / 4, 1.0)) and dual["prefix"] == (3.0, 2.0, 4.0)
    assert dual["difference"] == pytest.approx((1.0, 1.0, 1.0))
    assert dual["whole"] == 1 and dual["forwards"] == {"full": 1, "cached": 2} and dual["seconds"] == 1.25
    assert few["same"][0] == 4 / 8 and few["prefix"][0] == 2 and few["steps"] == 2
    assert (full["bounded"], few["bounded"]) == (2, 1) and few["bound"][0] == 2.0 and few["difference"][0] == 0.0
    text = table({"rows": [full, dual, few], "settings": {"seq_len": 4, "block_length": 2}})
    assert (
        "| full attention, dual cache, refresh 1, threshold 0.9 | 4 | 1.0 | 2.0 | 1.25 | 87.5 (75.0 to 100.0) | "
        in text
    )
    assert text.splitlines()[-1].startswith("| full attention | 2 | 2.0 | 0.0 | 2 | 50.0 ")
    (never,) = summarize([written("a", [1, 2, 3, 4], bound=None)])["rows"]
    assert never["bound"] is None and never["bounded"] == 0


def test_prefixes_and_repetitions():
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 3 and common_prefix([1, 2, 3], [1, 5, 3]) == 1
    assert repeated_share([1, 2, 3, 4, 5, 6, 7]) == 0 and repeated_share([1] * 11) == 7 / 8
    assert repeated_share([1, 2, 3]) == 0


@pytest.mark.parametrize("name", written("a", [1]))
def test_a_line_without_what_the_summary_needs_does_not_count(name):
    broken = {key: value for key, value in written("a", [1]).items() if key != name}
    with pytest.raises(LookupError):
        identified(broken)
    assert identified(written("a", [])) is None and identified(written("a", ["x"])) is None


# --- the command


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generations")
    tiny_folder(folder / "model", "dream")
    words = ["--model_path", str(folder / "model"), "--texts", str(ids_file(folder / "ids.bin", 3)), "--lengths", "256"]
    words += ["--seq_len", "16", "--block_length", "8", "--methods", "sparsed", "--block_size", "16", "--limit", "2"]
    words += ["--cache", "none,dual", "--refresh", "1,0", "--threshold", "none,0.9", "--steps", "8", "--quiet"]
    words += ["--device", "cpu"]
    assert generations.main([*words, "--out", str(folder / "run")]) == 0
    return words, folder / "run"


def test_every_setting_is_written_once(done):
    _, folder = done
    lines = list(map(json.loads, (folder / SAMPLES).read_text().splitlines()))
    found = [(one["steps"], one["method"], one.get("cache"), one.get("refresh"), one.get("threshold")) for one in lines]
    caches = [(None, None), ("dual", None), ("dual", 0)]
    ways = {(8, "origin", *cache, bound) for cache in caches for bound in (None, 0.9)}
    ways |= {(8, "sparsed", *cache, bound) for cache in caches[:2] for bound in (None, 0.9)} | {
        (16, "origin", None, None, None)
    }
    assert len(found) == 2 * len(ways) and set(found) == ways
    summary = json.loads((folder / SUMMARY).read_text())
    assert len(summary["rows"]) == len(ways) and (folder / TABLE).read_text() == table(summary)
    pytest.importorskip("matplotlib")
    assert (folder / "same.png").is_file()


def test_an_interrupted_run_goes_on(done, tmp_path, monkeypatch):
    words, folder = done
    write, count = Writer.write, []

    def counted(self, task, on_step):
        count.append(task)
        if len(count) == 5:
            raise KeyboardInterrupt
        return write(self, task, on_step)

    monkeypatch.setattr(Writer, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        generations.main([*words, "--out", str(tmp_path / "run")])
    assert generations.main([*words, "--out", str(tmp_path / "run")]) == 0
    lines, before = (
        [{**json.loads(text), "seconds": 0} for text in (one / SAMPLES).read_text().splitlines()]
        for one in (tmp_path / "run", folder)
    )
    assert lines == before and len(count) == len(lines) + 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--steps", "3"], "--steps: must be a multiple of the 2 blocks of 8 in 16 new tokens, got 3"),
        (["--block_length", "5"], "--block_length: must divide the 16 new tokens, got 5"),
        (["--threshold", "-1"], "--threshold: must be a number at least 0"),
        (["--factor", "0"], "--factor: must be a number above 0"),
        (["--seq_len", "256", "--steps", "256"], "--seq_len: 256 new tokens leave nothing of 256 before them"),
        (["--texts", "nowhere.txt"], "--texts: cannot read 'nowhere.txt'"),
    ],
)
def test_a_wrong_call_is_one_line(done, tmp_path, capsys, changes, says):
    words, _ = done
    assert generations.main([*words, *changes, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"argument {says}" in error
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_other_measure_is_refused(done, capsys):
    from sparsed.evaluation.fidelity import command

    words, folder = done
    other = words[: words.index("--steps")]
    other = [word for word in other if word not in ("--threshold", "none,0.9")]
    assert command.main([*other, "--device", "cpu", "--out", str(folder)]) == 2
    assert "measure 'generations', now 'fidelity'" in capsys.readouterr().err
