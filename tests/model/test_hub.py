"""A model by name: a folder, the local cache, the hub; and one line with a way out when none of them has it. No network here."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from gemma_edge.errors import InputError
from gemma_edge.model.hub import COMPANIONS, DEFAULT_MODEL, copy_companions, resolve, resolve_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way out of this machine."""

    def refuse(*args: object) -> None:
        raise AssertionError(f"a test tried to connect to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put_in_cache(cache: Path, model: str, *files: str) -> Path:
    """What huggingface_hub leaves after a download."""
    home = cache / f"models--{model.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for name in files:
        (snapshot / name).write_text("{}")
    return snapshot


def hub_says(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], str]) -> list[dict[str, Any]]:
    """Replaces the download, not the look into the cache; returns the calls that reached for the network."""
    real, calls = huggingface_hub.snapshot_download, []

    def snapshot_download(model: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return str(real(model, **options))
        calls.append({"model": model, **options})
        return answer()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def raising(error: BaseException) -> Callable[[], str]:
    def answer() -> str:
        raise error

    return answer


def http_error(kind: type[errors.HfHubHTTPError], text: str) -> errors.HfHubHTTPError:
    answer: Any = SimpleNamespace(headers={}, request=None)  # all that the error reads of it
    return kind(text, response=answer)


def message(model: str) -> str:
    with pytest.raises(InputError) as caught:
        resolve(model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def test_an_adapter_may_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_says(monkeypatch, lambda: str(tmp_path))
    assert resolve_adapter("someone/adapter") == tmp_path
    assert [call["model"] for call in calls] == ["someone/adapter"]
    assert resolve_adapter(tmp_path) == tmp_path


def test_an_adapters_own_tokenizer_comes_before_the_models(tmp_path: Path) -> None:
    """Trainers save tokenizer and template with the adapter, for tokens and turns that the base model does not know."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    for folder in (base, adapter, out):
        folder.mkdir()
    for name in ("tokenizer.json", "special_tokens_map.json", "generation_config.json"):
        (base / name).write_text("base")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (adapter / name).write_text("adapter")
    copy_companions(base, out, text_folder=adapter)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "tokenizer.json": "adapter",
        "chat_template.jinja": "adapter",
        "generation_config.json": "base",
    }


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_says(monkeypatch, raising(AssertionError("asked the hub")))
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google" / "gemma-2-2b-it").mkdir(parents=True)  # a folder of that name goes before the hub
    assert resolve(DEFAULT_MODEL) == Path(DEFAULT_MODEL)
    assert calls == []


@pytest.mark.parametrize("name", ["gemma", "/no/such/folder", "a/b/c", "google/gemma 2", "C:\\models"])
def test_what_is_neither_folder_nor_id_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_says(monkeypatch, raising(AssertionError("asked the hub")))
    assert f"{name} is neither a folder nor a Hugging Face model id like {DEFAULT_MODEL}" in message(name)
    assert calls == []


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "gemma.bin").touch()
    assert "models/gemma.bin is neither a folder nor" in message("models/gemma.bin")


def test_the_local_cache_is_used_without_the_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_says(monkeypatch, raising(AssertionError("asked the hub")))
    snapshot = put_in_cache(cache, DEFAULT_MODEL, "config.json", "model.safetensors", "tokenizer.json")
    assert resolve(DEFAULT_MODEL) == snapshot
    assert calls == []


def test_what_is_not_cached_is_fetched_without_pickle_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_says(monkeypatch, lambda: str(tmp_path))
    assert resolve("someone/gemma-2-tuned") == tmp_path
    (call,) = calls
    assert call["model"] == "someone/gemma-2-tuned"
    patterns = call["allow_patterns"]
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
        "pytorch_model.bin",
    ]
    wanted = [name for name in files if any(Path(name).match(pattern) for pattern in patterns)]
    assert wanted == files[:-1]


TROUBLE: dict[str, tuple[BaseException, list[str]]] = {
    "licence not accepted": (
        http_error(errors.GatedRepoError, "403 Client Error.\nAccess is restricted"),
        ["its licence is not accepted", "hf auth login"],
    ),
    "no such model": (
        http_error(errors.RepositoryNotFoundError, "401 Client Error.\nRepository Not Found"),
        ["nor a model on Hugging Face", "gemma-export FOLDER"],
    ),
    "hub is down": (
        http_error(errors.HfHubHTTPError, "503 Server Error\nmore"),
        ["503 Server Error", "gemma-export FOLDER"],
    ),
    "no connection": (
        errors.LocalEntryNotFoundError("Got: ConnectError: [Errno -2]\nAn error happened while trying to locate"),
        ["ConnectError", "gemma-export FOLDER"],
    ),
    "switched off": (errors.OfflineModeIsEnabled("offline mode is enabled"), ["offline mode", "gemma-export FOLDER"]),
    "disk full": (OSError(28, "No space left on device"), ["No space left", "gemma-export FOLDER"]),
    "silent error": (OSError(), ["OSError", "gemma-export FOLDER"]),
    "broken proxy": (vars(errors)["HTTPError"]("proxy says no"), ["proxy says no", "gemma-export FOLDER"]),
}


@pytest.mark.parametrize(
    ("error", "words"),
    [pytest.param(*case, id=name) for name, case in TROUBLE.items()],
)
def test_trouble_with_the_hub_is_one_line_with_a_way_out(
    error: BaseException, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_says(monkeypatch, raising(error))
    found = message(DEFAULT_MODEL)
    assert DEFAULT_MODEL in found
    for word in words:
        assert word in found


def test_offline_mode_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing replaced but the switch that users set: HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "gemma-export FOLDER" in message(DEFAULT_MODEL)


def test_without_the_hub_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    found = message(DEFAULT_MODEL)
    assert "pip install 'gemma-edge[hub]'" in found and "gemma-export FOLDER" in found


@pytest.mark.parametrize("name", ["../gemma-2", "./gemma-2", "google/gemma--2", "google/-gemma", "google/gemma.git"])
def test_a_mistyped_relative_path_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_says(monkeypatch, raising(AssertionError("asked the hub")))
    assert name in message(name)


def test_a_cached_tokenizer_is_not_taken_for_the_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoTokenizer.from_pretrained leaves such a snapshot: the weights still have to be fetched."""
    put_in_cache(cache, DEFAULT_MODEL, "config.json", "tokenizer.json")
    calls = hub_says(monkeypatch, lambda: str(tmp_path))
    assert resolve(DEFAULT_MODEL) == tmp_path
    assert len(calls) == 1


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "private_key"
    path.write_text("secret")
    return path


def refused_copy(folder: Path, out: Path) -> str:
    out.mkdir()
    with pytest.raises(InputError) as caught:
        copy_companions(folder, out)
    assert [path for path in out.iterdir() if "secret" in path.read_text()] == []
    return str(caught.value)


@pytest.mark.parametrize("name", COMPANIONS)
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_model_folder_is_not_copied(name: str, relative: bool, secret: Path, tmp_path: Path) -> None:
    """special_tokens_map.json -> a private key: the key was in the bundle, and the bundle is given to others."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).symlink_to(Path("..") / secret.name if relative else secret)
    message = refused_copy(tmp_path / "model", tmp_path / "out")
    assert f"{tmp_path / 'model' / name} is a link to {secret}, outside of the model's folder" in message
    assert "put a copy in the link's place" in message


def test_a_link_through_a_linked_folder_is_not_copied(secret: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "inner").symlink_to(tmp_path)
    (tmp_path / "model" / "tokenizer.json").symlink_to(Path("inner") / secret.name)
    assert f"is a link to {secret}" in refused_copy(tmp_path / "model", tmp_path / "out")


def test_links_inside_the_folder_and_a_folder_that_is_a_link_are_copied(tmp_path: Path) -> None:
    (tmp_path / "model" / "files").mkdir(parents=True)
    (tmp_path / "model" / "files" / "t.json").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").symlink_to("files/t.json")
    (tmp_path / "linked").symlink_to("model")
    (tmp_path / "out").mkdir()
    copy_companions(tmp_path / "linked", tmp_path / "out")
    (copied,) = (tmp_path / "out").iterdir()
    assert copied.name == "tokenizer.json" and copied.read_text() == "{}" and not copied.is_symlink()


def test_the_hub_caches_own_links_are_copied_and_others_there_are_not(
    cache: Path, secret: Path, tmp_path: Path
) -> None:
    snapshot = put_in_cache(cache, DEFAULT_MODEL)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "0123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    (tmp_path / "bundle").mkdir()
    copy_companions(snapshot, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "tokenizer.json").read_text() == "{}"
    (blobs / "4567").symlink_to(secret)
    (snapshot / "tokenizer_config.json").symlink_to("../../blobs/4567")
    assert f"is a link to {secret}" in refused_copy(snapshot, tmp_path / "out")


@pytest.mark.parametrize("kind", ["dangling", "loop", "pipe", "folder", "socket"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "generation_config.json"
    if kind in ("dangling", "loop"):
        path.symlink_to("nowhere" if kind == "dangling" else path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    message = refused_copy(tmp_path / "model", tmp_path / "out")
    assert f"{path} " in message and "is not a regular file; put the model's file in its place" in message
