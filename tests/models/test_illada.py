"""iLLaDA: its published config.json and weights, against a twin in float64, in the sampler and in the scripts."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.shapes import attention_shape, meta_model, model_config, random_model
from sparsed import SparseDConfig, chat, llada_generate, load_model, load_tokenizer
from sparsed.cli import main_dream, main_llada
from sparsed.models import DreamConfig, DreamModel
from tests.helpers.checkpoints import refused, write_checkpoint
from tests.helpers.illada_twin import ILLADA, random_illada, twin_logits
from tests.helpers.standins_llada import llada_sampler
from tests.helpers.tiny_folders import special_id, tiny_illada_folder

MASK = {"mask_token_id": 5}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def weights():
    return random_illada(ILLADA)


@pytest.fixture
def model(tmp_path, weights):
    return load_model(write_checkpoint(tmp_path / "illada", ILLADA | MASK, weights), device="cpu")


def ids_of(*shape):
    return torch.randint(6, 97, shape, generator=torch.Generator().manual_seed(1))


def test_logits_agree_with_the_twin(model, weights):
    ids = ids_of(2, 23)
    wanted = twin_logits(weights, ILLADA, ids)
    assert (model(ids).double() - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_left_padded_logits_agree_with_the_twin(model, weights):
    """Whose positions count every token, as published."""
    ids, valid = ids_of(2, 23), torch.ones(2, 23, dtype=torch.int64)
    valid[1, :9] = 0
    wanted = twin_logits(weights, ILLADA, ids, valid)
    close = (model(ids, valid).double() - wanted).abs().amax(-1) < 2e-5 * wanted.abs().max()
    assert close[valid.bool()].all()


def test_bfloat16_is_dream_s_without_biases(model, weights):
    dream = DreamModel(DreamConfig.from_dict(ILLADA | MASK))
    zeros = {name: torch.zeros_like(x) for name, x in dream.state_dict().items() if name.endswith("bias")}
    dream.load_state_dict(weights | zeros | {HEAD: weights[EMBEDDING]})
    ids = ids_of(1, 40)
    assert torch.equal(model.bfloat16()(ids), dream.bfloat16()(ids))


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_llada_s_sampler_takes_the_twin_s_tokens(model, weights, cfg_scale):
    def twin(ids, attention_mask=None):
        return SimpleNamespace(logits=twin_logits(weights, ILLADA, ids, attention_mask))

    twin.config = SimpleNamespace(**MASK)
    options = {"steps": 16, "gen_length": 16, "block_length": 8, "cfg_scale": cfg_scale}
    wanted = llada_sampler(twin, ids_of(1, 21), **options)
    assert torch.equal(llada_generate(model, ids_of(1, 21), **options), wanted)
    every_block = SparseDConfig(skip=0.2, select=1.0, block_size=16)
    assert torch.equal(llada_generate(model, ids_of(1, 21), config=every_block, **options), wanted)


def test_the_head_may_be_stored_beside_the_embedding_if_it_is_the_same(tmp_path, weights):
    folder = write_checkpoint(tmp_path / "same", ILLADA | MASK, weights | {HEAD: weights[EMBEDDING].clone()})
    model = load_model(folder, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    write_checkpoint(folder, ILLADA | MASK, weights | {HEAD: weights[EMBEDDING] + 1})
    refused(folder, HEAD, EMBEDDING, "ties")


@pytest.mark.parametrize(
    "changes",
    [{"layer_norm_eps": 1e-5}, {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}]
    + [{"rms_norm_eps": None}, {"rope_theta": None}, {"rope_scaling": {"type": "linear", "factor": 2.0}}],
    ids=str,
)
def test_another_network_is_refused(tmp_path, weights, changes):
    refused(write_checkpoint(tmp_path / "other", ILLADA | MASK | changes, weights), *changes)


def test_the_mask_is_the_tokenizer_s(tmp_path):
    """The published config.json names none."""
    folder = tiny_illada_folder(tmp_path / "illada")
    model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
    assert model.config.mask_token_id == special_id("illada", "<[MASK]>")
    assert chat.stop_ids(model.config, tokenizer) == {special_id("illada", token) for token in ("</s>", "<pad>")}


def test_the_scripts(tmp_path, capsys):
    folder = str(tiny_illada_folder(tmp_path / "illada"))
    words = ["--model_path", folder, "--prompt_text", "Where is it?", "--seq_len", "32", "--steps", "4", "--compare"]
    words += ["--block_size", "16", "--device", "cpu", "--json", str(tmp_path / "record.json")]
    assert main_llada(words) == 0
    assert len(json.loads((tmp_path / "record.json").read_text())["runs"]) == 2
    capsys.readouterr()
    assert main_dream(words) == 2
    assert "llada_generation.py" in capsys.readouterr().err


def test_the_published_shape():
    model = meta_model("illada")
    assert len(model.state_dict()) == 291
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == 32 * layer + 4096 + 155136 * 4096
    assert (round(total / 1e9, 2), round(32 * layer / 1e9, 2)) == (7.62, 6.98)  # as the model's card says
    shapes = {"illada": (32, 8, 128), "dream": (28, 4, 128), "llada": (32, 32, 128)}
    assert {family: attention_shape(model_config(family)) for family in shapes} == shapes


def test_a_random_model_of_a_shape_keeps_the_head_tied(monkeypatch):
    monkeypatch.setattr("benchmarks.shapes.SHAPES", {"illada": ILLADA | MASK})
    model = random_model("illada", torch.device("cpu"))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
