"""Pieces of the record, apart from a run: where a text ends, how steps are timed."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsed import chat, load_model, load_tokenizer
from sparsed.cli import running
from sparsed.report.record import Phase
from sparsed.run import FULL, SELECTING, SPARSE
from sparsed.sampling.common import Step
from tests.helpers.tiny_folders import special_id, tiny_folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_folder(root / family, family) for family in ("dream", "llada")}


@pytest.mark.parametrize(("family", "end"), [("dream", "<|im_end|>"), ("dream", "<|endoftext|>")]
                         + [("llada", "<|eot_id|>"), ("llada", "<|endoftext|>")])  # fmt: skip
def test_text_ends_at_the_first_end_token(family, end, checkpoints):
    tokenizer = load_tokenizer(checkpoints[family])
    stops = chat.stop_ids(load_model(checkpoints[family], device="cpu").config, tokenizer)
    words = [tokenizer.encode(text, add_special_tokens=False) for text in ("under the mat", "noise")]
    ids = [*words[0], special_id(family, end), *words[1]]
    assert chat.decode(tokenizer, ids[: chat.answer_length(ids, stops)]) == "under the mat"
    assert chat.answer_length(words[0], stops) == len(words[0])


def test_text_ends_at_the_model_s_own_end_ids_too(checkpoints):
    config = SimpleNamespace(eos_token_id=65, pad_token_id=66)
    stops = chat.stop_ids(config, load_tokenizer(checkpoints["llada"]))
    assert {65, 66, special_id("llada", "<|eot_id|>")} <= stops


def test_ids_that_the_tokenizer_lacks_are_skipped(checkpoints):
    tokenizer = load_tokenizer(checkpoints["dream"])
    ids = tokenizer.encode("mat", add_special_tokens=False)
    assert chat.decode(tokenizer, [ids[0], 100_000, *ids[1:]]) == "mat"


def test_the_record_s_phases_are_the_run_s():
    assert [Phase(phase) for phase in (FULL, SELECTING, SPARSE)] == [Phase.FULL, Phase.SELECTING, Phase.SPARSE]


def test_the_page_about_the_record_names_all_phases():
    text = " ".join((Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8").split())
    named = text.partition("A phase is ")[2].partition("no forward runs")[0]
    assert all(f"`{phase.value}`" in named for phase in Phase)


def test_the_step_clock_takes_compilation_out_of_its_step(monkeypatch):
    times = iter([0.0, 0.2, 0.7, 1.5, 12.5, 13.5, 14.0, 14.1, 14.2])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))

    shown = []
    run = SimpleNamespace(compile_seconds=0.0)
    clock = running.StepClock(torch.device("cpu"), run, lambda *told: shown.append(told))
    clock.start()
    clock.begin("full")  # half a second to draw, in which no step is timed
    clock.tick(Step(0, "full"))
    clock.run.compile_seconds = 10.0
    clock.tick(Step(1, "selecting"))
    clock.tick(Step(2, "cached"))
    clock.tick(Step(3, "idle"))
    assert clock.phases == ["full", "selecting", "cached", "idle"], "what each step says of itself"
    assert clock.step_seconds() == [1.0, 1.0, 1.0, 0.0], "a step that ran no model takes no time"
    assert clock.laps.deducted == 10.0
    clock.begin("done")
    assert shown == [("full", clock.steps, 0), ("done", clock.steps, 3.0)]
