"""What a training step costs in the engine, against the same step written by hand.

    python benchmarks/step_cost.py            # prints the table, writes results/step_cost.json

Both sides read the same kind of batches, use the same optimizer and do the same mathematics. They take turns,
step by step, and the figure is the ratio of the medians of process CPU time, on one thread.
The data are random: their values do not change the cost.

Soft targets also stand beside a step of torchdistill 1.1.5, its distillation box and its loss on our batches,
where that package is installed (``pip install --no-deps torchdistill==1.1.5``; it imports torchvision).
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput.core.recipe import Train
from lilliput.core.run import Run
from lilliput.core.task import Task, accuracy
from lilliput.core.types import Batch
from lilliput.engine.records import RunDirectory, environment
from lilliput.engine.training import Training
from lilliput.mechanisms.encodings import Codebook as Shared
from lilliput.methods import Attention, Codebook, Gradual, SoftTargets
from lilliput.tasks._arrays import ArrayBatches
from lilliput.testing import stand_in_for_torchvision

Step = Callable[[], None]

#: Where a network's feature maps are watched.
PLACES = {"resnet20": ("layer2", "layer3")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/step_cost.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for name, shape, steps in (
        ("lenet_300_100", (1, 28, 28), options.steps * 4),
        ("lenet_5", (1, 28, 28), options.steps),
        ("resnet20", (3, 32, 32), max(10, options.steps // 5)),
    ):
        for case, engine, hand in cases(name, shape):
            ratio = compare(engine, hand, steps)
            rows.append({"network": name, "case": case, "ratio": ratio, "steps": steps})
            print(f"{name:14} {case:38} {ratio:.3f}", flush=True)
    options.out.write_text(
        json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n"
    )


def keep_freed_memory() -> None:
    """Let glibc give no memory back to the system.

    Else it is chance whether one side returns and fetches its activations anew at every step, which
    moved the ratios of LeNet-5 by up to 0.17.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest value


def cases(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Step, Step]]:
    network = lilliput.build(name)
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    data = batches(shape)
    yield "plain", engine_step(network, data, []), plain(network, data)
    soft = SoftTargets(teacher="original", temperature=4.0)
    live = taught(network, data, lambda batch: teacher(batch.inputs))
    yield "soft_targets", engine_step(network, data, [soft]), live
    if importlib.util.find_spec("torchdistill"):
        theirs = torchdistilled(network, teacher, data)
        yield "soft_targets / torchdistill", engine_step(network, data, [soft]), theirs
    cached = SoftTargets(teacher="original", temperature=4.0, cache=True)
    # By hand the outputs lie in memory, and nothing checks that they belong to the samples.
    outputs = torch.randn(data.samples, 10).half()
    table = taught(network, data, lambda batch: outputs.index_select(0, batch.index).float())
    yield "cached soft_targets / by hand", engine_step(network, data, [cached]), table
    alone = plain(network, data)
    yield "cached soft_targets / student only", engine_step(network, data, [cached]), alone
    if name in PLACES:
        maps = Attention(pairs=list(PLACES[name]), teacher="original")
        by_hand = attentive(network, teacher, data, PLACES[name])
        yield "attention at two places / by hand", engine_step(network, data, [maps]), by_hand
    masks = Gradual(sparsity=0.9, schedule={"shape": "constant"}, remove_dead=False)
    pruned = prune(network)
    yield "masks / by hand", engine_step(pruned, data, [masks]), masked(pruned, data)
    both = [masks, Codebook(bits=5)]
    yield "masks and codebooks / by hand", engine_step(pruned, data, both), shared(pruned, data)
    yield "masks and codebooks / plain", engine_step(pruned, data, both), plain(network, data)


def batches(shape: tuple[int, ...]) -> ArrayBatches:
    inputs, labels = torch.randn(12_800, *shape), torch.randint(0, 10, (12_800,))
    return ArrayBatches(inputs, labels, 128, shuffle=True)


def engine_step(network: nn.Module, data: ArrayBatches, methods: list[Any]) -> Step:
    """One step of the engine, batch and all."""
    home = Path(tempfile.mkdtemp())
    task = Task(data, data, None, F.cross_entropy, accuracy)
    run = Run(
        model=copy.deepcopy(network),
        task=task,
        original=copy.deepcopy(network).eval().requires_grad_(False),
        methods=[method.model_copy() for method in methods],
        total_steps=10**6,
        directory=home,
    )
    for method in run.methods:
        method.attach(run)
    training = Training(run, Train(epochs=10_000, lr=1e-3), RunDirectory(home / "run", {}))
    stream = itertools.chain.from_iterable(training._rest(None) for _ in itertools.count())
    return lambda: training.loop.step(next(stream))


def plain(network: nn.Module, data: ArrayBatches) -> Step:
    network = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    stream = endless(data)

    def step() -> None:
        batch = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(network(batch.inputs), batch.target).backward()
        optimizer.step()

    return step


def taught(network: nn.Module, data: ArrayBatches, logits: Callable[[Batch], Tensor]) -> Step:
    """Soft targets by hand, from the teacher's logits of a batch."""
    network = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    stream = endless(data)

    def step() -> None:
        batch = next(stream)
        optimizer.zero_grad()
        with torch.no_grad():
            target = F.log_softmax(logits(batch) / 4, dim=1)
        output = network(batch.inputs)
        soft = F.kl_div(
            F.log_softmax(output / 4, dim=1), target, reduction="batchmean", log_target=True
        )
        (0.5 * F.cross_entropy(output, batch.target) + 0.5 * 16 * soft).backward()
        optimizer.step()

    return step


