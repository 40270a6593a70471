"""Sequence-level distillation: a translator learns from what its teacher would say.

Paper: Sequence-Level Knowledge Distillation (Kim, Rush; EMNLP 2016; arXiv 1606.07947)

Three levels, for encoder-decoders that predict a target t from a source s:

- ``word`` (section 3.1): at each position j the teacher's distribution q is the target,
  ``-sum_j sum_k q(t_j = k | s, t_<j) log p(t_j = k | s, t_<j)``, mixed with the labels:
  ``(1 - alpha) NLL + alpha`` times it.
- ``sequence`` (section 3.2): the teacher's distribution over whole sequences is replaced by its mode,
  found by beam search; the student is trained on ``-log p(y_beam | s)``: the targets of the training set
  are rewritten.
- ``interpolation`` (section 3.3): of the teacher's K best the one with the highest BLEU against the
  true target is the target, so that the student sees the teacher's words and the data's truth. The paper
  fine-tunes on these at a small learning rate.

Levels combine: two of these methods in one stage, ``sequence`` and then ``word``, are the paper's Seq-KD +
Word-KD.

Faithful: the losses, beam 5 and K = 35, smoothed BLEU of single sentences. Differs: BLEU counts the tokens of
the tokenizer, not words, because the method meets numbers and no text; the Kullback-Leibler divergence stands
for the cross-entropy to the teacher, which has the same gradient. The word level averages over the tokens
that count (targets of -100 do not).

Cost: word, the teacher's forward pass a step; the others, one beam search over the training set before the
first step, kept in a file of the run directory. When not to use it: with targets that are not sequences of
tokens, only the word level works, as soft targets without a temperature.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ...core.digests import weights_digest
from ...core.files import unfinished
from ...core.method import Method
from ...core.optional import optional
from ...core.registry import method
from ...core.run import Run
from ...core.task import move, read
from ...core.types import Batch, Change, Fraction, Term
from ...errors import InputError, ModelMismatch
from ...mechanisms.teacher import Live, logits_of, shared_teacher
from ._responses import require_classes

IGNORED = -100


def word_loss(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """The divergence of the student from the teacher, the mean over the tokens that count.

    Args:
        student: logits, ``(batch, length, vocabulary)``.
        teacher: logits of the same shape.
        counted: bool, ``(batch, length)``.

    Example:
        >>> same = torch.randn(2, 3, 5)
        >>> float(word_loss(same, same, torch.ones(2, 3, dtype=torch.bool)))
        0.0
    """
    own = F.log_softmax(student[counted], -1)
    target = F.log_softmax(teacher[counted], -1)
    return F.kl_div(own, target, reduction="batchmean", log_target=True)


def best_by_bleu(candidates: list[list[int]], wanted: list[int]) -> list[int]:
    """The candidate with the highest smoothed BLEU; of equal ones the first, which the teacher likes best.

    Args:
        candidates: token numbers, the most probable sequence first.
        wanted: token numbers of the true target.
    """
    sacrebleu = optional("sacrebleu", "sacrebleu", "text", "interpolation by BLEU")
    metric = sacrebleu.BLEU(tokenize="none", smooth_method="add-k", effective_order=True)
    truth = [" ".join(map(str, wanted))]
    scores = [metric.sentence_score(" ".join(map(str, c)), truth).score for c in candidates]
    return candidates[int(np.argmax(scores))]


@method
class Sequence(Method):
    """Learn a teacher's words, its translations, or the best of them.

    Attributes:
        teacher: one encoder-decoder; for ``sequence`` and ``interpolation`` it needs ``generate``, as
            those of the transformers package have it.
        level: see the module's docstring.
        weight: alpha, of the word level; the labels have the rest.
        beams: hypotheses that the search keeps, and K for ``interpolation``; by default 5 and 35.
        longest: tokens that the teacher may say.

    Example:
        >>> Sequence(level="word").weight
        0.5
    """

    family: ClassVar[str] = "distill"
    changes_model: ClassVar[bool] = False

    teacher: Any = "original"
    level: Literal["word", "sequence", "interpolation"] = "sequence"
    weight: Fraction = 0.5
    beams: int | None = Field(default=None, ge=1)
    longest: int = Field(default=60, ge=1)

    _teacher: Live = PrivateAttr()
    _said: list[Tensor] = PrivateAttr(default_factory=list)

    @classmethod
    def example(cls) -> Sequence:
        """The level that works with every classifier."""
        return cls(level="word")

    def attach(self, run: Run) -> None:
        """Find the teacher; let it translate the training set, unless its file is there."""
        self._teacher = shared_teacher(run, self.teacher)
        if len(self._teacher.networks) != 1:
            raise InputError("sequence: an ensemble cannot be searched; name one teacher.")
        if self.level != "word":
            self._said = self._translations(run)

    def task_weight(self, run: Run) -> float:
        """The labels' share."""
        return 1.0 - self.weight if self.level == "word" else 1.0

    def data(self, run: Run, batches: Iterable[Any]) -> Iterable[Any]:
        """The training batches with the teacher's sentences as targets."""
        if self.level == "word":
            return batches
        start = _special(self._teacher.networks[0])["decoder_start_token_id"]
        return _Rewritten(batches, self._said, start)

    def loss(self, run: Run) -> dict[str, Term]:
        """The word level's term."""
        if self.level != "word":
            return {}
        taught = self._teacher.outputs(run.batch)[0]
        own = logits_of(run.output, "the student")
        require_classes(own, -1, "sequence")
        if own.shape != taught.shape:
            raise ModelMismatch(
                f"sequence: the teacher's outputs have the shape {tuple(taught.shape)}, the student's "
                f"{tuple(own.shape)}. Both need the same vocabulary and see the same target."
            )
        return {"word": Term(word_loss(own, taught, _counted(run.batch.target, own)), self.weight)}

    def finish(self, run: Run) -> list[Change]:
        """The teacher must be what it was."""
        self._teacher.check()
        return []

    # -- what the teacher says ----------------------------------------------------------------

    def _translations(self, run: Run) -> list[Tensor]:
        """For each training pair, by its number, what the teacher says: from the file, or into it."""
        network = self._teacher.networks[0]
        key = f"{weights_digest(network)} {self.level} {self._beams} {self.longest}"
        path = None
        if run.directory is not None:
            path = run.directory / f"said-{run.stage}-{self.level}.npz"
        known = _load(path, key)
        if known is not None:
            return known
        said: dict[int, list[int]] = {}
        for item in read(run.task.train, "the training batches to translate"):
            said.update(self._translate(network, move(item, run.device)))
        found = [torch.tensor(said.get(n, []), dtype=torch.long) for n in range(max(said) + 1)]
        _save(path, key, found)
        return found

    @property
    def _beams(self) -> int:
        return self.beams or (35 if self.level == "interpolation" else 5)

    @torch.no_grad()
    def _translate(self, network: Any, batch: Batch) -> dict[int, list[int]]:
        """What the teacher says to one batch: token numbers by the pairs' numbers."""
        inputs, special = _searchable(network, batch), _special(network)
        kept = self._beams if self.level == "interpolation" else 1
        made = network.generate(
            **inputs,
            num_beams=self._beams,
            num_return_sequences=kept,
            max_new_tokens=self.longest,
            do_sample=False,
        )
        sentences = [_sentence(row, special) for row in made.tolist()]
        groups = [sentences[i : i + kept] for i in range(0, len(sentences), kept)]
        numbers, targets = torch.as_tensor(batch.index).tolist(), batch.target.tolist()
        if kept == 1:
            return {n: group[0] for n, group in zip(numbers, groups, strict=True)}
        truths = [[t for t in row if t != IGNORED] for row in targets]
        return {n: best_by_bleu(g, t) for n, g, t in zip(numbers, groups, truths, strict=True)}


