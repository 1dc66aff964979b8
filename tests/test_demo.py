"""The bundled checkpoints: published format, small, and right with full attention and with SparseD; the recipe runs."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from demo.tokenizer import train_bpe, write_tokenizer
from sparsed.config import SparseDConfig
from sparsed.models import load_model, load_tokenizer
from sparsed.patch import sparsify
from sparsed.prompts import answer_found, build_document, build_prompt, demo_path, language
from sparsed.sampling import dream_generate, llada_generate

REPO = Path(__file__).parent.parent
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
METHODS = {"origin": "full attention", "sparsed": "SparseD", "window": "sliding window"}  # of the README's table
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


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_the_recorded_evaluation_meets_the_targets(family):
    """Issue 5: 200 samples a cell, SparseD within 1 point on average and 2 on each task, a window far below."""
    rows = json.loads((REPO / f"demo/evaluation/{family}-4k/summary.json").read_text())["rows"]
    found = {method: {row["task"]: row for row in rows if row["method"] == method} for method in METHODS}
    full, sparse, window = ({task: row["accuracy"] for task, row in found[name].items()} for name in METHODS)
    assert all(row["n"] >= 200 and row["length"] == 4096 for row in rows)
    assert len(full) == 8 and min(full.values()) >= 90
    assert full.keys() == sparse.keys() == window.keys()
    assert all(abs(full[task] - sparse[task]) <= 2 for task in full)
    assert abs(statistics.mean(full.values()) - statistics.mean(sparse.values())) <= 1
    assert all(full[task] - window[task] > 20 for task in full)
    # Issue 3, of questions about documents
    assert full["qa_1"] >= 95 and full["qa_1"] - sparse["qa_1"] <= 1


def test_the_readme_shows_the_recorded_evaluation():
    readme = (REPO / "README.md").read_text()
    for family, title in (("dream", "Dream"), ("llada", "LLaDA")):
        rows = json.loads((REPO / f"demo/evaluation/{family}-4k/summary.json").read_text())["rows"]
        for method, name in METHODS.items():
            cells = [row["accuracy"] for row in rows if row["method"] == method]
            density = statistics.mean(row["density"] for row in rows if row["method"] == method)
            shown = [f"{title}, {name}", f"{density:.2f}", *(f"{value:.1f}" for value in cells)]
            assert f"| {' | '.join(shown)} | {statistics.mean(cells):.1f} |" in readme


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_the_tokenizer_files_follow_from_the_committed_word_lists(family, tmp_path):
    write_tokenizer(family, train_bpe(language()), tmp_path)
    remade, bundled = load_tokenizer(tmp_path), load_tokenizer(demo_path(family))
    assert remade.get_vocab() == bundled.get_vocab()
    for group in language().words.values():
        assert all(len(bundled(f" {word}", add_special_tokens=False)["input_ids"]) == 1 for word in group)


@pytest.mark.slow
def test_training_runs_saves_and_goes_on(tmp_path):
    tiny = ["--width", "32", "--layers", "6", "--tokens", "512", "--stages", "256", "512", "--workers", "0"]
    command = [sys.executable, "-m", "demo.train", "--family", "dream", "--out", str(tmp_path), "--minutes", "0.03"]
    steps = []
    for _ in range(2):
        done = subprocess.run(
            [*command, *tiny, "--device", "cpu"], cwd=REPO, capture_output=True, text=True, check=True
        )
        assert "[dream]" in done.stdout and "left" in done.stdout
        steps.append(json.loads((tmp_path / "training.json").read_text())["progress"]["step"])
    assert 0 < steps[0] < steps[1]
    model = load_model(tmp_path, device="cpu")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()
