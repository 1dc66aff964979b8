"""What `sparsed.evaluation.fidelity` measures on: documents, windows, planted and repeated passages, the reach."""

import lzma
import random

import numpy as np
import pytest
import torch

from sparsed import SparseDConfig
from sparsed.blocks import BlockGrid
from sparsed.evaluation.fidelity.documents import Document, check_ids, read_documents
from sparsed.evaluation.fidelity.gate import Gate
from sparsed.evaluation.fidelity.windows import LEAD, PASSAGE, Window, planted, repeated, repetitions, text_window
from sparsed.evaluation.methods import METHODS
from sparsed.models import load_tokenizer
from tests.helpers.tiny_folders import tiny_folder


def packed(*numbers):
    return np.array(numbers, "<u2").tobytes()


def test_documents_of_ids_and_of_text(tmp_path):
    tokenizer = load_tokenizer(tiny_folder(tmp_path / "model", "dream"))
    for name, content in (
        ("a.bin", packed(5, 6, 0, 7, 0, 8)),
        ("b.bin.xz", lzma.compress(packed(9, 300, 0))),
        ("c.txt", "\ufeffab<|mask|>".encode()),
    ):
        (tmp_path / name).write_bytes(content)
    found = read_documents([tmp_path / name for name in ("a.bin", "b.bin.xz", "c.txt")], tokenizer)
    assert {one.name: one.tokens.tolist() for one in found[:-1]} == {
        "a.bin:0": [5, 6, 0],
        "a.bin:1": [7, 0],
        "a.bin:2": [8],
        "b.bin.xz:0": [9, 300, 0],
    }
    text = found[-1]
    # a control token in a text is text: a token for each of its bytes
    assert text.name == "c.txt" and len(text.tokens) == 10 and text.tokens.max() < 256
    check_ids(found, 301)
    with pytest.raises(ValueError, match="b.bin.xz:0 has the id 300, beyond the vocabulary of 300"):
        check_ids(found, 300)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("odd.bin", b"abc", "odd.bin must hold ids of two bytes each, but has 3 bytes"),
        ("empty.bin", b"", "has 0 bytes"),
        ("broken.bin.xz", b"abcd" * 9, "broken.bin.xz is not an .xz file"),
        ("cut.bin.xz", lzma.compress(packed(*range(99)))[:-9], "cut.bin.xz is cut off"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_documents([tmp_path / name], None)


def test_files_of_one_name_are_refused(tmp_path):
    files = [tmp_path / folder / "a.bin" for folder in "xy"]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(packed(1, 0))
    with pytest.raises(ValueError, match="two files are called a.bin"):
        read_documents(files, None)


def test_a_canvas_hides_what_comes_last_in_the_order():
    window = Window("d", torch.arange(1, 11), torch.tensor([9, 6, 8, 7]))
    assert window.canvas(1, 99).tolist() == [[1, 2, 3, 4, 5, 6, 99, 99, 99, 99]]
    assert window.canvas(0.5, 99).tolist() == [[1, 2, 3, 4, 5, 6, 7, 99, 99, 10]]
    assert window.masked(0.5).tolist() == window.measured(0.5).tolist() == [7, 8]
    counted = torch.tensor([False] * 8 + [True] * 2)
    assert Window("d", window.tokens, window.order, counted=counted).measured(0.5).tolist() == [8]


def document(length, name="d", seed=0):
    return Document(name, np.random.default_rng(seed).integers(1, 10_000, length))


def test_a_window_is_the_document_s_first_tokens_and_the_same_every_time():
    found, again = (text_window(document(50), 30, 8) for _ in range(2))
    assert found.tokens.tolist() == document(50).tokens[:30].tolist()
    assert sorted(found.order.tolist()) == list(range(22, 30)) and found.order.tolist() == again.order.tolist()
    assert text_window(document(50, "e"), 30, 8).order.tolist() != found.order.tolist(), "each document has its own"


@pytest.mark.parametrize("far", [60, 100, 152])
def test_a_planted_copy_is_that_far_before(far):
    window = text_window(document(200), 200, 32)
    copy = planted(window, far)
    changed = (copy.tokens != window.tokens).nonzero()[:, 0].tolist()
    first, size = changed[0], 32 + LEAD
    assert changed == list(range(first, first + size)) and first + far <= 200 - size
    assert copy.tokens[first : first + size].tolist() == window.tokens[-size:].tolist()
    assert copy.order.tolist() == window.order.tolist() and (copy.kind, copy.far) == ("planted", far)


def test_without_room_nothing_is_planted():
    assert planted(text_window(document(200), 200, 32), 153) is None


def test_repetitions_by_brute_force():
    rng = random.Random(0)
    for _ in range(20):
        tokens = np.array([rng.randrange(1000) for _ in range(90)])
        for _ in range(4):
            size, start, to = rng.randint(PASSAGE - 2, PASSAGE + 5), rng.randrange(70), rng.randrange(70)
            tokens[to : to + size] = tokens[start : start + size]
        expected = [False] * 90
        passages = [tuple(tokens[at : at + PASSAGE]) for at in range(91 - PASSAGE)]
        for at, passage in enumerate(passages):
            others = [at - other for other, same in enumerate(passages) if same == passage and other != at]
            earlier = [distance for distance in others if distance > 0]
            if earlier and min(map(abs, others)) >= 20 and min(earlier) <= 60:
                expected[at : at + PASSAGE] = [True] * PASSAGE
        assert repetitions(tokens, 20, 60).tolist() == expected


def test_the_window_with_the_most_repetitions_is_taken():
    one = document(300)
    one.tokens[200:210] = one.tokens[20:30]  # 180 before
    one.tokens[270:290] = one.tokens[110:130]  # 160 before
    found = repeated(one, 220, 32, 100)
    places = found.measured(1.0)
    assert found.tokens[places].tolist() == one.tokens[270:290].tolist() and places.min() >= 220 - 32
    assert (found.kind, found.far, len(found.tokens)) == ("repeated", 100, 220)
    assert repeated(document(300), 220, 32, 100) is None


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("select", [0.1, 0.3, 0.45])
def test_no_token_of_a_planted_copy_is_in_the_gate_s_window(block_size, select):
    length, new_tokens = 512, 48
    gate = Gate.of([SparseDConfig(0.2, select, block_size), SparseDConfig(0.2, 1.0, block_size)], length, new_tokens)
    assert gate.window.config == SparseDConfig(0.0, select, block_size)
    assert gate.far >= 256, "half of what is shorter than 2,048"
    grid = BlockGrid(length, length - new_tokens, block_size)
    pattern = METHODS["window"].rule.select(torch.zeros(1, 1, length, 4), None, grid, select)
    for token in range(length - new_tokens, length):
        read = pattern.indices[0, 0, token // block_size].tolist()
        assert (token - gate.far) // block_size not in read


def test_the_gate_s_window_is_the_densest_without_dense_answer_rows():
    configs = [SparseDConfig(0.2, select, 16, dense) for select in (0.1, 0.5, 0.3) for dense in (False, True)]
    assert Gate.of(configs, 4096, 128).window.config == SparseDConfig(0.0, 0.5, 16)
    near = Gate.of([SparseDConfig(0.2, select, 16) for select in (0.05, 0.2, 0.1)], 4096, 128)
    assert near.window.config.select == 0.2 and near.far == 1024, "out of the reach of all of them"
    assert Gate.of(configs[1:2], 4096, 128).window.config == SparseDConfig(0.0, 0.1, 16)
    assert Gate.of([SparseDConfig(0.2, 1.0, 16)], 4096, 128) is None
