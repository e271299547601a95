"""What a run leaves for others: the adapter's description, the model card, and the upload to the hub."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from PIL import Image

from .. import toybox
from ..adapters.file import WEIGHTS_NAME, Adapter, AdapterInfo, make_thumbnail
from .errors import InputError, NotPublished


def describe(args: argparse.Namespace, facts: dict[str, Any], samples: Sequence[Path] = ()) -> AdapterInfo:
    """What the file says about itself, with the first sample as its thumbnail.

    The date is the day's (or SOURCE_DATE_EPOCH's), so that equal runs make equal files.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    return AdapterInfo(
        base_model=args.pretrained_model_name_or_path,
        instance_prompt=args.instance_prompt,
        subject=args.subject,
        class_name=class_words(args.class_prompt, args.instance_prompt) or args.subject,
        date=str(date.fromtimestamp(int(epoch)) if epoch else date.today()),
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
    temporary.write_text(text)
    os.replace(temporary, path)


def write_model_card(
    folder: Path,
    args: argparse.Namespace,
    adapter: Adapter,
    file_bytes: int,
    share: float,
    samples: Sequence[Path] = (),
) -> None:
    """Write README.md: what the adapter is, its size, this run's samples, and a YAML header the hub reads."""
    pictures = "\n".join(f"![sample](./validation/{path.name})" for path in samples)
    name = args.hub_repository or folder.resolve().name
    description = f"""
# S2FT adapter: {name}

An S2FT adapter for {args.pretrained_model_name_or_path}, trained on `{args.instance_prompt}`.
{adapter.trainable:,} trainable numbers ({share:.3%} of the model), {file_bytes:,} bytes
(`{WEIGHTS_NAME}`).

{pictures}

```python
{usage_snippet(args.pretrained_model_name_or_path, name)}
pipe({args.instance_prompt!r}).images[0]
```
"""
    header = ModelCardData(
        base_model=args.pretrained_model_name_or_path,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "s2ft", "peft", "dreambooth"],
        instance_prompt=args.instance_prompt,
        widget=[{"text": args.validation_prompt, "output": {"url": f"validation/{path.name}"}} for path in samples]
        or None,
    )
    write_text(folder / "README.md", str(ModelCard(f"---\n{header.to_yaml()}\n---\n{description}")))


def open_repository(folder: Path, args: argparse.Namespace) -> str:
    """Create the repository to upload to, unless it exists; returns its full name.

    Raises InputError where the hub refuses or cannot be reached: better before training than after it.
    """
    try:
        return create_repo(args.hub_model_id or folder.resolve().name, exist_ok=True, token=args.hub_token).repo_id
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise InputError(f"--push_to_hub: the repository cannot be created: {error}") from None


def push(folder: Path, args: argparse.Namespace, samples: Sequence[Path] = ()) -> str:
    """Upload the adapter, its card and samples; returns the repository's name. Raises NotPublished."""
    try:
        upload_folder(
            repo_id=args.hub_repository,
            folder_path=folder,
            commit_message="S2FT adapter",
            allow_patterns=[WEIGHTS_NAME, "README.md", *(f"validation/{path.name}" for path in samples)],
            token=args.hub_token,
        )
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise NotPublished(
            f"The upload to {args.hub_repository} failed: {error} The adapter is complete: {folder / WEIGHTS_NAME}."
        ) from None
    return args.hub_repository
