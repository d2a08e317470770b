"""A bundle and its card on Hugging Face, in one commit, so that there is never half a bundle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gemma_edge.bundle.manifest import MANIFEST, Manifest, check_hashes
from gemma_edge.errors import InputError, one_line
from gemma_edge.export.card.card import CARD
from gemma_edge.model.hub import ID


def check_push(hub_id: str) -> None:
    """Refuse before any work what cannot be pushed.

    Raises:
        InputError: the id is none, or huggingface_hub is not installed.
    """
    if not re.fullmatch(ID, hub_id):
        raise InputError(f"`push` {hub_id} is not a Hugging Face id like OWNER/NAME", field="push", value=hub_id)
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise InputError("`push` needs huggingface_hub: pip install 'gemma-edge[hub]'", field="push") from None


def push(bundle: Path, card: Sequence[Path], hub_id: str) -> str:
    """Upload a bundle with its card. A repository that does not exist is made, private.

    Args:
        bundle: the folder; its hashes are checked before.
        card: the card's files, the card itself last.
        hub_id: OWNER/NAME.

    Returns:
        The address of the commit.

    Raises:
        InputError: the bundle was changed, or Hugging Face refuses or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the client it speaks through

    manifest = Manifest.load(bundle)
    check_hashes(bundle, manifest)
    *plots, text = card
    files = {name: bundle / name for name in (MANIFEST, *manifest.files)}
    files |= {CARD: text} | {path.name: path for path in plots}
    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(hub_id, private=True, exist_ok=True)
        commit = api.create_commit(hub_id, operations, commit_message=f"{manifest.model.name}, {manifest.recipe.name}")
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.HFValidationError, HTTPError, OSError) as error:
        hint = "run `hf auth login`, and check that you may write there"
        raise InputError(
            f"cannot push to {hub_id} ({one_line(error)})", field="push", value=hub_id, hint=hint
        ) from None
    return str(commit.commit_url)
