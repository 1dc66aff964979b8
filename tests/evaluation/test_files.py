"""Samples from a user's file, and what is said of a wrong one."""

import json

import pytest

from sparsed.chat import encode_chat
from sparsed.evaluation import read_samples
from sparsed.models import load_tokenizer
from sparsed.prompts import demo_path


@pytest.fixture(scope="module")
def llada():
    return load_tokenizer(demo_path("llada"))


def test_a_users_file_is_read(tmp_path, llada):
    file = tmp_path / "mine.jsonl"
    lines = [
        {"prompt": "Who?", "answers": ["Mara", "Ivo"]},
        {"prompt": "é?", "answers": ["b"], "id": "z", "match": "part"},
    ]
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    first, second = read_samples(file, llada)
    assert (first.id, first.task, first.length, first.index, first.match) == ("mine-1", "mine", None, 0, "all")
    assert (first.prompt, first.answers) == ("Who?", ("Mara", "Ivo"))
    assert (second.id, second.index, second.match, second.prompt) == ("z", 1, "part", "é?")
    assert second.input_ids == encode_chat(llada, "é?")


GOOD = '{"prompt": "a", "answers": ["b"], "id": "one"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"answers": ["b"]}', '"prompt" is missing'),
        ('{"prompt": "a"}', '"answers" is missing'),
        ('{"prompt": 1, "answers": ["b"]}', '"prompt" must be a string'),
        ('{"prompt": " ", "answers": ["b"]}', '"prompt" must be a string'),
        ('{"prompt": "a", "answers": "b"}', '"answers" must be a list'),
        ('{"prompt": "a", "answers": []}', '"answers" must be a list'),
        ('{"prompt": "a", "answers": ["b", ""]}', '"answers" must be a list'),
        ('{"prompt": "a", "answers": ["b"], "match": "any"}', '"match" must be one of all, part'),
        ('{"prompt": "a", "answers": ["b"], "answer": "c"}', "unknown field 'answer'"),
        (GOOD, "the id 'one' is that of line 1, too"),
        (r'{"prompt": "\ud800", "answers": ["b"]}', "not valid Unicode"),
        (b'{"prompt": "\xff", "answers": ["b"]}', "not valid Unicode"),
    ],
)
def test_a_users_mistake_is_named_with_file_and_line(tmp_path, llada, line, message):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(GOOD.encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ValueError) as caught:
        read_samples(file, llada)
    assert str(caught.value).startswith(f"{file}, line 3: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_users_empty_file_is_named(tmp_path, llada):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl: holds no samples"):
        read_samples(file, llada)
