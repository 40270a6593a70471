"""What holds for all tests."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator

import pytest

from lilliput.engine import outcome

# A shell starts background jobs with Ctrl-C ignored, and their children inherit that; the tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cheap_runs() -> Iterator[None]:
    """Thousands of tiny runs: no test looks at how exact their times are, and none cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "TIMED_ROUNDS", 3)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def one_reading_of_operators() -> Iterator[None]:
    """torch's exporter reads its own operators anew for each file, half of the time that a tiny one takes."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        read = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
        patch.setattr(ONNXRegistry, "from_torchlib", read)
        yield
