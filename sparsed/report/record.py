"""The record of a run of the two scripts, as they write it and a page reads it, of this version or an earlier one."""

import base64
from enum import Enum
from itertools import accumulate
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, structs

LARGEST = 10**15  # of any number: a float holds all whole ones up to it
ROUNDING = 1e-5  # by which a share, a mean of float32 values, may exceed 1
# fields of `work` that committed records have under other names
RENAMED = {"tokens_a_forward": "tokens_per_forward", "tokens_a_second": "tokens_per_second"}

Whole = Annotated[int, Meta(ge=0, le=LARGEST)]
Size = Annotated[int, Meta(ge=1, le=LARGEST)]
Seconds = Annotated[float, Meta(ge=0, le=LARGEST)]
Rate = Annotated[float, Meta(ge=0, le=LARGEST)]
Share = Annotated[float, Meta(ge=0, le=1 + ROUNDING)]
Mode = Literal["origin", "sparsed"]
# a token's position in the answer, its id and its probability, None where no step committed it
Commit = tuple[Whole, Whole, Share | None]


class Phase(str, Enum):
    """What a step's forward computes: all rows, with full attention or over kept blocks; over cached keys the rows of a
    block, or those of the answer; idle: the step commits nothing, and runs no forward."""

    FULL = "full"
    SELECTING = "selecting"
    SPARSE = "sparse"
    CACHED = "cached"
    ANSWER = "answer"
    IDLE = "idle"


class Forward(Struct, frozen=True):
    """A denoising step's forward: of how many token rows; and what share of the answer it leaves committed, if known.

    Idle steps have an entry too, of no rows and no seconds, so that entry i is of step i, as in `history`; and a phase
    of their own, so that who counts the full or the sparse forwards counts none that never ran.
    """

    phase: Phase
    rows: Whole
    seconds: Seconds
    committed: Share | None


class Work(Struct, frozen=True):
    """How many forwards of each phase a run took, and how many tokens they committed; those that an early stop filled
    counted separately, and in no rate."""

    forwards: dict[Phase, Whole]
    tokens: Whole
    filled: Whole
    tokens_per_forward: Rate
    tokens_per_second: Rate | None


class Repeats(Struct, frozen=True):
    """The times of several runs with one seed; `median` is the chosen run's, `spread` the slowest less the fastest."""

    seconds: Annotated[list[Seconds], Meta(min_length=1)]
    median: Seconds
    spread: Seconds
    same_tokens: bool


class Layer(Struct, frozen=True):
    """The share of the (query, key) pairs that a layer reads in sparse steps, and of the attention that they hold."""

    density: Share
    recall: Share


