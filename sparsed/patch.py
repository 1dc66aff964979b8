"""`sparsify`: run SparseD inside a loaded Dream or LLaDA, whoever wrote its classes and whoever samples from it.

A denoising step is one forward of the patched model. The first `n_full` steps run the model's own full attention; the
last of them also chooses every layer's blocks; the steps after it attend to those only (arXiv 2509.24014, section 4).
"""

import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attention import BACKENDS, Problem, SparseAttention, check_backend, choose_backend
from .blocks import BlockGrid
from .config import SparseDConfig, check_numbers
from .kernels import block_scores, full_attention
from .selection import SPARSED, Rule, compile_scores

# what a step computes
FULL, SELECTING, SPARSE = "full", "selecting", "sparse"
# an additive mask at or below this hides a key: libraries use -1e4, -1e9, the dtype's lowest number or -inf
NEVER = -1e4


class Run:
    """State of the generations inside one `sparsify`, all of it: nothing stays on the model.

    Attributes:
        step: index of the next denoising step (inside a forward: of the current one).
        n_full: number of leading steps with full attention; 0 under a rule that needs none.
        backend, backend_reason: the kernel of the sparse steps and why it was taken; None until blocks are chosen.
        compile_seconds: time spent choosing and compiling kernels, part of step n_full - 1's time.
        phase: what the next step (inside a forward: the current one) computes: FULL, SELECTING or SPARSE.
        pattern_version: changes whenever the chosen blocks do.
    """

    def __init__(self, config: SparseDConfig, steps: int, gen_length: int, backend: str, rule: Rule):
        self.config, self.steps, self.gen_length, self.rule = config, steps, gen_length, rule
        self.n_full = 0 if rule.blind else config.n_full(steps)
        self.backend: str | None = None
        self.backend_reason: str | None = None
        self.compile_seconds = 0.0
        self._wanted = backend
        self._shape: tuple[int, ...] | None = None
        self._running = threading.Lock()
        self._keeps_all = False
        self.pattern_version = 0
        self.reset()

    @property
    def density(self) -> float | None:
        """Attended over all valid (query, key) pairs in the sparse steps, mean over layers and heads."""
        if self.backend == FULL:
            return 1.0
        return torch.stack([d.cpu() for d in self._densities]).mean().item() if self._densities else None

    def reset(self) -> None:
        """Drop the chosen blocks: the next forward is step 0 of a new generation."""
        self.step = 0
        self.backend = self.backend_reason = None
        self._forget()

    def _forget(self) -> None:
        self._grid: BlockGrid | None = None
        self._sparse: dict[tuple[int, torch.device], SparseAttention] = {}
        self._devices: set[torch.device] = set()
        self._densities: list[Tensor] = []
        self.pattern_version += 1

    def release(self) -> None:
        """Free the chosen blocks and keep what was measured."""
        self._grid, self._sparse = None, {}

    def prepare(self, shape: tuple[int, ...]) -> str:
        """The phase of the next step, over [batch, length] tokens; a finished run or another shape starts anew."""
        if shape[1] < self.gen_length:
            raise ValueError(f"sparsify: gen_length {self.gen_length} exceeds the forward's {shape[1]} tokens")
        if self.step >= self.steps or shape != self._shape:
            self.reset()
            grid = BlockGrid(shape[1], shape[1] - self.gen_length, self.config.block_size)
            self._keeps_all = self._wanted == "auto" and grid.keeps_all(self.config.select)
            if self._keeps_all and self.n_full < self.steps:
                self.backend, self.backend_reason = FULL, "every block is kept"
        self._shape = shape
        return self.phase

    def count(self) -> None:
        """The step that was prepared is done, without a forward of the model: it was replayed, or needed none."""
        self.step += 1

    @contextmanager
    def forward(self, shape: tuple[int, ...]) -> Iterator[None]:
        """A forward of the model, which is one step; if it fails, the step does not count."""
        if not self._running.acquire(blocking=False):
            raise RuntimeError("sparsify: a forward began inside another one of the same model, or in another thread")
        try:
            if self.prepare(shape) == SELECTING:
                self._forget()  # what an earlier try at this step chose before it failed
            yield
            self.step += 1
        finally:
            self._running.release()

    @property
    def phase(self) -> str:
        """The last full step selects, unless no sparse step follows; a run that keeps every block stays full."""
        if self._keeps_all or self.n_full == self.steps or self.step < self.n_full - 1:
            return FULL
        return SELECTING if self.step == max(0, self.n_full - 1) else SPARSE

    def current_phase(self) -> str:
        """The phase of the step whose forward is running; RuntimeError if none is."""
        if not self._running.locked():
            raise RuntimeError("sparsify: attention ran outside a forward of the model that was given to sparsify")
        return self.phase

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, full: Callable[[], Any]) -> Any:
        """One layer's attention in this step: `full()` in the full steps, else over the layer's kept blocks.

        Args:
            layer: index of the attention module.
            q: [B, Hq, n, D] after rotary embedding, the LAST n tokens of the sequence; all of them where blocks are
                selected.
            k, v: [B, Hkv, T, D].
            mask: the mask that the model gave its attention, in any of the forms of `valid_keys`.
            full: computes the model's own full attention.
        """
        phase = self.current_phase()
        if phase == FULL:
            return full()
        if phase == SPARSE:
            return self._sparse_attention(layer, q.device)(q, k, v)
        return self._select(layer, q, k, v, mask, full)

    def _select(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any, full: Callable[[], Any]) -> Any:
        """Full attention, and the blocks that the sparse steps will attend to; a blind rule's at once."""
        length = q.shape[2]
        if k.shape[2] != length:
            raise ValueError(f"sparsify needs all tokens in every forward, got {length} queries and {k.shape[2]} keys")
        if self._grid is None:
            self._grid = BlockGrid(length, length - self.gen_length, self.config.block_size, valid_keys(mask, k))
        grid = self._grid.to(q.device)
        out = lse = None
        if not self.rule.blind:
            # without a mask, ours is the model's own full attention, and can give the log-sum-exp along with it
            out, lse = full_attention(q, k, v) if mask is None or isinstance(mask, str) else (full(), None)
        first = q.device not in self._devices
        if first:
            self._devices.add(q.device)
            self._timed(lambda: self._prepare(q, k, lse, grid), q.device)

        def score() -> Tensor:
            compiled = self.backend != "gather"
            return block_scores(q, k, block_size=grid.block_size, key_valid=grid.key_valid, lse=lse, compiled=compiled)

        pattern = self.rule.choose(q, score, grid, self.config.select)
        self._densities.append(pattern.density)
        assert self.backend is not None  # `_prepare` has chosen it
        sparse = self._sparse[layer, q.device] = BACKENDS[self.backend](pattern)
        return sparse(q, k, v) if self.rule.blind else out

    def _sparse_attention(self, layer: int, device: torch.device) -> SparseAttention:
        """What the layer was given when it selected."""
        if (layer, device) not in self._sparse:
            raise RuntimeError(
                f"sparsify: no blocks were chosen on {device} for attention {layer}; reset() after moving a model"
            )
        return self._sparse[layer, device]

    def _prepare(self, q: Tensor, k: Tensor, lse: Tensor | None, grid: BlockGrid) -> None:
        """Choose the backend, whose self-check compiles it, and have the scores' kernel compiled."""
        batch, heads, _, head_dim = q.shape
        padded = grid.key_valid is not None
        problem = Problem(q.device, q.dtype, batch, heads, k.shape[1], head_dim, grid.block_size, padded)
        self.backend, self.backend_reason = choose_backend(self._wanted, problem, grid.length)
        if self.backend != "gather" and not self.rule.blind:
            compile_scores(q, k, grid, lse)

    def _timed(self, work: Callable[[], Any], device: torch.device) -> None:
        """Run `work` and count its time, the device's included, as compile time."""
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        self.compile_seconds += time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def valid_keys(mask: Any, k: Tensor) -> Tensor | None:
    """Which keys [B, T] an attention mask lets any query attend to; None if all of them.

    Args:
        mask: None or a string such as "full" (no mask); bool or integer (nonzero = attend) or additive float
            (-1e4 and below = never attend), broadcastable to [B, H, T, T] or of shape [B, T].
        k: [B, Hkv, T, D].
    """
    if mask is None or isinstance(mask, str):
        return None
    batch, length = k.shape[0], k.shape[2]
    allowed = mask > NEVER if mask.is_floating_point() else mask.bool()
    if allowed.shape != (batch, length):
        while allowed.ndim < 4:
            allowed = allowed[None]
        allowed = allowed.any(dim=2).any(dim=1).expand(batch, length)
    return None if allowed.all() else allowed.to(k.device)


