"""Which addresses the directories of images stand for. Apart from the images: who opens no mirror loads little."""

from __future__ import annotations

from pathlib import Path

# Also of images that are gone: an error is shown after that.
_addresses: dict[str, str] = {}


def note(path: Path, url: str) -> None:
    """Note that the directory is the image of the mirror at an address."""
    _addresses[str(path)] = url


def is_image(path: Path) -> bool:
    """Whether the directory is, or was, the image of a mirror."""
    return str(path) in _addresses


def shown(text: str) -> str:
    """The text with addresses in the place of the directories of images."""
    for path, url in _addresses.items():
        text = text.replace(path, url)
    return text