class KeptBlocks(Struct, frozen=True):
    """Kept blocks: bits [layers, heads, rows, columns] in C order, a byte's most significant first, in base64."""

    block_size: Size
    prompt_tokens: Whole
    tokens: Size
    query_blocks: Size
    key_blocks: Size
    rows: Size
    columns: Size
    layers: Size
    heads: Size
    cells: str

    def __post_init__(self) -> None:
        bits = self.layers * self.heads * self.rows * self.columns
        try:
            cells = base64.b64decode(self.cells, validate=True)
        except ValueError:
            raise ValueError("cells must be base64") from None
        if len(cells) != -(-bits // 8):
            raise ValueError(f"cells must be the base64 of {bits} bits")
        if self.prompt_tokens >= self.tokens:
            raise ValueError("prompt_tokens must be fewer than tokens")


class RunRecord(Struct, frozen=True, kw_only=True):
    """One mode's run. Earlier versions lack some fields, which have a default here; `summary.prefix_fields` says when
    `step_seconds`, `full_steps` and `selection_seconds` are absent."""

    mode: Mode
    token_ids: Annotated[list[Whole], Meta(min_length=1)]
    prompt_tokens: Whole
    seconds: Seconds
    forwards: list[Forward] = []
    work: Work | None = None
    step_seconds: Annotated[list[Seconds], Meta(min_length=1)] | UnsetType = UNSET
    full_steps: Whole | UnsetType = UNSET
    selection_seconds: Annotated[float, Meta(ge=-LARGEST, le=LARGEST)] | None | UnsetType = UNSET
    compile_seconds: Seconds
    density: Share | None
    layers: list[Layer] | None = None
    pattern: KeptBlocks | None | UnsetType = UNSET
    history: list[list[Commit]] = []
    peak_memory_bytes: Whole | None = None
    backend: str | None
    backend_reason: str | None
    cached_kernels: list[str] = []
    repeats: Repeats | None = None
    warmup_seconds: list[Seconds] = []
    warmup_compile_seconds: Seconds = 0.0
    pieces: list[str] = []
    answer_tokens: Whole | None = None
    text: str
    expected: str | None
    answer_found: bool | None

    def __post_init__(self) -> None:
        tokens, timed = len(self.token_ids), self.step_seconds or self.forwards
        steps = len(self.forwards or timed)
        if not self.forwards and UNSET in (self.step_seconds, self.full_steps):
            raise ValueError("must hold forwards, or step_seconds and full_steps as in earlier versions")
        if len(timed) != steps:
            raise ValueError(f"step_seconds must be of as many steps as forwards, {steps}")
        if (self.full_steps or 0) > steps:
            raise ValueError(f"full_steps must be at most the number of steps, {steps}")
        told = [bool(self.history), bool(self.pieces), self.answer_tokens is not None]
        if any(told) and not all(told):
            raise ValueError("must hold all of history, pieces and answer_tokens, or none of them")
        if len(self.pieces) not in (0, tokens):
            raise ValueError(f"pieces must be one text for each of the {tokens} tokens")
        if (self.answer_tokens or 0) > tokens:
            raise ValueError(f"answer_tokens must be at most {tokens}")
        positions = sorted(position for step in self.history for position, _, _ in step)
        if self.history and (len(self.history) != steps or positions != list(range(tokens))):
            raise ValueError(f"history must be one list for each of the {steps} steps, with every position once")


class Record(Struct, frozen=True, kw_only=True):
    """What `--json` writes of a run, or of two that are compared."""

    runs: list[RunRecord]
    first_forward_seconds: Seconds
    comparison: dict[str, Any] | UnsetType = UNSET
    trained_length: Whole
    beyond_trained_length: bool
    load_seconds: Seconds
    environment: dict[str, Any]
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        if [run.mode for run in self.runs] not in (["origin"], ["sparsed"], ["origin", "sparsed"]):
            raise ValueError("runs must be one of mode 'origin' or 'sparsed', or both in this order")
        if len(self.runs[0].token_ids) != len(self.runs[-1].token_ids):
            raise ValueError("runs[1].token_ids must be as long as the other run's")


def read(record: Any) -> Record:
    """The record in a JSON value, of this version or an earlier one; its runs have their `forwards` in any case.

    Raises:
        ValueError: it is no record of a run; names the field that is wrong, and says what it should be.
    """
    if isinstance(record, dict) and "advice" in record:
        raise ValueError("this is the record of --advise, which makes no answer; the page needs a run's")
    try:
        found = msgspec.convert(_renamed(record), Record)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    return structs.replace(found, runs=[run if run.forwards else _with_forwards(run) for run in found.runs])


def _renamed(record: Any) -> Any:
    """The JSON value with the names that the fields of `work` have now; what is not a record stays as it is."""
    if not isinstance(record, dict) or not isinstance(record.get("runs"), list):
        return record
    runs = [
        {**run, "work": {RENAMED.get(name, name): value for name, value in run["work"].items()}}
        if isinstance(run, dict) and isinstance(run.get("work"), dict)
        else run
        for run in record["runs"]
    ]
    return {**record, "runs": runs}


def _with_forwards(run: RunRecord) -> RunRecord:
    """A run of an earlier version, whose first `full_steps` steps were full; steps of 0.0 s ran no forward."""
    seconds, n_full = run.step_seconds or [], run.full_steps or 0
    phases = prefix([taken > 0 for taken in seconds], n_full, selects=run.density is not None)
    rows = run.prompt_tokens + len(run.token_ids)
    return structs.replace(run, forwards=forwards_of(phases, seconds, [rows] * len(phases), run.history))


def prefix(ran: list[bool], n_full: int, selects: bool) -> list[Phase]:
    """The phases of steps that begin with full ones, the last of which may select; one that did not run is idle."""
    selecting = int(selects and n_full > 0)
    phases = [Phase.FULL] * (n_full - selecting) + [Phase.SELECTING] * selecting + [Phase.SPARSE] * (len(ran) - n_full)
    return [phase if runs or phase == Phase.SELECTING else Phase.IDLE for phase, runs in zip(phases, ran, strict=True)]


def forwards_of(
    phases: list[Phase], seconds: list[float], rows: list[int], history: list[list[Commit]]
) -> list[Forward]:
    """The forwards of steps that computed `rows` rows; without a history, what was committed is not known."""
    done = list(accumulate(map(len, history)))
    committed: list[float | None] = [count / done[-1] for count in done] or [None] * len(phases)
    return [
        Forward(phase, 0 if phase == Phase.IDLE else computed, taken, share)
        for phase, computed, taken, share in zip(phases, rows, seconds, committed, strict=True)
    ]
