"""The catalogue, and what it knows without importing anything."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

import lilliput
from lilliput.core import registry
from lilliput.core.method import Method, overrides
from lilliput.errors import InputError, UnknownName, did_you_mean


def test_shipped_methods_have_family_summary_and_paper() -> None:
    for name, entry in registry.entries("method").items():
        if entry.module.startswith("lilliput."):
            assert entry.load().method_name() == name
            assert entry.load().family == entry.family
            assert entry.summary.endswith(".")
            assert entry.papers


def test_papers_are_read_from_the_docstring() -> None:
    (paper,) = registry.find("method", "magnitude").papers
    assert (paper.year, paper.link) == (2015, "arXiv 1506.02626")
    assert paper.title.startswith("Learning both Weights and Connections")
    assert str(paper).startswith("Han, Pool, Tran, Dally: Learning both")


def test_listing_imports_neither_torch_nor_a_method() -> None:
    program = (
        "import sys; from lilliput.core import registry; "
        "[registry.entries(k) for k in registry.KINDS]; "
        "assert 'torch' not in sys.modules; assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_unknown_names(kind: str) -> None:
    with pytest.raises(UnknownName, match=f"no {kind} is named 'zebra'"):
        registry.find(kind, "zebra")


def test_unknown_kind() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'method'"):
        registry.entries("methods")


def test_own_method_is_registered_and_usable_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_announced", {})

    class MyOwnTrick(Method):
        """Does a trick."""

        family = "prune"

    monkeypatch.setattr(sys.modules[__name__], "MyOwnTrick", MyOwnTrick, raising=False)
    registry.method(MyOwnTrick)
    entry = registry.find("method", "my_own_trick")
    assert (entry.family, entry.summary) == ("prune", "Does a trick.")
    stage = lilliput.Stage(methods=[{"method": "my_own_trick"}])
    assert isinstance(stage.methods[0], MyOwnTrick)


def test_own_architecture_remembers_how_it_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_announced", {})

    @registry.architecture
    def my_net(width: int = 3) -> nn.Module:
        return nn.Linear(width, 2)

    assert my_net(5).lilliput_origin == {"architecture": "my_net", "arguments": {"width": 5}}
    assert "my_net" in registry.entries("architecture")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("torch.nn", "should have the form"),
        ("no_such_module_here:thing", "cannot import 'no_such_module_here'"),
        ("torch.nn:Linaer", "has no 'Linaer'"),
    ],
)
def test_references_to_objects(reference: str, message: str) -> None:
    assert registry.import_object("torch.nn:Linear") is nn.Linear
    with pytest.raises(InputError, match=message):
        registry.import_object(reference)


def test_hooks_that_a_method_has() -> None:
    method = lilliput.methods.SoftTargets()
    assert overrides(method, "loss")
    assert not overrides(method, "drive")


def test_nearest_names() -> None:
    assert did_you_mean("sparcity", ["sparsity", "layers"]) == " Did you mean 'sparsity'?"
    assert did_you_mean("x", ["one", "two"]) == " Known: one, two."
    assert did_you_mean("x", []) == ""
    assert did_you_mean("x", [f"n{i}" for i in range(20)]).endswith(", ….")
