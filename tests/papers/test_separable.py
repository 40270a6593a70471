"""Guo 2018: trained convolutions become depthwise separable; in networks, beside what else is done."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Train
from lilliput.core.method import Method
from lilliput.errors import InputError
from lilliput.mechanisms.factors import factorize
from lilliput.methods import FilterL1, LowRank, PostTraining
from lilliput.methods.factorize._decompositions import decompose
from lilliput.testing import NETWORKS

CNN = NETWORKS[1]
CUT = FilterL1(keep=0.6, round_to=1)
SEPARATED = LowRank(rank={"3": 2}, convolutions="separable")


def test_every_channel_is_filtered_by_itself_and_then_mixed() -> None:
    """By hand: for each input channel the best rank-r matrix from kernel places to outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1)).double()
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    x = torch.randn(2, 3, 6, 6).double()
    expected = bias.view(1, -1, 1, 1).expand(2, 5, 6, 6)
    for channel in range(3):
        left, size, right = torch.linalg.svd(weight[:, channel].flatten(1), full_matrices=False)
        near = (left[:, :2] * size[:2]) @ right[:2]
        expected = expected + F.conv2d(x[:, [channel]], near.view(5, 1, 3, 3), padding=1)
    chain = factorize(net, "0", "separable", (2,), decompose(weight[None], "separable", (2,)))
    torch.testing.assert_close(net(x), expected)
    depthwise, pointwise = chain
    assert (depthwise.groups, depthwise.out_channels, depthwise.kernel_size) == (3, 6, (3, 3))
    assert (pointwise.groups, pointwise.in_channels, pointwise.kernel_size) == (1, 6, (1, 1))


@pytest.mark.parametrize("then", [CUT, PostTraining(samples=32)], ids=["cut", "quantized"])
def test_the_file_fills_a_fresh_network(then: Method) -> None:
    after = Train(epochs=0) if then.family == "quantize" else Train(epochs=1, lr=0.01)
    stages = [
        Stage(methods=[SEPARATED], train=Train(epochs=1, lr=0.01)),
        Stage(methods=[then], train=after),
    ]
    result = lilliput.compress(CNN.build(), CNN.task(), stages)
    x = next(iter(CNN.task().validation)).inputs
    loaded = lilliput.load(result.artifact, model=CNN.build(seed=3))
    assert torch.equal(loaded(x), result.model.eval()(x))


def test_a_layer_that_lost_channels_is_refused() -> None:
    """Its input channels are the first dim of a depthwise weight, which the plan cannot say."""
    stages = [Stage(methods=[m], train=Train(epochs=1, lr=0.01)) for m in (CUT, SEPARATED)]
    with pytest.raises(InputError, match="before it became separable"):
        lilliput.compress(CNN.build(), CNN.task(), stages)
