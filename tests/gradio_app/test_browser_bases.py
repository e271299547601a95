"""The app on another base, in a real browser: the embedded flow, a Stable Diffusion 3."""

from __future__ import annotations

import pytest

from tests.gradio_app.browser import (
    LAPTOP,
    PATIENT,
    generated,
    labels,
    needs_browser,
    open_page,
    set_seed,
    set_steps,
    settings_in,
    tab,
    tile,
    wait_for_status,
)

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def flow(adapters, tmp_path_factory):
    from app.arguments import parse_arguments
    from app.server import close, launch

    outputs = tmp_path_factory.mktemp("flow")
    flags = ["--base", "toybox-flow", "--adapters", str(adapters), "--outputs", str(outputs), "--port", "0"]
    blocks, app, address = launch(parse_arguments(flags), block=False)
    yield address
    close(blocks, app)


def test_a_base_of_another_family(browser, flow, page, tmp_path) -> None:
    """Its own scheduler, its own gallery, and adapters of other bases only where they are asked for."""
    set_steps(page, 2)
    made = tmp_path / "toybox.png"
    made.write_bytes(generated(page))
    there = browser.new_context(**LAPTOP).new_page()
    there.set_default_timeout(PATIENT)
    open_page(there, flow)
    assert "toybox-flow" in there.locator("#masthead").inner_text()
    assert "MB of weights" in there.locator("#masthead").inner_text()
    assert labels(there, "#adapter") == ["none"]
    there.locator("#prompt textarea").fill("a photo of a cat")
    set_steps(there, 3)
    assert not there.get_by_text("Scheduler").locator("visible=true").count()
    set_seed(there, 3)
    assert '"scheduler": "own"' in settings_in(generated(there))
    there.locator("#restore input[type=file]").set_input_files(made)
    wait_for_status(there, "that picture was made on toybox")
    tab(there, "Library")
    there.locator("#library").get_by_text("Nothing found.").wait_for()
    there.locator("#others input").check()
    tile(there, "cat", "#library").click()
    there.get_by_text("Cannot be used: it was made for toybox and does not fit toybox-flow").wait_for()
    assert there.locator("#use:disabled").count() == 1
    tab(there, "History")
    there.locator("#history").get_by_text("base · seed 3").first.wait_for()
    assert there.locator("#history .thumbnail-item, #history .caption-label").count() >= 1
    assert not there.locator("#history").get_by_text("cat 1").count()
    there.context.close()
