"""Size: counts by hand, effective tensors under parametrizations, ties."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lilliput.errors import InputError
from lilliput.measure.size import effective_state, evaluation, size


class Mask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Codebook(nn.Module):
    """Trains a handful of centroids; ``original`` has their shape, not the weight's."""

    def __init__(self, codes: Tensor, centroids: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.start = centroids

    def forward(self, centroids: Tensor) -> Tensor:
        return centroids[self.codes]

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self.start


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def lenet_300_100() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def half(shape: torch.Size) -> Tensor:
    """Ones at even flat positions."""
    return (torch.arange(shape.numel()) % 2 == 0).float().view(shape)


def test_lenet_300_100_has_the_published_count() -> None:
    result = size(lenet_300_100())
    assert result.parameters == 266_610
    assert result.dense_bytes == 266_610 * 4
    assert result.tensors["0.weight"].shape == (300, 784)
    assert sum(tensor.elements for tensor in result.tensors.values()) == 266_610


@given(zeros=st.integers(0, 12))
@settings(max_examples=13, deadline=None)
def test_nonzeros_are_counted(zeros: int) -> None:
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0).view(-1)[:zeros] = 0.0
    assert size(layer).nonzeros == 12 - zeros


def test_bytes_follow_the_dtype_and_buffers_are_bytes_but_no_parameters() -> None:
    model = nn.BatchNorm1d(6).half()  # weight, bias, mean, var in 2 bytes; a counter in 8
    model.register_buffer("scratch", torch.zeros(1000), persistent=False)
    result = size(model)
    assert result.parameters == 12
    assert result.dense_bytes == 4 * 6 * 2 + 8
    assert not result.tensors["running_mean"].is_parameter
    assert "scratch" not in result.tensors


def test_tied_weight_is_counted_once_and_named_twice() -> None:
    model = Tied()
    result = size(model)
    assert result.parameters == 35 + 7
    assert list(result.tensors) == ["embed.weight", "head.bias"]
    assert list(effective_state(model)) == list(model.state_dict())


def test_a_module_under_two_names_is_counted_once_and_named_twice() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, layer)
    assert size(model).parameters == 12
    assert list(effective_state(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_tied_weights_under_different_masks_are_two_tensors() -> None:
    model = Tied()
    parametrize.register_parametrization(model.embed, "weight", Mask(torch.ones(7, 5)))
    parametrize.register_parametrization(model.head, "weight", Mask(torch.ones(7, 5)))
    shared = model.embed.parametrizations.weight.original
    assert shared is model.head.parametrizations.weight.original
    assert size(model).parameters == 35 + 7
    model.head.parametrizations.weight[0].mask[0] = 0
    assert size(model).parameters == 2 * 35 + 7


def test_equal_weights_that_are_not_tied_are_two_tensors() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].load_state_dict(model[0].state_dict())
    assert size(model).parameters == 24


def test_stacked_mask_and_codebook_count_as_the_plain_model() -> None:
    model = lenet_300_100()
    plain = copy.deepcopy(model)
    codes = torch.randint(0, 4, (300, 784))
    centroids = torch.tensor([-1.0, 0.5, 1.0, 2.0])
    mask = half(torch.Size([300, 784]))
    parametrize.register_parametrization(
        model[0], "weight", Codebook(codes, centroids), unsafe=True
    )
    parametrize.register_parametrization(model[0], "weight", Mask(mask))
    assert model[0].parametrizations.weight.original.shape == (4,)
    result, expected = size(model), size(plain)
    assert result.parameters == expected.parameters == 266_610
    assert result.dense_bytes == expected.dense_bytes
    assert list(result.tensors) == list(expected.tensors)
    assert result.tensors["0.weight"].nonzeros == 300 * 784 // 2
    state = effective_state(model)
    assert list(state) == list(plain.state_dict())
    assert torch.equal(state["0.weight"], centroids[codes] * mask)
    plain.load_state_dict(state)
    x = torch.randn(2, 784)
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Linear(3, 4), "weight"),
        (nn.Linear(3, 4), "bias"),
        (nn.Conv2d(2, 4, 3), "weight"),
        (nn.BatchNorm2d(4), "weight"),
        (nn.BatchNorm2d(4), "running_mean"),
        (nn.LayerNorm(4), "bias"),
        (nn.MultiheadAttention(8, 2), "in_proj_weight"),
        (nn.MultiheadAttention(8, 2, kdim=4, vdim=4), "q_proj_weight"),
        (nn.MultiheadAttention(8, 2), "in_proj_bias"),
        (nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2), "weight_hh_l1"),
    ],
)
def test_names_of_torch_layers_keep_their_order(layer: nn.Module, name: str) -> None:
    plain = list(nn.Sequential(layer).state_dict())
    shape = getattr(layer, name).shape
    parametrize.register_parametrization(layer, name, Mask(torch.ones(shape)))
    names = list(effective_state(nn.Sequential(layer)))
    if name == "running_mean":  # the order of a module's buffers is not recovered either
        assert set(names) == set(plain)
    else:
        assert names == plain


def test_a_parametrization_of_the_root_module_is_hidden() -> None:
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "weight", Mask(torch.ones(4, 3)))
    assert list(effective_state(layer)) == ["weight", "bias"]


def test_state_without_parametrizations_is_the_state_dict() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LSTM(4, 3, num_layers=2))
    state, expected = effective_state(model), model.state_dict()
    assert list(state) == list(expected)
    assert all(state[name].data_ptr() == expected[name].data_ptr() for name in state)


def test_counting_does_not_advance_a_parametrization_that_moves_in_training() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(6, 5))  # power iteration per training forward
    layer.train()
    before = copy.deepcopy(layer.state_dict())
    size(layer)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert layer.training


def test_evaluation_restores_a_mixture_of_modes_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
    model.train()
    model[1].eval()
    with pytest.raises(KeyError), evaluation(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_lazy_layer_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"0\.weight .* run the model once"):
        size(nn.Sequential(nn.LazyLinear(3)))
