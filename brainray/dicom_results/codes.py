"""The codes that stand for classes and findings in a structured report: a table in a file.

The table that comes with the project is ``codes.toml`` beside this module. A site's own file, TOML
or JSON, has the same three parts and needs only the entries that differ.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from brainray.errors import ConfigError
from brainray.io import storage

DEFAULT_TABLE = Path(__file__).with_name("codes.toml")
_MAX_CHARS = (16, 16, 64)
"""Of Code Value and Coding Scheme Designator (VR SH), and Code Meaning (LO)."""
OWN_SCHEME = "99BRAINRAY"
"""Coding scheme of what no public one has a code for."""
PRESENCES = ("present", "absent")

_EXAMPLE = '["393564001", "SCT", "Glioma"]'


class Code(NamedTuple):
    """A coded concept."""

    value: str
    scheme: str
    meaning: str


class ClassCode(NamedTuple):
    """What a class of a classifier says."""

    finding: Code
    presence: str
    """``present`` or ``absent``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeTable:
    """All codes of the reports."""

    classes: dict[str, ClassCode]
    concepts: dict[str, Code]
    reasons: dict[str, Code]
    """Why a series has no answer, by the reason that it has in series.parquet."""

    @property
    def digest(self) -> str:
        """A hash of the table: reports with other codes are other objects."""
        text = json.dumps([self.classes, self.concepts, self.reasons], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def has_own_codes(self) -> bool:
        """Whether a code is of :data:`OWN_SCHEME`."""
        used = [code.finding for code in self.classes.values()]
        used += [*self.concepts.values(), *self.reasons.values()]
        return any(code.scheme == OWN_SCHEME for code in used)


def read_codes(classes: Sequence[str], codes_uri: str | None = None) -> CodeTable:
    """Read the code table; entries of a site's file replace those of the default one.

    Raises ConfigError if the file is missing, is not TOML or JSON, or an entry of it is wrong or
    unknown; or if a class of the classifier has no code.
    """
    table = tomllib.loads(DEFAULT_TABLE.read_text())
    if codes_uri is not None:
        own = _parse(codes_uri)
        _check_table(own, table, codes_uri)
        table = {part: table[part] | own.get(part, {}) for part in table}
    if missing := [name for name in classes if name not in table["classes"]]:
        raise ConfigError(
            f"Expected a code for each class of the classifier, found none for "
            f"{', '.join(missing)} in '{codes_uri or DEFAULT_TABLE}'. Give a file as --codes-file "
            f'with [classes.{missing[0]}], finding = {_EXAMPLE} and presence = "present".'
        )
    return CodeTable(
        classes={
            name: ClassCode(Code(*entry["finding"]), entry["presence"])
            for name, entry in table["classes"].items()
        },
        concepts={name: Code(*code) for name, code in table["concepts"].items()},
        reasons={name: Code(*code) for name, code in table["reasons"].items()},
    )


def _parse(codes_uri: str) -> Any:  # noqa: ANN401 - any document
    try:
        text = storage.read_bytes(codes_uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"No code table at '{codes_uri}'. Check --codes-file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"Expected UTF-8 text in the code table '{codes_uri}'.") from error
    is_json = codes_uri.lower().endswith(".json")
    try:
        return json.loads(text) if is_json else tomllib.loads(text)
    except ValueError as error:  # of both parsers
        kind = "JSON" if is_json else "TOML"
        raise ConfigError(f"Expected {kind} in the code table '{codes_uri}': {error}.") from error


def _check_table(own: Any, default: dict[str, Any], uri: str) -> None:  # noqa: ANN401 - any document
    """Check a site's table; concepts and reasons have the names of the default table."""
    _check_object(own, "the table", default, uri)
    for part, entries in own.items():
        _check_object(entries, part, None if part == "classes" else default[part], uri)
        for name, value in entries.items():
            where = f"{part}.{name}"
            if part != "classes":
                _check_code(value, where, uri)
                continue
            _check_object(value, where, ("finding", "presence"), uri)
            if value.get("presence") not in PRESENCES:
                raise ConfigError(
                    f"Expected {where}.presence as {' or '.join(PRESENCES)} in '{uri}', "
                    f"got {value.get('presence')!r}."
                )
            _check_code(value.get("finding"), f"{where}.finding", uri)


def _check_object(value: Any, where: str, names: Iterable[str] | None, uri: str) -> None:  # noqa: ANN401
    if not isinstance(value, dict):
        raise ConfigError(f"Expected names and values for {where} in '{uri}', got {value!r}.")
    unknown = [] if names is None else [name for name in value if name not in names]
    if unknown:
        raise ConfigError(
            f"'{unknown[0]}' is not known in {where} of '{uri}', known are "
            f"{', '.join(names or ())}."
        )


def _check_code(value: Any, where: str, uri: str) -> None:  # noqa: ANN401
    is_text = isinstance(value, list) and all(isinstance(part, str) for part in value)
    if not is_text or len(value) != 3:
        raise ConfigError(
            f"Expected {where} in '{uri}' as value, coding scheme and meaning, such as {_EXAMPLE}; "
            f"got {value!r}."
        )
    for part, name, limit in zip(value, Code._fields, _MAX_CHARS, strict=True):
        if not 1 <= len(part.strip()) <= limit or "\\" in part or not part.isprintable():
            raise ConfigError(
                f"Expected the {name} of {where} in '{uri}' as 1 to {limit} printable characters "
                f"without a backslash, got {part!r}."
            )
