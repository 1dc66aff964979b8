"""The comparison with Fast-dLLM's samplers, which are played: what counts as the same."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import fast_dllm, fast_dllm_parity
from sparsed import llada_generate


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A call in which our own sampler plays theirs; `wrong` spoils what one of its functions gives."""
    wrong = {}
    own = fast_dllm_parity.LLaDAModel(
        fast_dllm_parity.LLaDAConfig.from_dict(fast_dllm_parity.SHAPE | {"embedding_size": fast_dllm_parity.VOCABULARY})
    ).eval()

    def sampler(cache):
        def sample(model, prompt, mask_id, **settings):
            ran = []
            out = llada_generate(model, prompt, cache=cache, on_step=lambda step: ran.append(step.ran), **settings)
            out[0, -1] += wrong.get("tokens") == cache
            return out, sum(ran) + 2 * (wrong.get("forwards") == cache)

        return sample

    names = {name: sampler(cache) for cache, name in fast_dllm_parity.CACHES.items()}
    monkeypatch.setitem(sys.modules, "generate", SimpleNamespace(**names))
    monkeypatch.setattr(fast_dllm_parity, "models", lambda: (own, own))
    monkeypatch.setattr(fast_dllm_parity, "SEEDS", range(1, 2))
    monkeypatch.setattr(fast_dllm_parity, "PROMPTS", (9,))
    for needed in fast_dllm.NEEDED:
        (tmp_path / "theirs" / needed).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run():
        words = ["--reference", str(tmp_path / "theirs"), "--out", str(tmp_path / "record.json")]
        fast_dllm_parity.main(words)
        return json.loads((tmp_path / "record.json").read_text())

    return run, wrong


def test_the_same_sampler_is_the_same_everywhere(played):
    found = played[0]()
    assert (found["generations"], found["same_tokens"], found["as_many_forwards"]) == (36, 36, 36)


def test_other_tokens_and_more_forwards_are_counted(played):
    run, wrong = played
    wrong |= {"tokens": "prefix", "forwards": "dual"}
    found = run()
    assert (found["same_tokens"], found["as_many_forwards"], found["most_forwards_saved"]) == (24, 24, 2)
