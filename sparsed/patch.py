"""`sparsify`: run SparseD inside a loaded Dream or LLaDA, whoever wrote its classes and whoever samples from it.

A denoising step is one forward of the patched model; what it computes, its `SparseRun` decides.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .backends import check_backend
from .config import SparseDConfig, check_numbers
from .run import SparseRun
from .schedule import FULL, ByStep
from .selection import SPARSED, Rule

# held while a model is patched, lest two threads both find it unpatched
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
) -> Iterator[SparseRun]:
    """Patch the attention of any loaded Dream or LLaDA with SparseD while the context is open.

    It works on this package's classes and on the hub's remote code, and with any sampler that calls the model once a
    denoising step. After `steps` forwards, or when batch or length changes, the next forward starts a new generation; a
    sampler that stops before calls `reset()`. This package's own samplers say when theirs begins and ends: it then has
    as many forwards as it takes, and one of another batch or length meanwhile has full attention and is no step. What
    wraps a patched method inside the context stays when it ends, around the method as it was before.

    Args:
        model: recognised by the structure of its attention modules.
        config: skip, select, block_size, dense_answer.
        steps: denoising steps of one generation, one forward each.
        gen_length: tokens of the generated region, at the end of every forward's sequence.
        backend: auto, or a name in `BACKENDS`.
        rule: how blocks are selected, for comparisons with other methods.

    Yields:
        The `SparseRun`, with `reset()` and what was measured.

    Raises:
        ValueError: no Dream or LLaDA attention in the model, or a number out of range.
        RuntimeError: the model is inside another `sparsify`; or (in a forward) another forward is running; or (in a
            sampler) another generation is; or (at the end) another thread is inside a forward.
        BackendError: (in the step that selects the blocks) the named backend cannot run.
    """
    if not isinstance(config, SparseDConfig):
        raise ValueError(f"config must be a SparseDConfig, got {config!r}")
    check_numbers(steps=steps, gen_length=gen_length)
    check_backend(backend)
    seams = [(module, *seam) for module in model.modules() if (seam := _seam(module))]
    if not seams:
        raise ValueError(f"{type(model).__name__} holds no attention of Dream or LLaDA")
    # a rule that looks at nothing needs no full step
    schedule = ByStep(steps, config.n_full(steps) if rule.needs_scores else 0)
    run = SparseRun(config, schedule, gen_length, backend, rule)
    with ExitStack() as undo:
        with PATCHING:
            if _is_patched(model):
                raise RuntimeError(
                    "the model is inside another sparsify already: leave it, or generate without config="
                )
            for layer, (module, name, patched) in enumerate(seams):
                _replace(undo, module, name, patched(run, layer, module, getattr(module, name)), run)
            _replace(undo, model, "forward", _counted(run, model.forward), run)
        undo.callback(run.release)
        yield run
        run.check_idle()


def run_of(model: nn.Module) -> SparseRun | None:
    """The run of the `sparsify` that was given the model, while it is open."""
    return getattr(model.__dict__.get("forward"), "sparsed_run", None)


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
    """The model's top-level forward: one denoising step, counted when it has succeeded."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        candidates = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next((x for x in candidates if isinstance(x, Tensor)), None)
        if tokens is None:
            raise ValueError("sparsify: the model was called without input_ids or inputs_embeds")
        batch, length = tokens.shape[:2]
        rows = kwargs.get("rows")
        whole = rows is None or rows.whole
        with run.forward((batch, length if rows is None else rows.length), whole):
            return forward(*args, **kwargs)

    return counted


def _seam(module: nn.Module) -> tuple[str, Callable] | None:
    """(method to replace, its replacement's maker) if the module owns attention, recognised by its structure."""
    if hasattr(module, "attend") and hasattr(module, "q_proj"):
        return "attend", _patched_attend
    if hasattr(module, "_scaled_dot_product_attention"):
        return "_scaled_dot_product_attention", _patched_sdpa
    hub_dream = ("q_proj", "k_proj", "v_proj", "o_proj", "num_heads", "num_key_value_heads", "head_dim")
    if all(hasattr(module, name) for name in hub_dream):
        return "forward", _patched_dream
    return None


def _patched_attend(run: SparseRun, layer: int, module: nn.Module, original: Callable) -> Callable:
    """`attend` of this package's models."""

    def attention(q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, start: int) -> Tensor:
        return run.attend(layer, q, k, v, key_valid, lambda: original(q, k, v, key_valid, start), start)

    return attention


def _patched_sdpa(run: SparseRun, layer: int, module: nn.Module, original: Callable) -> Callable:
    """The hub's LLaDA block's method (q, k, v, mask, ...) -> heads."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mask = args[0] if args else kwargs.get("attn_mask")
        return run.attend(layer, q, k, v, mask, lambda: original(q, k, v, *args, **kwargs))

    return attention


def _patched_dream(run: SparseRun, layer: int, module: Any, original: Callable) -> Callable:
    """The whole forward of the hub's DreamAttention, which has no inner method to replace."""
    signature = inspect.signature(original)
    extra = next(
        (name for name, parameter in signature.parameters.items() if parameter.kind == parameter.VAR_KEYWORD), ""
    )

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None, Any]:
        if run.current_phase() == FULL:
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        given |= given.get(extra, {})
        q, k, v = _dream_heads(module, given)
        out = run.attend(layer, q, k, v, given.get("attention_mask"), lambda: original(*args, **kwargs))
        if not isinstance(out, Tensor):
            return out
        return module.o_proj(out.transpose(1, 2).flatten(2)), None, given.get("past_key_value")

    return forward


def _dream_heads(module: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, T, D], k and v [B, Hkv, T, D] as the hub's Dream computes them, rotated in the model's dtype."""
    x = given["hidden_states"]
    q, k, v = (
        projection(x).unflatten(-1, (heads, module.head_dim)).transpose(1, 2)
        for projection, heads in (
            (module.q_proj, module.num_heads),
            (module.k_proj, module.num_key_value_heads),
            (module.v_proj, module.num_key_value_heads),
        )
    )
    tables = given.get("position_embeddings")
    cos, sin = tables if tables is not None else module.rotary_emb(v, given.get("position_ids"))
    cos, sin = cos[:, None], sin[:, None]  # [B or 1, 1, T, D]
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
