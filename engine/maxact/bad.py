"""errors.parquet: the images that gave nothing, and why."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from maxact.archives import reading
from maxact.files import replace_file
from maxact.partial import BadImage

_SCHEMA = pa.schema([("image", pa.int64()), ("key", pa.string()), ("stage", pa.string()), ("error", pa.string())])


def error_table(bad: Sequence[BadImage]) -> pa.Table:
    """What is in the file: image, key, stage, error."""
    return pa.Table.from_pylist([asdict(image) for image in bad], schema=_SCHEMA)


def write_errors(path: Path, bad: Sequence[BadImage]) -> None:
    """Writes errors.parquet."""

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:  # Arrow itself takes no path that is not UTF-8
            pq.write_table(error_table(bad), file)

    replace_file(path, write)


def read_errors(path: Path) -> pa.Table:
    """What `write_errors` wrote. Raises MaxactError where it cannot be read, or is something else."""
    with reading(os.fsencode(path)):
        table = pq.read_table(pa.OSFile(os.fsencode(path)))
        if not table.schema.equals(_SCHEMA) or any(column.null_count for column in table.columns):
            raise pa.ArrowInvalid("it has other columns")
        table.validate(full=True)  # text that is no UTF-8
        return table
