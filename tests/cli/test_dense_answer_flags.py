"""--dense_answer reaches the computation, from every command line."""

import json
from ast import literal_eval

import pytest

from sparsed import SparseDConfig
from sparsed.cli import main_dream, main_llada
from sparsed.evaluation.arguments import parse
from sparsed.evaluation.methods import Variant
from tests.helpers.tiny_folders import tiny_folder

MAIN = {"dream": main_dream, "llada": main_llada}


@pytest.mark.parametrize("family", MAIN)
def test_the_scripts_read_more_with_it(tmp_path, family, capsys):
    folder, densities = tiny_folder(tmp_path / family, family), []
    words = ["--model_path", str(folder), "--device", "cpu", "--prompt_text", "Where is the key?" * 20, "--quiet"]
    words += ["--block_size", "16", "--seq_len", "32", "--steps", "4", "--skip", "0"]
    for more in ([], ["--dense_answer"]):
        record = tmp_path / "record.json"
        assert MAIN[family]([*words, *more, "--json", str(record)]) == 0
        found = json.loads(record.read_text())
        assert found["arguments"]["dense_answer"] is bool(more)
        densities.append(found["runs"][0]["density"])
    tokens = found["runs"][0]["prompt_tokens"] + 32
    # 33 of so many queries read everything instead of what they kept
    assert densities[1] - densities[0] == pytest.approx(33 / tokens * (1 - densities[0]), rel=0.1)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [([], [False]), (["--dense_answer"], [True]), (["--dense_answer", "both"], [False, True])],
)
def test_the_evaluation_runs_every_method_with_it(tmp_path, words, wanted):
    call = ["--demo", "llada", "--methods", "origin,sparsed,window", "--out", str(tmp_path / "out"), *words]
    found = parse(call).variants
    assert found[0] == Variant("origin", None)
    assert [variant.config.dense_answer for variant in found[1:]] == 2 * wanted
    assert [variant.names["dense_answer"] for variant in found[1:]] == 2 * [dense or None for dense in wanted]


def test_the_evaluation_refuses_another_word(tmp_path, capsys):
    with pytest.raises(SystemExit) as ending:
        parse(["--demo", "llada", "--out", str(tmp_path / "out"), "--dense_answer", "maybe"])
    err = capsys.readouterr().err
    assert ending.value.code == 2 and "--dense_answer" in err and "both" in err


def test_the_harness_takes_it():
    pytest.importorskip("lm_eval")
    from sparsed.evaluation.harness_options import Options

    given = {"pretrained": "x"}
    assert Options.parse(given | {"dense_answer": "True"}, literal_eval).config == SparseDConfig(dense_answer=True)
    assert Options.parse(given, literal_eval).config == SparseDConfig()
    with pytest.raises(ValueError, match="dense_answer"):
        Options.parse({"pretrained": "x", "dense_answer": "maybe"}, str)
