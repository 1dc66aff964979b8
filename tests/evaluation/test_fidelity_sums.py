"""The figures of `sparsed.evaluation.fidelity`: against brute force in float64; its sums, gate and table by hand."""

import json
import math

import numpy as np
import pytest
import torch

from sparsed import SparseDConfig, load_model
from sparsed.blocks import BlockGrid
from sparsed.evaluation.fidelity.gate import judge, why_not
from sparsed.evaluation.fidelity.measuring import FULL, Meter
from sparsed.evaluation.fidelity.results import identified, summarize, table
from sparsed.evaluation.fidelity.windows import Window
from sparsed.evaluation.methods import METHODS, Variant
from tests.helpers import reference
from tests.helpers.tiny_folders import tiny_folder

LENGTH, NEW, SELECT, BLOCK = 96, 20, 0.4, 16
GRID = BlockGrid(LENGTH, LENGTH - NEW, BLOCK)


@pytest.fixture(params=["dream", "llada"])
def model(request, tmp_path):
    return load_model(tiny_folder(tmp_path / request.param, request.param), device="cpu", dtype="float32")


def window_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 200, (LENGTH,), generator=generator)
    return Window("d", tokens, LENGTH - NEW + torch.randperm(NEW, generator=generator))


# --- the sums, against the reference's forward in float64 and plain loops


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def hidden(window, rate):
    """The places that are masked, and the tokens as a model sees them, by hand."""
    places = sorted(window.order.tolist()[NEW - round(rate * NEW) :])
    return places, [259 if at in places else token for at, token in enumerate(window.tokens.tolist())]


def twin(model, config, window, rate, allowed=None):
    """Log-probabilities of the masked places, a list of float64 lists each; per layer q and k."""
    places, seen = hidden(window, rate)
    seen = torch.tensor([[model.config.mask_token_id if token == 259 else token for token in seen]])
    logits, rotated = reference.forward(model.family, model.state_dict(), config, seen, allowed=allowed)
    rows = [logits[0, place - (model.family == "dream")].tolist() for place in places]
    return [[x - math.log(sum(map(math.exp, row))) for x in row] for row in rows], rotated


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("method", "skip"), [("sparsed", 0.0), ("sparsed", 0.25), ("no_skip", 0.5), ("window", 0.2)])
def test_a_line_is_what_brute_force_finds(model, tmp_path, method, skip, dense):
    window, rate, config = window_of(), 0.5, settings_of(tmp_path / model.family)
    variant = Variant(method, METHODS[method].config(SparseDConfig(skip, SELECT, BLOCK, dense)))
    full, _ = twin(model, config, window, rate)
    _, rotated = twin(model, config, window, 1 - variant.config.skip)
    allowed = []
    for q, k in rotated:
        if method == "window":
            keep = METHODS["window"].rule.select(q, None, GRID, SELECT).as_mask()  # its own tests know it
        else:
            keep, gap = reference.select(q, k, prompt_len=LENGTH - NEW, block_size=BLOCK, select=SELECT)
            assert gap > 1e-6, "a tie decides: take another seed"
        mask = reference.expand(keep, BLOCK, LENGTH)
        allowed.append(reference.dense_rows(mask, LENGTH - NEW) if dense else mask)
    found, _ = twin(model, config, window, rate, allowed)
    truth = window.tokens[hidden(window, rate)[0]].tolist()
    nll = -sum(row[token] for row, token in zip(found, truth, strict=True))
    kl = sum(math.exp(p) * (p - q) for one, other in zip(full, found, strict=True)
             for p, q in zip(one, other, strict=True))  # fmt: skip
    top = [[row.index(max(row)) for row in rows] for rows in (full, found)]

    (line,) = Meter(model).measure(window, {variant: [rate]})
    assert line["n"] == NEW / 2 and kl > 1e-3, "the attention changed nothing"
    assert line["nll"] == pytest.approx(nll, rel=1e-5) and line["kl"] == pytest.approx(kl, rel=1e-3)
    assert line["same"] == sum(one == other for one, other in zip(*top, strict=True))
    assert line["correct"] == sum(one == token for one, token in zip(top[1], truth, strict=True))
    assert line["density"] == pytest.approx(np.mean([mask.float().mean().item() for mask in allowed]), rel=1e-5)


