"""Multi30k, image captions in English and German: a translation task that trains in minutes.

Paper: Multi30K: Multilingual English-German Image Descriptions (Elliott, Frank, Sima'an, Specia;
Workshop on Vision and Language 2016; arXiv 1605.00459)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from ..core.optional import optional
from ..core.registry import task
from ..core.task import Task, evaluation, move
from ..core.types import Batch
from ..errors import InputError
from . import _files
from ._arrays import check_limit

PARTS = ("train", "val", "test_2016_flickr")
KIND = _files.Kind("Multi30k")
PAD, START, END, UNKNOWN = 0, 1, 2, 3
IGNORED = -100  # a target that counts neither in the loss nor in the score
POOL = 50  # batches whose sentences are sorted by length together


@dataclass
class TranslationTask(Task):
    """A task whose tokens are words.

    Attributes:
        tokenizer: of the ``tokenizers`` package, for both languages.
    """

    tokenizer: Any = None


@task
def multi30k(
    vocabulary: int = 4000,
    batch_size: int = 64,
    test_batch_size: int = 200,
    longest: int = 40,
    limit: int | None = None,
    smoothing: float = 0.1,
) -> TranslationTask:
    """Multi30k, captions to be translated from English to German, 29,000 + 1,014 + 1,000 pairs.

    Inputs are a dict: ``input_ids`` and ``attention_mask`` of the English sentence and
    ``decoder_input_ids``, the German one behind a start token, all ``(batch, length)``; the target is the
    German sentence with its end token, -100 beyond it. Both languages share one byte-pair vocabulary,
    learnt on all training sentences in lower case. The loss is the cross-entropy a token, the score the
    percent of all tokens that are the most likely when the true sentence so far is known; for BLEU see
    :func:`translate` and :func:`bleu`.

    Args:
        vocabulary: tokens, four for special purposes and one for each character among them; fewer are made
            where the sentences have no more.
        batch_size: training pairs a batch.
        test_batch_size: pairs a batch of validation and test.
        longest: tokens of an English sentence, and of a German one to train on, the end token among them;
            longer ones are cut. The German sentences of validation and test are always whole.
        limit: train on at most so many pairs.
        smoothing: label smoothing of the loss.

    Raises:
        DataNotFound: the files are nowhere; they are not downloaded.
        MissingDependency: tokenizers, which comes with transformers, is not installed.
        InputError: a file is damaged, the files of a part do not fit together, or a number is too small.
    """
    check_limit(limit)
    if longest < 2:
        raise InputError(f"longest={longest}: give at least 2, for one token and the end token.")
    text = {part: _read(part) for part in PARTS}
    tokenizer = learn_tokenizer([s for side in text["train"] for s in side], vocabulary)

    def pairs(part: str, size: int, training: bool = False) -> SentencePairs:
        source, target = (side[:limit] if training else side for side in text[part])
        return SentencePairs(
            _encode(tokenizer, source, longest),
            _encode(tokenizer, target, longest if training else None),
            size,
            shuffle=training,
        )

    def loss(output: Any, target: Tensor) -> Tensor:
        logits = getattr(output, "logits", output)
        return cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, label_smoothing=smoothing
        )

    return TranslationTask(
        train=pairs("train", batch_size, training=True),
        validation=pairs("val", test_batch_size),
        test=pairs("test_2016_flickr", test_batch_size),
        loss=loss,
        score=token_accuracy,
        name="Multi30k, English to German",
        score_name="tokens right, %",
        tokenizer=tokenizer,
    )


class SentencePairs:
    """Batches of sentence pairs of like length, padded to the longest of the batch.

    The order is random by the seed of :meth:`reshuffle`; a pair's ``index`` is its place in the data set.

    Args:
        source: token numbers of each sentence, with its end token.
        target: the same of its translation.
        batch_size: pairs a batch.
        shuffle: whether the order is random; else it is that of the data set.
    """

    def __init__(
        self,
        source: Sequence[Tensor],
        target: Sequence[Tensor],
        batch_size: int,
        *,
        shuffle: bool = False,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; a batch has at least 1 pair.")
        if len(source) != len(target):
            raise InputError(
                f"{len(source)} sentences and {len(target)} translations do not make pairs."
            )
        self.source, self.target = list(source), list(target)
        self.batch_size, self.shuffle = batch_size, shuffle
        self._seed = 0

    @property
    def samples(self) -> int:
        """Number of pairs."""
        return len(self.target)

    def reshuffle(self, seed: int) -> None:
        """Set the order of all iterations that follow; equal seeds, equal batches."""
        self._seed = seed

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for numbers in self._order():
            yield pair_batch(
                [self.source[n] for n in numbers], [self.target[n] for n in numbers], numbers
            )

    def _order(self) -> list[list[int]]:
        """The pairs of each batch: sorted by length within a pool, the batches in random order."""
        size = self.batch_size
        if not self.shuffle:
            return [list(c) for c in torch.arange(self.samples).split(size)]
        generator = torch.Generator().manual_seed(self._seed)
        order = torch.randperm(self.samples, generator=generator).tolist()
        batches = []
        for start in range(0, len(order), POOL * size):
            pool = sorted(order[start : start + POOL * size], key=lambda n: len(self.target[n]))
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        return [batches[n] for n in torch.randperm(len(batches), generator=generator)]


def pair_batch(source: Sequence[Tensor], target: Sequence[Tensor], numbers: list[int]) -> Batch:
    """A batch of pairs as encoder-decoders of transformers take it."""
    ids = pad_sequence(list(source), batch_first=True, padding_value=PAD)
    labels = pad_sequence(list(target), batch_first=True, padding_value=IGNORED)
    start = torch.full((len(labels), 1), START)
    before = torch.cat([start, labels[:, :-1]], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "decoder_input_ids": before.where(before != IGNORED, PAD),
    }
    return Batch(inputs, labels, torch.tensor(numbers))


def token_accuracy(output: Any, target: Tensor) -> Tensor:
    """100 for each token that is right and 0 for each other one that counts, shape ``(tokens,)``.

    One a token, not one a sentence, so that :func:`~lilliput.core.task.evaluate` averages over the tokens.
    """
    logits = getattr(output, "logits", output)
    right: Tensor = logits.argmax(-1) == target
    return 100.0 * right[target != IGNORED].float()


def learn_tokenizer(sentences: Sequence[str], vocabulary: int) -> Any:
    """A byte-pair tokenizer of the ``tokenizers`` package, which gives words back with their spaces.

    Raises:
        InputError: the sentences have more different characters than the vocabulary has room for.
        MissingDependency: tokenizers is not installed.
    """
    tokenizers = optional("tokenizers", "transformers", "text", "the task 'multi30k'")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=max(0, vocabulary), special_tokens=special, show_progress=False
    )
    made.train_from_iterator(sentences, trainer)
    if made.get_vocab_size() > vocabulary:  # it takes in every character, whatever was asked
        raise InputError(
            f"vocabulary={vocabulary}: the sentences need at least {made.get_vocab_size()} tokens, "
            f"{len(special)} special ones and one for each character. Give that many or more."
        )
    return made


@torch.no_grad()
def translate(model: Any, task: TranslationTask, *, beams: int = 1, longest: int = 60) -> list[str]:
    """Translations of the test sentences, in their order.

    Args:
        model: has ``generate``, as encoder-decoders of transformers have; it translates where it is.
        task: of :func:`multi30k`.
        beams: hypotheses that the search keeps; 1 is greedy.
        longest: tokens a translation.
    """
    found: list[str] = []
    device = next(model.parameters()).device
    with evaluation(model):
        for batch in task.reported:
            inputs = move(batch, device).inputs
            made = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                num_beams=beams,
                max_new_tokens=longest,
            )
            found += task.tokenizer.decode_batch(made.tolist())
    return found


def references(task: TranslationTask) -> list[str]:
    """The test set's own translations, whole, as the tokenizer gives them back: in lower case."""
    pairs: Any = task.reported
    return list(task.tokenizer.decode_batch([target.tolist() for target in pairs.target]))


