"""Zhang, Xiang, Hospedales, Lu 2018: deep mutual learning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train
from lilliput.core.digests import weights_digest
from lilliput.core.run import Run
from lilliput.core.schedule import Ramp
from lilliput.core.task import accuracy
from lilliput.core.types import Batch
from lilliput.engine.progress import Watcher
from lilliput.errors import Diverged, InputError, LilliputWarning, ModelMismatch
from lilliput.methods import Gradual, Mutual, SoftTargets
from lilliput.methods.distill.mutual import mutual_divergence
from lilliput.testing import NETWORKS

MLP, CNN, TRANSFORMER = NETWORKS
CLASSES, FEATURES, RATE = 4, 5, 0.3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(seed: int) -> nn.Linear:
    layer = nn.Linear(FEATURES, CLASSES, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(random(CLASSES, FEATURES, seed=seed))
    return layer


def batches(count: int = 3, samples: int = 6) -> list[Batch]:
    return [
        Batch(random(samples, FEATURES, seed=n), torch.arange(samples) % CLASSES)
        for n in range(100, 100 + count)
    ]


def task(data: list[Batch]) -> Task:
    return Task(data, data, None, F.cross_entropy, accuracy)


class Peers(Watcher):
    """Keeps the peers' networks of a run."""

    def step_done(self, run: Run) -> None:
        self.networks = [player.network for player in run.players.values()]


def train(method: Any, model: nn.Module, data: list[Batch], **settings: Any) -> list[Tensor]:
    """The weights of all networks after one epoch of plain SGD."""
    watcher = Peers()
    stage = Stage(methods=[method], train=Train(epochs=1, optimizer="sgd", lr=RATE, **settings))
    result = lilliput.compress(model, task(data), [stage], watchers=[watcher])
    return [x.weight.detach().double() for x in (result.model, *watcher.networks)]  # type: ignore[operator, union-attr]


def by_hand(
    weights: list[Tensor],
    data: list[Batch],
    update: Literal["sequential", "simultaneous"],
    average: bool = True,
) -> list[Tensor]:
    """The paper's algorithm on linear models, with the gradients in closed form.

    dL_k/dz = (p_k - y + c * sum_l (p_k - p_l)) / N, with c = 1 / (K - 1) or 1.
    """
    weights = [w.clone() for w in weights]
    share = 1.0 / (len(weights) - 1) if average else 1.0
    for batch in data:
        x, y = batch.inputs, F.one_hot(batch.target, CLASSES).double()
        before = [w.clone() for w in weights]
        for k in range(len(weights)):
            seen = weights if update == "sequential" else before
            p = [torch.softmax(x @ w.T, dim=1) for w in seen]
            towards = sum((p[k] - p[j] for j in range(len(weights)) if j != k), torch.zeros_like(y))
            gradient = (p[k] - y + share * towards).T @ x / len(x)
            weights[k] -= RATE * gradient
    return weights


class TestAlgorithm:
    @pytest.mark.parametrize("update", ["sequential", "simultaneous"])
    @pytest.mark.parametrize("peers", [1, 2, 3])
    @pytest.mark.parametrize("average", [True, False])
    def test_is_the_hand_written_loop(self, update: Any, peers: int, average: bool) -> None:
        networks = [linear(seed) for seed in range(peers + 1)]
        method = Mutual(peers=networks[1:], update=update, average=average)
        found = train(method, networks[0], batches())
        expected = by_hand([n.weight.detach() for n in networks], batches(), update, average)
        assert len(found) == peers + 1
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    def test_both_orders_differ(self) -> None:
        """Else the test above could not tell them apart."""
        weights = [linear(seed).weight.detach() for seed in range(3)]
        one, other = (
            by_hand(weights, batches(), "sequential"),
            by_hand(weights, batches(), "simultaneous"),
        )
        assert (one[1] - other[1]).abs().max() > 1e-2
        assert (one[0] - other[0]).abs().max() > 1e-3, "from the second batch on"

    def test_the_student_moves_first(self) -> None:
        """After one batch it is where the simultaneous form brings it, and only its peers are not."""
        networks = [linear(seed) for seed in range(2)]
        one, other = (
            train(Mutual(peers=networks[1:], update=update), networks[0], batches(count=1))
            for update in ("sequential", "simultaneous")
        )
        assert torch.equal(one[0], other[0])
        assert (one[1] - other[1]).abs().max() > 1e-3

    def test_roles_may_be_exchanged(self) -> None:
        """In the simultaneous form student and peer are symmetric."""
        a, b = linear(0), linear(1)
        first = train(Mutual(peers=[b], update="simultaneous"), a, batches())
        second = train(Mutual(peers=[a], update="simultaneous"), b, batches())
        for one, other in zip(first, reversed(second), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)

    def test_weight_zero_trains_each_alone(self) -> None:
        a, b = linear(0), linear(1)
        found = train(Mutual(peers=[b], weight=0.0), a, batches())
        for network, weight in zip((a, b), found, strict=True):
            stage = Stage(train=Train(epochs=1, optimizer="sgd", lr=RATE))
            alone = lilliput.compress(network, task(batches()), [stage]).model
            torch.testing.assert_close(weight, alone.weight, rtol=1e-7, atol=1e-7)  # type: ignore[arg-type]

    def test_the_weight_may_move(self, tmp_path: Path) -> None:
        stage = Stage(methods=[Mutual(weight=Ramp(start=0.0, end=1.0))], train=Train(epochs=1))
        lilliput.compress(MLP.build(), MLP.task(), [stage], directory=tmp_path)
        found = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
        assert found["weight/mutual"] == pytest.approx((0 + 1 + 2 + 3) / 4 / 4)


