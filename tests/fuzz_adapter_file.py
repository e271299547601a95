"""Mutated adapter files: each is read, or refused with an AdapterFileError, and nothing else happens.

    python -m tests.fuzz_adapter_file --seconds 3600 --keep found/
    python -m tests.fuzz_adapter_file --files 1_000_000 --attach 0.2 --seed 0

Mutations know the format: they change bytes anywhere, values of the safetensors header and of the JSON in it, tensors'
types, shapes, places and contents, and combine these. A file that is read is also put on a model that it fits, whose
outputs must be those of the file's weights, and taken off again, which must leave every bit as it was. Files that do
anything else are kept.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from s2ft_diffusion import AdapterFileError, S2FTConfig, read_adapter, read_header, write_adapter
from s2ft_diffusion.adapters.file import DTYPES, collect_adapter
from s2ft_diffusion.pipelines.attach import attach_adapter, check_fits, detach_adapters

DATA = Path(__file__).parent / "data"
VALUES = (
    None, True, -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 1e308, -0.5, float("nan"), float("inf"), "", "x", "float32",
    "real", "complex", "free", "grid", "\ud800", [], [1], [-1, 2], [2**31 - 1, 2**31 - 1], {}, {"a": {}},
)  # fmt: skip
TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "U8", "BOOL", "F8_E4M3", "nonsense")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(9, 12)
        self.to_v = nn.Linear(9, 10, bias=False)
        self.requires_grad_(False)


def new_model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


def seeds(folder: Path) -> list[bytes]:
    """Whole files of every format version, and of every kind of coefficients and stored type."""
    from peft import inject_adapter_in_model

    files = [path.read_bytes() for path in sorted(DATA.glob("*.safetensors"))]
    kinds = (
        {"positions": "grid"},
        {"positions": "grid", "oversampling": 3},
        {"positions": "free", "coefficients": "complex"},
        {"positions": "free", "coefficients": "real"},
    )
    for i, options in enumerate(kinds):
        model = new_model()
        config = S2FTConfig(target_modules=["to_q", "to_v"], n_frequency=24, init_weights=False, **options)
        inject_adapter_in_model(config, model, "x")
        adapter = collect_adapter({"unet": model}, "x")
        for dtype in DTYPES:
            path = folder / f"seed-{i}-{dtype}"
            write_adapter(path, adapter, dtype)
            files.append(path.read_bytes())
    return files


def mutated(file: bytes, rng: random.Random) -> bytes:
    """One to four changes of a file."""
    for _ in range(rng.randint(1, 4)):
        file = rng.choice((_bytes, _bytes, _header, _header, _metadata, _metadata, _metadata, _contents))(file, rng)
    return file


def _bytes(file: bytes, rng: random.Random) -> bytes:
    if not file:
        return rng.randbytes(20)
    data, place = bytearray(file), rng.randrange(len(file))
    kind = rng.randrange(5)
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place:place] = rng.randbytes(rng.randint(1, 9))
    elif kind == 3:
        del data[place : place + rng.randint(1, 9)]
    else:
        data[place : place + 8] = struct.pack("<q", rng.choice((0, -1, 2**62, len(data))))
    return bytes(data)


def _split(file: bytes) -> tuple[dict, bytes] | None:
    try:
        (length,) = struct.unpack("<Q", file[:8])
        header = json.loads(file[8 : 8 + length])
        return (header, file[8 + length :]) if isinstance(header, dict) and header else None
    except (struct.error, ValueError, OverflowError, RecursionError):
        return None


def _joined(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _header(file: bytes, rng: random.Random) -> bytes:
    """Of the safetensors header: a tensor's type, shape or place, or its key."""
    if (parts := _split(file)) is None:
        return _bytes(file, rng)
    header, data = parts
    key = rng.choice(list(header))
    entry = header[key]
    kind = rng.randrange(5)
    if kind == 0 or not isinstance(entry, dict):
        del header[key]
    elif kind == 1:
        header[key.replace("to_q", "to_v") if rng.random() < 0.5 else key[:-1] + "x"] = header.pop(key)
    elif kind == 2 and "dtype" in entry:
        entry["dtype"] = rng.choice(TYPES)
    elif kind == 3 and isinstance(entry.get("shape"), list):
        entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [], [0], [2**40]))
    else:
        other = header[rng.choice(list(header))]
        if isinstance(other, dict) and "data_offsets" in other:
            entry["data_offsets"] = other["data_offsets"]
    return _joined(header, data)


