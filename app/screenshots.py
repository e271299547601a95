"""The README's screenshots, from the app on the embedded base in a headless Chromium.

python -m app.screenshots --chromium /usr/bin/chromium
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from .arguments import ROOT, parse_arguments
from .server import DEMO_ADAPTERS, close, launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as outputs:
        flags = ["--adapters", str(DEMO_ADAPTERS), "--outputs", outputs, "--port", "0"]
        blocks, app, address = launch(parse_arguments(flags), block=False)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=args.chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1180, "height": 860})
            page.goto(address)
            page.get_by_role("button", name="Generate", exact=True).wait_for()
            generate(page)
            page.screenshot(path=args.folder / "app-generate.png")
            page.get_by_role("tab", name="Library").click()
            page.locator("#library button:has(img)").first.click()
            page.get_by_text("trainable numbers").wait_for()
            page.wait_for_timeout(500)
            page.screenshot(path=args.folder / "app-library.png")
            browser.close()
        close(blocks, app)


def generate(page: Page) -> None:
    """Four images of the first adapter's subject in the snow."""
    prompt = page.locator("#prompt textarea")
    page.wait_for_function("document.querySelector('#prompt textarea').value !== ''")
    prompt.fill(f"{prompt.input_value()} in the snow")
    page.get_by_role("button", name="More").click()
    images = page.get_by_label("number input for Images")
    images.fill("4")
    images.press("Tab")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_function("document.querySelectorAll('#results img').length === 4", timeout=120_000)
    page.wait_for_function("document.querySelector('#status textarea, #status input').value === 'done'")
    page.wait_for_timeout(1500)


if __name__ == "__main__":
    main()