@contextmanager
def sparsify(
    model: nn.Module,
    config: SparseDConfig,
    *,
    steps: int,
    gen_length: int,
    backend: str = "auto",
    rule: Rule = SPARSED,
) -> Iterator[Run]:
    """Patch the attention of any loaded Dream or LLaDA with SparseD while the context is open.

    It works on this package's classes and on the hub's remote code, and with any sampler that calls the model once a
    denoising step. After `steps` forwards, or when batch or length changes, the next forward starts a new generation; a
    sampler that stops before calls `reset()`.

    Args:
        model: recognised by the structure of its attention modules.
        config: skip, select, block_size.
        steps: denoising steps of one generation, one forward each.
        gen_length: tokens of the generated region, at the end of every forward's sequence.
        backend: auto, flash, triton or gather.
        rule: how blocks are chosen, for comparisons with other methods.

    Yields:
        The `Run`, with `reset()` and what was measured.

    Raises:
        ValueError: no Dream or LLaDA attention in the model, or a number out of range.
        RuntimeError: the model is inside another `sparsify`.
        BackendError: (in the step that chooses the blocks) the named backend cannot run.
    """
    if not isinstance(config, SparseDConfig):
        raise ValueError(f"config must be a SparseDConfig, got {config!r}")
    check_numbers(steps=steps, gen_length=gen_length)
    check_backend(backend)
    seams = [(module, *seam) for module in model.modules() if (seam := _seam(module))]
    if not seams:
        raise ValueError(f"{type(model).__name__} holds no attention of Dream or LLaDA")
    if run_of(model) is not None:
        raise RuntimeError("the model is inside another sparsify already: leave it, or generate without config=")
    run = Run(config, steps, gen_length, backend, rule)
    with ExitStack() as undo:
        for layer, (module, name, patched) in enumerate(seams):
            _replace(undo, module, name, patched(run, layer, module, getattr(module, name)), run)
        _replace(undo, model, "forward", _counted(run, model.forward), run)
        undo.callback(run.release)
        yield run