class _Rewritten:
    """Batches whose targets are what the teacher said.

    Args:
        batches: with the pairs' numbers.
        said: token numbers, by those.
        start: the token that a decoder sees first.
    """

    def __init__(self, batches: Any, said: list[Tensor], start: int) -> None:
        self.batches, self.said, self.start = batches, said, start

    def __len__(self) -> int:
        return len(self.batches)

    def reshuffle(self, seed: int) -> None:
        """Hand the seed on."""
        if hasattr(self.batches, "reshuffle"):
            self.batches.reshuffle(seed)

    def __iter__(self) -> Iterator[Batch]:
        for batch in read(self.batches, "the training batches"):
            sentences = [self._sentence(n) for n in torch.as_tensor(batch.index).tolist()]
            target = pad_sequence(sentences, batch_first=True, padding_value=IGNORED)
            before = torch.cat([torch.full((len(target), 1), self.start), target[:, :-1]], 1)
            # Behind a sentence's end the decoder sees anything: those positions do not count.
            inputs = {**batch.inputs, "decoder_input_ids": before.clamp_min(0)}
            yield Batch(inputs, target, batch.index, batch.views)

    def _sentence(self, number: int) -> Tensor:
        """What the teacher said to one pair: a token at least, for it ends each sentence."""
        if 0 <= number < len(self.said) and len(self.said[number]):
            return self.said[number]
        raise InputError(
            f"sequence: the pair {number} was not in the pass that the teacher translated. drop_last leaves "
            "pairs out, and others in each epoch: switch it off."
        )


