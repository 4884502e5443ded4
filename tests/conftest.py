"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# before torch is imported: or waiting threads of several test processes take the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import maxact
from stores import scan
from support import write_photographs


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs a browser where there is none, and says so; .ci/run installs one."""
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return
    gone = [item for item in items if "browser" in getattr(item, "fixturenames", ())]
    if gone:
        items[:] = [item for item in items if item not in gone]
        config.hook.pytest_deselected(items=gone)
        print(f"\n{len(gone)} browser tests left out: apt-get install chromium chromium-driver")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 21 small photographs, three in each of seven folders. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("photos")
    write_photographs(folder, 21)
    return folder


@pytest.fixture(scope="session")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> maxact.Store:
    """A finished store of the photographs through the tiny network: both scores, both ends. Nobody changes it."""
    place = tmp_path_factory.mktemp("finished") / "store.zarr"
    return scan(photos, place, score=("max", "mean"), bottom=3)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is such a place, for tests that sync thousands of files."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="maxact-") as folder:
        yield Path(folder)
