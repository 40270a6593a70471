"""A smaller transformer learns from a larger one inside the Hugging Face Trainer.

python examples/hugging_face_trainer.py

Needs ``transformers`` and ``accelerate``. The networks are small, with random weights, and the task is
made up: does a sequence hold more small than large tokens? So nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import lilliput
from lilliput.methods import Gradual, SoftTargets

TOKENS, LENGTH = 40, 12


class Attached(TrainerCallback):
    """Calls what the methods do before and after a step of the optimizer."""

    def __init__(self, attached: Any) -> None:
        self.attached = attached

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.attached.after_backward()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.attached.after_step()


class DistillingTrainer(Trainer):
    """The Trainer with the methods' loss; one forward pass a step, no gradient accumulation."""

    def __init__(self, *args: Any, attached: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attached = attached
        if attached is not None:
            self.add_callback(Attached(attached))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The model's own loss, as the methods weigh it, and their terms."""
        labels = inputs["labels"]
        features = {name: value for name, value in inputs.items() if name != "labels"}
        if self.attached is not None and model.training:
            self.attached.batch(features, labels)
            output = model(**inputs)
            loss = self.attached.loss(output.loss, output.logits)
        else:
            output = model(**inputs)
            loss = output.loss
        return (loss, output) if return_outputs else loss


def network(hidden: int, layers: int) -> BertForSequenceClassification:
    """A BERT with random weights."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=TOKENS, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=2 * hidden, max_position_embeddings=LENGTH, num_labels=2,
        )
    )  # fmt: skip


def samples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences and whether most of their tokens are small."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(TOKENS, (count, LENGTH), generator=generator)
    labels = ((tokens < TOKENS // 2).sum(1) > LENGTH // 2).long()
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def train(model: Any, steps: int, attached: Any = None) -> float:
    """Train, and return the accuracy on other samples in percent."""
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=32,
        learning_rate=2e-3, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        logging_strategy="no", seed=0,
    )  # fmt: skip
    trainer = DistillingTrainer(
        model=model, args=settings, train_dataset=samples(2000, 0), attached=attached
    )
    trainer.train()
    told = trainer.predict(samples(500, 1))
    return 100 * float((told.predictions.argmax(1) == told.label_ids).mean())


def main(steps: int = 250) -> float:
    """Train a teacher, then a sparse student of it; returns the student's accuracy in percent."""
    torch.manual_seed(0)
    teacher, student = network(32, 2), network(32, 1)
    taught = train(teacher, steps)
    attached = lilliput.attach(
        student,
        Gradual(sparsity=0.5, layers="bert.encoder.*"),
        SoftTargets(teacher=teacher, temperature=2.0),
        steps=steps,
    )
    score = train(student, steps, attached)
    print(*attached.finish(), sep="\n")
    print(f"teacher {taught:.1f} %, student {score:.1f} %")
    return score


if __name__ == "__main__":
    main()
