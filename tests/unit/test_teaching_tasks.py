"""Tasks for teachers: classes left out, pairs of a good and a poor picture, samples without a label."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lilliput.architectures.mlp import mlp
from lilliput.core.registry import entries, load
from lilliput.core.task import Task
from lilliput.engine.recipes import build_job, validate
from lilliput.errors import InputError, UnknownName
from lilliput.tasks._images import (
    UNLABELED,
    Images,
    average_pooled,
    hold_out,
    labeled_cross_entropy,
    leave_out,
    noisy,
    unlabel,
)
from lilliput.tasks.digits import digits, digits_noisy, digits_privileged

REAL = Path(os.environ.get("LILLIPUT_DATA", "no-data"))
PARTS = ("train", "validation", "test")


def arrays(task: Task, part: str) -> Any:
    """The batches of a part, whose tensors the tests look at."""
    return getattr(task, part)


# Classes that are left out


def test_classes_are_left_out_of_training_only() -> None:
    plain, without = digits(), digits(without=[3, 8])
    kept = ~torch.isin(arrays(plain, "train").target, torch.tensor([3, 8]))
    assert torch.equal(arrays(without, "train").target, arrays(plain, "train").target[kept])
    assert torch.equal(arrays(without, "train").inputs, arrays(plain, "train").inputs[kept])
    for part in ("validation", "test"):
        assert torch.equal(arrays(without, part).target, arrays(plain, part).target)
        assert set(arrays(without, part).target.tolist()) == set(range(10))


def test_the_limit_counts_what_is_left() -> None:
    few = arrays(digits(without=[3], limit=50), "train")
    assert few.samples == 50
    assert 3 not in few.target


def test_hold_out_leaves_classes_out_of_the_same_permutation() -> None:
    labels = torch.arange(60) % 4
    images = Images(torch.arange(60.0), labels)
    train, held = hold_out(images, 20, None)
    fewer, same = hold_out(images, 20, None, without=[1])
    assert torch.equal(fewer.inputs, train.inputs[train.labels != 1])
    assert torch.equal(same.inputs, held.inputs)


def test_leaving_out_refuses() -> None:
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(InputError, match=r"no image has the label 7; the labels are \[0, 1, 2\]"):
        leave_out(torch.arange(3), labels, [7])
    with pytest.raises(InputError, match="leaves nothing to train on"):
        leave_out(torch.arange(3), labels, [0, 1, 2])


# A poor picture and a good one


def test_privileged_digits_are_means_of_their_views() -> None:
    task, plain = digits_privileged(samples=100), digits(limit=100)
    for part in PARTS:
        poor, good = arrays(task, part), arrays(plain, part)
        assert torch.equal(poor.views["privileged"], good.inputs)
        assert torch.equal(poor.target, good.target)
        assert poor.inputs.shape[1:] == (1, 4, 4)
        expected = good.inputs[:, :, 2:4, 6:8].mean((2, 3))  # rows 2 and 3, columns 6 and 7
        torch.testing.assert_close(poor.inputs[:, :, 1, 3], expected)
    assert task.name == "digits in 4x4 pixels"
    assert digits_privileged(side=2).example_inputs().shape == (1, 1, 2, 2)


@pytest.mark.parametrize("side", [0, 3, 16])
def test_sides_that_do_not_divide_are_refused(side: int) -> None:
    with pytest.raises(InputError, match=f"side={side}: give a divisor of the images' 8 pixels"):
        average_pooled(torch.zeros(1, 1, 8, 8), side)


def test_noisy_digits_keep_their_noise_and_their_source() -> None:
    task, plain = digits_noisy(noise=0.4), digits()
    for part in PARTS:
        poor, good = arrays(task, part), arrays(plain, part)
        assert torch.equal(poor.views["source"], good.inputs)
        noise = (poor.inputs - good.inputs) * 0.3760  # back on the scale from black to white
        assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
        assert float(noise.std()) == pytest.approx(0.4, rel=0.02)
        assert torch.equal(poor.inputs, arrays(digits_noisy(noise=0.4), part).inputs)
    added = [arrays(task, part).inputs[:200] - arrays(plain, part).inputs[:200] for part in PARTS]
    assert not torch.allclose(added[0], added[1], atol=0.1), "training and validation share a noise"
    assert not torch.allclose(added[0], added[2], atol=0.1)


def test_views_follow_their_samples_through_shuffling() -> None:
    train = arrays(digits_privileged(samples=64, batch_size=20), "train")
    train.reshuffle(3)
    for batch in train:
        pooled = average_pooled(batch.views["privileged"], 4)
        torch.testing.assert_close(batch.inputs, pooled)


def test_negative_noise_is_refused() -> None:
    with pytest.raises(InputError, match="negative standard deviation"):
        noisy(torch.zeros(1, 1, 2, 2), -0.1, seed=0)


# Samples without a label


def test_only_the_first_samples_keep_their_label() -> None:
    task, whole = digits_privileged(None, labeled=30), digits_privileged(None)
    train, known = arrays(task, "train").target, arrays(whole, "train").target
    assert torch.equal(train[:30], known[:30])
    assert (train[30:] == UNLABELED).all()
    # The same images as the task with so many samples, from which the teacher learns.
    assert torch.equal(arrays(digits(limit=30), "train").target, train[:30])
    assert (arrays(task, "test").target >= 0).all()
    with pytest.raises(InputError, match="labeled=40 of 30"):
        unlabel(Images(torch.zeros(30), torch.zeros(30)), 40)


def test_the_loss_is_that_of_the_labeled_samples() -> None:
    z, y = torch.randn(6, 3), torch.tensor([0, -1, 2, -1, -1, 1])
    known = y >= 0
    torch.testing.assert_close(labeled_cross_entropy(z, y), F.cross_entropy(z[known], y[known]))
    assert float(labeled_cross_entropy(z, torch.full((6,), -1))) == 0.0
    assert digits_privileged(labeled=10).loss is labeled_cross_entropy
    assert digits_privileged().loss is F.cross_entropy


# Jitter


def test_digits_jitter_by_one_pixel_over_black() -> None:
    train = arrays(digits(augment=True, batch_size=64), "train")
    assert train.augmented
    still = train.inputs
    for batch in train:
        for image, number in zip(batch.inputs[:10], batch.index[:10], strict=True):
            padded = F.pad(still[number], (1, 1, 1, 1), value=-0.3053 / 0.3760)
            crops = (padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3))
            assert any(torch.equal(image, crop) for crop in crops)


# In a recipe


def test_a_stages_task_may_have_arguments_beside_its_name() -> None:
    recipe = validate(
        {
            "task": "digits",
            "model": "digits_cnn",
            "stages": [{"task": {"name": "digits", "without": [3]}, "train": {"epochs": 1}}],
        }
    )
    job = build_job(recipe)
    assert 3 in arrays(job.task, "train").target
    assert 3 not in arrays(job.stage_tasks[0], "train").target


# Networks for them


def test_mlp_with_dropout_and_other_activations() -> None:
    names = [n for n, _ in mlp([5, 4], dropout=0.5, input_dropout=0.2).named_children()]
    assert names == [
        *("flatten", "dropout0", "fc1", "relu1", "dropout1", "fc2", "relu2", "dropout2", "fc3"),
    ]
    network = mlp([5], dropout=0.5, input_dropout=0.2)
    assert (network.dropout0.p, network.dropout1.p) == (0.2, 0.5)
    x = torch.rand(7, 784)
    for activation in ("tanh", "sigmoid"):
        network = mlp([5], activation=activation)
        hidden = getattr(torch, activation)(network.fc1(x))
        torch.testing.assert_close(network(x), network.fc2(hidden))


def test_mlp_refuses() -> None:
    with pytest.raises(UnknownName, match="no activation is named 'rleu'"):
        mlp(activation="rleu")
    for wrong in ({"dropout": 1.0}, {"input_dropout": -0.1}):
        with pytest.raises(InputError, match="give a probability"):
            mlp(**wrong)


# MNIST


def test_the_catalog_has_them() -> None:
    known = entries("task")
    for name in ("digits_privileged", "digits_noisy", "mnist_privileged", "mnist_noisy"):
        assert "teacher sees" in known[name].summary
        assert load("task", name).__name__ == name


@pytest.mark.data
@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="needs LILLIPUT_DATA with mnist")
def test_mnist_in_pairs() -> None:
    plain = load("task", "mnist")(limit=500)
    pairs = load("task", "mnist_privileged")(samples=500, labeled=100)
    train = arrays(pairs, "train")
    assert torch.equal(train.views["privileged"], arrays(plain, "train").inputs)
    expected = arrays(plain, "train").inputs[:, :, 4:8, 12:16].mean((2, 3))
    torch.testing.assert_close(train.inputs[:, :, 1, 3], expected)
    assert int((train.target >= 0).sum()) == 100
    under = arrays(load("task", "mnist_noisy")(limit=500, noise=0.5), "train")
    noise = (under.inputs - under.views["source"]) * 0.3081
    assert float(noise.std()) == pytest.approx(0.5, rel=0.01)
    missing = load("task", "mnist")(without=[3])
    assert 3 not in arrays(missing, "train").target
    assert arrays(missing, "train").samples < 55_000 - 5000
    assert 3 in arrays(missing, "validation").target
