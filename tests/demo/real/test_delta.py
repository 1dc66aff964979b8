"""Deltas: within their bound, exact where they say so, and refused when damaged or of another base."""

import json
import zlib

import numpy as np
import pytest
import torch

from demo.real import delta
from sparsed.models import load_model
from tests.helpers.real_recipe import refused


def changed(base, scale=0.02):
    """Weights as after a training: every matrix but the embedding changed, of that one row, and the norms."""
    generator = torch.Generator().manual_seed(5)
    after = {}
    for name, weight in base.items():
        noise = scale * torch.randn(weight.shape, generator=generator)
        if "embed" in name:
            noise[torch.arange(len(noise)) != 3] = 0
        after[name] = weight if name.endswith("bias") else weight + noise
    return after


@pytest.mark.parametrize("step", [0.001, 0.1, 1.0, 3.0])
def test_a_delta_is_off_by_half_a_step_at_most(base, step):
    before = dict(load_model(base, device="cpu").named_parameters())
    after = changed(before)
    rebuilt = delta.decode(before, delta.encode(before, after, step))
    assert rebuilt.keys() == after.keys()
    for name, weight in after.items():
        exact = weight.dim() == 1 or "embed" in name
        size = step * (weight - before[name]).square().mean().sqrt().item()
        assert (rebuilt[name] - weight).abs().max() <= (0 if exact else 0.5001 * size + 1e-7)


def test_a_delta_holds_what_changed_and_coarser_steps_take_less(base):
    before = dict(load_model(base, device="cpu").named_parameters())
    sizes = [len(delta.encode(before, changed(before), step)) for step in (0.01, 0.3, 1.0, 3.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 3 * sizes[-1]
    nothing = delta.encode(before, before, 1.0)
    assert json.loads(nothing)["tensors"] == [] and delta.decode(before, nothing).keys() == before.keys()


def test_a_single_large_change_is_kept(base):
    before = dict(load_model(base, device="cpu").named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    after = changed(before)
    after[name][0, 0] += 100
    rebuilt = delta.decode(before, delta.encode(before, after, 0.01))
    assert abs(rebuilt[name][0, 0] - after[name][0, 0]) < 0.01


def test_the_first_deltas_format_is_read(base):
    before = dict(load_model(base, device="cpu").named_parameters())
    name, steps, row = (
        "model.layers.1.mlp.up_proj.weight",
        np.arange(96 * 64).reshape(96, 64) % 5 - 2,
        np.ones(64, "<f4"),
    )
    blobs = [zlib.compress(steps.astype(np.int8).tobytes()), row.tobytes(), (2 * row).tobytes()]
    entries = [[name, [96, 64], 0.25], ["mask", [64], 0.0], ["model.norm.weight", [64], 0.0]]
    header = {"mask_id": 3, "tensors": [[*entry, len(blob)] for entry, blob in zip(entries, blobs, strict=True)]}
    found = delta.decode(before, json.dumps(header).encode() + b"\n" + b"".join(blobs))
    assert torch.equal(found[name], before[name] + 0.25 * torch.from_numpy(steps).float())
    embedding = before["model.embed_tokens.weight"].clone()
    embedding[3] = 1
    assert torch.equal(found["model.embed_tokens.weight"], embedding)
    assert torch.equal(found["model.norm.weight"], torch.full((64,), 2.0))


def test_a_damaged_or_foreign_delta_is_refused(base, tmp_path, capsys):
    before = dict(load_model(base, device="cpu").named_parameters())
    whole = delta.encode(before, changed(before), 1.0)
    other = delta.encode(changed(before, 0.5), before, 1.0)
    line, _, rest = whole.partition(b"\n")
    for content, said in (
        (whole[:-1], "damaged, or a part of it is missing"),
        (line + b"\n\xff" + rest[1:], "damaged"),
        (whole.replace(b"model.norm", b"model.morn"), "'model.morn.weight'"),
        (whole.replace(b'"rows": [3]', b'"rows": [9999]'), "not a whole delta"),
        (whole.replace(b'"<f4"', b'"<x4"'), "not a whole delta"),
        (other, "of another base"),
        (rest, "not a whole delta"),
        (b"[]\n", "not a whole delta"),
        (b"", "not a whole delta"),
    ):
        (tmp_path / "delta").write_bytes(content)
        words = ["apply", "--base", base, "--delta", tmp_path / "delta", "--out", tmp_path / "out"]
        assert said in refused(capsys, delta.main, words)
    assert not (tmp_path / "out").exists()
    assert "--base" in refused(
        capsys, delta.main, ["make", "--base", tmp_path, "--adapted", base, "--out", tmp_path / "x"]
    )
