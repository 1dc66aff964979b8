"""Caches in `sparsed.evaluation.fidelity`: against the float64 sampler with caches, forced to write the true tokens."""

import json
import math
from dataclasses import replace

import pytest
import torch

from sparsed import SparseDConfig, load_model
from sparsed.evaluation.fidelity import command
from sparsed.evaluation.fidelity.arguments import parse
from sparsed.evaluation.fidelity.measuring import FULL, Meter
from sparsed.evaluation.fidelity.results import summarize, table
from sparsed.evaluation.fidelity.windows import Window
from sparsed.evaluation.folder import RUN, SAMPLES
from sparsed.evaluation.methods import Variant
from sparsed.sampling.saving import Saving
from tests.evaluation.test_fidelity import CALL, ids_file
from tests.evaluation.test_fidelity_sums import line
from tests.helpers import reference_blocks
from tests.helpers.tiny_folders import tiny_folder

LENGTH, NEW, BLOCK = 96, 32, 8
START = LENGTH - NEW
RATES = [1.0, 0.75, 0.5, 0.25]
SPARSE = SparseDConfig(0.5, 0.4, 16)


@pytest.fixture(scope="module", params=["dream", "llada"])
def folder(request, tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def twin(model, folder):
    config = json.loads((folder / "config.json").read_text())
    return reference_blocks.Model.of(model.family, model.state_dict(), config)


@pytest.fixture(scope="module")
def full(twin):
    return forced(twin, window_of(), "none", None, None)


def window_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 200, (LENGTH,), generator=generator)
    return Window("d", tokens, START + torch.randperm(NEW, generator=generator))


def seen(window, block, rate, mask_id):
    """The tokens where so much of a block is masked, and which places of it are, by hand."""
    start, end = START + block * BLOCK, START + (block + 1) * BLOCK
    own = [place for place in window.order.tolist() if start <= place < end]
    hidden = sorted(own[BLOCK - round(rate * BLOCK) :])
    return torch.tensor(
        [mask_id if j in hidden or j >= end else token for j, token in enumerate(window.tokens.tolist())]
    ), hidden


