"""Furlanello and others 2018: born-again networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Train, compress
from lilliput.core.digests import weights_digest
from lilliput.core.run import Run
from lilliput.core.types import Batch
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, ModelMismatch
from lilliput.mechanisms.encodings import describe
from lilliput.mechanisms.initializing import draw_fresh_weights
from lilliput.methods import BornAgain, Codebook, FilterL1, Magnitude, SoftTargets
from lilliput.methods.distill.born_again import confidence_weighted_loss, permuted
from lilliput.testing.networks import NETWORKS, TinyNetwork

MLP, CNN, _ = NETWORKS
TRAIN = Train(epochs=2, lr=0.01)
NOTHING = Train(epochs=1, lr=1e-12, optimizer="sgd")


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


class Look(Watcher):
    """Notes the run's network and the teacher's at the first step of each stage."""

    def __init__(self) -> None:
        self.teachers: list[list[str]] = []
        self.starts: list[dict[str, Tensor]] = []

    def step_done(self, run: Run) -> None:
        if run.step == 1:
            lives = [v for k, v in run.shared.items() if k[0] == "teacher"]
            self.teachers.append([weights_digest(n) for live in lives for n in live.networks])
            self.starts.append({n: t.clone() for n, t in run.model.state_dict().items()})


# -- The losses -----------------------------------------------------------------------------------


def value_of(method: BornAgain, student: Tensor, teacher: nn.Module, target: Tensor) -> Tensor:
    """The method's term for given logits; the teacher answers ``inputs`` as they are."""
    run = Run(nn.Linear(1, 1), MLP.task(), earlier={"previous": lambda: teacher}, methods=[method])
    method.attach(run)
    run.batch, run.output = Batch(logits(6, 4, seed=1), target), student
    term = method.loss(run)["born_again"]
    return term.value * term.weight


def test_soft_targets_are_the_cross_entropy_with_the_earlier_generation() -> None:
    """At temperature 1: the gradient is q - p, the mean over the samples."""
    student = logits(6, 4).requires_grad_(True)
    method = BornAgain(reset=False)
    value_of(method, student, nn.Identity(), torch.zeros(6).long()).backward()
    q, p = student.detach().softmax(1), logits(6, 4, seed=1).softmax(1)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (q - p) / 6)


def test_confidence_weighs_the_labels() -> None:
    """By hand: sum_s w_s (-log q_{s, y_s}), w_s = max p_s / sum_u max p_u; the weights sum to 1."""
    student, teacher, labels = logits(6, 4), logits(6, 4, seed=1), torch.tensor([0, 1, 2, 3, 0, 1])
    p, q = teacher.softmax(1), student.softmax(1)
    total = sum(float(p[u].max()) for u in range(6))
    expected = sum(-float(p[s].max()) / total * float(q[s, labels[s]].log()) for s in range(6))
    assert float(confidence_weighted_loss(student, p.log(), labels)) == pytest.approx(expected)
    method = BornAgain(reset=False, targets="confidence", soft_weight=0.5)
    value = value_of(method, student, nn.Identity(), labels)
    assert float(value) == pytest.approx(0.5 * expected)


