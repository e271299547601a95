"""The Generate tab in a real browser."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import app.app
from tests.gradio_app.browser import (
    PATIENT,
    button,
    choose,
    chosen,
    generated,
    needs_browser,
    open_page,
    pixels,
    prompt,
    set_number,
    set_seed,
    set_steps,
    settings_in,
    slow_to_answer,
    status,
    tab,
    tile,
    wait_for_image,
    wait_for_status,
    wait_for_value,
    wait_until_in_view,
)

pytestmark = [pytest.mark.slow, needs_browser]


def test_pick_an_adapter_generate_and_see_strength_count(page) -> None:
    choose(page, "dog")
    wait_for_value(page, "#prompt textarea", "a photo of sks dog")
    set_steps(page, 4)
    set_seed(page, 11)
    first = generated(page)
    assert '"steps": 4' in settings_in(first)
    assert '"seed": 11' in settings_in(first)
    assert np.array_equal(pixels(generated(page)), pixels(first))
    set_number(page, "Strength", 0.3)
    weaker = generated(page)
    assert not np.array_equal(pixels(weaker), pixels(first))
    # what the download button saves is the PNG with its settings, named by subject and seed
    page.locator("#results img").first.click()
    with page.expect_download() as download:
        page.locator("#results").get_by_label("Download").first.click()
    assert Path(download.value.path()).read_bytes() == weaker
    assert download.value.suggested_filename == "dog-11.png"


def test_a_prompt_of_ones_own_stays(page) -> None:
    """Only an adapter's own prompt is replaced; in what a person wrote, the trigger words are exchanged."""
    choose(page, "cat")
    wait_for_value(page, "#prompt textarea", "a photo of sks cat")
    choose(page, "dog")
    wait_for_value(page, "#prompt textarea", "a photo of sks dog")
    prompt(page).fill("an oil painting of sks dog in space")
    choose(page, "cat")
    wait_for_value(page, "#prompt textarea", "an oil painting of sks cat in space")
    tab(page, "Library")
    choose(page, "dog", "#library")
    page.locator("#use:enabled").click()
    wait_for_value(page, "#prompt textarea", "an oil painting of sks dog in space")
    prompt(page).fill("a lighthouse")
    choose(page, "cat")
    page.wait_for_function("new URL(location).searchParams.get('prompt') === 'a lighthouse'")
    choose(page, "none")
    page.wait_for_function("new URL(location).searchParams.get('adapter') === 'none'")
    assert prompt(page).input_value() == "a lighthouse"
    prompt(page).fill("")
    choose(page, "cat")
    wait_for_value(page, "#prompt textarea", "a photo of sks cat")


def test_of_two_adapters_chosen_quickly_the_second_has_its_prompt(page) -> None:
    with slow_to_answer(page):
        choose(page, "cat")
        choose(page, "dog")
    wait_for_value(page, "#prompt textarea", "a photo of sks dog")
    assert chosen(page) == ["dog"]


def test_what_is_typed_before_an_adapters_prompt_comes_stays(page, monkeypatch) -> None:
    exchanged, typed = app.app.exchanged, threading.Event()

    def late(*words):
        typed.wait(PATIENT / 1000)
        return exchanged(*words)

    monkeypatch.setattr(app.app, "exchanged", late)
    dog = tile(page, "dog").locator("input").get_attribute("value")
    choose(page, "dog")
    prompt(page).fill("my sks dog")
    with page.expect_response(lambda response: dog in (response.request.post_data or "")):
        typed.set()
    choose(page, "cat")
    wait_for_value(page, "#prompt textarea", "my sks cat")


def test_another_seed_each_time_unless_it_is_held(page) -> None:
    set_steps(page, 2)
    seeds = []
    for _ in range(2):
        made = generated(page)
        seeds.append(page.locator("#seed input").input_value())
        assert f'"seed": {seeds[-1]},' in settings_in(made)
    assert seeds[0] != seeds[1]
    page.locator("#again").click()
    page.wait_for_function("!document.querySelector('#random input').checked")
    assert settings_in(generated(page)) == settings_in(made)


