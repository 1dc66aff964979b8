"""`sparsify`: run SparseD inside a loaded Dream or LLaDA, whoever wrote its classes and whoever samples from it.

A denoising step is one forward of the patched model; what it computes, its `SparseRun` decides.
"""

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .backends import check_backend
from .config import SparseDConfig, check_numbers
from .ranks import ALONE
from .run import SparseRun
from .schedule import ByStep, Schedule
from .seams import seams_of
from .selection import SPARSED, Rule

# held while a model is patched, so that two threads do not both find it unpatched
PATCHING = threading.Lock()


@contextmanager
def sparsify(
    model: nn.Module,
    config: SparseDConfig,
    *,
    steps: int,
    gen_length: int,
    backend: str = "auto",
    rule: Rule = SPARSED,
    schedule: Schedule | None = None,
) -> Iterator[SparseRun]:
    """Patch the attention of any loaded Dream or LLaDA with SparseD while the context is open.

    It works on this package's classes, on the hub's remote code and its copies, and with any sampler. A denoising step
    is one forward of all tokens. A sampler from elsewhere says nothing of its generations: the tokens show when one
    begins (a token before the last `gen_length` that was not masked has changed, or all is masked again), and two that
    take turns, as in guidance, have a state each. Forwards beyond `steps` are sparse; forwards of some tokens against a
    cache attend to all of it and are no steps. Where nothing was sparse, one warning at the end says why. This
    package's own samplers say when theirs begins and ends; a forward of another batch or length meanwhile has full
    attention and is no step. What wraps a patched method inside the context stays, around the method as it was.

    Args:
        model: known by what its attention modules have; it may be inside PEFT's wrapper, `torch.compile`'s or
            `DataParallel`.
        config: skip, select, block_size, dense_answer.
        steps: denoising steps of one generation; of a cached sampler, its forwards of all tokens.
        gen_length: tokens of the generated region, at the end of every forward's sequence.
        backend: auto, or a name in `BACKENDS`.
        rule: how blocks are selected, for comparisons with other methods.
        schedule: of samplers that tell their sequence: when blocks are wanted, where not by `steps` and `skip`.

    Yields:
        The `SparseRun`, with `reset()` and what was measured.

    Raises:
        ValueError: no Dream or LLaDA attention in the model, or a number out of range; or (in a forward) a mask that
            hides more than padding on the left, a cache that dropped keys, or causal attention.
        RuntimeError: the model is inside another `sparsify`; or (in a forward) another forward is running, or attention
            that is out of reach; or (in a sampler) another generation; or (at the end) another thread's forward.
        BackendError: (in the step that selects the blocks) the named backend cannot run.
    """
    if not isinstance(config, SparseDConfig):
        raise ValueError(f"config must be a SparseDConfig, got {config!r}")
    check_numbers(steps=steps, gen_length=gen_length)
    check_backend(backend)
    model = unwrapped(model)
    seams = seams_of(model)
    by_step = ByStep.of(config, steps, rule.needs_scores)
    mask_id = getattr(getattr(model, "config", None), "mask_token_id", None)
    ranks = getattr(model, "ranks", ALONE)
    run = SparseRun(config, schedule or by_step, gen_length, backend, rule, mask_id, ranks)
    with ExitStack() as undo:
        with PATCHING:
            if _is_patched(model):
                raise RuntimeError("the model is inside another sparsify: leave it, or generate without config=")
            for layer, (module, name, make) in enumerate(seams):
                _replace(undo, module, name, make(run, layer, getattr(module, name)), run)
            _replace(undo, model, "forward", _counted(run, model.forward), run)
        undo.callback(run.release)
        yield run
        run.check_idle()
        why = run.tally.why_never_sparse(by_step, gen_length) if schedule is None else None
        if why and config.select < 1 and by_step.n_full < steps:
            warnings.warn(f"sparsify: nothing was sparse: {why}", stacklevel=3)


def run_of(model: nn.Module) -> SparseRun | None:
    """The run of the `sparsify` that was given the model, while it is open."""
    return getattr(unwrapped(model).__dict__.get("forward"), "sparsed_run", None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, `torch.compile`'s or `DataParallel`: what they and its own sampler call."""
    while True:
        parts = dict(model.named_children())
        if callable(base := getattr(model, "get_base_model", None)) and (inner := base()) is not model:
            model = inner
        elif len(parts) == 1 and parts.keys() <= {"_orig_mod", "module"}:
            (model,) = parts.values()
        else:
            return model


def _is_patched(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is inside a `sparsify`."""
    own = (value for module in model.modules() for value in module.__dict__.values())
    return any(isinstance(value, _Shadow) and value.sparsed_run is not None for value in own)


def _replace(undo: ExitStack, module: nn.Module, name: str, function: Callable, run: SparseRun) -> None:
    """Shadow a method on the instance; `undo` puts back what the instance had, or takes the shadow away."""
    own = {name: module.__dict__[name]} if name in module.__dict__ else {}
    shadow = module.__dict__[name] = _Shadow(function, getattr(module, name), run)

    def restore() -> None:
        if module.__dict__.get(name) is shadow:  # else it was wrapped meanwhile, by a hook of accelerate perhaps
            del module.__dict__[name]
            module.__dict__.update(own)
        shadow.retire()

    undo.callback(restore)


class _Shadow:
    """A patched method, with the signature of the one that it stands for.

    It cannot be copied or pickled: a copy of the model would go on computing with the weights of the original.
    """

    def __init__(self, function: Callable, original: Callable, run: SparseRun):
        functools.update_wrapper(self, original)
        self.function, self.original = function, original
        self.sparsed_run: SparseRun | None = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def retire(self) -> None:
        """Become the original method, for what has wrapped the patched one."""
        self.function, self.sparsed_run = self.original, None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("sparsify: a patched model can be neither copied nor pickled: do it outside the context")


def _counted(run: SparseRun, forward: Callable) -> Callable:
    """The model's top-level forward: if of all tokens, one denoising step, counted when it has succeeded."""
    names = tuple(inspect.signature(forward).parameters)

    def counted(*args: Any, **kwargs: Any) -> Any:
        candidates = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next((x for x in candidates if isinstance(x, Tensor)), None)
        if tokens is None:
            raise ValueError("sparsify: the model was called without input_ids or inputs_embeds")
        rows = kwargs.get("rows")
        (batch, length), whole = tokens.shape[:2], rows is None or rows.whole
        with ExitStack() as step:
            if run.told or not whole:
                if not run.told:  # a window of somebody else's sampler, as it would be of the hub's classes
                    run.tally.windows += 1
                    step.enter_context(run.rows_only())
                step.enter_context(run.forward((batch, length if rows is None else rows.length), whole))
            else:
                given = dict(zip(names, args, strict=False)) | kwargs
                step.enter_context(run.unannounced(tokens, given.get("attention_mask")))
            return forward(*args, **kwargs)

    return counted