def torchdistilled(network: nn.Module, teacher: nn.Module, data: ArrayBatches) -> Step:
    """Soft targets by torchdistill: its box runs both networks, its loss compares them."""
    stand_in_for_torchvision()  # which torchdistill imports, and which may not fit this torch
    from torchdistill.core.distillation import DistillationBox

    device = torch.device("cpu")
    both = (copy.deepcopy(teacher), copy.deepcopy(network))
    box = DistillationBox(*both, {}, torchdistill_settings(), device, None, False, 1.0)
    box.pre_epoch_process(epoch=0)
    stream = endless(data)

    def step() -> None:
        batch = next(stream)
        box.post_forward_process(box.forward_process(batch.inputs, batch.target, {}))

    return step


def torchdistill_settings() -> dict[str, Any]:
    """The loss and the optimizer of :func:`taught`, in torchdistill's words."""
    outputs = {f"{who}_module_path": "." for who in ("student", "teacher")}
    outputs |= {f"{who}_module_io": "output" for who in ("student", "teacher")}
    loss = {"key": "KDLoss", "kwargs": {**outputs, "temperature": 4.0, "alpha": 0.5}}
    terms = {"soft_targets": {"criterion": loss, "weight": 1.0}}
    return {
        "num_epochs": 1,
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"forward_proc": "forward_batch_only"},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        "optimizer": {"key": "Adam", "kwargs": {"lr": 1e-3, "fused": True}},
    }


def attentive(
    network: nn.Module, teacher: nn.Module, data: ArrayBatches, places: tuple[str, ...]
) -> Step:
    """Attention transfer by hand: hooks keep the feature maps of both networks."""
    network, teacher = copy.deepcopy(network), copy.deepcopy(teacher)
    own, taught = watched(network, places), watched(teacher, places)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    stream = endless(data)

    def step() -> None:
        batch = next(stream)
        optimizer.zero_grad()
        with torch.no_grad():
            teacher(batch.inputs)
        output = network(batch.inputs)
        apart = [unit_map(own[p]) - unit_map(taught[p]) for p in places]
        losses = torch.stack([torch.linalg.vector_norm(a, dim=1).mean() for a in apart])
        (F.cross_entropy(output, batch.target) + 0.5 * losses.sum()).backward()
        optimizer.step()

    return step


def watched(network: nn.Module, places: tuple[str, ...]) -> dict[str, Tensor]:
    """What the modules of these names returned last."""
    seen: dict[str, Tensor] = {}
    for place in places:
        network.get_submodule(place).register_forward_hook(
            lambda module, inputs, output, place=place: seen.__setitem__(place, output)
        )
    return seen


def unit_map(feature: Tensor) -> Tensor:
    return F.normalize(feature.square().sum(1).flatten(1), dim=1)


def masked(network: nn.Module, data: ArrayBatches) -> Step:
    network = copy.deepcopy(network)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    masks = [(p != 0).float() for p in matrices]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    stream = endless(data)

    def step() -> None:
        batch = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(network(batch.inputs), batch.target).backward()
        optimizer.step()
        with torch.no_grad():
            for matrix, mask in zip(matrices, masks, strict=True):
                matrix.mul_(mask)

    return step


def shared(network: nn.Module, data: ArrayBatches) -> Step:
    """Shared values by hand: dense weights are rebuilt from centroids, gradients are summed."""
    network = copy.deepcopy(network)
    matrices = {n: p for n, p in network.named_parameters() if p.ndim > 1}
    tables = {n: Shared.fitted(p, 5, "exact") for n, p in matrices.items()}
    members = {n: t.members() for n, t in tables.items()}
    centroids = {n: nn.Parameter(t.start.clone()) for n, t in tables.items()}
    others = [p for p in network.parameters() if p.ndim == 1]
    optimizer = torch.optim.Adam([*others, *centroids.values()], lr=1e-3, fused=True)
    stream = endless(data)

    def step() -> None:
        batch = next(stream)
        optimizer.zero_grad()
        with torch.no_grad():
            for name, matrix in matrices.items():
                codes, places = members[name]
                matrix.grad = None
                flat = matrix.view(-1)
                flat.copy_(centroids[name][codes]) if places is None else flat.index_copy_(
                    0, places, centroids[name][codes]
                )
        F.cross_entropy(network(batch.inputs), batch.target).backward()
        for name, matrix in matrices.items():
            assert matrix.grad is not None
            centroids[name].grad = summed(matrix.grad, centroids[name], *members[name])
        optimizer.step()

    return step


def summed(grad: Tensor, centroids: Tensor, codes: Tensor, places: Tensor | None) -> Tensor:
    flat = grad.view(-1) if places is None else grad.view(-1)[places]
    return torch.zeros_like(centroids).index_add_(0, codes, flat)


def prune(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(
                    parameter.abs() >= parameter.abs().quantile(0.9)
                    if parameter.numel() < 10**6
                    else parameter.abs() >= parameter.abs().median()
                )
    return network


def endless(data: ArrayBatches) -> Iterator[Any]:
    return itertools.chain.from_iterable(iter(data) for _ in itertools.count())


def compare(engine: Step, hand: Step, steps: int) -> float:
    """The ratio of the medians of CPU time, the two taking turns."""
    times: dict[Step, list[int]] = {engine: [], hand: []}
    for number in range(steps + 5):
        for step in (engine, hand) if number % 2 else (hand, engine):
            begin = time.process_time_ns()
            step()
            if number >= 5:
                times[step].append(time.process_time_ns() - begin)
    return median(times[engine]) / median(times[hand])


if __name__ == "__main__":
    main()
