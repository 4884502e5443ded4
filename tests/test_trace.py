"""Which module ran, how often, and who took its output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maxact.trace import Call, trace

IMAGES = torch.ones((2, 3, 8, 8))


class Network(nn.Module):
    """Two convolutions, a batch norm and a rectifier, connected by `wire`."""

    def __init__(self, wire: Callable[[Network, torch.Tensor], object], inplace: bool = False) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace)
        self.wire = wire
        self.eval()

    def forward(self, x: torch.Tensor) -> object:
        return self.wire(self, x)


def consumers(network: nn.Module, path: str, number: int = 0) -> list[str | None]:
    """Who took the output of one call, as `path:number`; None for an operation that is no module."""
    calls = trace(network, lambda: network(IMAGES))
    (call,) = (call for call in calls if (call.path, call.number) == (path, number))
    return [name(consumer) for consumer in call.consumers]


def name(call: Call | None) -> str | None:
    return call and f"{call.path}:{call.number}"


@pytest.mark.parametrize("inplace", [False, True])
def test_a_chain_of_modules(inplace: bool) -> None:
    network = Network(lambda n, x: n.other(n.relu(n.norm(n.conv(x)))), inplace)
    calls = trace(network, lambda: network(IMAGES))
    assert [name(call) for call in calls] == ["conv:0", "norm:0", "relu:0", "other:0"]
    assert [[name(taker) for taker in call.consumers] for call in calls] == [["norm:0"], ["relu:0"], ["other:0"], []]
    assert all(call.visible and call.module is network.get_submodule(call.path) for call in calls)
    assert all(call.output.shape == (2, 4, 8, 8) for call in calls)


def test_calls_of_one_module_are_numbered() -> None:
    network = Network(lambda n, x: n.relu(n.other(n.relu(n.other(n.relu(n.conv(x)))))))
    calls = trace(network, lambda: network(IMAGES))
    assert [name(call) for call in calls] == ["conv:0", "relu:0", "other:0", "relu:1", "other:1", "relu:2"]
    assert consumers(network, "other", 1) == ["relu:2"]


def test_a_module_under_two_paths_is_one_module() -> None:
    shared = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Conv2d(4, 4, 1), shared)
    assert [name(call) for call in trace(network, lambda: network(IMAGES))] == ["0:0", "1:0", "2:0", "1:1"]


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (lambda n, x: n.relu(n.conv(x) + 1), [None]),
        (lambda n, x: torch.relu(n.conv(x)), [None]),
        (lambda n, x: F.relu(n.conv(x), inplace=True), [None]),
        (lambda n, x: n.conv(x).relu_(), [None]),
        (lambda n, x: n.conv(x)[:, :2], [None]),
        (lambda n, x: n.conv(x).flatten(1), [None]),
        (lambda n, x: torch.cat([n.conv(x), torch.zeros(2, 1, 8, 8)], 1), [None]),
        (lambda n, x: n.relu(input=n.conv(x)), ["relu:0"]),
        (lambda n, x: n.conv(x), []),
    ],
)
def test_operations_that_are_no_modules(wire: Callable[[Network, torch.Tensor], object], expected: list[str]) -> None:
    assert consumers(Network(wire), "conv") == expected


def test_asking_for_a_shape_takes_nothing() -> None:
    def wire(n: Network, x: torch.Tensor) -> object:
        x = n.conv(x)
        assert x.shape[0] == x.size(0) == len(x) and x.dim() == 4 and x.is_floating_point() and x.stride()
        return n.norm(x)

    assert consumers(Network(wire), "conv") == ["norm:0"]


def test_a_value_used_twice_has_two_takers() -> None:
    def residual(n: Network, x: torch.Tensor) -> torch.Tensor:
        x = n.conv(x)
        return n.norm(n.other(x)) + x

    assert consumers(Network(residual), "conv") == ["other:0", None]
    assert consumers(Network(residual), "other") == ["norm:0"]
    assert consumers(Network(residual), "norm") == [None]

    def parallel(n: Network, x: torch.Tensor) -> object:
        x = n.conv(x)
        return n.norm(x), n.relu(x)

    assert consumers(Network(parallel), "conv") == ["norm:0", "relu:0"]


def test_a_value_changed_in_place_is_another_value() -> None:
    def wire(n: Network, x: torch.Tensor) -> object:
        x = n.conv(x)
        n.relu(x)  # in place
        return n.norm(x)

    assert consumers(Network(wire, inplace=True), "conv") == ["relu:0"]
    assert consumers(Network(wire, inplace=True), "relu") == ["norm:0"]
    assert consumers(Network(wire, inplace=False), "conv") == ["relu:0", "norm:0"]

    def added(n: Network, x: torch.Tensor) -> object:
        x = n.conv(x)
        x += 1
        return n.norm(x)

    assert consumers(Network(added), "conv") == [None]


def test_containers_pass_values_on() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).eval()
    assert consumers(network, "0.0") == ["1.0:0"]
    assert consumers(network, "0") == []


def test_inside_a_layer_nothing_is_followed() -> None:
    """A convolution with the padding as a child and the arithmetic as functions is still one layer."""

    class Padded(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 4, 3)
            self.pad = nn.ZeroPad2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(self.pad(x), self.weight, self.bias) * 1.0

    network = nn.Sequential(Padded(), nn.ReLU())
    assert consumers(network, "0") == ["1:0"]
    assert consumers(network, "0.pad") == []


def test_a_norm_with_children_shows_what_it_computes_itself() -> None:
    class Norm(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(4)
            self.drop, self.act = nn.Identity(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.drop(F.batch_norm(x, self.running_mean, self.running_var)))

    network = nn.Sequential(nn.Conv2d(3, 4, 1), Norm()).eval()
    calls = trace(network, lambda: network(IMAGES))
    (norm,) = calls[0].consumers
    assert norm is not None and (norm.path, norm.visible) == ("1", False)
    assert [name(taker) for taker in norm.consumers] == ["1.drop:0"]


def test_outputs_of_any_kind() -> None:
    class Several(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"first": (x * 2, 3), "second": [x * 3]}

    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.several, self.relu = Several(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.several(x)
            return self.relu(found["first"][0]) + found["second"][0]

    assert consumers(Pick(), "several") == ["relu:0", None]


def test_hooks_come_off() -> None:
    def fail(n: Network, x: torch.Tensor) -> torch.Tensor:
        n.conv(x)
        raise KeyError("inside the network")

    for network in (Network(lambda n, x: n.conv(x)), Network(fail)):
        try:
            trace(network, lambda network=network: network(IMAGES))
        except KeyError as error:
            assert "inside the network" in str(error)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_network_that_was_hooked_before_keeps_its_hooks() -> None:
    network, seen = Network(lambda n, x: n.conv(x)), []
    handle = network.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    trace(network, lambda: network(IMAGES))
    network(IMAGES)
    assert len(seen) == 2
    handle.remove()
