"""README, docs/, the demo's pages: marks hold what the committed records give, links and quotations lead somewhere."""

import json
import re
from datetime import datetime
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import readme, readme_judge, readme_values
from benchmarks.readme_values import answered, speeds
from benchmarks.records import TITLES, benchmark, evaluation, judged
from docs.make import composition
from sparsed.cli import main_dream, main_llada

ROOT = Path(__file__).parents[1]
TEXTS = {page: page.read_text(encoding="utf-8") for page in readme.PAGES}
ALL = "\n".join(TEXTS.values())


@pytest.fixture(params=TEXTS, ids=lambda page: page.name)
def page(request):
    return request.param


def test_a_page_is_filled_in_from_the_records(page):
    assert readme.filled(TEXTS[page]) == TEXTS[page], "run python -m benchmarks.readme"


def test_every_table_is_shown_and_many_figures_are():
    assert set(readme_values.tables()) <= set(readme.names(ALL)) and len(readme.names(ALL)) > 60


def test_the_readme_is_short():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 160


def test_numbers_and_tables_that_are_wrong_are_mended(monkeypatch, tmp_path):
    """Every figure and every cell of the tables that holds a digit."""
    text = TEXTS[ROOT / "docs" / "results.md"]
    spoiled = readme.FIGURE.sub(lambda found: "0" + found[1], text)
    spoiled = readme.TABLE.sub(lambda found: f"{found[1]}| nothing |\n{found[3]}", spoiled)
    copy = tmp_path / "results.md"
    monkeypatch.setattr(readme, "PAGES", (copy,))
    copy.write_text(spoiled, encoding="utf-8")
    readme.main([])
    assert copy.read_text(encoding="utf-8") == text != spoiled


