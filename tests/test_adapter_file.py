"""The adapter file: what is written comes back, and nothing else is believed."""

from __future__ import annotations

import base64
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

from s2ft_diffusion import S2FTConfig
from s2ft_diffusion.adapters.file import (
    DTYPES,
    THUMBNAIL_BYTES,
    WEIGHTS_NAME,
    Adapter,
    AdapterFileError,
    AdapterInfo,
    FreeWeights,
    GridWeights,
    LayerWeights,
    make_thumbnail,
    read_adapter,
    read_header,
    write_adapter,
)
from s2ft_diffusion.tuner.grid import choose_grid, grid_size
from s2ft_diffusion.tuner.rearrange import find_rearrangement
from s2ft_diffusion.tuner.spectrum import count_positions, sample_positions

FREE, GRID = ["complex", "real"], ["dense", "sparse"]
OVERSAMPLING = {"dense": 1, "sparse": 4}


def make_layer(shape=(24, 17), n_frequency=60, kind="complex", seed=0) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)
    if kind in GRID:
        size = grid_size(n_frequency, shape, OVERSAMPLING[kind])
        grid = choose_grid(size, shape, sampling="random", gamma=1.0, generator=generator)
        place, numbers = grid.tensors(), (size.rows, size.columns) if size.dense else (size.numbers,)
    else:
        count = count_positions(n_frequency, shape, kind)
        place = {"positions": sample_positions(count, shape, kind=kind, sampling="random", generator=generator)}
        numbers = (count, 2) if kind == "complex" else (count,)
    found = find_rearrangement(torch.randn(shape, generator=generator), signs=True, generator=generator)
    return (GridWeights if kind in GRID else FreeWeights)(
        shape=shape, coefficients=torch.randn(numbers, generator=generator), **place, **vars(found)
    )


def tensors_of(layer: LayerWeights) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(layer, f.name) for f in fields(layer)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def make_config(kind: str, **options) -> S2FTConfig:
    if kind in GRID:
        return S2FTConfig(oversampling=OVERSAMPLING[kind], **options)
    return S2FTConfig(positions="free", coefficients=kind, **options)


def make_adapter(kind="complex") -> Adapter:
    layers = {"blocks.0.to_q": make_layer(kind=kind), "blocks.0.to_v": make_layer((9, 30), kind=kind, seed=1)}
    info = AdapterInfo("toybox", "a photo of sks cat", "cat", "cat", "2026-01-01", {"steps": 3, "loss": 0.5})
    config = make_config(kind, n_frequency=60, signs=True)
    return Adapter({"unet": config}, {"unet": layers}, info)


