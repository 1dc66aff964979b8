"""The examples run on a CPU, at tiny sizes."""

import importlib
import json
import os
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sparsed import load_tokenizer, sparsify
from tests.helpers.processes import outcomes
from tests.helpers.standins import DREAM, HubDream
from tests.helpers.tiny_folders import tiny_folder

ROOT = Path(__file__).parents[1]


def example(name):
    return importlib.import_module(f"examples.{name}")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_patterns_as_block_masks(capsys):
    example("flex_block_mask").main(length=320)
    out = capsys.readouterr().out
    assert out.count("of the block pairs are left out") == 8 and out.endswith("attended: (1, 4, 352, 64)\n")


def test_an_own_rule(capsys, monkeypatch):
    module, grids = example("own_rule"), []
    top_k = module.isolated_top_k

    def noted(scores, grid, select):
        grids.append(grid)
        return top_k(scores, grid, select)

    monkeypatch.setattr(module, "isolated_top_k", noted)
    module.main(length=288)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["the paper's rule", "near blocks first"]
    assert [grid.n_blocks for grid in grids] == [10] * 8, "every layer of the second run asks the rule once"


def test_a_hub_model_under_its_own_sampler(tmp_path, monkeypatch, capsys):
    module = example("hub_model")
    folder = tiny_folder(tmp_path / "dream", "dream")
    config = DREAM | json.loads((folder / "config.json").read_text()) | {"use_cache": False}
    model = HubDream(config, load_file(folder / "model.safetensors"))
    runs = []

    def watched(*args, **options):
        runs.append(sparsify(*args, **options))
        return runs[-1]

    monkeypatch.setattr(module.AutoModel, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", lambda *_, **__: load_tokenizer(folder))
    monkeypatch.setattr(module, "sparsify", watched)
    module.main(str(folder), gen_length=8, sentences=30)
    assert len(runs) == 1 and "of the pairs, by gather" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_two_processes_share_a_model():
    code = "from examples.two_gpus import main; main(length=288, steps=4)"
    (alone,) = outcomes(1, code)
    together = outcomes(2, code)
    assert [exit_code for exit_code, _, _ in (alone, *together)] == [0, 0, 0]
    assert [text for _, text, _ in together] == [alone[1], ""] and alone[1].strip()


def test_every_example_has_its_command():
    for path in (ROOT / "examples").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert re.search(f"^ *(python|torchrun .*) examples/{path.name}", text, flags=re.MULTILINE)
        assert len(text.splitlines()) <= 36
