"""What every method must do, whatever paper it comes from.

The surprising rule: each method runs once undisturbed on each network, and most tests compare something
with that run, so they are cheap but share it. A test never changes it.
"""

from __future__ import annotations

import copy
import doctest
import functools
import importlib
import inspect
import math
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import io
from ..api import compress
from ..core import registry
from ..core.digests import weights_digest
from ..core.method import Method
from ..core.recipe import ModelSettings, Recipe, Stage, TaskSettings, Train
from ..core.run import Run
from ..core.task import call, evaluation
from ..engine.outcome import Result
from ..engine.progress import Watcher
from ..engine.recipes import load_recipe, to_yaml, validate
from ..errors import LilliputError, NothingMatched, RecipeError
from ..measure import effective_state
from ..mechanisms.encodings import describe, rebuild
from ..mechanisms.structure import apply_structure, structure_of
from .examples import registered_examples
from .networks import CLASSES, NETWORKS, TinyNetwork, networks_for

# Two epochs of four steps.
TRAIN = Train(epochs=2, lr=0.01)
#: The same with a checkpoint after every step: writing one must disturb nothing.
OFTEN = Train(epochs=2, lr=0.01, checkpoint_minutes=1e-9)


@dataclass
class Interruption(Watcher):
    """Stops a run as Ctrl-C does, after a number of steps of one stage."""

    step: int
    stage: int = 0

    def step_done(self, run: Run) -> None:
        """Stop at the step."""
        if (run.stage, run.step) == (self.stage, self.step):
            raise KeyboardInterrupt


@dataclass
class Snapshot(Watcher):
    """Copies the run's directory as a stage finds it: what a process leaves that is killed there."""

    stage: int
    home: Path
    to: Path

    def stage_begins(self, run: Run, stage: Stage) -> None:
        """Copy before the first step."""
        if run.stage == self.stage:
            shutil.copytree(self.home, self.to)


@dataclass
class Trained(Watcher):
    """Keeps hold of the network that trains, which the file must hold to the last bit."""

    run: Run | None = None

    def stage_begins(self, run: Run, stage: Stage) -> None:
        """It is the same run in every stage."""
        self.run = run

    def assert_is_in(self, result: Result) -> None:
        """What was read from the last file is what was trained; no number is none."""
        assert self.run is not None
        held, found = effective_state(self.run.model), effective_state(result.model)
        assert held.keys() == found.keys()
        assert [name for name in held if not torch.equal(held[name], found[name])] == []


@dataclass
class Inspection(Watcher):
    """Calls a function once, while the model trains."""

    look: Callable[[Run], None]
    step: int = 3
    looked: bool = False

    def step_done(self, run: Run) -> None:
        """Look at the step."""
        if run.step == self.step:
            self.look(run)
            self.looked = True


def stage_of(methods: Sequence[Method], network: TinyNetwork, train: Train = TRAIN) -> Stage:
    """A stage of two epochs; a method that grows gets a network of the same kind to fill."""
    made = (own_network(method, network) for method in methods)
    own = next((made_one for made_one in made if made_one is not None), None)
    if own is None and any(method.family == "grow" for method in methods):
        own = network.build(seed=2)
    return Stage(methods=list(methods), train=train, model=own)


def own_network(method: Method, network: TinyNetwork) -> nn.Module | None:
    """The network of its own kind that a method's stage brings; None for nearly all."""
    return type(method).example_network(math.prod(network.shape), CLASSES)


@dataclass
class Trial:
    """A method on a network: its undisturbed run, or why it refused.

    Attributes:
        method: with the settings under test.
        network: on which.
        folder: where runs may write.
    """

    method: Method
    network: TinyNetwork
    folder: Path

    @cached_property
    def outcome(self) -> Result | LilliputError:
        """The undisturbed run, or the refusal; anything else is a crash and passes through."""
        trained = Trained()
        try:
            result = self.compress("undisturbed", trained)
        except LilliputError as refusal:
            return refusal
        trained.assert_is_in(result)
        return result

    @property
    def result(self) -> Result:
        """The undisturbed run; skips the test where the method refused the network."""
        if isinstance(self.outcome, LilliputError):
            import pytest

            pytest.skip(f"refused: {self.outcome}")
        return self.outcome

    def stages(self) -> list[Stage]:
        """One stage with the method, two epochs."""
        return [stage_of([self.method], self.network, OFTEN)]

    def fresh(self) -> nn.Module:
        """A network of the kind that the stage works on, as its class builds it."""
        own = own_network(self.method, self.network)
        return self.network.build(seed=1) if own is None else own

    def compress(self, name: str, *watchers: Watcher, model: nn.Module | None = None) -> Result:
        """Run, in the folder of that name."""
        return compress(
            model if model is not None else self.network.build(),
            self.network.task(),
            self.stages(),
            directory=self.folder / name,
            watchers=watchers,
        )


