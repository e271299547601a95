"""Where adapters come from: a file, a folder, one that PEFT wrote, or a repository on the hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..adapters.file import WEIGHTS_NAME, Adapter, AdapterFileError, adapter_from_peft, read_adapter
from ..tuner.config import S2FTConfig

PEFT_WEIGHTS_NAME = "adapter_model.safetensors"


def find_adapter_file(
    source: str | os.PathLike,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The file that a path or a repository name means; one on the hub is downloaded.

    Raises AdapterFileError where there is none, and OSError where the hub cannot be reached or has none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        folder = path / subfolder if subfolder else path
        names = [weight_name] if weight_name else [WEIGHTS_NAME, PEFT_WEIGHTS_NAME]
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise AdapterFileError(f"{folder}: there is no {' or '.join(names)} in it.")
    if path.is_absolute() or str(source).endswith(".safetensors"):
        raise AdapterFileError(f"{source}: there is no such file or folder.")
    options = {"subfolder": subfolder, "revision": revision, "token": token}
    try:
        try:
            return Path(hf_hub_download(str(source), weight_name or WEIGHTS_NAME, **options))
        except EntryNotFoundError as error:
            if weight_name or isinstance(error, LocalEntryNotFoundError):
                raise
            hf_hub_download(str(source), "adapter_config.json", **options)
            return Path(hf_hub_download(str(source), PEFT_WEIGHTS_NAME, **options))
    except HFValidationError:
        raise AdapterFileError(f"{source}: neither a file, nor a folder, nor the name of a repository.") from None
    except LocalEntryNotFoundError as error:
        raise OSError(f"{source}: no such local path, and the hub cannot be reached ({error}).") from error
    except EntryNotFoundError as error:
        raise OSError(f"{source}: the repository has no {weight_name or WEIGHTS_NAME}.") from error
    except HfHubHTTPError as error:
        raise OSError(f"{source}: no such local path, and the hub says: {error}") from error


def read_any_adapter(path: Path, component: str | None = None) -> Adapter:
    """Read and check an adapter in our format or in PEFT's; PEFT's belongs to `component` unless its keys say others,
    by default to the one that its layers' names are of.

    Raises AdapterFileError as `read_adapter` does.
    """
    return _read_peft(path, component) if _is_peft(path) else read_adapter(path)


def _is_peft(path: Path) -> bool:
    return path.name == PEFT_WEIGHTS_NAME and (path.parent / "adapter_config.json").is_file()


def _read_peft(path: Path, component: str | None) -> Adapter:
    try:
        config = PeftConfig.from_pretrained(path.parent)
        state_dict = load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterFileError(f"{path}: cannot be read as a PEFT adapter ({error}).") from None
    if not isinstance(config, S2FTConfig):
        raise AdapterFileError(f"{path}: a {config.peft_type} adapter, not S2FT.")
    return adapter_from_peft(state_dict, config, component, str(path))
