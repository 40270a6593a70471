"""Han, Mao, Dally 2016: Deep Compression's trained quantization."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError
from lilliput.mechanisms.encodings import Codebook as Shared
from lilliput.mechanisms.encodings import encode, encoding_of, original_of
from lilliput.methods import Codebook, Magnitude
from lilliput.testing import NETWORKS

MLP, CNN, TRANSFORMER = NETWORKS
INITS = ("linear", "density", "random", "exact")


@dataclass
class Codes(Watcher):
    """The values and the codes of every layer, after every step."""

    values: list[dict[str, Tensor]] = field(default_factory=list)
    codes: list[dict[str, Tensor]] = field(default_factory=list)

    def step_done(self, run: Run) -> None:
        found = list(select(run.model))
        self.values.append({w.name: w.value.detach().clone() for w in found})
        books = {w.name: encoding_of(w, Shared) for w in found}
        self.codes.append({n: b.codes.clone() for n, b in books.items() if b is not None})


def cluster(value: Tensor, bits: int, init: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and centroids of a weight, as the method fits them."""
    book = Shared.fitted(value, bits, init, seed=seed)
    return book.codes.long(), book.right_inverse(value).detach().clone()


def distinct_nonzeros(value: Tensor) -> int:
    return len(value[value != 0].unique())


def within_clusters(points: Tensor, cuts: tuple[int, ...]) -> float:
    """Sum of squared distances to the means of consecutive runs of sorted points."""
    bounds = [0, *cuts, len(points)]
    parts = [points[a:b] for a, b in pairwise(bounds)]
    return sum(float(((p - p.mean()) ** 2).sum()) for p in parts)


def test_exact_clustering_is_the_best_of_all_partitions() -> None:
    """Optimal clusters on a line are runs of the sorted values: try all of them."""
    values = torch.randn(14, generator=torch.Generator().manual_seed(1)).double()
    codes, centroids = cluster(values.float(), 2, "exact")
    error = float(((centroids[codes - 1].double() - values.float().double()) ** 2).sum())
    ordered = values.float().double().sort().values
    best = min(within_clusters(ordered, cuts) for cuts in combinations(range(1, 14), 3))
    assert error == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("init", INITS)
def test_every_weight_has_its_nearest_centroid_and_every_centroid_the_mean(init: str) -> None:
    values = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    codes, centroids = cluster(values, 4, init, seed=3)
    assert len(centroids) <= 16
    nearest = (values.flatten()[:, None] - centroids).abs().min(1).values
    assert torch.allclose((centroids[codes - 1] - values).abs().flatten(), nearest, atol=1e-6)
    for number, centroid in enumerate(centroids.tolist(), start=1):
        assert values[codes == number].mean().item() == pytest.approx(centroid, abs=1e-5)


