"""What a run leaves for others: the adapter's description, the model card, and the upload to the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from huggingface_hub.errors import HTTPError  # of whichever httpx the hub's client uses
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from .. import toybox
from ..adapters.convert import export
from ..adapters.file import WEIGHTS_NAME, Adapter, AdapterInfo, make_thumbnail, write_adapter
from ..adapters.lora_files import LORA_NAME
from ..errors import InputError, NotPublished
from ..text import printable
from .environment import run_date
from .settings import HubSettings, Settings


def describe(settings: Settings, facts: dict[str, Any], samples: Sequence[Path] = ()) -> AdapterInfo:
    """What the file says about itself, with the first sample as its thumbnail.

    The date is the day's (or SOURCE_DATE_EPOCH's), so that equal runs make equal files.
    """
    photos, class_prompt = settings.photos, settings.classes.prompt if settings.classes else None
    return AdapterInfo(
        base_model=settings.base.name,
        instance_prompt=photos.prompt,
        subject=photos.subject,
        class_name=class_words(class_prompt, photos.prompt) or photos.subject,
        date=str(run_date()),
        training=facts,
        thumbnail=make_thumbnail(Image.open(samples[0])) if samples else None,
    )


def class_words(class_prompt: str | None, instance_prompt: str) -> str:
    """What the subject is: "dog" of "a photo of a dog", else of "a photo of sks dog"; "" where neither says."""
    if class_prompt:
        return class_prompt.removeprefix("a photo of ").removeprefix("a ")
    return instance_prompt.partition("sks ")[2]


def usage_snippet(base: str, adapter: str) -> str:
    """Three lines of Python that load an adapter."""
    location = f"s2ft_diffusion.toybox.resolve({base!r})" if toybox.is_embedded(base) else repr(base)
    return (
        "import diffusers, s2ft_diffusion\n"
        f"pipe = diffusers.DiffusionPipeline.from_pretrained({location})\n"
        f"pipe.load_s2ft_weights({adapter!r})"
    )


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_nothing_is_lost(folder: Path, lora: bool) -> None:
    """Raise InputError where a run would write over a README, or with `lora` over a LoRA, that is no other run's."""
    card = folder / "README.md"
    if card.is_file() and "\n- s2ft\n" not in card.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{printable(card)} is no card of this program; choose another --output_dir, or move it.")
    if lora and (folder / LORA_NAME).exists() and not _is_own_lora(folder / LORA_NAME):
        raise InputError(
            f"{printable(folder / LORA_NAME)} is no LoRA of this program; choose another --output_dir, or move it."
        )


def _is_own_lora(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("modelspec.description", "").startswith("S2FT adapter")
    except (OSError, SafetensorError):
        return False


def write_model_card(
    settings: Settings,
    name: str,
    adapter: Adapter,
    file_bytes: int,
    share: float,
    samples: Sequence[Path] = (),
) -> None:
    """Write README.md: what the adapter `name` is, its size, this run's samples, and a YAML header the hub reads.

    With a LoRA beside the adapter it says so, and has the tag by which the hub knows that it can run it.
    """
    base, prompt = settings.base.name, settings.photos.prompt
    pictures = "\n".join(f"![sample](./validation/{path.name})" for path in samples)
    description = f"""
# S2FT adapter: {name}

An S2FT adapter for {base}, trained on `{prompt}`.
{adapter.trainable:,} trainable numbers ({share:.3%} of the model), {file_bytes:,} bytes
(`{WEIGHTS_NAME}`).

{pictures}

```python
{usage_snippet(base, name)}
pipe({prompt!r}).images[0]
```
"""
    tags = ["text-to-image", "diffusers", "s2ft", "peft", "dreambooth"]
    if settings.lora_rank is not None:
        tags.append("lora")
        rank = settings.lora_rank
        description += f"""
`{LORA_NAME}` is {f"the nearest LoRA of rank {rank}" if rank else "the same change as a LoRA"},
for programs without s2ft_diffusion: `pipe.load_lora_weights({name!r})`.
"""
    words = settings.validation.prompt if settings.validation else None
    header = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
        instance_prompt=prompt,
        widget=[{"text": words, "output": {"url": f"validation/{path.name}"}} for path in samples] or None,
    )
    write_text(settings.output_dir / "README.md", str(ModelCard(f"---\n{header.to_yaml()}\n---\n{description}")))


def open_repository(folder: Path, hub: HubSettings) -> str:
    """Create the repository to upload to, unless it exists; returns its full name.

    Raises InputError where the hub refuses or cannot be reached: better before training than after it.
    """
    try:
        return create_repo(hub.model_id or folder.resolve().name, exist_ok=True, token=hub.token).repo_id
    except (OSError, ValueError, HTTPError) as error:
        raise InputError(f"--push_to_hub: the repository cannot be created: {error}") from None


def push(folder: Path, repository: str, hub: HubSettings, samples: Sequence[Path] = ()) -> str:
    """Upload the adapter, the LoRA beside it, its card and samples; returns the repository. Raises NotPublished."""
    try:
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="S2FT adapter",
            allow_patterns=[WEIGHTS_NAME, LORA_NAME, "README.md", *(f"validation/{path.name}" for path in samples)],
            token=hub.token,
        )
    except (OSError, ValueError, HTTPError) as error:
        raise NotPublished(
            f"The upload to {repository} failed: {error} The adapter is complete: {folder / WEIGHTS_NAME}."
        ) from None
    return repository


def publish(
    path: Path,
    settings: Settings,
    adapter: Adapter,
    facts: Mapping[str, Any],
    seconds: Mapping[str, float],
    samples: Sequence[Path] = (),
    repository: str | None = None,
) -> tuple[int, float]:
    """Write the adapter, a LoRA of it where asked, its card and `training.json`, and upload them.

    Returns the adapter's bytes and the rounding error of its coefficients. Raises NotPublished.
    """
    with tqdm(total=2 + (repository is not None), desc="save") as bar:
        size, error = write_adapter(path, adapter, settings.dtype)
        written = {"adapter": str(path), "adapter_bytes": size, "adapter_error": error}
        if settings.lora_rank is not None:
            try:
                lora = export(adapter, path.parent / LORA_NAME, to="lora", rank=settings.lora_rank or None)
            except ValueError as problem:
                raise NotPublished(f"The LoRA was not written: {problem} The adapter is complete: {path}.") from None
            written |= {"lora_bytes": lora.bytes, "lora_rank": lora.ranks[1], "lora_error": lora.relative_error}
        elif _is_own_lora(path.parent / LORA_NAME):
            (path.parent / LORA_NAME).unlink()  # an earlier run's, of another adapter
        bar.update()
        name = repository or printable(path.parent.resolve().name)
        write_model_card(settings, name, adapter, size, facts["share"], samples)
        report = {**facts, "seconds": seconds, **written}
        write_text(path.parent / "training.json", json.dumps(report, indent=2))
        bar.update()
        if repository:
            push(path.parent, repository, settings.hub, samples)
            bar.update()
    return size, error
