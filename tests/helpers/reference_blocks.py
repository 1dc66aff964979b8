"""Oracle of both samplers in blocks at temperature 0: caches, thresholds, factors, early stops, with SparseD inside.

Plain loops in float64, written from the specification; nothing of this project's code is imported. One forward does for
everything: it computes the rows first ... last - 1 of one sequence, writes their keys and values over the old ones, and
attends to all that it then has. Without a cache every forward computes all rows, so that nothing old is left.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch

from tests.helpers.reference import (
    DIMENSIONS,
    TENSORS,
    attention,
    dense_rows,
    expand,
    linear,
    n_full,
    positions_of,
    rms_norm,
    rotate,
    select,
)
from tests.helpers.reference_sampling import closest, dream_confidence, filtered_probabilities, runner_up

END_IDS = ("eos_token_id", "eot_token_id", "pad_token_id")


class Model(NamedTuple):
    """weights: float64, by their names in the state dict; config: config.json's dict."""

    family: str
    weights: dict
    config: dict

    @staticmethod
    def of(family, weights, config):
        return Model(family, {name: tensor.double() for name, tensor in weights.items()}, config)


def empty_cache(model, length):
    """Per layer [keys, values], each [1, Hkv, T, D]; NaN, so that nothing is read that was never written."""
    layers, heads, kv_heads = (model.config[key] for key in DIMENSIONS[model.family])
    name = TENSORS[model.family]
    key_weight = model.weights[name["layer"].format(0) + name["key"] + ".weight"]
    shape = 1, kv_heads, length, key_weight.shape[0] // kv_heads
    return [[torch.full(shape, math.nan, dtype=torch.float64) for _ in range(2)] for _ in range(layers)]


def forward(model, ids, valid, first, last, cache, allowed=None):
    """Logits [last - first, V] of some rows of one sequence, and per layer their queries after RoPE.

    Args:
        ids, valid: [T], of the whole sequence.
        first, last: the rows first ... last - 1 are computed; their keys and values replace those in `cache`.
        allowed: None, or per layer the token mask [1, Hq, T, T]; only if all rows are computed.
    """
    name, weights, config = TENSORS[model.family], model.weights, model.config
    _, heads, kv_heads = (config[key] for key in DIMENSIONS[model.family])
    positions = positions_of(model.family, valid[None])[:, first:last]
    eps, theta = config["rms_norm_eps"], config["rope_theta"]

    def split(x, count):
        return x.view(1, last - first, count, -1).transpose(1, 2)

    x, queries = weights[name["embedding"]][ids[first:last]][None], []
    for i, (keys, values) in enumerate(cache):
        at = name["layer"].format(i)
        h = rms_norm(x, weights[at + name["norm_1"]], eps)
        q = rotate(split(linear(h, weights, at + name["query"]), heads), positions, theta)
        keys[:, :, first:last] = rotate(split(linear(h, weights, at + name["key"]), kv_heads), positions, theta)
        values[:, :, first:last] = split(linear(h, weights, at + name["value"]), kv_heads)
        queries.append(q)
        out = attention(q, keys, values, valid[None], allowed[i] if allowed else None)
        x = x + linear(out.transpose(1, 2).reshape(1, last - first, -1), weights, at + name["output"])
        h = rms_norm(x, weights[at + name["norm_2"]], eps)
        gate = linear(h, weights, at + name["gate"])
        x = x + linear(gate * torch.sigmoid(gate) * linear(h, weights, at + name["up"]), weights, at + name["down"])
    return (rms_norm(x, weights[name["norm"]], eps) @ weights[name["head"]].T)[0], queries


class Sequence:
    """One sequence that the model sees (a batch row, or its unconditional half): its cache and its kept blocks."""

    def __init__(self, model, valid, prompt_len, sparse):
        self.model, self.valid, self.prompt_len, self.sparse = model, valid, prompt_len, sparse
        self.cache = empty_cache(model, len(valid))
        self.allowed, self.gap = None, math.inf

    def logits(self, ids, first, last, kind):
        """{row: logits [V]} of the rows first ... last - 1."""
        allowed = self.allowed if kind == "sparse" else None
        out, queries = forward(self.model, ids, self.valid, first, last, self.cache, allowed)
        if kind == "selecting":
            self.choose(queries)
        return {first + n: out[n] for n in range(last - first)}

    def choose(self, queries):
        self.allowed = []
        for q, (keys, _) in zip(queries, self.cache, strict=True):
            chosen = select(
                q,
                keys,
                prompt_len=self.prompt_len,
                block_size=self.sparse.block_size,
                select=self.sparse.select,
                valid=self.valid[None],
            )
            self.gap = min(self.gap, chosen.gap)
            mask = expand(chosen.keep, self.sparse.block_size, len(self.valid))
            self.allowed.append(dense_rows(mask, self.prompt_len) if self.sparse.dense_answer else mask)