class TestDivergence:
    @pytest.mark.parametrize("average", [True, False])
    def test_is_the_definition(self, average: bool) -> None:
        own, others = (
            random(6, 4).log_softmax(1),
            [random(6, 4, seed=s).log_softmax(1) for s in (1, 2)],
        )
        p, total = own.exp(), 0.0
        for other in others:
            q = other.exp()
            total += (
                sum(float(q[n, i] * (q[n, i] / p[n, i]).log()) for n in range(6) for i in range(4))
                / 6
            )
        expected = total / (2 if average else 1)
        assert float(mutual_divergence(own, others, average=average)) == pytest.approx(expected)

    def test_is_zero_among_equals(self) -> None:
        own = random(6, 4).log_softmax(1)
        assert float(mutual_divergence(own, [own, own])) == 0.0

    def test_classes_may_stand_in_another_dim(self) -> None:
        own, other = random(3, 4, 5).log_softmax(1), random(3, 4, 5, seed=1).log_softmax(1)
        last = mutual_divergence(own.movedim(1, -1), [other.movedim(1, -1)])
        torch.testing.assert_close(mutual_divergence(own, [other], class_dim=1), last)


class TestPeers:
    def test_a_number_means_fresh_weights(self) -> None:
        watcher, model = Peers(), CNN.build()
        stage = Stage(methods=[Mutual(peers=2)], train=Train(epochs=1, lr=1e-12))
        lilliput.compress(model, CNN.task(), [stage], watchers=[watcher])
        first, second = (n[0].weight for n in watcher.networks)  # type: ignore[index]
        assert first.shape == second.shape == model[0].weight.shape  # type: ignore[index]
        assert not torch.allclose(first, second, atol=1e-3)
        assert not torch.allclose(first, model[0].weight, atol=1e-3)  # type: ignore[index]

    def test_a_peer_of_a_pruned_student_is_dense(self) -> None:
        watcher = Peers()
        methods = [Gradual(sparsity=0.9), Mutual()]
        stage = Stage(methods=methods, train=Train(epochs=3, lr=0.01))
        result = lilliput.compress(MLP.build(), MLP.task(), [stage], watchers=[watcher])
        (peer,) = watcher.networks
        assert not any("parametrizations" in name for name in peer.state_dict())
        assert int((peer[0].weight == 0).sum()) == 0  # type: ignore[index]
        assert float((result.model[0].weight == 0).float().mean()) > 0.8  # type: ignore[index]

    def test_composes_with_masks_and_soft_targets(self, tmp_path: Path) -> None:
        methods = [Gradual(sparsity=0.8), SoftTargets(), Mutual(peers=2)]
        stage = Stage(methods=methods, train=Train(epochs=2, lr=0.01))
        lilliput.compress(MLP.build(), MLP.task(), [stage], directory=tmp_path)
        found = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
        parts = found["loss/task"] + found["loss/mutual"] + found["loss/soft_targets"]
        assert found["loss"] == pytest.approx(parts, rel=1e-5)

    def test_the_file_has_only_the_student(self) -> None:
        stage = Stage(methods=[Mutual(peers=2)], train=Train(epochs=1))
        result = lilliput.compress(MLP.build(), MLP.task(), [stage])
        assert result.model.state_dict().keys() == MLP.build().state_dict().keys()
        plain = lilliput.compress(MLP.build(), MLP.task(), [Stage(train=Train(epochs=1))])
        sizes = [r.artifact.stat().st_size for r in (result, plain)]
        assert abs(sizes[0] - sizes[1]) < 400, "only the recipe's text differs"

    def test_a_users_module_is_copied(self) -> None:
        peer = MLP.build(1).eval()
        before = weights_digest(peer)
        stage = Stage(methods=[Mutual(peers=[peer])], train=Train(epochs=1, lr=0.01))
        lilliput.compress(MLP.build(), MLP.task(), [stage])
        assert weights_digest(peer) == before
        assert not peer.training

    def test_a_network_of_an_earlier_stage_learns_again(self) -> None:
        """Such networks are found frozen and in eval mode."""
        watcher = Peers()
        stages = [
            Stage(name="first", train=Train(epochs=1, lr=0.01)),
            Stage(
                model=MLP.build(3),
                methods=[Mutual(peers=["first"])],
                train=Train(epochs=2, lr=0.01),
            ),
        ]
        result = lilliput.compress(MLP.build(), MLP.task(), stages, watchers=[watcher])
        (peer,) = watcher.networks
        assert peer.training
        assert all(p.requires_grad for p in peer.parameters())
        assert weights_digest(peer) != weights_digest(result.model)

    def test_batch_statistics_move_once_a_step(self) -> None:
        """To compute p_1 again must not count the batch again."""
        counts: list[list[int]] = []

        class Look(Watcher):
            def step_done(self, run: Run) -> None:
                networks = [run.model, *(p.network for p in run.players.values())]
                counts.append([int(n[1].num_batches_tracked) for n in networks])  # type: ignore[index]
                assert all(n[1].track_running_stats for n in networks)  # type: ignore[index]

        stage = Stage(methods=[Mutual(peers=2)], train=Train(epochs=1))
        lilliput.compress(CNN.build(), CNN.task(), [stage], watchers=[Look()])
        assert counts == [[n, n, n] for n in (1, 2, 3, 4)]

    def test_two_networks_learn_to_agree(self) -> None:
        x = torch.cat([b.inputs for b in MLP.task().validation])

        def distance(weight: float) -> float:
            watcher = Peers()
            stage = Stage(methods=[Mutual(weight=weight)], train=Train(epochs=20, lr=0.01))
            result = lilliput.compress(MLP.build(), MLP.task(), [stage], watchers=[watcher])
            own, other = (n.eval()(x).log_softmax(1) for n in (result.model, *watcher.networks))
            return float(mutual_divergence(own, [other]).detach())

        assert distance(10.0) < 0.3 * distance(0.0)