def test_full_attention_is_near_itself_and_select_1_is_full_attention(model, tmp_path):
    window, everything = window_of(), Variant("sparsed", SparseDConfig(0.0, 1.0, BLOCK))
    called = []
    asked = {FULL: [1.0, 0.5], everything: [1.0, 0.5]}
    lines = Meter(model).measure(window, asked, lambda: called.append(None))
    assert [(line["method"], line["mask_rate"]) for line in lines] == [
        ("origin", 1.0),
        ("origin", 0.5),
        ("sparsed", 1.0),
        ("sparsed", 0.5),
    ]
    for line, again in zip(lines[:2], lines[2:], strict=True):
        assert line["kl"] == 0 and line["same"] == line["n"] == NEW * line["mask_rate"] and line["density"] == 1
        assert again["kl"] == pytest.approx(0, abs=1e-6) and again["nll"] == pytest.approx(line["nll"])
    rows, _ = twin(model, settings_of(tmp_path / model.family), window, 1.0)
    nll = -sum(row[token] for row, token in zip(rows, window.tokens[-NEW:].tolist(), strict=True))
    assert lines[0]["nll"] == pytest.approx(nll, rel=1e-5)
    assert len(called) == Meter(model).forwards(window, asked) == 5


def test_only_counted_tokens_count(model):
    window = window_of()
    counted = torch.zeros(LENGTH, dtype=torch.bool)
    counted[-9:] = True
    few = Window("d", window.tokens, window.order, "repeated", counted, 50)
    rest = Window("d", window.tokens, window.order, "repeated", ~counted, 50)
    variant = Variant("sparsed", SparseDConfig(0.0, SELECT, BLOCK))
    whole, *parts = (Meter(model).measure(one, {variant: [0.5]})[0] for one in (window, few, rest))
    for name in ("n", "nll", "kl", "same", "correct"):
        assert whole[name] == pytest.approx(sum(part[name] for part in parts), rel=1e-4)
    assert 0 < parts[0]["n"] < whole["n"] and parts[0]["id"] == "repeated-96-50-d"


def test_logits_that_are_not_finite_are_refused(model):
    model.get_parameter(next(name for name, _ in model.named_parameters() if "norm" in name)).data.fill_(math.inf)
    with pytest.raises(FloatingPointError):
        Meter(model).measure(window_of(), {FULL: [0.5]})


# --- sums, gate and table, by hand


def line(document, method="origin", kind="text", nll=10.0, n=10, rate=0.5, **changes):
    numbers = {"select": None, "skip": None, "block_size": None, "dense_answer": None}
    if method != "origin":
        numbers |= {"select": 0.3, "skip": 0.2 if method == "sparsed" else None, "block_size": 32}
    far = None if kind == "text" else 1024
    name = f"{kind}-4096-{document}" if far is None else f"{kind}-4096-1024-{document}"
    found = {"id": name, "kind": kind, "document": document, "length": 4096, "far": far, "mask_rate": rate}
    sums = {"n": n, "nll": nll, "correct": 5, "kl": 0.0, "same": n, "density": 0.3}
    return found | {"method": method} | numbers | sums | changes


def test_a_row_is_the_mean_over_tokens_and_differences_are_paired():
    lines = [line("a", nll=30.0, n=10), line("b", nll=10.0, n=30)]
    lines += [line("a", "sparsed", nll=32.0, n=10, kl=1.0, same=8), line("b", "sparsed", nll=16.0, n=30, kl=3.0)]
    full, sparse = summarize(lines)["rows"]
    # two documents: one twice is drawn in a quarter of the samples, far more than 2.5 %
    assert full["nll"] == pytest.approx((1.0, 1 / 3, 3.0)) and full["difference"] is None
    assert sparse["difference"] == pytest.approx((0.2, 0.2, 0.2)) and sparse["nll"] == pytest.approx(
        (1.2, 16 / 30, 3.2)
    )
    assert sparse["kl"] == pytest.approx((0.1, 0.1, 0.1)) and sparse["same"][0] == (8 + 30) / 40
    assert sparse["accuracy"][0] == 10 / 40 and (sparse["n"], sparse["documents"]) == (40, 2)
    assert sparse["gain"] is None and all(map(identified, lines))


def test_dense_answer_rows_are_compared_with_the_same_without():
    lines = [line(name) for name in "ab"] + [line(name, "sparsed", kl=2.0) for name in "ab"]
    lines += [line(name, "sparsed", kl=0.5, dense_answer=True) for name in "ab"]
    lines += [line(name, "sparsed", kl=0.5, dense_answer=True, select=0.1) for name in "ab"]
    *_, dense, alone = summarize(lines)["rows"]
    assert dense["gain"] == pytest.approx((-0.15, -0.15, -0.15)) and alone["gain"] is None


