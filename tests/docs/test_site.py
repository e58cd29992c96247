"""The built site: it loads nothing from elsewhere, has every public name, and is found by what newcomers look for."""

from __future__ import annotations

import html
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest
from pages import ROOT, blocks, is_like

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


# --- what newcomers look for, and see ---


@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("slurm", "recipes/slurm.html"),
        ("kubernetes", "recipes/kubernetes.html"),
        ("wandb", "recipes/wandb.html"),
        ("docker", "recipes/docker.html"),
        ("s3", "mirror.html"),
        ("resume", "promises.html"),
        ("reproducible", "prove.html"),
    ],
)
def test_a_page_is_found_by_its_word(site, word, page):
    documents = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    found = {
        one["location"].partition("#")[0]
        for one in documents
        if word in one["title"].lower() or word in one.get("tags", [])
    }
    assert page in found


def test_the_landing_page_shows_picture_install_line_and_code_first():
    page = ROOT / "docs" / "index.md"
    above = page.read_text().split("\n## ")[0]
    assert "](images/recording.svg)" in above
    assert "pip install 'stepguard[torch]'" in above
    (program,) = (block.code for block in blocks(page) if block.language == "python")
    assert program == next(one.code for one in blocks(ROOT / "docs" / "start-pytorch.md") if one.title == "first.py")


def test_the_figures_are_what_their_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs" / "figures.py"))["figures"]()
    for name, drawing in drawn.items():
        assert (ROOT / "docs" / "images" / name).read_text() == drawing, f"run docs/figures.py: {name}"


def test_the_tables_of_the_benchmarks_are_all_of_one_run():
    script = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert script["filled_in"](page) == page, "run docs/figures.py"
    shown = [found[2] for found in script["MEASURED"].finditer(page)]
    measured = script["measurements"]()
    assert sorted(shown) == sorted(["about", *measured["benchmarks"]])
    # Of all benchmarks, and on a commit without changes of its own.
    all_of_them = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"common", "run"}
    assert set(measured["benchmarks"]) == all_of_them
    assert re.match(r"Commit [0-9a-f]{7,}, ", measured["about"]), measured["about"]
    # A table that somebody has typed would be of another run.
    assert not re.search(r"^\|", script["MEASURED"].sub("", page), re.MULTILINE)


def terminal(drawing: Path) -> str:
    """The text of a recording, without what depends on the moment and on how busy the machine and its disk are."""
    text = html.unescape(re.search(r"<desc>\n(.*?)</desc>", drawing.read_text(), re.DOTALL)[1])
    text = re.sub(r"stepguard-prove-\w+", "", text)
    text = re.sub(r" \.+ same run", " same run", text)
    # The last sentence breaks where its numbers have it, and one restart is no plural.
    text = re.sub(r"(PROVEN .* restart).*", r"\1\n", text, flags=re.DOTALL)
    busy = r"^(the run before had come|a checkpoint was due while|note: |  \S).*\n"
    return re.sub(busy, "", text, flags=re.MULTILINE)


def test_the_recording_shows_what_a_terminal_shows_today(tmp_path):
    again = tmp_path / "recording.svg"
    # One of its two faults, for time.
    command = [sys.executable, ROOT / "docs" / "record.py", "--out", again, "--faults", "damage"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    shown, found = terminal(ROOT / "docs" / "images" / "recording.svg"), terminal(again)
    assert "PROVEN for first.py" in shown
    assert "killed 3 times" in shown
    shown = re.sub(
        r"^killed 3 times.*\n", "", shown.replace("--faults kill,damage", "--faults damage"), flags=re.MULTILINE
    )
    assert is_like(shown, found), f"run docs/record.py\nexpected:\n{shown}\nfound:\n{found}"
