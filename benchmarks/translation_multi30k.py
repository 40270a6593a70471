"""Kim and Rush 2016: a small translator learns a larger one's words, and its translations (Multi30k).

    python benchmarks/translation_multi30k.py
    python benchmarks/translation_multi30k.py --only word --seeds 0
    python benchmarks/translation_multi30k.py --table

A transformer with two layers teaches one with a single narrower layer, English to German. Rows:

- ``alone``: the true translations, for as many epochs as the longest row has in all;
- ``word``: half of the loss is the teacher's distribution at each token;
- ``sequence``: the targets are what the teacher says, by a beam search;
- ``sequence + word``: both;
- ``interpolation``: the student of ``sequence``, fine-tuned at a small rate on those of the teacher's
  candidates that have the highest BLEU against the true translation.

Figures: BLEU on the 1,000 test pairs, greedy and with a beam of 5; the percentage of tokens that are right
when the true sentence so far is known; and the sentences that a student translates, greedily, in the time in
which the teacher translates one. The last is the median of rounds in which both translate the same sentences
in turn on one thread; each network's translations end where it ends them. Nothing is chosen, so the
validation pairs are looked at once, at the end. Done rows are kept in
``benchmarks/results/translation_multi30k.json``; killed and started again, it goes on.

Reduced, for all rows alike, so that a processor is enough: the first 8,000 of the 29,000 training pairs,
2,000 tokens, small networks, few epochs. Differs from the paper: transformers for LSTMs; 10 candidates for
35. What the paper reports for its best student on WMT 2014, which combines all three levels, stands in
``PAPER``. BLEU is sacrebleu's, of lower-case text. Needs Multi30k (``LILLIPUT_DATA``), transformers and
sacrebleu.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rows import Row, Rows, Trained, alone, change, markdown, named, parser, seeded, spread, trained
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.core import registry
from lilliput.core.task import evaluation
from lilliput.tasks.multi30k import bleu, references, translate
from lilliput.testing import stand_in_for_torchvision

HERE = Path(__file__).resolve().parent
DATA = {"limit": 8_000, "vocabulary": 2_000, "batch_size": 32}
NETWORKS = {
    "teacher": {"width": 128, "layers": 2, "inner": 512},
    "student": {"width": 48, "layers": 1, "inner": 192},
}
RATES = {"teacher": 1e-3, "student": 2e-3, "fine": 2e-4}
TEACHER_EPOCHS, EPOCHS, FINE_EPOCHS = 10, 12, 2
BEAMS, CANDIDATES = 5, 10
ROUNDS = 7

WORD = {"method": "sequence", "level": "word", "weight": 0.5}
SEQUENCE = {"method": "sequence", "level": "sequence", "beams": BEAMS}
INTERPOLATION = {"method": "sequence", "level": "interpolation", "beams": CANDIDATES}
ROWS: dict[str, list[dict[str, Any]]] = {
    "alone": [],
    "word": [WORD],
    "sequence": [SEQUENCE],
    "sequence + word": [SEQUENCE, WORD],
    "interpolation": [INTERPOLATION],
}
# Reported: the best student to the same network alone, in BLEU, and its speed to the teacher's.
PAPER = {"greedy": "+4.2", "beam 5": "+1.7", "speed": "10"}


# -- data and training --------------------------------------------------------------------------


@functools.cache
def task() -> Any:
    return registry.load("task", "multi30k")(**DATA)


def train(epochs: int, rate: str) -> Train:
    return Train(
        epochs=epochs, optimizer="adam", lr=RATES[rate], lr_schedule="cosine", warmup=0.1, clip=1.0,
        evaluate_every=epochs,
    )  # fmt: skip


def network(who: str, seed: int) -> nn.Module:
    stand_in_for_torchvision()  # transformers imports it, and it may not fit this torch
    settings = {"vocabulary": DATA["vocabulary"], **NETWORKS[who]}
    return seeded(functools.partial(lilliput.build, "translator", **settings), seed)


def teacher(seed: int, work: Path) -> Trained:
    stage = Stage(train=train(TEACHER_EPOCHS, "teacher"))
    home = named(work, "multi30k", seed, "teacher")
    return trained(network("teacher", seed), task(), [stage], directory=home, seed=seed)


def student(row: str, seed: int, work: Path) -> Trained:
    taught_by = teacher(seed, work).model if ROWS[row] else None
    methods = [{**method, "teacher": taught_by} for method in ROWS[row]]
    if row == "interpolation":
        start, how = student("sequence", seed, work).model, train(FINE_EPOCHS, "fine")
    else:
        more = 0 if methods else FINE_EPOCHS
        start, how = network("student", seed), train(EPOCHS + more, "student")
    home = named(work, "multi30k", seed, row)
    return trained(start, task(), [Stage(methods=methods, train=how)], directory=home, seed=seed)


def prepare(rows: list[str], seed: int, work: Path) -> None:
    """Train what several rows start from, before they all do."""
    teacher(seed, work)
    if "interpolation" in rows:
        student("sequence", seed, work)


# -- figures ------------------------------------------------------------------------------------


def do(job: Row, work: Path) -> Row:
    row, seed = job["row"], job["seed"]
    large = teacher(seed, work)
    found = large if row == "teacher" else student(row, seed, work)
    kept = ("score", "validation", "parameters")
    return {
        **{name: found.figures[name] for name in kept},
        "bleu_greedy": score(found.model, 1),
        "bleu_beam": score(found.model, BEAMS),
        "speed": 1.0 if row == "teacher" else speed(found.model, large.model),
    }


def score(model: nn.Module, beams: int) -> float:
    return bleu(translate(model, task(), beams=beams), references(task()))


def speed(model: nn.Module, large: nn.Module) -> float:
    """Sentences that the model translates while the large one translates one, greedily."""
    given = next(iter(task().test)).inputs
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    with evaluation(model), evaluation(large):
        seconds(model, inputs), seconds(large, inputs)  # the first time costs more
        rounds = [seconds(large, inputs) / seconds(model, inputs) for _ in range(ROUNDS)]
    return median(rounds)


@torch.no_grad()
def seconds(model: Any, inputs: dict[str, Tensor]) -> float:
    """Of this process alone, for other programs may run."""
    start = time.process_time()
    model.generate(**inputs, num_beams=1, max_new_tokens=60)
    return time.process_time() - start


# -- all of them --------------------------------------------------------------------------------


def main() -> None:
    options = parser(__doc__).parse_args()
    done = Rows(HERE / "results" / "translation_multi30k.json", paper=PAPER, data=DATA)
    for seed in [] if options.table else options.seeds:
        rows = [r for r in ("teacher", *ROWS) if any(part in r for part in options.only)]
        alone(prepare, rows, seed, options.work)
        jobs = [{"row": row, "seed": seed, "epochs": EPOCHS} for row in rows]
        done.run(jobs, functools.partial(do, work=options.work), options.jobs)
    print(table(done.read()))


def table(done: list[Row]) -> str:
    rows = [(row, [r for r in done if r["row"] == row]) for row in ("teacher", *ROWS)]
    without = [r for r in done if r["row"] == "alone"]
    head = ("BLEU, greedy", "to alone", "BLEU, beam 5", "to alone", "tokens right, %", "speed")
    return markdown(("row", *head), [line(row, found, without) for row, found in rows if found])


def line(row: str, found: list[Row], without: list[Row]) -> tuple[str, ...]:
    def told(name: str, digits: int = 2) -> str:
        return spread([r[name] for r in found], digits)

    both = [
        cell
        for name in ("bleu_greedy", "bleu_beam")
        for cell in (told(name), change(found, without, name))
    ]
    return row, *both, told("score", 1), told("speed", 1)


if __name__ == "__main__":
    main()
