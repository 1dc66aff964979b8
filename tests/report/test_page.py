"""The page about a record: what it says, what it escapes, what it does without, and records that it refuses."""

import json
import re
from html.parser import HTMLParser

import msgspec
import pytest

from sparsed.cli import main_llada
from sparsed.report.__main__ import main as main_report
from sparsed.report.charts import duration, layer_chart, step_chart, ticks
from sparsed.report.page import page
from sparsed.report.record import Layer, RunRecord
from tests.helpers.records import END, made_up_record, made_up_run, of_an_earlier_version

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;<!--\u2028{{ 7 * 7 }}"


class Reader(HTMLParser):
    """Collects a page's elements, and the text inside of the scripts and outside of them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.scripts = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and len(self.scripts) and self.tags[-1] == "script":
            self.scripts[-1] += data
        elif self.lasttag != "style":
            self.text += data

    @property
    def data(self):
        return json.loads(self.scripts[0])

    def says(self, words):
        return words in " ".join(self.text.split())


def test_the_page_of_a_comparison_says_what_differs():
    record = made_up_record("origin", "sparsed")
    sparsed = record["runs"][1]
    sparsed["token_ids"][4], sparsed["pieces"][4] = 7, " hid"
    sparsed["text"], sparsed["answer_found"] = "another", False
    read = Reader(page(record))
    assert read.says("The answers differ.")
    assert read.says("Expected answer 'a loose stone' found with full attention only.")
    assert read.says("The same tokens: 31 of 32 (96.9%), 19 of the answer's 20.")
    assert read.says("The first that differs is number 5: ' hides' with full attention, ' hid' with SparseD.")
    assert read.tags.count("mark") == 2
    # 16 full steps of 0.12 s against 3 of them, one of 0.2 s that selects and 12 sparse ones of 0.05 s
    assert read.says("1.66×") and read.says("2.40×") and read.says("1.92 s")


def test_equal_answers_are_the_same_answer():
    record = made_up_record("origin", "sparsed")
    read = Reader(page(record))
    assert read.says("The same answer.") and read.says("found in both") and "mark" not in read.tags
    assert not read.says("first that differs")


def test_repeats_that_disagree_are_told():
    record = made_up_record("sparsed")
    record["runs"][0]["repeats"] = {"seconds": [1.0, 3.0, 2.0], "median": 2.0, "spread": 2.0, "same_tokens": False}
    assert Reader(page(record)).says("median of 3 runs, which took 1.00 to 3.00 s; their tokens differ")


def test_runs_of_different_step_counts_share_a_page():
    record = made_up_record("origin", "sparsed")
    record["runs"][1] = made_up_run("sparsed", steps=8)
    read = Reader(page(record))
    assert read.says("16 and 8 denoising steps") and read.says("denoising step, 1 to 16")
    assert read.says("2.53×") and not read.says("speed-up, sparse steps")
    assert ("max", "16") in read.attributes
    chart = step_chart([msgspec.convert(run, RunRecord) for run in record["runs"]])
    one, other = ([bar["x"] for bar in row["bars"]] for row in chart["rows"])
    assert other == one[:8], "a step stands at the same place in both rows"


def test_a_run_without_a_schedule_has_a_page():
    """A threshold's or a cache's: any order of phases; steps that commit nothing are idle."""
    record = made_up_record("sparsed")
    (run,) = record["runs"]
    for name in ("step_seconds", "full_steps", "selection_seconds"):
        del run[name]
    order = ["full", "selecting", "sparse", "full", "idle", "sparse", "selecting", "sparse"] * 2
    for forward, phase in zip(run["forwards"], order, strict=True):
        forward.update({"phase": phase} | ({"rows": 0, "seconds": 0.0} if phase == "idle" else {}))
    read = Reader(page(record))
    shown = [phase if phase != "idle" else "sparse" for phase in order]
    assert read.data["replay"][0]["phases"] == shown and read.says("step 5: ran no model")
    classes = {"full": "full_steps", "selecting": "selection", "sparse": "sparse_steps"}
    bars = [bar["phase"] for bar in step_chart([msgspec.convert(run, RunRecord)])["rows"][0]["bars"]]
    assert bars == [classes[phase] for phase in shown]


def test_a_prompt_beyond_the_trained_length_is_said():
    record = made_up_record("origin") | {"beyond_trained_length": True}
    assert Reader(page(record)).says("longer than the 4,096 tokens that this model was trained on")


@pytest.mark.parametrize("place", ["text", "expected", "pieces", "prompt_text", "model_path", "key", "device_name"])
def test_text_stays_text(place):
    record = made_up_record("origin", "sparsed")
    plain = Reader(page(record))
    if place == "pieces":
        for run in record["runs"]:
            run["pieces"][2] = HOSTILE
    elif place == "key":
        record["arguments"][HOSTILE] = 1
    elif place == "device_name":
        record["environment"]["device_name"] = HOSTILE
    elif place in ("prompt_text", "model_path"):
        record["arguments"][place] = HOSTILE
    else:
        for run in record["runs"]:
            run[place] = HOSTILE
    read = Reader(page(record))
    allowed = {"tr", "th", "td"}  # a row more in a table
    assert [tag for tag in read.tags if tag not in allowed] == [tag for tag in plain.tags if tag not in allowed]
    assert "onerror" not in dict(read.attributes)
    assert read.scripts[1:] == plain.scripts[1:]
    if place == "pieces":
        assert read.data["replay"][0]["pieces"][2] == HOSTILE
    if place != "text":  # which stands on the page as its tokens
        assert HOSTILE in read.text


def test_nothing_is_fetched():
    read = Reader(page(made_up_record("origin", "sparsed")))
    links = [value for name, value in read.attributes if name in ("src", "href", "action", "srcset")]
    assert links == ["data:,"]
    assert not re.search(r"https?://|url\(|@import|import\(|fetch\(", page(made_up_record("sparsed")))


def test_full_attention_alone_has_no_pattern():
    read = Reader(page(made_up_record("origin")))
    assert "canvas" not in read.tags and read.data["pattern"] is None and read.data["replay"] is not None
    assert read.says("Full attention reads every block in every step: there is no pattern to show.")


def test_dense_answer_rows_are_named_under_the_picture():
    record = made_up_record("sparsed")
    line = "The generated region's queries, and the one before it, read every key."
    assert not Reader(page(record)).says(line)
    record["arguments"]["dense_answer"] = True
    assert Reader(page(record)).says(line)


def test_the_legend_names_what_the_steps_computed():
    names = ("full attention and selection", "sparse attention")
    both, alone = (Reader(page(made_up_record(*modes))) for modes in (("origin", "sparsed"), ("origin",)))
    assert [both.says(name) for name in names] == [True, True]
    assert [alone.says(name) for name in names] == [False, False]


def test_a_run_that_chose_nothing_has_no_pattern():
    record = made_up_record("sparsed")
    record["runs"][0].update(pattern=None, layers=None, density=None, backend="dense")
    read = Reader(page(record))
    assert "canvas" not in read.tags and read.says("every step of this run used full attention")


@pytest.mark.parametrize("modes", [["origin"], ["sparsed"], ["origin", "sparsed"]])
def test_a_record_of_an_earlier_version(modes):
    record = made_up_record(*modes)
    record["runs"] = list(map(of_an_earlier_version, record["runs"]))
    read = Reader(page(record))
    assert read.data == {"replay": None, "pattern": None}
    assert read.says("of an earlier version, which did not keep what each step committed.")
    assert read.says("did not keep the kept blocks.") and read.says(record["runs"][0]["text"])
    assert "canvas" not in read.tags and "input" not in read.tags


def test_the_page_of_a_64k_run_of_an_8b_model_stays_small():
    sizes = {"tokens": 128, "steps": 128, "layers": 32, "heads": 32, "blocks": (128, 128), "prompt_tokens": 65_536}
    record = made_up_record("origin", "sparsed", **sizes)
    assert 2_500_000 < len(page(record).encode()) < 5_000_000


@pytest.mark.parametrize("highest", [1e-6, 0.003, 0.0041, 0.2, 1.0, 3.7, 59.0, 12345.0])
def test_ticks_are_few_round_and_reach_the_highest(highest):
    marks = ticks(highest)
    assert marks[0] == 0 and len(marks) <= 6 and marks[-2] < highest <= marks[-1] * (1 + 1e-9)
    assert float(f"{marks[1]:.0e}") == pytest.approx(marks[1]) or f"{marks[1]:.1e}".startswith("2.5")


def test_bars_are_as_high_as_their_steps_took():
    run = made_up_run("sparsed")
    chart = step_chart([msgspec.convert(run, RunRecord)])
    (row,) = chart["rows"]
    heights = [float(bar["height"][:-1]) for bar in row["bars"]]
    assert [height / heights[0] for height in heights] == pytest.approx([s / 0.12 for s in run["step_seconds"]], 1e-3)
    assert [bar["phase"] for bar in row["bars"]] == ["full_steps"] * 3 + ["selection"] + ["sparse_steps"] * 12


def test_layers_show_density_and_recall():
    bars = layer_chart([Layer(0.25, 0.75)])["rows"][0]["bars"]
    assert {bar["phase"]: bar["height"] for bar in bars} == {"density": "25.000%", "recall": "75.000%"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 ms"), (0.0042, "4.2 ms"), (0.25, "250 ms"), (1.5, "1.50 s"), (1234, "1,234 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def at(path, value):
    """A change of a record: sets the field at a dotted path, or takes it away if the value is `...`."""

    def change(record):
        *folders, name = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in folders:
            record = record[key]
        if value is ...:
            del record[name]
        else:
            record[name] = value

    return change


def shorter(record):
    """Makes the second run one of two tokens, and of an earlier version."""
    record["runs"][1] = of_an_earlier_version(record["runs"][1]) | {"token_ids": [1, 2]}


WRONG = [
    (at("runs", ...), "Object missing required field `runs`"),
    (at("advice", {}), "this is the record of --advise"),
    (at("runs", []), "runs must be one of mode"),
    (at("runs", {}), "Expected `array`, got `object` - at `$.runs`"),
    (at("runs.0.mode", "dense"), "Invalid enum value 'dense' - at `$.runs[0].mode`"),
    (at("runs.1.mode", "origin"), "runs must be one of mode"),
    (at("runs.0.mode", ["origin"]), "Expected `str`, got `array` - at `$.runs[0].mode`"),
    (at("runs.1.text", 5), "Expected `str`, got `int` - at `$.runs[1].text`"),
    (at("runs.0.seconds", "fast"), "Expected `float`, got `str` - at `$.runs[0].seconds`"),
    (at("runs.0.seconds", True), "Expected `float`, got `bool` - at `$.runs[0].seconds`"),
    (at("runs.0.seconds", 10**400), " - at `$.runs[0].seconds`"),
    (at("runs.0.seconds", -1), "Expected `float` >= 0.0 - at `$.runs[0].seconds`"),
    (at("runs.0.token_ids.3", "x"), "Expected `int`, got `str` - at `$.runs[0].token_ids[3]`"),
    (at("runs.1.token_ids", []), "Expected `array` of length >= 1 - at `$.runs[1].token_ids`"),
    (shorter, "runs[1].token_ids must be as long as the other run's"),
    (at("runs.0.step_seconds", []), "Expected `array` of length >= 1 - at `$.runs[0].step_seconds`"),
    (at("runs.0.step_seconds", [1.0]), "step_seconds must be of as many steps as forwards, 16 - at `$.runs[0]`"),
    (at("runs.1.full_steps", 17), "full_steps must be at most the number of steps, 16 - at `$.runs[1]`"),
    (at("runs.1.full_steps", "4"), "Expected `int`, got `str` - at `$.runs[1].full_steps`"),
    (at("runs.0.forwards", 5), "Expected `array`, got `int` - at `$.runs[0].forwards`"),
    (at("runs.0.forwards.2.phase", "dense"), "Invalid enum value 'dense' - at `$.runs[0].forwards[2].phase`"),
    (at("runs.0.forwards.2.rows", -1), "Expected `int` >= 0 - at `$.runs[0].forwards[2].rows`"),
    (at("runs.0.forwards.2.seconds", ...), "Object missing required field `seconds` - at `$.runs[0].forwards[2]`"),
    (at("runs.0.forwards.2.committed", 1.5), "at `$.runs[0].forwards[2].committed`"),
    (at("runs.1.density", 1.5), "Expected `float` <= 1.00001 - at `$.runs[1].density`"),
    (at("runs.1.history", ...), "must hold all of history, pieces and answer_tokens, or none of them - at `$.runs[1]`"),
    (at("runs.1.answer_tokens", ...), "must hold all of history, pieces and answer_tokens"),
    (at("runs.1.history.0", [[0, 1]]), "Expected `array` of length 3, got 2 - at `$.runs[1].history[0][0]`"),
    (at("runs.1.history.0", []), "history must be one list for each of the 16 steps"),
    (at("runs.0.pieces", ["a"]), "pieces must be one text for each of the 32 tokens - at `$.runs[0]`"),
    (at("runs.0.answer_tokens", 33), "answer_tokens must be at most 32 - at `$.runs[0]`"),
    (at("runs.1.layers", [{"density": 0.3}]), "Object missing required field `recall` - at `$.runs[1].layers[0]`"),
    (at("runs.1.pattern.cells", "AAAA"), "cells must be the base64 of 4608 bits - at `$.runs[1].pattern`"),
    (at("runs.1.pattern.cells", "<b>"), "cells must be base64 - at `$.runs[1].pattern`"),
    (at("runs.1.pattern.heads", 0), "Expected `int` >= 1 - at `$.runs[1].pattern.heads`"),
    (at("runs.1.pattern.prompt_tokens", 732), "prompt_tokens must be fewer than tokens - at `$.runs[1].pattern`"),
    (at("runs.1.repeats.seconds", []), "Expected `array` of length >= 1 - at `$.runs[1].repeats.seconds`"),
    (at("environment", []), "Expected `object`, got `array` - at `$.environment`"),
    (at("load_seconds", None), "Expected `float`, got `null` - at `$.load_seconds`"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_is_no_record_is_refused_by_field(change, words):
    record = made_up_record("origin", "sparsed")
    change(record)
    with pytest.raises(ValueError, match=re.escape(words)):
        page(record)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(made_up_record("origin", "sparsed")))
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"runs": [{"mode": "origin"}]}')
    (tmp_path / "long.json").write_text(json.dumps({"runs": [{"mode": "\x1b]0;owned\x07\n" + "x" * 10**6}]}))
    (tmp_path / "text.json").write_text("not json")
    (tmp_path / "nan.json").write_text(json.dumps(made_up_record("origin") | {"load_seconds": float("nan")}))
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "latin.json").write_bytes(b'{"runs": "\xe9"}')
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.html").symlink_to("run.json")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "option", "right"),
    [
        ("", "RECORD", "required"),
        ("run.json", "--out", "required"),
        ("none.json -o out.html", "RECORD", "No such file"),
        ("folder -o out.html", "RECORD", "not an ordinary file"),
        ("text.json -o out.html", "RECORD", "'text.json' is not JSON"),
        ("empty.json -o out.html", "RECORD", "is not JSON"),
        ("nan.json -o out.html", "RECORD", "NaN is not a JSON number"),
        ("deep.json -o out.html", "RECORD", "is not JSON"),
        ("latin.json -o out.html", "RECORD", "not UTF-8"),
        ("list.json -o out.html", "RECORD", "Expected `object`, got `array`"),
        ("other.json -o out.html", "RECORD", "missing required field `token_ids` - at `$.runs[0]`"),
        ("long.json -o out.html", "RECORD", "`$.runs[0].mode`"),
        ("run.json -o folder", "--out", "not an ordinary file"),
        ("run.json -o missing/out.html", "--out", "no folder"),
        ("run.json -o run.json", "--out", "is the file of RECORD"),
        ("run.json -o link.html", "--out", "is the file of RECORD"),
        ("run.json -o /dev/null", "--out", "not an ordinary file"),
    ],
)
def test_wrong_calls_of_the_command(words, option, right, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    assert main_report(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and option in err and right in err
    assert err.rstrip("\n").isprintable() and len(err) < 2200
    assert err.startswith("python -m sparsed.report: error: ")
    assert sorted(files.iterdir()) == before


def test_a_real_run_makes_the_page_that_its_record_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--demo --compare --seq_len 32 --steps 8 --block_size 16 --device cpu --quiet"
    assert main_llada([*words.split(), "--json", "run.json", "--report", "run.html"]) == 0
    assert main_report(["run.json", "-o", "later.html"]) == 0
    assert (tmp_path / "run.html").read_bytes() == (tmp_path / "later.html").read_bytes()
    read = Reader((tmp_path / "run.html").read_text(encoding="utf-8"))
    runs = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert read.says("llada demo checkpoint: full attention and SparseD")
    assert [run["history"] for run in read.data["replay"]] == [run["history"] for run in runs]
    assert read.data["pattern"]["cells"] == runs[1]["pattern"]["cells"]
    assert read.says(" ".join(runs[0]["text"].split())) and END not in runs[0]["text"]