def _counted(target: Any, logits: Tensor) -> Tensor:
    """Which predictions count: all but those whose target is -100."""
    if isinstance(target, Tensor) and target.shape == logits.shape[:-1]:
        return target != IGNORED
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


def _searchable(network: nn.Module, batch: Batch) -> dict[str, Any]:
    if not callable(getattr(network, "generate", None)):
        raise InputError(
            f"sequence: the teacher, a {type(network).__name__}, has no generate() to search with. Give an "
            "encoder-decoder of transformers, or use level: word."
        )
    if not isinstance(batch.inputs, dict) or "decoder_input_ids" not in batch.inputs:
        raise InputError(
            "sequence: the batches' inputs should be a dict with input_ids, attention_mask and "
            "decoder_input_ids, as in the task multi30k."
        )
    if batch.index is None:
        raise InputError(
            "sequence: the batches must carry the pairs' numbers, Batch(inputs, target, index), so that "
            "each sentence finds its translation."
        )
    return {k: v for k, v in batch.inputs.items() if not k.startswith("decoder_")}


def _special(network: Any) -> dict[str, int]:
    """The numbers of the special tokens, from the network's configuration or that inside it."""
    for part in network.modules():
        config = getattr(part, "config", None)
        if getattr(config, "decoder_start_token_id", None) is not None:
            names = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
            return {name: getattr(config, name) for name in names}
    raise InputError("sequence: the teacher's configuration names no decoder_start_token_id.")


def _sentence(row: list[int], special: dict[str, int]) -> list[int]:
    """The tokens behind the start, up to and with the end."""
    row = row[1:] if row and row[0] == special["decoder_start_token_id"] else row
    end = special["eos_token_id"]
    return [*row[: row.index(end)], end] if end in row else row


def _load(path: Path | None, key: str) -> list[Tensor] | None:
    if path is None or not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            if str(content["key"]) != key:
                return None
            tokens = torch.from_numpy(content["tokens"].astype(np.int64))
            return list(tokens.split(content["lengths"].tolist()))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # half written: made anew


def _save(path: Path | None, key: str, said: list[Tensor]) -> None:
    if path is None:
        return
    # Each of several processes writes its own, and all the same.
    temporary = unfinished(path)
    lengths = np.array([len(s) for s in said])
    tokens = torch.cat(said).numpy().astype(np.int32)
    with temporary.open("wb") as file:
        np.savez(file, key=key, tokens=tokens, lengths=lengths)
    temporary.replace(path)
