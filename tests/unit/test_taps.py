"""Taps see what a module hands over, and nobody else's copies do."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from lilliput.errors import InputError, ModelMismatch, UnknownName
from lilliput.mechanisms.taps import Taps, unwatched


class Twice(nn.Module):
    """One layer called twice, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.shared(x)))


def test_output_and_input_of_each_call() -> None:
    net, x = Twice(), torch.randn(2, 3)
    expected = net.shared(x)
    taps = Taps(net, ["shared", "shared:input", ""], open=True)
    y = net(x)
    first, second = taps.calls("shared")
    assert torch.equal(first, expected)
    assert second is y and taps["shared"] is y and taps[""] is y
    assert taps.calls("shared:input")[0] is x
    assert torch.equal(taps["shared:input"], torch.relu(first))


def test_gradients_flow_through_a_tapped_feature() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    taps = Taps(net, ["1"], open=True)
    net(x)
    taps["1"].sum().backward()
    expected = (1 - torch.tanh(net[0](x)) ** 2).sum(0)
    assert torch.allclose(net[0].bias.grad, expected, atol=1e-6)


def test_tensors_of_a_tuple_are_counted() -> None:
    net = nn.LSTM(3, 4, batch_first=True)
    taps = Taps(net, ["", ":output:1", ":output:2"], open=True)
    output, (hidden, cell) = net(torch.randn(2, 6, 3))
    assert taps[""] is output and taps[":output:1"] is hidden and taps[":output:2"] is cell


def test_keyword_inputs_are_seen() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x)

    net, x = Outer(), torch.randn(1, 3)
    taps = Taps(net, ["inner:input"], open=True)
    net(x)
    assert taps["inner:input"] is x


def test_closed_taps_keep_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    taps = Taps(net, ["0"])
    net(torch.randn(1, 3))
    with pytest.raises(ModelMismatch, match="did not come by '0'"):
        taps["0"]
    taps.open()
    net(torch.randn(1, 3))
    net(torch.randn(1, 3))
    assert len(taps.calls("0")) == 2
    taps.open()
    with pytest.raises(ModelMismatch):
        taps["0"]


def test_a_pass_can_go_by_unseen() -> None:
    net, other = (nn.Sequential(nn.Linear(3, 3)) for _ in range(2))
    taps, others = Taps(net, ["0"], open=True), Taps(other, ["0"], open=True)
    y = net(torch.randn(1, 3))
    with pytest.raises(ZeroDivisionError), unwatched(), unwatched():
        net(torch.randn(1, 3))
        other(torch.randn(1, 3))
        raise ZeroDivisionError
    assert taps.calls("0")[0] is y and len(taps.calls("0")) == 1
    with pytest.raises(ModelMismatch, match="did not come by"):
        others["0"]
    net(torch.randn(1, 3))
    assert len(taps.calls("0")) == 2


def test_copies_are_not_watched() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    taps = Taps(net, ["0", "1:input"], open=True)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        other(torch.randn(1, 3))
        with pytest.raises(ModelMismatch):
            taps["0"]
    x = torch.randn(1, 3)
    net(x)
    assert torch.equal(taps["0"], copy.deepcopy(net)[0](x))


def test_removed_taps_leave_no_hook() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    taps = Taps(net, ["0", "0:input"])
    taps.remove()
    assert not net[0]._forward_hooks and not net[0]._forward_pre_hooks


def test_an_overwritten_feature_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    taps = Taps(net, ["0", "1"], open=True)
    y = net(torch.randn(4, 3))
    assert taps["1"] is y
    with pytest.raises(ModelMismatch, match="overwritten in place"):
        taps["0"]


def test_a_truncated_pass_stops_behind_the_last_place() -> None:
    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("must not run")

    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Loud()), torch.randn(2, 3)
    taps = Taps(net, ["0", "1"])
    taps.run_until_seen(x)
    assert torch.equal(taps["1"], torch.relu(taps["0"]))


def test_names_that_do_not_exist_name_the_nearest() -> None:
    net = nn.Sequential()
    net.add_module("layer1", nn.Linear(2, 2))
    with pytest.raises(UnknownName, match="Did you mean 'layer1'"):
        Taps(net, ["layer2"])
    for bad in ("layer1:side", "layer1:output:x", "layer1:output:0:1"):
        with pytest.raises(InputError, match="should be MODULE"):
            Taps(net, [bad])
    taps = Taps(net, ["layer1:output:1"], open=True)
    with pytest.raises(ModelMismatch, match="handed over 1 tensors"):
        net(torch.randn(1, 2))
    taps.remove()
