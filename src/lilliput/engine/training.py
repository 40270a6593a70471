"""The epochs of one stage, the checkpoints among them, and how a run goes on after an interruption.

The surprising rule: each epoch seeds all generators anew from (seed, stage, epoch), so an interrupted
epoch can be replayed: the batches that were done are drawn again and skipped, the generators are put
to where the checkpoint saw them, and everything after is bit for bit what it would have been.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.recipe import Train
from ..core.run import Player, Run
from ..core.task import evaluate, move, read
from ..core.types import Batch
from . import distributed
from .checkpoint import clone_state, fits, load_model_tree, model_tree
from .loop import Hooks, Loop
from .optim import build_optimizer, load_optimizer, trained_parameters
from .progress import Watcher
from .records import RunDirectory
from .seeds import random_state, reshuffle, restore_random_state, seed_all


@dataclass
class Training:
    """One stage's training.

    Attributes:
        run: with all methods of the stage attached.
        train: how the stage trains.
        home: where checkpoints and metrics go.
        watchers: told of every step.
        done: steps of the present epoch that are done.
        best: the state of the best validation score, if the stage keeps that.
    """

    run: Run
    train: Train
    home: RunDirectory
    watchers: Sequence[Watcher] = ()
    done: int = 0
    best: dict[str, Any] | None = None
    _saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        run, train = self.run, self.train
        if train.channels_last:
            for network in (run.model, *(player.network for player in run.players.values())):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for player in run.players.values():
            player.clip = train.clip
        hooks = Hooks(run.methods)
        self.batches: Iterable[Any] = run.task.train
        for hook in hooks.data:
            self.batches = hook(run, self.batches)
        run.total_steps = train.epochs * length(self.batches)
        run.optimizer = build_optimizer(train, trained_parameters(run, train))
        self.loop = Loop(run, train, hooks)
        if train.precision == "float16" and run.device.type == "cuda":
            self.loop.scaler = torch.amp.GradScaler()
            for player in run.players.values():
                player.scaler = torch.amp.GradScaler()

    def train_all(self) -> None:
        """All epochs that are not done yet."""
        self._resume()
        while self.run.epoch < self.train.epochs:
            self._epoch()
        if self.best is not None and fits(self.best["model"], self.run.model):
            self.run.model.load_state_dict(self.best["model"])

    def _epoch(self) -> None:
        run = self.run
        interrupted = random_state() if self.done else None
        seed_all(run.seed, run.stage, run.epoch, distributed.rank())
        reshuffle(self.batches, run.seed, run.stage, run.epoch)
        run.model.train()
        try:
            for batch in self._rest(interrupted):
                self.loop.step(batch)
                self.done += 1
                for watcher in self.watchers:
                    watcher.step_done(run)
                if time.monotonic() - self._saved_at >= 60 * self.train.checkpoint_minutes:
                    self._save()
        except KeyboardInterrupt:
            if not self.loop.inside_step:  # else the step is half done: the last checkpoint holds
                self._save()
            raise
        self._end_epoch()

    def _rest(self, interrupted: dict[str, Any] | None) -> Iterator[Batch]:
        """The epoch's batches without those that an earlier process has done."""
        skip = self.done
        for number, batch in enumerate(read(self.batches, "the training batches")):
            if number < skip:
                continue
            if number == skip and interrupted is not None:
                restore_random_state(interrupted)
            yield move(distributed.share(batch), self.run.device)

    def _end_epoch(self) -> None:
        run, loop = self.run, self.loop
        for hook in loop.hooks.after_epoch:
            hook(run)
        run.epoch, self.done = run.epoch + 1, 0
        figures: dict[str, Any] = {"stage": run.stage, "epoch": run.epoch, "step": run.step}
        for name, value in loop.tally.close().items():
            figures[name] = float(distributed.mean(torch.tensor(value)))
        if run.epoch % self.train.evaluate_every == 0 or run.epoch == self.train.epochs:
            figures["validation"] = self._validate()
        self.home.add_metrics(figures)
        for watcher in self.watchers:
            watcher.epoch_done(run, figures)

    def _validate(self) -> float:
        run = self.run
        score = evaluate(run.model, run.task.validation, run.task.score, run.device)
        eligible = self.train.keep == "best" and all(m.settled(run) for m in run.methods)
        if self.best is not None and not fits(self.best["model"], run.model):
            self.best = None  # a wider network is not what the stage is to keep
        if eligible and (self.best is None or score >= self.best["score"]):
            self.best = {"score": score, "model": clone_state(run.model)}
        return score

    def _save(self) -> None:
        """Everything that another process needs to go on at this very step."""
        run, loop = self.run, self.loop
        tree = {
            "place": [run.stage, run.epoch, run.step, self.done],
            "model": model_tree(run.model),
            "optimizer": run.optimizer.state_dict() if run.optimizer else None,
            "scaler": loop.scaler.state_dict() if loop.scaler else None,
            "extras": {name: module.state_dict() for name, module in run.extras.items()},
            "players": {name: _player_state(player) for name, player in run.players.items()},
            "memories": run.memories,
            "tally": [loop.tally.sums, loop.tally.steps],
            "best": self.best,
            "random": random_state(),
        }
        self.home.save("inside", tree)
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        """Take up a checkpoint of this stage, if there is one."""
        run, loop = self.run, self.loop
        tree = self.home.load("inside")
        if tree is None or tree["place"][0] != run.stage:
            self.home.keep_metrics_until(run.stage, 0)
            return
        _, run.epoch, run.step, self.done = tree["place"]
        self.home.keep_metrics_until(run.stage, run.epoch)
        load_model_tree(run.model, tree["model"], run.optimizer)
        if run.optimizer:
            load_optimizer(run.optimizer, tree["optimizer"])
        if loop.scaler:
            loop.scaler.load_state_dict(tree["scaler"])
        for name, state in tree["extras"].items():
            run.extras[name].load_state_dict(state)
        for name, state in tree["players"].items():
            _load_player(run.players[name], state)
        run.memories.update(tree["memories"])
        loop.tally.sums, loop.tally.steps = tree["tally"]
        self.best = tree["best"]
        restore_random_state(tree["random"])


def _player_state(player: Player) -> list[Any]:
    scaler = player.scaler.state_dict() if player.scaler else None
    return [player.network.state_dict(), player.optimizer.state_dict(), scaler]


def _load_player(player: Player, state: list[Any]) -> None:
    network, optimizer, *scaler = state  # checkpoints of earlier versions have none
    player.network.load_state_dict(network)
    load_optimizer(player.optimizer, optimizer)
    if player.scaler and scaler and scaler[0]:
        player.scaler.load_state_dict(scaler[0])


def length(batches: Iterable[Any]) -> int:
    """Batches an epoch; counted by reading them once where the iterable does not say."""
    if isinstance(batches, Sized):
        return len(batches)
    return sum(1 for _ in read(batches, "the training batches"))
