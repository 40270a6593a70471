"""Latency and memory: what is timed, in which order, and what is alive."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.architectures.speech_lstm import SpeechLstm
from lilliput.errors import InputError, ModelMismatch, UnknownName
from lilliput.measure import latency, measure, memory
from lilliput.measure.noise import layer_noise
from lilliput.mechanisms.ranges import noise_ratio


class Journal(nn.Module):
    """Writes down how it is called, and takes a while if asked."""

    def __init__(self, name: str, calls: list[str], seconds: float = 0.0) -> None:
        super().__init__()
        self.name, self.calls, self.seconds = name, calls, seconds

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        assert torch.get_num_threads() == 1
        self.calls.append(self.name)
        time.sleep(self.seconds)
        return x


class Counting(nn.Module):
    """A parametrization that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.times += 1
        return weight + 0.0


X = torch.zeros(1, 4)


def test_models_are_interleaved_and_modes_and_threads_restored() -> None:
    calls: list[str] = []
    models = {name: Journal(name, calls).train() for name in "abc"}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = latency(models, X, repeats=4, warmup=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert "".join(calls) == "abc" * 5
    assert all(model.training for model in models.values())
    assert (result.rounds, result.threads, result.clock) == (4, 1, "wall")


def test_ratio_is_to_the_first_model_and_the_quartiles_enclose_it() -> None:
    models = {"dense": Journal("d", [], 0.002), "slow": Journal("s", [], 0.008)}
    result = latency(models, X, repeats=9)
    slow = result.models["slow"]
    assert result.models["dense"].ratio.median == 1.0
    assert 2.0 < slow.ratio.median < 6.0
    assert slow.seconds.median >= 0.008
    assert slow.ratio.lower <= slow.ratio.median <= slow.ratio.upper


def test_the_cpu_clock_does_not_see_sleep() -> None:
    result = latency(Journal("m", [], 0.005), X, repeats=3, clock="cpu")
    assert result.models["model"].seconds.median < 0.0025


def test_the_budget_ends_the_rounds_but_three_are_run() -> None:
    slow = Journal("m", [], 0.02)
    assert latency(slow, X, repeats=1000, seconds=0.001).rounds == 3
    assert latency(slow, X, repeats=1, seconds=0.001).rounds == 1
    start = time.perf_counter()
    assert 3 <= latency(slow, X, repeats=1000, seconds=0.2).rounds <= 10
    assert time.perf_counter() - start < 2.0


def test_one_round_has_no_spread() -> None:
    result = latency(Journal("m", [], 0.001), X, repeats=1)
    spread = result.models["model"].seconds
    assert spread.lower == spread.median == spread.upper > 0.001


def test_a_parametrized_weight_is_computed_once_outside_the_rounds() -> None:
    layer = nn.Linear(4, 4)
    counting = Counting()
    parametrize.register_parametrization(layer, "weight", counting)
    counting.times = 0
    assert latency(layer, X, repeats=20).rounds == 20
    assert counting.times == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats is 0"),
        ({"warmup": 0}, "warmup is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"seconds": 0.0}, "seconds is 0"),
        ({"seconds": math.nan}, "seconds is nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        latency(nn.Identity(), X, **options)  # type: ignore[arg-type]


def test_no_model_no_such_clock_and_a_model_that_cannot_run_are_refused() -> None:
    with pytest.raises(InputError, match="no model"):
        latency({}, X)
    with pytest.raises(UnknownName, match="clock"):
        latency(nn.Identity(), X, clock="cpus")  # type: ignore[arg-type]
    before = torch.get_num_threads()
    with pytest.raises(ModelMismatch):
        latency(nn.Linear(5, 5), X, threads=3)
    assert torch.get_num_threads() == before


def test_memory_of_a_chain_is_the_widest_neighbouring_pair() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.Linear(32, 2))
    result = memory(model, torch.zeros(3, 4))
    assert result.peak_activation_bytes == 3 * (8 + 32) * 4
    assert result.input_bytes == 3 * 4 * 4
    assert result.parameter_bytes == (4 * 8 + 8 + 8 * 32 + 32 + 32 * 2 + 2) * 4


def test_in_place_operators_and_views_add_nothing() -> None:
    inplace = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Flatten(), nn.Flatten(0))
    assert memory(inplace, torch.zeros(2, 4)).peak_activation_bytes == 2 * 8 * 4
    assert memory(nn.Flatten(), torch.zeros(2, 4, 3)).peak_activation_bytes == 0


def test_a_skip_connection_stays_alive() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(4, 10), nn.Linear(10, 10), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            skip = self.stem(x)
            return skip + self.b(self.a(skip))

    # At the last Linear: skip, a's output and b's output. At the sum: skip, b's output, the sum.
    assert memory(Residual(), torch.zeros(1, 4)).peak_activation_bytes == 3 * 10 * 4


def test_what_is_freed_is_struck_off_and_what_is_kept_adds_up() -> None:
    class Keep(nn.Module):
        def __init__(self, keep: bool) -> None:
            super().__init__()
            self.keep = keep

        def forward(self, x: Tensor) -> list[Tensor]:
            kept = []
            for _ in range(10):
                x = x + 1
                if self.keep:
                    kept.append(x)
            return kept

    x = torch.zeros(100)
    assert memory(Keep(False), x).peak_activation_bytes == 2 * 400
    assert memory(Keep(True), x).peak_activation_bytes == 10 * 400


def test_the_hidden_activations_of_a_transformer_layer_are_seen() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=64, batch_first=True)
    # Around the ReLU: its input, its output and the residual.
    expected = 5 * (64 + 64 + 8) * 4
    assert memory(layer, torch.zeros(1, 5, 8)).peak_activation_bytes == expected


