"""What a person does on the page, in Playwright's terms."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PATIENT = 300_000  # milliseconds; a busy machine is no reason to fail
CALM = {"reduced_motion": "reduce"}  # a page that scrolls smoothly moves what is clicked away from under the click
LAPTOP = {"viewport": {"width": 1280, "height": 800}, **CALM}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, **CALM}

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; the endpoint tests still run")


def open_page(page: playwright.Page, address: str) -> None:
    """Load the page and wait until its own first events have run."""
    page.goto(address)
    page.wait_for_function("window.s2ft?.ready")


def button(page: playwright.Page, name: str) -> playwright.Locator:
    return page.get_by_role("button", name=name, exact=True).locator("visible=true")


def tab(page: playwright.Page, name: str) -> None:
    """Bring a tab to the front, also one that a narrow page keeps behind its last button."""
    shown = page.get_by_role("tab", name=name)
    if not shown.locator("visible=true").count():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()
    else:
        shown.locator("visible=true").click()
    page.wait_for_function(f"new URL(location).searchParams.get('tab') === '{name.lower()}'")


def choose(page: playwright.Page, adapter: str, where: str = "#adapter") -> None:
    tile(page, adapter, where).click()


def tile(page: playwright.Page, label: str, where: str = "#adapter") -> playwright.Locator:
    """A tile by what stands under it."""
    return page.locator(f"{where} .tile", has=page.locator(f"span:text-is('{label}')"))


def labels(page: playwright.Page, where: str) -> list[str]:
    return page.locator(f"{where} .tile span").all_inner_texts()


def chosen(page: playwright.Page, where: str = "#adapter") -> list[str]:
    return page.locator(f"{where} .tile:has(input:checked) span").all_inner_texts()


def prompt(page: playwright.Page) -> playwright.Locator:
    return page.locator("#prompt textarea")


def wait_for_value(page: playwright.Page, selector: str, value: str) -> None:
    page.wait_for_function("([s, v]) => document.querySelector(s)?.value === v", arg=[selector, value])


def set_number(page: playwright.Page, label: str, value: float) -> None:
    """Type into a slider's field. One that has only just been shown can still take its first value back: type again."""
    field = page.get_by_label(f"number input for {label}").locator("visible=true").first
    for _ in range(20):
        field.fill(str(value))
        field.press("Tab")
        page.wait_for_timeout(250)
        if field.input_value() == str(value):
            return
    raise AssertionError(f"{label} does not stay {value}")


def set_steps(page: playwright.Page, steps: int) -> None:
    page.get_by_role("button", name="More").locator("visible=true").click()
    set_number(page, "Steps", steps)


def set_seed(page: playwright.Page, seed: float) -> None:
    page.locator("#random input").uncheck()
    page.locator("#seed input").fill(str(seed))
    page.locator("#seed input").press("Tab")


def status(page: playwright.Page, where: str = "#status") -> str:
    return page.locator(f"{where} .line").inner_text()


def wait_for_status(page: playwright.Page, start: str, where: str = "#status") -> None:
    page.wait_for_function(
        "([where, start]) => document.querySelector(`${where} .line`).textContent.startsWith(start)",
        arg=[where, start],
    )


def wait_for_image(page: playwright.Page, where: str = "#results") -> None:
    page.wait_for_function(f"document.querySelector('{where} img')?.naturalWidth > 0")


def generated(page: playwright.Page) -> bytes:
    """Click Generate, wait until it is done; the picture's bytes as the page has them."""
    page.locator("#generate:enabled").wait_for()
    page.evaluate("document.querySelector('#status .line').textContent = ''")  # what the last one said
    button(page, "Generate").click()
    page.wait_for_function(
        "document.querySelector('#results img')?.naturalWidth > 0"
        " && document.querySelector('#status .line').textContent === 'done'"
    )
    page.locator("#generate:enabled").wait_for()
    return page.request.get(page.locator("#results img").first.get_attribute("src")).body()


def settings_in(picture: bytes) -> str:
    return Image.open(io.BytesIO(picture)).info["s2ft"]


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def open_history(page: playwright.Page) -> None:
    """Bring the History tab to the front, and wait for the last thing that it does then by itself."""
    page.evaluate("""() => {
        const close = s2ft.closeUnpicked;
        s2ft.closeUnpicked = () => {close.call(s2ft); s2ft.looked = true;};
    }""")
    tab(page, "History")
    page.wait_for_function("s2ft.looked")


def pick(page: playwright.Page, words: str = "") -> None:
    """Choose a picture of the history by what stands under it: of the list, since a click on the large view goes to the
    next one."""
    if page.locator("#history .preview").count():
        page.locator("#history").get_by_role("button", name="Close").click()
        page.locator("#use-settings:disabled").wait_for()
    pick_item(page, page.locator("#history .thumbnail-item", has_text=words).first)


def pick_item(page: playwright.Page, item: playwright.Locator) -> None:
    """Choose a picture of the history. A narrow page scrolls to its settings then, and a click meanwhile may miss."""
    before = page.evaluate("s2ft.revealed")
    item.click()
    page.locator("#use-settings:enabled").wait_for()
    page.wait_for_function("before => innerWidth > 720 || s2ft.revealed > before", arg=before)


@contextmanager
def slow_to_answer(page: playwright.Page) -> Iterator[None]:
    """The next answer of the server comes only when the block ends; what is asked after it is answered before."""
    asked, first, held = re.compile(r"/gradio_api/(run/|queue/join)"), [], []

    def hold(route: playwright.Route) -> None:
        if first:
            route.continue_()
            return
        first.append(route)
        held.append(route.fetch())

    page.route(asked, hold)
    yield
    while not held:
        page.wait_for_timeout(50)
    first[0].fulfill(response=held[0])
    page.unroute(asked)


def wait_until_in_view(page: playwright.Page, selector: str) -> None:
    """Until some of an element is on the screen, which the page may still be scrolling to."""
    page.wait_for_function(
        "selector => {const box = document.querySelector(selector).getBoundingClientRect();"
        "return box.height > 0 && box.top < innerHeight - 10 && box.bottom > 10}",
        arg=selector,
    )
