"""The Train tab in a real browser. A small program stands for the trainer, so that each moment can be waited for."""

from __future__ import annotations

from pathlib import Path

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
    wait_until_in_view,
)

pytestmark = [pytest.mark.slow, needs_browser]

# Writes what the trainer writes (`s2ft_diffusion/dreambooth/phases.py`), and goes on when there is a file that says so.
TRAINER = """
import json, shutil, sys, time
from pathlib import Path

here, out = Path(__file__).parent, Path(sys.argv[sys.argv.index("--output_dir") + 1])
steps = int(sys.argv[sys.argv.index("--max_train_steps") + 1])
out.mkdir(parents=True, exist_ok=True)

def note(**event):
    with (out / "progress.jsonl").open("a") as file:
        print(json.dumps(event), file=file)

def wait(name):
    while not (here / name).exists():
        time.sleep(0.05)
    if (here / name).read_text():
        sys.exit((here / name).read_text())

note(phase="load")
note(phase="load", summary="toybox", seconds=0.1)
note(phase="estimate")
wait("chosen")
note(phase="estimate", summary="3 photos", seconds=0.1)
note(phase="train")
for step in range(1, steps + 1):
    note(step=step, steps=steps, loss=1 / step, lr=1e-3)
    for name, pause in (("some", steps // 3), ("more", steps // 2)):
        if step == pause:
            wait(name)
note(phase="train", summary=f"{steps} steps", seconds=0.1)
shutil.copyfile(here / "made.safetensors", out / "pytorch_s2ft_weights.safetensors")
(out / "training.json").write_text("{}")
"""


@pytest.fixture
def trainer(tmp_path, fresh, monkeypatch) -> Path:
    """The folder of the program, which waits for files of these names in it."""
    folder = tmp_path / "trainer"
    folder.mkdir()
    (folder / "train.py").write_text(TRAINER)
    fresh("cat", subject="Waldo", instance_prompt="a photo of sks dog").rename(folder / "made.safetensors")
    monkeypatch.setattr("app.training.TRAINER", folder / "train.py")
    return folder


@pytest.fixture(autouse=True)
def tidy(served):
    yield
    trainings, library = served[1].trainings, served[1].library
    for job in list(trainings.jobs.values()):
        trainings.cancel(job)
    for path in library.folder.glob("*.safetensors"):
        path.unlink()
    library.refresh()


def fill(page, photos: Path, steps: int = 60) -> None:
    """Everything that a training needs."""
    tab(page, "Train")
    assert page.locator("#train:disabled").count() == 1
    page.locator("#photos input[type=file]").set_input_files(sorted(photos.iterdir()))
    page.wait_for_function("document.querySelectorAll('#thumbnails img').length === 3")
    page.locator("#captions input").nth(1).fill("on a beach")
    page.locator("#subject textarea, #subject input").fill("Waldo")
    page.locator("#kind textarea, #kind input").fill("dog")
    set_number(page, "Steps", steps)
    page.locator("#train:enabled").wait_for()


def test_train_reload_meanwhile_and_try_it(page, photos, served, trainer) -> None:
    fill(page, photos)
    page.locator("#train").click()
    report = page.locator("#training")
    report.get_by_text("Looking at your photos, to see which numbers matter …").wait_for()
    wait_until_in_view(page, "#training")
    stored = sorted(served[1].trainings.folder.glob("*/photos/*.txt"), key=lambda path: path.stat().st_mtime)[-1]
    assert (stored.name, stored.read_text()) == ("01.txt", "a photo of sks dog on a beach")
    (trainer / "chosen").touch()
    report.get_by_text("Training … step 20 of 60").wait_for()
    (trainer / "some").touch()
    report.get_by_text("Training … step 30 of 60, about").wait_for()  # seconds left
    open_page(page, page.url)  # at its tab again, and with its training
    report.get_by_text("Training … step 30 of 60").wait_for()
    # the axes have a few numbers, not a word for every step
    page.locator("#curve svg text").nth(4).wait_for()
    ticks = [words for words in page.locator("#curve svg text").all_text_contents() if words[:1].isdigit()]
    assert 2 < len(ticks) < 25, ticks
    assert "30" in ticks
    (trainer / "more").touch()
    report.get_by_text("The adapter is in the library").wait_for()
    tab(page, "Library")
    tile(page, "Waldo", "#library").wait_for()  # without a click on Refresh
    tab(page, "Train")
    page.locator("#try-it").click()
    wait_for_value(page, "#prompt textarea", "a photo of sks dog")
    assert chosen(page) == ["Waldo"]
    set_steps(page, 2)
    assert generated(page)


def test_two_trainings_at_once(page, photos, trainer) -> None:
    fill(page, photos)
    page.locator("#train").click()
    report, jobs = page.locator("#training"), page.locator("#jobs select")
    report.get_by_text("Waldo: under way").wait_for()
    page.locator("#subject textarea, #subject input").fill("Second")
    page.locator("#train:enabled").click()
    report.get_by_text("Second: waiting for its turn").wait_for()
    report.get_by_text("1 before it").wait_for()
    assert jobs.locator("option").all_inner_texts()[:2] == ["Second: waiting for its turn", "Waldo: under way"]
    jobs.select_option(label="Waldo: under way")
    report.get_by_text("Waldo: under way").wait_for()
    jobs.select_option(label="Second: waiting for its turn")
    report.get_by_text("Second: waiting for its turn").wait_for()
    page.locator("#cancel-training:enabled").click()
    report.get_by_text("Second: cancelled").wait_for()
    jobs.select_option(label="Waldo: under way")  # it goes on
    (trainer / "chosen").touch()
    report.get_by_text("Training … step 20 of 60").wait_for()


def test_a_training_that_fails_and_one_that_is_cancelled(page, photos, trainer) -> None:
    fill(page, photos)
    page.locator("#train").click()
    (trainer / "chosen").write_text("train.py: error: the photos are too dark")
    report = page.locator("#training")
    report.get_by_text("Waldo: failed").wait_for()
    report.get_by_text("the photos are too dark").wait_for()
    assert not page.locator("#try-it").locator("visible=true").count()
    (trainer / "chosen").write_text("")
    page.locator("#train:enabled").click()
    report.get_by_text("Training … step 20 of 60").wait_for()
    page.locator("#cancel-training:enabled").click()
    report.get_by_text("Waldo: cancelled").wait_for()
    page.locator("#cancel-training:disabled").wait_for()
