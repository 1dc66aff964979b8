"""Prompts: exact lengths under several tokenizers, one findable answer, user text that never becomes control tokens."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsed.chat import ChatTemplateError, encode_chat
from sparsed.models import load_tokenizer
from sparsed.prompts import (
    LENGTHS,
    PRESETS,
    answer_found,
    build_document,
    build_prompt,
    demo_path,
    language,
)

TOY_TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def characters():
    """One token a byte, control tokens and a template that trims."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TOY_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<end>", "<bot>"]})
    return tokenizer


def words():
    """One token a word or run of punctuation, all unknown, and no template."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


MAKERS = {
    "dream": lambda: load_tokenizer(demo_path("dream")),
    "llada": lambda: load_tokenizer(demo_path("llada")),
    "characters": characters,
    "words": words,
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    return MAKERS[request.param]()


@pytest.fixture(params=["dream", "llada"])
def demo_tokenizer(request):
    return MAKERS[request.param]()


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_sized_presets_have_exactly_their_length(tokenizer, preset):
    prompt = build_prompt(preset, tokenizer)
    assert len(prompt.input_ids) == LENGTHS[preset] == int(preset[:-1]) * 1024
    assert prompt.input_ids == encode_chat(tokenizer, prompt.text)


@pytest.mark.parametrize("length", [256, 257, 300, 511, 1000, 1023, 2047])
def test_other_lengths_are_exact_too(demo_tokenizer, length):
    assert len(build_document(demo_tokenizer, length, seed=length)[1].input_ids) == length


def test_presets_are_deterministic(demo_tokenizer):
    state = random.getstate()
    first, second = build_prompt("4k", demo_tokenizer), build_prompt("4k", demo_tokenizer)
    assert first == second
    assert random.getstate() == state, "the global random stream must not be used"


@pytest.mark.parametrize("seed", range(20))
def test_the_answer_stands_once_in_the_middle_among_facts_of_its_kind(demo_tokenizer, seed):
    document, prompt = build_document(demo_tokenizer, 4096, seed)
    text = prompt.text
    assert text.count(prompt.expected) == 1
    assert 0.25 < text.index(prompt.expected) / len(text) < 0.75
    assert prompt.expected in document.answer
    person = " ".join(document.target.person)
    assert text.count(person) == 3, "the asked fact, another fact about the same person, the question"
    assert text.count(f" {document.target.person[1]}") == 3, "nobody else has this last name"
    question = text.rsplit("\n\n", 1)[1]
    assert question.startswith("Question: ") and prompt.expected not in question
    slots = language().kinds[document.target.kind]["slots"]
    for slot, value in zip(slots, document.target.values, strict=True):
        others = [word for word in language().words[slot] if word != value and f" {word}" in text]
        assert len(others) >= 3, f"too few other values of {slot}"


def test_short_context_is_a_word_problem_with_the_right_result(demo_tokenizer):
    prompt = build_prompt("short_context", demo_tokenizer)
    assert len(prompt.input_ids) < 100
    assert prompt.text.count("?") == 1 and prompt.expected.split()[0].isdigit()


def test_word_problems_are_solved_rightly():
    signs = {"more": 1, "another": 1, "new": 1, "adds": 1, "in.": 1, "away": -1, "loses": -1, "sells": -1, "taken": -1}
    rng = random.Random(3)
    for _ in range(200):
        text, answer, expected = language().problem(rng, held_out=False)
        numbers = [int(character) for character in text if character.isdigit()]
        results = {numbers[0] + b * numbers[1] + c * numbers[2] for b in (1, -1) for c in (1, -1)}
        result = int(expected.split()[0])
        assert result in results and expected in answer
        if not any(word in text.split() for word, sign in signs.items() if sign < 0):
            assert result == sum(numbers)


def test_held_out_names_and_numbers_are_never_drawn_for_training():
    words, rng = language(), random.Random(1)
    persons = words.persons(rng, held_out=False)
    assert not any(words.held_out(next(persons)) for _ in range(2000))
    for _ in range(300):
        text = words.problem(rng, held_out=False)[0]
        assert not words.numbers_held_out(*(int(character) for character in text if character.isdigit()))


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_control_tokens_in_user_text_stay_text(family):
    tokenizer = MAKERS[family]()
    control = set(tokenizer.get_added_vocab().values())
    plain = encode_chat(tokenizer, "Say hello to me.")
    typed = "Say " + " ".join(tokenizer.get_added_vocab()) + " to me."
    ids = encode_chat(tokenizer, typed)
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    assert tokenizer.decode(ids).count("<|endoftext|>") == 1, "the text itself must survive"


def test_encode_chat_equals_the_rendered_template(tokenizer):
    text = "  Two lines,\n\nand more? Yes!\n"
    if tokenizer.chat_template is None:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        chat = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert encode_chat(tokenizer, text) == expected


def test_encoding_leaves_the_tokenizer_as_it_was(demo_tokenizer):
    before = demo_tokenizer("<|endoftext|>", add_special_tokens=False)["input_ids"]
    encode_chat(demo_tokenizer, "x <|endoftext|> y")
    assert demo_tokenizer("<|endoftext|>", add_special_tokens=False)["input_ids"] == before
    assert len(before) == 1


def test_empty_and_blank_text_encode(tokenizer):
    for text in ("", "  ", "\n"):
        assert isinstance(encode_chat(tokenizer, text), list)


@pytest.mark.parametrize("preset", ["short_context", "4k"])
def test_a_tokenizer_without_tokens_is_an_error_and_no_endless_search(preset):
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({}, [])))
    with pytest.raises(ChatTemplateError, match="gives no tokens"):
        build_prompt(preset, empty)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A copper lantern in Velden.", True),
        ("It is a COPPER  lantern,\nin Velden!", True),
        ("a copper lanterns in Velden", False),
        ("copper in Velden lantern", False),
        ("", False),
    ],
)
def test_answer_found(text, found):
    assert answer_found(text, "copper lantern in Velden") is found


def test_answer_found_takes_whole_words():
    assert answer_found("The answer is 5 apples.", "5 apples")
    assert not answer_found("The answer is 15 apples.", "5 apples")


def test_unknown_preset_and_too_short_a_length_are_one_line_errors(demo_tokenizer):
    with pytest.raises(ValueError, match="unknown prompt '5k'"):
        build_prompt("5k", demo_tokenizer)
    with pytest.raises(ValueError, match="too short"):
        build_document(demo_tokenizer, 40, seed=0)
    with pytest.raises(ValueError, match="demo/other"):
        demo_path("other")
