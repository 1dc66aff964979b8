"""How the record tells an answer's history: who was committed when, and what each token looks like."""

import pytest
import torch

from sparsed import load_tokenizer
from sparsed.chat import Speller, decode
from sparsed.cli.recording import history
from tests.helpers.sampling_cases import GENERATE, head_of, options_of
from tests.helpers.standins import MASK, tiny_dream, tiny_llada
from tests.helpers.tiny_folders import special_id, tiny_folder


@pytest.fixture(scope="module", params=["dream", "llada"])
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("checkpoint") / request.param, request.param))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"steps": 20}], ids=str)
@pytest.mark.parametrize("family", ["dream", "llada"])
@pytest.mark.parametrize("often_masks", [False, True])
def test_the_history_replays_to_the_answer(family, options, often_masks):
    """Also where the model draws the mask token, and positions stay open for another step, or for ever."""
    model = {"dream": tiny_dream, "llada": tiny_llada}[family]()
    if often_masks:
        head_of(model).weight.data[MASK] = 1.05 * head_of(model).weight.data.mean(0) * len(head_of(model).weight)
    prompt, steps = torch.randint(0, 90, (1, 14)), []
    options = options_of(family, {"gen_length": 16, "steps": 8} | options)
    tokens = GENERATE[family](model, prompt, on_step=steps.append, **options)[0, 14:].tolist()
    told = history(steps, tokens, 14)
    assert len(told) == options["steps"]
    assert sorted(position for entry in told for position, _, _ in entry) == list(range(16))
    replayed = [MASK] * 16
    for entry in told:
        assert [position for position, _, _ in entry] == sorted(position for position, _, _ in entry)
        for position, token, confidence in entry:
            replayed[position] = token
            assert token == MASK if confidence is None else 0 <= confidence <= 1
    assert replayed == tokens
    if often_masks:
        assert MASK in tokens, "the case tests nothing"


def test_pieces_join_to_the_text(tokenizer):
    family = "dream" if "<|im_end|>" in tokenizer.get_vocab() else "llada"
    end = "<|im_end|>" if family == "dream" else "<|eot_id|>"
    words = tokenizer.encode("déjà vu, 象 🙂 x", add_special_tokens=False)
    ids = [*words, special_id(family, end), 100_000, *words[:3]]
    pieces = Speller(tokenizer).pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == decode(tokenizer, ids, special=True)
    assert pieces[len(words)] == end and pieces[len(words) + 1] == ""


def test_a_split_character_stands_at_its_last_token(tokenizer):
    """The tiny vocabularies have bytes alone, so every character beyond ASCII is split."""
    ids = tokenizer.encode("a象🙂", add_special_tokens=False)
    assert len(ids) == 1 + 3 + 4
    speller = Speller(tokenizer)
    assert speller.pieces(ids) == ["a", "", "", "象", "", "", "", "🙂"]
    # one that breaks off is a replacement at its last token, or where another such begins
    assert speller.pieces([*ids[:3], ids[0]]) == ["a", "", "\ufffd", "a"]
    assert speller.pieces([*ids[:3], *ids[1:4]]) == ["a", "", "", "\ufffd", "", "象"]
    assert speller.pieces(ids[:3]) == ["a", "", "\ufffd"]
    assert speller.pieces([]) == []


def test_pieces_of_any_bytes_join_to_the_text(tokenizer):
    ids = torch.randint(0, len(tokenizer), (400,)).tolist()
    pieces = Speller(tokenizer).pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == decode(tokenizer, ids, special=True)
