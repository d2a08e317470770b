"""Which files of a bundle a server gives to the page that runs its model, and as what. The page may be the server's own."""

from __future__ import annotations

from pathlib import PurePath

from gemma_edge.bundle.manifest import MANIFEST, Manifest

BACKEND = "web"
MEDIA_TYPES = {
    ".js": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
    ".jinja": "text/plain",
}
OTHER = "application/octet-stream"


def page_files(manifest: Manifest) -> dict[str, str]:
    """The names of a bundle's files that its page fetches, with their media types; empty where no page can run the bundle."""
    if BACKEND not in manifest.backends:
        return {}
    kinds = {name: MEDIA_TYPES.get(PurePath(name).suffix) for name in (MANIFEST, *manifest.files)}
    return {
        **{name: kind for name, kind in kinds.items() if kind and "/" not in name},
        **dict.fromkeys(manifest.backends[BACKEND].files, OTHER),
    }