def test_zero_has_a_code_of_its_own() -> None:
    """One of the 2**bits codes is the zero's, and clustering looks at the non-zeros only."""
    values = torch.randn(50, 20, generator=torch.Generator().manual_seed(4))
    values[values.abs() < 0.5] = 0
    codes, centroids = cluster(values, 3, "exact")
    assert torch.equal(codes == 0, values == 0)
    assert len(centroids) == 7
    assert centroids.abs().min() > 0.3, "no centroid is wasted on the zeros"
    dense, full = cluster(values + 10, 3, "exact")
    assert (dense != 0).all()
    assert len(full) == 8


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("zeros", [False, True])
def test_centroid_gradient_is_the_sum_of_its_members(init: str, zeros: bool) -> None:
    """Equation 3, against autograd on a dense weight of the same values."""
    torch.manual_seed(5)
    layer = nn.Linear(9, 7, bias=False)
    if zeros:
        with torch.no_grad():
            layer.weight[layer.weight.abs() < 0.1] = 0
    (weight,) = select(layer)
    codes, centroids = cluster(weight.value, 2, init)
    encode(weight, Shared(codes, centroids))
    x, y = torch.randn(20, 9), torch.randn(20, 7)
    dense = weight.value.detach().clone().requires_grad_(True)
    ((x @ dense.T - y) ** 2).sum().backward()
    ((layer(x) - y) ** 2).sum().backward()
    assert dense.grad is not None
    expected = torch.stack([dense.grad[codes == k].sum() for k in range(1, len(centroids) + 1)])
    torch.testing.assert_close(original_of(weight).grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_training_keeps_assignments_values_and_zeros(bits: int) -> None:
    watcher = Codes()
    train = Train(epochs=5, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=1e-2)
    stages = [
        Stage(methods=[Magnitude(sparsity=0.6)]),
        Stage(methods=[Codebook(bits=bits)], train=train),
    ]
    lilliput.compress(CNN.build(), CNN.task(), stages, watchers=[watcher])
    assert len(watcher.values) == 20
    for values, codes in zip(watcher.values, watcher.codes, strict=True):
        for name, value in values.items():
            assert torch.equal(codes[name], watcher.codes[0][name]), "the assignment is frozen"
            assert distinct_nonzeros(value) <= 2**bits - 1
            assert bool((value[codes[name] == 0] == 0).all())
            assert int((codes[name] == 0).sum()) >= round(0.6 * value.numel())
    assert not torch.equal(watcher.values[0]["0.weight"], watcher.values[-1]["0.weight"])


def test_equal_values_move_together() -> None:
    """One step of plain SGD moves a centroid by the rate times the members' summed gradients."""
    model, lr = MLP.build().eval(), 0.1
    run = Run(model, MLP.task(), methods=[method := Codebook(bits=2)])
    method.attach(run)
    x, y = MLP.task().example_inputs(), torch.tensor([1])
    weight = select(model)[0]
    book, centroids = encoding_of(weight, Shared), original_of(weight)
    assert book is not None
    dense = weight.value.detach().clone().requires_grad_(True)
    hidden = nn.functional.linear(x, dense, model[0].bias)  # type: ignore[index]
    nn.functional.cross_entropy(model[1:](hidden), y).backward()  # type: ignore[index]
    before = centroids.detach().clone()
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    torch.optim.SGD([centroids], lr=lr).step()
    assert dense.grad is not None
    summed = torch.zeros_like(before).index_add(
        0, book.codes.flatten().long() - 1, dense.grad.flatten()
    )
    torch.testing.assert_close(centroids.detach(), before - lr * summed)


def test_bits_by_layer_pattern() -> None:
    method = Codebook(bits={"0": 2, "3": 4})
    result = lilliput.compress(MLP.build(), MLP.task(), [method])
    first, second, third = (w.value for w in select(result.model))
    assert len(first.unique()) == 4
    assert len(second.unique()) == 16
    assert torch.equal(third, select(MLP.build())[2].value), (
        "a layer without bits keeps its weights"
    )


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_more_bits_come_nearer(network: lilliput.testing.TinyNetwork) -> None:
    dense = {w.name: w.value.detach() for w in select(network.build())}
    errors = []
    for bits in (1, 2, 4, 6):
        model = network.build()
        run = Run(model, network.task(), methods=[method := Codebook(bits=bits)])
        method.attach(run)
        errors.append(
            sum(float((w.value.detach() - dense[w.name]).square().sum()) for w in select(model))
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100


def test_few_values_are_kept_as_they_are() -> None:
    """A layer with fewer values than codes loses nothing."""
    values = torch.tensor([[0.0, 0.5, -0.25], [0.5, 0.5, 0.0]])
    codes, centroids = cluster(values, 5, "exact")
    table = torch.cat([torch.zeros(1), centroids])
    assert torch.equal(table[codes], values)


def test_a_layer_of_zeros_is_refused() -> None:
    model = MLP.build()
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[index]
    with pytest.raises(InputError, match=r"all weights of 0\.weight are zero"):
        lilliput.compress(model, MLP.task(), [Codebook()])


def test_distinct_values_are_told() -> None:
    result = lilliput.compress(MLP.build(), MLP.task(), [Codebook(bits=3)])
    told = (result.directory / "changes.json").read_text()
    assert '"distinct values"' in told
    assert '"after": 8' in told
