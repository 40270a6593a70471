"""Where target outputs come from: networks that run along, or a file of their outputs.

A source answers with the logits of all its members, shape ``(members, batch, ...)``, for the batch of
the run. Methods of one stage that name the same teacher share it (:func:`shared_teacher`): it runs
once a step for all of them, and their taps on it see the same forward pass. A teacher may look at
another view of the samples than the student (``Batch.views``). Teachers run in eval mode under
``no_grad`` (not ``inference_mode``, whose outputs a loss cannot save), and :meth:`Live.check` fails if
one of their parameters or buffers has moved.

The surprising rule: a cache is keyed by what the samples *contain*. Each cached row carries a
fingerprint of its input, so an augmented or exchanged sample is refused instead of being paired
silently with the outputs of another one.
"""

from __future__ import annotations

import functools
import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core.digests import weights_digest
from ..core.files import unfinished
from ..core.run import Run
from ..core.task import answer, move, read
from ..core.types import Batch
from ..errors import InputError, ModelMismatch


class Source(Protocol):
    """Anything that knows the target outputs of a batch."""

    def outputs(self, batch: Batch) -> Tensor:
        """Logits, shape ``(members, batch, ...)``."""

    def check(self) -> None:
        """Raise if the source is not what it was."""


class Live:
    """Teachers that run beside the student.

    Args:
        networks: frozen and put into eval mode here, so hand over copies of what still trains.
        device: where they run.
        view: which view of the samples they look at; None for the student's inputs.
    """

    def __init__(
        self, networks: Sequence[nn.Module], device: torch.device, view: str | None = None
    ) -> None:
        self.networks = [n.eval().requires_grad_(False).to(device) for n in networks]
        self.view = view
        self._versions = self._state_versions()
        self._last: tuple[Batch, Tensor] | None = None

    def outputs(self, batch: Batch) -> Tensor:
        """Logits of each member; asked again for the same batch, they do not run again."""
        if self._last is None or self._last[0] is not batch:
            self._last = (batch, self._ask(batch))
        return self._last[1]

    @torch.no_grad()
    def _ask(self, batch: Batch) -> Tensor:
        inputs = seen_by(batch, self.view)
        members = [logits_of(answer(network, inputs)) for network in self.networks]
        return members[0].unsqueeze(0) if len(members) == 1 else torch.stack(members)

    def check(self) -> None:
        """Raise ModelMismatch if a parameter or buffer of a teacher was written to."""
        if self._versions != self._state_versions():
            raise ModelMismatch(
                "the teacher changed while it taught: one of its parameters or buffers was written "
                "to. Does the student share modules with it? Give the method a deep copy."
            )

    def _state_versions(self) -> list[int]:
        return [t._version for n in self.networks for t in (*n.parameters(), *n.buffers())]


def shared_teacher(run: Run, references: Any, view: str | None = None) -> Live:
    """The teacher, or the ensemble, that methods of this stage name; made at the first request.

    Args:
        run: in which it teaches.
        references: one network or a list of them; see :meth:`~lilliput.core.run.Run.find_network`.
        view: which view of the samples it looks at.
    """
    members = references if isinstance(references, list) else [references]
    # A module stands for itself, anything else for what it says.
    key = ("teacher", view, *(m if isinstance(m, nn.Module) else repr(m) for m in members))
    if key not in run.shared:
        run.shared[key] = Live([run.find_network(m) for m in members], run.device, view)
    teacher: Live = run.shared[key]
    return teacher


