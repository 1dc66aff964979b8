"""A model whose heads several processes share: together they compute, choose and write what one process does."""

import os
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist

from sparsed import SparseDConfig
from sparsed.backends import Backend, registry
from sparsed.backends.gather import gather_attention
from sparsed.cli.recording import SelectedBlocks
from sparsed.models.joint import joint_product, lay_projections_together
from sparsed.models.parallel import shard, whole_parameters
from sparsed.patch import sparsify
from sparsed.ranks import ALONE, Place, Ranks
from sparsed.sampling.replay import Replays
from sparsed.watching import watched
from tests.helpers.checkpoints import FAMILIES
from tests.helpers.processes import on_ranks
from tests.helpers.sampling_cases import GENERATE

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks")

# heads that two and four processes divide, and how many processes share them in turn
CHANGES = {"dream": {}, "llada": {"d_model": 128, "n_heads": 4, "n_kv_heads": 4}}
COUNTS = {"dream": (2,), "llada": (2, 4)}
LENGTH, NEW = 90, 24


def tiny(family, device="cpu"):
    return FAMILIES[family][2](**CHANGES[family]).requires_grad_(False).to(device)


def attention_of(model):
    return next(module for module in model.modules() if hasattr(module, "attend"))


@torch.no_grad()
def logits_of(model):
    """Of all tokens, of a padded batch, of some rows, and of a window over a cache, joint projections included."""
    ids = torch.arange(60).view(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    found = {"all": model(ids), "padded": model(ids, mask)[:, 7:]}
    found["rows"] = model(ids, logit_rows=torch.tensor([20, 59]), first_row=18)
    cache = model.kv_cache(2, 30)
    model(ids, mask, cache=cache)
    window = model.rows(11, 19, 30, mask)
    found["window"] = model(ids[:, 11:19].flip(1), mask, rows=window, cache=cache)
    lay_projections_together(model)
    attention = attention_of(model)
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    assert joint_product(torch.zeros(1, 2, layers[0].in_features), layers) is not None
    found["joint"] = model(ids[:, 11:19], mask, rows=window, cache=cache)
    return found


PAPER = SparseDConfig(skip=0.25, select=0.4, block_size=16)
DENSE_ANSWER = SparseDConfig(skip=0.25, select=0.3, block_size=16, dense_answer=True)
# name -> options of the sampler
CASES = {
    "full attention": {},
    "SparseD": {"config": PAPER},
    "dense answer rows, padded": {"config": DENSE_ANSWER, "padded": True},
    "prefix, padded": {"config": DENSE_ANSWER, "block_length": 12, "cache": "prefix", "padded": True},
    "dual": {"config": PAPER, "block_length": 12, "cache": "dual"},
    "all rows once, factor, early stop": {
        "block_length": 12,
        "cache": "dual",
        "refresh": 0,
        "factor": 0.9,
        "early_stop": True,
    },
    "threshold": {"config": PAPER, "block_length": 12, "threshold": 0.2},
    "threshold and cache, padded": {"block_length": 12, "threshold": 0.2, "cache": "dual", "padded": True},
}
GUIDED = {
    "guidance, padded": {"config": PAPER, "cfg_scale": 0.7, "padded": True},
    "guidance and cache": {"config": PAPER, "cfg_scale": 0.7, "block_length": 12, "cache": "dual"},
}
SOME = ("dense answer rows, padded", "guidance and cache")
DRAWN = {"config": PAPER, "temperature": 0.7}


def cases_of(family, count=1):
    """Of one or two processes all, of more of them some: each forward waits for the slowest."""
    cases = CASES | (GUIDED if family == "llada" else {})
    return {name: cases[name] for name in cases if count <= 2 or name in SOME}


def generated(model, options, seed=1):
    """Tokens, and density, patterns and the record's bits, of one of the cases."""
    options = options | {"gen_length": NEW, "steps": 4}
    if model.family == "llada":
        options = {"block_length": 24} | options
    device = model.device
    ids = torch.randint(0, 90, (2, LENGTH), generator=torch.Generator().manual_seed(7)).to(device)
    if options.pop("padded", False):
        mask = torch.ones_like(ids)
        mask[0, :21] = 0
        options["attention_mask"] = mask
    ranks, patterns, choices = model.ranks, [], SelectedBlocks(model.ranks)

    def see(scores, pattern):
        patterns.append(ranks.joined(pattern.as_mask(), 1).cpu())
        choices(scores, pattern)

    options["generator"] = torch.Generator(device).manual_seed(seed)
    config, density = options.get("config"), None
    if config is None:
        tokens = GENERATE[model.family](model, ids, **options)
    else:
        tokens = GENERATE[model.family](model, ids, rule=watched(see), **options)
        density = torch.stack([share for share, _ in choices._shares]).mean().item()
    return {"tokens": tokens.cpu(), "density": density, "patterns": patterns, "record": choices.pattern()}


def shared(ranks, family, counts):
    """What one of the processes sees: for every number of them that is to share the model, or None."""
    found = {}
    for count in counts:
        group = dist.new_group(list(range(count)))
        found[count] = seen(Ranks(group), family) if ranks.index < count else None
    return found


def seen(ranks, family):
    model = tiny(family)
    shard(model, ranks)
    found = {
        "heads": (attention_of(model).heads, attention_of(model).kv_heads),
        "sizes": model.sizes,
        "numbers": sum(parameter.numel() for parameter in model.parameters()),
        "cache": model.kv_cache(2, 30).bytes,
        "whole": {name: parameter.clone() for name, parameter in whole_parameters(model)},
        "logits": logits_of(model),
        "cases": {name: generated(model, case) for name, case in cases_of(family, ranks.count).items()},
        # a rank of its own mind, to the end of the steps
        "other seeds": generated(model, DRAWN, seed=1 + ranks.index)["tokens"],
        "backend": chosen_backend(model, ranks),
        "captured": captured(model, ranks),
    }
    return found


def chosen_backend(model, ranks):
    """The backend, why, and the density that `sparsify` tells, where the first choice fails on the last rank alone."""
    fault = "is broken here" if ranks.index == ranks.count - 1 else None
    broken = {"broken": Backend("broken", gather_attention, lambda problem: fault)}
    with ExitStack() as undo:
        patch = undo.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(registry, "BACKENDS", broken | registry.BACKENDS)
        run = undo.enter_context(sparsify(model, PAPER, steps=2, gen_length=NEW))
        ids = torch.arange(LENGTH + NEW)[None] % 90
        model(ids), model(ids)
        return run.backend, run.backend_reason, run.density


def captured(model, ranks):
    """Whether graphs are used after one that could not be captured, on the last rank alone."""

    class Graph:
        def replay(self):
            raise AssertionError("a graph that not all have")

    def capture(known, forward):
        if ranks.index == ranks.count - 1:
            raise RuntimeError("no memory for a graph")
        known.graph = Graph()

    replays = Replays(model, ExitStack)
    replays.possible, replays._capture = True, capture
    inputs = (torch.zeros(2),)
    return [replays.of("kind", torch.relu, inputs) for _ in range(3)], replays.possible


@pytest.mark.parametrize("family", FAMILIES)
def test_processes_together_do_what_one_does(family):
    alone = tiny(family)
    logits, drawn = logits_of(tiny(family)), generated(alone, DRAWN)["tokens"]
    cases = {name: generated(alone, case) for name, case in cases_of(family).items()}
    with sparsify(alone, PAPER, steps=2, gen_length=NEW) as run:
        ids = torch.arange(LENGTH + NEW)[None] % 90
        alone(ids), alone(ids)
    by_rank = on_ranks(max(COUNTS[family]), shared, family, COUNTS[family])
    for count in COUNTS[family]:
        together = [found[count] for found in by_rank[:count]]
        for found in together:
            check_part(found, alone, count)
            for name, wanted in logits.items():
                torch.testing.assert_close(found["logits"][name], wanted, rtol=0, atol=1e-5, msg=f"logits: {name}")
            for name, wanted in ((name, cases[name]) for name in cases_of(family, count)):
                check_same(found["cases"][name], wanted, f"{count} processes: {name}")
            backend, why, density = found["backend"]
            assert backend == "gather" and "broken: is broken here" in why and density == pytest.approx(run.density)
            assert found["captured"] == ([None, None, None], False)
        # the first rank's draws are everybody's
        assert torch.equal(together[0]["other seeds"], drawn)
        assert all(torch.equal(found["other seeds"], together[0]["other seeds"]) for found in together)
    assert not torch.equal(generated(alone, DRAWN, seed=2)["tokens"], drawn)


def check_same(found, wanted, name):
    assert torch.equal(found["tokens"], wanted["tokens"]), name
    if wanted["density"] is not None:
        assert wanted["density"] < 1 and found["density"] == pytest.approx(wanted["density"]), name
    assert len(found["patterns"]) == len(wanted["patterns"]), name
    assert all(torch.equal(a, b) for a, b in zip(found["patterns"], wanted["patterns"], strict=True)), name
    assert found["record"] == wanted["record"], name


def check_part(found, alone, count):
    """The sizes of a part, and that all parts are the whole."""
    own = attention_of(alone)
    assert found["heads"] == (own.heads // count, own.kv_heads // count)
    assert found["sizes"].width == alone.sizes.width and found["sizes"].heads == own.heads // count
    assert found["cache"] * count == alone.kv_cache(2, 30).bytes
    numbers = sum(p.numel() for p in alone.parameters())
    replicated = sum(p.numel() for name, p in alone.named_parameters() if is_replicated(name))
    assert (found["numbers"] - replicated) * count == numbers - replicated
    assert found["whole"].keys() == dict(alone.named_parameters()).keys()
    for name, parameter in alone.named_parameters():
        assert torch.equal(found["whole"][name], parameter), name


def test_a_shared_model_computes_no_gradients():
    model = tiny("llada")
    shard(model, Place(count=2))
    model.model.transformer["wte"].weight.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        model(torch.arange(9)[None])


def is_replicated(name):
    return any(part in name for part in ("norm", "embed_tokens", "lm_head", "wte", "ln_f", "transformer.ff_out"))


@pytest.mark.parametrize(("family", "fitting"), [("dream", "1, 2"), ("llada", "1, 2, 4")])
def test_heads_that_so_many_processes_do_not_divide(family, fitting):
    with pytest.raises(ValueError) as caught:
        shard(tiny(family), Place(count=3))
    said = str(caught.value)
    assert "\n" not in said and said.startswith("3 processes do not divide") and said.endswith(f"do: {fitting}")


def test_one_process_has_the_whole_model():
    model = tiny("llada")
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    shard(model, ALONE)
    assert before == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert model.sizes == model.config.sizes and ALONE.gathered(5) == [5]


def on_gpu(ranks, family):
    """The cases by NCCL, and how often a step was replayed as a CUDA graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    model, replays = tiny(family, device), []
    shard(model, ranks)
    lay_projections_together(model)
    replay = torch.cuda.CUDAGraph.replay
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
        cases = {name: generated(model, case) for name, case in cases_of(family).items()}
    return {"cases": cases, "replays": len(replays), "logits": model(torch.arange(60, device=device).view(2, 30)).cpu()}


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_two_gpus_do_what_one_does(family):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    wanted = on_gpu(ALONE, family)
    together = on_ranks(2, on_gpu, family, backend="cpu:gloo,cuda:nccl")
    assert wanted["replays"] and {found["replays"] for found in together} == {wanted["replays"]}
    for found in together:
        torch.testing.assert_close(found["logits"], wanted["logits"], rtol=0, atol=1e-3)
        for name, one in wanted["cases"].items():
            check_same(found["cases"][name], one, name)