@pytest.mark.parametrize("kind", [*FREE, *GRID])
def test_round_trip(tmp_path, kind) -> None:
    adapter = make_adapter(kind)
    adapter.info.thumbnail = make_thumbnail(Image.new("RGB", (64, 64), "red"))
    path = tmp_path / WEIGHTS_NAME
    assert write_adapter(path, adapter) == (path.stat().st_size, 0.0)
    read = read_adapter(path)
    assert read.info == adapter.info
    assert read.configs["unet"] == replace(adapter.configs["unet"], inference_mode=True)
    for name, layer in adapter.layers["unet"].items():
        other = read.layers["unet"][name]
        assert other.shape == layer.shape
        assert tensors_of(other).keys() == tensors_of(layer).keys()
        for key, tensor in tensors_of(layer).items():
            assert torch.equal(tensors_of(other)[key], tensor), key
            assert tensors_of(other)[key].dtype == tensor.dtype
    assert read.trainable == adapter.trainable == {"dense": 56 + 56}.get(kind, 120)
    data = path.read_bytes()
    for _ in range(5):  # equal adapters, equal files
        write_adapter(path, adapter)
        assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == [WEIGHTS_NAME]


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 5e-4), ("bfloat16", 4e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("kind", [*FREE, *GRID])
def test_types_of_coefficients(tmp_path, dtype, error, kind) -> None:
    """The error that is reported is that of the weight change which a reader makes."""
    adapter = make_adapter(kind)
    written = write_adapter(tmp_path / "a", adapter, dtype)
    read = read_adapter(tmp_path / "a")
    first = read.layers["unet"]["blocks.0.to_q"].coefficients
    assert first.dtype == (torch.float32 if dtype == "int8" else getattr(torch, dtype))
    assert written.relative_error <= error
    assert (written.relative_error > 0) == (error > 0)
    off, size = 0.0, 0.0
    for name, layer in adapter.layers["unet"].items():
        wanted, found = (x.delta().double() for x in (layer, read.layers["unet"][name]))
        off += float((found - wanted).square().sum())
        size += float(wanted.square().sum())
    assert written.relative_error == pytest.approx((off / size) ** 0.5, rel=2e-3, abs=1e-6)


def test_coefficients_that_do_not_fit(tmp_path) -> None:
    adapter = make_adapter()
    adapter.layers["unet"]["blocks.0.to_q"].coefficients[0] = 1e6
    with pytest.raises(ValueError, match=r"to_q.*float16"):
        write_adapter(tmp_path / "b", adapter, "float16")
    with pytest.raises(ValueError, match="int4"):
        write_adapter(tmp_path / "b", adapter, "int4")
    adapter.layers["unet"]["blocks.0.to_q"].coefficients[0] = float("nan")
    for dtype in DTYPES:
        with pytest.raises(ValueError, match="not finite"):
            write_adapter(tmp_path / "b", adapter, dtype)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_coefficients_of_zero(tmp_path, dtype) -> None:
    adapter = make_adapter()
    for layer in adapter.layers["unet"].values():
        layer.coefficients.zero_()
    assert write_adapter(tmp_path / "a", adapter, dtype).relative_error == 0.0
    assert not read_adapter(tmp_path / "a").layers["unet"]["blocks.0.to_q"].coefficients.any()


def test_a_mirrored_position_is_stored_as_its_mirror(tmp_path) -> None:
    adapter = make_adapter()
    layer = adapter.layers["unet"]["blocks.0.to_q"]
    d, k = layer.shape
    layer.positions = torch.stack([-layer.positions[:, 0] % d, -layer.positions[:, 1] % k], dim=1)
    write_adapter(tmp_path / "a", adapter)
    torch.testing.assert_close(read_adapter(tmp_path / "a").layers["unet"]["blocks.0.to_q"].delta(), layer.delta())


@pytest.mark.parametrize("kind", ["complex", "real"])
def test_version_1_is_still_read(tmp_path, kind) -> None:
    path = Path(__file__).parent / "data" / f"version-1-{kind}.safetensors"
    tensors, metadata = contents(path)
    assert json.loads(metadata["s2ft"])["format_version"] == 1
    adapter = read_adapter(path)
    assert adapter.info == make_adapter(kind).info
    for name, layer in adapter.layers["unet"].items():
        stored = {key: tensors[f"unet.{name}.{key}"] for key in tensors_of(layer)}
        flat = np.cumsum(stored["positions"].astype(np.int64))
        assert layer.positions.tolist() == [[p // layer.shape[1], p % layer.shape[1]] for p in flat]
        assert np.array_equal(layer.coefficients.numpy(), stored["coefficients"])
        for side, length in zip(("row", "column"), layer.shape, strict=True):
            assert np.array_equal(getattr(layer, f"{side}_order").numpy(), stored[f"{side}_order"])
            bits = np.unpackbits(stored[f"{side}_sign"])[:length]
            assert np.array_equal(getattr(layer, f"{side}_sign").numpy() < 0, bits == 1)
    assert read_header(path).trainable == adapter.trainable == 120
    write_adapter(tmp_path / "a", adapter, "float32")  # and written again in today's
    again = read_adapter(tmp_path / "a")
    for name, layer in adapter.layers["unet"].items():
        for key, tensor in tensors_of(layer).items():
            assert torch.equal(tensors_of(again.layers["unet"][name])[key].float(), tensor.float())


@pytest.mark.parametrize("kind", ["complex", "real"])
def test_version_2_is_still_read(kind) -> None:
    path = Path(__file__).parent / "data" / f"version-2-{kind}.safetensors"
    assert json.loads(contents(path)[1]["s2ft"])["format_version"] == 2
    old, new = read_adapter(path), make_adapter(kind)
    for name, layer in new.layers["unet"].items():
        torch.testing.assert_close(old.layers["unet"][name].delta(), layer.delta())


def test_what_is_not_rearranged_takes_no_bytes(tmp_path) -> None:
    layer = make_layer()
    layer.column_order = torch.arange(17, dtype=torch.int32)
    layer.row_sign = torch.ones(24, dtype=torch.int8)
    write_adapter(tmp_path / "a", Adapter({"unet": make_config("complex")}, {"unet": {"to_q": layer}}), "float32")
    tensors, _ = contents(tmp_path / "a")
    sizes = {name.rpartition(".")[2]: tensor.size for name, tensor in tensors.items()}
    assert {name for name, size in sizes.items() if not size} == {"column_order", "row_sign"}
    again = read_adapter(tmp_path / "a").layers["unet"]["to_q"]
    torch.testing.assert_close(again.delta(), layer.delta(), rtol=0, atol=0)


def test_header_alone_tells_a_gallery_everything(tmp_path) -> None:
    adapter = make_adapter()
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8)
    adapter.info.thumbnail = make_thumbnail(Image.fromarray(noise))
    assert len(adapter.info.thumbnail) <= THUMBNAIL_BYTES
    write_adapter(tmp_path / "a", adapter)
    header = read_header(tmp_path / "a")
    assert header.info == adapter.info
    assert header.shapes["unet"]["blocks.0.to_q"] == (24, 17)
    assert header.configs["unet"]["n_frequency"] == 60
    assert header.trainable == adapter.trainable


@pytest.mark.parametrize(("kind", "most"), [("complex", 1_600_000), ("dense", 1_250_000), ("sparse", 1_550_000)])
def test_size_at_stable_diffusion_scale(tmp_path, kind, most) -> None:
    """8,000 real numbers a layer, the 64 query and value layers of SD 1.5, fp16."""
    layers = {}
    for width, blocks in ((320, 5), (640, 5), (1280, 6)):
        square, cross = make_layer((width, width), 8000, kind), make_layer((width, 768), 8000, kind, seed=1)
        for block in range(blocks):
            for name, layer in (("a.q", square), ("a.v", square), ("b.q", square), ("b.v", cross)):
                layers[f"down_blocks.{width}.attentions.{block}.transformer_blocks.0.attn_{name}"] = layer
    assert len(layers) == 64
    adapter = Adapter({"unet": make_config(kind)}, {"unet": layers})
    assert 64 * 7_900 <= adapter.trainable <= 512_000
    assert write_adapter(tmp_path / "a", adapter, "float16").bytes <= most
    assert read_adapter(tmp_path / "a").trainable == adapter.trainable


# Damage --------------------------------------------------------------------------------------------------------------


def contents(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def rewrite(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    path.write_bytes(save(tensors, metadata=metadata))


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, make_adapter())
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(AdapterFileError, match=match) as caught:
        read_adapter(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated(written, keep) -> None:
    data = written.read_bytes()
    written.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(written, "not a complete safetensors file")


def test_other_files(tmp_path, written) -> None:
    refused(tmp_path / "nothing", "no such file")
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    refused(tmp_path / "pickle.bin", "not a complete safetensors")
    rewrite(written, {"lora_A": np.zeros(3, np.float32)}, {"format": "pt"})
    refused(written, "not an S2FT adapter")


def test_version(written) -> None:
    tensors, metadata = contents(written)
    rewrite(written, tensors, {"s2ft": json.dumps({**json.loads(metadata["s2ft"]), "format_version": 99})})
    refused(written, "format version 99")


@pytest.mark.parametrize(
    ("key", "change", "match"),
    [
        ("positions_high", lambda a: np.zeros_like(a), "0 integers where there should be 30"),
        ("positions_high", lambda a: a[:-1], "bits should be"),
        ("positions_high", lambda a: a | 1, "integers where there should be|past the last"),
        ("positions_low", lambda a: a.astype(np.int32), "type torch.int32"),
        ("positions_low", lambda a: a[:-1], "bits should be"),
        ("positions_low", lambda a: np.zeros_like(a), "repeated or out of order"),
        ("coefficients", lambda a: a[:-1], "positions"),
        ("coefficients", lambda a: a[:0], "positions"),
        ("coefficients", lambda a: a[0, 0], "positions"),
        ("coefficients", lambda a: np.where(np.arange(a.size).reshape(a.shape) == 3, np.nan, a), "NaN"),
        ("coefficients", lambda a: np.where(np.arange(a.size).reshape(a.shape) == 3, np.inf, a), "NaN or inf"),
        ("coefficients", lambda a: a.astype(np.float64), "type torch.float64"),
        ("coefficients", lambda a: a[:, 0].copy(), "shape"),
        ("row_order", lambda a: np.zeros_like(a), "no permutation"),
        ("row_order", lambda a: a[:-1], "row_order: .*bits should be"),
        ("column_order", lambda a: np.roll(a, 1), "no permutation|past the last"),
        ("row_sign", lambda a: a[:-1], "row_sign: .*bits should be"),
        ("column_sign", lambda a: a | 1, "column_sign: bits set past"),
        ("column_sign", lambda a: a.astype(np.uint16), "type torch.uint16"),
    ],
)
def test_damaged_tensors(written, key, change, match) -> None:
    tensors, metadata = contents(written)
    name = f"unet.blocks.0.to_q.{key}"
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    if tensors[name].dtype == np.float64 and "float64" not in match:
        tensors[name] = tensors[name].astype(np.float32)
    rewrite(written, tensors, metadata)
    refused(written, rf"to_q: .*{match}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c, g: (c, g[:-1]), "end before|bits should be"),
        (lambda c, g: (c, np.append(g, np.uint8(0))), "1 bytes too many"),
        (lambda c, g: (c, g[:0]), "end before its flags"),
        (lambda c, g: (c, g | np.eye(1, len(g), 0, np.uint8)[0] * 128), "unknown flags"),
        (lambda c, g: (c, g.astype(np.int16)), "type torch.int16"),
        (lambda c, g: (c, g[None]), "shape"),
        (lambda c, g: (c[:-1], g), ""),
        (lambda c, g: (c[..., :-1] if c.ndim == 2 else c[:0], g), ""),
        (lambda c, g: (c.reshape(-1, 1) if c.ndim == 1 else c.reshape(-1), g), "table"),
        (lambda c, g: (np.where(np.arange(c.size).reshape(c.shape) == 3, np.nan, c).astype(np.float32), g), "NaN"),
        (lambda c, g: (c.astype(np.int8), g), "type torch.int8"),
        (lambda c, g: (c.astype(np.float64), g), "type torch.float64"),
        (lambda c, g: (c, np.concatenate([g[:9] * 0 + 255, g[9:]])), ""),
        (lambda c, g: (c, np.concatenate([g[:1], g[1:] * 0])), ""),
    ],
)
@pytest.mark.parametrize("kind", GRID)
def test_damaged_grid(tmp_path, kind, change, match) -> None:
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, make_adapter(kind))
    tensors, metadata = contents(path)
    names = [f"unet.blocks.0.to_q.{key}" for key in ("coefficients", "grid")]
    changed = change(*(tensors[name] for name in names))
    tensors |= {name: np.ascontiguousarray(value) for name, value in zip(names, changed, strict=True)}
    rewrite(path, tensors, metadata)
    refused(path, rf"to_q: .*{match}")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("row_functions", [3, 3, 5], "repeated or out of order"),
        ("row_functions", [-1, 3, 5], "not in 0..23"),
        ("column_functions", [1, 2, 17], "not in 0..16"),
        ("places", [0, 1, 9], "not in 0..8"),
        ("places", [], "shape"),
        ("coefficients", [1.0], "the table needs"),
    ],
)
def test_what_is_no_grid(name, value, match) -> None:
    layer = make_layer()
    few = torch.tensor([1, 2, 5], dtype=torch.int32)
    values = {"coefficients": torch.ones(3), "row_functions": few, "column_functions": few, "places": few}
    kept = {key: tensor for key, tensor in tensors_of(layer).items() if key.endswith(("order", "sign"))}
    GridWeights(shape=layer.shape, **values, **kept).check()
    values[name] = torch.tensor(value, dtype=values[name].dtype)
    with pytest.raises(AdapterFileError, match=match):
        GridWeights(shape=layer.shape, **values, **kept).check()


