"""README.md and docs/: their marks hold what the committed records give, their links and quotations lead somewhere."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import readme, readme_values
from benchmarks.readme_values import TITLES, answered, evaluation, fidelity, speeds
from docs.make import composition

ROOT = Path(__file__).parents[1]
TEXTS = {page: page.read_text(encoding="utf-8") for page in readme.PAGES}
ALL = "\n".join(TEXTS.values())
PAPER, DENSE = "SparseD, select {}, block_size {}", "SparseD, dense answer rows, select {}, block_size {}"
LATER = ", selected at 0.2"


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
    rows = json.loads((results / "fidelity-smollm2-h200.json").read_text())["rows"][1]["settings"]
    kl = next(row["kl"][0] for row in rows if row["title"] == DENSE.format(0.15, 128))
    assert float(table("fidelity")["dense answer rows, 0.15"][2].split()[0]) == pytest.approx(kl, abs=5e-4)
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


def test_what_follows_from_the_distances():
    rows = readme_values.benchmark("fidelity-smollm2-h200")["rows"]
    assert [(row["new_tokens"], row["windows"], row["documents"]) for row in rows] == [(128, 31, 18), (256, 31, 18)]
    one, two = ({title: setting["kl"][0] for title, setting in fidelity(n).items()} for n in (128, 256))
    paper, dense, fewer = PAPER.format(0.3, 128), DENSE.format(0.3, 128), DENSE.format(0.15, 128) + LATER
    assert one[dense] == pytest.approx(one[dense + LATER], abs=1e-3)
    assert one[fewer] == pytest.approx(one[paper + LATER], rel=0.03) and two[fewer] < two[paper + LATER]
    assert one[DENSE.format(0.1, 128)] < one[paper] and two[DENSE.format(0.1, 128)] < two[paper]
    part = "only the answer's rows{}, select 0.3, block_size 128"
    assert one[part.format(": answer keys")] < 1e-9, "one block, which is kept"
    assert one[part.format(": prompt keys")] == one[part.format("")]


@pytest.mark.parametrize("family", TITLES)
def test_what_follows_from_the_times(family):
    assert readme_values.benchmark(f"dense-answer-{family}-h200")["environment"]["device_name"] == "NVIDIA H200"
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
