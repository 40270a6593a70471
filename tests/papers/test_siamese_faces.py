"""Grundström 2016: transfer, compress, go on as a Siamese network; Hadsell 2006; error rates by counting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lilliput.core.task import evaluate
from lilliput.errors import DataNotFound, InputError, UnknownName
from lilliput.tasks import _faces
from lilliput.tasks._verification import (
    Verification,
    contrastive_loss,
    distances,
    equal_error_rate,
    verification_accuracy,
)
from lilliput.tasks.face_pairs import draw_pairs, face_pairs


def drawn(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances of strangers are larger, on the whole; some are equal."""
    generator = torch.Generator().manual_seed(seed)
    same = (torch.arange(count) % 3 == 0).long()
    return (torch.randn(count, generator=generator) - same).mul(8).round(), same


def test_the_loss_is_the_papers() -> None:
    """Friends pay half their squared distance, strangers half the square of what is missing to the margin."""
    torch.manual_seed(0)
    output, same = torch.randn(12, 5, requires_grad=True), torch.tensor([1, 0, 1, 0, 0, 1])
    terms = []
    for k, y in enumerate(same.tolist()):
        d = (output[2 * k] - output[2 * k + 1]).norm()
        terms.append(0.5 * d**2 if y else 0.5 * max(0.0, 3.0 - d) ** 2)
    loss = contrastive_loss(output, same, margin=3.0)
    torch.testing.assert_close(loss, sum(terms) / 6)
    flipped = output.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    assert torch.equal(distances(flipped), distances(output))


def test_equal_pictures_have_a_gradient() -> None:
    """The distance's own slope at zero is undefined; of its square it is zero."""
    output = torch.zeros(4, 3, requires_grad=True)
    contrastive_loss(output, torch.tensor([1, 0])).backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_error_rates_meet(seed: int) -> None:
    """By brute force: between two neighboring thresholds one rate passes the other."""
    d, same = drawn(61, seed)
    rates = [
        (float((d[same == 0] <= t).float().mean()), float((d[same == 1] > t).float().mean()))
        for t in [-torch.inf, *d.unique().tolist()]
    ]
    low = max(min(pair) for pair in rates)
    high = min(max(pair) for pair in rates)
    assert 100 * low - 1e-4 <= equal_error_rate(d, same) <= 100 * high + 1e-4


def test_known_error_rates() -> None:
    same = torch.tensor([1, 1, 0, 0])
    assert equal_error_rate(torch.tensor([0.0, 1.0, 2.0, 3.0]), same) == 0.0
    assert equal_error_rate(torch.tensor([2.0, 3.0, 0.0, 1.0]), same) == 100.0
    assert equal_error_rate(torch.ones(4), same) == 50.0  # nothing is told
    with pytest.raises(InputError, match="of 2 pairs all are strangers"):
        equal_error_rate(torch.ones(2), torch.zeros(2))


