"""The screenshots, light, dark and on a phone, from the app on the embedded base in a headless Chromium.

python -m app.screenshots --chromium /usr/bin/chromium
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from s2ft_diffusion.toybox.subjects import ALL_SUBJECTS

from .arguments import ROOT, parse_arguments
from .server import DEMO_ADAPTERS, close, launch

PATIENCE = 600_000  # milliseconds


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
            light = opened(browser, address, viewport={"width": 1180, "height": 800})
            generate(light, "widget", "on the beach", "in the city", "in the forest", "wearing a crown")
            light.screenshot(path=args.folder / "app-generate.png")
            dark = opened(browser, f"{address}?__theme=dark", viewport={"width": 1180, "height": 700})
            dark.get_by_role("tab", name="Library").click()
            dark.locator("#library .tile").first.click()
            dark.locator("#about").get_by_text("trainable numbers").wait_for()
            dark.wait_for_timeout(500)
            dark.screenshot(path=args.folder / "app-library.png")
            phone = opened(browser, address, viewport={"width": 390, "height": 992}, is_mobile=True, has_touch=True)
            generate(phone, "mittens", "in the city")
            phone.screenshot(path=args.folder / "app-phone.png")
            browser.close()
        close(blocks, app)


def opened(browser: Browser, address: str, **options: Any) -> Page:
    """The page in a context of its own, when it is ready."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_function("window.s2ft?.ready")
    return page


def generate(page: Page, adapter: str, *scenes: str) -> None:
    """An image of a sample adapter's subject in each scene."""
    subject = ALL_SUBJECTS[adapter].instance_prompt
    page.locator("#adapter .tile", has_text=adapter).click()
    page.wait_for_function("words => document.querySelector('#prompt textarea').value === words", arg=subject)
    page.locator("#prompt textarea").fill("\n".join(f"{subject} {scene}" for scene in scenes))
    page.locator("#random input").uncheck()
    if len(scenes) > 1:
        page.get_by_role("button", name="More").click()
        page.locator("#lines input").check()
        page.get_by_role("button", name="More").click()
    page.locator("#generate").click()
    page.wait_for_function("document.querySelector('#status .line').textContent === 'done'")
    page.wait_for_function(f"document.querySelectorAll('#results img').length === {len(scenes)}")
    page.wait_for_timeout(1500)
    page.evaluate("scrollTo(0, 0)")


if __name__ == "__main__":
    main()
