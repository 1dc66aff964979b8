"""`python -m sparsed.evaluation.fidelity` from end to end: gate, resuming, what it adds and refuses, wrong calls."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsed.evaluation.fidelity import command
from sparsed.evaluation.fidelity.measuring import Meter
from sparsed.evaluation.fidelity.results import table
from sparsed.evaluation.folder import RUN, SAMPLES, SUMMARY, TABLE
from tests.helpers.tiny_folders import tiny_folder

CALL = ["--lengths", "256", "--seq_len", "32", "--mask_rates", "0.75,0.5", "--block_size", "16", "--device", "cpu"]
CALL += ["--methods", "sparsed", "--quiet"]


def judged_folder(folder, reads_far):
    """A Dream of one layer whose logits are the mean of the tokens 1 to 31 that it attends to: all that there are, or
    those within a few tokens."""
    tiny_folder(folder, "dream", num_hidden_layers=1)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        tensor.fill_(1.0 if "norm" in name else 0.0)
    at = "model.layers.0.self_attn."
    one = torch.arange(1, 32)
    weights["model.embed_tokens.weight"][one, one] = 1
    weights["lm_head.weight"][one, one] = 1
    weights[at + "v_proj.weight"][one, one] = 1
    for head in range(4):  # two query heads read one of the values, 16 numbers each
        places = torch.arange(16)
        weights[at + "o_proj.weight"][16 * (head // 2) + places, 16 * head + places] = 100
    if not reads_far:
        for name in ("q_proj.bias", "k_proj.bias"):
            weights[at + name].fill_(6.0)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def ids_file(file, documents=6):
    """Documents of neutral tokens, then three tokens in turn, then four others of its own, which are the answer."""
    rng, pieces = np.random.default_rng(0), []
    for _ in range(documents):
        own = rng.permutation(np.arange(1, 32))[:7]
        pieces += [rng.integers(40, 60, 160), np.resize(own[:3], 64), rng.choice(own[3:], 32), [0]]
    file.write_bytes(np.concatenate([*pieces, [50] * 9]).astype("<u2").tobytes())
    return file


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fidelity")
    judged_folder(folder / "model", True)
    ids_file(folder / "ids.bin")
    words = ["--model_path", str(folder / "model"), "--texts", str(folder / "ids.bin"), *CALL]
    assert command.main([*words, "--out", str(folder / "run")]) == 0
    return words, folder / "run"


def test_a_model_that_reads_far_can_judge(done):
    _, folder = done
    summary = json.loads((folder / SUMMARY).read_text())
    assert summary["calls"][0]["date"] <= summary["finished"]
    (found,) = summary["lengths"]
    (gate,) = found["gates"]
    assert found["cannot_tell"] is None and (gate["mask_rate"], gate["far"]) == (0.75, 128)
    for name in ("planted", "copy"):
        assert gate[name]["documents"] == 6 and gate[name]["advantage"][1] > 0.1
    assert (folder / TABLE).read_text() == table(summary) and "| method |" in table(summary)
    assert [(row["mask_rate"], row["method"]) for row in summary["rows"]] == [
        (rate, method) for rate in (0.75, 0.5) for method in ("origin", "sparsed", "window")
    ]
    assert "Left out as too short: 1." in table(summary)
    pytest.importorskip("matplotlib")
    assert {"kl.png", "nll.png"} <= {file.name for file in folder.iterdir()}


def test_a_model_that_does_not_read_far_cannot(tmp_path, capsys):
    judged_folder(tmp_path / "model", False)
    words = ["--model_path", str(tmp_path / "model"), "--texts", str(ids_file(tmp_path / "ids.bin")), *CALL]
    assert command.main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "**This cannot tell: full attention does not clearly beat" in capsys.readouterr().out
    assert "| method |" not in (tmp_path / "run" / TABLE).read_text()
    assert not list((tmp_path / "run").glob("*.png"))


def test_a_second_call_measures_nothing_again(done, monkeypatch):
    words, folder = done
    before = (folder / SAMPLES).read_bytes()
    monkeypatch.setattr(Meter, "measure", lambda *_: pytest.fail("measured again"))
    assert command.main([*words, "--out", str(folder)]) == 0
    assert (folder / SAMPLES).read_bytes() == before


def test_an_interrupted_run_goes_on_and_leaves_the_same_bytes(done, tmp_path, monkeypatch):
    words, folder = done
    measure, seen = Meter.measure, []

    def counted(self, window, asked, on_forward):
        seen.append(window.id)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return measure(self, window, asked, on_forward)

    monkeypatch.setattr(Meter, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        command.main([*words, "--out", str(tmp_path / "run")])
    lines = (tmp_path / "run" / f"{SAMPLES}.0").read_text().splitlines(keepends=True)
    (tmp_path / "run" / f"{SAMPLES}.0").write_text("".join(lines)[:-20])  # and a line is cut off
    assert command.main([*words, "--out", str(tmp_path / "run")]) == 0
    assert len(seen) == 6 + 12 - 5 + 1, "twelve windows; the sixth and the one cut off twice"
    for name in (SAMPLES, TABLE):
        assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()


def test_more_methods_and_documents_add_to_what_is_there(done, tmp_path):
    words, folder = done
    out = ["--out", str(tmp_path / "run")]
    assert command.main([*words, "--limit", "2", *out]) == 0
    assert "there are 2 documents, and it takes 5" in (tmp_path / "run" / TABLE).read_text()
    assert command.main([*words, "--methods", "no_isolation,sparsed", *out]) == 0
    found = {text for text in (tmp_path / "run" / SAMPLES).read_text().splitlines() if "no_isolation" not in text}
    assert found == set((folder / SAMPLES).read_text().splitlines())


def test_documents_that_training_saw_are_left_out(done, tmp_path, capsys):
    """By name; results with them and without them are not mixed."""
    words, folder = done
    without = [*words, "--leave_out", "ids.bin:1,ids.bin:4"]
    assert command.main([*without, "--out", str(tmp_path / "run")]) == 0
    lines = (folder / SAMPLES).read_text().splitlines()
    expected = [text for text in lines if json.loads(text)["document"] not in ("ids.bin:1", "ids.bin:4")]
    assert (tmp_path / "run" / SAMPLES).read_text().splitlines() == expected and len(expected) < len(lines)
    capsys.readouterr()
    assert command.main([*without, "--out", str(folder)]) == 2
    assert "(leave_out not given, now [" in capsys.readouterr().err


def test_a_method_is_left_out_where_a_run_has_full_attention(done, tmp_path):
    words, _ = done
    changed = [*words, "--skip", "0,0.3", "--limit", "1", "--out", str(tmp_path / "run")]
    assert command.main(changed) == 0
    lines = map(json.loads, (tmp_path / "run" / SAMPLES).read_text().splitlines())
    found = [(one["skip"], one["mask_rate"]) for one in lines if one["method"] == "sparsed"]
    assert found == [(0.0, 0.75), (0.0, 0.5), (0.3, 0.5)]


def test_results_of_another_text_and_of_another_measure_stay(done, tmp_path, capsys):
    words, folder = done
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other = ids_file(tmp_path / "ids.bin", documents=7)
    at = words.index("--texts") + 1
    assert command.main([*words[:at], str(other), *words[at + 1 :], "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "argument --out: " in error and "(texts " in error
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    run = json.loads((folder / RUN).read_text())
    (tmp_path / "answers").mkdir()
    del run["settings"]["measure"]
    (tmp_path / "answers" / RUN).write_text(json.dumps(run))
    assert command.main([*words, "--out", str(tmp_path / "answers")]) == 2
    assert "measure not given, now 'fidelity'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--texts", "nowhere.txt"], "--texts: cannot read 'nowhere.txt'"),
        (["--texts", "/dev/zero"], "--texts: '/dev/zero' is not an ordinary file"),
        (["--lengths", "512"], "--texts: no document of 512 tokens"),
        (["--lengths", "8m"], "--lengths: must be tokens"),
        (["--seq_len", "256"], "--seq_len: 256 new tokens leave nothing of 256 before them"),
        (["--mask_rates", "0"], "--mask_rates: must be a number above 0"),
        (["--mask_rates", "0.5,1.5"], "--mask_rates: must be a number above 0 and at most 1"),
        (["--mask_rates", "0.01"], "--mask_rates: 0.01 of 32 tokens is less than a token"),
        (["--skip", "0.6"], "--skip: with 0.6, attention is full at all of --mask_rates"),
        (["--select", "0"], "--select: must be above 0"),
        (["--cache", "both"], "--cache: must be some of none, prefix, dual"),
        (["--refresh", "-1"], "--refresh: must be a whole number of at least 0"),
        (
            ["--cache", "dual", "--refresh", "0"],
            "--refresh: of sparsed, none of the forwards that fill a cache would be",
        ),
        (["--block_length", "12"], "--block_length: must divide the 32 new tokens, got 12"),
        (["--block_length", "2", "--mask_rates", "0.2"], "--mask_rates: 0.2 of 2 tokens is less than a token"),
        (["--methods", "sparse"], "--methods: must be some of origin"),
        (["--limit", "0"], "--limit: must be a whole number of at least 1"),
        (["--leave_out", "c.txt"], "--leave_out: no document of --texts is called c.txt"),
        (["--model_path", "nowhere/at/all"], "--model_path: "),
        (["--backend", "flash"], "--backend: "),
    ],
)
def test_a_wrong_call_is_one_line(done, tmp_path, capsys, changes, says):
    words, _ = done
    assert command.main([*words, *changes, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"argument {says}" in error
    assert not (tmp_path / "run" / SUMMARY).exists()


def test_ids_beyond_the_vocabulary_are_refused(done, tmp_path, capsys):
    words, _ = done
    (tmp_path / "ids.bin").write_bytes(np.full(300, 260, "<u2").tobytes())
    at = words.index("--texts") + 1
    changed = [*words[:at], str(tmp_path / "ids.bin"), *words[at + 1 :], "--out", str(tmp_path / "run")]
    assert command.main(changed) == 2
    assert "argument --texts: ids.bin:0 has the id 260, beyond the vocabulary of 260" in capsys.readouterr().err
