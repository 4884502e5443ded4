"""Class codes -> words: the files that datasets bring for it, and short forms that fit a picture."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maxact.errors import MaxactError

_EXPECTED = "expected lines `CODE WORDS`, two columns of CSV or TSV, or a JSON object"


def read_label_names(path: Path) -> dict[str, str]:
    """Reads a file that names classes: label as the catalog has it -> words.

    - lines of a code, a space and words, as ImageNet's LOC_synset_mapping.txt: `n01440764 tench, Tinca tinca`;
    - two columns of CSV or TSV, without a heading;
    - a JSON object {code: words}, or {number: [code, words]} as imagenet_class_index.json, where the number names the
      class too and underscores stand for spaces.

    Raises MaxactError for a file that cannot be read, or is none of these.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise MaxactError(f"{path}: cannot be read ({error.strerror}); --label-names takes a text file") from error
    except UnicodeDecodeError as error:
        raise MaxactError(f"{path}: is not UTF-8 text; {_EXPECTED}") from error
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        names = _of_json(path, text)
    else:
        names = _of_lines(path, text)
    if not names:
        raise MaxactError(f"{path}: names no class; {_EXPECTED}")
    return names


def _of_json(path: Path, text: str) -> dict[str, str]:
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MaxactError(f"{path}: is not JSON ({str(error).splitlines()[0]}); {_EXPECTED}") from error
    if not isinstance(values, dict):
        raise MaxactError(f"{path}: expected a JSON object {{code: words}}, got {type(values).__name__}")
    names = {}
    for code, value in values.items():
        if isinstance(value, str):
            names[code] = " ".join(value.split())
        elif isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
            names[code] = names[value[0]] = value[1].replace("_", " ")
        else:
            raise MaxactError(f"{path}: {code!r}: expected words or [code, words], got {json.dumps(value)[:60]}")
    return names


def _of_lines(path: Path, text: str) -> dict[str, str]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    delimiter = _delimiter(path, [line for _, line in lines])
    names = {}
    for number, line in lines:
        try:
            parts = line.split(None, 1) if delimiter is None else _columns(line, delimiter)
        except csv.Error as error:
            raise MaxactError(f"{path}: line {number}: {error}; {_EXPECTED}") from error
        parts = [" ".join(part.split()) for part in parts]
        if len(parts) != 2 or not all(parts):
            raise MaxactError(f"{path}: line {number}: expected a code and words, got {line.strip()[:60]!r}")
        names[parts[0]] = parts[1]
    return names


def _delimiter(path: Path, lines: Sequence[str]) -> str | None:
    """What stands between the columns: a tab, a comma or a semicolon; None for white space."""
    suffix = path.suffix.lower()
    if suffix == ".tsv":
        return "\t"
    if suffix == ".csv":
        return ";" if all(";" in line and "," not in line for line in lines) else ","
    first = [line.split(" ", 1)[0] for line in lines]  # words may hold commas too, but codes do not
    return next((mark for mark in "\t,;" if all(mark in word for word in first)), None)


def _columns(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


# what the built-in font has beyond ASCII
_KNOWN = set("·°±«»\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}“”")
_ALIKE = str.maketrans(
    {"ß": "ss", "ø": "o", "Ø": "O", "æ": "ae", "Æ": "AE", "œ": "oe", "ł": "l", "Ł": "L", "đ": "d"}
    | {"\N{MULTIPLICATION SIGN}": "x", "\N{EN DASH}": "-", "\N{EM DASH}": "-", "\N{MINUS SIGN}": "-"}
)


def plain(text: str) -> str:
    """`text` in the characters that the built-in font has, ASCII and a few more: accents are dropped, and what has no
    such form becomes a question mark."""
    decomposed = unicodedata.normalize("NFKD", " ".join(text.split()).translate(_ALIKE))
    kept = (character for character in decomposed if not unicodedata.combining(character))
    return "".join(character if " " <= character <= "~" or character in _KNOWN else "?" for character in kept)