class Row:
    """One row of the batch: its tokens, and the sequences that are run for it."""

    def __init__(self, ids, sequences, mask_id):
        self.ids, self.sequences, self.mask_id, self.stopped = ids, sequences, mask_id, False

    def masked(self, start, end):
        tokens = self.ids.tolist()
        return [j for j in range(start, end) if tokens[j] == self.mask_id]

    def blind(self, prompt_len):
        """The ids of the unconditional half: the whole prompt is masked."""
        return torch.cat([torch.full((prompt_len,), self.mask_id), self.ids[prompt_len:]])


class Proposal(NamedTuple):
    """What a candidate would get; how probable that is; by what the algorithm ranks; the lead over the next token."""

    token: int
    probability: float
    confidence: float
    lead: float


def dream_proposal(logits, alg="maskgit_plus", top_p=None, top_k=None):
    token = int(logits.argmax())
    confidence = dream_confidence(filtered_probabilities(logits, top_p, top_k), alg)
    return Proposal(token, logits.softmax(-1)[token].item(), confidence, runner_up(logits))


def llada_proposal(logits, no_logits=(), no_confidence=()):
    """`no_logits`: tokens that are never drawn; `no_confidence`: tokens whose probability is 0 once drawn."""
    logits = logits.clone()
    logits[list(no_logits)] = -math.inf
    token, lead = int(logits.argmax()), runner_up(logits)
    logits[list(no_confidence)] = -math.inf
    probability = logits.softmax(-1)[token].item()
    return Proposal(token, probability, probability, lead)


PROPOSAL = {"dream": dream_proposal, "llada": llada_proposal}


def sure_ones(proposals, threshold, factor):
    """The candidates that a threshold or a factor commits, and how close the decision was.

    Args:
        proposals: {position: Proposal}.
    """
    probability = {j: proposals[j].probability for j in proposals}
    if threshold is not None:
        sure = [j for j in probability if probability[j] >= threshold]
        # 0 is met by every probability, so that there is nothing to decide
        distances = [abs(probability[j] - threshold) for j in probability] if threshold else []
        return sure, min(distances, default=math.inf)
    if factor is None:
        return [], math.inf
    ranked = sorted(probability, key=lambda j: (-probability[j], j))
    sure, gap = [], math.inf
    for n, j in enumerate(ranked, start=1):
        gap = min(gap, abs((n + 1) * (1 - probability[j]) - factor))
        if (n + 1) * (1 - probability[j]) >= factor:
            break
        sure.append(j)
    return sure, min(gap, closest([probability[j] for j in ranked], len(sure)))


def choose(proposals, count, threshold, factor):
    """(positions to commit, how close the decision was): the sure ones, and then the best others, `count` in all."""
    sure, gap = sure_ones(proposals, threshold, factor)
    others = sorted((j for j in proposals if j not in sure), key=lambda j: (-proposals[j].confidence, j))
    more = max(0, count - len(sure))
    gap = min(gap, closest([proposals[j].confidence for j in others], more))
    # the tokens of all candidates: that of one left out may have decided that it is left out
    return sure + others[:more], min([gap, *(proposal.lead for proposal in proposals.values())])


def by_count(index, total, skip):
    """The paper's schedule: what the `index`-th of `total` whole forwards has."""
    full = n_full(skip, total)
    if index >= full:
        return "sparse"
    return "selecting" if index == full - 1 and full < total else "full"


class Forward(NamedTuple):
    """A step that ran the model over the rows first ... last - 1.

    kind: full, selecting, sparse, or rows (of others the keys and values are old); committed: per row of the batch, the
    positions, ascending; filled: those that an early stop after this step filled.
    """

    step: int
    first: int
    last: int
    kind: str
    committed: list
    filled: list


class Batch(NamedTuple):
    """tokens [B, L + N]; gap: how far the closest decision was from a tie; forwards: the steps that ran."""

    tokens: torch.Tensor
    gap: float
    forwards: list


