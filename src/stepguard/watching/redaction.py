"""Hides the secrets in the arguments of a program, so that the arguments can be kept.

A secret is known by the name that it is given: ``--api-key VALUE``, ``HF_TOKEN=VALUE``, ``"password": "VALUE"``, also
inside a longer argument such as a shell command or a configuration in JSON. Users and passwords in addresses are known
by their place before the ``@``. A secret without a name cannot be known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"

_NAME = r"[A-Za-z_][\w.+-]*"
# An argument that is one assignment: --name=value, NAME=value, +name=value (Hydra), "X-Api-Key: value".
_WHOLE = re.compile(rf"([-+~/]{{0,2}})({_NAME})([=:]\s*)(.*)", re.DOTALL)
_OPTION = re.compile(rf"-{{1,2}}({_NAME})")
# The beginnings of assignments, and of options with a value, in a longer text.
_BEGINNING = re.compile(rf"""({_NAME})["']?\s*[=:]\s*|(?<!\S)-{{1,2}}({_NAME})\s+""")
_VALUE = re.compile(r""""[^"]*"|'[^']*'|(?:(?:Bearer|Basic|Token)\s+)?[^\s"'&;,}|]+""")

_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET = re.compile(r"(?:token|key|password|passwd|passphrase|pwd|secret|cred|credential|auth|authorization)s?$")
# These name a secret at the end of a name only when they are a whole word, ...
_SECRET_WORDS = frozenset({"pass", "sig", "signature", "sas", "jwt", "bearer", "cookie"})
# ... these wherever they stand in a name, ...
_ANYWHERE = frozenset({"password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials"})
# ... and none of them if the name goes on with one of these: the value is where the secret is, and not the secret.
_WHERE = frozenset({"file", "filename", "path", "dir", "name", "stdin", "env", "id"})
_OF_THE_VALUE = frozenset({"value", "data", "string", "hex", "pem"})

# A password may hold an "@" and, although it should not, a "/".
_ADDRESSES = (
    re.compile(r"""(\w+://|(?<![\w:/])//)[^\s/?#"']*@"""),
    re.compile(r"""(\w+://)[^\s/@:"']*:(?!\d+/)[^\s@"']*@"""),
    re.compile(r"""((?<![\w@/.:+-]))[\w.+-]+:[^\s/"':]+@(?!sha\d)(?=[\w(\[])"""),
)


def without_secrets(argv: Sequence[Any]) -> list[str]:
    """Return the arguments of a program with ``***`` in place of secrets."""
    shown: list[str] = []
    name = None
    for one in map(str, argv):
        if name is not None and not one.startswith("--") and _is_secret(name, one):
            shown.append(HIDDEN)
            name = None
            continue
        shown.append(_without_secrets(one))
        option = _OPTION.fullmatch(one)
        name = None if option is None else option.group(1)
    return shown


def _without_secrets(argument: str) -> str:
    for address in _ADDRESSES:
        argument = address.sub(rf"\1{HIDDEN}@", argument)
    whole = _WHOLE.fullmatch(argument)
    if whole is None:
        return _without_assigned(argument)
    sign, name, equals, value = whole.groups()
    return sign + name + equals + (HIDDEN if _is_secret(name, value) else _without_secrets(value))


def _without_assigned(text: str) -> str:
    shown, place = [], 0
    for beginning in _BEGINNING.finditer(text):
        value = _VALUE.match(text, beginning.end())
        name = beginning.group(1) or beginning.group(2)
        if beginning.start() >= place and value is not None and _is_secret(name, value.group()):
            shown += [text[place : beginning.end()], HIDDEN]
            place = value.end()
    return "".join([*shown, text[place:]])


def _is_secret(name: str, value: str) -> bool:
    """Whether ``value`` is a secret, as ``name`` says."""
    parts = [part.lower() for part in _PART.findall(name)]
    while parts and parts[-1] in _OF_THE_VALUE:
        parts.pop()
    if not value or not parts or parts[-1] in _WHERE:
        return False
    if not _ANYWHERE.isdisjoint(parts) or parts[-1] in _SECRET_WORDS:
        return True
    # --max-tokens=512 is a number of tokens.
    is_count = parts[-1].endswith("s") and value.strip("\"'").isdigit()
    return _SECRET.search(parts[-1]) is not None and not is_count
