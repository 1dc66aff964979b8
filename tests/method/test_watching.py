"""What is noted of a rule's choice, against loops: recall in float64, the pooled picture by its definition."""

import base64
from fractions import Fraction

import msgspec
import pytest
import torch

from sparsed import SparseDConfig, sparsify
from sparsed.blocks import BlockGrid, Pattern
from sparsed.cli.recording import SelectedBlocks
from sparsed.watching import pooled, watched
from tests.helpers import reference
from tests.helpers.patch_cases import GEN_LENGTH, PROMPT_LEN, outputs, sequences
from tests.helpers.standins import LLADA, tiny_llada


def random_pattern(heads, blocks, kept):
    """Any `kept` key blocks for every query block, and the same as a nested list of sets."""
    indices = torch.rand(2, heads, blocks, blocks).argsort(-1)[..., :kept].sort(-1).values.int()
    return Pattern(indices, (kept, kept), BlockGrid(blocks * 16, 16, 16)), indices[0].tolist()


def pooled_by_hand(rows, blocks, side):
    """One head's picture: for every row of cells, which are on."""
    share = {}
    for r in range(side):
        for c in range(side):
            queries = range(r * blocks // side, (r + 1) * blocks // side)
            keys = range(c * blocks // side, (c + 1) * blocks // side)
            held = sum(key in rows[query] for query in queries for key in keys)
            share[r, c] = Fraction(held, len(queries) * len(keys))
    picture = []
    for r in range(side):
        count = max(1, int(Fraction(len(rows[0]) * side, blocks) + Fraction(1, 2)))
        ranked = sorted(range(side), key=lambda c: (-share[r, c], c))
        picture.append([c in ranked[:count] for c in range(side)])
    return picture


@pytest.mark.parametrize(
    ("blocks", "kept", "most"), [(9, 3, 128), (128, 5, 128), (37, 11, 8), (40, 1, 8), (129, 40, 128)]
)
def test_the_pooled_picture_is_the_definition_s(blocks, kept, most):
    pattern, rows = random_pattern(3, blocks, kept)
    picture = pooled(pattern, most)
    assert picture.tolist() == [pooled_by_hand(head, blocks, min(blocks, most)) for head in rows]
    if blocks <= most:
        assert torch.equal(picture, pattern.as_mask()[0])


def test_layers_and_bits_are_those_of_a_float64_twin():
    model, steps, config = tiny_llada(), sequences(4), SparseDConfig(0.5, 0.3, 16)
    choices = SelectedBlocks()
    with sparsify(model, config, steps=4, gen_length=GEN_LENGTH, rule=watched(choices)) as run:
        outputs(model, steps)
        density = run.density
    _, rotated = reference.forward("llada", model.state_dict(), LLADA, steps[1])  # the last full step of four
    layers, found = choices.layers(), msgspec.to_builtins(choices.pattern())
    assert sum(layer.density for layer in layers) / len(layers) == pytest.approx(density)
    bits = "".join(f"{byte:08b}" for byte in base64.b64decode(found.pop("cells")))
    n = reference.n_blocks(PROMPT_LEN + GEN_LENGTH, 16)
    heads = rotated[0][0].shape[1]
    assert found == {
        "block_size": 16, "prompt_tokens": PROMPT_LEN, "tokens": PROMPT_LEN + GEN_LENGTH, "query_blocks": n,
        "key_blocks": n, "rows": n, "columns": n, "layers": len(rotated), "heads": heads,
    }  # fmt: skip
    for layer, (q, k) in enumerate(rotated):
        keep = reference.select(q, k, prompt_len=PROMPT_LEN, block_size=16, select=0.3).keep
        scores = reference.block_scores(q, k, 16)
        held = sum(
            scores[0, h, i, j].item() for h in range(heads) for i in range(n) for j in range(n) if keep[0, h, i, j]
        )
        assert layers[layer].recall == pytest.approx(held / scores[0].sum().item(), abs=1e-5)
        for h in range(heads):
            for i in range(n):
                start = ((layer * heads + h) * n + i) * n
                assert [bit == "1" for bit in bits[start : start + n]] == keep[0, h, i].tolist()


def test_nothing_chosen_is_nothing_noted():
    choices = SelectedBlocks()
    assert choices.layers() is None and choices.pattern() is None
