"""Comparison sheets, what is inside an adapter, and the history on disk."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from app import compare, inspection
from app.history import History, load_png, read_settings, settings_of, user_folder
from app.limits import RequestError
from s2ft_diffusion.adapters.file import read_adapter
from s2ft_diffusion.adapters.names import canonical_name
from tests.gradio_app.conftest import settings


@pytest.mark.slow
def test_sheet_holds_each_variant_at_each_seed(engine, library, ids) -> None:
    wish = settings((ids["cat"], 1.0), (ids["dog"], 1.0), images=2, steps=2)
    columns = compare.variants(wish, library, [0.5, 1.0])
    assert [column.label for column in columns] == ["base", "cat 0.5", "cat 1", "dog 0.5", "dog 1", "both"]
    steps = []
    listener = compare.Listener(on_step=lambda done, total, preview: steps.append((done, total)))
    page = compare.compare(engine, library, columns, listener)
    assert steps == [(i + 1, 24) for i in range(24)]
    step = compare.TILE + compare.MARGIN
    assert page.width == 6 * step + compare.MARGIN
    for column, variant in enumerate(columns):
        for row, wanted_settings in enumerate(variant.settings):
            image = engine.generate(wanted_settings, library)[0]
            left = compare.MARGIN + column * step
            top = compare.LINE + compare.MARGIN + row * (step + compare.LINE)
            found = page.crop((left, top, left + compare.TILE, top + compare.TILE))
            wanted = image.resize(found.size, Image.Resampling.BICUBIC)
            assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_energies_are_those_of_the_layers_own_deltas(adapters, toybox_pipe) -> None:
    path = adapters / "both.safetensors"
    toybox_pipe.load_s2ft_weights(path, adapter_name="x")
    found = dict(inspection.energies(path))
    wanted = {
        f"{component}.{canonical_name(component, name)}": float(module.get_delta_weight("x").norm())
        for component in ("unet", "text_encoder")
        for name, module in getattr(toybox_pipe, component).named_modules()
        if hasattr(module, "s2ft_delta")
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4)


def test_pictures_of_a_layer(adapters) -> None:
    path = adapters / "cat.safetensors"
    name = inspection.layer_names(read_adapter(path))[0]
    pictures = inspection.pictures(path, name)
    assert len(pictures) == 3
    weights, config = inspection.weights_of(read_adapter(path), name)
    latent, delta = inspection.latent_and_delta(weights, config)
    assert sorted(latent.abs().flatten().tolist()) == sorted(delta.abs().flatten().tolist())
    assert f"{weights.coefficients.numel():,} numbers" in pictures[0][1]
    # a pixel that is not white for every position and its mirror, and for nothing else
    plane = np.asarray(pictures[0][0]).min(axis=2)
    d, k = weights.shape
    frequencies = ((functions + 1) // 2 for functions in (weights.row_functions, weights.column_functions))
    us, vs = ({x for f in found.tolist() for x in (f, -f % n)} for found, n in zip(frequencies, (d, k), strict=True))
    taken = {(u, v) for u in us for v in vs}
    scale = plane.shape[0] / d
    rows, columns = np.meshgrid(np.arange(d), np.arange(k), indexing="ij")
    samples = plane[((rows + 0.5) * scale).astype(int), ((columns + 0.5) * scale).astype(int)]
    shown = {((r - d // 2) % d, (c - k // 2) % k) for r, c in zip(*np.nonzero(samples < 255), strict=True)}
    assert shown == taken
    with pytest.raises(KeyError):
        inspection.pictures(path, "unet.no.such.layer")


def test_history_survives_and_is_each_users_own(engine, library, ids, tmp_path) -> None:
    history = History(tmp_path / "history")
    image = engine.generate(settings((ids["cat"], 0.8)), library)[0]
    first = history.save(image, None)
    second = history.save(engine.generate(settings(seed=8), library)[0], None)
    history.save(image, "ann")
    again = History(tmp_path / "history")
    assert [path.stem for path in again.latest(None)] == [second, first]
    assert len(again.latest("ann")) == 1
    assert read_settings(again.find(None, first)) == settings((ids["cat"], 0.8))
    with pytest.raises(RequestError, match="no such image"):
        again.find("bob", first)
    with pytest.raises(RequestError, match="no such image"):
        again.find(None, f"../ann/{first}")
    png = load_png(again.latest(None)[0])
    assert "Seed: 8" in png.info["parameters"]
    plain = Image.new("RGB", (4, 4))
    with pytest.raises(RequestError, match="no settings"):
        settings_of(plain)


@pytest.mark.parametrize("user", ["../../etc", "a/b", "..", "a\\b", "é" * 300, "everyone"])
def test_user_names_stay_inside_the_folder(tmp_path, user) -> None:
    folder = user_folder(tmp_path, user)
    assert folder.parent == tmp_path
    assert folder != user_folder(tmp_path, None)
    assert len(folder.name) < 100
    assert os.sep not in folder.name
