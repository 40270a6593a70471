"""Distillation of sequences: forecasts with two periods, and speech in noise.

    python benchmarks/sequences.py ett                 # all rows, three seeds
    python benchmarks/sequences.py speech --seeds 0
    python benchmarks/sequences.py ett --table         # only print

Every row of a part begins with the same random weights of the seed (or with the teacher's, where it says so)
and trains for the same number of epochs on the same samples; the epoch that is best on the validation samples
is kept. Figures are those of the test samples. Done rows are kept in
``benchmarks/results/sequences_PART.json``; killed and started again, it goes on.

ett: an LSTM sees a week of seven hourly series of a transformer and forecasts the next day. A network of 144
units teaches one of 32, which has a tenth of its parameters. The curriculum trains on windows of one day
first, then on those of a week; ``hidden_states`` keeps the states near those that the network had after the
days, and fades out, as the recipe ``day_then_week_ett`` has it. An epoch of days costs a seventh of an epoch
of weeks or less, so the curriculum is much cheaper than the other rows. Errors are mean squares of series
that are standardized by their training hours: 1 is the variance of these.

speech: spoken digits under white noise. The teacher has learned clean recordings and looks at them (Li et
al. 2017); the student is a network of the same form that hears the noisy ones. Differs from the paper: whole
words instead of frames, a small convolutional network, and the same 2,400 recordings for every row, whereas
the paper has more recordings without labels than with them. Both kinds of recording are standardized by
themselves, which already brings noisy ones nearer to what the teacher knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import Row, Rows, Trained, alone, change, markdown, named, parser, seeded, spread, trained
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Task, Train, compress
from lilliput.core import registry
from lilliput.core.task import evaluate

HERE = Path(__file__).resolve().parent


@functools.cache
def task(name: str, **settings: Any) -> Task:
    return registry.load("task", name)(**settings)


def network(seed: int, name: str, **sizes: int) -> nn.Module:
    return seeded(functools.partial(lilliput.build, name, **sizes), seed)


# -- forecasts with two periods -----------------------------------------------------------------

SERIES = {"series": "h1", "horizon": 24}
DAY, WEEK = 24, 168
DAY_EPOCHS, WEEK_EPOCHS = 12, 8  # of the curriculum; every other row has the sum of weeks
TEACHER_UNITS, UNITS = 144, 32
RATE, RATE_AFTER_DAYS = 2e-3, 1e-3
# The logits' loss sums over the 7 series and halves: this makes it the mean square, as the labels' loss is.
MEAN_SQUARE = 2 / 7


def ett(window: int) -> Task:
    return task("ett", window=window, **SERIES)


def weeks(
    *methods: dict[str, Any], epochs: int = DAY_EPOCHS + WEEK_EPOCHS, rate: float = RATE
) -> Stage:
    train = Train(epochs=epochs, optimizer="adam", lr=rate, lr_schedule="cosine", keep="best")
    return Stage(name="week", methods=list(methods), train=train)


def days_then_weeks(*methods: dict[str, Any]) -> list[Stage]:
    train = Train(epochs=DAY_EPOCHS, optimizer="adam", lr=RATE, lr_schedule="cosine")
    day = Stage(name="day", task=ett(DAY), train=train)
    return [day, weeks(*methods, epochs=WEEK_EPOCHS, rate=RATE_AFTER_DAYS)]


GUIDE = {"method": "hidden_states", "pairs": ["lstm"]}
FROM_DAYS = {**GUIDE, "teacher": "day", "adapter": "none", "weight": {"start": 1, "end": 0}}
FORECASTS = {"method": "logits", "cache": True}
HALF = {"weight": MEAN_SQUARE / 2, "hard_weight": 0.5}
ETT_PLANS: dict[str, Callable[[nn.Module], list[Stage]]] = {
    "alone": lambda teacher: [weeks()],
    "days, then weeks": lambda teacher: days_then_weeks(),
    "days, then weeks, hidden states": lambda teacher: days_then_weeks(FROM_DAYS),
    "teacher's forecasts": lambda teacher: [
        weeks({**FORECASTS, "teacher": teacher, "weight": MEAN_SQUARE})
    ],
    "teacher's forecasts and labels": lambda teacher: [
        weeks({**FORECASTS, "teacher": teacher, **HALF})
    ],
    "teacher's hidden states and labels": lambda teacher: [weeks({**GUIDE, "teacher": teacher})],
}


class Yesterday(nn.Module):
    """The forecast that needs no network."""

    def forward(self, window: Tensor) -> Tensor:
        return window[:, -DAY:]


def forecaster(seed: int, work: Path) -> Trained:
    """The teacher."""
    large = network(seed, "lstm_forecaster", hidden=TEACHER_UNITS)
    home = named(work, "ett", seed, "teacher")
    return trained(large, ett(WEEK), [weeks()], directory=home, seed=seed)


def forecast(row: str, seed: int, work: Path) -> Row:
    if row == "yesterday":
        return {"score": tested(Yesterday(), ett(WEEK)), "parameters": 0}
    teacher = forecaster(seed, work)
    if row == "teacher":
        return shown(teacher.figures)
    small = network(seed, "lstm_forecaster", hidden=UNITS)
    home = named(work, "ett", seed, row)
    plan = ETT_PLANS[row](teacher.model)
    return shown(compress(small, ett(WEEK), plan, directory=home, seed=seed).figures)


# -- speech in noise ----------------------------------------------------------------------------

NOISE = 10.0  # dB: the noise has a tenth of the speech's power
WIDTH, SPEECH_EPOCHS, SPEECH_RATE = 16, 20, 2e-3
SEEN = {"teacher": "original", "view": "clean", "cache": True}
ADAPT = {**SEEN, "method": "domain_adaptation", "initialize": False}  # rows say where they begin
SOFT = {**SEEN, "method": "soft_targets"}
SPEECH_PLANS: dict[str, list[dict[str, Any]]] = {
    "labels": [],
    "clean teacher": [ADAPT],
    "clean teacher and labels": [SOFT],
}
FROM_TEACHER = ", from its weights"


def speech(noise: float | None) -> Task:
    return task("fsdd", noise=noise)


def listen(*methods: dict[str, Any]) -> Stage:
    train = Train(
        epochs=SPEECH_EPOCHS, optimizer="adam", lr=SPEECH_RATE, lr_schedule="cosine", keep="best",
        precision="auto", channels_last=True,
    )  # fmt: skip
    return Stage(methods=list(methods), train=train)


def listener(seed: int, work: Path) -> Trained:
    """The teacher, trained on clean recordings."""
    home = named(work, "speech", seed, "teacher")
    clean = network(seed, "speech_cnn", width=WIDTH)
    return trained(clean, speech(None), [listen()], directory=home, seed=seed)


def recognize(row: str, seed: int, work: Path) -> Row:
    teacher = listener(seed, work)
    if row == "teacher, clean recordings":
        return shown(teacher.figures)
    if row == "teacher, noisy recordings":
        return {"score": tested(teacher.model, speech(NOISE))}
    begins = row.endswith(FROM_TEACHER)
    start = teacher.model if begins else network(seed, "speech_cnn", width=WIDTH)
    plan = [{**m, "teacher": teacher.model} for m in SPEECH_PLANS[row.removesuffix(FROM_TEACHER)]]
    home = named(work, "speech", seed, row)
    found = compress(start, speech(NOISE), [listen(*plan)], directory=home, seed=seed)
    return shown(found.figures)


# -- all of them --------------------------------------------------------------------------------


def shown(figures: dict[str, Any]) -> Row:
    return {name: figures[name] for name in ("score", "validation", "parameters")}


def tested(model: nn.Module, what: Task) -> float:
    """The score of a network that is not trained here."""
    return evaluate(model, what.reported, what.score)


@dataclass(frozen=True)
class Part:
    """What a table has: its rows, the teacher that they share, a row's work, what a figure is.

    ``sign`` makes the figure of the score: errors are scores with a minus.
    """

    rows: tuple[str, ...]
    teacher: Callable[[int, Path], Trained]
    do: Callable[[str, int, Path], Row]
    settings: dict[str, Any]
    figure: str
    digits: int
    sign: int = 1


PARTS = {
    "ett": Part(
        rows=("yesterday", "teacher", *ETT_PLANS),
        teacher=forecaster,
        do=forecast,
        settings={"epochs": [DAY_EPOCHS, WEEK_EPOCHS], "units": UNITS},
        figure="test error, mean square",
        digits=4,
        sign=-1,
    ),
    "speech": Part(
        rows=(
            "teacher, clean recordings",
            "teacher, noisy recordings",
            *(plan + begin for begin in ("", FROM_TEACHER) for plan in SPEECH_PLANS),
        ),
        teacher=listener,
        do=recognize,
        settings={"epochs": SPEECH_EPOCHS, "noise": NOISE},
        figure="accuracy, %",
        digits=2,
    ),
}


def do(job: Row, part: str, work: Path) -> Row:
    return PARTS[part].do(job["row"], job["seed"], work)


def train_teacher(part: str, seed: int, work: Path) -> None:
    PARTS[part].teacher(seed, work)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("part", choices=sorted(PARTS))
    chosen = options.parse_args()
    part = PARTS[chosen.part]
    done = Rows(HERE / "results" / f"sequences_{chosen.part}.json")
    for seed in [] if chosen.table else chosen.seeds:
        alone(train_teacher, chosen.part, seed, chosen.work)
        rows = [row for row in part.rows if any(piece in row for piece in chosen.only)]
        jobs = [{"row": row, "seed": seed, **part.settings} for row in rows]
        done.run(jobs, functools.partial(do, part=chosen.part, work=chosen.work), chosen.jobs)
    print(table(part, done.read()))


def table(part: Part, done: list[Row]) -> str:
    """Figures, and how they differ from those of the student that learns without a teacher."""
    baseline = "alone" if part.sign < 0 else "labels"
    without = [r for r in done if r["row"] == baseline]
    lines = []
    for row in part.rows:
        if found := [r for r in done if r["row"] == row]:
            figure = spread([part.sign * r["score"] for r in found], part.digits)
            apart = change(found, without, digits=part.digits, sign=part.sign)
            lines.append((row, figure, apart))
    return markdown(("row", part.figure, "to the student alone"), lines)


if __name__ == "__main__":
    main()
