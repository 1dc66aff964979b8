"""The breakdown of a step: which kernel counts for what, and the steps that stand for their kinds."""

import json

import pytest
import torch

from benchmarks import breakdown
from benchmarks.common import LENGTHS
from sparsed import load_model
from tests.helpers.checkpoints import tiny_checkpoint

# names as CUPTI reports them
KERNELS = {
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "linear layers",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1": "linear layers",
    "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at_": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false>>": "attention",
    "_block_sparse_kernel": "attention",
    "_part_kernel": "attention",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "sums over GPUs",
    "_block_scores_kernel": "block scores",
    "_add_rms_norm_kernel": "norm, rotary, MLP product",
    "_silu_product_kernel": "norm, rotary, MLP product",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>": "sorting",
    "Memcpy DtoD (Device -> Device)": "other",
}


def test_kernels_are_told_apart_by_their_names():
    assert {name: breakdown.purpose(name) for name in KERNELS} == KERNELS
    sums = breakdown.by_purpose(dict.fromkeys(KERNELS, 2.0))
    assert {name: sums[name] / 2 for name in sums} == {name: list(KERNELS.values()).count(name) for name in sums}


def test_a_mark_around_a_kernel_counts_for_nothing():
    kernel = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    assert sum(breakdown.by_purpose({kernel: 2.0, "nccl:all_reduce": 2.0}).values()) == 2.0


def test_every_kind_of_step_is_profiled(monkeypatch, tmp_path, capsys):
    """On a CPU, whose operations stand in for kernels."""
    model = load_model(tiny_checkpoint(tmp_path / "model", "llada"), device="cpu")
    monkeypatch.setattr(breakdown, "require_gpu", lambda parser: torch.device("cpu"))
    monkeypatch.setattr(breakdown, "random_model", lambda family, device: model)
    monkeypatch.setattr(breakdown, "kernel_seconds", lambda run: {event.key: 1.0 for event in run.key_averages()})
    monkeypatch.setitem(LENGTHS, "4k", 512)
    breakdown.main(["--lengths", "4k", "--out", str(tmp_path / "record.json")])
    [row] = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert list(row["steps"]) == ["full", "choosing", "sparse"] and row["prompt_tokens"] == 512
    kernels = {kind: set(step["kernels"]) for kind, step in row["steps"].items()}
    assert "aten::topk" in kernels["choosing"] and "aten::topk" not in kernels["full"] | kernels["sparse"]
    for step in row["steps"].values():
        assert sum(step["purposes"].values()) == pytest.approx(len(step["kernels"])) and step["wall_seconds"] > 0
    assert capsys.readouterr().out.count("| 4k |") == 3


def test_it_wants_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        breakdown.main(["--out", str(tmp_path / "record.json")])
    assert stop.value.code == 2 and "CUDA" in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()
