"""Where a model comes from: a folder, or a Hugging Face id fetched through huggingface_hub (or its local cache)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from gemma_edge.errors import InputError

DEFAULT_MODEL = "google/gemma-2-2b-it"
# COMPANIONS: files that are copied with a model's weights: tokenizer, chat template, stop ids
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
FILES = ["*.json", "*.safetensors", *COMPANIONS]
HINT = "download the model yourself and pass its folder: gemma-export FOLDER"


def copy_companions(folder: Path, out: Path) -> None:
    """Copy the files of COMPANIONS that are there."""
    for name in COMPANIONS:
        if (folder / name).is_file():
            shutil.copy(folder / name, out)


def resolve(model: str) -> Path:
    """The folder of a model given as a folder or a hub id.

    Raises:
        InputError: no such folder, and the hub cannot provide the model: huggingface_hub is not installed, there is no
            network, there is no such model, or its licence is not accepted.
    """
    if Path(model).is_dir():
        return Path(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or Path(model).exists():
        raise InputError(f"{model} is neither a folder nor a Hugging Face model id like {DEFAULT_MODEL}")
    try:
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the client it speaks through
    except ImportError:
        raise InputError(f"{model} is no folder here; to fetch it: pip install 'gemma-edge[hub]', or {HINT}") from None
    try:
        folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=FILES, local_files_only=True))
        if any(folder.glob("*.safetensors")):  # the cache may hold the tokenizer alone
            return folder
    except errors.HFValidationError:
        raise InputError(f"{model} is neither a folder nor a Hugging Face model id like {DEFAULT_MODEL}") from None
    except errors.LocalEntryNotFoundError:
        pass
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=FILES))
    except errors.GatedRepoError:
        page = f"the page of {model} on Hugging Face"
        raise InputError(f"{model}: its licence is not accepted; accept it on {page} and run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{model} is no folder here and no model on Hugging Face; {HINT}") from None
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        HTTPError,
        OSError,
    ) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot fetch {model} ({reason}); {HINT}") from None
