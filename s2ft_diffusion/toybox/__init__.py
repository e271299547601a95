"""The embedded world: a renderer, subjects, and a small Stable Diffusion trained on it.

`StableDiffusionPipeline.from_pretrained(s2ft_diffusion.toybox.base_path())` loads the base.
"""

from pathlib import Path


def base_path() -> Path:
    """The folder of the embedded base, in diffusers' standard layout."""
    return Path(__file__).parent / "base"