def generate(model, prompts, *, valid=None, sparse=None, gen_length, steps, block_length=None, cache="none",
             refresh=None, threshold=None, factor=None, early_stop=False, cfg_scale=0.0, **proposing):  # fmt: skip
    """A batch, written block after block. `proposing`: what the family's proposals take."""
    family, config, mask_id = model.family, model.config, model.config["mask_token_id"]
    ends = {config.get(key) for key in END_IDS} | set(config.get("end_token_ids", ()))
    batch, prompt_len = prompts.shape
    length = prompt_len + gen_length
    valid = torch.ones_like(prompts, dtype=torch.bool) if valid is None else valid.bool()
    valid = torch.cat([valid, torch.ones(batch, gen_length, dtype=torch.bool)], 1)
    rows = []
    for b in range(batch):
        ids = torch.cat([prompts[b], torch.full((gen_length,), mask_id)])
        halves = [Sequence(model, valid[b], prompt_len, sparse) for _ in range(2 if cfg_scale else 1)]
        rows.append(Row(ids, halves, mask_id))

    block_length = block_length or min(32, gen_length)
    blocks = gen_length // block_length
    per_block = steps // blocks
    assert blocks * block_length == gen_length and blocks * per_block == steps
    parallel = threshold is not None or factor is not None
    refresh = 1 if refresh is None else refresh
    # the row of the logits that predict a token: its own, or in Dream the one before it
    before = 1 if family == "dream" else 0
    chosen, gap, forwards = False, math.inf, []

    def shares_committed():
        for row in rows:
            done = gen_length if row.stopped else gen_length - len(row.masked(prompt_len, length))
            yield Fraction(done, gen_length)

    def attention_of(whole, block, step):
        if not whole:
            return "rows"
        if sparse is None:
            return "full"
        if cache != "none":  # the whole refreshes are counted
            index, total = (block // refresh, -(-blocks // refresh)) if refresh else (0, 1)
            return by_count(index, total, sparse.skip)
        if not parallel:
            return by_count(step, steps, sparse.skip)
        if min(shares_committed()) < Fraction(str(sparse.skip)):
            return "full"
        return "sparse" if chosen else "selecting"

    for block in range(blocks):
        start = prompt_len + block * block_length
        end = start + block_length
        for i in range(per_block):
            step = block * per_block + i
            count = block_length // per_block + (1 if i < block_length % per_block else 0)
            if parallel:
                count = max(1, count)
            open_rows = [row for row in rows if not row.stopped and row.masked(start, end)]

            # what is said of whole forwards goes by this, not by the number of rows: Dream's rows from a prompt of one
            # token on are all there are
            whole = cache == "none" or (i == 0 and (block == 0 or (refresh > 0 and block % refresh == 0)))
            if whole:
                first, last = 0, length
            elif i == 0:
                first, last = max(prompt_len - before, 0), length
            else:
                first, last = max(start - before, 0), end if cache == "dual" else length
            kind = attention_of(whole, block, step)

            if not open_rows or not count:
                # nothing to commit; but where steps are counted, the one that selects runs all the same
                by_steps = cache == "none" and not parallel and not all(row.stopped for row in rows)
                if not (by_steps and kind == "selecting"):
                    continue
            chosen = chosen or kind == "selecting"

            committed = [[] for _ in rows]
            for b, row in enumerate(rows):
                if row.stopped:
                    continue
                logits = row.sequences[0].logits(row.ids, first, last, kind)
                if cfg_scale:
                    without = row.sequences[1].logits(row.blind(prompt_len), first, last, kind)
                    logits = {j: without[j] + (cfg_scale + 1) * (logits[j] - without[j]) for j in logits}
                proposals = {}
                for j in row.masked(start, end):
                    proposals[j] = PROPOSAL[family](logits[max(j - before, 0)], **proposing)
                if not proposals:
                    continue
                taken, close = choose(proposals, count, threshold, factor)
                gap = min(gap, close)
                for j in taken:
                    row.ids[j] = proposals[j].token
                committed[b] = sorted(taken)
            forwards.append(Forward(step, first, last, kind, committed, [[] for _ in rows]))

        for b, row in enumerate(rows):
            found = [token for token in row.ids[start:end].tolist() if token in ends]
            if early_stop and not row.stopped and found:
                row.ids[end:] = found[0]
                row.stopped = True
                forwards[-1].filled[b].extend(range(end, length))

    gap = min([gap, *(half.gap for row in rows for half in row.sequences)])
    return Batch(torch.stack([row.ids for row in rows]), gap, forwards)


def decided(model, *, prompt_len, padding=(0,), clear=2e-5, unlike=(), where=None, known=None, **options):
    """Random prompts, one row for each number in `padding`, and their `generate`: the first seed without near-ties.

    Seeds under which the mask itself is committed are left out, too.

    Args:
        unlike: other options, of each of which the tokens must differ.
        where: what must hold of the batch, called with it.
        known: a dict for the batches of this model that were generated before, by their arguments.

    Returns:
        (prompts [B, prompt_len] with the pad id in front, valid [B, prompt_len], Batch).
    """
    config, known = model.config, {} if known is None else known
    valid = torch.tensor([[t >= pad for t in range(prompt_len)] for pad in padding])
    special = min(config[key] for key in config if key.endswith("token_id") and config[key] is not None)

    def twin(seed, **given):
        prompts = torch.randint(0, special, valid.shape, generator=torch.Generator().manual_seed(seed))
        prompts[~valid] = config["pad_token_id"]
        key = repr((seed, prompt_len, padding, sorted(given.items())))
        if key not in known:
            known[key] = generate(model, prompts, valid=valid, **given)
        return prompts, known[key]

    for seed in range(100):
        prompts, batch = twin(seed, **options)
        if batch.gap < clear or (batch.tokens == config["mask_token_id"]).any() or (where and not where(batch)):
            continue
        if not any(torch.equal(twin(seed, **options | other)[1].tokens, batch.tokens) for other in unlike):
            return prompts, valid, batch
    raise AssertionError("no seed without a near-tie: the case cannot tell right from wrong")
