"""Attention transfer and soft targets inside a Lightning module.

python examples/lightning_module.py

Needs ``lightning``.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lilliput
from lilliput.core.task import evaluate
from lilliput.methods import SoftTargets
from lilliput.tasks.digits import digits


class Student(lightning.LightningModule):
    """An ordinary module; the lines with ``attached`` are all that the methods need.

    Args:
        network: learns.
        attached: the methods on it, or None.
    """

    def __init__(self, network: nn.Module, attached: Any = None) -> None:
        super().__init__()
        self.network = network
        # In a list, so that Lightning does not take the teacher for a part of this module.
        self.methods = [] if attached is None else [attached]

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        """The loss of a batch, as the methods weigh it."""
        inputs, target = batch
        for attached in self.methods:
            attached.batch(inputs, target)
        output = self.network(inputs)
        loss = cross_entropy(output, target)
        for attached in self.methods:
            loss = attached.loss(loss, output)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """The gradients are there."""
        for attached in self.methods:
            attached.after_backward()

    def on_train_batch_end(self, *args: Any) -> None:
        """The optimizer has moved."""
        for attached in self.methods:
            attached.after_step()

    def configure_optimizers(self) -> Any:
        """Over what the methods want trained, adapters included."""
        found = [p for attached in self.methods for p in attached.parameters()]
        return torch.optim.Adam(found or self.network.parameters(), lr=2e-3)


def fit(module: Student, loader: Any, epochs: int) -> None:
    """Train without checkpoints and logs."""
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():  # about the number of workers, which data in memory do not need
        warnings.simplefilter("ignore")
        trainer.fit(module, loader)


def main(epochs: int = 20) -> float:
    """Train a teacher, then a student of it; returns the student's accuracy in percent."""
    torch.manual_seed(0)
    task = digits()
    loader = DataLoader(TensorDataset(task.train.inputs, task.train.target), 128, shuffle=True)
    teacher, student = lilliput.build("digits_cnn"), lilliput.build("digits_cnn")
    fit(Student(teacher), loader, epochs)
    attached = lilliput.attach(
        student,
        SoftTargets(teacher=teacher, temperature=4.0),
        steps=epochs * len(loader),
        example_inputs=task.example_inputs(),
    )
    fit(Student(student, attached), loader, epochs)
    attached.finish()
    score = evaluate(student, task.test, task.score)
    print(f"teacher {evaluate(teacher, task.test, task.score):.2f} %, student {score:.2f} %")
    return score


if __name__ == "__main__":
    main()