def test_no_pair_chooses_its_own_threshold() -> None:
    """Random distances are told right half of the time; a threshold of their own would do better."""
    generator = torch.Generator().manual_seed(0)
    found = [
        verification_accuracy(torch.rand(40, generator=generator), torch.arange(40) // 2 % 2)
        for _ in range(60)
    ]
    assert abs(np.mean(found) - 50) < 3
    assert verification_accuracy(torch.arange(40.0), (torch.arange(40) < 20).long()) >= 95


def test_pairs_are_of_strangers_and_balanced() -> None:
    task = face_pairs(batch_size=32)
    for batches in (task.train, task.validation, task.test):
        target = torch.cat([batch.target for batch in batches])
        assert target.float().mean() == 0.5
    first: Any = next(iter(task.train))
    other: Any = next(iter(face_pairs(batch_size=32).train))
    assert torch.equal(first.inputs, other.inputs)
    persons = [set(part.labels.tolist()) for part in _split_parts()]
    assert [len(part) for part in persons] == [36, 12, 12]
    assert not persons[0] & persons[1] and not persons[1] & persons[2]


def _split_parts() -> Any:
    from lilliput.tasks.face_pairs import _split

    return _split(_faces.faces("drawn", None, 8, 1), 0.2)


def test_a_pair_is_what_its_target_says() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    pairs, same = draw_pairs(labels, 3, seed=1)
    assert len(pairs) == 2 * 3 * 7
    assert torch.equal((labels[pairs[:, 0]] == labels[pairs[:, 1]]).long(), same)
    assert (pairs[:, 0] != pairs[:, 1]).all()


def test_every_partner_is_as_likely() -> None:
    labels = torch.tensor([2, 0, 0, 1, 0, 1, 2])  # persons lie in no order
    pairs, same = draw_pairs(labels, 3000, seed=1)
    for alike in (1, 0):
        counts = torch.zeros(7, 7)
        counts.index_put_(tuple(pairs[same == alike].T), torch.ones(1), accumulate=True)
        possible = (labels[:, None] == labels) == bool(alike)
        possible &= ~torch.eye(7, dtype=torch.bool)
        expected = 3000 * possible / possible.sum(1, keepdim=True)
        assert (counts[~possible] == 0).all()
        assert ((counts - expected)[possible].abs() < 5 * expected[possible].sqrt()).all()


def test_persons_are_named_and_scored_on_pairs() -> None:
    task = face_pairs(learn="persons", batch_size=16)
    batch: Any = next(iter(task.train))
    assert batch.inputs.shape == (16, 1, 28, 28)
    net = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 36))
    task.loss(net(batch.inputs), batch.target).backward()
    assert 30 < evaluate(net, task.validation, task.score) <= 100


def test_drawn_faces_are_told_by_their_pixels_better_than_by_chance() -> None:
    task = face_pairs(measure="equal_error_rate")
    assert 55 < evaluate(nn.Flatten(), task.train, task.score) < 95


def write(folder: Path, persons: int, pictures: int) -> None:
    pillow = pytest.importorskip("PIL.Image")
    inputs, labels = _faces.drawn_faces(20, persons, pictures)
    for number, (picture, person) in enumerate(zip(inputs, labels.tolist(), strict=True)):
        (folder / f"person {person}").mkdir(exist_ok=True, parents=True)
        pixels = (255 * picture[0]).byte().numpy()
        pillow.fromarray(pixels).save(folder / f"person {person}" / f"{number}.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_ones_own(tmp_path: Path, channels: int) -> None:
    write(tmp_path, persons=8, pictures=3)
    write(tmp_path / "of one picture only", persons=1, pictures=1)
    (tmp_path / "person 0" / "notes.txt").write_text("no picture")
    task = face_pairs(source="folder", folder=str(tmp_path), channels=channels, held_out=0.25)
    batch: Any = next(iter(task.test))
    assert batch.inputs.shape == (2 * 2 * 3 * 2 * 4, channels, 28, 28)
    assert -1 <= float(batch.inputs.min()) < float(batch.inputs.max()) <= 1


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"learn": "names"}, UnknownName, "names"),
        ({"source": "lfw"}, UnknownName, "lfw"),
        ({"measure": "auc"}, UnknownName, "auc"),
        ({"source": "folder"}, InputError, "one asks for the other"),
        ({"source": "folder", "folder": "/nowhere"}, DataNotFound, "/nowhere has no folders"),
        ({"held_out": 0.5}, InputError, "fewer than two"),
        ({"margin": 0.0}, InputError, "margin=0.0"),
        ({"size": 4}, InputError, "size=4"),
        ({"channels": 2}, InputError, "channels=2"),
    ],
)
def test_bad_input(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        face_pairs(**settings)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1\.png is not usable as a picture.*cannot be read"):
        face_pairs(source="folder", folder=str(tmp_path))


def test_faces_that_were_never_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    with pytest.raises(DataNotFound, match="fetch_olivetti_faces"):
        face_pairs(source="olivetti")


def test_a_metric_takes_pairs_only() -> None:
    with pytest.raises(ValueError, match="3 embeddings do not make 2 pairs"):
        Verification().update(torch.zeros(3, 2), torch.zeros(2))
