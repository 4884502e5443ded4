"""Kernels as pictures: the right layer, the right weights, and where they stand on a page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from maxact.errors import MaxactError
from maxact.render.filters import first_convolution, kernels, write_filters
from maxact.render.page import PAPER
from projected import pdf_pages


def test_the_layer_that_sees_colours() -> None:
    resnet, vit = models.resnet18(weights=None), models.vit_b_32(weights=None)
    assert first_convolution(resnet) == ("conv1", resnet.conv1)
    assert first_convolution(vit)[0] == "conv_proj"
    late = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 5, 3)))
    assert first_convolution(late) == ("2.0", late[2][0])
    assert first_convolution(late[:1])[0] == "0"
    with pytest.raises(MaxactError, match="no convolution"):
        first_convolution(nn.Linear(2, 2))


def test_colours_are_normalised_over_each_kernel() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, (2, 5))
    with torch.no_grad():
        layer.weight[1] *= 1000
        layer.weight[2] = 0
    found = kernels(layer)
    assert list(found) == ["0", "1", "2", "3"]
    for number, weights in enumerate(layer.weight.detach().numpy()):
        wanted = np.zeros((2, 5, 3))
        for channel in range(3):
            wanted[:, :, channel] = weights[channel]
        wanted = 128 + 127 * (wanted / np.abs(weights).max() if weights.any() else wanted)
        assert found[str(number)].dtype == np.uint8
        assert np.abs(found[str(number)] - wanted).max() <= 0.51
    assert (found["2"] == 128).all()
    assert {found["1"].min(), found["1"].max()} & {1, 255}


def test_other_kernels_are_grey_maps() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3)
    found = kernels(layer)
    assert list(found) == ["0:0", "0:1", "1:0", "1:1", "2:0", "2:1"]
    weights = layer.weight.detach().numpy()
    wanted = 128 + 127 * weights[2, 1] / np.abs(weights[2]).max()
    assert all(np.abs(found["2:1"][:, :, colour] - wanted).max() <= 0.51 for colour in range(3))
    assert list(kernels(nn.Conv2d(3, 6, 3, groups=3))) == list("012345")


def test_every_kernel_is_on_the_page(tmp_path: Path) -> None:
    """Kernels of one colour each, and a reference that looks for these colours."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3))
    colours = torch.tensor([[1, a, b] for a in (-1, 0.5) for b in (-1, -0.25, 0.25, 1)])
    with torch.no_grad():
        network[0].weight[:] = colours[:, :, None, None]
    (path,) = write_filters(network, tmp_path / "new" / "folder", title="a network")
    assert path == tmp_path / "new" / "folder" / "filters.png"
    page = np.asarray(Image.open(path))
    places = []
    for colour in np.round(128 + 127 * colours.numpy()):
        rows, columns = np.nonzero((page == colour).all(2))
        assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1) and np.ptp(rows) == np.ptp(columns)
        places.append((rows.min(), columns.min()))
    assert places == sorted(places) and len(set(places)) == 8


def test_many_kernels_go_over_pages(tmp_path: Path) -> None:
    paths = write_filters(nn.Conv2d(3, 300, 2), tmp_path)
    assert [path.name for path in paths] == ["filters-01.png", "filters-02.png"]
    assert all(path.exists() for path in paths)
    pages = [np.asarray(Image.open(path)) for path in paths]
    assert pages[0].shape[1] <= 2000 and pages[0].shape[0] <= 1414
    assert (pages[1][-300:] == PAPER).mean() > 0.9  # the second one is not full
    with pytest.raises(MaxactError, match="131072 kernels would fill"):
        write_filters(nn.Conv2d(512, 256, 1), tmp_path)


def test_pdf(tmp_path: Path) -> None:
    (path,) = write_filters(nn.Conv2d(3, 300, 2), tmp_path, format="pdf")
    assert path.name == "filters.pdf"
    assert pdf_pages(path) == [pytest.approx((841.9, 595.2), abs=0.1)] * 2  # A4 on its side, in points
