"""RULER's tasks: exact lengths, and answers that a reader written here, with regular expressions, finds in the text."""

import random
import re
from collections import Counter

import pytest

from sparsed.chat import encode_chat
from sparsed.evaluation import TASKS, make_sample, score
from sparsed.evaluation.puzzles import tracking
from sparsed.evaluation.tasks import sample_id
from sparsed.evaluation.texts import key_held_out, key_words
from sparsed.models import load_tokenizer
from sparsed.prompts import demo_path, language

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NEEDLE = re.compile(rf"(The|A) code of (the \w+ \w+|{UUID}) is (\d{{7}}|{UUID})\.")
# keys told, keys asked, values of each key; None: as many as fit
NEEDLES = {
    "niah_single_1": (1, 1, 1),
    "niah_single_2": (1, 1, 1),
    "niah_single_3": (1, 1, 1),
    "niah_multikey_1": (4, 1, 1),
    "niah_multikey_2": (None, 1, 1),
    "niah_multikey_3": (None, 1, 1),
    "niah_multivalue": (1, 1, 4),
    "niah_multiquery": (4, 4, 1),
}
# what each kind of fact says, and how a question names the person by it; from the English, not from the templates
FACTS = {
    "keep": r"(?:keeps|still stores|hid|left) a (\w+ \w+ in \w+)\.",
    "pet": r"(?:has|looks after|adopted|owns) a (\w+ \w+ (?:called|named) \w+)\.",
    "code": r"(?:with the code|the password) (\w+ \w+ \w+)\.",
    "work": r"(?:works as|is|is employed as|served as) a (\w+ \w+ at the \w+)\.",
    "travel": r"(?:travels|plans a journey|goes|gets) to (\w+ by \w+ in \w+)\.",
    "meal": r"(?:orders|always eats|wants|chose) a (\w+ \w+ with \w+)\.",
}
NAME = r"([A-Z]\w+ [A-Z]\w+)"
CODE_OF = re.compile(rf"(?:code|password) of {NAME} is (\w+ \w+ \w+)\.")
QUESTIONS = {
    "keep": "keep|leave|hide",
    "pet": "pet|animal",
    "code": "What is the code of|Which password|With which code",
    "work": "job|work do|employed",
    "travel": "travel|journey|To which land",
    "meal": "order for dinner|choose at the inn|always eat",
}


@pytest.fixture(scope="module", params=["dream", "llada"])
def tokenizer(request):
    return load_tokenizer(demo_path(request.param))


@pytest.fixture(scope="module")
def llada():
    return load_tokenizer(demo_path("llada"))


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def samples(name, tokenizer, length=4096, count=5):
    return [make_sample(TASKS[name], tokenizer, length, 0, index) for index in range(count)]


def parts(sample):
    """The text and the question."""
    _, text, question = re.fullmatch(r"(.*?)\n\n(.*)\n\n(Question: .*)", sample.prompt, re.DOTALL).groups()
    return text, question


def test_there_are_the_thirteen_with_their_answers_lengths():
    names = "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue"
    assert list(TASKS) == [*names.split(), "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"]
    assert [task.gen_length for task in TASKS.values()] == [128] * 8 + [32, 128, 64, 32, 32]
    assert [task.match for task in TASKS.values()] == ["all"] * 11 + ["part"] * 2


@pytest.mark.parametrize("length", [1024, 1025, 2048, 4096])
def test_samples_have_exactly_their_length(task, tokenizer, length):
    sample = make_sample(task, tokenizer, length, 3, 5)
    assert len(sample.input_ids) == sample.length == length
    assert sample.input_ids == encode_chat(tokenizer, sample.prompt)
    assert sample.id == sample_id(task, length, 3, 5) == f"{task.name}-{length}-3-5"
    assert (sample.task, sample.index, sample.match) == (task.name, 5, task.match)
    # the stretched ending takes less than two sentences, which are long with UUIDs
    ending = re.search(r"\. And( and)*\.\n\nQuestion", sample.prompt)[0]
    assert ending.count(" and") < (100 if task.name == "niah_multikey_3" else 40)


def test_samples_follow_from_seed_and_index_alone(task, llada):
    state = random.getstate()
    first, again = make_sample(task, llada, 1024, 0, 0), make_sample(task, llada, 1024, 0, 0)
    assert first == again
    assert random.getstate() == state, "the global random stream must not be used"
    others = [make_sample(task, llada, 1024, 0, 1), make_sample(task, llada, 1024, 1, 0)]
    assert len({sample.prompt for sample in (first, *others)}) == 3
    assert len({sample.answers for sample in (first, *others)}) == 3


