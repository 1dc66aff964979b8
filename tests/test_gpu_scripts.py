"""The scripts at the published shapes, random weights, on a GPU: every backend runs and the record says so."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint

from sparsed.cli import main_dream, main_llada
from sparsed.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModel
from sparsed.prompts import demo_path

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

DREAM_7B = {
    "model_type": "Dream",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "mask_token_id": 151666,
    "pad_token_id": 151643,
    "eos_token_id": 151643,
}
LLADA_8B = {
    "model_type": "llada",
    "vocab_size": 126464,
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_sequence_length": 4096,
    "mask_token_id": 126336,
    "pad_token_id": 126081,
    "eos_token_id": 126081,
}
FAMILIES = {
    "dream": (DREAM_7B, DreamConfig, DreamModel, main_dream, 7_615_616_512),
    "llada": (LLADA_8B, LLaDAConfig, LLaDAModel, main_llada, 8_015_581_184),
}


def random_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Norm weights and biases one, matrices normal, made on the GPU; the spread keeps activations of order one."""
    weights = {}
    for name, parameter in model.state_dict().items():
        shape = parameter.shape
        is_matrix = len(shape) == 2
        made = torch.randn(shape, device="cuda") * shape[-1] ** -0.5 if is_matrix else torch.ones(shape, device="cuda")
        weights[name] = made.to(torch.bfloat16).cpu()
    return weights


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A folder with a checkpoint of the published shapes, in memory where the machine has a place for that."""
    config, config_class, model_class, main, count = FAMILIES[request.param]
    with torch.device("meta"):
        model = model_class(config_class.from_dict(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    shared = Path("/dev/shm")
    base = shared if shared.is_dir() and shutil.disk_usage(shared).free > 3 * count else tmp_path_factory.getbasetemp()
    folder = base / f"sparsed-{request.param}"
    if shutil.disk_usage(base).free < 2.5 * count:
        pytest.skip(f"needs {2.5 * count / 1e9:.0f} GB of disk")
    try:
        write_checkpoint(folder, config, random_weights(model), shards=4)
        for file in demo_path(request.param).iterdir():
            if "token" in file.name or file.name in ("vocab.json", "merges.txt", "chat_template.jinja"):
                shutil.copy(file, folder)
        yield folder, main
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("backend", ["flash", "triton", "gather"])
def test_compare_at_4k(family, backend, tmp_path, capsys):
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs the package flash-attn-4")
    folder, main = family
    record_file = tmp_path / "record.json"
    flags = ["--model_path", str(folder), "--compare", "--prompt", "4k", "--seq_len", "32", "--steps", "10"]
    code = main([*flags, "--backend", backend, "--json", str(record_file)])
    assert code == 0, capsys.readouterr().err
    dense, sparse = json.loads(record_file.read_text())["runs"]
    assert dense["prompt_tokens"] == sparse["prompt_tokens"] == 4096
    assert sparse["backend"] == backend and sparse["full_steps"] == 2
    # 33 blocks of which 10 + 1 are kept, the last one ragged
    assert sparse["density"] == pytest.approx(0.3, abs=0.05)
    assert sparse["peak_memory_bytes"] < 20e9
    print(f"{backend}: full {dense['step_seconds'][-1]:.3f} s, sparse {sparse['step_seconds'][-1]:.3f} s a step")
