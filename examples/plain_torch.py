"""Distillation and sparsity in a training loop of your own: nothing but torch and ``lilliput.attach``.

python examples/plain_torch.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lilliput
from lilliput.core.task import evaluate
from lilliput.methods import Gradual, SoftTargets
from lilliput.tasks.digits import digits


def main(epochs: int = 20) -> float:
    """Train a teacher, then a sparse student of it; returns the student's accuracy in percent."""
    task = digits()
    teacher = lilliput.build("digits_cnn")
    train(teacher, task, epochs)

    student = lilliput.build("digits_cnn")
    attached = lilliput.attach(
        student,
        Gradual(sparsity=0.9),
        SoftTargets(teacher=teacher, temperature=4.0),
        steps=epochs * len(task.train),
    )
    train(student, task, epochs, attached)
    print(*attached.finish(), sep="\n")
    score = evaluate(student, task.test, task.score)
    print(f"teacher {evaluate(teacher, task.test, task.score):.2f} %, student {score:.2f} %")
    return score


def train(model: nn.Module, task, epochs: int, attached=None) -> None:
    """An ordinary loop; the lines with ``attached`` are all that a method needs."""
    parameters = attached.parameters() if attached else model.parameters()
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for epoch in range(epochs):
        task.train.reshuffle(epoch)
        for inputs, target in ((batch.inputs, batch.target) for batch in task.train):
            if attached:
                attached.batch(inputs, target)
            output = model(inputs)
            loss = cross_entropy(output, target)
            if attached:
                loss = attached.loss(loss, output)
            optimizer.zero_grad()
            loss.backward()
            if attached:
                attached.after_backward()
            optimizer.step()
            if attached:
                attached.after_step()


if __name__ == "__main__":
    main()
