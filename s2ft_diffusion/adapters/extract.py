"""The way back: weight changes made by other methods as S2FT adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..tuner.config import S2FTConfig
from ..tuner.grid import choose_grid, grid_size, row_matrix
from ..tuner.prior import rearrangement_for
from ..tuner.rearrange import Rearrangement
from ..tuner.seeding import seeded
from .base_files import stored_name
from .lora import Errors, Lora, LoraLayer, Progress, silent
from .lora_files import PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, Shapes
from .reading import Adapter, AdapterFileError, AdapterInfo
from .tool_names import component_of
from .weights import FreeWeights, GridWeights


def extract_adapter(
    lora: Lora, config: S2FTConfig | None = None, *, progress: Progress = silent
) -> tuple[Adapter, Errors]:
    """A LoRA as an S2FT adapter on a grid, and how far it is from it.

    Every layer's change is its own prior: it gives the order, the functions and the places, as `config` (by default
    `S2FTConfig()`) says, but for `sampling`: the largest places are taken, since the change is known. The coefficients
    are the change's own there, so no others at these places would be nearer. Raises ValueError for positions that are
    not on a grid, and for an `n_frequency` that a layer has no room for.
    """
    config = replace(config or S2FTConfig(), sampling="top", inference_mode=True)
    if config.positions != "grid":
        raise ValueError('extraction puts positions on a grid: positions="grid".')
    places = [(component, name) for component, layers in lora.layers.items() for name in layers]
    layers: dict[str, dict[str, GridWeights]] = {}
    errors = Errors()
    for component, name in progress(places, "extract"):
        layer = lora.layers[component][name]
        try:
            found = _extract_layer(layer, config, name)
        except ValueError as problem:
            raise ValueError(f"{component}.{name}: {problem}") from None
        layers.setdefault(component, {})[name] = found
        change = layer.norm()
        reached = min(change, found.change_norm(found.coefficients) * abs(config.scaling))
        errors.layers[component, name] = ((change**2 - reached**2) ** 0.5, change)
    kernels = {c: {n: layer.kernel for n, layer in x.items() if layer.kernel} for c, x in lora.layers.items()}
    return Adapter(dict.fromkeys(layers, config), layers, lora.info, kernels), errors


def _extract_layer(layer: LoraLayer, config: S2FTConfig, name: str) -> GridWeights:
    delta, generator = layer.delta(), seeded(config.seed, name)
    rearrangement = rearrangement_for(delta, config, generator, columns=not layer.kernel)
    size = grid_size(config.n_frequency, layer.shape, config.oversampling)
    grid = choose_grid(
        size,
        layer.shape,
        sampling="top",
        gamma=config.gamma,
        latent=rearrangement.invert(delta),
        generator=generator,
        name=name,
    )
    rows = row_matrix(grid.row_functions, rearrangement.row_order, rearrangement.row_sign)
    columns = row_matrix(grid.column_functions, rearrangement.column_order, rearrangement.column_sign)
    table = (rows.T @ layer.up.float()) @ (layer.down.float() @ columns) / config.scaling
    return GridWeights(
        shape=layer.shape,
        coefficients=table if grid.places is None else table.flatten()[grid.places.long()],
        **rearrangement_tensors(rearrangement),
        row_functions=grid.row_functions,
        column_functions=grid.column_functions,
        places=grid.places,
    )


# PEFT's FourierFT ----------------------------------------------------------------------------------------------------


def is_fourierft(source: str | Path) -> bool:
    """Whether a folder holds a FourierFT adapter that PEFT saved."""
    try:
        config = json.loads((Path(source) / PEFT_CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "FOURIERFT"


def read_fourierft(folder: str | Path, base: Shapes) -> Adapter:
    """A FourierFT adapter that PEFT saved as an S2FT adapter at free positions, without rearrangement: the same change.

    FourierFT's positions are drawn from a seed and the layer's shape, which its file does not have: `base` is the
    shapes of the base's weights (`weight_shapes`). Raises AdapterFileError for another adapter, another base, and for
    what S2FT has no place for (trained biases, transformers' Conv1D, modules saved whole).
    """
    folder = Path(folder)
    config = _fourierft_config(folder)
    try:
        tensors = load_file(folder / PEFT_WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{folder}: {PEFT_WEIGHTS_NAME} cannot be read ({error}).") from None
    spectra = {}
    for key, tensor in tensors.items():
        name, _, rest = key.removeprefix("base_model.model.").partition(".fourierft_spectrum")
        if rest not in ("", ".default", ".weight") or ".fourierft_spectrum" not in key or tensor.ndim != 1:
            raise AdapterFileError(f"{folder}: {key!r} is no key of a FourierFT adapter that S2FT could hold.")
        spectra[name] = tensor
    if not spectra:
        raise AdapterFileError(f"{folder}: there are no FourierFT weights in it.")
    component = component_of(spectra)
    layers = {name: _fourierft_layer(folder, name, component, x, config, base) for name, x in spectra.items()}
    count = max(layer.coefficients.numel() for layer in layers.values())
    stored = S2FTConfig(
        n_frequency=count,
        n_frequency_pattern={n: x.coefficients.numel() for n, x in layers.items() if x.coefficients.numel() != count},
        scaling=float(config.get("scaling", 150.0)),
        positions="free",
        coefficients="real",
        norm="backward",
        sampling="random",
        rearrange="none",
        signs=False,
        seed=int(config.get("random_loc_seed") or 0),
        inference_mode=True,
    )
    info = AdapterInfo(base_model=config.get("base_model_name_or_path"))
    return Adapter({component: stored}, {component: layers}, info, {component: {}})


def _fourierft_config(folder: Path) -> dict[str, Any]:
    if not is_fourierft(folder):
        raise AdapterFileError(f"{folder}: no FourierFT adapter that PEFT saved.")
    config = json.loads((folder / PEFT_CONFIG_NAME).read_text(encoding="utf-8"))
    for field, plain in {"fan_in_fan_out": False, "bias": "none", "modules_to_save": None}.items():
        if config.get(field, plain) not in (plain, []):
            raise AdapterFileError(
                f"{folder}: its config has {field}={config[field]!r}, which an S2FT file cannot hold."
            )
    return config


def _fourierft_layer(
    folder: Path, name: str, component: str, spectrum: torch.Tensor, config: Mapping[str, Any], base: Shapes
) -> FreeWeights:
    shapes = base.get(component, {})
    stored = stored_name(name, shapes)
    if stored is None or len(shapes[stored]) != 2:
        raise AdapterFileError(f"{folder}: the base model has no linear layer {component}.{name}.")
    d, k = shapes[stored]
    if len(spectrum) > d * k:
        raise AdapterFileError(f"{folder}: {len(spectrum)} numbers for the {d}x{k} layer {component}.{name}.")
    seed = config.get("random_loc_seed")
    # PEFT draws places of the flat spectrum with this very generator.
    places = torch.randperm(d * k, generator=torch.Generator().manual_seed(777 if seed is None else seed))
    places = places[: len(spectrum)]
    layer = FreeWeights(
        shape=(d, k),
        coefficients=spectrum.float() if spectrum.dtype == torch.float64 else spectrum,
        **rearrangement_tensors(Rearrangement.identity(d, k)),
        positions=torch.stack([places // k, places % k], dim=1),
        norm="backward",
    )
    try:
        layer.check()
    except AdapterFileError as error:
        raise AdapterFileError(f"{folder}: {component}.{name}: {error}") from None
    return layer


def rearrangement_tensors(rearrangement: Rearrangement) -> dict[str, torch.Tensor]:
    """Orders and signs by the names that a layer's weights have."""
    return {
        "row_order": rearrangement.row_order,
        "column_order": rearrangement.column_order,
        "row_sign": rearrangement.row_sign,
        "column_sign": rearrangement.column_sign,
    }
