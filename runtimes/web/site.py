"""Which files of a bundle a server gives to the page that runs its model, and as what. The page may be the server's own.

A bundle may come from somebody else. So its scripts are only given away if they are those that this version would write: the
page's own, which lie beside this module, and npm's, by their hashes.
"""

from __future__ import annotations

from pathlib import Path, PurePath

from gemma_edge.bundle.manifest import MANIFEST, Manifest, confined
from gemma_edge.errors import InputError
from gemma_edge.files import sha256

BACKEND = "web"
SCRIPTS = {".js": "text/javascript", ".wasm": "application/wasm"}
MEDIA_TYPES = {**SCRIPTS, ".json": "application/json", ".jinja": "text/plain"}
OTHER = "application/octet-stream"
# LIBRARIES: sha256 of what a site takes of the packages of export/web/packages.py
LIBRARIES = {
    "jinja.js": "c8871915dfa68f976c11540c33fc9341c0810ebe29adb7027b8d51f2a8044936",
    "litert-wasm-utils.js": "e0e20bc28ab001ac732cf40d15b6eebd24fb0deaeb95eeba5100f51eebf015f2",
    "litert.js": "5745ad1712085de7b42f6f2f0b60d8ac2c684b1c5fee5f9a787c53cdc0fa25ef",
    "litert_wasm_compat_internal.js": "4d8f894b7883654fd6e8439730aa41e79ceaab7d19184fc4f1f0b0f1a2a2c8a5",
    "litert_wasm_compat_internal.wasm": "5255c8ad06eabdbd2522cdebf6b22fc10faf74625c23a49b9e072570cd1fa41c",
    "litert_wasm_internal.js": "68efb69f770e3f76aff36a377de629ca496c131b86ac0f0f4b592a1543a898eb",
    "litert_wasm_internal.wasm": "7280cf4471774867e385e6c3cd53e2b45e2975b80fea338fff4ef359b0865614",
    "litert_wasm_threaded_internal.js": "92fe7a720c6deedaa1194c011c79a005ea4f6fc98f533b661cf7900760ab4849",
    "litert_wasm_threaded_internal.wasm": "b5e54eca10f043497edf9a02186332707cae260c550d7ea22b2cae55669596cf",
    "sha256.js": "0ab0ba5a8242ca02d4403e08a60b9308cb7322a175c3a5c3071c595fad1e65de",
    "tokenizers.js": "258e46332101335ce8d95aed7745b19ac3b46d37f3e159a89cf894c2ea9b1d3a",
}


def page_files(bundle: Path, manifest: Manifest) -> dict[str, str]:
    """The names of a bundle's files that its page fetches, with their media types; empty where no page can run the bundle.

    Raises:
        InputError: a script is another one than this version would write.
    """
    if BACKEND not in manifest.backends:
        return {}
    kinds = {name: MEDIA_TYPES.get(PurePath(name).suffix) for name in (MANIFEST, *manifest.files)}
    files = {name: kind for name, kind in kinds.items() if kind and "/" not in name}
    for name in files:
        if PurePath(name).suffix in SCRIPTS and sha256(confined(bundle, name)) != _expected(name):
            raise InputError(
                f"{bundle}: {name} is not what this gemma-edge would write, so no page here runs it; export the bundle again"
            )
    return {**files, **dict.fromkeys(manifest.backends[BACKEND].files, OTHER)}


def _expected(name: str) -> str | None:
    own = Path(__file__).parent / name
    return sha256(own) if own.is_file() else LIBRARIES.get(name)