class TestBadInput:
    def test_other_classes(self) -> None:
        stage = Stage(methods=[Mutual(peers=[nn.Linear(12, 5)])], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match=r"peer 2 have the shape \(32, 5\).*\(32, 3\)"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_other_inputs(self) -> None:
        stage = Stage(methods=[Mutual(peers=[nn.Linear(7, 3)])], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match="cannot take the task's inputs"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_no_peer(self) -> None:
        for nobody in (0, []):
            with pytest.raises(InputError):
                Mutual(peers=nobody)

    def test_twins_are_told(self) -> None:
        stage = Stage(methods=[Mutual(peers=["original"])], train=Train(epochs=1))
        with pytest.raises(LilliputWarning, match=r"1, 2 .* start with the same weights"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LilliputWarning)
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_a_network_that_cannot_start_anew(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.scale = nn.Linear(12, 3), nn.Parameter(torch.ones(3))

            def forward(self, x: Tensor) -> Tensor:
                return self.scale * self.layer(x)  # type: ignore[no-any-return]

        stage = Stage(methods=[Mutual()], train=Train(epochs=1))
        with pytest.raises(
            InputError,
            match=r"^mutual: .* 'the network' \(Scaled\) .*reset_parameters.* list of networks\.$",
        ):
            lilliput.compress(Scaled(), MLP.task(), [stage])

    def test_a_collapsed_peer_is_told(self) -> None:
        peer = MLP.build(1)
        with torch.no_grad():
            peer[5].bias[0] = 2e38  # type: ignore[index]
        stage = Stage(methods=[Mutual(peers=[peer])], train=Train(epochs=1))
        with pytest.raises(Diverged, match=r"loss of 0\.mutual\.peer 2 is inf"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])

    def test_a_dim_that_is_not_there(self) -> None:
        stage = Stage(methods=[Mutual(class_dim=2)], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match="class_dim=2"):
            lilliput.compress(MLP.build(), MLP.task(), [stage])
