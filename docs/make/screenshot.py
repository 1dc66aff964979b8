"""Draw assets/page.png, the page about a real run of the LLaDA demo checkpoint.

pip install -e ".[browser]"   # and a Chromium of the system's
python -m docs.make.screenshot
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from sparsed.evaluation.tasks import TASKS, make_sample
from sparsed.models import load_tokenizer
from sparsed.prompts import demo_path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "assets" / "page.png"
# two blocks of 32 are one too few for this answer: its last part goes wrong, see docs/results.md
TASK, TOKENS = "niah_multivalue", 4096
RUN = "llada_generation.py --demo --compare --seq_len 64 --steps 64 --block_size 32"
STEP = "58"  # of 64: most of the answer is there
LAYER, HEAD = "3", "1"


def main() -> None:
    """Run the demo, open its page, move the slider and the pickers, take the picture."""
    chromium = shutil.which("chromium") or sys.exit("no Chromium; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        prompt, report = Path(folder, "prompt.txt"), Path(folder, "run.html")
        tokenizer = load_tokenizer(demo_path("llada"))
        prompt.write_text(make_sample(TASKS[TASK], tokenizer, TOKENS, seed=0, index=0).prompt, encoding="utf-8")
        run = [sys.executable, *RUN.split(), "--prompt_file", prompt, "--report", report]
        subprocess.run(run, cwd=ROOT, check=True)
        with sync_playwright() as driver:
            # Chromium's sandbox does not run as root, as in a container
            sandbox = [] if os.getuid() else ["--no-sandbox"]
            browser = driver.chromium.launch(executable_path=chromium, args=sandbox)
            shown = browser.new_page(viewport={"width": 1120, "height": 900}, color_scheme="light")
            shown.goto(report.as_uri())
            take(shown)
            browser.close()


def take(shown: Page) -> None:
    """The page from its head to the kept blocks; the settings, paths among them, stay out of the picture."""
    shown.locator("#step").fill(STEP)
    shown.locator("#layer").select_option(LAYER)
    shown.locator("#head").select_option(HEAD)
    shown.evaluate("document.activeElement.blur()")
    end = shown.locator("#settings-title").bounding_box()["y"]
    shown.screenshot(path=FILE, full_page=True, clip={"x": 0, "y": 0, "width": 1120, "height": end - 30})


if __name__ == "__main__":
    main()