def test_too_short_a_length_is_one_line(task, llada):
    with pytest.raises(ValueError, match=rf"^a prompt of 40 tokens is too short for {task.name}: .*at least \d+$"):
        make_sample(task, llada, 40, 0, 0)


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_tell_what_is_asked(name, tokenizer):
    told, asked, values = NEEDLES[name]
    for sample in samples(name, tokenizer):
        text, question = parts(sample)
        found = [(key, value) for _, key, value in NEEDLE.findall(text)]
        codes = [value for _, value in found]
        assert len(set(codes)) == len(codes), "two needles have one value"
        keys = [key for key, _ in found]
        assert set(Counter(keys).values()) == {values}
        assert len(set(keys)) == told if told else len(keys) > 40
        wanted = re.findall(rf"the \w+ \w+|{UUID}", question.split(" of ", 1)[1])
        assert len(wanted) == asked
        assert list(sample.answers) == [value for key in wanted for known, value in found if known == key]
        assert len(sample.answers) == asked * values
        assert (len(sample.answers[0]) == 36) == (name in ("niah_single_3", "niah_multikey_3"))
        assert wanted[0].startswith("the ") == (name != "niah_multikey_3")


def test_haystacks_are_noise_an_essay_or_needles(llada):
    kinds = {}
    for name in NEEDLES:
        text, _ = parts(samples(name, llada, count=1)[0])
        sentences = re.findall(r"\S[^.]*\.", NEEDLE.sub("", re.sub(r" And and.*", "", text)))
        kinds[name] = (len(set(sentences)), any(re.search(NAME, sentence) for sentence in sentences))
    assert kinds.pop("niah_single_1") == (3, False)
    assert kinds.pop("niah_multikey_2") == kinds.pop("niah_multikey_3") == (0, False)
    assert all(different > 100 and people for different, people in kinds.values())


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2", "qa_1", "qa_2"])
def test_what_is_asked_stands_at_any_depth(name):
    thirds = Counter()
    for seed in range(150):
        puzzle = TASKS[name].build(random.Random(seed), 50, held_out=True)
        text = " ".join(puzzle.sentences)
        assert text.count(puzzle.answers[0]) == 1
        thirds[int(3 * text.index(puzzle.answers[0]) / len(text))] += 1
    assert min(thirds[0], thirds[1], thirds[2]) >= 30


def chain(text, value):
    """Names in the order in which they get `value`."""
    numbers = {}
    for name, source in re.findall(r"Set (\w+) to (\w+)\.", text):
        assert name not in numbers, "set twice"
        numbers[name] = source if source.isdigit() else numbers[source]
    return [name for name, number in numbers.items() if number == value]


def test_variables_hold_what_the_chain_says(tokenizer):
    for sample in samples("vt", tokenizer):
        text, question = parts(sample)
        held = chain(text, re.search(r"\d{5}", question)[0])
        assert list(sample.answers) == held and len(held) == 5
        sources = [source for _, source in re.findall(r"Set (\w+) to (\w+)\.", text)]
        assert sources[1:] == held[:-1], "each hop takes the one before"


def test_several_chains_stay_apart():
    for seed in range(20):
        puzzle = tracking(random.Random(seed), 40, held_out=False, chains=3, hops=2)
        value = re.search(r"\d{5}", puzzle.question)[0]
        assert list(puzzle.answers) == chain(" ".join(puzzle.sentences), value) and len(puzzle.answers) == 3
        assert len(re.findall("Set ", puzzle.text())) == 9


@pytest.mark.parametrize(("length", "common", "others"), [(1024, 6, 1), (2048, 6, 1), (4096, 30, 3), (32768, 30, 3)])
def test_common_words_are_the_most_frequent(llada, length, common, others):
    for sample in samples("cwe", llada, length, count=3):
        text, _ = parts(sample)
        items = re.findall(r"(\d+)\. ([a-z]+ [a-z]+)", text)
        assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
        counts = Counter(item for _, item in items)
        assert {item for item, count in counts.items() if count == common} == set(sample.answers)
        assert len(set(sample.answers)) == 10
        rest = sorted(count for item, count in counts.items() if item not in sample.answers)
        assert len(rest) > 10 and set(rest[1:]) == {others}, "all but one, which fills the list"
        assert 0 < rest[0] <= others


@pytest.mark.parametrize("length", [1024, 4096, 32768])
def test_frequent_words_follow_the_law(llada, length):
    for sample in samples("fwe", llada, length, count=3):
        text, _ = parts(sample)
        words = text.partition(".")[0].split()
        counts = Counter(words).most_common()
        assert counts.pop(0)[0] == "-"
        assert tuple(word for word, _ in counts[:3]) == sample.answers
        assert counts[2][1] > counts[3][1], "the third must be the third alone"
        for rank, (_, count) in enumerate(counts[:5], 2):
            assert count == pytest.approx(len(words) / 1.6449 / rank**2, abs=1)


def facts(text):
    """(kind, person, values) of all the facts of a text."""
    found = [("code", *match) for match in CODE_OF.findall(text)]
    for sentence in re.findall(r"[^.]+\.", text):
        for kind, pattern in FACTS.items():
            if match := re.search(rf"{NAME}.*? {pattern}$", sentence):
                found.append((kind, match[1], match[2].replace(" named ", " called ")))
    return found


