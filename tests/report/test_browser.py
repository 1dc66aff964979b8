"""The page in a headless Chromium, opened from a file: what a reader sees, clicks and types."""

import base64
import json
import os
import shutil

import numpy as np
import pytest

from sparsed.report.page import page
from tests.helpers.records import END, made_up_record, made_up_run, of_an_earlier_version

sync_api = pytest.importorskip("playwright.sync_api", reason='no playwright: pip install -e ".[browser]"')
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
NOT_READ = "238,240,242"  # --off of page.css, light
HOSTILE = "</script><script>window.attacked = 1</script><img src=x onerror='window.attacked = 2'>"

# of every element with text of its own: contrast to what is painted below, and the text
CONTRASTS = """() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (colour) => { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); };
  const luminance = () => {
    const linear = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("").trim();
    if (!own || !element.checkVisibility() || element.closest(".mask, script, title, noscript")) continue;
    const chain = [];
    for (let at = element; at; at = at.parentElement) chain.unshift(getComputedStyle(at).backgroundColor);
    chain.forEach(paint);
    const below = luminance();
    paint(getComputedStyle(element)[element.closest("svg") ? "fill" : "color"]);
    const text = luminance();
    found.push([(Math.max(below, text) + 0.05) / (Math.min(below, text) + 0.05), own]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as driver:
        # Chromium's sandbox does not run as root, as in a container
        sandbox = [] if os.getuid() else ["--no-sandbox"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, tmp_path):
    """Open a record's page; afterwards, nothing may have been logged as an error, or fetched."""
    opened, faults = [], []

    def show(record, viewport=DESK, scheme="light", **options):
        file = tmp_path / "run.html"
        file.write_text(page(record), encoding="utf-8")
        shown = chromium.new_page(viewport=viewport, color_scheme=scheme, **options)
        shown.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        shown.on("pageerror", lambda error: faults.append(str(error)))
        shown.on("request", lambda request: faults.append(request.url) if request.url != file.as_uri() else None)
        shown.goto(file.as_uri())
        opened.append(shown)
        return shown

    yield show
    for shown in opened:
        shown.close()
    assert faults == []


@pytest.fixture
def record():
    return made_up_record("origin", "sparsed")


def cells_of(record):
    kept = record["runs"][-1]["pattern"]
    shape = [kept[name] for name in ("layers", "heads", "rows", "columns")]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(kept["cells"]), np.uint8))
    return bits[: np.prod(shape)].reshape(shape).astype(bool)


def drawn_cells(shown, rows, columns):
    """Which cells of the canvas are painted: their middle has another colour than what is not kept."""
    painted = shown.evaluate(
        """([rows, columns]) => {
          const { width, height } = document.getElementById("pattern");
          const { data } = document.getElementById("pattern").getContext("2d").getImageData(0, 0, width, height);
          const place = (index, count, side) => Math.floor((index + 0.4) * side / count);
          const colour = (row, column) => {
            const at = 4 * (place(row, rows, height) * width + place(column, columns, width));
            return data.slice(at, at + 3).join();
          };
          const cells = Array.from({ length: rows * columns }, (_, at) => [Math.floor(at / columns), at % columns]);
          return cells.map(([row, column]) => colour(row, column)).join(" ");
        }""",
        [rows, columns],
    )
    return np.array([colour != NOT_READ for colour in painted.split(" ")]).reshape(rows, columns)


def test_the_slider_replays_what_each_step_committed(record, open_page):
    shown = open_page(record)
    slider, panels = shown.locator("#step"), shown.locator(".tokens")
    for step in (0, 1, 7, 16):
        slider.fill(str(step))
        for panel, run in zip(panels.all(), record["runs"], strict=True):
            there = {position for commits in run["history"][:step] for position, _, _ in commits}
            pieces = [piece if at in there else "▒" for at, piece in enumerate(run["pieces"])]
            assert panel.text_content() == "".join(pieces).replace(END, "∎")
            newest = [position for position, _, _ in run["history"][step - 1]] if step else []
            assert panel.locator(".new").count() == len(newest)


def test_a_run_of_fewer_steps_waits_at_its_end(record, open_page):
    record["runs"][1] = made_up_run("sparsed", steps=8)
    shown = open_page(record)
    states = shown.locator(".state")
    shown.locator("#step").fill("4")
    assert [text.split(";")[0] for text in states.all_text_contents()] == [
        "full attention", "full attention, selection"
    ]  # fmt: skip
    shown.locator("#step").fill("12")
    assert states.all_text_contents() == [
        "full attention; 24 of 32 tokens, 1.44 s", "at its end; 32 of 32 tokens, 0.76 s"
    ]  # fmt: skip


