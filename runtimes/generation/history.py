"""Chats that are kept by name, as `Session.save` writes them. They are the user's data, and nothing here forgets them."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.errors import InputError
from gemma_edge.runtimes.generation.session import Session

VARIABLE = "GEMMA_EDGE_CHATS"
SUFFIX = ".chat"
NAME = re.compile(r"[\w.-]{1,100}")


@dataclass(frozen=True)
class Chat:
    """A chat that was saved."""

    name: str
    saved_s: float  # seconds since 1970
    bytes: int

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.saved_s))
        return f"{self.name}  saved {when}, {self.bytes / 1e6:.1f} MB"


class History:
    """The chats in one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        """Name the folder; it is made when the first chat is saved.

        Args:
            folder: None takes $GEMMA_EDGE_CHATS, else gemma-edge/chats in the user's data folder.
        """
        self.folder = folder or default_folder()

    def list(self) -> list[Chat]:
        """All chats, the one that was saved last first."""
        files = [path for path in self.folder.glob(f"*{SUFFIX}") if path.is_file()]
        stats = [(path.stem, path.stat()) for path in files]
        chats = [Chat(name, status.st_mtime, status.st_size) for name, status in stats]
        return sorted(chats, key=lambda chat: (-chat.saved_s, chat.name))

    def save(self, session: Session, name: str) -> None:
        """Keep the conversation and its cache; an older chat of this name is replaced.

        Raises:
            InputError: the name cannot be a file's, or the file cannot be written.
        """
        path = self._path(name)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"no place to keep chats ({error}); set {VARIABLE} to a folder of yours") from None
        session.save(path)

    def load(self, session: Session, name: str = "") -> str:
        """Go on with a chat; returns its name.

        Args:
            session: its conversation is replaced.
            name: empty takes the chat that was saved last.

        Raises:
            InputError: there is no such chat, or it is of another bundle or backend.
        """
        chats = self.list()
        if not name and not chats:
            raise InputError(f"no chat was saved in {self.folder}", field="resume", hint="save one with /save NAME")
        name = name or chats[0].name
        self._existing(name)
        session.restore(self._path(name))
        return name

    def delete(self, name: str) -> None:
        """Forget a chat.

        Raises:
            InputError: there is no such chat.
        """
        self._existing(name)
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name) or name.startswith("."):
            raise InputError(
                f"a chat cannot be called {name!r}; use letters, digits, _, - and . between them", field="resume"
            )
        return self.folder / f"{name}{SUFFIX}"

    def _existing(self, name: str) -> None:
        if not self._path(name).is_file():
            names = [chat.name for chat in self.list()]
            raise InputError(f"no chat is called {name}", field="resume", value=name, allowed=names or ("none",))


def default_folder() -> Path:
    """Where the user's chats lie."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "gemma-edge" / "chats"
