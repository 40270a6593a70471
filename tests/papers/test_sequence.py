"""Kim and Rush 2016: word level, the teacher's translations, and the best of them by BLEU."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lilliput import io
from lilliput.api import build, compress
from lilliput.core.recipe import Stage, Train
from lilliput.core.run import Run
from lilliput.core.task import Task, evaluate
from lilliput.core.types import Batch
from lilliput.engine.progress import Watcher
from lilliput.errors import DataNotFound, InputError, ModelMismatch
from lilliput.methods import Gradual, Sequence
from lilliput.methods.distill.sequence import _load, _Rewritten, _save, best_by_bleu, word_loss
from lilliput.tasks import _files
from lilliput.tasks.multi30k import (
    END,
    IGNORED,
    SentencePairs,
    TranslationTask,
    bleu,
    learn_tokenizer,
    multi30k,
    references,
    token_accuracy,
    translate,
)
from lilliput.testing import stand_in_for_torchvision

stand_in_for_torchvision()
pytest.importorskip("transformers")
pytest.importorskip("sacrebleu")

SIZE = 20
TRAIN = Train(epochs=2, lr=0.01, checkpoint_minutes=1e-9)


def network(width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build("translator", vocabulary=SIZE, width=width, layers=1, heads=2, inner=16)


def sentences(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=generator).tolist()
    return [
        torch.cat([torch.randint(4, SIZE, (n,), generator=generator), torch.tensor([2])])
        for n in lengths
    ]


def task(count: int = 12) -> Task:
    """Sentences to be translated into themselves, backwards."""
    source = sentences(count, 0)
    target = [torch.cat([s[:-1].flip(0), s[-1:]]) for s in source]
    train = SentencePairs(source, target, 4, shuffle=True)
    fixed = SentencePairs(source, target, 6)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    return Task(train, fixed, fixed, loss, token_accuracy, "backwards")


# Word level


def test_word_loss_is_the_sum_over_positions_and_words() -> None:
    torch.manual_seed(0)
    own, taught = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    counted = torch.tensor([[True, True, False], [True, False, False]])
    total, count = 0.0, 0
    for b in range(2):
        for j in range(3):
            if not counted[b, j]:
                continue
            q, p = taught[b, j].softmax(0), own[b, j].softmax(0)
            for k in range(4):
                total += float(q[k] * (q[k].log() - p[k].log()))
            count += 1
    assert float(word_loss(own, taught, counted)) == pytest.approx(total / count, rel=1e-5)


def test_word_loss_has_the_gradient_of_the_cross_entropy() -> None:
    torch.manual_seed(1)
    own = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    taught, counted = torch.randn(2, 3, 4, dtype=torch.double), torch.ones(2, 3, dtype=torch.bool)
    (mine,) = torch.autograd.grad(word_loss(own, taught, counted), own)
    cross = -(taught.softmax(-1) * own.log_softmax(-1)).sum(-1).mean()
    (theirs,) = torch.autograd.grad(cross, own)
    assert torch.allclose(mine, theirs)


def test_padding_teaches_nothing() -> None:
    own = torch.randn(1, 3, 4, requires_grad=True)
    counted = torch.tensor([[True, False, True]])
    word_loss(own, torch.randn(1, 3, 4), counted).backward()
    assert own.grad is not None and not own.grad[0, 1].any() and own.grad[0, 0].any()


def test_labels_and_teacher_share_the_loss(tmp_path: Path) -> None:
    class Look(Watcher):
        def step_done(self, run: Run) -> None:
            self.logged = run.task.name, run.methods[0].task_weight(run)

    look = Look()
    stage = Stage(
        methods=[Sequence(level="word", weight=0.3, teacher=network(seed=1))], train=TRAIN
    )
    compress(network(), task(), [stage], directory=tmp_path, watchers=[look])
    assert look.logged == ("backwards", 0.7)


# Sequence level


class Collect(Watcher):
    """Keeps the batches that the student was trained on."""

    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def step_done(self, run: Run) -> None:
        batch = run.batch
        for number, row, before in zip(
            batch.index.tolist(),
            batch.target.tolist(),
            batch.inputs["decoder_input_ids"].tolist(),
            strict=True,
        ):
            kept = [t for t in row if t != IGNORED]
            assert before[: len(kept)] == [1, *kept[:-1]]
            self.seen[number] = kept


def expected(teacher: nn.Module, beams: int) -> dict[int, list[int]]:
    """What the teacher says to each sentence alone."""
    found = {}
    for number, source in enumerate(task().train.source):
        made = (
            teacher.eval()
            .generate(
                input_ids=source[None],
                attention_mask=torch.ones_like(source[None]),
                num_beams=beams,
                max_new_tokens=60,
            )[0]
            .tolist()[1:]
        )
        found[number] = made[: made.index(2) + 1] if 2 in made else made
    return found


def test_the_student_is_trained_on_the_teachers_sentences(tmp_path: Path) -> None:
    teacher, collect = network(seed=1), Collect()
    stage = Stage(methods=[Sequence(teacher=teacher, beams=3)], train=TRAIN)
    compress(network(), task(), [stage], directory=tmp_path, watchers=[collect])
    assert collect.seen == expected(teacher, 3)


def test_the_teacher_is_asked_once_and_the_run_resumes(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    class Stop(Watcher):
        def step_done(self, run: Run) -> None:
            if run.step == 4:
                raise KeyboardInterrupt

    teacher = network(seed=1)
    stages = [Stage(methods=[Sequence(teacher=teacher, beams=2)], train=TRAIN)]
    whole = compress(network(), task(), stages, directory=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compress(network(), task(), stages, directory=tmp_path / "cut", watchers=[Stop()])

    def no_search(self: Sequence, network: nn.Module, batch: Batch) -> dict[int, list[int]]:
        raise AssertionError("the translations are in the file")

    monkeypatch.setattr(Sequence, "_translate", no_search)
    again = compress(network(), task(), stages, directory=tmp_path / "cut")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_other_teachers_translations_are_not_taken(tmp_path: Path) -> None:
    collect = Collect()
    for seed in (1, 2):
        teacher = network(seed=seed)
        stage = Stage(methods=[Sequence(teacher=teacher, beams=2)], train=TRAIN)
        compress(network(), task(), [stage], directory=tmp_path, watchers=[collect], fresh=True)
    assert collect.seen == expected(teacher, 2)


def test_both_levels_and_sparsity_in_one_stage(tmp_path: Path) -> None:
    teacher = network(seed=1)
    methods = [
        Sequence(teacher=teacher, beams=2),
        Sequence(teacher=teacher, level="word"),
        Gradual(sparsity=0.5, layers="network.model.encoder.*"),
    ]
    result = compress(network(), task(), [Stage(methods=methods, train=TRAIN)], directory=tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss/word"' in lines and '"weight/word": 0.5' in lines
    loaded = io.load(result.artifact)
    batch = next(iter(task().validation))
    assert torch.equal(loaded(**batch.inputs), result.model.eval()(**batch.inputs))


# Interpolation


def test_the_candidate_with_the_most_common_ngrams_wins() -> None:
    wanted = [5, 6, 7, 8, 9]
    assert best_by_bleu([[5, 6, 9, 8, 7], [5, 6, 7, 8, 4], [9, 8, 7, 6, 5]], wanted) == [
        5,
        6,
        7,
        8,
        4,
    ]
    assert best_by_bleu([[4, 4], wanted], wanted) == wanted


def test_of_equals_the_teachers_favorite_wins() -> None:
    assert best_by_bleu([[11, 12], [13, 14]], [5, 6, 7]) == [11, 12]


def test_interpolation_is_never_further_from_the_truth_than_the_mode(tmp_path: Path) -> None:
    teacher, modes, best = network(seed=1), Collect(), Collect()
    for level, collect in (("sequence", modes), ("interpolation", best)):
        stage = Stage(methods=[Sequence(teacher=teacher, level=level, beams=6)], train=TRAIN)
        compress(network(), task(), [stage], directory=tmp_path / level, watchers=[collect])
    truth = {n: t.tolist() for n, t in enumerate(task().train.target)}
    chosen = [best_by_bleu([modes.seen[n], best.seen[n]], truth[n]) for n in truth]
    assert modes.seen != best.seen
    better = [n for n in truth if chosen[n] == best.seen[n]]
    same = [n for n in truth if chosen[n] == modes.seen[n] != best.seen[n]]
    # A mode may tie with the chosen one, and is then the first; it is never the better one.
    for n in same:
        assert best_by_bleu([best.seen[n], modes.seen[n]], truth[n]) == best.seen[n]
    assert better


# What is refused


def test_a_teacher_of_another_vocabulary() -> None:
    teacher = build("translator", vocabulary=SIZE + 1, width=16, layers=1, heads=2, inner=16)
    with pytest.raises(ModelMismatch, match="same vocabulary"):
        compress(
            network(),
            task(),
            [Stage(methods=[Sequence(level="word", teacher=teacher)], train=TRAIN)],
        )


def test_a_teacher_that_cannot_search() -> None:
    class Other(nn.Module):
        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            return inputs["input_ids"].float()

    with pytest.raises(InputError, match=r"has no generate\(\)"):
        compress(network(), task(), [Stage(methods=[Sequence(teacher=Other())], train=TRAIN)])


def test_an_ensemble_and_pairs_without_numbers() -> None:
    two = [network(seed=1), network(seed=2)]
    with pytest.raises(InputError, match="name one teacher"):
        compress(network(), task(), [Stage(methods=[Sequence(teacher=two)], train=TRAIN)])
    pairs = task()
    pairs.train = [Batch(b.inputs, b.target) for b in pairs.train]
    with pytest.raises(InputError, match="must carry the pairs' numbers"):
        compress(network(), pairs, [Stage(methods=[Sequence(teacher=two[0])], train=TRAIN)])


@pytest.mark.parametrize("number", [1, 5, -1])
def test_a_pair_that_was_not_translated(number: int) -> None:
    """The pass that the teacher translated has left it out, or it has ended before."""
    said = [torch.tensor([4, 2]), torch.tensor([], dtype=torch.long), torch.tensor([3])]
    inputs = {"decoder_input_ids": torch.zeros(2, 3, dtype=torch.long)}
    batches = [Batch(inputs, torch.zeros(2, 3), torch.tensor([0, number]))]
    with pytest.raises(InputError, match=rf"pair {number} was not in the pass.*drop_last"):
        list(_Rewritten(batches, said, 1))


def test_processes_write_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, move = [], Path.replace

    def moved(self: Path, target: Path) -> Path:
        names.append(self.name)
        return move(self, target)

    monkeypatch.setattr(Path, "replace", moved)
    _save(tmp_path / "said.npz", "key", [torch.tensor([4, 2]), torch.tensor([3])])
    assert [f".{os.getpid()}." in name for name in names] == [True]
    assert [file.name for file in tmp_path.iterdir()] == ["said.npz"]
    found = _load(tmp_path / "said.npz", "key")
    assert found is not None and [s.tolist() for s in found] == [[4, 2], [3]]
    (tmp_path / "said.npz").write_bytes(b"")
    assert _load(tmp_path / "said.npz", "key") is None


# The task


@pytest.fixture
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LILLIPUT_DATA", str(tmp_path))
    monkeypatch.setattr(_files, "SYSTEM", tmp_path / "system")
    folder = tmp_path / "multi30k"
    folder.mkdir()
    for part, count in (("train", 30), ("val", 5), ("test_2016_flickr", 4)):
        for language, words in (("en", "A dog runs fast"), ("de", "Ein Hund läuft schnell")):
            lines = [f"{words} {'x' * (n % 5)}{n}." for n in range(count)]
            (folder / f"{part}.{language}").write_text("\n".join(lines) + "\n")
    return folder


def test_captions_come_back_as_words(captions: Path) -> None:
    made = multi30k(vocabulary=120, batch_size=8)
    assert (made.train.samples, made.validation.samples, made.test.samples) == (30, 5, 4)
    assert references(made)[1] == "ein hund läuft schnell x1."
    seen = sorted(n for batch in made.train for n in batch.index.tolist())
    assert seen == list(range(30))
    batch = next(iter(made.train))
    kept = batch.target != IGNORED
    assert torch.equal(
        batch.inputs["decoder_input_ids"][:, 1:][kept[:, 1:]], batch.target[:, :-1][kept[:, 1:]]
    )
    assert (batch.inputs["decoder_input_ids"][:, 0] == 1).all()


def test_references_are_whole_and_what_is_trained_on_is_cut(captions: Path) -> None:
    made, whole = multi30k(vocabulary=60, longest=4), multi30k(vocabulary=60)
    assert max(map(len, whole.train.target)) > 10
    for sentences in (
        made.train.source,
        made.train.target,
        made.validation.source,
        made.test.source,
    ):
        assert {(len(s), int(s[-1])) for s in sentences} == {(4, END)}
    for part in ("validation", "test"):
        pairs = zip(getattr(made, part).target, getattr(whole, part).target, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    truth = [
        line.lower() for line in (captions / "test_2016_flickr.de").read_text().split("\n")[:-1]
    ]
    assert references(made) == truth


def test_what_a_pair_is_does_not_depend_on_the_limit(captions: Path) -> None:
    """A character that Unicode calls a line end is one of the caption's, not its end."""
    for language in ("en", "de"):
        lines = (captions / f"train.{language}").read_text().split("\n")
        lines[3 if language == "en" else 20] += "\u2028 \x85 \x0b"
        (captions / f"train.{language}").write_text("\n".join(lines))
    made = multi30k(vocabulary=120, limit=15)
    for source, target in zip(made.train.source, made.train.target, strict=True):
        english, german = made.tokenizer.decode_batch([source.tolist(), target.tolist()])
        assert english.split(".")[0].split()[-1] == german.split(".")[0].split()[-1]


