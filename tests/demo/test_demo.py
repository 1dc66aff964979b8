"""The bundled checkpoints: published format, small, and right with full attention and with SparseD; the recipe runs."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from demo import train
from demo.tokenizer import train_bpe, write_tokenizer
from sparsed.config import SparseDConfig
from sparsed.models import load_model, load_tokenizer
from sparsed.patch import sparsify
from sparsed.prompts import answer_found, build_document, build_prompt, demo_path, language
from sparsed.sampling import dream_generate, llada_generate

REPO = Path(__file__).parents[2]
CONFIG_KEYS = {
    "dream": {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
    "llada": {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "max_sequence_length": 8192,
        "weight_tying": False,
    },
}
LAYER_TENSORS = {
    "dream": [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")),
        "self_attn.o_proj.weight",
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    ],
    "llada": [
        f"{name}.weight"
        for name in ("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    ],
}
PREFIXES = {"dream": "model.layers.{}.", "llada": "model.transformer.blocks.{}."}
OUTER_TENSORS = {
    "dream": {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"},
    "llada": {"model.transformer.wte.weight", "model.transformer.ln_f.weight", "model.transformer.ff_out.weight"},
}
METHODS = {  # of the README's table
    "origin": "full attention",
    "sparsed": "SparseD",
    "no_skip": "SparseD without skipping",
    "no_isolation": "SparseD without isolated selection",
    "window": "sliding window",
    "streaming": "StreamingLLM",
}
TITLES = {"dream": "Dream", "llada": "LLaDA"}
TOKENIZER_FILES = {"dream": {"vocab.json", "merges.txt"}, "llada": {"tokenizer.json"}}


@pytest.fixture(scope="module", params=["dream", "llada"])
def demo(request):
    folder = demo_path(request.param)
    return load_model(folder, device="cpu"), load_tokenizer(folder)


def generated(model, ids, config, length):
    prompt = torch.tensor([ids])

    def sample():
        if model.family == "dream":
            return dream_generate(model, prompt, gen_length=length, steps=length)
        return llada_generate(model, prompt, gen_length=length, steps=length, block_length=length)

    if config is None:
        return sample()[0, len(ids) :].tolist()
    with sparsify(model, config, steps=length, gen_length=length) as run:
        out = sample()[0, len(ids) :].tolist()
    assert run.density < 0.4 or len(ids) < 100, "a document's sparse steps must be sparse"
    return out


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_the_folder_is_small_and_in_the_published_format(family):
    folder = demo_path(family)
    files = {file.name for file in folder.iterdir()}
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 24e6
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "README.md"} | TOKENIZER_FILES[family] <= files
    config = json.loads((folder / "config.json").read_text())
    assert CONFIG_KEYS[family].items() <= config.items()
    layers = config["num_hidden_layers" if family == "dream" else "n_layers"]
    names = {PREFIXES[family].format(i) + name for i in range(layers) for name in LAYER_TENSORS[family]}
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == names | OUTER_TENSORS[family]
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}


def test_special_tokens_have_the_ids_of_the_config(demo):
    model, tokenizer = demo
    masks = {"dream": "<|mask|>", "llada": "<|mdm_mask|>"}
    assert tokenizer.convert_tokens_to_ids(masks[model.family]) == model.config.mask_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size
    text = "Any text: grüße, 漢字 and 12 {}!"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    "config", [None, SparseDConfig(skip=0.2, select=0.5, block_size=32)], ids=["origin", "sparsed"]
)
def test_short_context_is_answered(demo, config):
    model, tokenizer = demo
    prompt = build_prompt("short_context", tokenizer)
    text = tokenizer.decode(generated(model, prompt.input_ids, config, 32), skip_special_tokens=True)
    assert answer_found(text, prompt.expected)


@pytest.mark.parametrize(
    "config", [None, SparseDConfig(skip=0.2, select=0.3, block_size=32)], ids=["origin", "sparsed"]
)
def test_questions_about_a_document_of_1k_tokens_are_answered(demo, config):
    model, tokenizer = demo
    document, prompt = build_document(tokenizer, 1024, seed=71)
    ids = generated(model, prompt.input_ids, config, 16)
    ids = ids[: ids.index(model.config.eos_token_id)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == document.answer


def test_the_recorded_presets_are_answered():
    results = json.loads((REPO / "demo/results.json").read_text())
    for family in ("dream", "llada"):
        presets = results[family]["presets"]
        assert all(run["answer_found"] for name in ("short_context", "4k") for run in presets[name].values())


def evaluation(name):
    return json.loads((REPO / f"demo/evaluation/{name}/summary.json").read_text())


def averages(name):
    return {row["method"]: row for row in evaluation(name)["averages"]}


def level(row, other):
    """Whether the 95 % intervals of two accuracies overlap."""
    return row["low"] <= other["high"] and other["low"] <= row["high"]


def difference(row):
    return f"{row['difference']:+.1f} ({row['difference_low']:+.1f} to {row['difference_high']:+.1f})"


@pytest.mark.parametrize("name", ["dream-4k", "llada-4k", "dream-4k-held-out", "llada-4k-held-out"])
def test_the_recorded_evaluation_meets_the_targets(name):
    """Issue 5: 200 samples a cell, SparseD within 1 point on average and 2 on each task, a window far below."""
    rows = evaluation(name)["rows"]
    methods = ["origin", "sparsed", "window"] if "held-out" in name else METHODS
    found = {method: {row["task"]: row["accuracy"] for row in rows if row["method"] == method} for method in methods}
    assert len(rows) == 8 * len(methods)
    assert all(row["n"] >= 200 and row["length"] == 4096 for row in rows)
    full, sparse = found["origin"], found["sparsed"]
    assert len(full) == 8 and min(full.values()) >= 90
    assert all(cells.keys() == full.keys() for cells in found.values())
    assert all(abs(full[task] - sparse[task]) <= 2 for task in full)
    assert abs(statistics.mean(full.values()) - statistics.mean(sparse.values())) <= 1
    for window in {"window", "streaming"} & found.keys():
        assert all(full[task] - found[window][task] > 20 for task in full)
    # Issue 3, of questions about documents
    assert full["qa_1"] >= 95 and full["qa_1"] - sparse["qa_1"] <= 1


@pytest.mark.parametrize("family", TITLES)
def test_a_held_out_seed_gives_the_same_averages(family):
    found, before = averages(f"{family}-4k-held-out"), averages(f"{family}-4k")
    assert {seed for row in evaluation(f"{family}-4k-held-out")["rows"] for seed in row["seeds"]} == {1}
    assert {seed for row in evaluation(f"{family}-4k")["rows"] for seed in row["seeds"]} == {0}
    assert all(level(row, before[method]) for method, row in found.items())


def test_the_seeds_differ_in_one_cell_of_48():
    def cells(name):
        return {(row["method"], row["task"]): row for row in evaluation(name)["rows"]}

    pairs = [
        (family, *cell, cells(f"{family}-4k")[cell], row)
        for family in TITLES
        for cell, row in cells(f"{family}-4k-held-out").items()
    ]
    apart = [pair for pair in pairs if not level(*pair[3:])]
    assert [pair[:3] for pair in apart] == [("dream", "window", "niah_single_2")]
    assert len(pairs) == 48


@pytest.mark.parametrize("family", TITLES)
def test_8k(family):
    """Issue 5: the demo models solve several tasks at 8k."""
    rows = evaluation(f"{family}-8k")["rows"]
    assert all(row["n"] >= 100 and row["length"] == 8192 for row in rows)
    assert sum(row["accuracy"] >= 90 for row in rows if row["method"] == "origin") == 8


@pytest.mark.parametrize("family", TITLES)
def test_without_one_of_its_parts_sparsed_is_as_good_with_blocks_of_128(family):
    found = averages(f"{family}-4k")
    assert all(level(found[method], found["sparsed"]) for method in ("no_skip", "no_isolation"))


@pytest.mark.parametrize("family", TITLES)
def test_sparsed_is_level_with_full_attention_down_to_a_fifth_of_the_blocks(family):
    curve = evaluation(f"{family}-4k-curve")
    assert all(row["n"] == 100 for row in curve["rows"]) and len(curve["rows"]) == 3 * 16
    sparse = [row for row in curve["averages"] if row["method"] == "sparsed"]
    assert all(row["difference_high"] >= 0 for row in sparse if row["select"] >= 0.2), "a loss outside of the interval"


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_the_tokenizer_files_follow_from_the_committed_word_lists(family, tmp_path):
    write_tokenizer(family, train_bpe(language()), tmp_path)
    remade, bundled = load_tokenizer(tmp_path), load_tokenizer(demo_path(family))
    assert remade.get_vocab() == bundled.get_vocab()
    for group in language().words.values():
        assert all(len(bundled(f" {word}", add_special_tokens=False)["input_ids"]) == 1 for word in group)


@pytest.mark.slow
def test_training_runs_saves_and_goes_on(tmp_path, monkeypatch, capsys):
    tiny = "--width 32 --layers 6 --tokens 512 --stages 256 512 --workers 0 --minutes 0.03 --device cpu --family dream"
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), *tiny.split()])
    steps = []
    for _ in range(2):
        train.Trainer(train.arguments()).run()
        out = capsys.readouterr().out
        assert "[dream]" in out and "left" in out
        steps.append(json.loads((tmp_path / "training.json").read_text())["progress"]["step"])
    assert 0 < steps[0] < steps[1]
    model = load_model(tmp_path, device="cpu")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()