def test_an_early_stop_fills_the_rest_in_the_last_step(record, open_page):
    """What the last step fills in has no probability, and so no shade; the other run goes on."""
    record["runs"][1] = run = made_up_run("sparsed", steps=8)
    filled = range(24, 32)
    run["history"] = [[commit for commit in step if commit[0] not in filled] for step in run["history"]]
    run["history"][-1] += [[position, run["token_ids"][position], None] for position in filled]
    shown = open_page(record)
    panel, state = shown.locator(".tokens").nth(1), shown.locator(".state").nth(1)
    shown.locator("#step").fill("7")
    assert panel.text_content()[-8:] == "▒" * 8
    shown.locator("#step").fill("8")
    assert panel.text_content().endswith("∎" * 8) and "32 of 32 tokens" in state.text_content()
    tokens = panel.locator("span").all()
    assert [tokens[position].get_attribute("class").split() for position in filled] == [["token", "after", "new"]] * 8
    assert tokens[31].get_attribute("title") == 'token 32, "<|eot_id|>": step 8'
    assert ", probability " in tokens[0].get_attribute("title")
    shown.locator("#step").fill("16")
    assert state.text_content().startswith("at its end; 32 of 32")


def test_the_slider_obeys_the_keyboard(record, open_page):
    shown = open_page(record)
    slider = shown.locator("#step")
    slider.focus()
    shown.keyboard.press("Home")
    assert shown.locator("#step-number").text_content() == "before the first step"
    shown.keyboard.press("ArrowRight")
    assert shown.locator("#step-number").text_content() == "step 1 of 16"
    assert slider.get_attribute("aria-valuetext") == "step 1 of 16"


def test_play_runs_to_the_end_and_stops(record, open_page):
    shown = open_page(made_up_record("sparsed", steps=4))
    shown.locator("#play").click()
    assert shown.locator("#play").text_content() == "Pause"
    shown.wait_for_function("() => document.getElementById('play').textContent === 'Play'", timeout=10_000)
    assert shown.locator("#step-number").text_content() == "step 4 of 4"


def test_the_canvas_shows_the_picked_head(record, open_page):
    shown = open_page(record)
    cells = cells_of(record)
    for layer, head in ((0, 0), (1, 0), (1, 3)):
        shown.locator("#layer").select_option(str(layer))
        shown.locator("#head").select_option(str(head))
        assert (drawn_cells(shown, 24, 24) == cells[layer, head]).all()
        assert f"{100 * cells[layer, head].mean():.1f} %" in shown.locator("#kept").text_content()
    shown.locator(".heads button").nth(2).click()
    assert shown.locator("#head").input_value() == "2"
    assert (drawn_cells(shown, 24, 24) == cells[1, 2]).all()


def test_a_64k_pattern_of_an_8b_model_is_drawn(open_page):
    sizes = {"layers": 32, "heads": 32, "blocks": (128, 128), "prompt_tokens": 65_536}
    record = made_up_record("sparsed", **sizes)
    shown = open_page(record)
    shown.locator("#layer").select_option("31")
    shown.locator("#head").select_option("31")
    drawn, cells = drawn_cells(shown, 128, 128), cells_of(record)[31, 31]
    border = np.zeros_like(cells)
    border[-1], border[:, -1] = True, True  # under the lines
    assert (drawn == cells)[~border].all()
    assert shown.locator(".heads button").count() == 32


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_it_fits_and_is_legible(scheme, viewport, record, open_page):
    record["arguments"]["prompt_text"] = "x" * 3000
    record["arguments"]["model_path"] = "/a/very/long/path" * 20
    record["runs"][1]["token_ids"][3] = 9  # something to mark
    for run in record["runs"]:
        run["pieces"][1] = "y" * 300
    shown = open_page(record, viewport, scheme)
    shown.locator("#step").fill("9")
    assert shown.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    contrasts = shown.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [pair for pair in contrasts if pair[0] < 4.5] == []


def test_panels_are_side_by_side_and_on_a_phone_stacked(record, open_page):
    for viewport, stacked in ((DESK, False), (PHONE, True)):
        one, other = (panel.bounding_box() for panel in open_page(record, viewport).locator(".tokens").all())
        assert (other["y"] > one["y"] + one["height"]) is stacked


def test_a_change_of_scheme_repaints_the_canvas(record, open_page):
    shown = open_page(record)
    light = shown.evaluate("document.getElementById('pattern').toDataURL()")
    shown.emulate_media(color_scheme="dark")
    shown.wait_for_function("before => document.getElementById('pattern').toDataURL() !== before", arg=light)


def test_text_does_not_become_a_program(record, open_page):
    for run in record["runs"]:
        run["pieces"][1] = run["text"] = run["expected"] = HOSTILE
    record["arguments"]["prompt_text"] = HOSTILE
    shown = open_page(record)
    assert shown.evaluate("window.attacked") is None
    assert HOSTILE in shown.locator(".tokens").first.text_content()


@pytest.mark.parametrize("modes", [["origin"], ["sparsed"], ["origin", "sparsed"]])
def test_earlier_records_have_a_page_without_errors(modes, open_page):
    record = made_up_record(*modes)
    record["runs"] = list(map(of_an_earlier_version, record["runs"]))
    shown = open_page(record)
    assert shown.locator("#step").count() == shown.locator("#pattern").count() == 0


def test_without_scripts_the_answers_and_times_are_there(record, open_page):
    shown = open_page(record, java_script_enabled=False)
    assert record["runs"][0]["text"] in " ".join(shown.locator(".answer").first.text_content().split())
    assert shown.locator("noscript").first.is_visible()
    assert json.dumps(record["runs"][0]["seconds"])[:4] in shown.locator(".facts").text_content()
