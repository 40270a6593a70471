"""Luo, Wu, Lin 2017: ThiNet; and the solver that it shares with others."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Task, Train, accuracy
from lilliput.core.run import Run
from lilliput.core.types import Batch
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError
from lilliput.mechanisms.solvers import draw, least_squares, matrix, output_sizes, rows, visit_rows
from lilliput.methods.prune.thinet import Thinet, contributions, kept_scales, removal_order
from lilliput.testing import make_batches

LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding="valid", dilation=(1, 2)), (2, 4, 12, 13)),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding=2, groups=2, padding_mode="reflect"), (2, 4, 9, 8)),
    (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
    (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9)),
    (nn.Conv3d(4, 6, 3, padding=(0, 1, 2), stride=(1, 2, 3)), (2, 4, 9, 8, 7)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 6)),
    (nn.ConvTranspose2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 2)), (2, 4, 5, 6)),
    (nn.ConvTranspose1d(4, 6, 4, stride=3, dilation=2), (2, 4, 5)),
    (nn.Linear(4, 6), (3, 4)),
    (nn.Linear(4, 6), (3, 5, 7, 4)),
]


def gram_of(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def each(channels: int) -> np.ndarray:
    """One place for each channel."""
    return np.arange(channels)[:, None]


# -- the samples ------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v)[:40])
@torch.no_grad()
def test_contributions_and_bias_sum_to_the_output(layer: Any, shape: tuple[int, ...]) -> None:
    """The identity behind the method; a mistake in padding, stride or dilation breaks it."""
    generator = torch.Generator().manual_seed(0)
    layer, inputs = layer.double(), torch.randn(shape, generator=generator).double()
    output = layer(inputs)
    if isinstance(layer, nn.Linear):
        output = output.reshape(len(output), -1, 6).transpose(1, 2)
    sizes = output_sizes(layer, inputs)
    assert sizes == list(output.shape[2:])
    sample, place = draw(sizes, len(inputs), 30, generator)
    filters = torch.randint(6, (len(sample),), generator=generator)
    found = rows(layer, inputs, sample, place)
    parts = contributions(layer, found, filters, each(matrix(layer).shape[1]))
    wanted = output[(sample, filters, *place.T)]
    assert torch.allclose(parts.sum(1) + layer.bias[filters], wanted, atol=1e-12)


def test_a_channel_that_is_flattened_contributes_all_its_pixels() -> None:
    layer, maps = nn.Linear(3 * 4, 5).double(), torch.randn(2, 3, 2, 2).double()
    sample, filters = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 2])
    found = rows(layer, maps.flatten(1), sample, torch.zeros(3, 1, dtype=torch.long))
    parts = contributions(layer, found, filters, np.arange(12).reshape(3, 4))
    weight = layer.weight.detach().view(5, 3, 4)
    for s, c in itertools.product(range(3), range(3)):
        wanted = (weight[filters[s], c] * maps[sample[s], c].flatten()).sum()
        assert float(parts[s, c]) == pytest.approx(float(wanted))


def test_positions_are_spread_over_every_sample_and_repeat_with_the_seed() -> None:
    sample, place = draw([3, 5], 4, 200, torch.Generator().manual_seed(1))
    assert torch.equal(sample.bincount(), torch.full((4,), 200))
    assert {tuple(p) for p in place.tolist()} == set(itertools.product(range(3), range(5)))
    again = draw([3, 5], 4, 200, torch.Generator().manual_seed(1))
    assert torch.equal(place, again[1])


def test_visiting_leaves_no_hook_and_no_mode_behind() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(), nn.Conv2d(2, 3, 3))
    model[1].eval()

    def fail(name: str, found: Tensor) -> None:
        raise RuntimeError(name)

    batch, generator = Batch(torch.randn(2, 1, 8, 8), None), torch.Generator()
    with pytest.raises(RuntimeError, match="2"):
        visit_rows(model, ["2"], [batch], 1, generator, fail)
    assert [m.training for m in model] == [True, False, True]
    assert not any(m._forward_pre_hooks for m in model.modules())


# -- the greedy choice ------------------------------------------------------------------------


@given(st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_greedy_step_is_the_argmin_of_equation_6(channels: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(40, channels))
    order = removal_order(gram_of(torch.from_numpy(x)), channels)
    removed: list[int] = []
    for chosen in order:
        left = [c for c in range(channels) if c not in removed]
        errors = [float((x[:, [*removed, c]].sum(1) ** 2).sum()) for c in left]
        assert int(chosen) == left[int(np.argmin(errors))]
        removed.append(int(chosen))


def test_a_dead_channel_goes_first() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    x[:, 4] = 0
    assert removal_order(gram_of(x), 3)[0] == 4


def test_channels_that_cancel_go_together() -> None:
    """Ranking by norm would take channel 2 second; what counts is the error of the sum."""
    first = torch.zeros(3).double()
    first[0] = 1.0
    x = torch.stack([first, -1.2 * first, 1.1 * first.roll(1)], dim=1)
    norms = x.norm(dim=0)
    assert norms.argsort()[1] == 2
    order = removal_order(gram_of(x), 2)
    assert order.tolist() == [0, 1]
    assert float(x[:, order].sum(1).norm()) == pytest.approx(0.2)


# -- the scales -------------------------------------------------------------------------------


def residual(x: Tensor, kept: Tensor, scales: Tensor) -> float:
    return float((x[:, kept] @ scales - x.sum(1)).square().sum())


@given(st.integers(2, 9), st.integers(0, 1000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_scaling_never_adds_to_the_error(channels: int, seed: int, dependent: bool) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(30, channels)))
    if dependent:  # equal, zero and summed columns: the inverse of equation 7 does not exist
        x[:, 0] = x[:, 1]
        x[:, -1] = x[:, 0] + x[:, 1] if channels > 3 else 0
    kept = torch.from_numpy(np.sort(rng.choice(channels, rng.integers(1, channels), replace=False)))
    scales = kept_scales(gram_of(x), kept)
    assert bool(scales.isfinite().all())
    ones = torch.ones(len(kept)).double()
    assert residual(x, kept, scales) <= residual(x, kept, ones) * (1 + 1e-9) + 1e-9


def test_scales_are_the_least_squares_solution() -> None:
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(50, 7)))
    kept = torch.tensor([0, 2, 3, 6])
    wanted = np.linalg.lstsq(x[:, kept].numpy(), x.sum(1).numpy(), rcond=None)[0]
    assert kept_scales(gram_of(x), kept).numpy() == pytest.approx(wanted, rel=1e-9)


def test_the_twin_of_a_removed_channel_counts_double() -> None:
    x = torch.from_numpy(np.random.default_rng(4).normal(size=(50, 4)))
    x[:, 3] = x[:, 1]
    assert kept_scales(gram_of(x), torch.tensor([0, 1, 2])).tolist() == pytest.approx([1, 2, 1])


def test_nothing_removed_nothing_scaled() -> None:
    x = torch.from_numpy(np.random.default_rng(5).normal(size=(50, 4)))
    x[:, 3] = x[:, 1]
    assert kept_scales(gram_of(x), torch.arange(4)).tolist() == [1.0] * 4


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_least_squares_with_any_rank(columns: int, outputs: int, count: int, seed: int) -> None:
    """Fewer samples than columns included; the error of what the ridge pulls to is never exceeded."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(count, columns)) * 10.0 ** rng.integers(-3, 4))
    y, start = (torch.from_numpy(rng.normal(size=(n, outputs))) for n in (count, columns))
    found = least_squares(x.T @ x, x.T @ y, toward=start)
    error = (x @ found - y).square().sum()
    assert bool(found.isfinite().all())
    assert error <= (x @ start - y).square().sum() * (1 + 1e-9) + 1e-12
    if count >= 2 * columns:
        exact = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0]
        assert found.numpy() == pytest.approx(exact, rel=1e-5, abs=1e-5 * np.abs(exact).max())


