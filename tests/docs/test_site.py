"""The built site: it loads nothing from elsewhere, has every public name, and is found by what newcomers look for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest
from pages import ROOT

PUBLISHED = ("stepguard", "stepguard.torch", "stepguard.jax", "stepguard.tensorflow", "stepguard.testing")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        # Without --quiet, which hides the warnings from --strict as well.
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"(?:https?:)?//[^\"]*", text)
        # A page names its own address, and loads nothing from it.
        loaded += re.findall(r"<link(?! rel=\"canonical\")[^>]* href=\"(?:https?:)?//[^\"]*", text)
        assert not loaded, f"{page}: {loaded}"
    for drawing in site.rglob("*.svg"):
        assert not re.findall(r"(?:href|src)=\"(?!#)[^\"]*|url\((?!#)[^)]*|@import", drawing.read_text()), drawing
    assert "save_model_steps" in (site / "reference" / "torch.html").read_text()


# --- the reference ---


def published() -> Iterator[tuple[str, griffe.Class]]:
    """Every class that a module of ours publishes, with the name it is published under."""
    for module in PUBLISHED:
        loaded = griffe.load(module, search_paths=[ROOT / "src"], resolve_aliases=True, allow_inspection=False)
        for name in loaded.exports or ():
            if name in loaded.members:
                member = loaded.members[str(name)]
                target = member.final_target if member.is_alias else member
                if target.is_class:
                    yield f"{module}.{name}", target


def homes(one: griffe.Class) -> list[griffe.Class]:
    return [one, *(base for base in one.mro() if base.path.startswith("stepguard."))]


@pytest.fixture(scope="module")
def described(site: Path) -> set[str]:
    """What the pages of the reference describe: the path of each heading, and CLASS.NAME of each entry of a list."""
    found = set()
    for page in (site / "reference").glob("*.html"):
        owner = ""
        for heading, entry in re.findall(r'id="(stepguard[\w.]*)"|<b><code>(\w+)</code></b>', page.read_text()):
            owner = heading or owner
            found.add(heading or f"{owner}.{entry}")
    return found


def test_each_public_attribute_of_a_published_class_is_in_the_reference(described):
    classes = dict(published())
    assert "stepguard.torch.Session" in classes
    missing = []
    for path, one in classes.items():
        for base in homes(one):
            for name, member in base.members.items():
                paths = {f"{path}.{name}", f"{one.path}.{name}", f"{base.path}.{name}", member.path}
                if not name.startswith("_") and not paths & described:
                    missing.append(f"{path}.{name}")
    assert not missing, "\n".join(missing)