def test_a_parametrized_weight_is_no_activation() -> None:
    layer = nn.Linear(4, 8)
    parametrize.register_parametrization(layer, "weight", Counting())
    result = memory(layer, torch.zeros(1, 4))
    assert result.peak_activation_bytes == 8 * 4
    assert result.parameter_bytes == 40 * 4


def test_measure_collects_what_is_asked_for() -> None:
    model, dense = nn.Linear(4, 2).train(), nn.Linear(4, 2)
    basic = measure(model, X).as_dict()
    assert basic == {
        "parameters": 10,
        "nonzeros": 10,
        "dense_bytes": 40,
        "macs": 8,
        "sparse_macs": 8,
        "uncounted": {},
    }
    everything = measure(model, X, also=["latency", "memory", "energy"], dense=dense).as_dict()
    assert json.loads(json.dumps(everything)) == everything
    assert everything["peak_activation_bytes"] == 8
    assert everything["energy_pj"] == pytest.approx(8 * 4.6 + 10 * 650)
    assert 0.2 < everything["latency_ratio"] < 5.0
    assert "latency_ratio" not in measure(model, X, also=["latency"]).as_dict()
    assert model.training
    with pytest.raises(UnknownName, match="Did you mean 'memory'"):
        measure(model, X, also=["memmory"])  # type: ignore[list-item]


def test_the_ratio_of_a_model_to_itself_is_one() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    result = latency({"a": model, "b": model}, torch.zeros(8, 256), seconds=0.5)
    assert result.models["b"].ratio.median == pytest.approx(1.0, abs=0.15)


def test_noise_of_recurrent_layers_is_that_of_their_outputs() -> None:
    net, noisy, x = SpeechLstm(3, 4, 1, 2), SpeechLstm(3, 4, 1, 2), torch.randn(2, 5, 3)
    found = layer_noise(noisy, net, x)
    assert list(found) == ["lstm", "head"]
    with torch.no_grad():
        assert found["lstm"] == noise_ratio(net.lstm(x)[0], noisy.lstm(x)[0])