def gate_lines(planted=20.0, anyway=10.0, repeated=None, documents=6):
    """Full attention at one nat per token, the window at the sums given."""
    lines = []
    for name in "abcdefgh"[:documents]:
        pairs = (("planted", planted), ("text", anyway), ("repeated", repeated))
        for kind, nll in pairs:
            if nll is not None:
                lines += [line(name, kind=kind), line(name, "window", kind, nll)]
    return lines


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (gate_lines(), None),
        (gate_lines(repeated=12.0), None),
        (gate_lines(documents=4), "there are 4 documents, and it takes 5"),
        (gate_lines(planted=10.5), "where the evidence was planted"),
        # the window loses as much without the copy: that is no sign of reading far
        (gate_lines(anyway=19.5), "by what the planted copy tells"),
        (gate_lines(repeated=10.5), "happens to be repeated"),
        # one document alone shows it: the mean is high, and its interval holds nothing
        (gate_lines(10.0) + [line("f", "window", "planted", 60.0)], "where the evidence was planted"),
        ([line(name) for name in "abcdef"], "beyond a window's reach"),
    ],
)
def test_the_gate(lines, why):
    found = why_not(judge(lines))
    assert found is None if why is None else why in found


def test_too_few_repetitions_decide_nothing():
    lines = gate_lines() + [one for one in gate_lines(repeated=10.0, documents=4) if one["kind"] == "repeated"]
    (gate,) = judge(lines)
    assert gate["repeated"] == {"documents": 4, "n": 40, "advantage": (0.0, 0.0, 0.0)} and why_not([gate]) is None
    assert gate["planted"] == {"documents": 6, "n": 60, "advantage": (1.0, 1.0, 1.0)} == gate["copy"]


def summary_of(lines, too_short=0):
    calls = [{"documents": {"4096": {"measured": 6, "too_short": too_short}}}]
    return {**summarize(lines), "settings": {"seq_len": 20}, "calls": calls}


def test_the_table_of_what_can_tell():
    lines = gate_lines() + [line(name, "sparsed", nll=11.0, kl=0.5, same=9) for name in "abcdef"]
    text = table(summary_of(lines + [line(name, rate=0.25, n=5) for name in "abcdef"], too_short=3))
    assert text.startswith(
        "### 4,096 tokens, the last 20 of them generated\n\nThe gate, 50% masked, evidence 1,024 or "
    )
    assert "1.00 (1.00 to 1.00) where the evidence was planted (60 tokens of 6 documents)" in text
    assert "Left out as too short: 3." in text and "cannot tell" not in text
    rows = [row for row in text.splitlines() if row.startswith(("| ", "####"))]
    assert rows[0] == "#### 50% masked: 60 tokens of 6 documents" and rows[-4].startswith("#### 25% masked: 30 tokens")
    assert rows[1] == (
        "| method | density | NLL | to full attention | accuracy, % | KL to full attention | same top token, % |"
    )
    assert (
        "| SparseD, select 0.3, skip 0.2, block_size 32 | 0.30 | 1.100 (1.100 to 1.100) | +0.100 (+0.100 to +0.100) | "
        "50.0 (50.0 to 50.0) | 0.0500 (0.0500 to 0.0500) | 90.0 (90.0 to 90.0) |"
    ) in rows


def test_the_table_says_what_was_left_out_in_the_latest_call_of_a_length():
    summary = summary_of(gate_lines(), too_short=3)
    summary["settings"]["leave_out"] = ["a.bin:1", "b.txt"]
    summary["calls"].append({"documents": {"8192": {"measured": 1, "too_short": 9}}})
    assert "Left out as too short: 3. Left out by name: a.bin:1, b.txt." in table(summary)


def test_without_full_attention_s_line_there_is_no_difference():
    lines = [line(name, "sparsed", nll=11.0) for name in "abcdef"]
    (row,) = summarize(lines)["rows"]
    assert row["difference"] is None and row["nll"][0] == pytest.approx(1.1)


def test_what_cannot_tell_claims_nothing():
    summary = summary_of(gate_lines(anyway=20.0))
    text = table(summary)
    assert "**This cannot tell: full attention does not clearly beat the sliding window" in text
    assert "| method |" not in text and summary["rows"], "the figures are in the summary alone"


@pytest.mark.parametrize("name", line("a"))
def test_a_line_without_what_the_summary_needs_does_not_count(name):
    broken = {key: value for key, value in line("a").items() if key != name}
    with pytest.raises(LookupError):
        identified(broken)
    assert identified(line("a") | {"n": 0}) is None and identified(line("a", "window")) is not None