def bleu(found: Sequence[str], wanted: Sequence[str]) -> float:
    """BLEU of translations, 0 to 100, by sacrebleu with its own tokenizer.

    Raises:
        MissingDependency: sacrebleu is not installed.
    """
    sacrebleu = optional("sacrebleu", "sacrebleu", "text", "BLEU")
    return float(sacrebleu.corpus_bleu(list(found), [list(wanted)]).score)


def _encode(tokenizer: Any, sentences: Sequence[str], longest: int | None) -> list[Tensor]:
    """Token numbers of each sentence with its end token, at most ``longest`` of them."""
    words = None if longest is None else longest - 1
    encoded = tokenizer.encode_batch(list(sentences))
    return [torch.tensor([*e.ids[:words], END]) for e in encoded]


def _read(part: str) -> tuple[list[str], list[str]]:
    """The English and the German sentences of a part."""
    english, german = (_find(part, language) for language in ("en", "de"))
    source, target = _lines(english), _lines(german)
    if len(source) != len(target):
        raise InputError(
            f"{english} has {len(source):,} lines and {german} has {len(target):,}: pairs are found by "
            "their line, so these are no translations of each other. Delete both and get them anew."
        )
    return source, target


def _find(part: str, language: str) -> Path:
    names = [f"{part}.{language}.gz", f"{part}.{language}"]
    path = _files.find("multi30k", names)
    if path is None:
        raise _files.not_found(
            "multi30k", names, "Put the files into a folder D/multi30k and set LILLIPUT_DATA=D."
        )
    return path


def _lines(path: Path) -> list[str]:
    with KIND.readable(path):
        text = _files.text(path)
    # Not by splitlines(): a caption may hold characters that Unicode, too, calls line ends.
    lines = text.removesuffix("\n").split("\n")
    if not all(line.strip() for line in lines):
        raise KIND.damaged(path, "it has empty lines, and pairs are found by their line")
    return lines