# ------------------------------------------------------------------------------------------------------------ links

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text):
    """What a heading is linked to by, as GitHub has it."""
    lines = re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip() for line in lines if re.match("#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page, text):
    """The links of a page that lead to no file, or no heading, of this repository; others are not followed."""
    dead = []
    for link in LINK.findall(text):
        if re.match("[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        headings = anchors(target.read_text(encoding="utf-8")) if target.suffix == ".md" and target.is_file() else ()
        if not target.exists() or (anchor and anchor not in headings):
            dead.append(link)
    return dead


def test_links_lead_somewhere(page):
    assert not dead_links(page, TEXTS[page])


def test_the_other_pages_links_do_too():
    pages = [*ROOT.glob("*.md"), *(ROOT / "demo").rglob("README.md"), ROOT / "benchmarks" / "README.md"]
    assert [(page, dead) for page in pages if (dead := dead_links(page, page.read_text(encoding="utf-8")))] == []


def test_a_dead_link_is_found():
    text = "[a](no.md) [b](README.md#no) [c](README.md) [d](https://example.org/no) [e](#citation) # Citation"
    assert dead_links(ROOT / "README.md", text) == ["no.md", "README.md#no"]


def test_every_page_is_linked_from_the_readme():
    linked = set(LINK.findall(TEXTS[ROOT / "README.md"]))
    assert {f"docs/{page.name}" for page in TEXTS if page.parent == ROOT / "docs"} <= linked


def test_the_picture_of_the_composition_is_the_script_s():
    text = composition.FILE.read_text(encoding="utf-8")
    assert text == composition.picture(), "run python -m docs.make.composition"
    names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert names == {"svg", "title", "style", "text", "rect", "path"}


def test_the_lines_of_troubleshooting_are_the_package_s():
    """What stands between backticks in the first column, whatever the message puts between."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "sparsed").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # strings that follow one another
    rows = re.findall(r"^\| (`.*?) \| ", TEXTS[ROOT / "docs" / "troubleshooting.md"], flags=re.MULTILINE)
    quoted = [words for row in rows for words in re.findall("`(.+?)`", row)]
    assert len(quoted) > 15 and [words for words in quoted if words not in source] == []


# ------------------------------------------------------------------------------------------------------------ marks


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("1<!--=no.such-->", "give no no.such"),
        ("<!-- table: none -->\n<!-- end -->", "give no none"),
        ("about<!--=show.dream-->", "must follow a number"),
        ("<!-- table: latency -->\n| a |", "must have an end"),
    ],
)
def test_a_wrong_mark_is_one_line(text, fault, monkeypatch, tmp_path, capsys):
    copy = tmp_path / "page.md"
    monkeypatch.setattr(readme, "PAGES", (copy,))
    copy.write_text(text)
    with pytest.raises(SystemExit) as stop:
        readme.main([])
    assert stop.value.code == 2 and fault in capsys.readouterr().err and copy.read_text() == text


def table(name):
    """A table of the pages as it is read: {first cell: the others}."""
    lines = ALL.split(f"<!-- table: {name} -->\n")[1].split("<!-- end -->")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {first: others for first, *others in rows}


def test_cells_are_the_record_s():
    """One row of some tables, from the record's own file."""
    results = ROOT / "benchmarks/results"
    rows = json.loads((ROOT / "demo/real/results/table/summary.json").read_text())["rows"]
    nats = [row["difference"][0] for row in rows if setting_of(row) == (4096, "sparsed", 0.1, 0.2, 32, True)]
    assert [float(table("judge")["dense answer rows, 0.1"][2].split()[0])] == pytest.approx(nats, abs=5e-4)
    rows = json.loads((ROOT / "demo/real/results/caches/summary.json").read_text())["rows"]
    nats = [
        row["difference"][2] for row in rows if (row["mask_rate"], row["cache"], row["refresh"]) == (0.25, "prefix", 0)
    ]
    assert [float(table("caches-judge")["prefix cache, all rows once"][2].split()[3][:-1])] == pytest.approx(
        nats, abs=5e-4
    )
    runs = json.loads((results / "dense-answer-llada-h200.json").read_text())["rows"][1]["runs"]
    seconds, whole = (
        runs["full attention"]["full_step"]["median"],
        table("dense-answer-speed")["LLaDA, full attention"][2],
    )
    assert float(whole.removesuffix(" s")) == pytest.approx(128 * seconds, abs=1)
    steps = json.loads((results / "demo-steps-dream-cpu.json").read_text())["samples"]
    assert float(table("demo-steps")["Dream"][0].removesuffix(" s")) == pytest.approx(
        sorted(steps["full"])[7], abs=5e-3
    )
    summary = json.loads((ROOT / "demo/evaluation/dream-8k/summary.json").read_text())
    scores = [row["accuracy"] for row in summary["rows"] if row["method"] == "window"]
    assert table("demo-others")["Dream, 8,192 tokens"][2].startswith(f"{sum(scores) / len(scores):.1f}, ")


SPARSED = "SparseD, dense answer rows, select 0.15"


def marked(name):
    """The number before the marks of this name, which is the same everywhere."""
    (number,) = set(re.findall(rf"([\d.,]+)<!--={re.escape(name)}-->", ALL))
    return float(number.replace(",", ""))


def record(name):
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def test_numbers_about_steps_are_the_record_s():
    """Some of them, from the record's own file."""
    results = "benchmarks/results"
    runs = record(f"{results}/latency-llada-64k-h100.json")["rows"][0]["runs"]
    full, sparse = runs["origin"]["full_step"]["median"], runs["sparsed"]["sparse_step"]["median"]
    assert marked("latency.llada.bound") == pytest.approx(full / (0.2 * full + 0.8 * sparse), abs=0.006)
    assert marked("latency.llada.64k.selecting") == pytest.approx(
        runs["sparsed"]["selection"]["samples"][0] / full, abs=0.006
    )
    kernels = record(f"{results}/breakdown-llada-64k-flash-h100.json")["rows"][0]["steps"]["sparse"]["kernels"]
    flash = sum(seconds for name, seconds in kernels.items() if "flash" in name.lower())
    assert marked("breakdown.llada.flash.sparse.attention") == pytest.approx(flash, abs=0.006)
    assert marked("breakdown.llada.flash.sparse") == pytest.approx(sum(kernels.values()), abs=0.006)
    runs = record(f"{results}/first-run-dream-4k-h100.json")["rows"][0]["runs"]
    first = runs["origin"]["first_use_seconds"] + runs["sparsed"]["first_use_seconds"]
    assert marked("first.dream") == pytest.approx(first, abs=0.06)
    rows = record(f"{results}/below-4k-llada-h100.json")["rows"]
    seconds = [rows[0]["runs"][mode]["measured_whole_seconds"] for mode in ("origin", "sparsed")]
    assert marked("below.llada.1k") == pytest.approx(seconds[0] / seconds[1], abs=0.006)


def test_numbers_about_cpus_whole_runs_and_answers_are_the_record_s():
    results = "benchmarks/results"
    steps = record(f"{results}/demo-4k-llada-cpu.json")["runs"][0]["step_seconds"]
    assert marked("cpu.llada.drift") == pytest.approx(100 * (max(steps) / min(steps) - 1), abs=0.6)
    steps = record(f"{results}/cpu-memory-dream.json")["lengths"][0]["step_seconds"]
    assert marked("cpu.llada.64k.selecting") == pytest.approx(steps["selecting"] / steps["full"], abs=0.06)
    for end, name in (("least", "4k-first"), ("most", "4k")):
        ways = record(f"{results}/generation-llada-{name}-h200.json")["rows"][0]["ways"]
        full, sparse = (ways[way]["steps"]["256"]["seconds"] for way in ("full attention", SPARSED))
        assert marked(f"generation.4k.sparse.{end}") == pytest.approx(full / sparse, abs=0.006)
    rows = record("demo/evaluation/dream-1k/summary.json")["rows"]
    wanted = {"method": "sparsed", "select": 0.3, "block_size": 128, "dense_answer": None}
    full = [row["accuracy"] for row in rows if row["method"] == "origin"]
    sparse = [row["accuracy"] for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert len(full) == len(sparse) == 6
    assert marked("dense.dream.1k.lost") == pytest.approx((sum(full) - sum(sparse)) / 6, abs=0.06)


def test_what_one_family_s_number_says_of_both():
    """Sentences that give a single number for Dream and LLaDA, and those without one."""
    found = readme_values.figures()
    for name in ("full_steps", "selecting", "density", "64k.selecting", "64k.sparse"):
        assert found[f"cpu.dream.{name}"] == found[f"cpu.llada.{name}"]
    assert found["kernel.dream.top-k"] == found["kernel.llada.top-k"]
    assert found["latency.selecting.most"] == found["latency.llada.128k.selecting"]
    for family in TITLES:
        (row,) = benchmark(f"latency-{family}-64k-h100")["rows"]
        for run in row["runs"].values():
            for step in (run["full_step"], run["sparse_step"]):
                assert step is None or (2 <= step["count"] <= 4 and step["range"][1] < 1.01 * step["range"][0])
        row = benchmark(f"below-4k-{family}-h100")["rows"][0]
        assert row["length"] == "1k" and row["speedup"]["128"]["origin"] < 1
        sparse, full = row["runs"]["sparsed"]["sparse_step"], row["runs"]["origin"]["full_step"]
        assert sparse["median"] == pytest.approx(full["median"], rel=0.02)


UNMARKED = {"2.13", "1 %"}  # a version; and what the test above holds


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("README.md", "## When it pays", "## Which flags"),
        ("docs/results.md", "### A second checkpoint", "## Dense answer rows"),
        ("docs/results.md", "* **Full attention is faster here too**", "## The paper's figures"),
    ],
)
def test_every_measured_number_of_a_section_is_marked(name, begin, end):
    text = TEXTS[ROOT / name].split(begin)[1].split(end)[0]
    text = re.sub(r"^\|.*$|`[^`]*`", "", readme.FIGURE.sub("", text), flags=re.MULTILINE)
    assert len(text) > 500 and set(re.findall(r"\d+\.\d+|\d+ (?:%|s|ms|GB)\b|\d+ %|\d+x", text)) <= UNMARKED


def setting_of(row):
    return tuple(row[name] for name in ("length", "method", "select", "skip", "block_size", "dense_answer"))


def test_what_follows_from_the_losses():
    """The sentences about the real model that compare."""
    found = judged("table")
    assert [(length["length"], bool(length["cannot_tell"])) for length in found["lengths"]] == [
        (4096, False),
        (8192, True),
    ]
    assert {(row["length"], row["documents"]) for row in found["rows"]} == {(4096, 50), (8192, 20)}
    half = [row for row in found["rows"] if row["mask_rate"] == 0.5]
    lost = {setting_of(row): row["difference"] and row["difference"][0] for row in half}
    paper, dense = (
        {select: lost[4096, "sparsed", select, 0.2, 128, which] for select in (0.1, 0.2, 0.3)} for which in (None, True)
    )
    assert dense[0.2] < paper[0.3] < dense[0.1] < paper[0.1] and paper[0.1] == pytest.approx(0.15, abs=0.005)
    assert min(lost[4096, "window", 0.3, None, size, None] for size in (128, 64, 32)) > 10 * paper[0.3]
    assert lost[4096, "sparsed", 0.2, 0.2, 32, True] < lost[4096, "no_isolation", 0.2, 0.2, 32, None]
    caches = {
        setting: readme_judge.cached_row(readme_judge.DUAL | {"refresh": setting})["difference"][0]
        for setting in (None, 0)
    }
    assert caches[0] - caches[None] == pytest.approx(0.012, abs=0.0005)


def test_every_line_of_the_third_training_has_all_documents():
    found = judged("table-clean")
    assert not any(length["cannot_tell"] for length in found["lengths"])
    assert {(row["length"], row["documents"]) for row in found["rows"]} == {(4096, 50), (8192, 20)}


def test_what_follows_from_the_second_checkpoint():
    found = judged("table-mixed")
    assert not any(length["cannot_tell"] for length in found["lengths"])
    short = [row for row in found["rows"] if row["documents"] != {4096: 48, 8192: 18}[row["length"]]]
    cut = {(row["length"], row["method"], row["skip"], row["documents"]) for row in short}
    assert cut == {(8192, "sparsed", 0.05, 14), (8192, "no_isolation", 0.2, 17)}
    rows = {setting_of(row): row for row in found["rows"]}
    for measure, (length, size) in product(("difference", "kl"), product((4096, 8192), (128, 32))):
        paper, dense = (rows[length, "sparsed", 0.3, 0.2, size, which][measure][0] for which in (None, True))
        assert (dense > paper) == ((length, size) == (8192, 128))
    near = [rows[length, "streaming", 0.3, None, 128, True]["difference"][0] for length in (4096, 8192)]
    assert max(near) < 0
    trained = {run["name"]: run["judged"] for run in [{"name": "first", **judged("trainings")["first"]}]}
    trained |= {run["name"]: run["judged"] for run in judged("trainings")["runs"]}
    gates = {name: [low for _, low, _ in found["gate_8192"].values()] for name, found in trained.items()}
    assert {name for name, lows in gates.items() if min(lows) > 0.1} == {"mixed", "mixed-continued", "clean"}
    likely = {name: found["8192"]["nll"][0] for name, found in trained.items()}
    assert likely["first-continued"] < likely["first"] < likely["mixed-continued"] < likely["mixed"]


@pytest.mark.parametrize("main", [main_dream, main_llada])
def test_the_settings_that_help_recommends(main, capsys):
    """Their speeds and losses are the records', rounded as on the pages."""
    assert main(["--help"]) == 0
    said = {line.split("  ")[1]: line for line in capsys.readouterr().out.splitlines() if "loss 0." in line}
    found = readme_values.figures()
    both = [
        [found[f"generation.{family}.64k.{kind}.gain"] for family in ("llada", "dream")] for kind in ("once", "dual")
    ]
    once, dual = (f"{low} to {high}x" for low, high in both)
    assert found["generation.llada.64k.both.gain"] == found["generation.dream.64k.both.gain"]
    assert list(said) == ["--cache dual --refresh 0 --origin", "--cache dual --dense_answer --select 0.15"] + [
        "--cache dual --origin",
        "--dense_answer",
    ]
    for line, parts in zip(
        said.values(),
        (
            (once, f"loss {found['caches.once']}"),
            (f"{found['generation.llada.64k.both.gain']}x", f"loss {found['caches.fast']}"),
            (dual, f"loss {found['caches.dual']}"),
            (f"loss {found['judge.256.dense']}", f"default: {found['judge.256.paper']})"),
        ),
        strict=True,
    ):
        assert all(part in line for part in parts)


def test_the_small_measure_takes_five_minutes():
    found = benchmark("fidelity-small-cpu")
    begun, finished = map(datetime.fromisoformat, (found["calls"][0]["date"], found["finished"]))
    assert 240 < (finished - begun).total_seconds() < 330 and len(found["calls"]) == 1
    assert "It takes five minutes on two CPU cores" in " ".join(TEXTS[ROOT / "docs/evaluation.md"].split())


def test_what_follows_from_the_written_texts():
    rows = judged("written")["rows"]
    assert {row["documents"] for row in rows} == {20}
    saved = [row for row in rows if row["steps"] == 128 and row["method"] == "origin" and row["difference"]]
    costs = [row for row in saved if not row["difference"][1] <= 0 <= row["difference"][2]]
    assert len(saved) > 10 and [(row["cache"], row["factor"]) for row in costs] == [(None, 2.0)]
    few = [row for row in rows if row["steps"] < 128]
    assert len(few) == 5 and all(row["difference"][1] > 0 for row in few)


WAY = ("method", "select", "dense_answer", "cache", "refresh", "factor", "threshold")


def test_what_follows_from_the_answers_under_caches():
    for family, folder in product(TITLES, readme_judge.ANSWERS):
        rows = evaluation(f"{family}-{folder}")["averages"]
        dual = [row for row in rows if row["cache"] == "dual" and row["method"] == "sparsed" and row["dense_answer"]]
        near = [row["sparse"] for row in dual if row["select"] == 0.3]
        fast = [row["sparse"] for row in dual if row["select"] == 0.15 and row["refresh"] != 2]
        rarely = [row["sparse"] for row in dual if row["select"] == 0.15 and row["refresh"] == 2]
        assert near and fast and min(near) > -0.2 and min(fast) > -1.2 and all(-1.3 < lost for lost in rarely)
        named = {tuple(row[name] for name in WAY): row["accuracy"] for row in rows}
        sure = [named[way] - named[(*way[:-1], None)] for way in named if way[-1] == 0.9]
        assert len(sure) > 3 and min(sure) > -0.6


def test_what_follows_from_the_distances():
    rows = benchmark("fidelity-smollm2-h200")["rows"]
    assert [(row["new_tokens"], row["windows"], row["documents"]) for row in rows] == [(128, 31, 18), (256, 31, 18)]
    one = {title: setting["kl"][0] for title, setting in readme_values.fidelity(128).items()}
    part = "only the answer's rows{}, select 0.3, block_size 128"
    assert one[part.format(": answer keys")] < 1e-9, "one block, which is kept"
    assert one[part.format(": prompt keys")] == one[part.format("")]


@pytest.mark.parametrize("family", TITLES)
def test_what_follows_from_the_times(family):
    assert benchmark(f"dense-answer-{family}-h200")["environment"]["device_name"] == "NVIDIA H200"
    runs = speeds(family, "64k")
    sparse = {name: run["sparse_step"]["median"] for name, run in runs.items() if "sparse_step" in run}
    assert sparse["dense answer rows, select 0.3"] / sparse["the paper's, select 0.3"] < 1.015


@pytest.mark.parametrize("family", TITLES)
def test_what_follows_from_the_answers(family):
    for folder, cells in (("1k", 1 + 8), ("dense", 9 + 1 + 28 + 12), ("dense-128", 1 + 4)):
        rows = evaluation(f"{family}-{folder}")["rows"]
        assert len(rows) == 6 * cells and {row["n"] for row in rows} == {100}
    near, far = (answered(family, "dense", length) for length in (4010, 4096))
    for found, sizes in ((near, (128, 32)), (far, (128, 64, 32))):
        assert all(found[size, select, 0.2, True]["difference"] > -1 for size in sizes for select in (0.2, 0.3))
    assert all(far[size, 0.05, 0.2, True]["difference"] > -1 for size in (64, 32))
    assert all(near[32, select, 0.2, False]["difference"] > -0.5 for select in (0.2, 0.3))
    for dense in (False, True):
        accuracies = [far[128, 0.2, skip, dense]["accuracy"] for skip in (0, 0.05, 0.2)]
        assert max(accuracies) - min(accuracies) <= 0.5