def run_of(model: nn.Module) -> Run | None:
    """The run of the `sparsify` that the model, or a part of it, is inside of; None outside."""
    functions = (function for module in model.modules() for function in module.__dict__.values())
    return next((function.sparsed_run for function in functions if hasattr(function, "sparsed_run")), None)


def _replace(undo: ExitStack, module: nn.Module, name: str, function: Callable, run: Run) -> None:
    """Shadow a method on the instance; `undo` puts back what the instance had, or takes the shadow away."""
    if name in module.__dict__:
        undo.callback(module.__dict__.__setitem__, name, module.__dict__[name])
    else:
        undo.callback(module.__dict__.pop, name, None)
    module.__dict__[name] = _Shadow(function, getattr(module, name), run)


class _Shadow:
    """A patched method, with the signature of the one that it stands for.

    It cannot be copied or pickled: a copy of the model would go on computing with the weights of the original.
    """

    def __init__(self, function: Callable, original: Callable, run: Run):
        functools.update_wrapper(self, original)
        self.function, self.sparsed_run = function, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("sparsify: a patched model can be neither copied nor pickled: do it outside the context")


def _counted(run: Run, forward: Callable) -> Callable:
    """The model's top-level forward: one denoising step, counted when it has succeeded."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        candidates = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        tokens = next((x for x in candidates if isinstance(x, Tensor)), None)
        if tokens is None:
            raise ValueError("sparsify: the model was called without input_ids or inputs_embeds")
        with run.forward(tuple(tokens.shape[:2])):
            return forward(*args, **kwargs)

    return counted


def _seam(module: nn.Module) -> tuple[str, Callable] | None:
    """(method to replace, its replacement's maker) if the module owns attention, recognised by its structure."""
    if hasattr(module, "attend") and hasattr(module, "q_proj"):
        return "attend", _patched_sdpa
    if hasattr(module, "_scaled_dot_product_attention"):
        return "_scaled_dot_product_attention", _patched_sdpa
    hub_dream = ("q_proj", "k_proj", "v_proj", "o_proj", "num_heads", "num_key_value_heads", "head_dim")
    if all(hasattr(module, name) for name in hub_dream):
        return "forward", _patched_dream
    return None


def _patched_sdpa(run: Run, layer: int, module: nn.Module, original: Callable) -> Callable:
    """A method (q, k, v, mask, ...) -> heads: `attend` of this package's models, and of the hub's LLaDA block."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mask = args[0] if args else kwargs.get("attn_mask", kwargs.get("key_valid"))
        return run.attend(layer, q, k, v, mask, lambda: original(q, k, v, *args, **kwargs))

    return attention


def _patched_dream(run: Run, layer: int, module: Any, original: Callable) -> Callable:
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
