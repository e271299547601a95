"""The Compare, Inspect and History tabs in a real browser."""

from __future__ import annotations

import re

import pytest

from tests.gradio_app.browser import (
    button,
    choose,
    chosen,
    generated,
    needs_browser,
    open_history,
    pick,
    pick_item,
    prompt,
    set_number,
    set_seed,
    set_steps,
    slow_to_answer,
    status,
    tab,
    wait_for_image,
    wait_for_status,
    wait_for_value,
    wait_until_in_view,
)

pytestmark = [pytest.mark.slow, needs_browser]


def test_several_adapters_and_prompts_as_one_sheet(page) -> None:
    tab(page, "Compare")
    set_steps(page, 2)
    set_number(page, "Seeds", 1)
    before = chosen(page, "#compared")
    for name in ("cat", "dog", "both"):
        if name not in before:
            choose(page, name, "#compared")
    page.locator("#compare-prompt textarea").fill("a red dog\na blue cat")
    page.locator("#strengths input, #strengths textarea").fill("1")
    page.locator("#compare").click()
    wait_for_status(page, "done", "#compare-status")
    wait_for_image(page, "#sheet")
    wait_until_in_view(page, "#sheet")  # on a phone, too, where it is below what was asked for
    wait_until_in_view(page, "#compare-status")
    width, height = page.evaluate("(i => [i.naturalWidth, i.naturalHeight])(document.querySelector('#sheet img'))")
    assert (width // 256, height // 256) == (4, 2)
    # no label lies over the first column's title
    assert not page.locator("#sheet label").locator("visible=true").count()
    # what cannot be is said, and the last sheet stays
    page.locator("#strengths input, #strengths textarea").fill("much")
    page.locator("#compare").click()
    wait_for_status(page, "failed: The strengths must be numbers", "#compare-status")
    assert page.locator("#sheet img").is_visible()
    # so it does when one is cancelled, which is no error
    page.locator("#strengths input, #strengths textarea").fill("1, 0.5")
    set_number(page, "Steps", 100)
    for toast in page.locator(".toast-close").all():
        toast.click()
    page.locator("#compare:enabled").click()
    wait_for_status(page, "step", "#compare-status")
    page.locator("#cancel-compare").click()
    wait_for_status(page, "cancelled", "#compare-status")
    page.locator("#compare:enabled").wait_for()
    assert page.locator("#sheet img").is_visible()
    assert not page.locator(".toast-body.error").count()
    for name in ("cat", "dog", "both"):
        choose(page, name, "#compared")
    page.locator("#compare:disabled").wait_for()


def test_inspect(page) -> None:
    tab(page, "Inspect")
    choose(page, "both", "#inspected")
    page.locator("#inspect").click()
    page.wait_for_function("document.querySelectorAll('#pictures img').length >= 3")
    # another layer, by keys alone: the browser's own list, which takes no words
    field, shown = page.locator("#layer select"), page.locator("#pictures img").first
    before, picture = field.input_value(), shown.get_attribute("src")
    field.focus()
    page.keyboard.press("Home")
    page.wait_for_function("before => document.querySelector('#pictures img').src !== before", arg=picture)
    assert field.input_value() != before
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.matches('#layer select')")


def test_of_two_layers_chosen_quickly_the_second_is_shown(page) -> None:
    tab(page, "Inspect")
    choose(page, "both", "#inspected")
    page.locator("#inspect").click()
    page.wait_for_function("document.querySelectorAll('#pictures img').length >= 3")
    field = page.locator("#layer select")
    first, second = [name for name in field.locator("option").all_inner_texts() if name != field.input_value()][:2]
    with page.expect_response(lambda response: second in (response.request.post_data or "")), slow_to_answer(page):
        field.select_option(first)
        field.select_option(second)
    page.wait_for_timeout(500)  # what came of the first would take its place now
    assert field.input_value() == second


def test_history(page, served) -> None:
    choose(page, "dog")
    set_steps(page, 3)
    set_seed(page, 31)
    set_number(page, "Strength", 0.55)
    prompt(page).fill("remember sks dog")
    generated(page)
    tab(page, "History")
    page.locator("#history").get_by_text("dog 0.55 · seed 31 ·").first.wait_for()
    assert page.locator("#use-settings:disabled").count() == 1
    pick(page, "dog 0.55 · seed 31 ·")
    page.locator("#image-settings").get_by_text("remember sks dog").wait_for()
    wait_until_in_view(page, "#image-settings")
    page.locator("#favourite").click()
    page.locator("#favourite", has_text="No favourite").wait_for()
    page.locator("#favourites input").check()
    pick(page, "★ dog 0.55 · seed 31 ·")
    page.locator("#compare-from:enabled").click()
    wait_for_value(page, "#compare-prompt textarea", "remember sks dog")
    assert chosen(page, "#compared") == ["dog"]
    tab(page, "Generate")
    set_number(page, "Strength", 1.1)
    tab(page, "History")
    page.locator("#favourites input").uncheck()
    pick(page, "dog 0.55 · seed 31 ·")
    page.locator("#use-settings:enabled").click()
    wait_for_value(page, "#strength input[type=number]", "0.55")
    wait_for_value(page, "#seed input", "31")
    tab(page, "History")
    pick(page, "dog 0.55 · seed 31 ·")
    there = served[1].history.latest(None)
    with page.expect_response(re.compile("gradio_api/run/")):
        page.once("dialog", lambda dialog: dialog.dismiss())
        page.locator("#delete-image:enabled").click()
    assert served[1].history.latest(None) == there  # asked, and not meant
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#delete-image:enabled").click()
    page.locator("#history").get_by_text("dog 0.55 · seed 31 ·").first.wait_for(state="detached")
    assert status(page) == "done"


def test_a_picture_chosen_the_moment_it_appears_stays_chosen(page) -> None:
    """Though the page has not yet heard what it was made with when it looks for pictures that nobody chose."""
    generated(page)
    page.evaluate("""() => {
        new MutationObserver((_, self) => {
            const first = document.querySelector('#history .thumbnail-item');
            if (first) {self.disconnect(); first.click();}
        }).observe(document, {childList: true, subtree: true});
    }""")
    open_history(page)
    page.locator("#use-settings:enabled").wait_for()
    assert page.locator("#history .preview").count() == 1
    assert page.locator("#use-settings:enabled").count() == 1


def test_of_two_pictures_chosen_quickly_the_second_is_chosen(page) -> None:
    for seed in (51, 52):
        set_seed(page, seed)
        generated(page)
    open_history(page)
    chosen = page.locator("#image-settings")
    with slow_to_answer(page):
        page.locator("#history .thumbnail-item", has_text="seed 51 ·").first.click()
        page.locator("#history .preview .thumbnail-item").first.click()
        chosen.get_by_text("52", exact=True).wait_for()
    page.wait_for_timeout(500)  # what came of the first would take its place now
    assert chosen.get_by_text("52", exact=True).count()


def test_what_is_shown_large_is_what_is_chosen(page) -> None:
    """Also when the list changes under it: a picture that leaves it gives way to the next one."""
    page.once("dialog", lambda dialog: dialog.accept())
    for seed in (41, 42):
        set_seed(page, seed)
        generated(page)
    tab(page, "History")
    large, chosen = page.locator("#history .preview"), page.locator("#image-settings")
    pick(page, "seed 41 ·")
    page.locator("#favourite").click()
    page.locator("#favourite", has_text="No favourite").wait_for()
    pick_item(page, page.locator("#history .preview .thumbnail-item").first)
    chosen.get_by_text("42", exact=True).wait_for()
    page.locator("#favourites input").check()
    chosen.get_by_text("41", exact=True).wait_for()
    assert "seed 41 ·" in large.inner_text()
    page.locator("#favourites input").uncheck()
    page.locator("#history").get_by_text("seed 42 ·").first.wait_for(state="attached")
    assert "41" in chosen.inner_text()
    page.locator("#delete-image").click()
    page.locator("#history").get_by_text("seed 41 ·").first.wait_for(state="detached")
    chosen.get_by_text("41", exact=True).wait_for(state="detached")
    assert large.locator("img").first.get_attribute("alt") in page.locator("#history").inner_text()
    # one that is no favourite any more leaves the favourites
    page.locator("#favourite").click()
    page.locator("#favourite", has_text="No favourite").wait_for()
    page.locator("#favourites input").check()
    # itself alone: in the list, and below the large view
    page.wait_for_function("document.querySelectorAll('#history .thumbnail-item').length === 2")
    page.locator("#favourite").click()
    page.locator("#delete-image:disabled").wait_for()
    page.locator("#favourites input").uncheck()
    page.locator("#history .thumbnail-item", has_text="seed 42 ·").first.wait_for()
    large.wait_for(state="detached")
    pick(page, "seed 42 ·")
    page.locator("#history").get_by_role("button", name="Close").click()
    page.locator("#delete-image:disabled").wait_for()
    assert button(page, "Use these settings").is_disabled()
