"""Methods that learn from features work together, with encodings, in copies and in anyone's loop."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Train, artifact, compress
from lilliput.core.digests import weights_digest
from lilliput.core.method import Method
from lilliput.core.run import Run
from lilliput.engine.progress import Watcher
from lilliput.mechanisms.teacher import Live
from lilliput.methods import (
    Attention,
    Codebook,
    Fsp,
    GradientAttention,
    Gradual,
    NeuronSelection,
    SoftTargets,
)
from lilliput.testing import NETWORKS

CNN = NETWORKS[1]
FEATURES: list[Method] = [
    Fsp(pairs=["2", "5"], flows=[("2", "5")], weight=0.03, hard_weight=1.0),
    Attention(pairs=["2", "5"], beta=4.0),
    NeuronSelection(pairs=["8"], count=12, weight=0.1, hard_weight=1.0),
]
ALL: list[Method] = [
    *FEATURES,
    SoftTargets(temperature=2.0),
    Gradual(sparsity=0.5),
    Codebook(bits=4),
]


def convolutional(seed: int) -> nn.Sequential:
    """The contract's network without dropout, so that losses can be compared."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Identity(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


def trained_teacher() -> nn.Module:
    return compress(convolutional(0), CNN.task(), [Stage(train=Train(epochs=10, lr=0.01))]).model


class Teachers(Watcher):
    """Keeps the teachers' bits as they were at the first step, and looks whether they still are."""

    def __init__(self) -> None:
        self.first: dict[int, str] = {}
        self.looked = 0

    def step_done(self, run: Run) -> None:
        for source in run.shared.values():
            assert isinstance(source, Live)
            for network in source.networks:
                digest = weights_digest(network)
                assert self.first.setdefault(id(network), digest) == digest
                assert not network.training
                assert all(p.grad is None for p in network.parameters())
                self.looked += 1


@pytest.mark.parametrize("order", [1, -1])
def test_all_in_one_stage_reduce_the_loss(tmp_path: Path, order: int) -> None:
    """Three kinds of features, soft targets, a hard mask and a codebook."""
    teachers, teacher = Teachers(), trained_teacher()
    before = weights_digest(teacher)
    stage = Stage(model=convolutional(1), methods=ALL[::order], train=Train(epochs=20, lr=0.02))
    result = compress(teacher, CNN.task(), [stage], directory=tmp_path, watchers=[teachers])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = ("fsp", "attention", "neuron_selection", "soft_targets", "task")
    for name in names:
        assert lines[-1][f"loss/{name}"] < 0.95 * lines[0][f"loss/{name}"], name
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    # One teacher for all, which ran along and stayed what it was.
    assert len(teachers.first) == 1 and teachers.looked == 80
    assert weights_digest(teacher) == before
    weight: Tensor = result.model[3].weight  # type: ignore[index,assignment]
    assert (weight == 0).float().mean() >= 0.5 and len(weight.unique()) <= 16
    assert set(artifact.read(result.artifact)) == set(convolutional(1).state_dict())


def test_adapters_train_and_stay_behind(tmp_path: Path) -> None:
    adapters: dict[str, list[Tensor]] = {}

    class Look(Watcher):
        def step_done(self, run: Run) -> None:
            for name, module in run.extras.items():
                bits = [p.detach().clone() for p in module.parameters()]
                adapters.setdefault(name, bits)
                if run.step == 8:
                    assert not any(map(torch.equal, adapters[name], bits))

    stage = Stage(methods=[NeuronSelection(pairs=["8"], count=5)], train=Train(epochs=2, lr=0.01))
    result = compress(convolutional(0), CNN.task(), [stage], directory=tmp_path, watchers=[Look()])
    assert [len(bits) for bits in adapters.values()] == [2]
    assert set(artifact.read(result.artifact)) == set(convolutional(0).state_dict())
    lilliput.load(result.artifact, model=convolutional(5))


class Copying(Watcher):
    """Copies the student in the middle of a step's life, and trains and runs the copies."""

    def __init__(self, *, pickled: bool) -> None:
        self.pickled, self.copied = pickled, 0

    def step_done(self, run: Run) -> None:
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        copies = [copy.deepcopy(run.model)]
        if self.pickled:
            file = io.BytesIO()
            torch.save(run.model, file)
            file.seek(0)
            copies.append(torch.load(file, weights_only=False))
        before = weights_digest(run.model)
        modes = [m.training for m in run.model.modules()]
        for other in copies:
            other.eval()(x).sum().backward()
            with torch.no_grad():
                for p in other.parameters():
                    p.add_(1.0)
            self.copied += 1
        assert weights_digest(run.model) == before
        assert [m.training for m in run.model.modules()] == modes


@pytest.mark.parametrize("pickled", [False, True])
def test_copies_of_an_attached_student_disturb_nothing(tmp_path: Path, pickled: bool) -> None:
    """Whether copies were made cannot be seen in the run. (Encodings cannot be pickled, in torch.)"""
    methods = [*FEATURES, GradientAttention()] if pickled else [*ALL, GradientAttention()]
    stage = Stage(methods=methods, train=Train(epochs=2, lr=0.01))
    copying = Copying(pickled=pickled)
    digests = [
        weights_digest(compress(convolutional(0), CNN.task(), [stage], watchers=watchers).model)
        for watchers in ([], [copying])
    ]
    assert digests[0] == digests[1]
    assert copying.copied == (16 if pickled else 8)


def run_loop(methods: list[Method], teacher: nn.Module, **settings: Any) -> list[float]:
    """Sixteen steps of a training loop as anyone writes it; the loss of each."""
    net = convolutional(1)
    named = [m.model_copy(update={"teacher": teacher}) for m in methods]
    attached = lilliput.attach(net, *named, steps=16, **settings)
    optimizer = torch.optim.Adam(attached.parameters(), lr=0.01)
    losses = []
    for batch in [b for _ in range(4) for b in CNN.task().validation]:
        attached.batch(batch.inputs, batch.target)
        output = net(batch.inputs)
        loss = attached.loss(F.cross_entropy(output, batch.target), output)
        optimizer.zero_grad()
        loss.backward()
        attached.after_backward()
        optimizer.step()
        attached.after_step()
        losses.append(float(loss.detach()))
    attached.finish()
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in net.modules()]
    assert not any(hooks), "nothing is left on the network"
    return losses


@pytest.mark.parametrize("method", [*FEATURES, GradientAttention()], ids=lambda m: m.method_name())
def test_one_in_a_loop_of_ones_own(method: Method) -> None:
    losses = run_loop([method], trained_teacher(), task=CNN.task())
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_several_in_a_loop_of_ones_own() -> None:
    example = torch.randn(2, 1, 8, 8)
    few = [FEATURES[0], FEATURES[1], SoftTargets()]
    losses = run_loop(few, trained_teacher(), example_inputs=example)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