def test_an_equally_sure_teacher_leaves_the_plain_mean() -> None:
    student, labels = logits(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    even = torch.zeros(6, 4).double().log_softmax(1)
    value = confidence_weighted_loss(student, even, labels)
    torch.testing.assert_close(value, F.cross_entropy(student, labels))


def test_permuted_keeps_the_largest_and_deals_out_the_others_evenly() -> None:
    """Each of the other values comes to each of the other places equally often."""
    p = torch.tensor([0.1, 0.6, 0.05, 0.25]).log()
    draws = 6000
    q = permuted(p.expand(draws, 4).contiguous(), torch.Generator().manual_seed(0))
    assert torch.equal(q[:, 1], p[1].expand(draws))
    assert torch.equal(q.sort(1).values, p.sort().values.expand(draws, 4))
    for value in (0, 2, 3):
        for place in (0, 2, 3):
            share = float((q[:, place] == p[value]).float().mean())
            assert share == pytest.approx(1 / 3, abs=0.03)
    orders = {tuple(row) for row in q.tolist()}
    assert len(orders) == 6, "all orders of three values"


def test_permuted_differs_from_sample_to_sample_and_step_to_step() -> None:
    method = BornAgain(reset=False, targets="permuted")
    values = []
    run = Run(nn.Linear(1, 1), MLP.task(), earlier={"previous": nn.Identity}, methods=[method])
    method.attach(run)
    for step in (0, 0, 1):
        run.step, run.batch, run.output = step, Batch(logits(6, 4, seed=1), None), logits(6, 4)
        values.append(float(method.loss(run)["born_again"].value))
    assert values[0] == values[1] != values[2]


def test_confidence_needs_class_numbers() -> None:
    method = BornAgain(reset=False, targets="confidence")
    with pytest.raises(ModelMismatch, match="needs a class number"):
        value_of(method, logits(6, 4), nn.Identity(), torch.zeros(6, 4))


# -- Fresh weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_fresh_weights_follow_from_the_seed_and_forget_what_was_learned(
    network: TinyNetwork,
) -> None:
    trained, other = network.build(1), network.build(2)
    for model in (trained, other):
        for tensor in model.state_dict().values():
            tensor.add_(1)
        draw_fresh_weights(model, seed=5)
    assert weights_digest(trained) == weights_digest(other)
    draw_fresh_weights(other, seed=6)
    assert weights_digest(trained) != weights_digest(other)
    fresh = network.build(3).state_dict()
    for name, tensor in trained.state_dict().items():
        spread = [float(t.double().std(correction=0)) for t in (tensor, fresh[name])]
        if (
            tensor.numel() > 60 or not spread[1]
        ):  # constants, such as attention's biases, are constants again
            assert spread[0] == pytest.approx(spread[1], rel=0.3), name


