"""What the tests of the samplers share."""

import contextlib

import torch

from sparsed import dream_generate, llada_generate
from tests.helpers.standins import DREAM, LLADA, MASK

CONFIG = {"dream": DREAM, "llada": LLADA}
GENERATE = {"dream": dream_generate, "llada": llada_generate}


def options_of(family, options):
    return {"dream": {"alg": "maskgit_plus"}, "llada": {"block_length": 8}}[family] | options


def head_of(model):
    return model.lm_head if model.family == "dream" else model.model.transformer["ff_out"]


@contextlib.contextmanager
def inputs_of(model):
    """A list that collects the token ids of every forward."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).clone()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


def redraw(model, token, nth):
    """Make `token` win wherever the nth most frequent token of a few generations won so far."""
    prompts = torch.randint(0, 90, (8, 14), generator=torch.Generator().manual_seed(0))
    drawn = GENERATE[model.family](model, prompts, **options_of(model.family, {"gen_length": 16, "steps": 8}))
    frequent = torch.bincount(drawn[:, 14:].flatten(), minlength=MASK).argsort(descending=True)[nth]
    head = head_of(model).weight.data
    head[token] = 1.05 * head[frequent]