class MethodContract:
    """Subclass this in a test module and say which ``methods`` are held to the contract.

    Class attributes:
        methods: instances with the settings to test.
        partners: methods of which one of each other family is combined with each of ``methods``.
        recipes: YAML files, in one of which each method must appear; None asks for none.

    Example:
        >>> from lilliput.methods import Codebook
        >>> class TestMine(MethodContract):
        ...     methods = [Codebook(bits=2)]
        ...     recipes = None
    """

    methods: ClassVar[Sequence[Method]] = ()
    partners: ClassVar[Sequence[Method] | None] = None
    recipes: ClassVar[Sequence[Path] | None] = None
    _trials: ClassVar[dict[tuple[str, str], Trial]] = {}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Hand each method, network and partner to the tests that ask for them; called by pytest."""
        wanted = metafunc.fixturenames
        if "partner" in wanted:
            pairs = self._pairs()
            names = [f"{m.method_name()}+{p.method_name()}" for m, p, _ in pairs]
            metafunc.parametrize(("method", "partner", "turn"), pairs, ids=names)
        elif "network" in wanted:
            tried = [(m, n) for m in self.methods for n in networks_for(m)]
            names = [f"{m.method_name()}-{n.name}" for m, n in tried]
            metafunc.parametrize(("method", "network"), tried, ids=names)
        elif "method" in wanted:
            metafunc.parametrize("method", self.methods, ids=_name)

    # -- what it does to a model ----------------------------------------------------------------

    def test_accepts_a_network(self, method: Method, tmp_path_factory: Any) -> None:
        """At least one of the networks is accepted."""
        networks = networks_for(method)
        outcomes = [self._trial(method, n, tmp_path_factory).outcome for n in networks]
        refusals = [str(o) for o in outcomes if isinstance(o, LilliputError)]
        assert len(refusals) < len(networks), refusals

    def test_changes_the_model(
        self, method: Method, network: TinyNetwork, tmp_path_factory: Any
    ) -> None:
        """It is changed, and each change is told."""
        trial = self._trial(method, network, tmp_path_factory)
        told = (trial.result.directory / "changes.json").read_text()
        assert not method.changes_model or f'"{method.method_name()}"' in told
        assert weights_digest(trial.result.model) != weights_digest(network.build())

    def test_same_seed_same_result(
        self, method: Method, network: TinyNetwork, tmp_path_factory: Any
    ) -> None:
        """Weights, metrics and file are the same, bit for bit; the user's own model is left alone.

        Halfway a deep copy, and a state dict in a rebuilt network, compute what the model computes, and
        what becomes of a copy changes nothing.
        """
        trial = self._trial(method, network, tmp_path_factory)
        first, model = trial.result, network.build()
        before, flags = weights_digest(model), _flags(model)
        torch.rand(7)  # the caller's generator is elsewhere by now
        inspection = Inspection(functools.partial(_copies_compute_the_same, trial))
        _same_run(first, trial.compress("again", inspection, model=model))
        assert inspection.looked
        assert weights_digest(model) == before
        assert _flags(model) == flags

    def test_resumed_is_undisturbed(
        self, method: Method, network: TinyNetwork, tmp_path_factory: Any
    ) -> None:
        """Interrupted inside each epoch and gone on with, a run ends as if nothing had been."""
        trial = self._trial(method, network, tmp_path_factory)
        first = trial.result
        for step in (2, 7):  # in the middle of the first epoch and of the last
            _interrupt(lambda step=step: trial.compress("resumed", Interruption(step)))  # type: ignore[misc]
        _same_run(first, trial.compress("resumed"))

    def test_artifact_round_trip(
        self, method: Method, network: TinyNetwork, tmp_path_factory: Any
    ) -> None:
        """The file fills a fresh network, which then gives the same logits."""
        trial = self._trial(method, network, tmp_path_factory)
        result = trial.result
        loaded = io.load(result.artifact, model=trial.fresh())
        inputs = next(iter(network.task().validation)).inputs
        assert torch.equal(_logits(loaded, inputs), _logits(result.model, inputs))

    def test_pattern_that_matches_nothing(self, method: Method, tmp_path: Path) -> None:
        """A layer pattern without a layer is an error, if the method has such a setting."""
        if "layers" in type(method).model_fields:
            nowhere = method.model_copy(update={"layers": "no_such_layer"})
            trial = Trial(nowhere, networks_for(method)[0], tmp_path)
            error = _refusal(lambda: trial.compress("nowhere"))
            assert isinstance(error, NothingMatched)
            assert "no_such_layer" in str(error)

    # -- together with others -------------------------------------------------------------------

    def test_composes(self, method: Method, partner: Method, turn: int, tmp_path: Path) -> None:
        """Together with another one: applied or refused, never a crash.

        Pairs are many, so those of two families take turns: one is in one stage, the next has a stage for
        each; two begin with the one family, two with the other; four are also resumed, four are not.
        """
        order = [method, partner] if turn // 2 % 2 else [partner, method]
        resumed = turn // 4 % 2 == 0
        if turn % 2:
            self._composes_in_one_stage(order, resumed, tmp_path)
        else:
            self._composes_in_two_stages(order, resumed, tmp_path)

    # -- how it is written and found --------------------------------------------------------------

    def test_repr_round_trip(self, method: Method) -> None:
        """``repr`` is Python that builds the same method."""
        known = vars(inspect.getmodule(type(method)))
        assert eval(repr(method), dict(known)) == method

    def test_yaml_round_trip(self, method: Method, tmp_path: Path) -> None:
        """A recipe keeps all settings."""
        file = tmp_path / "recipe.yaml"
        recipe = _recipe(method)
        file.write_text(to_yaml(recipe))
        assert load_recipe(file).stages[0].methods == [method]

    def test_unknown_setting(self, method: Method) -> None:
        """A misspelt setting is refused, and the right one named."""
        setting = max(type(method).model_fields, key=len)
        content = _recipe(method).model_dump(mode="json", exclude_defaults=True)
        content["stages"][0]["methods"][0][setting[:-1]] = 1
        error = _refusal(lambda: validate(content))
        assert isinstance(error, RecipeError)
        assert setting[:-1] in str(error)
        assert f"Did you mean '{setting}'" in str(error)

    def test_has_citation(self, method: Method) -> None:
        """The module's docstring cites a paper, with its year."""
        papers = registry.find("method", method.method_name()).papers
        assert papers
        assert all(1940 < paper.year < 2100 for paper in papers)

    def test_docstring_example_runs(self, method: Method) -> None:
        """The class's docstring has an example, and the example is true."""
        module = importlib.import_module(type(method).__module__)
        name = type(method).__name__
        found = doctest.DocTestFinder(recurse=False).find(
            type(method), name, module=module, extraglobs={"torch": torch, "nn": nn}
        )
        assert any(test.examples for test in found)
        runner = doctest.DocTestRunner(verbose=False)
        assert sum(runner.run(test).failed for test in found) == 0

    def test_recipe_uses_it(self, method: Method) -> None:
        """One of the recipes shows how it is used."""
        if self.recipes is not None:
            assert any(method.method_name() in _methods_of(path) for path in self.recipes)

    # -- helpers --------------------------------------------------------------------------------

    def _pairs(self) -> list[tuple[Method, Method, int]]:
        """Each method with one of each other family, and the pair's number among those of both families."""
        partners = registered_examples() if self.partners is None else self.partners
        pairs, met = [], Counter[str]()
        for method in self.methods:
            others = {p.family: p for p in reversed(partners) if p.family != method.family}
            for family, partner in sorted(others.items()):
                both = "+".join(sorted([method.family, family]))
                pairs.append((method, partner, _number(both) + met[both]))
                met[both] += 1
        return pairs

    def _trial(self, method: Method, network: TinyNetwork, tmp_path_factory: Any) -> Trial:
        key = (repr(method), network.name)
        if key not in self._trials:
            folder = tmp_path_factory.mktemp(f"{method.method_name()}-{network.name}")
            self._trials[key] = Trial(method, network, folder)
        return self._trials[key]

    def _composes_in_one_stage(self, order: list[Method], resumed: bool, folder: Path) -> None:
        """Whatever initializes may refuse to come second: then the other order must be accepted.

        A method with a network of its own kind need not find a partner that can do something with it.
        """
        applied = self._composed([order], folder / "first", resumed=resumed)
        if not applied and order[1].initializes:
            applied = self._composed([order[::-1]], folder / "second", resumed=resumed)
        assert applied or any(map(_is_special, order)), "every network was refused"

    def _composes_in_two_stages(self, order: list[Method], resumed: bool, folder: Path) -> None:
        applied = self._composed([[method] for method in order], folder, resumed=resumed)
        assert applied or _is_special(order[0]), "every network was refused"

    def _composed(self, parts: list[list[Method]], folder: Path, *, resumed: bool) -> bool:
        """Run stages with these methods on the first network that accepts them; say whether one did.

        Networks take turns, too. ``resumed`` also does the last stage again from where it began, interrupts
        it, and goes on; both runs must agree.
        """
        last = len(parts) - 1
        for network in _in_turn(parts):
            stages = [stage_of(methods, network) for methods in parts]
            home = folder / f"{network.name}-undisturbed"
            again = folder / f"{network.name}-resumed"

            def run(
                directory: Path,
                *watchers: Watcher,
                network: TinyNetwork = network,
                stages: Sequence[Stage] = stages,
            ) -> Result:
                return compress(
                    network.build(), network.task(), stages, directory=directory, watchers=watchers
                )

            trained = Trained()
            try:
                undisturbed = run(
                    home, trained, *([Snapshot(last, home, again)] if resumed else [])
                )
            except LilliputError:
                continue
            trained.assert_is_in(undisturbed)
            if resumed:
                _interrupt(lambda run=run, again=again: run(again, Interruption(3, last)))  # type: ignore[misc]
                _same_run(undisturbed, run(again))
            return True
        return False


