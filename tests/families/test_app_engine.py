"""The app's engine on every family: images, previews of their latents, and stopping."""

from __future__ import annotations

import pytest
from PIL import Image

from app.engine import Cancelled, Engine, Listener, Settings
from tests.families.pipelines import COMPONENTS, SIDE


@pytest.mark.parametrize("name", list(COMPONENTS))
def test_images_previews_and_stopping(saved, name) -> None:
    side = SIDE.get(name, 16)
    engine = Engine(str(saved(name)), pipelines=2, side=side)
    previews: list[Image.Image] = []
    settings = Settings(
        prompt="a photo of sks dog",
        steps=2,
        guidance=engine.family.sampling().guidance,
        seed=1,
        scheduler=engine.schedulers[0],
    )
    listener = Listener(on_step=lambda done, total, preview: previews.append(preview()))
    (image,) = engine.generate(settings, None, listener)
    assert image.size == (side, side)
    assert len(previews) == 2
    assert previews[0].width == previews[0].height > 1
    (again,) = engine.generate(settings, None)  # by the other pipeline, a copy
    assert image.tobytes() == again.tobytes()
    with pytest.raises(Cancelled):
        engine.generate(settings, None, Listener(cancelled=lambda: True))