# -- the method -------------------------------------------------------------------------------


@dataclass
class Widths(Watcher):
    """How wide the linear layers are after every step."""

    seen: list[tuple[int, ...]] = field(default_factory=list)

    def step_done(self, run: Run) -> None:
        layers = [m for m in run.model.modules() if isinstance(m, nn.Linear)]
        self.seen.append(tuple(layer.out_features for layer in layers))


def chain() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = [12, 20, 18, 16, 3]
        pairs = itertools.pairwise(widths)
        return nn.Sequential(*itertools.chain(*((nn.Linear(i, o), nn.ReLU()) for i, o in pairs)))


def quiet_task() -> Task:
    """Batches in the same order whenever they are read."""
    _, batches = make_batches(12, samples=256)
    return Task(batches, batches, batches, nn.functional.cross_entropy, accuracy)


def thin(model: nn.Module, *methods: Thinet, task: Task | None = None) -> nn.Module:
    return lilliput.compress(model, task or quiet_task(), methods).model


def test_rounds_take_layer_after_layer_to_its_final_width() -> None:
    watcher = Widths()
    stage = Stage(
        methods=[Thinet(keep=0.5, round_to=1, rounds=3, until=0.75)], train=Train(epochs=1)
    )
    lilliput.compress(chain(), quiet_task(), [stage], watchers=[watcher])
    assert list(dict.fromkeys(watcher.seen)) == [
        (10, 18, 16, 3),
        (10, 9, 16, 3),
        (10, 9, 8, 3),
    ]


