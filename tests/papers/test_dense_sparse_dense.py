"""Han et al. 2017: dense-sparse-dense training."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

import lilliput
from lilliput import Stage, Train
from lilliput.core.run import Run
from lilliput.core.select import select
from lilliput.engine.progress import Watcher
from lilliput.methods import DenseSparseDense, Magnitude
from lilliput.testing import NETWORKS

MLP, *_ = NETWORKS
TRAIN = Train(epochs=3, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=1e-2)


@dataclass
class Weights(Watcher):
    """The weights of all layers after every step of every stage, and their gradients."""

    seen: dict[int, list[list[Tensor]]] = field(default_factory=dict)
    gradients: dict[int, list[list[Tensor | None]]] = field(default_factory=dict)

    def step_done(self, run: Run) -> None:
        chosen = select(run.model)
        self.seen.setdefault(run.stage, []).append([w.value.detach().clone() for w in chosen])
        self.gradients.setdefault(run.stage, []).append(
            [w.value.grad if w.value.is_leaf else None for w in chosen]
        )


def three(sparsity: float = 0.3) -> tuple[Weights, lilliput.engine.outcome.Result]:
    watcher = Weights()
    stages = [Stage(train=TRAIN), Stage(methods=[DenseSparseDense(sparsity=sparsity)], train=TRAIN),
              Stage(train=TRAIN.model_copy(update={"lr": 0.005}))]  # fmt: skip
    return watcher, lilliput.compress(MLP.build(), MLP.task(), stages, watchers=[watcher])


def test_exactly_so_many_zeros_and_always_the_same_in_the_sparse_stage() -> None:
    """The mask is chosen from the trained weights and is fixed, momentum and weight decay or not."""
    watcher, _ = three()
    trained = watcher.seen[0][-1]
    for layer, dense in enumerate(trained):
        count = round(0.3 * dense.numel())
        smallest = dense.abs().flatten().argsort()[:count]
        for weights in watcher.seen[1]:
            zero = (weights[layer] == 0).flatten()
            assert int(zero.sum()) == count
            assert zero[smallest].all()


def test_pruned_weights_start_from_zero_and_all_learn() -> None:
    watcher, result = three()
    for layer, sparse in enumerate(watcher.seen[1][-1]):
        gone = sparse == 0
        first = watcher.seen[2][0][layer]
        # One step of SGD at a learning rate of 0.005 away from zero, and no further.
        gradient = watcher.gradients[2][0][layer]
        assert gradient is not None
        assert (gradient[gone] != 0).float().mean() > 0.5
        assert first[gone].abs().max() < 0.05
        assert watcher.seen[2][-1][layer].count_nonzero() > 0.85 * gone.numel()
    assert not any(w.encodings() for w in select(result.model))


def test_what_an_earlier_stage_has_pruned_stays_pruned() -> None:
    stages = [
        Stage(methods=[Magnitude(sparsity=0.5, remove_dead=False)], train=TRAIN),
        Stage(methods=[DenseSparseDense(sparsity=0.7)], train=TRAIN),
        Stage(train=TRAIN),
    ]
    watcher = Weights()
    model = lilliput.compress(MLP.build(), MLP.task(), stages, watchers=[watcher]).model
    for layer, weight in enumerate(select(model)):
        first = watcher.seen[0][-1][layer] == 0
        assert int((watcher.seen[1][-1][layer] == 0).sum()) == round(0.7 * first.numel())
        assert (weight.value[first] == 0).all()
        assert first.sum() <= (weight.value == 0).sum() < (watcher.seen[1][-1][layer] == 0).sum()
