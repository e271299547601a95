"""The Library tab in a real browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from s2ft_diffusion.adapters.file import read_adapter, write_adapter
from tests.gradio_app.browser import (
    button,
    choose,
    chosen,
    generated,
    labels,
    needs_browser,
    set_steps,
    settings_in,
    slow_to_answer,
    tab,
    tile,
)

pytestmark = [pytest.mark.slow, needs_browser]

TILES = "[...document.querySelectorAll('#library .tile span')].map(e => e.innerText)"


@pytest.fixture(autouse=True)
def tidy(served):
    yield
    library = served[1].library
    for path in library.folder.glob("*.safetensors"):
        path.unlink()
    library.refresh()


def upload(page, path: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files(path)


def test_upload_use_rename_and_delete(page, fresh) -> None:
    another = fresh("cat")
    tab(page, "Library")
    upload(page, another)
    tile(page, "cat (2026-02-03)", "#library").wait_for()
    page.wait_for_function("document.querySelector('#name textarea, #name input')?.value === 'cat'")
    assert chosen(page, "#library") == ["cat (2026-02-03)"]
    # equal names are told apart, by the same words in every tab
    for name, where in (
        ("Generate", "#adapter"),
        ("Compare", "#compared"),
        ("Inspect", "#inspected"),
        ("Library", "#library"),
    ):
        tab(page, name)
        for label in ("cat (2026-01-01)", "cat (2026-02-03)"):
            tile(page, label, where).wait_for()
    upload(page, another)
    page.get_by_text("This file is there already, as cat (2026-02-03)").wait_for()
    page.locator("#upload input[type=file]").wait_for(state="attached")  # the field is empty again: all of it is over
    page.locator("#name textarea, #name input").fill("Tom")
    page.locator("#rename").click()
    tile(page, "Tom", "#library").wait_for()
    tile(page, "cat", "#adapter").wait_for(state="attached")
    page.locator("#about").get_by_text("Tom").wait_for()
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.locator("#delete").click()
    assert tile(page, "Tom", "#library").count() == 1  # asked, and not meant
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#delete").click()
    tile(page, "Tom", "#library").wait_for(state="detached")
    tile(page, "Tom", "#adapter").wait_for(state="detached")
    page.locator("#use:disabled").wait_for()
    choose(page, "dog", "#library")
    page.locator("#use:enabled").wait_for()
    assert not page.locator("#delete").locator("visible=true").count()  # it is not from here


def test_who_said_no_may_ask_again_at_once(page, fresh) -> None:
    """Also before the server has answered to the no."""
    tab(page, "Library")
    upload(page, fresh("cat", subject="Tom"))
    tile(page, "Tom", "#library").wait_for()
    page.wait_for_function("document.querySelector('#name textarea, #name input')?.value === 'Tom'")
    with slow_to_answer(page):
        page.once("dialog", lambda dialog: dialog.dismiss())
        page.locator("#delete").click()
        page.once("dialog", lambda dialog: dialog.accept())
        page.locator("#delete").click()
        tile(page, "Tom", "#library").wait_for(state="detached")


def test_what_is_deleted_is_chosen_nowhere(page, fresh) -> None:
    tab(page, "Library")
    upload(page, fresh("cat", subject="Tom"))
    tile(page, "Tom", "#library").wait_for()
    page.locator("#use:enabled").click()
    page.wait_for_function("document.querySelector('#adapter .tile:has(input:checked) span').innerText === 'Tom'")
    tab(page, "Compare")
    before = chosen(page, "#compared")
    choose(page, "Tom", "#compared")
    tab(page, "Library")
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#delete:enabled").click()
    tile(page, "Tom", "#adapter").wait_for(state="detached")
    tab(page, "Compare")
    assert chosen(page, "#compared") == before
    page.locator("#compare:enabled").wait_for()
    tab(page, "Generate")
    assert chosen(page) == ["none"]
    set_steps(page, 2)
    assert '"adapters": []' in settings_in(generated(page))


def test_a_broken_file_is_refused(page, tmp_path) -> None:
    tab(page, "Library")
    before = labels(page, "#library")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not an adapter")
    upload(page, broken)
    message = page.get_by_text("This file cannot be used")
    message.first.wait_for()
    assert "/tmp" not in message.first.inner_text()
    assert labels(page, "#library") == before


def test_another_base_is_said(page, adapters, tmp_path) -> None:
    adapter = read_adapter(adapters / "cat.safetensors")
    info = replace(adapter.info, base_model="somewhere/other-base", subject="stranger")
    write_adapter(tmp_path / "fits.safetensors", replace(adapter, info=info))
    tab(page, "Library")
    upload(page, tmp_path / "fits.safetensors")
    page.get_by_text("made for other-base: it fits, but may not show its subject here").first.wait_for()
    page.locator("#about").get_by_text("Made for other-base").wait_for()
    layers = {f"{name}.elsewhere": weights for name, weights in adapter.layers["unet"].items()}
    write_adapter(tmp_path / "wrong.safetensors", replace(adapter, info=info, layers={"unet": layers}))
    page.locator("#upload input[type=file]").wait_for(state="attached")
    upload(page, tmp_path / "wrong.safetensors")
    page.get_by_text("it was made for other-base and does not fit toybox").first.wait_for()


def test_what_is_chosen_is_what_is_marked(page) -> None:
    """Also after sorting and searching."""
    tab(page, "Library")
    assert page.locator("#use:disabled").count() == 1
    assert page.locator("#download button:disabled, #download:disabled").count() >= 1
    choose(page, "dog", "#library")
    page.locator("#about").get_by_text("a photo of sks dog").wait_for()
    page.locator("#sort").get_by_text("name", exact=True).click()
    page.wait_for_function(f"{TILES}.join() === 'both,cat,dog'")
    assert chosen(page, "#library") == ["dog"]
    page.locator("#search textarea, #search input").press_sequentially("do")  # found while it is typed
    page.wait_for_function("document.querySelectorAll('#library .tile').length === 1")
    assert chosen(page, "#library") == ["dog"]
    page.locator("#search textarea, #search input").fill("zzz")
    page.locator("#library").get_by_text("Nothing found.").wait_for()
    with page.expect_download() as download:  # one click
        page.locator("#download").click()
    assert download.value.suggested_filename == "dog.safetensors"


def test_one_for_another_tool_and_two_in_one(page) -> None:
    tab(page, "Library")
    page.get_by_role("button", name="For other tools").click()
    assert page.locator("#export:disabled").count() == 1
    choose(page, "dog", "#library")
    page.locator("#tool").get_by_text("A1111, Forge").click()
    with page.expect_download() as download:  # one click
        page.locator("#export:enabled").click()
    assert download.value.suggested_filename == "dog-kohya.safetensors"
    with safe_open(download.value.path(), "pt") as file:
        alone = set(file.keys())
    assert all(key.startswith("lora_unet_") for key in alone)
    page.locator("#exported").get_by_text("dog-kohya.safetensors: ").wait_for()
    tile(page, "dog", "#merged").click()
    page.locator("#export:enabled").click()
    page.locator("#exported").get_by_text("failed: The two adapters are the same one").wait_for()
    tile(page, "both", "#merged").click()
    with page.expect_download() as download:
        page.locator("#export:enabled").click()
    assert download.value.suggested_filename == "dog-both-kohya.safetensors"
    with safe_open(download.value.path(), "pt") as file:
        assert set(file.keys()) > alone


def test_words_of_strangers_are_only_words(page, fresh) -> None:
    evil = "${document.title='x'}<img src=x onerror=document.title='x'>{{value}}`"
    tab(page, "Library")
    upload(page, fresh("cat", subject=evil, instance_prompt=f"a photo of {evil}"))
    page.wait_for_function(f"{TILES}.some(text => text.includes('$'))")
    page.locator("#use:enabled").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('${')")
    tab(page, "Compare")
    assert page.title() != "x"
    assert button(page, "Compare").is_enabled()
