"""The scripts of bench/: each reads the options that it has, and no others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SCRIPTS = sorted(
    path for path in (Path(__file__).parents[1] / "bench").glob("*.py") if "= arguments(" in path.read_text()
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_option_that_is_read_is_there(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    (made,) = (
        node
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "arguments"
    )
    read = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    assert read <= {keyword.arg for keyword in made.keywords} | {"json"}
