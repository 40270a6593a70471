"""MACs and energy against counts by hand; measuring leaves no trace."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.errors import InputError, ModelMismatch, UnknownName
from lilliput.measure.energy import HOROWITZ_45NM, energy
from lilliput.measure.macs import _FORMULAS, macs


class Matmul(nn.Module):
    """A parametrization that costs MACs while training: a low-rank product."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(8, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return self.left @ (self.left.T @ weight)


class Restless(nn.Module):
    """Draws noise and moves two buffers, one in place and one by assignment, even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x[0] + torch.rand(3)
        return self.fc(x)


class TwoInputs(nn.Module):
    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return scale * (left @ right)


def lenet_300_100() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def taps(conv: nn.Conv2d, x: Tensor) -> int:
    """Multiplications of a convolution: how many input numbers each output number is made of.

    Counted by convolving ones with ones in the unpadded middle of a large input.
    """
    with torch.no_grad():
        conv.weight.fill_(1.0)
        assert conv.bias is not None
        conv.bias.zero_()
        ones = conv(torch.ones(1, conv.in_channels, 15, 15))
        return int(ones.max()) * conv(x).numel()


def test_lenet_300_100_has_the_published_count() -> None:
    result = macs(lenet_300_100(), torch.zeros(1, 784))
    assert result.total == 266_200
    assert result.by_module == {"0": 235_200, "2": 30_000, "4": 1_000}
    assert result.uncounted == {"aten.relu": 2}


def test_the_figure_is_for_the_whole_batch() -> None:
    assert macs(lenet_300_100(), torch.zeros(5, 784)).total == 5 * 266_200


@given(
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    batch=st.integers(1, 2),
)
@settings(max_examples=20, deadline=None)
def test_convolutions(groups: int, kernel: int, stride: int, padding: int, batch: int) -> None:
    conv = nn.Conv2d(4, 8, kernel, stride=stride, padding=padding, groups=groups)
    x = torch.zeros(batch, 4, 7, 6)
    assert macs(conv, x).total == taps(conv, x)


def test_transposed_convolution_counts_every_input_position() -> None:
    conv = nn.ConvTranspose2d(3, 5, 2, stride=2)
    assert macs(conv, torch.zeros(1, 3, 4, 4)).total == 4 * 4 * 3 * 5 * 2 * 2


@pytest.mark.parametrize("batch", [1, 3])
def test_encoder_layer_counts_projections_attention_and_feed_forward(batch: int) -> None:
    length, width, hidden = 6, 8, 16
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True)
    result = macs(layer, torch.zeros(batch, length, width))
    projections = 4 * length * width * width
    attention = 2 * length * length * width
    feed_forward = 2 * length * width * hidden
    assert result.total == batch * (projections + attention + feed_forward)
    assert not any("attention" in name or "transformer" in name for name in result.uncounted)
    assert torch.backends.mha.get_fastpath_enabled()


def test_lstm_in_both_directions_and_gru() -> None:
    steps, batch, width, hidden = 5, 3, 4, 6
    lstm = nn.LSTM(width, hidden, bidirectional=True)
    x = torch.zeros(steps, batch, width)
    assert macs(lstm, x).total == 2 * steps * batch * 4 * hidden * (width + hidden)
    gru = nn.GRU(width, hidden)
    assert macs(gru, x).total == steps * batch * 3 * hidden * (width + hidden)


def test_cudnn_counts_what_the_processor_counts() -> None:
    """A GPU runs all layers and directions as one operator; its formula sees shapes only."""
    lstm = nn.LSTM(4, 6, num_layers=2, bidirectional=True)
    shapes = [p.shape for p in lstm.parameters()]
    flops = _FORMULAS[torch.ops.aten._cudnn_rnn]((5, 3, 4), shapes, 4, None)
    assert flops == 2 * macs(lstm, torch.zeros(5, 3, 4)).total


def test_bilinear_has_a_product_an_entry_of_its_weight() -> None:
    result = macs(nn.Bilinear(3, 4, 5), (torch.zeros(2, 3), torch.zeros(2, 4)))
    assert result.total == 2 * 3 * 4 * 5
    assert "aten._trilinear" not in result.uncounted


def test_each_weight_has_its_own_share() -> None:
    lstm = nn.LSTM(3, 4)
    with torch.no_grad():
        lstm.weight_hh_l0[:8] = 0.0
    found = macs(lstm, torch.zeros(5, 2, 3)).sparse_by_weight
    assert found == {"weight_ih_l0": 10 * 16 * 3, "weight_hh_l0": 10 * 8 * 4}
    attention = nn.MultiheadAttention(4, 1, kdim=3, vdim=6, batch_first=True)
    query, key, value = torch.zeros(1, 5, 4), torch.zeros(1, 7, 3), torch.zeros(1, 7, 6)
    assert macs(attention, (query, key, value)).sparse_by_weight == {
        "q_proj_weight": 5 * 16,
        "k_proj_weight": 7 * 12,
        "v_proj_weight": 7 * 24,
        "out_proj.weight": 5 * 16,
    }


def test_sparse_macs_of_a_parametrized_lstm() -> None:
    class Zero(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0

    lstm = nn.LSTM(3, 4)
    parametrize.register_parametrization(lstm, "weight_hh_l0", Zero())
    assert macs(lstm, torch.zeros(2, 1, 3)).sparse_macs == 2 * 16 * 3


def test_dot_product_is_counted() -> None:
    assert macs(TwoInputs(), (torch.zeros(9), torch.zeros(9))).total == 9
    assert macs(TwoInputs(), (torch.zeros(4, 9), torch.zeros(9))).total == 36


def test_inputs_as_tuple_and_as_keywords() -> None:
    left, right = torch.zeros(2, 3), torch.zeros(3, 4)
    assert macs(TwoInputs(), (left, right)).total == 24
    assert macs(TwoInputs(), {"right": right, "left": left, "scale": 2.0}).total == 24


def test_sparse_macs_follow_each_layers_density() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)[:, 0] = 0.0  # 12 of 16
        model[1].weight.fill_(0.0)[0, 0] = 1.0  # 1 of 8
        model[0].bias.zero_()  # a bias costs no MAC
    result = macs(model, torch.zeros(3, 4))
    assert result.total == 3 * 24
    assert result.sparse_macs == 3 * 13


def test_sparse_macs_of_packed_attention_weights_leave_the_scores_dense() -> None:
    attention = nn.MultiheadAttention(4, 1, bias=False, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.fill_(1.0)[:6] = 0.0  # half of it
        attention.out_proj.weight.fill_(1.0)
    x = torch.zeros(1, 5, 4)
    result = macs(attention, (x, x, x))
    scores = 2 * 5 * 5 * 4
    assert result.total == 4 * 5 * 16 + scores
    assert result.sparse_macs == 3 * 5 * 16 // 2 + 5 * 16 + scores


def test_sparse_macs_with_a_tied_weight() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.fill_(1.0)[:3] = 0.0
    result = macs(model, torch.tensor([[1, 2]]))
    assert (result.total, result.sparse_macs) == (48, 24)


def test_by_module_adds_up_when_a_module_runs_twice_and_the_root_computes() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(self.block(x))
            return x @ x.T

    result = macs(Recurrent(), torch.zeros(2, 4))
    assert result.by_module == {"block.0": 2 * 2 * 16, "": 2 * 2 * 4}
    assert result.total == 80


def test_by_module_survives_an_error_that_the_model_catches() -> None:
    class Fallback(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrong, self.right = nn.Linear(9, 9), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.right(x) @ x.T

    assert macs(Fallback(), torch.zeros(1, 4)).by_module == {"right": 16, "": 4}


def test_unknown_arithmetic_is_listed_and_views_are_not() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(x.view(4, 4).t().contiguous().reshape(2, 8), (1, 1))
            return torch.cat([torch.cdist(x, x), x.cumsum(1)], dim=1)

    uncounted = macs(Odd(), torch.ones(16)).uncounted
    assert uncounted == {"aten._cdist_forward": 1, "aten.cumsum": 1}


def test_the_arithmetic_of_a_parametrization_is_not_the_models() -> None:
    layer = nn.Linear(8, 8, bias=False)
    parametrize.register_parametrization(layer, "weight", Matmul(rank=1))
    result = macs(nn.Sequential(layer), torch.zeros(1, 8))
    assert result.total == 64
    assert result.by_module == {"0": 64}


def test_density_is_that_of_the_parametrized_weight() -> None:
    class EvenColumns(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (torch.arange(weight.shape[1]) % 2)

    layer = nn.Linear(8, 4)
    parametrize.register_parametrization(layer, "weight", EvenColumns())
    assert macs(layer, torch.zeros(1, 8)).sparse_macs == 16


def test_batch_norm_model_is_left_bit_identical() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4))
    model.train()
    model[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    macs(model, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_buffers_that_move_in_eval_mode_and_the_random_state_come_back() -> None:
    model = Restless()
    calls, last = model.calls, model.last
    random_state = torch.get_rng_state()
    macs(model, torch.ones(2, 3))
    assert model.calls is calls and float(calls) == 0.0
    assert model.last is last and torch.equal(last, torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_pending_backward_survives_a_measurement() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    loss = model(torch.randn(4, 3)).sum()
    macs(model, torch.zeros(4, 3))
    loss.backward()


def test_a_failing_forward_names_the_model_and_shapes_and_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4)).train()
    with pytest.raises(ModelMismatch, match=r"Sequential .*\[\(2, 3\)\]"):
        macs(model, torch.zeros(2, 3))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inputs_of_another_type_are_refused() -> None:
    with pytest.raises(InputError, match="example_inputs is a list"):
        macs(nn.Linear(2, 2), [torch.zeros(1, 2)])  # type: ignore[arg-type]


def ten_by_ten() -> nn.Linear:
    layer = nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)[:8] = 0.0  # 20 of 100 remain
    return layer


def test_energy_by_hand() -> None:
    x = torch.zeros(3, 10)  # 300 MACs; the weights are fetched once for the batch
    dram = energy(ten_by_ten(), x)
    assert dram.arithmetic_pj == pytest.approx(300 * (3.7 + 0.9))
    assert dram.memory_pj == pytest.approx(100 * 1300 / 2)
    assert dram.total_pj == pytest.approx(dram.arithmetic_pj + dram.memory_pj)
    sram = energy(ten_by_ten(), x, weights_in="sram_8kb")
    assert sram.memory_pj == pytest.approx(100 * 5)
    skipping = energy(ten_by_ten(), x, skip_zeros=True)
    assert (skipping.macs, skipping.fetched_bits) == (60, 20 * 32)


def test_energy_of_int8_with_a_codebook() -> None:
    result = energy(
        ten_by_ten(), torch.zeros(1, 10), arithmetic="int8", accumulator="int32", weight_bits=5
    )
    assert result.arithmetic_pj == pytest.approx(100 * (0.2 + 0.1))
    assert result.memory_pj == pytest.approx(500 / 64 * 1300)
    assert energy(ten_by_ten(), torch.zeros(1, 10), arithmetic="fp16").fetched_bits == 1600


def test_energy_takes_another_table() -> None:
    free = dataclasses.replace(HOROWITZ_45NM, source="mine", access={"rom": 0.0})
    result = energy(ten_by_ten(), torch.zeros(1, 10), free, weights_in="rom")
    assert (result.memory_pj, result.source) == (0.0, "mine")


def test_energy_refuses_what_the_table_lacks() -> None:
    x = torch.zeros(1, 10)
    with pytest.raises(UnknownName, match="sram_8kb"):
        energy(ten_by_ten(), x, weights_in="sram_8k")
    with pytest.raises(UnknownName, match="multiplication format"):
        energy(ten_by_ten(), x, arithmetic="int7")
    with pytest.raises(InputError, match="weight_bits"):
        energy(ten_by_ten(), x, weight_bits=float("nan"))
