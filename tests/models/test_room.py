"""A model that a GPU does not hold is refused before a weight is read, with the GPUs of the machine that hold it."""

import re

import pytest
import torch

from sparsed.models import load_model, loading
from tests.helpers.checkpoints import FAMILIES, write_checkpoint
from tests.helpers.processes import on_ranks

# of which 1, 2 and 4 processes have whole heads
FOUR_HEADS = {"dream": {"num_key_value_heads": 4}, "llada": {"n_heads": 4, "n_kv_heads": 4}}
SHARED = r"[qkv]_proj|o_proj|attn_out|gate_proj|up_proj|down_proj|ff_proj|blocks\.\d+\.ff_out"


@pytest.fixture
def checkpoint(tmp_path, family):
    """Its folder, and the bytes that each of so many processes has of it."""
    config, _, tiny = FAMILIES[family]
    changes = FOUR_HEADS[family]
    weights = {name: tensor.bfloat16() for name, tensor in tiny(**changes).state_dict().items()}

    def part(count):
        return sum(x.nbytes // (count if re.search(SHARED, name) else 1) for name, x in weights.items())

    return write_checkpoint(tmp_path / "model", config | changes, weights), part


@pytest.fixture
def gpus(monkeypatch):
    """Lets the machine have GPUs with so many bytes free."""

    def have(*free):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(loading, "free_bytes", free.__getitem__)
        monkeypatch.setattr(loading, "fill", lambda model, stored, device, part: pytest.fail(f"read to {device}"))

    return have


OTHER, HALVES, QUARTERS = (
    "it fits on cuda:1",
    "2 GPUs can share it: torchrun --nproc_per_node 2",
    "4 GPUs can share it: torchrun --nproc_per_node 4",
)
NO_WAY = "use more GPUs, a smaller dtype, or device cpu"


@pytest.mark.parametrize(
    ("free", "way"),
    [
        # bytes more than each process has of a model that so many share
        ([(1, -1)], NO_WAY),
        ([(2, 0)], NO_WAY),
        ([(1, -1), (1, 0)], OTHER),
        ([(2, 0), (2, 0)], HALVES),
        ([(2, 0), (2, -1)], NO_WAY),
        ([(2, 0), (2, -1), (1, -1), (1, -1)], QUARTERS),  # a launcher takes the first ones
        ([(2, 0), (2, 0), (4, 0), (4, 0)], HALVES),
        ([(4, 0)] * 3, NO_WAY),
        ([(4, 0)] * 4, QUARTERS),
        ([(4, -1)] * 8, NO_WAY),
    ],
)
def test_a_gpu_that_is_too_small(checkpoint, gpus, free, way):
    folder, part = checkpoint
    gpus(*(part(count) + more for count, more in free))
    for device in ("auto", "cuda:0"):
        with pytest.raises(loading.ModelTooLarge) as refused:
            load_model(folder, device=device)
        line = str(refused.value)
        assert re.fullmatch(rf"device cuda:0 has \d\.\d GiB free, the weights need \d\.\d GiB; {way}", line)


def test_a_model_that_fits_on_one_gpu_is_on_one(checkpoint, gpus, monkeypatch):
    folder, part = checkpoint
    gpus(part(1), 2 * part(1))
    read = []
    monkeypatch.setattr(loading, "fill", lambda model, stored, device, part: read.append(str(device)))
    monkeypatch.setattr(loading, "lay_projections_together", lambda model: None)
    load_model(folder)
    assert read == ["cuda:0"]


def refusal(ranks, folder, free):
    """What a process that shares the model is told, on a machine with so many bytes free on each of four GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "resolve_device", lambda _: torch.device("cuda", ranks.index))
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        patch.setattr(loading, "free_bytes", lambda index: free)
        with pytest.raises(loading.ModelTooLarge) as refused:
            load_model(folder, dtype="bfloat16", tensor_parallel=ranks.group)
    return str(refused.value)


def test_two_processes_that_are_too_few(checkpoint):
    folder, part = checkpoint
    for index, line in enumerate(on_ranks(2, refusal, folder, part(4))):
        assert line.startswith(f"device cuda:{index} has ") and line.endswith(QUARTERS)


def test_a_process_among_others_that_has_the_whole_model(checkpoint, gpus, monkeypatch):
    folder, part = checkpoint
    gpus(part(2), part(2), part(1), part(1))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(loading.ModelTooLarge, match="GiB; use a smaller dtype, or device cpu$"):
        load_model(folder)


def test_a_machine_that_is_too_small(checkpoint, monkeypatch):
    folder, part = checkpoint
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: type("Memory", (), {"total": part(1) - 1}))
    with pytest.raises(loading.ModelTooLarge, match="this machine has .* GiB of memory, the weights need .* GiB$"):
        load_model(folder, device="cpu", dtype="bfloat16")
