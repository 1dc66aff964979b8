"""Text to ids: documents, what is held out, what is left out."""

import json

import numpy as np

from benchmarks.fidelity import windows as fidelity_windows
from demo.real import adapt, text
from sparsed.evaluation.fidelity.documents import read_ids
from sparsed.models import load_tokenizer
from tests.helpers.real_recipe import SENTENCES, refused


def test_ids_are_the_documents_and_end_with_0(base, ids_file):
    tokenizer, found = load_tokenizer(base), []
    record = json.loads((ids_file.parent / "text.json").read_text())
    for part in ("train", "held-out"):
        ids = read_ids(ids_file.with_name(f"{part}.bin.xz"))
        documents = np.split(ids, np.flatnonzero(ids == 0) + 1)
        assert len(documents.pop()) == 0 and len(documents) == record[f"{part} documents"] > 0
        assert len(ids) == record[f"{part} tokens"]
        found += [tokenizer.decode(document[:-1]) for document in documents]
    assert sorted("\n\n".join(found).split("\n\n")) == sorted(SENTENCES) and len(found) == record["files"]
    assert len(fidelity_windows(ids, 64, 16, 10, 3)) > 0


def test_the_text_of_a_special_token_is_no_end(base):
    tokenizer = load_tokenizer(base)
    (ids,) = text.tokenised(tokenizer.backend_tokenizer, ["a <|endoftext|> and a <|mask|>"])
    assert (ids == 0).sum() == 1 and ids[-1] == 0 and 3 not in ids
    assert tokenizer.decode(ids[:-1]) == "a <|endoftext|> and a <|mask|>"


def test_long_paragraphs_are_taken_from_later_documents_but_not_from_their_own():
    long, other = "A long paragraph. " * 8 + "End.", "Another long one. " * 8 + "End."
    texts = [f"Title\n\n{long}\n\n{other}\n\n{long}", f"Title\n\n{long.replace(' ', '  ')}\n\nMore", long]
    first, second, third = text.deduplicated(texts)
    assert first == texts[0] and second == "Title\n\nMore" and third == ""


def test_what_is_held_out_follows_from_text_and_seed_alone():
    texts = [f"Document {index}" for index in range(2000)]
    for share in (0.0, 0.1, 1.0):
        drawn = [text.is_held_out(one, share, 7) for one in texts]
        assert abs(np.mean(drawn) - share) < 0.03
        assert drawn[::-1] == [text.is_held_out(one, share, 7) for one in texts[::-1]]
    assert drawn != [text.is_held_out(one, 0.1, 8) for one in texts]


def test_what_shares_a_run_with_the_judge_s_text_is_left_out(base, tmp_path, capsys):
    words = load_tokenizer(base).encode(" ".join(SENTENCES * 3))[: 3 * text.RUN]
    np.array([0, *words[5 : 5 + text.RUN], 0], "<u2").tofile(tmp_path / "judge.bin")
    sharing, near = words[: text.RUN + 5], words[: text.RUN + 4]
    for name, ids in (("sharing", sharing), ("near", near)):
        (tmp_path / f"{name}.txt").write_text(load_tokenizer(base).decode(ids))
    files = [str(tmp_path / f"{name}.txt") for name in ("sharing", "near")]
    flags = ["--checkpoint", str(base), "--out", str(tmp_path / "out"), "--shortest", "1", "--held_out", "0"]
    for apart, left in ((["--apart", str(tmp_path / "judge.bin")], [near]), ([], [sharing, near])):
        assert text.main([*files, *flags, *apart]) == 0
        ids = read_ids(tmp_path / "out" / "train.bin.xz")
        assert ids.tolist() == [one for document in left for one in (*document, 0)]
        record = json.loads((tmp_path / "out" / "text.json").read_text())
        assert record.get("documents left out", 0) == 2 - len(left)
    capsys.readouterr()
    said = refused(capsys, text.main, [files[0], *flags, "--apart", tmp_path / "judge.bin"])
    assert "--apart" in said and "every document" in said


def test_wrong_text_is_refused(base, tmp_path, capsys):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    common = ["--checkpoint", base, "--out", tmp_path / "out"]
    assert "PATH: no document" in refused(capsys, text.main, [tmp_path, *common])
    assert "No such file" in refused(capsys, text.main, [tmp_path / "nothing", *common])
    assert "--checkpoint" in refused(capsys, text.main, [tmp_path, "--checkpoint", tmp_path, "--out", tmp_path])
    (tmp_path / "judge.txt").write_text("some text")
    for file in ("nothing", "judge.txt"):
        assert "--apart" in refused(capsys, text.main, [tmp_path, *common, "--apart", tmp_path / file])
    for content, name, said in (
        (b"abc", "x.bin", "3 bytes"),
        (b"ab", "x.bin.xz", "not an xz"),
        (b"\xff\xff", "x.bin", "65535"),
    ):
        (tmp_path / name).write_bytes(content)
        words = ["--checkpoint", base, "--tokens", tmp_path / name, "--out", tmp_path / "out"]
        assert said in refused(capsys, adapt.main, words)