def forced(twin, window, cache, refresh, sparse):
    """{(block, rate): log-probabilities of its masked places} of a run that writes the true tokens."""
    before = 1 if twin.family == "dream" else 0
    sequence = reference_blocks.Sequence(twin, torch.ones(LENGTH, dtype=torch.bool), START, sparse)
    blocks, found = NEW // BLOCK, {}
    for block in range(blocks):
        start = START + block * BLOCK
        for rate in RATES:
            ids, hidden = seen(window, block, rate, twin.config["mask_token_id"])
            kind, first, last = "rows", start - before, start + BLOCK if cache == "dual" else LENGTH
            if cache == "none" or (rate == 1.0 and (block == 0 or (refresh and block % refresh == 0))):
                first, last, kind = 0, LENGTH, "full"
                if sparse is not None:
                    whole = (block // refresh, -(-blocks // refresh)) if refresh else (0, 1)
                    kind = reference_blocks.by_count(*whole, sparse.skip)
            elif rate == 1.0:
                first, last = START - before, LENGTH
            logits = sequence.logits(ids, first, last, kind)
            found[block, rate] = torch.stack([logits[place - before] for place in hidden]).log_softmax(-1)
    assert sequence.gap > 1e-6, "a tie decides: take another seed"
    return found


CACHES = [("dual", 1), ("dual", 2), ("prefix", 1), ("prefix", 2)]
CASES = [(*cache, sparse) for cache in CACHES for sparse in (None, replace(SPARSE, dense_answer=True))]
CASES += [("dual", 0, None), ("dual", 1, SPARSE), ("dual", 1, replace(SPARSE, skip=0.2))]


@pytest.mark.parametrize(("cache", "refresh", "sparse"), CASES)
def test_a_line_is_what_a_run_of_the_reference_finds(model, twin, full, cache, refresh, sparse):
    window = window_of()
    found = forced(twin, window, cache, refresh, sparse)
    variant = Variant("origin" if sparse is None else "sparsed", sparse, Saving(cache=cache, refresh=refresh))
    meter, called = Meter(model, block_length=BLOCK), []
    lines = meter.measure(window, {variant: RATES}, lambda: called.append(None))
    assert len(called) == meter.forwards(window, {variant: RATES}) == 32
    assert [one["mask_rate"] for one in lines] == RATES
    for one in lines:
        rate = one["mask_rate"]
        pairs = [(full[block, rate], found[block, rate]) for block in range(NEW // BLOCK)]
        kl = sum((one.exp() * (one - other)).sum().item() for one, other in pairs)
        nll, same = 0.0, 0
        for block, (true, other) in enumerate(pairs):
            _, hidden = seen(window, block, rate, 0)
            nll -= sum(other[n, window.tokens[place]].item() for n, place in enumerate(hidden))
            same += int((true.argmax(-1) == other.argmax(-1)).sum())
        assert one["n"] == NEW * rate and one["same"] == same
        assert one["nll"] == pytest.approx(nll, rel=1e-5) and one["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert (one["cache"], one["refresh"]) == (cache, refresh)
    assert lines[1]["kl"] > 1e-5, "the cache changed nothing"
    assert (lines[0]["kl"] < 1e-6) == (refresh == 1 and sparse is None), "a block's first step may be a fresh one"


def test_without_a_cache_blocks_are_selected_when_the_share_is_there(model, twin):
    """`skip` of the region's tokens in the order in which the blocks are written; before, a run has full attention."""
    window, config = window_of(), SparseDConfig(0.375, 0.4, 16)  # one block and a half
    sequence = reference_blocks.Sequence(twin, torch.ones(LENGTH, dtype=torch.bool), START, config)
    sequence.logits(seen(window, 1, 0.5, twin.config["mask_token_id"])[0], 0, LENGTH, "selecting")
    kl = 0.0
    for block in range(NEW // BLOCK):
        ids, hidden = seen(window, block, 0.75, twin.config["mask_token_id"])
        rows = [place - (twin.family == "dream") for place in hidden]
        kinds = ("full", "sparse" if block > 1 else "full")
        one, other = (
            torch.stack([logits[row] for row in rows]).log_softmax(-1)
            for logits in (sequence.logits(ids, 0, LENGTH, kind) for kind in kinds)
        )
        kl += (one.exp() * (one - other)).sum().item()
    meter, asked = Meter(model, block_length=BLOCK), {Variant("sparsed", config): [0.75]}
    (found,) = meter.measure(window, asked)
    assert found["kl"] == pytest.approx(kl, rel=1e-3) and kl > 1e-4
    assert meter.forwards(window, asked) == 4 + 1 + 2 and 0.5 < found["density"] < 1


def test_blocks_of_the_whole_region_are_no_blocks(model):
    window, asked = window_of(), {FULL: [0.5], Variant("sparsed", SPARSE): [0.5]}
    assert Meter(model).measure(window, asked) == Meter(model, block_length=NEW).measure(window, asked)


# --- sums and the command


def test_a_cache_is_compared_with_full_attention_with_it_and_without():
    lines = [line(name) for name in "ab"]
    lines += [line(name, cache="dual", refresh=1, nll=13.0, kl=0.5) for name in "ab"]
    lines += [line(name, "sparsed", cache="dual", refresh=1, nll=15.0) for name in "ab"]
    lines += [line(name, "sparsed", cache="dual", refresh=2, nll=15.0) for name in "ab"]
    full, cached, sparse, alone = summarize(lines)["rows"]
    assert full["difference"] is None and full["sparse"] is None and cached["sparse"] is None
    assert cached["difference"] == pytest.approx((0.3, 0.3, 0.3)) and sparse["difference"][0] == pytest.approx(0.5)
    assert sparse["sparse"] == pytest.approx((0.2, 0.2, 0.2)) and alone["sparse"] is None
    calls = [{"documents": {}}]
    text = table({"lengths": [{"length": 4096, "gates": [], "cannot_tell": None}], "settings": {"seq_len": 20},
                  "rows": [full, cached, sparse, alone], "calls": calls})  # fmt: skip
    assert "| full attention, dual cache, refresh 1 | 0.30 | 1.300" in text
    assert "SparseD, select 0.3, skip 0.2, block_size 32, dual cache, refresh 2 |" in text


def test_the_command_sweeps_caches_and_resumes(tmp_path, capsys):
    tiny_folder(tmp_path / "model", "dream")
    words = ["--model_path", str(tmp_path / "model"), "--texts", str(ids_file(tmp_path / "ids.bin", 5)), *CALL]
    words += ["--cache", "none,dual", "--refresh", "1,2,0", "--block_length", "8", "--limit", "1"]
    words += ["--skip", "0.2", "--out", str(tmp_path / "run")]
    assert command.main(words) == 0
    lines = list(map(json.loads, (tmp_path / "run" / SAMPLES).read_text().splitlines()))
    found = {(one["method"], one.get("cache"), one.get("refresh")) for one in lines if one["kind"] == "text"}
    caches = [(None, None), ("dual", None), ("dual", 2), ("dual", 0)]
    assert found == {("origin", *one) for one in caches} | {("sparsed", *one) for one in caches[:3]} | {
        ("window", None, None)
    }
    assert json.loads((tmp_path / "run" / RUN).read_text())["settings"]["block_length"] == 8
    before = (tmp_path / "run" / SAMPLES).read_bytes()
    assert command.main(words) == 0 and (tmp_path / "run" / SAMPLES).read_bytes() == before
    capsys.readouterr()
    assert command.main([*words, "--block_length", "16"]) == 2
    assert "block_length 8, now 16" in capsys.readouterr().err


def test_the_default_blocks_are_the_samplers(tmp_path):
    words = ["--model_path", "m", "--texts", "t", "--out", str(tmp_path), "--cache", "dual"]
    assert (
        parse(words).block_length == 32 and parse([*words, "--seq_len", "16", "--methods", "window"]).block_length == 16
    )
    assert parse(words[:-2]).block_length is None
    assert math.isclose(parse(words).masked(0.5), 0.125)
    # whatever caches are asked for, all is compared with full attention without one
    assert parse(words).variants[0] == FULL and {one.saving.cache for one in parse(words).variants[1:]} == {"dual"}
