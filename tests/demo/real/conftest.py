"""The recipe's products on a tiny Llama: its GGUF file, the converted checkpoint, the ids of a tiny text."""

import pytest

from demo.real import convert, text
from tests.helpers.real_recipe import SENTENCES
from tests.helpers.tiny_gguf import metadata, tiny_llama, write_gguf


@pytest.fixture(scope="session")
def gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", metadata(), tiny_llama()[0])


@pytest.fixture(scope="session")
def base(gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    assert convert.main(["--gguf", str(gguf), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def ids_file(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for start in range(0, len(SENTENCES), 4):
        (folder / f"{start}.txt").write_text("\n\n".join(SENTENCES[start : start + 4]))
    words = [str(folder), "--checkpoint", str(base), "--out", str(folder / "ids"), "--held_out", "0.3"]
    assert text.main(words) == 0
    return folder / "ids" / "train.bin.xz"
