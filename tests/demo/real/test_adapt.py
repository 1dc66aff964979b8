"""The adaptation: its loss, what it trains, how it goes on; and the whole recipe."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from demo.real import adapt, delta
from demo.real.training import Trainer
from sparsed.models import load_model, load_tokenizer
from tests.helpers.real_recipe import recipe, refused

REPO = Path(__file__).parents[3]


def training(base, ids_file, out, *more):
    words = ["--checkpoint", base, "--tokens", ids_file, "--out", out, "--device", "cpu", "--lengths", "32:2,64:1"]
    return [str(word) for word in (*words, "--batch_tokens", 512, "--at_once", 128, "--steps", 6, *more)]


def test_the_loss_is_the_masked_cross_entropy_by_its_rate(base):
    model = load_model(base, device="cpu")
    ids = np.random.default_rng(0).integers(4, 200, 3000).astype(np.uint16)
    trainer = Trainer(base, base, model, recipe(), ids)
    batch = recipe().batches(ids, 0, 3)[0]
    with torch.no_grad():
        logits, wanted, at = model(batch.ids).double(), 0.0, 0
        for sequence, column in (batch.ids == 3).nonzero().tolist():
            row = logits[sequence, column - 1].log_softmax(-1)
            wanted -= row[batch.targets[at]].item() * batch.weights[at].item()
            at += 1
        assert at == len(batch.targets) > 10
        assert abs(trainer.loss(batch).item() / wanted - 1) < 1e-5


def test_a_run_that_is_left_and_gone_on_with_ends_bit_for_bit_the_same(base, ids_file, tmp_path):
    straight, halting = tmp_path / "straight", tmp_path / "halting"
    held_out = ["--held_out", str(ids_file.with_name("held-out.bin.xz"))]
    assert adapt.main(training(base, ids_file, straight, "--save_every", "4", *held_out)) == 0
    for _ in range(6):  # each call stops after its first step
        assert adapt.main(training(base, ids_file, halting, "--minutes", "0", *held_out)) == 0
    for name in ("model.safetensors", "training.safetensors"):
        one, other = load_file(straight / name), load_file(halting / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    logs = []
    for folder in (straight, halting):
        lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
        logs.append({(line["step"], "loss" in line): line.get("loss", line.get("held_out")) for line in lines})
    assert logs[0].items() <= logs[1].items() and set(logs[0][6, False]) == {"32", "64"}
    records = [json.loads((folder / "run.json").read_text()) for folder in (straight, halting)]
    assert [[call["first_step"] for call in record["calls"]] for record in records] == [[0], [0, 1, 2, 3, 4, 5]]
    assert records[0]["steps"] == 6 and {"command", "date", "environment"} < set(records[1]["calls"][5])


def test_steps_after_the_last_save_are_made_again(base, ids_file, tmp_path, monkeypatch):
    """A run that is killed at any time goes on from its last save."""
    assert adapt.main(training(base, ids_file, tmp_path / "whole")) == 0
    update = Trainer.update

    def killed(self):
        if self.step == 5:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(Trainer, "update", killed)
    words = training(base, ids_file, tmp_path / "killed", "--save_every", "2")
    with pytest.raises(KeyboardInterrupt):
        adapt.main(words)
    monkeypatch.undo()
    log = tmp_path / "killed/losses.jsonl"
    log.write_text(log.read_text() + '{"step": 5}\n')  # as if killed between the writing of two files
    assert adapt.main(words) == 0
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert all("loss" in line for line in log.read_text().splitlines())
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_training_learns_and_leaves_biases_and_other_rows_alone(base, ids_file, tmp_path):
    words = training(base, ids_file, tmp_path, "--lr", "0.01", "--warmup", "2")
    words[words.index("--steps") + 1] = "40"
    assert adapt.main(words) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path))
    rows = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(1)
    assert rows.nonzero()[:, 0].tolist() == [3]
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.endswith("bias")}
    assert not any(after[name].any() for name in same)


def test_another_run_in_the_same_folder_and_wrong_calls_are_refused(base, ids_file, tmp_path, capsys):
    assert adapt.main(training(base, ids_file, tmp_path, "--minutes", "0")) == 0
    capsys.readouterr()
    said = refused(capsys, adapt.main, training(base, ids_file, tmp_path, "--lr", "0.1"))
    assert "another --lr: 0.0005" in said
    assert "a different folder than --out" in refused(capsys, adapt.main, training(base, ids_file, base))
    wrong = training(base, ids_file, tmp_path)
    for option, value, why in (
        ("--lengths", "x:1", "whole number"),
        ("--lengths", "64:0", "above 0"),
        ("--lengths", "1048576", "at least 1048576 ids"),
    ):
        wrong[wrong.index(option) + 1] = value
        assert why in refused(capsys, adapt.main, wrong)
    (tmp_path / "training.safetensors").write_bytes(b"nothing")
    assert "not the state of a training" in refused(capsys, adapt.main, training(base, ids_file, tmp_path))


def test_the_readme_names_the_weights_of_the_record():
    record = json.loads((REPO / "benchmarks/results/fidelity-smollm2-h200.json").read_text())
    readme = (REPO / "demo/real/README.md").read_text(encoding="utf-8")
    assert f"`{record['weights_sha256'][0][:8]}`" in readme


def test_the_whole_recipe(base, ids_file, tmp_path):
    """Adapted, kept as a delta in two parts, rebuilt: nearly the same logits, and far from the base's."""
    adapted, file, rebuilt = tmp_path / "adapted", tmp_path / "delta", tmp_path / "rebuilt"
    assert adapt.main(training(base, ids_file, adapted, "--lr", "0.01")) == 0
    assert (
        delta.main(["make", "--base", str(base), "--adapted", str(adapted), "--out", str(file), "--step", "0.02"]) == 0
    )
    content = file.read_bytes()
    (tmp_path / "0").write_bytes(content[:5000])
    (tmp_path / "1").write_bytes(content[5000:])
    parts = [str(tmp_path / "0"), str(tmp_path / "1")]
    words = ["apply", "--base", str(base), "--delta", *parts, "--out", str(rebuilt), "--dtype", "float32"]
    assert delta.main(words) == 0
    ids = torch.from_numpy(np.frombuffer(lzma.decompress(ids_file.read_bytes()), "<u2")[:64].astype(np.int64))[None]
    logits = [load_model(folder, device="cpu")(ids) for folder in (base, adapted, rebuilt)]
    assert (logits[2] - logits[1]).abs().max() < 0.05 * (logits[1] - logits[0]).abs().max()
    assert load_tokenizer(rebuilt).mask_token_id == 3


def test_gradients_that_are_not_finite_end_the_run_and_keep_what_was_saved(
    base, ids_file, tmp_path, monkeypatch, capsys
):
    words = training(base, ids_file, tmp_path / "out", "--save_every", "2")
    loss = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda self, batch: loss(self, batch) * (torch.nan if self.step == 3 else 1))
    assert adapt.main(words) == 2
    assert "argument --lr: step 4 has gradients that are not finite" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "out/losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    weights = load_file(tmp_path / "out/model.safetensors").values()
    assert all(torch.isfinite(weight).all() for weight in weights)


@pytest.mark.gpu
def test_compiled_layers_train_as_plain_ones(base, ids_file, tmp_path):
    """On a GPU the layers are compiled, and the forward is in bfloat16."""
    losses = []
    for device in ("cpu", "cuda"):
        words = [*training(base, ids_file, tmp_path / device), "--device", device]
        assert adapt.main(words) == 0
        lines = [json.loads(line) for line in (tmp_path / device / "losses.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=0.02)