def test_a_bad_seed_is_named(page) -> None:
    set_steps(page, 2)
    set_seed(page, 1.5)
    button(page, "Generate").click()
    wait_for_status(page, "failed: The seed must be a whole number, got 1.5")
    assert page.locator("#seed input").input_value() == "1.5"
    page.locator("#generate:enabled").wait_for()
    set_seed(page, -1)
    assert '"seed": -1' not in settings_in(generated(page))


def test_a_failure_is_said_where_the_status_is(page, served, monkeypatch) -> None:
    def fail(*args):
        raise RuntimeError("secret")

    monkeypatch.setattr(served[1].engine, "iterate", fail)
    button(page, "Generate").click()
    wait_for_status(page, "failed: Something went wrong here")
    page.locator("#generate:enabled").wait_for()
    assert status(page).startswith("failed")
    assert not page.locator("#cancel:enabled").count()


def test_cancelling_keeps_what_is_finished(page) -> None:
    set_steps(page, 60)
    set_number(page, "Images", 8)
    button(page, "Generate").click()
    page.wait_for_function("document.querySelectorAll('#results img').length >= 2")
    page.locator("#cancel").click()
    wait_for_status(page, "cancelled with ")
    page.locator("#generate:enabled").wait_for()
    made = page.locator("#results img").count()
    assert status(page) == f"cancelled with {made} of 8 images"
    assert 2 <= made < 8


def test_a_picture_chosen_before_the_last_one_came_stays_chosen(page) -> None:
    """Also after a request that fails: the pictures are those of before."""
    set_steps(page, 30)
    set_number(page, "Images", 4)
    set_seed(page, 70)
    button(page, "Generate").click()
    page.locator("#results .thumbnail-item").nth(1).click()
    wait_for_status(page, "done")
    page.locator("#again:enabled").click()
    wait_for_value(page, "#seed input", "71")
    set_seed(page, 1.5)
    page.locator("#generate:enabled").click()
    wait_for_status(page, "failed: ")
    page.locator("#again:enabled").click()
    wait_for_value(page, "#seed input", "71")


def test_cancelling_while_waiting(pages, size) -> None:
    first, second, waiting = pages(), pages(), pages(**size)  # two generate at once
    for page in (first, second):
        set_steps(page, 100)
        set_number(page, "Images", 8)
        button(page, "Generate").click()
        wait_for_status(page, "step")
    button(waiting, "Generate").click()
    wait_for_status(waiting, "queued")
    waiting.locator("#cancel").click()
    wait_for_status(waiting, "cancelled before it began")
    for page in (first, second):
        page.locator("#cancel").click()
        wait_for_status(page, "cancelled with")
    set_steps(waiting, 3)
    assert generated(waiting)  # the next one has its turn
    assert waiting.locator("#results img").count() == 1
    assert waiting.locator("#cancel:disabled").count() == 1


def test_words_that_are_not_read_are_named(page) -> None:
    prompt(page).fill("a photo of sks cat")
    page.wait_for_function("document.querySelector('#tokens .line').textContent === '7 of 32 tokens'")
    prompt(page).fill("a cat " * 30 + "zebra")
    page.wait_for_function("document.querySelector('#tokens .line').classList.contains('warns')")
    assert "zebra” is not read" in status(page, "#tokens")


def test_shift_enter_generates(page) -> None:
    set_steps(page, 2)
    prompt(page).press("Shift+Enter")
    wait_for_status(page, "done")
    wait_for_image(page)


def test_a_prompt_a_line(page) -> None:
    set_steps(page, 2)
    page.locator("#lines input").check()
    prompt(page).fill("a red dog\n\na blue cat")
    button(page, "Generate").click()
    wait_for_status(page, "done")
    page.wait_for_function("document.querySelectorAll('#results img').length === 2")
    assert page.locator("#results").get_by_text("blue cat · seed").count()
    page.locator("#tokens").get_by_text("in the longest line").wait_for()