def test_a_layer_is_measured_on_the_thin_network_before_it() -> None:
    """All at once is the same as one stage a layer, bit for bit."""
    settings: dict[str, Any] = {"keep": 0.5, "round_to": 1, "samples": 256}
    together = thin(chain(), Thinet(**settings)).state_dict()
    single = chain()
    for layer in ("0", "2", "4"):
        single = thin(single, Thinet(layers=layer, **settings))
    assert all(torch.equal(value, together[name]) for name, value in single.state_dict().items())


def test_next_layer_is_scaled_and_nothing_else() -> None:
    before, after = chain(), thin(chain(), Thinet(layers="2", keep=0.5, round_to=1))
    old, new = before.state_dict(), after.state_dict()
    columns = [
        next(c for c in range(18) if torch.equal(row, old["2.weight"][c]))
        for row in new["2.weight"]
    ]
    factors = new["4.weight"] / old["4.weight"][:, columns]
    assert torch.allclose(factors, factors[:1].expand_as(factors), rtol=1e-4)
    assert not torch.allclose(factors[0], torch.ones(9), rtol=1e-3)
    for name in ("0.weight", "0.bias", "4.bias", "6.weight", "6.bias"):
        assert torch.equal(new[name], old[name])


def next_layers_error(model: nn.Module, thin_model: nn.Module) -> float:
    """Of layer 4, which uses what layer 2 makes."""
    x = torch.cat([batch.inputs for batch in quiet_task().train])
    with torch.no_grad():
        return float((thin_model[:5](x) - model[:5](x)).square().mean())  # type: ignore[index]


def test_the_next_layer_suffers_less_than_by_the_filters_norm_and_least_with_scales() -> None:
    settings: dict[str, Any] = {"layers": "2", "keep": 0.5, "round_to": 1}
    ours = next_layers_error(chain(), thin(chain(), Thinet(**settings)))
    unscaled = next_layers_error(chain(), thin(chain(), Thinet(scale=False, **settings)))
    assert ours < unscaled
    norms = chain()[2].weight.norm(dim=1)  # type: ignore[index]
    silenced = chain()
    with torch.no_grad():
        silenced[4].weight[:, norms.argsort()[:9]] = 0  # type: ignore[index]
    assert unscaled < next_layers_error(chain(), silenced)


