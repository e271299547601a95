"""Run by tests under torchrun: `python -m eval` in two processes, each of which writes down how many images it made."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from eval import cells, generation, prompts
from eval.__main__ import main


def small(setattr: Callable[[str, object], None]) -> None:
    """A comparison of few draws and prompts, by pytest's `monkeypatch.setattr`."""
    setattr("eval.training.HELD_OUT_DRAWS", 8)
    setattr("s2ft_diffusion.dreambooth.batches.FULL_DRAWS", (1, 1))
    setattr("eval.protocol.toybox_templates", lambda: prompts.toybox_templates()[:4])
    setattr("eval.cells.drift_prompts", lambda class_name: prompts.drift_prompts(class_name)[:2])


def count_images(folder: Path, argv: list[str]) -> int:
    assert os.environ["WORLD_SIZE"] == "2", os.environ["WORLD_SIZE"]
    report = folder / f"rank{os.environ['RANK']}"  # which an evaluation takes from the environment
    make_images, made = generation.make_images, []

    def counting(pipe, images, wanted, *options, **more) -> None:
        made.extend(wanted)
        make_images(pipe, images, wanted, *options, **more)

    generation.make_images = cells.make_images = counting
    code = main(argv)
    report.write_text(str(len(made)))
    return code


if __name__ == "__main__":
    import pytest

    small(pytest.MonkeyPatch().setattr)
    sys.exit(count_images(Path(sys.argv[1]), sys.argv[2:]))
