"""The app on another base, in a real browser: the embedded flow, a Stable Diffusion 3, offloaded; and a packed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.gradio_app.browser import (
    PATIENT,
    choose,
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
def serve(adapters, tmp_path_factory) -> Iterator[Callable[..., str]]:
    """Serves the app with further flags, once for each; gives its address."""
    from app.arguments import parse_arguments
    from app.server import close, launch

    served = {}

    def start(*flags: str) -> str:
        if flags not in served:
            outputs = ["--outputs", str(tmp_path_factory.mktemp("outputs")), "--port", "0"]
            served[flags] = launch(parse_arguments([*flags, "--adapters", str(adapters), *outputs]), block=False)
        return served[flags][2]

    yield start
    for blocks, app, _ in served.values():
        close(blocks, app)


@pytest.fixture
def visit(browser, serve, size):
    """Opens an app served with further flags."""
    context = browser.new_context(**size)

    def start(*flags: str):
        page = context.new_page()
        page.set_default_timeout(PATIENT)
        open_page(page, serve(*flags))
        return page

    yield start
    context.close()


def test_a_base_of_another_family(visit, page, tmp_path) -> None:
    """Its own scheduler, its own gallery, and adapters of other bases only where they are asked for."""
    set_steps(page, 2)
    made = tmp_path / "toybox.png"
    made.write_bytes(generated(page))
    there = visit("--base", "toybox-flow", "--offload")
    masthead = there.locator("#masthead").inner_text()
    assert "toybox-flow" in masthead
    assert "MB of weights offloaded to host memory, peak memory" in masthead
    assert labels(there, "#adapter") == ["none"]
    there.locator("#prompt textarea").fill("a photo of a cat")
    set_steps(there, 3)
    assert not there.get_by_text("Scheduler").locator("visible=true").count()
    set_seed(there, 3)
    assert '"scheduler": "own"' in settings_in(generated(there))
    there.locator("#restore input[type=file]").set_input_files(made)
    wait_for_status(there, "that picture was made on toybox: on toybox-flow it will be another one; its adapter is not")
    assert '"adapters": []' in settings_in(generated(there))
    tab(there, "Library")
    there.locator("#library").get_by_text("Nothing found.").wait_for()
    there.locator("#others input").check()
    tile(there, "cat", "#library").click()
    there.get_by_text("Cannot be used: it was made for toybox and does not fit toybox-flow").wait_for()
    assert there.locator("#use:disabled").count() == 1
    tab(there, "History")
    there.locator("#history").get_by_text("base · seed 3 ·").first.wait_for()
    assert not there.locator("#history").get_by_text("cat 1").count()


def test_a_packed_base(visit) -> None:
    pytest.importorskip("bitsandbytes")
    page = visit("--quantize", "nf4")
    assert "of weights in nf4 on the CPU" in page.locator("#masthead").inner_text()
    choose(page, "dog")
    set_steps(page, 2)
    assert '"steps": 2' in settings_in(generated(page))
