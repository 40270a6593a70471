"""A network that lost channels: saved, loaded, trained on, interrupted, resumed, exported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train, artifact, io
from lilliput.core.method import Method
from lilliput.core.run import Run
from lilliput.core.select import Weight
from lilliput.core.types import Change
from lilliput.engine.progress import Watcher
from lilliput.errors import ArtifactError, CorruptArtifact, InputError, ModelMismatch
from lilliput.measure import macs, size
from lilliput.mechanisms.encodings import Codebook, Mask, encode, encoding_of
from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.surgery import cut, plan_of
from lilliput.testing import NETWORKS


class Cell(nn.Module):
    """A user's network: two branches that are concatenated, a shortcut, dropout, statistics."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.left, self.right = nn.Conv2d(width, 6, 3, padding=1), nn.Conv2d(width, 6, 1)
        self.back = nn.Conv2d(12, width, 1)
        self.head = nn.Linear(width * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        z = y + self.back(torch.cat([self.left(y), self.right(y)], 1).relu())
        answer: Tensor = self.head(nn.functional.adaptive_avg_pool2d(z, 4).flatten(1))
        return answer


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def thin(model: nn.Module, inputs: Any, seed: int = 0, optimizer: Any = None) -> None:
    """Remove a quarter of the channels of each group, at random."""
    random, groups = np.random.default_rng(seed), find_groups(model, inputs)
    removal = {
        number: np.sort(random.permutation(group.channels)[: -(-group.channels // 4)])
        for number, group in enumerate(groups.groups)
        if group.channels > 1
    }
    done = cut(model, groups, removal, inputs=inputs, optimizer=optimizer)
    assert not removal or done.error < 1e-5  # type: ignore[operator]


def thinned_cell() -> Cell:
    torch.manual_seed(0)
    cell = Cell()
    cell(torch.randn(8, 1, 8, 8))
    thin(cell.eval(), X)
    return cell


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["safetensors", "compact"])
@pytest.mark.parametrize(
    ("name", "shape"), [("lenet_5", (2, 1, 28, 28)), ("resnet20", (2, 3, 32, 32))]
)
def test_a_registered_architecture_is_loaded_by_name(
    name: str, shape: tuple[int, ...], profile: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = lilliput.build(name).eval(), torch.randn(shape)
    thin(net, x)
    settings = lilliput.ArtifactSettings(profile=profile)
    io.save(net, tmp_path / "net", settings=settings)
    loaded = lilliput.load(tmp_path / "net")
    assert torch.equal(loaded(x), net(x))
    assert plan_of(loaded) == plan_of(net)
    io.save(loaded, tmp_path / "again", settings=settings)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()
    thin(loaded, x, seed=1)  # and it can go on losing channels
    io.save(loaded, tmp_path / "thinner")
    assert torch.equal(lilliput.load(tmp_path / "thinner")(x), loaded(x))


def test_a_fresh_instance_of_a_user_s_class_is_thinned_and_filled(tmp_path: Path) -> None:
    cell = thinned_cell()
    lilliput.save(cell, tmp_path / "cell")
    loaded = lilliput.load(tmp_path / "cell", model=Cell())
    assert (
        torch.equal(loaded(X), cell(X)) and loaded.stem.out_channels == cell.stem.out_channels == 6
    )
    again = lilliput.load(tmp_path / "cell", model=copy.deepcopy(cell))  # it is thin already
    assert torch.equal(again(X), cell(X))
    with pytest.raises(InputError, match="YourNetwork"):
        lilliput.load(tmp_path / "cell")


def test_encodings_and_channels_in_one_file(tmp_path: Path) -> None:
    cell = thinned_cell()
    weight = Weight("head", cell.head, "weight")
    encode(weight, Mask(torch.rand(weight.value.shape) < 0.5))
    encode(weight, Codebook.fitted(weight.value, 3, "linear"))
    thin(cell, X, seed=2)
    lilliput.save(cell, tmp_path / "cell")
    assert torch.equal(lilliput.load(tmp_path / "cell", model=Cell())(X), cell(X))
    with artifact.open(tmp_path / "cell") as file:
        assert file.info("head.weight").levels


def test_a_recipe_s_weights_may_be_a_thinned_artifact(tmp_path: Path) -> None:
    net, x = lilliput.build("digits_cnn").eval(), torch.randn(2, 1, 8, 8)
    thin(net, x)
    lilliput.save(net, tmp_path / "net.safetensors")
    filled = io.load_weights(lilliput.build("digits_cnn"), tmp_path / "net.safetensors").eval()
    assert torch.equal(filled(x), net(x)) and plan_of(filled) == plan_of(net)


@pytest.mark.parametrize(
    "fresh", [Cell(4), Cell(16), nn.Sequential(nn.Linear(2, 2)), thinned_cell()]
)
def test_an_instance_that_does_not_fit_is_left_alone(fresh: nn.Module, tmp_path: Path) -> None:
    cell = thinned_cell()
    thin(cell, X, seed=3)
    if plan_of(fresh) is not None:  # one that lost other channels
        cell = Cell().eval()
        thin(cell, X, seed=4)
    lilliput.save(cell, tmp_path / "cell")
    before, plan = copy.deepcopy(fresh.state_dict()), plan_of(fresh)
    with pytest.raises(ModelMismatch, match="cell"):
        lilliput.load(tmp_path / "cell", model=fresh)
    after = fresh.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert plan_of(fresh) is plan


HOSTILE: dict[str, Any] = {
    "a list": [],
    "a text": "sets",
    "no sets": {"tensors": {}},
    "empty set": {"sets": ["AAAA"], "tensors": {"stem.weight": [0]}},
    "beyond the dim": {"sets": ["AAAAAAE"], "tensors": {"stem.weight": [0]}},
    "beyond memory": {"sets": ["99999999*//8"], "tensors": {"stem.weight": [0]}},
    "unknown tensor": {"sets": ["/A"], "tensors": {"none.weight": [0]}},
    "a dim too many": {"sets": ["/A"], "tensors": {"stem.bias": [None, 0]}},
    "a part only": {"sets": ["/A"], "tensors": {"stem.weight": [0]}},
    "an attribute": {"sets": [], "tensors": {}, "attributes": {"stem.kernel_size": 1}},
    "a mode": {"sets": [], "tensors": {}, "attributes": {"training": 0}},
    "a wrong width": {"sets": [], "tensors": {}, "attributes": {"stem.groups": 0}},
}


@pytest.mark.parametrize("plan", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_plan_changes_nothing(plan: Any, tmp_path: Path) -> None:
    fresh = Cell()
    artifact.write(tmp_path / "cell", io.parts(thinned_cell()), structure={"plan": plan})
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises((CorruptArtifact, ModelMismatch)) as caught:
        lilliput.load(tmp_path / "cell", model=fresh)
    assert "cell" in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in fresh.state_dict().items())
    assert fresh.stem.out_channels == 8 and plan_of(fresh) is None


@pytest.mark.parametrize("structure", [[], "plan", 3, {"plan": None}])
def test_a_structure_of_another_kind_is_no_plan(structure: Any, tmp_path: Path) -> None:
    artifact.write(tmp_path / "cell", io.parts(Cell()), structure=structure)
    lilliput.load(tmp_path / "cell", model=Cell())
    with pytest.raises((InputError, ArtifactError)):
        lilliput.load(tmp_path / "cell")


def test_the_plan_costs_few_bytes(tmp_path: Path) -> None:
    net, x = lilliput.build("lenet_5").eval(), torch.randn(2, 1, 28, 28)
    thin(net, x)
    sizes = {}
    for name in ("with", "without"):
        lilliput.save(net, tmp_path / name, settings=lilliput.ArtifactSettings(profile="compact"))
        sizes[name] = (tmp_path / name).stat().st_size
        vars(net).pop("lilliput_plan", None)
    entropy = (20 + 50 + 500) / 8  # one bit a channel can hardly be saved
    assert sizes["with"] - sizes["without"] < entropy * 4 / 3 + 80


# -- runs ---------------------------------------------------------------------------------------


class Thinner(Method):
    """Cuts when the stage begins, twice while it trains, and when it ends."""

    family: ClassVar[str] = "prune"
    moments: tuple[str, ...] = ("attach", "step", "finish")

    def _cut(self, run: Run, seed: int) -> None:
        thin(run.model, next(run.calibration(1)).inputs, seed, run.optimizer)

    def attach(self, run: Run) -> None:
        if "attach" in self.moments:
            self._cut(run, 0)

    def after_step(self, run: Run) -> None:
        if "step" in self.moments and run.step in (2, 5):
            self._cut(run, run.step)

    def finish(self, run: Run) -> list[Change]:
        if "finish" in self.moments:
            self._cut(run, 9)
        return [Change("everywhere", "channels", 1, 0)]


class Stop(Exception):
    """Ends a run as if its process had died."""


class Stopper(Watcher):
    def __init__(self, *at: tuple[int, int]) -> None:
        self.at = at

    def step_done(self, run: Run) -> None:
        if (run.stage, run.step) in self.at:
            raise Stop


def compress(directory: Path, *watchers: Watcher) -> Any:
    network = NETWORKS[1]
    train = Train(epochs=2, lr=0.01, optimizer="adam", checkpoint_minutes=1e-9)
    stages = [
        Stage(methods=[Thinner()], train=train),
        Stage(
            methods=[lilliput.methods.Magnitude(sparsity=0.5), Thinner(moments=("step",))],
            train=train,
        ),
    ]
    return lilliput.compress(
        network.build(), network.task(), stages, directory=directory, watchers=watchers
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compress(tmp_path_factory.mktemp("undisturbed") / "run")


def test_the_figures_are_those_of_the_thin_network(undisturbed: Any) -> None:
    dense = NETWORKS[1].build()
    figures, elements = undisturbed.figures, sum(p.numel() for p in dense.parameters())
    stages = [stage["parameters"] for stage in figures["stages"]]
    assert (
        elements > stages[0] > stages[1] == sum(p.numel() for p in undisturbed.model.parameters())
    )
    assert figures["dense_bytes"] == size(dense).dense_bytes
    assert figures["macs"] < macs(dense, X[:1]).total
    loaded = lilliput.load(undisturbed.artifact, model=NETWORKS[1].build())
    assert torch.equal(loaded(X), undisturbed.model(X))


@pytest.mark.parametrize("moment", [(0, 1), (0, 2), (0, 3), (0, 5), (0, 7), (1, 2), (1, 4)])
def test_an_interrupted_run_comes_to_the_same(
    moment: tuple[int, int], undisturbed: Any, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        compress(tmp_path / "run", Stopper(moment))
    again = compress(tmp_path / "run")
    for pattern in ("metrics.jsonl", "model.safetensors", "stages/*.safetensors"):
        for file in undisturbed.directory.glob(pattern):
            found = tmp_path / "run" / file.relative_to(undisturbed.directory)
            assert found.read_bytes() == file.read_bytes(), found.name
    assert again.figures["score"] == undisturbed.figures["score"]


def test_masks_hold_after_a_cut_in_the_middle_of_training(undisturbed: Any) -> None:
    last = undisturbed.figures["stages"][-1]
    weights = [layer for layer in last["layers"] if len(layer["shape"]) > 1]
    assert sum(w["nonzeros"] for w in weights) < 0.75 * sum(w["weights"] for w in weights)


def test_the_best_epoch_of_a_wider_network_is_not_put_back(tmp_path: Path) -> None:
    network = NETWORKS[1]
    train = Train(epochs=3, lr=0.01, keep="best")
    stage = Stage(methods=[Thinner(moments=("step",))], train=train)
    result = lilliput.compress(network.build(), network.task(), [stage], directory=tmp_path / "run")
    assert result.model[0].out_channels < 6


def test_a_thinned_network_can_be_compressed_further(tmp_path: Path) -> None:
    network = NETWORKS[1]
    net = network.build()
    thin(net.eval(), X)
    result = lilliput.compress(
        net, network.task(), [lilliput.methods.Magnitude(sparsity=0.5)], directory=tmp_path / "run"
    )
    assert result.figures["dense_bytes"] == size(net).dense_bytes
    assert torch.equal(lilliput.load(result.artifact, model=network.build())(X), result.model(X))


def test_a_copy_loses_channels_alone() -> None:
    cell = thinned_cell()
    weight = Weight("left", cell.left, "weight")
    encode(weight, Mask(torch.rand(weight.value.shape) < 0.5))
    answer, plan = cell(X), json.dumps(plan_of(cell).as_dict())
    other = copy.deepcopy(cell)
    thin(other, X, seed=5)
    assert torch.equal(cell(X), answer) and json.dumps(plan_of(cell).as_dict()) == plan
    assert encoding_of(weight, Mask).mask.shape == weight.value.shape


# -- elsewhere ----------------------------------------------------------------------------------


def test_it_exports_to_onnx_and_answers_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    cell = thinned_cell()
    torch.onnx.export(cell, (X,), str(tmp_path / "cell.onnx"), dynamo=True, verbose=False)
    session = runtime.InferenceSession(
        str(tmp_path / "cell.onnx"), providers=["CPUExecutionProvider"]
    )
    [answer] = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    np.testing.assert_allclose(answer, cell(X).detach().numpy(), atol=1e-5)


def test_it_compiles_to_torchscript_and_exports(tmp_path: Path) -> None:
    cell = thinned_cell()
    program = torch.export.export(cell, (X,))
    torch.testing.assert_close(program.module()(X), cell(X))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    cell = Cell().cuda().eval()
    optimizer = torch.optim.Adam(cell.parameters(), fused=True, capturable=True)
    cell(X.cuda()).sum().backward()
    optimizer.step()
    thin(cell, X.cuda(), optimizer=optimizer)
    optimizer.step()
    assert cell.stem.weight.is_cuda and cell(X.cuda()).shape == (2, 3)
    recurrent = nn.LSTM(3, 6).cuda()
    from lilliput.mechanisms.surgery import Plan, apply_plan

    rows = np.array([6 * gate + unit for gate in range(4) for unit in (0, 2, 5)])
    units = np.array([0, 2, 5])
    kept = {"weight_ih_l0": {0: rows}, "weight_hh_l0": {0: rows, 1: units}}
    apply_plan(recurrent, Plan(kept | {f"bias_{side}_l0": {0: rows} for side in ("ih", "hh")}))
    assert recurrent(torch.randn(4, 2, 3).cuda())[0].shape == (4, 2, 3)
