"""The codes that stand for classes and findings in a structured report: a table in a file.

The table that comes with the project is ``codes.toml`` beside this module. A site's own file, TOML
or JSON, has the same three parts and needs only the entries that differ.
"""

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from brainray import storage
from brainray.errors import ConfigError

DEFAULT_TABLE = Path(__file__).with_name("codes.toml")
MAX_CODE_CHARS, MAX_SCHEME_CHARS, MAX_MEANING_CHARS = 16, 16, 64
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
    """Read the code table, and check that it has every class.

    Parameters
    ----------
    classes : sequence of str
        Of the classifier.
    codes_uri : str, optional
        A site's file, whose entries replace those of the default table.

    Raises
    ------
    ConfigError
        The file is missing, is not TOML or JSON, or an entry of it is wrong or unknown; or a class
        has no code.
    """
    default = _check_table(tomllib.loads(DEFAULT_TABLE.read_text()), str(DEFAULT_TABLE), None)
    table = default
    if codes_uri is not None:
        own = _check_table(_parse(codes_uri), codes_uri, default)
        table = CodeTable(
            classes=default.classes | own.classes,
            concepts=default.concepts | own.concepts,
            reasons=default.reasons | own.reasons,
        )
    if missing := [name for name in classes if name not in table.classes]:
        raise ConfigError(
            f"Expected a code for each class of the classifier, found none for "
            f"{', '.join(missing)} in '{codes_uri or DEFAULT_TABLE}'. Give a file as --codes-file "
            f'with [classes.{missing[0]}], finding = {_EXAMPLE} and presence = "present".'
        )
    return table


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


def _check_table(document: Any, uri: str, known: CodeTable | None) -> CodeTable:  # noqa: ANN401
    """Turn a document into a table; ``known`` has the names that concepts and reasons may have."""
    document = _check_object(document, "the table", ("classes", "concepts", "reasons"), uri)
    parts: dict[str, dict[str, Code]] = {}
    for part in ("concepts", "reasons"):
        names = None if known is None else tuple(getattr(known, part))
        entries = _check_object(document.get(part, {}), part, names, uri)
        parts[part] = {
            name: _check_code(value, f"{part}.{name}", uri) for name, value in entries.items()
        }
    classes = _check_object(document.get("classes", {}), "classes", None, uri)
    return CodeTable(
        classes={
            name: _check_class(value, f"classes.{name}", uri) for name, value in classes.items()
        },
        **parts,
    )


def _check_object(
    value: Any,  # noqa: ANN401 - of a document
    where: str,
    names: Sequence[str] | None,
    uri: str,
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"Expected names and values for {where} in '{uri}', got {value!r}.")
    unknown = [] if names is None else [name for name in value if name not in names]
    if unknown:
        raise ConfigError(
            f"'{unknown[0]}' is not known in {where} of '{uri}', known are "
            f"{', '.join(names or ())}."
        )
    return value


def _check_class(value: Any, where: str, uri: str) -> ClassCode:  # noqa: ANN401
    entry = _check_object(value, where, ("finding", "presence"), uri)
    if entry.get("presence") not in PRESENCES:
        raise ConfigError(
            f"Expected {where}.presence as {' or '.join(PRESENCES)} in '{uri}', "
            f"got {entry.get('presence')!r}."
        )
    return ClassCode(_check_code(entry.get("finding"), f"{where}.finding", uri), entry["presence"])


def _check_code(value: Any, where: str, uri: str) -> Code:  # noqa: ANN401
    is_text = isinstance(value, list) and all(isinstance(part, str) for part in value)
    if not is_text or len(value) != 3:
        raise ConfigError(
            f"Expected {where} in '{uri}' as value, coding scheme and meaning, such as {_EXAMPLE}; "
            f"got {value!r}."
        )
    limits = (MAX_CODE_CHARS, MAX_SCHEME_CHARS, MAX_MEANING_CHARS)
    for part, name, limit in zip(value, Code._fields, limits, strict=True):
        if not 1 <= len(part.strip()) <= limit or "\\" in part or not part.isprintable():
            raise ConfigError(
                f"Expected the {name} of {where} in '{uri}' as 1 to {limit} printable characters "
                f"without a backslash, got {part!r}."
            )
    return Code(*value)
