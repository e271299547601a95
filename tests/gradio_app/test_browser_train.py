"""The Train tab in a real browser."""

from __future__ import annotations

import pytest

from tests.gradio_app.browser import (
    chosen,
    generated,
    needs_browser,
    open_page,
    set_number,
    set_steps,
    tab,
    tile,
    wait_for_value,
)
from tests.gradio_app.conftest import PATIENCE

pytestmark = [pytest.mark.slow, needs_browser, pytest.mark.timeout(3 * PATIENCE)]


def test_train_reload_meanwhile_and_try_it(page, photos, served, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    page.set_default_timeout(1000 * PATIENCE)
    tab(page, "Train")
    assert page.locator("#train:disabled").count() == 1
    page.locator("#photos input[type=file]").set_input_files(sorted(photos.iterdir()))
    page.wait_for_function("document.querySelectorAll('#thumbnails img').length === 3")
    page.locator("#captions input").nth(1).fill("on a beach")
    page.locator("#subject textarea, #subject input").fill("Waldo")
    page.locator("#kind textarea, #kind input").fill("dog")
    set_number(page, "Steps", 60)
    set_number(page, "Trainable numbers a layer", 100)
    page.locator("#train:enabled").click()
    report = page.locator("#training")
    report.get_by_text("Waldo").first.wait_for()
    stored = sorted(served[1].trainings.folder.glob("*/photos/*.txt"))[-1]
    assert (stored.name, stored.read_text()) == ("01.txt", "a photo of sks dog on a beach")
    open_page(page, page.url)  # at its tab again, and with its training
    report.get_by_text("Training … step").or_(report.get_by_text("is in the library")).first.wait_for()
    report.get_by_text("The adapter is in the library").wait_for()
    # the axis of steps has a few numbers, not a word for every step
    ticks = page.locator("#curve svg text").all_inner_texts()
    assert ticks
    assert len(ticks) < 40
    tab(page, "Library")
    tile(page, "Waldo", "#library").wait_for()  # without a click on Refresh
    tab(page, "Train")
    page.locator("#try-it").click()
    wait_for_value(page, "#prompt textarea", "a photo of sks dog")
    assert chosen(page) == ["Waldo"]
    set_steps(page, 3)
    assert generated(page)
