"""The page in a real browser."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; the endpoint tests still run"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served) -> Iterator[playwright.Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    open_page(page, served[0])
    yield page
    assert page.errors == []
    page.close()


def open_page(page: playwright.Page, address: str) -> None:
    page.goto(address)
    button(page, "Generate").wait_for()
    page.wait_for_function("document.querySelectorAll('#library, #prompt').length > 0")
    page.wait_for_timeout(500)  # the events of loading the page have run


def button(page: playwright.Page, name: str) -> playwright.Locator:
    return page.get_by_role("button", name=name, exact=True).locator("visible=true")


def tab(page: playwright.Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def choose(page: playwright.Page, adapter: str) -> None:
    page.locator("#adapter input").click()
    page.get_by_role("option", name=adapter, exact=True).click()


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


def wait_for_status(page: playwright.Page, start: str) -> None:
    value = "document.querySelector('#status textarea, #status input').value"
    page.wait_for_function(f"{value}.startsWith('{start}')")


def generated(page: playwright.Page) -> bytes:
    """Click Generate, wait until it is done; the picture's bytes as the page has them."""
    button(page, "Generate").click()
    wait_for_status(page, "step")
    wait_for_status(page, "done")
    page.wait_for_function("document.querySelector('#results img')?.naturalWidth > 0")
    return page.request.get(page.locator("#results img").first.get_attribute("src")).body()


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def test_it_is_quick(browser, served) -> None:
    page = browser.new_page()
    began = time.monotonic()
    page.goto(served[0])
    button(page, "Generate").wait_for()
    assert time.monotonic() - began < 3
    began = time.monotonic()
    button(page, "Generate").click()
    page.wait_for_function("document.querySelector('#results img')?.naturalWidth > 0", timeout=60_000)
    assert time.monotonic() - began < 8
    page.close()


def test_pick_an_adapter_generate_and_see_strength_count(page) -> None:
    choose(page, "dog")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a photo of sks dog'")
    set_steps(page, 4)
    first = generated(page)
    assert Image.open(io.BytesIO(first)).format == "PNG"
    assert '"steps": 4' in Image.open(io.BytesIO(first)).info["s2ft"]
    assert np.array_equal(pixels(generated(page)), pixels(first))
    set_number(page, "Strength", 0.3)
    weaker = generated(page)
    assert not np.array_equal(pixels(weaker), pixels(first))
    # what the download button saves is the PNG with its settings
    page.locator("#results img").first.click()
    with page.expect_download() as download:
        page.locator("#results").get_by_label("Download").first.click()
    saved = Path(download.value.path()).read_bytes()
    assert saved == weaker
    # the settings of an image in the history go back into the controls
    set_number(page, "Strength", 1.1)
    tab(page, "History")
    page.locator("#history img").first.click()
    page.locator("#use-settings").click()
    page.wait_for_function("document.querySelector('#strength input[type=number]').value === '0.3'")


def test_cancel(page) -> None:
    set_steps(page, 60)
    set_number(page, "Images", 8)
    button(page, "Generate").click()
    page.wait_for_function("document.querySelector('#results img')?.naturalWidth > 0")
    button(page, "Cancel").click()
    wait_for_status(page, "cancelled")
    page.wait_for_timeout(2000)  # nothing comes after it, and what was finished stays
    wait_for_status(page, "cancelled")
    assert 1 <= page.locator("#results img").count() < 8


def test_cancel_while_waiting(browser, served) -> None:
    pages = [browser.new_page() for _ in range(3)]  # two generate at once
    for page in pages:
        open_page(page, served[0])
        set_steps(page, 100)
        set_number(page, "Images", 8)
    for page in pages[:2]:
        button(page, "Generate").click()
        wait_for_status(page, "step")
    waiting = pages[2]
    button(waiting, "Generate").click()
    waiting.get_by_text("queue: ").wait_for()
    button(waiting, "Cancel").click()
    wait_for_status(waiting, "cancelled")
    for page in pages[:2]:
        button(page, "Cancel").click()
        wait_for_status(page, "cancelled")
    waiting.wait_for_timeout(3000)  # it does not come to its turn
    wait_for_status(waiting, "cancelled")
    set_number(waiting, "Steps", 3)
    set_number(waiting, "Images", 1)
    assert generated(waiting)
    button(waiting, "Cancel").click()
    waiting.wait_for_timeout(1000)
    wait_for_status(waiting, "done")  # there was nothing to cancel any more
    for page in pages:
        page.close()


def test_upload_a_good_file_and_a_broken_one(page, adapters, tmp_path, served) -> None:
    tab(page, "Library")
    page.wait_for_function("document.querySelectorAll('#library img').length >= 3")
    before = page.locator("#library img").count()
    page.locator("#upload input[type=file]").set_input_files(adapters / "cat.safetensors")
    page.wait_for_function(f"document.querySelectorAll('#library img').length === {before + 1}")
    page.locator("#upload").get_by_label("Clear").click()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not an adapter")
    page.locator("#upload input[type=file]").set_input_files(broken)
    message = page.get_by_text("This file cannot be used")
    message.wait_for()
    assert "/tmp" not in message.inner_text()
    assert page.locator("#library img").count() == before + 1
    page.locator("#library button:has(img)").first.click()
    page.get_by_text("trainable numbers").wait_for()
    page.locator("#use").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a photo of sks cat'")
    for entry in served[1].library.search():
        if entry.path.parent == served[1].library.folder:
            entry.path.unlink()


def test_train_and_reload_meanwhile(page, photos, served, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tab(page, "Train")
    page.locator("#photos input[type=file]").set_input_files(sorted(photos.iterdir()))
    page.locator("#photos").get_by_text("0.png").wait_for()
    page.locator("#subject textarea, #subject input").fill("Waldo")
    page.locator("#kind textarea, #kind input").fill("dog")
    set_number(page, "Steps", 60)
    set_number(page, "Trainable numbers a layer", 100)
    page.locator("#train").click()
    report = page.locator("#training")
    report.get_by_text("estimate").first.wait_for()
    page.reload()
    button(page, "Generate").wait_for()
    tab(page, "Train")
    report.get_by_text("Waldo").wait_for()  # the page finds its training again
    report.get_by_text("The adapter is in the library").wait_for(timeout=240_000)
    tab(page, "Generate")
    choose(page, "Waldo")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a photo of sks dog'")
    set_steps(page, 3)
    assert generated(page)


def test_compare_and_inspect(page) -> None:
    tab(page, "Compare")
    set_number(page, "Steps", 2)
    page.locator("#compare").click()
    page.wait_for_function("document.querySelector('#sheet img')?.naturalWidth > 800")
    tab(page, "Inspect")
    page.locator("#inspect").click()
    page.wait_for_function("document.querySelectorAll('#pictures img').length >= 3")


def test_a_phone(browser, served) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    open_page(page, served[0])
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert button(page, "Generate").bounding_box()["y"] < 844  # without scrolling
    page.close()
