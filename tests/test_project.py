"""What newcomers, a package index and other services read of the project: it is valid, and says the same everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trove_classifiers import classifiers

import stepguard

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCHEMAS = {
    ".github/workflows/ci.yml": "vendor.github-workflows",
    ".readthedocs.yaml": "vendor.readthedocs",
    "CITATION.cff": "vendor.citation-file-format",
    "compose.yaml": "vendor.compose-spec",
}
TOOLS = Path(sys.executable).parent


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def run(*command: str | Path) -> str:
    ended = subprocess.run(
        command, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.mark.parametrize(("name", "schema"), SCHEMAS.items())
def test_a_file_for_another_service_has_the_form_that_it_wants(name, schema):
    run(TOOLS / "check-jsonschema", "--builtin-schema", schema, name)


def test_the_classifiers_are_those_of_the_package_index_and_name_each_supported_python():
    assert set(PROJECT["classifiers"]) <= classifiers
    named = {one.rsplit(" ", 1)[1] for one in PROJECT["classifiers"] if re.search(r":: Python :: 3\.\d+$", one)}
    assert set(read(".github/workflows/ci.yml")["jobs"]["gate"]["strategy"]["matrix"]["python"]) == named
    assert PROJECT["requires-python"] == f">={min(named, key=lambda one: int(one.split('.')[1]))}"
    readme = (ROOT / "README.md").read_text()
    assert f"Python {min(named)} to {max(named)}" in readme


def test_the_citation_is_of_this_version_at_the_project_s_address():
    citation = read("CITATION.cff")
    assert citation["version"] == PROJECT["version"] == stepguard.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["abstract"] == PROJECT["description"]
    assert citation["keywords"] == PROJECT["keywords"]
    assert citation["repository-code"] == PROJECT["urls"]["Source"]
    assert citation["url"] == PROJECT["urls"]["Documentation"]


def test_public_ci_runs_targets_and_programs_that_are_there():
    makefile = (ROOT / "Makefile").read_text()
    jobs = read(".github/workflows/ci.yml")["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for line in lines:
        match line.split():
            case ["make", target, *_]:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
            case ["python", "-m", "pip", *_]:
                pass
            case ["python", program, *_]:
                assert (ROOT / program).exists(), line
            case _:
                pytest.fail(f"no check for {line}")
    engines = re.search(r"PROGRAMS = \{(.*?)\}", (ROOT / "examples" / "demo.py").read_text(), re.DOTALL)[1]
    for row in jobs["wheel"]["strategy"]["matrix"]["include"]:
        assert row["extra"] in PROJECT["optional-dependencies"]
        assert f'"{row["engine"]}"' in engines


def test_the_hooks_before_a_commit_run_tools_of_the_gate():
    run(TOOLS / "pre-commit", "validate-config", ".pre-commit-config.yaml")
    lint = re.search(r"^lint:.*?\n\n", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)[0]
    of_the_gate = {line.split("/")[1].split(" --check")[0].removesuffix(" .") for line in lint.splitlines()[1:] if line}
    hooks = read(".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert {hook["entry"].removeprefix(".venv/bin/") for hook in hooks} == of_the_gate
    for hook in hooks:
        program, *words = hook["entry"].removeprefix(".venv/bin/").split()
        if program == "ruff":
            run(TOOLS / program, *words, "examples/demo.py")
        else:
            assert (TOOLS / program).exists()


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)|<(https?:[^>]+)>", text, re.MULTILINE)


def test_the_readme_reads_on_a_package_index_and_links_to_what_is_there():
    text = (ROOT / "README.md").read_text()
    docs, source = PROJECT["urls"]["Documentation"], PROJECT["urls"]["Source"]
    raw = source.replace("github.com", "raw.githubusercontent.com")
    found = ["".join(link) for link in links(text)]
    assert len(found) > 30
    assert len(text.splitlines()) <= 200
    for link in found:
        if link.startswith(docs):
            page, _, anchor = link.removeprefix(docs).partition("#")
            path = ROOT / "docs" / page.replace(".html", ".md")
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link
        elif link.startswith(f"{source}/blob/main/"):
            assert (ROOT / link.removeprefix(f"{source}/blob/main/")).exists(), link
        elif link.startswith(f"{raw}/main/"):
            assert (ROOT / link.removeprefix(f"{raw}/main/")).exists(), link
        else:
            assert link in (source, docs.removesuffix("/en/latest/")), link


def anchors(page: Path) -> list[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings]


def test_the_site_is_at_the_address_that_the_package_names():
    assert (
        re.search(r"^site_url: (.*)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)[1]
        == (PROJECT["urls"]["Documentation"])
    )
