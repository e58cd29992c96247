"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

_BEFORE = re.compile(r"<!-- before it:\n(.*)-->", re.DOTALL)
# What the site puts a file of the repository in place of.
_SNIPPET = re.compile(r'^--8<-- "(.*)"$', re.MULTILINE)
_TITLE = re.compile(r'title="([^"]*)"')


@dataclass(frozen=True)
class Block:
    """A block of code. ``before`` is what a comment above it has run first, ``output`` what the page says it prints."""

    page: str
    line: int
    language: str
    code: str
    title: str | None = None
    before: str = ""
    output: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def framework(self) -> str:
        found = re.search(r"\b(tensorflow|jax)\b", self.before + self.code)
        return "torch" if found is None else found[1]


def blocks(page: Path) -> list[Block]:
    """Every block of code in a page, in order; one that is indented has the language that its lines speak."""
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    name = page.relative_to(ROOT).as_posix()
    found: list[Block] = []
    before = ""
    for token in tokens:
        if token.type in ("fence", "code_block"):
            language, _, rest = token.info.strip().partition(" ")
            title = _TITLE.search(rest)
            code = _SNIPPET.sub(lambda found: (ROOT / found[1]).read_text().rstrip("\n"), token.content)
            block = Block(
                page=name,
                line=token.map[0] + 1,
                language=language if token.type == "fence" else _spoken(code),
                code=code,
                title=None if title is None else title[1],
                before=before,
            )
            if block.title == "it prints":
                found[-1] = _with_output(found[-1], code)
            else:
                found.append(block)
        comment = _BEFORE.match(token.content) if token.type == "html_block" else None
        before = "" if comment is None else comment[1]
    return found


def _with_output(block: Block, output: str) -> Block:
    assert block.language == "python", f"{block}: what it prints is checked of Python only"
    return Block(block.page, block.line, block.language, block.code, block.title, block.before, output)


_COMMANDS = ("make ", "pip ", "python ", "stepguard ", ".venv/bin/python ", "python3 ", "torchrun ")


def _spoken(code: str) -> str:
    """The language of an indented block, which cannot say it."""
    lines = [line for line in code.splitlines() if line.strip()]
    if lines[0].startswith("$ "):
        return "console"
    if all(line.startswith(_COMMANDS) for line in lines):
        return "bash"
    try:
        compile(code, "block", "exec")
    except SyntaxError:
        return "text"
    return "python"


ALL = [block for page in PAGES for block in blocks(page)]


def plain(text: str) -> list[str]:
    """Lines without what differs from run to run: numbers with their units, times, hosts, the width of columns. Equal
    lines that follow each other are one.
    """
    text = re.sub(r"\bon [\w.-]+(?=[,:])", "on HOST", text)
    text = re.sub(r"(?<![.\w])[0-9a-f]{16,}\b", "#", text)
    text = re.sub(r"\b\d+ (?:d|h|min)(?: \d+ (?:h|min|s))+\b", "#", text)
    text = re.sub(r"(?<![\w-])-?\d[\d,.:]*(e[-+]?\d+)?( ?(s|min|h|d|B|KiB|MiB|GiB)\b)?", "#", text)
    text = re.sub(r"\d+", "#", text)
    lines: list[str] = []
    for line in text.splitlines():
        line = re.sub(r"\s+", " ", line).strip()
        if line and not re.search(r"[┤└│]", line) and lines[-1:] != [line]:
            lines.append(line)
    return lines


def is_like(expected: str, found: str) -> bool:
    """Whether ``found`` is ``expected``, but for what differs from run to run; ``...`` stands for anything."""
    return _fits(plain(expected), plain(found))


def is_printed(expected: str, found: str) -> bool:
    """Whether ``found`` is ``expected``, but for times of day; ``...`` stands for anything."""
    return _fits(*(re.sub(r"\d\d:\d\d:\d\d", "TIME", text).splitlines() for text in (expected, found)))


def _fits(expected: list[str], found: list[str]) -> bool:
    any_lines = re.escape("...") + "\n"
    pattern = "".join(re.escape(line) + "\n" for line in expected)
    pattern = re.sub(f"^{re.escape(any_lines)}", r"(?:.*\\n)*?", pattern, flags=re.MULTILINE)
    return re.fullmatch(pattern.replace(re.escape("..."), ".*"), "".join(line + "\n" for line in found)) is not None
