"""Fixtures of the app's tests: a folder of adapters, an engine on the embedded base, and the app served."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio")

from app.engine import Engine, Settings
from app.library import Library
from s2ft_diffusion import AdapterInfo, S2FTConfig, attention_targets
from s2ft_diffusion.adapters.file import collect_adapter, make_thumbnail, read_adapter, write_adapter
from s2ft_diffusion.toybox.subjects import SUBJECTS

PATIENCE = 1200.0  # seconds; a busy machine is no reason to fail


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for something that happens in another thread or process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine("toybox")


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, _base_modules) -> Path:
    """Three adapters of random coefficients: "cat" and "dog" of the denoiser, "both" of the text encoder too."""
    import copy

    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("cat", "dog", "both")):
        torch.manual_seed(number)
        models = {"unet": copy.deepcopy(_base_modules.unet)}
        if name == "both":
            models["text_encoder"] = copy.deepcopy(_base_modules.text_encoder)
        for model in models.values():
            model.add_adapter(
                S2FTConfig(
                    target_modules=attention_targets(model), n_frequency=200, scaling=1.5, seed=number,
                    init_weights=False,
                ),
                "x",
            )  # fmt: skip
        info = AdapterInfo(
            base_model="toybox",
            subject=name,
            instance_prompt=f"a photo of sks {name}",
            date=f"2026-01-0{number + 1}",
            thumbnail=make_thumbnail(SUBJECTS["mittens"].photos()[number]),
        )
        write_adapter(folder / f"{name}.safetensors", collect_adapter(models, "x", info))
    return folder


@pytest.fixture
def fresh(adapters, tmp_path) -> Callable[..., Path]:
    """Writes an adapter that is in no library: that of a name, with other facts in its header."""

    def write(name: str, **facts) -> Path:
        adapter = read_adapter(adapters / f"{name}.safetensors")
        path = tmp_path / f"{secrets.token_hex(4)}.safetensors"
        write_adapter(path, replace(adapter, info=replace(adapter.info, **{"date": "2026-02-03", **facts})))
        return path

    return write


@pytest.fixture
def library(adapters, engine, tmp_path) -> Library:
    return Library([str(adapters)], tmp_path / "own", engine.components)


@pytest.fixture
def ids(library) -> dict[str, str]:
    """Ids of the adapters by name."""
    return {entry.name: entry.id for entry in library.search()}


def settings(*adapters: tuple[str, float], **values) -> Settings:
    values = {"prompt": "a photo of sks cat", "steps": 3, "guidance": 4.0, "seed": 7, "images": 1, **values}
    values.setdefault("scheduler", "DDIM")
    return Settings.checked(adapters=adapters, **values)


@pytest.fixture(scope="session")
def served(adapters, tmp_path_factory) -> Iterator[tuple[str, object]]:
    """The app as `python -m app` serves it, on a free port; gives its address and the `App`."""
    from app.arguments import parse_arguments
    from app.server import close, launch

    outputs = tmp_path_factory.mktemp("outputs")
    args = parse_arguments(
        ["--adapters", str(adapters), "--outputs", str(outputs), "--port", "0", "--concurrency", "2"]
    )
    blocks, app, address = launch(args, block=False)
    yield address, app
    close(blocks, app)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Chromium; per module, since Playwright has a loop of its own in this thread."""
    from tests.gradio_app.browser import CHROMIUM, FLAGS, playwright

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def pages(browser, served) -> Iterator[Callable[..., object]]:
    """Opens pages of the app: `pages(path="", **options of Chromium)`."""
    from tests.gradio_app.browser import LAPTOP, PATIENT, open_page

    opened, errors = [], []

    def new(path: str = "", **options):
        context = browser.new_context(**(options or LAPTOP))
        page = context.new_page()
        page.set_default_timeout(PATIENT)
        page.on("pageerror", lambda error: errors.append(str(error)))
        open_page(page, f"{served[0].rstrip('/')}/{path}")
        opened.append(context)
        return page

    yield new
    wide = [
        page.url
        for context in opened
        for page in context.pages
        if page.evaluate("document.documentElement.scrollWidth > innerWidth")
    ]
    for context in opened:
        context.close()
    assert errors == []
    assert wide == [], "they scroll sideways"


@pytest.fixture(params=["laptop", "phone"])
def size(request) -> dict[str, object]:
    """Chromium's options for a laptop, and for a phone."""
    from tests.gradio_app.browser import LAPTOP, PHONE

    return {"laptop": LAPTOP, "phone": PHONE}[request.param]


@pytest.fixture
def page(pages, size) -> object:
    """The page on a laptop, and on a phone."""
    return pages(**size)


@pytest.fixture
def phone(pages) -> object:
    """The page on a phone."""
    from tests.gradio_app.browser import PHONE

    return pages(**PHONE)