def _metadata(file: bytes, rng: random.Random) -> bytes:
    """Of our own JSON: any value anywhere becomes another, goes, or is there twice."""
    if (parts := _split(file)) is None or not isinstance(parts[0].get("__metadata__"), dict):
        return _bytes(file, rng)
    header, data = parts
    metadata = header["__metadata__"]
    try:
        place = found = json.loads(metadata["s2ft"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return _bytes(file, rng)
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        inner = place[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            place = inner
            continue
        kind = rng.randrange(4)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[rng.choice(("x", "to_q", "to_v", "unet", "text_encoder"))] = inner
        else:
            place[key] = rng.choice(VALUES)
        break
    text = json.dumps(found)
    metadata["s2ft"] = text if rng.random() < 0.98 else text.replace("{", "[" * 5000, 1)
    return _joined(header, data)


def _contents(file: bytes, rng: random.Random) -> bytes:
    """Of one tensor: all of it noise, zeros, ones or what is not a number."""
    if (parts := _split(file)) is None:
        return _bytes(file, rng)
    header, data = parts
    tensors = [e for e in header.values() if isinstance(e, dict) and isinstance(e.get("data_offsets"), list)]
    if not tensors:
        return _bytes(file, rng)
    try:
        start, end = rng.choice(tensors)["data_offsets"]
        size = min(max(end - start, 0), len(data))
    except (TypeError, ValueError):
        return _bytes(file, rng)
    fill = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size, (b"\x00\x00\xc0\x7f" * size)[:size]))
    return _joined(header, data[:start] + fill + data[start + size :])


def try_file(path: Path, model: nn.Module, base: dict[str, torch.Tensor], *, attach: bool = True) -> str:
    """Read a file and (`attach`) use it; returns what came of it. Any exception but AdapterFileError passes through."""
    try:
        read_header(path)
    except AdapterFileError as error:
        str(error).encode()
    try:
        adapter = read_adapter(path)
    except AdapterFileError as error:
        str(error).encode()
        return "refused"
    try:
        check_fits(adapter, {"unet": model}, "file")
    except AdapterFileError:
        return "read, does not fit"
    if not attach:
        return "read"
    attach_adapter({"unet": model}, adapter, "x")
    with torch.no_grad():
        for name in ("to_q", "to_v"):
            layer = getattr(model, name)
            if hasattr(layer, "get_delta_weight"):
                weight = layer.base_layer.weight + layer.get_delta_weight("x")
                wanted, found = weight @ torch.eye(9), layer(torch.eye(9)).T
                found = found - (0 if layer.base_layer.bias is None else layer.base_layer.bias[:, None])
                size = max(1.0, float(wanted.abs().max()))
                assert not torch.isfinite(wanted).all() or (found - wanted).abs().max() <= 1e-3 * size
    detach_adapters(model)
    after = model.state_dict()
    assert after.keys() == base.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())
    return "used"


def fuzz(
    folder: Path, seed: int, *, files: int | None = None, seconds: float | None = None, attach: float = 1.0
) -> tuple[Counter, list[Path]]:
    """Try mutated files until there have been enough; returns what came of them, and those that broke something.

    `attach` is the share of them that are put on a model, if they fit: it takes twenty times as long as reading.
    """
    rng = random.Random(seed)
    started, outcomes, broken = time.monotonic(), Counter(), []
    corpus, model = seeds(folder), new_model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = folder / "file.safetensors"
    while outcomes.total() != files and (seconds is None or time.monotonic() - started < seconds):
        path.write_bytes(mutated(rng.choice(corpus), rng))
        try:
            outcomes[try_file(path, model, base, attach=rng.random() < attach)] += 1
        except Exception as error:
            outcomes[type(error).__name__] += 1
            broken.append(folder / f"broken-{len(broken):04d}.safetensors")
            path.rename(broken[-1])
            said = broken[-1].with_suffix(".txt")
            said.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
            model = new_model()
    return outcomes, broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="how long (default: an hour, if --files is not given)")
    parser.add_argument("--files", type=int, help="how many files")
    parser.add_argument("--attach", type=float, default=1.0, help="share of the files that are put on a model")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--keep", type=Path, help="folder for files that break something")
    args = parser.parse_args()
    seconds = 3600 if args.seconds is None and args.files is None else args.seconds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes, broken = fuzz(folder, args.seed, files=args.files, seconds=seconds, attach=args.attach)
        print(f"seed {args.seed}: {outcomes.total():,} files; {dict(outcomes)}")
        for path in broken:
            print(path, path.with_suffix(".txt").read_text(encoding="utf-8").strip().splitlines()[-1])
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
