"""Reading GGUF, against a writer of the tests' own."""

import numpy as np
import pytest

from demo.real.gguf import read_gguf
from tests.helpers.tiny_gguf import (
    stored,
    write_gguf,
)


@pytest.mark.parametrize("alignment", [32, 8])
def test_gguf_tensors_read_as_the_numbers_that_their_blocks_mean(tmp_path, alignment):
    values = np.random.default_rng(1).normal(size=(3, 64))
    kinds = ("F32", "F16", "Q4_1", "Q8_0")
    written = {kind: stored(values[:2] if kind == "F16" else values, kind) for kind in kinds}
    tensors = {kind: tensor for kind, (tensor, _) in written.items()}
    file = read_gguf(write_gguf(tmp_path / "x.gguf", {}, tensors, alignment))
    for kind, (_, means) in written.items():
        found = file.tensor(kind)
        assert found.dtype == np.float32 and np.array_equal(found, means)
        assert np.abs(found - values[: len(found)]).max() < {"Q4_1": 0.25, "Q8_0": 0.02}.get(kind, 1e-3)


def test_gguf_metadata_of_every_type(tmp_path):
    wanted = {
        0: 255,
        1: -1,
        2: 65535,
        3: -2,
        4: 2**32 - 1,
        5: -3,
        6: 0.5,
        7: True,
        8: "ü",
        10: 2**64 - 1,
        11: -4,
        12: 0.1,
    }
    described = {str(kind): (kind, value) for kind, value in wanted.items()}
    described |= {"list": (9, 5, [1, -1]), "words": (9, 8, ["a", ""]), "none": (9, 4, [])}
    found = read_gguf(write_gguf(tmp_path / "x.gguf", described, {})).metadata
    assert found == {str(kind): value for kind, value in wanted.items()} | {
        "list": [1, -1],
        "words": ["a", ""],
        "none": [],
    }


def test_a_cut_gguf_file_is_refused_wherever_it_is_cut(tmp_path):
    tensors = {"x": stored(np.ones((2, 32)), "Q8_0")[0]}
    whole = write_gguf(tmp_path / "x.gguf", {"a": (8, "b"), "c": (9, 5, [1, 2])}, tensors).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError):
            read_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    "described, tensors, version, said",
    [
        ({}, {}, 1, "version 1; known are 2, 3"),
        ({"a": (99, 1)}, {}, 3, "'a' has values of type 99"),
        ({"a": (9, 9, [])}, {}, 3, "'a' has values of type 9"),
        ({}, {"x": (2, (32,), b"\0" * 18)}, 3, "tensor 'x' has type 2; known are F32 (0)"),
        ({}, {"x": (8, (16, 2), b"\0" * 34)}, 3, "tensor 'x' of sizes [16, 2] does not consist of whole blocks"),
        ({"general.alignment": (4, 0)}, {}, 3, "not a positive whole number"),
    ],
)
def test_what_a_gguf_file_may_not_hold(tmp_path, described, tensors, version, said):
    with pytest.raises(ValueError) as caught:
        read_gguf(write_gguf(tmp_path / "x.gguf", described, tensors, version=version))
    assert said in str(caught.value) and "\n" not in str(caught.value)