def read_answer(sample):
    """What the text says about the person whom the question names or describes."""
    text, question = parts(sample)
    told = facts(text)
    person = re.search(NAME, question.removeprefix("Question: "))
    if sample.task == "qa_1":
        persons = [person[1]]
    else:
        clues = [person for _, person, values in told if values in question]
        assert len(clues) == 1, "the description fits one fact"
        persons = clues
    for clue in (values for _, known, values in told if known == persons[0]):
        question = question.replace(clue, "")
    question = re.sub(r"the person (who \w+|with)( a| to| the code)?", "", question)
    kinds = [kind for kind, pattern in QUESTIONS.items() if re.search(pattern, question)]
    assert len(kinds) == 1, question
    return [values for kind, known, values in told if (kind, known) == (kinds[0], persons[0])]


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_questions_have_one_answer(name, llada):
    for sample in samples(name, llada, count=20):
        assert read_answer(sample) == list(sample.answers)
        text, question = parts(sample)
        assert sample.answers[0] not in question
        told = facts(text)
        answered = next(fact for fact in told if fact[2] == sample.answers[0])
        assert [known for _, known, _ in told].count(answered[1]) == 2
        last = answered[1].split()[1]
        assert len(re.findall(rf"\b{last}\b", text)) == 2, "nobody else has this last name"
        assert (last in question) == (name == "qa_1"), "two hops do not name the person"
        assert len({(kind, known) for kind, known, _ in told}) == len(told) > 50, "a person has one fact of a kind"


def held_out(sample_or_puzzle, question):
    """Whether what a question names, or for a list the answers, is held out."""
    words = language()
    name = re.search(NAME, question.removeprefix("Question: "))
    if "number" in question:
        return {int(re.search(r"\d{5}", question)[0]) % 8 == 0}
    if "Which ten" in question:
        return {key_held_out(tuple(answer.split())) for answer in sample_or_puzzle.answers}
    if "code of the" in question or "codes of the" in question:
        return {key_held_out(tuple(key.split())) for key in re.findall(r"the (\w+ \w+)", question.split(" of ", 1)[1])}
    return {words.held_out(tuple(name[1].split()))}


@pytest.mark.parametrize("name", [n for n in TASKS if n not in ("niah_multikey_3", "fwe", "qa_2")])
def test_evaluation_asks_what_training_never_meets(name, llada):
    for sample in samples(name, llada, length=1024, count=10):
        assert held_out(sample, parts(sample)[1]) == {True}
    for seed in range(10):
        puzzle = TASKS[name].build(random.Random(seed), 120, held_out=False)
        assert held_out(puzzle, puzzle.question) == {False}
        text = puzzle.text()
        assert not any(language().held_out(tuple(person.split())) for _, person, _ in facts(text))
        if name.startswith("niah"):
            assert not any(key_held_out(tuple(key.split()[1:])) for _, key, _ in NEEDLE.findall(text))
        if name == "cwe":
            assert not any(key_held_out(tuple(key)) for key in re.findall(r"\. ([a-z]+) ([a-z]+)", text))


def test_one_key_in_eight_is_held_out():
    first, second = key_words()
    share = sum(key_held_out((a, b)) for a in first for b in second) / (len(first) * len(second))
    assert share == pytest.approx(1 / 8, abs=0.01)


def test_no_answer_hides_in_another_word(llada):
    """Scores look for answers anywhere in a text, so that 'mill' would be found in 'sawmill'."""
    first, second = key_words()
    for words in (second, language().words["last"]):
        assert not [(a, b) for a in words for b in words if a != b and a in b]
    assert not [(a, b) for a in first for b in first if a != b and b.endswith(a)]
    for word in (*first, *second):
        assert len(llada.tokenize(f" {word}")) == 1, "keys are made for the demo models"


def test_pieces_of_a_puzzle_fit_together(task):
    for seed in range(10):
        puzzle = task.build(random.Random(seed), 120, held_out=False)
        assert score(puzzle.reply, puzzle.answers, "all") == 1.0 and puzzle.reply.endswith(".")
        assert all(sentence in puzzle.text() for sentence in puzzle.sentences)
        assert puzzle.text().endswith(puzzle.question)
        told = [puzzle.sentences[place] for place in puzzle.places]
        if task.family == "aggregation":
            assert told == []
        elif task.family == "question answering":
            assert puzzle.answers[0] in told[-1] and len(told) == int(task.name[-1])
        else:
            assert len(told) == len(puzzle.answers)
            assert all(answer in sentence for answer, sentence in zip(puzzle.answers, told, strict=True))


def test_a_text_needs_no_more_keys_than_there_are():
    with pytest.raises(ValueError, match="needs 20000 different keys, and there are only"):
        TASKS["niah_multikey_2"].build(random.Random(0), 20000, held_out=True)
