"""The demo models' training data: exact ids, sources that hold the answers, masks, and nothing that is held out."""

import re

import pytest

from demo.data import HEADS, IGNORE, KINDS, ONE_SHOT, SOURCES, Builder, batches
from demo.tasks import PUZZLES
from sparsed.evaluation.texts import key_held_out, number_held_out
from sparsed.models import load_tokenizer
from sparsed.prompts import demo_path, language

KEY = r"the (\w+) (\w+)"


@pytest.fixture(scope="module", params=["dream", "llada"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(family):
    return load_tokenizer(demo_path(family))


@pytest.fixture(scope="module")
def builder(family, tokenizer):
    return Builder(language(), tokenizer.backend_tokenizer, family, "test")


def drawn(builder, length, gen_length):
    """Sequences of every kind, a few each."""
    for kind, hay in PUZZLES:
        for _ in range(4):
            yield builder.puzzle(kind, hay, length, gen_length)
    for _ in range(8):
        yield builder.document(length, 8, gen_length, 0.5)


def words(tokenizer, sequence, places):
    return [tokenizer.decode([sequence.ids[place]]).strip() for place in places]


@pytest.mark.parametrize("length, gen_length", [(300, None), (600, None), (400, 64), (4096, None)])
def test_ids_are_the_tokenizers_own_and_of_the_length(builder, tokenizer, length, gen_length):
    for sequence in drawn(builder, length, gen_length):
        assert len(sequence.ids) == length
        assert tokenizer(tokenizer.decode(sequence.ids), add_special_tokens=False)["input_ids"] == sequence.ids
        for answer in sequence.answers:
            assert answer.padded == (answer.end if gen_length is None else answer.start + gen_length)
            assert all(answer.start <= slot < answer.end for slot in answer.slots)


@pytest.mark.parametrize("length, gen_length", [(300, None), (600, None), (400, 64), (1200, None)])
def test_rows_look_at_what_they_predict(builder, length, gen_length):
    for sequence in drawn(builder, length, gen_length):
        copied = [pair for head in SOURCES for pair in sequence.pairs[head]]
        assert all(sequence.ids[row + builder.chat.shift] == sequence.ids[source] for row, source in copied)
        slots = {slot for answer in sequence.answers for slot in answer.slots}
        assert {row + builder.chat.shift for row, _ in copied} == slots


def asked_keys(text):
    return re.findall(KEY, text.rsplit(" of ", 1)[1].split("?")[0])


@pytest.mark.parametrize("kind, hay", PUZZLES)
def test_rows_look_at_what_is_asked(builder, tokenizer, kind, hay):
    for _ in range(5):
        sequence = builder.puzzle(kind, hay, 600, 64)
        answer, text = sequence.answers[0], tokenizer.decode(sequence.ids)
        rows = [slot - builder.chat.shift for slot in answer.slots]
        head = dict(sequence.pairs[{"codes": "keys", "things": "sets"}.get(kind, "names")])
        found = words(tokenizer, sequence, [head[row] for row in rows])
        if kind == "things":
            things = words(tokenizer, sequence, answer.slots)
            assert found == [re.search(r"number \d{4}(\d)", text)[1], *things[:-1]]
        else:
            codes = len(rows) // 7
            keys = [second for _, second in asked_keys(text)]
            assert found == [key for key in keys * (codes // len(keys)) for _ in range(7)]
            assert codes == {"code": 1, "codes": 4, "values": 4}[kind]


def test_the_texts_digits_look_at_their_key(builder, tokenizer):
    sequence = builder.puzzle("codes", "essay", 600, 64)
    first = sequence.answers[0].start - 1
    pairs = [(row, source) for row, source in sequence.pairs["names"] if row < first]
    text = tokenizer.decode(sequence.ids)
    looked = {}
    for row, source in sorted(pairs):
        if sequence.ids[row] in builder.teller.digits:
            key = tokenizer.decode(sequence.ids[source - 1 : source + 1]).strip()
            looked[key] = looked.get(key, "") + tokenizer.decode([sequence.ids[row]])
    assert looked == dict(re.findall(r"The code of the (\w+ \w+) is (\d{7})\.", text)) and len(looked) == 4


def test_codes_of_one_key_look_at_the_code_before(builder, tokenizer):
    sequence = builder.puzzle("values", "essay", 600, 64)
    chains = dict(sequence.pairs["chains"])
    rows = sorted(row for row in chains if row < sequence.answers[0].start - 1)
    ends = [rows[index] for index in (6, 13, 20)]
    assert [chains[row] for row in rows[7:]] == [end for end in ends for _ in range(7)]
    assert {tokenizer.decode([sequence.ids[chains[row]]]).isalpha() for row in rows[:7]} == {False}


def test_nothing_held_out_is_met(builder, tokenizer):
    first, last = (set(language().words[name]) for name in ("first", "last"))
    keys = numbers = 0
    for sequence in drawn(builder, 1200, None):
        text = tokenizer.decode(sequence.ids)
        for key in re.findall(rf"codes? of {KEY}", text):
            assert not key_held_out(key)
            keys += 1
        for number in re.findall(r"have the number (\d{5})\?", text):
            assert not number_held_out(int(number))
            numbers += 1
        names = re.findall(r"(?=([A-Z]\w+) ([A-Z]\w+))", text)
        assert not any(language().held_out(name) for name in names if name[0] in first and name[1] in last)
    assert keys > 100 and numbers > 5


def test_masks_are_those_of_decoding(builder):
    """Whatever counts is masked and follows only what is shown, or is a whole answer from nothing."""
    counted = {True: 0, False: 0}
    for sequence in [*drawn(builder, 600, None), *drawn(builder, 400, 64)] * 5:
        for answer in sequence.answers:
            masked, counts = builder._masked(answer)
            assert masked and set(masked) <= set(range(answer.start, answer.padded))
            assert counts <= set(masked)
            alone = answer.kind in ONE_SHOT
            if counts and alone:
                assert masked == list(range(answer.start, answer.padded))
                assert counts == set(range(answer.start, answer.end))
            elif counts:
                assert counts == {min(masked)} and counts <= set(answer.slots)
            counted[alone] += bool(counts)
    assert counted[True] > 100 and counted[False] > 100


def test_batches_have_the_logit_rows_of_what_is_masked(builder):
    kinds = set()
    stream = batches(builder, lambda: 512, 4096)
    for _ in range(30):
        batch = next(stream)
        count, length = batch["ids"].shape
        assert count * length <= 1.1 * 4096
        rows, columns = batch["rows"] // length, batch["rows"] % length + builder.chat.shift
        assert (batch["ids"][rows, columns] == builder.chat.mask).all()
        assert (batch["ids"] == builder.chat.mask).sum() == len(batch["targets"]) == len(batch["weights"])
        assert batch["links"].shape[:2] == (len(HEADS), count)
        rows, sources = batch["links"][..., 0], batch["links"][..., 1]
        assert (rows >= 0).all() and (rows < length).all() and (sources >= IGNORE).all() and (sources < length).all()
        kinds |= {KINDS[kind] for kind in batch["kinds"]}
    assert kinds == set(KINDS)
