"""What the tests of `sparsify` share: every kind of model under the same weights, and how its sampler calls it."""

import torch

from sparsed import SparseDConfig, sparsify
from tests.helpers.reference import Sparse
from tests.helpers.standins import DREAM, LLADA, MASK, ExtraHubDream, HubDream, tiny_dream, tiny_llada
from tests.helpers.standins_llada import ExtraHubLLaDA, HubLLaDA

PROMPT_LEN, GEN_LENGTH, STEPS = 61, 24, 6
SPARSE = Sparse(0.3, 0.4, 16)
CONFIG = SparseDConfig(*SPARSE)
KINDS = ["dream", "llada", HubDream, HubLLaDA, ExtraHubDream, ExtraHubLLaDA]
HUB_DREAMS, HUB_LLADAS = [HubDream, ExtraHubDream], [HubLLaDA, ExtraHubLLaDA]


def family_of(kind):
    return kind if isinstance(kind, str) else ("dream" if "Dream" in kind.__name__ else "llada")


def published_config(family):
    return {"dream": DREAM, "llada": LLADA}[family]


def build(kind, weights):
    """A fresh model of that kind, all with the same weights."""
    if isinstance(kind, str):
        return {"dream": tiny_dream, "llada": tiny_llada}[kind]()
    family = family_of(kind)
    return kind(published_config(family), weights[family])


@torch.no_grad()
def logits_of(model, ids, valid=None):
    """One forward of any kind of model, as its sampler calls it."""
    if valid is not None and isinstance(model, HubDream):
        positions = (valid.long().cumsum(-1) - 1).masked_fill(~valid, 1)
        return model(ids, valid[:, None, :, None] & valid[:, None, None, :], positions).logits
    if isinstance(model, HubDream):
        return model(ids, "full").logits
    out = model(ids, attention_mask=None if valid is None else valid.long())
    return getattr(out, "logits", out)


def sequences(count, rows=1, length=PROMPT_LEN + GEN_LENGTH):
    """Token ids of `count` steps of one generation, with fewer and fewer masks."""
    ids = torch.randint(0, 90, (1, rows, length)).repeat(count, 1, 1)
    for step in range(count):
        ids[step, :, PROMPT_LEN + 3 * step :] = MASK
    return ids


def run(model, **changes):
    options = {"steps": STEPS, "gen_length": GEN_LENGTH} | changes
    return sparsify(model, options.pop("config", CONFIG), **options)


def outputs(model, steps):
    return torch.stack([logits_of(model, ids) for ids in steps])


def snapshot(model):
    """Everything that a patch could leave behind: attributes by identity, classes and hooks of every module."""
    seen = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items()}
        held = {
            key: [*map(id, value), *map(id, value.values())]
            for key, value in vars(module).items()
            if isinstance(value, dict)
        }
        seen[name] = (type(module), attributes, held)
    parameters = {name: (id(value), value._version) for name, value in model.named_parameters()}
    class_attributes = {type(m): {k: id(v) for k, v in vars(type(m)).items()} for m in model.modules()}
    return seen, parameters, class_attributes, vars(torch.nn.functional)["scaled_dot_product_attention"]
