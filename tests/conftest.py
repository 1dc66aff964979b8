"""Shared fixtures: tiny models, seeds, the gpu marker, poisoned buffers."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.helpers.checkpoints import FAMILIES, tiny_checkpoint
from tests.helpers.patch_cases import KINDS, build, family_of
from tests.helpers.standins import tiny_dream, tiny_llada

# the same examples in every run; --hypothesis-profile=campaign draws many new ones
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=30, database=None)
settings.register_profile(
    "campaign", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What is imported by now stays: `gc.collect`, which takes long over it, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models are tiny: more threads only wait for each other, and change the order of sums."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dream():
    return tiny_dream()


@pytest.fixture(scope="session")
def llada():
    return tiny_llada()


@pytest.fixture(scope="session")
def weights(dream, llada):
    """The state dicts of the two tiny models."""
    return {"dream": dream.state_dict(), "llada": llada.state_dict()}


@pytest.fixture(params=KINDS, ids=lambda kind: kind if isinstance(kind, str) else kind.__name__)
def any_model(request, weights):
    """(a fresh model, its family) of every kind that `sparsify` knows, in turn, all with the same weights."""
    return build(request.param, weights), family_of(request.param)


@pytest.fixture(params=FAMILIES)
def family(request):
    """Both families, in turn, for what is said of a checkpoint folder."""
    return request.param


@pytest.fixture
def folder(tmp_path, family):
    return tiny_checkpoint(tmp_path / "model", family, shards=3)


@pytest.fixture
def dream_folder(tmp_path):
    return tiny_checkpoint(tmp_path / "dream", "dream")


@pytest.fixture
def nan_empty(monkeypatch):
    """New memory holds NaN, so that an element that nothing writes cannot pass for a zero."""

    def poisoned(make):
        def empty(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