def test_a_picture_gives_its_settings_back(page, tmp_path) -> None:
    choose(page, "dog")
    set_steps(page, 3)
    set_seed(page, 5)
    set_number(page, "Strength", 0.35)
    made = tmp_path / "made.png"
    made.write_bytes(generated(page))
    address = page.url.split("?")[0]
    open_page(page, address)
    # dropped on the tab, not on the field
    page.evaluate(
        """([name, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
            document.querySelector('#prompt').dispatchEvent(
                new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        ["made.png", list(made.read_bytes())],
    )
    wait_for_status(page, "these are the settings of that picture")
    wait_for_value(page, "#seed input", "5")
    wait_for_value(page, "#strength input[type=number]", "0.35")
    assert chosen(page) == ["dog"]
    assert settings_in(generated(page)) == settings_in(made.read_bytes())


def test_back_reload_and_links(page, pages) -> None:
    choose(page, "dog")
    wait_for_value(page, "#prompt textarea", "a photo of sks dog")  # which would replace what is typed before it
    prompt(page).fill("sks dog at sea")
    set_seed(page, 9)
    set_number(page, "Strength", 0.45)
    page.wait_for_function("new URL(location).searchParams.get('strength') === '0.45'")
    tab(page, "Library")
    tab(page, "History")
    page.go_back()
    page.locator("#library").wait_for()
    page.go_back()
    page.locator("#prompt").wait_for()
    for again in (page, pages(page.url.split("/")[-1])):
        if again is page:
            open_page(page, page.url)
        wait_for_value(again, "#prompt textarea", "sks dog at sea")
        wait_for_value(again, "#seed input", "9")
        wait_for_value(again, "#strength input[type=number]", "0.45")
        assert chosen(again) == ["dog"]
        assert not again.locator("#random input").is_checked()


def test_a_link_that_says_nonsense(pages, size) -> None:
    page = pages("?tab=attic&adapter=../../x&seed=-7&steps=1e9&prompt=hello&scheduler=__class__", **size)
    wait_for_value(page, "#prompt textarea", "hello")
    wait_for_value(page, "#seed input", "0")


def test_the_result_comes_first_and_the_page_does_not_jump(page) -> None:
    """One picture fills the width, the preview lies in the same frame, and nothing below it moves."""
    places = """() => ['#canvas', '#status', '#again', '#strength'].map(
        part => Math.round(document.querySelector(part).getBoundingClientRect().top + scrollY))"""
    inside = """part => {
        const frame = document.querySelector('#canvas').getBoundingClientRect();
        const box = document.querySelector(part).getBoundingClientRect();
        return [frame.left, frame.top].every((edge, i) => [box.left, box.top][i] >= edge - 1)
            && box.right <= frame.right + 1 && box.bottom <= frame.bottom + 1 && box.width > 0.85 * frame.width;
    }"""
    set_steps(page, 60)
    before = page.evaluate(places)
    button(page, "Generate").click()
    wait_for_status(page, "step ")
    wait_for_image(page, "#preview")
    assert page.evaluate(places) == before
    assert page.evaluate(inside, "#preview img")
    assert status(page).endswith(" of 60")
    wait_for_status(page, "done")
    wait_for_image(page)
    page.locator("#preview img").wait_for(state="detached")
    assert page.evaluate(places) == before
    assert page.evaluate(inside, "#results img")


def test_a_phone(phone) -> None:
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    wait_until_in_view(phone, "#generate")
    button(phone, "Generate").click()
    phone.wait_for_function("document.querySelector('#status .line').textContent === 'done'")
    wait_for_image(phone)
    wait_until_in_view(phone, "#canvas")
    wait_until_in_view(phone, "#status")
    tab(phone, "Library")
    tile(phone, "dog", "#library").click()
    phone.get_by_text("trainable numbers").wait_for()
    wait_until_in_view(phone, "#about")
    wait_until_in_view(phone, "#use")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
