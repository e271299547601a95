"""What is in an adapter: each layer's energy, its positions on the spectrum plane, its weight change as pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from s2ft_diffusion.adapters.file import Adapter, FreeWeights, LayerWeights, read_adapter
from s2ft_diffusion.tuner.config import S2FTConfig

SIDE = 384
# A diverging map, blue over white to red, and a sequential one, white to dark blue.
DIVERGING = np.array([(33, 60, 130), (120, 165, 220), (250, 250, 250), (235, 140, 110), (140, 25, 45)], dtype=float)
SEQUENTIAL = np.array([(255, 255, 255), (160, 196, 228), (60, 120, 190), (16, 48, 110)], dtype=float)


def layer_names(adapter: Adapter) -> list[str]:
    """`component.module` of every layer, in the file's order."""
    return [f"{component}.{name}" for component, layers in adapter.layers.items() for name in layers]


def weights_of(adapter: Adapter, layer: str) -> tuple[LayerWeights, S2FTConfig]:
    """Raises KeyError for a layer that is not there."""
    component, _, name = layer.partition(".")
    return adapter.layers[component][name], adapter.configs[component]


def latent_and_delta(weights: LayerWeights, config: S2FTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The smooth latent matrix and the weight change (d, k), scaled."""
    delta = weights.delta() * config.scaling
    return weights.rearrangement.invert(delta), delta


def energies(path: Path) -> list[tuple[str, float]]:
    """The Frobenius norm of every layer's weight change, by layer."""
    adapter = read_adapter(path)
    found = []
    for name in layer_names(adapter):
        weights, config = weights_of(adapter, name)
        found.append((name, abs(config.scaling) * weights.change_norm(weights.coefficients.float())))
    return found


def pictures(path: Path, layer: str) -> list[tuple[Image.Image, str]]:
    """Positions on the spectrum plane (frequency zero in the middle), the latent matrix, and the weight change.

    Raises KeyError for a layer that the adapter does not have.
    """
    weights, config = weights_of(read_adapter(path), layer)
    latent, delta = latent_and_delta(weights, config)
    d, k = weights.shape
    plane = np.zeros((d, k))
    taken = np.zeros((d, k))
    u, v, magnitude = _places(weights)
    mirrors = [(1, 1), (-1, -1)] if isinstance(weights, FreeWeights) else [(1, 1), (-1, -1), (1, -1), (-1, 1)]
    for row, column in mirrors:  # they make the same functions
        place = (row * u) % d, (column * v) % k
        np.add.at(plane, place, magnitude)
        taken[place] = 1
    share = 0.25 * taken + 0.75 * np.sqrt(plane / max(plane.max(), 1e-12))
    return [
        (_coloured(np.fft.fftshift(share), SEQUENTIAL), f"{weights.coefficients.numel():,} numbers, by size"),
        (_diverging(latent.numpy()), "weight change, rearranged"),
        (_diverging(delta.numpy()), "weight change as it is added"),
    ]


def _places(weights: LayerWeights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column frequencies of the coefficients, and their sizes."""
    coefficients = weights.coefficients.float()
    if isinstance(weights, FreeWeights):
        u, v = weights.positions.long().unbind(1)
        return u.numpy(), v.numpy(), coefficients.reshape(len(coefficients), -1).norm(dim=1).numpy()
    rows, columns = (weights.row_functions.long() + 1) // 2, (weights.column_functions.long() + 1) // 2
    places = torch.arange(len(rows) * len(columns)) if weights.places is None else weights.places.long()
    u, v = rows[places // len(columns)], columns[places % len(columns)]
    return u.numpy(), v.numpy(), coefficients.flatten().abs().numpy()


def _diverging(matrix: np.ndarray) -> Image.Image:
    largest = max(float(np.abs(matrix).max()), 1e-12)
    return _coloured(0.5 + 0.5 * matrix / largest, DIVERGING)


def _coloured(values: np.ndarray, colours: np.ndarray) -> Image.Image:
    """Values in [0, 1] through a map of colours, at a size to look at."""
    stops = np.linspace(0, 1, len(colours))
    channels = [np.interp(values, stops, colours[:, c]) for c in range(3)]
    image = Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
    scale = SIDE / max(image.size)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    return image.resize((round(image.width * scale), round(image.height * scale)), resample)