def test_tokens_right_are_a_share_of_the_tokens() -> None:
    """Not of the sentences: one with 4 tokens counts four times as much as one with a single token."""
    target = torch.tensor([[1, 2, 3, 4], [2, IGNORED, IGNORED, IGNORED]])
    answers = torch.tensor([[1, 2, 0, 0], [2, 0, 0, 0]])
    logits = nn.functional.one_hot(answers, 5).float()
    assert token_accuracy(logits, target).tolist() == [100, 100, 0, 0, 100]
    batches = [Batch(logits[n : n + 1], target[n : n + 1]) for n in range(2)]
    assert evaluate(nn.Identity(), batches, token_accuracy) == pytest.approx(60.0)


def test_translations_are_made_where_the_model_is() -> None:
    class Elsewhere(nn.Module):
        """On a device without a memory, which no batch can come from."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta"))

        def generate(self, **inputs: Any) -> torch.Tensor:
            assert inputs["input_ids"].is_meta and inputs["attention_mask"].is_meta
            return torch.full((len(inputs["input_ids"]), 3), 4)

    pairs = SentencePairs([torch.tensor([5, 2])] * 3, [torch.tensor([5, 2])] * 3, 2)
    tokenizer = learn_tokenizer(["a b"], 20)
    made = TranslationTask(
        pairs, pairs, pairs, nn.functional.mse_loss, token_accuracy, tokenizer=tokenizer
    )
    assert len(translate(Elsewhere(), made)) == 3


def test_translations_are_decoded(captions: Path) -> None:
    made = multi30k(vocabulary=120)
    model = build("translator", vocabulary=120, width=16, layers=1, heads=2, inner=16)
    found = translate(model, made, longest=5)
    assert len(found) == 4 and all(isinstance(s, str) for s in found)
    assert bleu(references(made), references(made)) == pytest.approx(100.0)
    assert bleu(found, references(made)) < 50


def test_bleu_of_a_case_by_hand() -> None:
    # Of 5 words 4 fit, of 4 pairs 3, of 3 triples 2, of 2 quadruples 1; equally long: no penalty.
    expected = 100 * math.prod((4 / 5, 3 / 4, 2 / 3, 1 / 2)) ** 0.25
    assert bleu(["the cat sat on it"], ["the cat sat on mats"]) == pytest.approx(expected)


def test_bad_captions(captions: Path) -> None:
    (captions / "val.de").write_text("eins\n\nzwei\n")
    with pytest.raises(InputError, match="empty lines"):
        multi30k()
    (captions / "val.de").unlink()
    with pytest.raises(DataNotFound, match=r"val\.de"):
        multi30k()
    with pytest.raises(InputError, match="leaves nothing"):
        multi30k(limit=0)


@pytest.mark.parametrize("longest", [-3, 0, 1])
def test_sentences_without_a_token(captions: Path, longest: int) -> None:
    with pytest.raises(InputError, match=f"longest={longest}: give at least 2"):
        multi30k(longest=longest)


@pytest.mark.parametrize("vocabulary", [-1, 0, 5])
def test_a_vocabulary_without_room_for_the_characters(captions: Path, vocabulary: int) -> None:
    with pytest.raises(
        InputError, match=rf"vocabulary={vocabulary}: the sentences need at least \d+"
    ) as caught:
        multi30k(vocabulary=vocabulary)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert multi30k(vocabulary=least).tokenizer.get_vocab_size() == least
    with pytest.raises(InputError):
        multi30k(vocabulary=least - 1)


def test_damaged_captions_are_named(captions: Path) -> None:
    packed = gzip.compress((captions / "val.de").read_bytes())
    for content in (packed[:-9], packed[:10] + b"\xff" * 60, b"plain"):
        (captions / "val.de.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"val\.de\.gz is not usable as Multi30k"):
            multi30k()
    (captions / "val.de.gz").unlink()
    (captions / "val.de").write_bytes("schön\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"val\.de is not usable as Multi30k: it cannot be read"):
        multi30k()


@pytest.mark.parametrize("limit", [None, 10])
def test_pairs_of_unequal_sides(captions: Path, limit: int | None) -> None:
    lines = (captions / "train.de").read_text().splitlines()[:-1]
    (captions / "train.de").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"train\.en has 30 lines and \S+train\.de has 29"):
        multi30k(limit=limit)