def logits_of(output: Any, whose: str = "the teacher") -> Tensor:
    """The logits of a network's output: itself, or what Hugging Face's networks call ``logits``.

    Args:
        output: of the network.
        whose: that is, for the error message.

    Raises:
        ModelMismatch: there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelMismatch(
            f"{whose}'s output is a {type(output).__name__} without logits: wrap the network in a module "
            "that returns a tensor."
        )
    return logits


def seen_by(batch: Batch, view: str | None) -> Any:
    """What a teacher looks at: a view of the batch, or its inputs.

    Raises:
        ModelMismatch: the batch has no such view.
    """
    if view is None:
        return batch.inputs
    if not isinstance(batch.views, dict) or view not in batch.views:
        raise ModelMismatch(
            f"the teacher should look at the view {view!r}, and the batches have "
            f"{sorted(batch.views) if batch.views else 'no further views'}: let the task yield "
            f"Batch(inputs, target, views={{{view!r}: ...}})."
        )
    return batch.views[view]


class Cached:
    """The outputs of teachers for all training samples, in one memory-mapped fp16 file.

    Args:
        path: the file; made on first use, and made anew when the teachers' weights have changed.
        teachers: who is asked.
        batches: the training batches; they must carry sample numbers and be free of random
            augmentation.
        device: where the teachers run and the outputs are wanted.
    """

    def __init__(
        self, path: Path, teachers: Live, batches: Iterable[Any], device: torch.device
    ) -> None:
        if getattr(batches, "augmented", False):
            raise InputError(
                "a cached teacher cannot follow random augmentation: each epoch shows other images "
                "than those whose outputs were cached. Switch the augmentation or the cache off."
            )
        key = weights_digest(*teachers.networks)
        index = _stored_index(path, key)
        shape, prints = index or _record(path, key, teachers, batches, device)
        # One more print, which no sample has: numbers beyond the last are clipped to it.
        self._prints = np.append(prints, np.float32(np.nan))
        self._slack = _slack(self._prints)
        # As a plain array: numpy indexes it faster than a memmap, and it still lies on the disk.
        self._rows = np.asarray(np.memmap(path, dtype=np.float16, mode="r", shape=shape))
        self._device, self._view = device, teachers.view

    def outputs(self, batch: Batch) -> Tensor:
        """Logits of each member, read from the file."""
        numbers = _numbers(batch).numpy()
        self._check_samples(numbers, _prints(seen_by(batch, self._view)).cpu().numpy())
        rows = torch.from_numpy(self._rows.take(numbers, axis=0, mode="clip"))
        return rows.to(self._device, torch.float32).transpose(0, 1)

    def check(self) -> None:
        """A file that is only read does not move."""

    def _check_samples(self, numbers: np.ndarray, now: np.ndarray) -> None:
        then, slack = (part.take(numbers, mode="clip") for part in (self._prints, self._slack))
        if not (np.abs(now - then) <= slack).all():
            _refuse_unseen(numbers[np.isnan(then) & ~np.isnan(now)])
            raise InputError(
                "a training sample is not the one whose teacher outputs were cached: the data or its "
                "transform changed, or it is augmented at random. Switch the cache off, or delete its "
                "file to have it made anew."
            )


_Index = tuple[tuple[int, ...], np.ndarray]  # the rows' shape, and the print of each sample


def _refuse_unseen(numbers: np.ndarray) -> None:
    if len(numbers):
        raise InputError(
            f"the training sample {numbers[0]} was not in the pass whose teacher outputs were cached. "
            "drop_last leaves samples out, and others in each epoch: switch that off, or the cache."
        )


def _slack(prints: np.ndarray) -> np.ndarray:
    """How far the print of a sample may be from the recorded one, on the scale of the data."""
    sizes = np.abs(prints)
    usual = sizes[np.isfinite(sizes) & (sizes > 0)]
    slack: np.ndarray = 1e-3 * sizes + (1e-3 * np.median(usual) if len(usual) else 0.0)
    return slack


def _record(
    path: Path, key: str, teachers: Live, batches: Iterable[Any], device: torch.device
) -> _Index:
    found = [_asked(teachers, item, device) for item in read(batches, "the batches to cache")]
    if len({outputs.shape[1:] for _, outputs, _ in found}) > 1:
        raise InputError(
            "the teacher's outputs differ in length from batch to batch, so they do not fit into one file: "
            "switch the cache off."
        )
    numbers, outputs, prints = (np.concatenate(part) for part in zip(*found, strict=True))
    rows = np.zeros((numbers.max() + 1, *outputs.shape[1:]), np.float16)
    marks = np.full(len(rows), np.nan, np.float32)
    rows[numbers], marks[numbers] = outputs, prints
    _write(path, key, rows, marks)
    return rows.shape, marks


def _asked(
    teachers: Live, item: Batch, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a batch the samples' numbers, the teachers' outputs, samples first, and the samples' prints."""
    batch = move(item, device)
    outputs = teachers.outputs(batch).movedim(0, 1).half().cpu().numpy()
    prints = _prints(seen_by(batch, teachers.view)).cpu().numpy()
    return _numbers(item).numpy(), outputs, prints


def _write(path: Path, key: str, rows: np.ndarray, marks: np.ndarray) -> None:
    """Put rows and index into place; the index last, so that it never stands beside other rows.

    Where several processes do this at once, each replaces the others' files with the same content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    index = _index_of(path)
    rows_file, index_file = unfinished(path), unfinished(index)
    rows.tofile(rows_file)
    with index_file.open("wb") as file:
        np.savez(file, key=key, shape=rows.shape, prints=marks)
    index.unlink(missing_ok=True)
    rows_file.replace(path)
    index_file.replace(index)


def _index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index.npz")


def _stored_index(path: Path, key: str) -> _Index | None:
    """What the index says; None where there is none, or another teacher's, or a damaged one."""
    try:
        with np.load(_index_of(path), allow_pickle=False) as content:
            if path.exists() and str(content["key"]) == key:
                return tuple(content["shape"]), content["prints"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # missing, or half written: made anew
    return None


def _numbers(batch: Batch) -> Tensor:
    if batch.index is None:
        raise InputError(
            "a cached teacher needs to know which samples a batch holds: let the training batches be "
            "(inputs, target, index) with the samples' numbers as the third part."
        )
    return torch.as_tensor(batch.index).cpu()


def _prints(inputs: Any) -> Tensor:
    """One number a sample that another sample would hardly have: a fixed random projection."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    parts = [t.reshape(len(t), -1).float() for t in tensors]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # nearly always: no copy
    with torch.autocast(flat.device.type, enabled=False):  # which would compute it in 16 bits
        return torch.mv(flat, _direction(flat.shape[1], flat.device))


@functools.lru_cache(maxsize=8)
def _direction(width: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(20150309)
    direction: Tensor = torch.randn(width, generator=generator) / math.sqrt(width)
    return direction.to(device)
