"""Where a model comes from: a folder, or a Hugging Face id fetched through huggingface_hub (or its local cache)."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from gemma_edge.errors import InputError
from gemma_edge.files import link_home
from gemma_edge.reading import is_gguf

DEFAULT_MODEL = "google/gemma-2-2b-it"
STOP_IDS = "generation_config.json"
# COMPANIONS: files that are copied with a model's weights: tokenizer, chat template, stop ids
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    STOP_IDS,
)
ID = r"[\w.-]+/[\w.-]+"  # matches the id of a model on Hugging Face
FILES = ["*.json", "*.safetensors", *COMPANIONS]
HINT = "download the model yourself and pass its folder: gemma-export FOLDER"


def copy_companions(folder: Path, out: Path, *, text_folder: Path | None = None) -> None:
    """Copy those files of COMPANIONS that exist; raises as `companions` does.

    Args:
        folder: the model's.
        out: the folder to copy into.
        text_folder: the folder of an adapter that brings its own tokenizer and chat template; the rest is the model's.
    """
    for name, path in companions_of(folder, text_folder or folder).items():
        shutil.copy(path, out / name)


def companions_of(folder: Path, text_folder: Path) -> dict[str, Path]:
    """The companions of a model whose tokenizer and chat template may lie in another folder; arguments as `copy_companions`'."""
    files = companions(folder)
    if text_folder == folder:
        return files
    return {name: path for name, path in files.items() if name == STOP_IDS} | companions(text_folder)


def companions(folder: Path) -> dict[str, Path]:
    """What is there of COMPANIONS: name -> the regular file, links followed.

    They are copied as they are, so a link in a stranger's folder could publish any file of the user's with the bundle. Links
    must stay inside the folder, or inside the repository of the hub's cache that it lies in. What is only parsed (config.json,
    weights, adapters) may be linked from anywhere: people keep shards on other disks, and no file but a model survives parsing.

    Raises:
        InputError: a link leads elsewhere or nowhere, or something is not a regular file.
    """
    home = link_home(folder)
    result = {}
    for name in COMPANIONS:
        path, real = folder / name, Path(os.path.realpath(folder / name))
        if not os.path.lexists(path):
            continue
        if not real.is_relative_to(home):
            raise InputError(
                f"{path} is a link to {real}, outside of the model's folder; a bundle would publish that file:"
                " put a copy in the link's place if it belongs to the model, else remove the link"
            )
        if not real.is_file():
            kind = f"is a link to {real}, which" if path.is_symlink() else "exists and"
            raise InputError(f"{path} {kind} is not a regular file; put the model's file in its place, or remove it")
        result[name] = real
    return result


def resolve_adapter(lora: str | Path) -> Path:
    """The folder of a PEFT adapter given as a folder or a hub id.

    Raises:
        InputError: as `resolve` does.
    """
    is_id = re.fullmatch(ID, str(lora)) and not is_gguf(lora)
    if not Path(lora).is_dir() and not is_id:
        raise InputError(
            field="lora", value=lora, hint="give a PEFT adapter's folder with adapter_config.json, or a Hugging Face id"
        )
    return resolve(str(lora))


def resolve(model: str) -> Path:
    """The folder of a model given as a folder, a GGUF file or a hub id.

    Raises:
        InputError: the GGUF file cannot be used. Or there is no such folder, and the hub cannot provide the model:
            huggingface_hub is not installed, there is no network, there is no such model, or its licence is not accepted.
    """
    if Path(model).is_dir():
        return Path(model)
    if is_gguf(model):
        from gemma_edge.model.gguf.folder import prepare  # here: it imports NumPy, and `--help` does not wait for that

        return prepare(Path(model))
    if not re.fullmatch(ID, model) or Path(model).exists():
        raise InputError(f"{model} is neither a folder nor a Hugging Face model id like {DEFAULT_MODEL}")
    try:
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the client it speaks through
    except ImportError:
        raise InputError(
            f"{model} is not a folder here; to fetch it: pip install 'gemma-edge[hub]', or {HINT}"
        ) from None
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
        raise InputError(f"{model} is neither a folder here nor a model on Hugging Face; {HINT}") from None
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        HTTPError,
        OSError,
    ) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot fetch {model} ({reason}); {HINT}") from None