def test_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw_fresh_weights(MLP.build(), seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_registered_architecture_is_drawn_as_it_is_built() -> None:
    """LeNet's biases begin at zero, which a linear layer's own reset does not do."""
    model = lilliput.build("lenet_300_100")
    draw_fresh_weights(model, seed=1)
    assert not model.fc1.bias.any()  # type: ignore[union-attr,operator]
    assert model.fc1.weight.abs().max() <= (3 / 784) ** 0.5  # type: ignore[union-attr,operator]


def test_a_network_that_was_thinned_stays_thin() -> None:
    """Built anew or reset, it has the shapes that the cut left."""
    stages = [
        Stage(methods=[FilterL1(keep=0.5, round_to=2)], train=NOTHING),
        Stage(methods=[BornAgain()], train=NOTHING),
    ]
    first, second = compress(CNN.build(), CNN.task(), stages).figures["stages"]
    assert first["parameters"] == second["parameters"]
    task = lilliput.Task(
        *[[(torch.randn(4, 1, 8, 8), torch.arange(4))]] * 3, F.cross_entropy, lilliput.accuracy
    )
    model = compress(lilliput.build("digits_cnn", classes=4), task, stages).model
    assert model.conv1.weight.shape[0] == 8  # type: ignore[union-attr,operator]


def test_parameters_that_cannot_be_drawn_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with pytest.raises(InputError, match=r"'1' \(Odd\).*no reset_parameters"):
        draw_fresh_weights(nn.Sequential(nn.Linear(3, 3), Odd()), seed=0)


def test_masks_of_an_earlier_stage_come_off() -> None:
    stages = [
        Stage(methods=[Magnitude(sparsity=0.5), Codebook(bits=3)], train=NOTHING),
        Stage(methods=[BornAgain()], train=TRAIN),
    ]
    result = compress(MLP.build(), MLP.task(), stages)
    first, second = result.figures["stages"]
    assert second["nonzeros"] > 1.8 * first["nonzeros"]
    assert describe(result.model) == {}
    told = json.loads((result.directory / "changes.json").read_text())[1]
    assert told[0]["note"] == "encodings taken off: 0.weight, 3.weight, 5.weight"


def test_masks_of_this_stage_are_refused() -> None:
    methods = [Magnitude(sparsity=0.5), BornAgain()]
    with pytest.raises(InputError, match=r"encoded already \(mask\).*List born_again before"):
        compress(MLP.build(), MLP.task(), [Stage(methods=methods, train=TRAIN)])
    result = compress(MLP.build(), MLP.task(), [Stage(methods=methods[::-1], train=TRAIN)])
    assert result.figures["nonzeros"] < 0.7 * result.figures["parameters"]


# -- Generations ----------------------------------------------------------------------------------


def generations() -> list[Stage]:
    return [
        Stage(name="generation 0", train=TRAIN),
        Stage(name="generation 1", methods=[BornAgain()], train=TRAIN),
        Stage(name="generation 2", methods=[BornAgain()], train=TRAIN),
    ]


def test_each_generation_starts_anew_and_learns_from_the_one_before(tmp_path: Path) -> None:
    look = Look()
    compress(MLP.build(), MLP.task(), generations(), directory=tmp_path / "run", watchers=[look])
    ends = []
    for number in range(2):
        alone = compress(MLP.build(), MLP.task(), generations()[: number + 1])
        ends.append(weights_digest(alone.model))
    assert look.teachers == [[], [ends[0]], [ends[1]]]
    first, second = (start["0.weight"] for start in look.starts[1:])
    assert (first - second).abs().max() > 0.1, "other weights in each generation"


def test_the_ensemble_of_generations_teaches() -> None:
    """By the list of their names: probabilities are averaged over the very networks of these stages."""
    look, stages = Look(), generations()
    names = [stage.name for stage in stages]
    last = Stage(
        methods=[SoftTargets(teacher=names, temperature=1, soft_weight=1, hard_weight=0)],
        train=NOTHING,
    )
    result = compress(MLP.build(), MLP.task(), [*stages, last], watchers=[look])
    ends = [compress(MLP.build(), MLP.task(), stages[:n]).model for n in (1, 2, 3)]
    assert look.teachers[-1] == [weights_digest(model) for model in ends]
    # The student hardly moves, so the logged loss is that of generation 2 against the mean of all.
    x = torch.cat([batch.inputs for batch in MLP.task().train])
    with torch.no_grad():
        mean = torch.stack([model.eval()(x).softmax(1) for model in ends]).mean(0)
    line = json.loads((result.directory / "metrics.jsonl").read_text().splitlines()[-1])
    own = ends[-1].train()
    torch.manual_seed(0)
    with torch.no_grad():
        runs = [
            float(F.kl_div(own(x).log_softmax(1), mean, reduction="batchmean")) for _ in range(200)
        ]
    assert line["loss"] == pytest.approx(sum(runs) / len(runs), rel=0.25)  # dropout is random


def test_from_the_teacher_alone_no_label_is_needed() -> None:
    def no_loss(output: Any, target: Any) -> Tensor:
        raise AssertionError("the labels were asked for")

    task = MLP.task()
    task.loss = no_loss
    stage = Stage(methods=[BornAgain(hard_weight=0.0)], train=TRAIN)
    result = compress(MLP.build(), task, [stage])
    assert result.figures["score"] > 0


def test_the_next_generation_reaches_the_first() -> None:
    """It begins with nothing, and learns what the earlier one knows."""
    train = Train(epochs=30, lr=0.01)
    stages = [Stage(train=train), Stage(methods=[BornAgain(hard_weight=0.0)], train=train)]
    first, second = compress(MLP.build(), MLP.task(), stages).figures["stages"]
    assert second["score"] > first["score"] - 8
    assert first["score"] > 75
