"""The two operators of an exported network that torch does not have, and how ONNX says them.

The surprising rule: in torch they compute what a runtime computes, so an exported program can be checked
before any runtime sees it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingDependency


@torch.library.custom_op("lilliput::quantized", mutates_args=())
def quantized(inputs: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """The nearest unsigned bytes, back as real numbers."""
    integers = ((inputs / step).round() + zero).clamp(0, 255)
    return (integers - zero) * step


@torch.library.custom_op("lilliput::stored", mutates_args=())
def stored(integers: Tensor, steps: Tensor, axis: int) -> Tensor:
    """Signed integers times a step for each index of one dim."""
    return integers.to(steps) * steps.view([-1 if d == axis else 1 for d in range(integers.ndim)])


@quantized.register_fake
def _(inputs: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(inputs)


@stored.register_fake
def _(integers: Tensor, steps: Tensor, axis: int) -> Tensor:
    return torch.empty_like(integers, dtype=steps.dtype)


@functools.cache
def translations() -> dict[Any, Callable[..., Any]]:
    """What each of them is in ONNX."""
    from onnxscript import opset20 as op

    def pair(inputs: Any, step: Any, zero: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(inputs, step, zero), step, zero)

    def constant(integers: Any, steps: Any, axis: int) -> Any:
        return op.DequantizeLinear(integers, steps, axis=axis)

    operators = torch.ops.lilliput
    return {operators.quantized.default: pair, operators.stored.default: constant}


def require(*packages: str) -> None:
    """Raise early where a package is missing.

    Raises:
        MissingDependency: it is.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(package, "onnx", "writing and running ONNX files")


def replace_file(path: Path, write: Callable[[str], object]) -> int:
    """Write into a folder beside, and move: the file is replaced whole or not at all.

    The name stays the same, since large networks have their weights in a second file, named after the
    first, which names it in turn. The first is moved last.

    Returns:
        The bytes of all files that were written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        write(str(Path(folder) / path.name))
        made = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
        size = sum(file.stat().st_size for file in made)
        for file in made:
            file.replace(path.with_name(file.name))
    return size


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the exporter's own remarks to itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def cause(error: BaseException) -> str:
    """The innermost reason, in one line: the exporter wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