def _number(text: str) -> int:
    """A number that is always the same for the same text."""
    return zlib.crc32(text.encode())


def _in_turn(parts: list[list[Method]]) -> list[TinyNetwork]:
    """The networks that the methods know, beginning with another one for another combination."""
    methods = [method for methods in parts for method in methods]
    networks = networks_for(*methods)
    names = "+".join(method.method_name() for method in methods)
    first = (_number(names) + len(parts)) % len(networks)
    return [*networks[first:], *networks[:first]]


@functools.cache
def _methods_of(path: Path) -> set[str]:
    """The names of the methods that a recipe uses."""
    return {m.method_name() for stage in load_recipe(path).stages for m in stage.methods}


def _is_special(method: Method) -> bool:
    """Whether the method works on a network of its own kind only."""
    return own_network(method, NETWORKS[0]) is not None


def _name(method: Method) -> str:
    return method.method_name()


def _refusal(attempt: Callable[[], Any]) -> Exception:
    try:
        attempt()
    except Exception as error:
        return error
    raise AssertionError("nothing was refused")


def _interrupt(attempt: Callable[[], Any]) -> None:
    try:
        attempt()
    except KeyboardInterrupt:
        return
    raise AssertionError("the run ended before it could be interrupted")


def _same_run(first: Result, second: Result) -> None:
    """Weights, metrics, changes and file agree, bit for bit."""
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    for file in ("metrics.jsonl", "changes.json", "model.safetensors"):
        assert (first.directory / file).read_bytes() == (second.directory / file).read_bytes(), file


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad(), evaluation(model):
        logits: Tensor = call(model, inputs)
        return logits


def _flags(model: nn.Module) -> list[tuple[bool, ...]]:
    return [(m.training, *(p.requires_grad for p in m.parameters())) for m in model.modules()]


def _copies_compute_the_same(trial: Trial, run: Run) -> None:
    inputs = next(iter(trial.network.task().validation)).inputs
    expected = _logits(run.model, inputs)
    rebuilt = trial.fresh()
    apply_structure(rebuilt, structure_of(run.model))
    rebuild(rebuilt, describe(run.model))
    rebuilt.load_state_dict(run.model.state_dict())
    copied = copy.deepcopy(run.model)
    assert torch.equal(_logits(rebuilt, inputs), expected)
    assert torch.equal(_logits(copied, inputs), expected)
    _disturb(copied)
    assert torch.equal(_logits(run.model, inputs), expected)


@torch.no_grad()
def _disturb(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(1.0)


def _recipe(method: Method) -> Recipe:
    return Recipe(
        task=TaskSettings(name="digits"),
        model=ModelSettings(architecture="lenet_300_100"),
        stages=[Stage(methods=[method], train=Train(epochs=1))],
    )
