"""The measurement of several GPUs, tiny and on a CPU: what it runs, saves and prints."""

import json

import pytest
import torch

from benchmarks import parallel, sums
from sparsed.models.parallel import SummedLinear
from tests.helpers.processes import new_store, on_ranks, outcomes

# tiny shapes, lengths and blocks instead of the published ones
RUN = """
import os, sys
os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler prints when it starts
import torch
from benchmarks import common, generation, parallel, shapes
from sparsed import SparseDConfig
torch.set_num_threads(1)
heads = {"n_heads": 4, "n_kv_heads": 4}
shapes.SHAPES["llada"] |= heads | {"d_model": 64, "n_layers": 2, "mlp_hidden_size": 96, "vocab_size": 100}
shapes.SHAPES["llada"] |= dict.fromkeys(("mask_token_id", "pad_token_id", "eos_token_id"), 99)
for module in (generation, parallel):
    module.NEW_TOKENS, module.BLOCK_LENGTH, module.PAPER = 8, 4, SparseDConfig(0.2, 0.3, 16)
parallel.WHOLE = generation.Way("whole", parallel.PAPER, generation.CACHE)
parallel.SHORT, parallel.WARM, parallel.FEW, parallel.SETTLED, parallel.PROFILED = 64, 64, 1, 2, 2
parallel.kernel_seconds = lambda profiled: {event.key: 4.0 for event in profiled.key_averages()}
parallel.LONGEST_CACHED, parallel.LONGEST = "short_context", "1k"
parallel.require_gpu = lambda parser: torch.device("cpu")
for number, port in enumerate(sys.argv[2:]):
    os.environ["MASTER_PORT"] = port
    flags = [["--lengths", "short_context"], ["--longest"]][number]
    assert parallel.main([*flags, "--out", f"{sys.argv[1]}/{number}"]) == 0
"""


def test_two_processes_against_one(tmp_path):
    stores = [new_store() for _ in range(2)]
    first, second = outcomes(2, RUN, tmp_path, *(store.port for store in stores))
    assert (first[0], *second) == (0, 0, "", ""), first[2]
    record, longest = (json.loads((tmp_path / name).read_text()) for name in ("0", "1"))
    assert record["command"].startswith("torchrun --nproc_per_node 2 ")
    assert record["processes"] == 2 and record["agreement"]["relative_error"] < 0.05
    assert [row["length"] for row in record["rows"]] == ["short_context"]
    kinds = {"full", "selecting", "sparse", "cached"}
    for row in record["rows"]:
        for who in ("one", "all"):
            assert row[who]["forwards"].keys() == kinds and row[who]["whole"]["measured"]
            assert row[who]["density"] < 1
            step = row[who]["cached_step"]
            assert step["seconds"] > 0 and step["kernels"]["aten::mm"] == 2.0, "two steps' seconds, halved"
            assert sum(step["purposes"].values()) == pytest.approx(2.0 * len(step["kernels"]))
            assert row[who]["full_step"]["kernels"]["aten::mm"] == 4.0, "one step's"
        assert row["speedup"].keys() == kinds | {"whole"}
        assert row["speedup"]["full"] == pytest.approx(
            row["one"]["forwards"]["full"]["median"] / row["all"]["forwards"]["full"]["median"]
        )
    found = {row["length"]: row["all"]["forwards"].keys() for row in longest["rows"]}
    # of two blocks the first one's refresh selects
    assert found == {"short_context": kinds - {"full"}, "1k": kinds - {"cached"}}
    assert all("one" not in row for row in longest["rows"])
    for line in ("warm-up, one", "warm-up, all", "one GPU: full", "2 GPUs: full", "1k, no cache: full"):
        assert line in first[1]


@pytest.mark.parametrize(("module", "name"), [(parallel, "parallel"), (sums, "sums")])
def test_one_process_is_not_enough(module, name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(module, "require_gpu", lambda parser: torch.device("cpu"))
    assert module.main(["--out", str(tmp_path / "record.json")]) == 2
    assert capsys.readouterr().err.endswith(
        f"needs several processes: torchrun --nproc_per_node 2 -m benchmarks.{name} ...\n"
    )
    assert not any(tmp_path.iterdir())


def in_pieces(ranks):
    """A layer's sum piece by piece, and as the package makes it."""
    x, weight = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(ranks.index)) for shape in ((37, 6), (10, 6))
    )
    layer = SummedLinear(weight, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "PIECE", 16)
        return sums.in_pieces(x, layer), layer(x)


def test_pieces_have_the_same_sum():
    for found, wanted in on_ranks(2, in_pieces):
        torch.testing.assert_close(found, wanted)