def test_a_mirror_is_a_repeat(tmp_path) -> None:
    """In the columns that are their own mirrors the half plane holds both of a pair."""
    adapter = make_adapter()
    layer = adapter.layers["unet"]["blocks.0.to_q"]
    layer.positions = torch.cat([torch.tensor([[3, 0], [21, 0]]), layer.positions[layer.positions[:, 1] > 0][:28]])
    write_adapter(tmp_path / "a", adapter)
    refused(tmp_path / "a", "a mirror counts")


def test_missing_and_extra_keys(written) -> None:
    tensors, metadata = contents(written)
    one = tensors.pop("unet.blocks.0.to_v.row_sign")
    rewrite(written, tensors, metadata)
    refused(written, "missing.*to_v.row_sign")
    rewrite(written, {**tensors, "unet.blocks.0.to_v.row_sign": one, "unet.blocks.9.evil": one}, metadata)
    refused(written, "do not belong.*evil")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h: h.pop("shapes"), "header is damaged"),
        (lambda h: h["shapes"].update(vae={"x": [1, 1]}), "damaged"),
        (lambda h: h["shapes"]["unet"].update({"blocks.0.to_q": [24, -1]}), "damaged"),
        (lambda h: h["shapes"]["unet"].update({"blocks.0.to_q": [24, 2**20 + 1]}), "damaged"),
        (lambda h: h["shapes"]["unet"].update({"blocks.0.to_q": [24, 18]}), "to_q"),
        (lambda h: h["config"]["unet"].update(positions="grid"), "keys are missing"),
        (lambda h: h["config"]["unet"].update(positions="anywhere"), "config of unet is damaged"),
        (lambda h: h["config"]["unet"].update(norm="forward"), "config of unet is damaged"),
        (lambda h: h["config"]["unet"].update(__class__="os"), "unknown or missing fields"),
        (lambda h: h["config"]["unet"].pop("norm"), "unknown or missing"),
        (lambda h: h["config"]["unet"].update(scaling=float("nan")), "finite"),
        (lambda h: h["config"]["unet"].update(scaling=None), "finite"),
        (lambda h: h["info"].update(subject=["cat"]), "damaged"),
        (lambda h: h["info"].update(thumbnail="%%%"), "damaged"),
    ],
)
def test_damaged_header(written, change, match) -> None:
    tensors, metadata = contents(written)
    header = json.loads(metadata["s2ft"])
    change(header)
    rewrite(written, tensors, {**metadata, "s2ft": json.dumps(header)})
    refused(written, match)


def test_header_that_is_no_json(written) -> None:
    tensors, metadata = contents(written)
    rewrite(written, tensors, {**metadata, "s2ft": "{"})
    refused(written, "header is damaged")
    rewrite(written, tensors, {**metadata, "s2ft": "[" * 100_000})
    refused(written, "header is damaged")


def test_thumbnail_survives_base64(written) -> None:
    _, metadata = contents(written)
    assert "thumbnail" not in json.loads(metadata["s2ft"])["info"]
    info = AdapterInfo(thumbnail=b"\x00\xff")
    assert base64.b64decode(info.to_json()["thumbnail"]) == b"\x00\xff"
    assert AdapterInfo.from_json(info.to_json()) == info