class Fork(nn.Module):
    """One layer whose channels two others use, one of them through a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 4, 3, stride=2, padding=1)
        self.right = nn.Linear(8 * 16, 3)
        self.end = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        pooled = nn.functional.max_pool2d(h, 2).flatten(1)
        out: Tensor = self.right(pooled) + self.end(self.left(h).relu().mean((2, 3)).repeat(1, 4))
        return out


def image_task() -> Task:
    _, batches = make_batches(1, 8, 8, samples=64)
    return Task(batches, batches, batches, nn.functional.cross_entropy, accuracy)


def test_all_users_count_and_each_gets_its_own_factors() -> None:
    torch.manual_seed(0)
    model = Fork()
    with torch.no_grad():  # `right` hears the last four channels only, `left` the first four
        model.right.weight.view(3, 8, 16)[:, :4] = 0
        model.left.weight[:, 4:] = 0
        model.first.weight[2] *= 0.01
        model.first.bias[2] = 0
        model.right.weight.view(3, 8, 16)[:, 6] *= 0.01
    after = thin(model, Thinet(layers="first", keep=0.75, round_to=1), task=image_task())
    kept = [0, 1, 3, 4, 5, 7]
    assert torch.equal(after.first.weight, model.first.weight[kept])
    left = after.left.weight / model.left.weight[:, kept]
    right = after.right.weight.view(3, 6, 16) / model.right.weight.view(3, 8, 16)[:, kept]
    for factors in (left[:, :3].movedim(1, 0), right[:, 3:].movedim(1, 0)):
        rows_of = factors.flatten(1)
        assert torch.allclose(rows_of, rows_of[:, :1].expand_as(rows_of), rtol=1e-3)
        assert not torch.allclose(rows_of, torch.ones_like(rows_of), rtol=1e-3)


def test_channels_that_no_layer_uses_are_ranked_by_norm_and_it_is_said() -> None:
    class Deep(nn.Module):
        """The product of two layers: their channels meet in a sum, not in a layer."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(12, 8), nn.Linear(12, 8)
            self.end = nn.Linear(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.query(x), self.key(x)
            out: Tensor = self.end((q[:, None] @ k[:, :, None])[:, 0])
            return out

    torch.manual_seed(0)
    model = Deep()
    with torch.no_grad():
        for layer in (model.query, model.key):
            layer.weight[::2] *= 0.1
    result = lilliput.compress(model, quiet_task(), [Thinet(keep=0.5, round_to=1)])
    assert torch.equal(result.model.query.weight, model.query.weight[1::2])
    assert "2-norm" in (result.directory / "changes.json").read_text()


def test_scales_reach_masked_and_clustered_weights() -> None:
    """Zeros stay zeros; shared values stay shared."""
    methods = lilliput.methods
    settings: dict[str, Any] = {"layers": ["2"], "keep": 0.5, "round_to": 1}
    for encode in (methods.Magnitude(sparsity=0.5, remove_dead=False), methods.Codebook(bits=3)):
        staged = [encode, Thinet(**settings)]
        model = lilliput.compress(chain(), quiet_task(), staged).model
        plain = lilliput.compress(
            chain(), quiet_task(), [encode, Thinet(scale=False, **settings)]
        ).model
        scaled, unscaled = model[4].weight, plain[4].weight  # type: ignore[index]
        assert not torch.equal(scaled, unscaled)
        if isinstance(encode, methods.Codebook):
            assert set(scaled.unique().tolist()) <= set(unscaled.unique().tolist())
        else:
            assert torch.equal(scaled == 0, unscaled == 0)


def test_scaling_and_folding_exclude_each_other() -> None:
    with pytest.raises(InputError, match="scale"):
        Thinet(keep=0.5, fold="constant")
    assert Thinet(keep=0.5, fold="constant", scale=False).fold == "constant"
