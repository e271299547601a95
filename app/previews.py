"""Pictures of latents for next to nothing: a linear map to colours, fitted to the base's own autoencoder.

The colour of a patch is close to linear in its latents, so that a small picture needs no decoder, which takes as long
as several denoising steps.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from s2ft_diffusion.families import Family

SAMPLES, SIZE = 16, 64
GRIDS = (2, 4, 8, 16)  # the squares of the pictures it is fitted to, along a side


class ColourMap:
    """A square picture's latents, as a pipeline has them, to a small picture of the first.

    It is fitted to latents with noise of their own size, as they are half-way: a map that relied on what noise drowns
    would show nothing before the last steps.
    """

    @torch.no_grad()
    def __init__(self, base: Family) -> None:
        self.base = base
        generator = torch.Generator().manual_seed(0)
        squares = [torch.rand(SAMPLES, 3, grid, grid, generator=generator) * 2 - 1 for grid in GRIDS]
        images = torch.cat([interpolate(part, size=(SIZE, SIZE)) for part in squares])
        means = [base.moments(image)[0].float() for image in images.split(1)]
        latents = torch.stack([base.normalize(mean).cpu() for mean in means])
        latents += torch.randn(latents.shape, generator=generator)
        self.factor = SIZE // latents.shape[-1]
        colours = avg_pool2d(images, self.factor).movedim(1, -1).reshape(-1, 3)
        self.weights = torch.linalg.lstsq(_rows(latents), colours, driver="gelsd").solution

    def __call__(self, latents: torch.Tensor) -> Image.Image:
        """A picture as large as the image will be."""
        first = self.base.spatial(latents[:1]).float().cpu()
        height, width = first.shape[-2:]
        colours = (_rows(first) @ self.weights).reshape(height, width, 3)
        pixels = ((colours + 1) * 127.5).clamp(0, 255).byte().numpy()
        return Image.fromarray(pixels).resize((width * self.factor, height * self.factor), Image.Resampling.BICUBIC)


def _rows(latents: torch.Tensor) -> torch.Tensor:
    """A row for every place of latents (n, c, h, w), with a one for the constant."""
    rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
