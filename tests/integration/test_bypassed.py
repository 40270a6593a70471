"""A network that lost whole blocks: saved, loaded, trained on, interrupted, resumed, exported."""

from __future__ import annotations

import copy
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
from lilliput.errors import CorruptArtifact, InputError, ModelMismatch
from lilliput.measure import macs, size
from lilliput.mechanisms.encodings import Codebook, Mask, encode
from lilliput.mechanisms.groups import find_groups
from lilliput.mechanisms.surgery import bypass, cut, plan_of
from lilliput.testing import NETWORKS


class Block(nn.Module):
    """Two convolutions with batch normalization, and a path around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.norm_a = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.b, self.norm_b = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))))


class Residual(nn.Module):
    """A user's network with three blocks."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))
        return answer


X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def residual() -> Residual:
    torch.manual_seed(0)
    net = Residual()
    net(torch.randn(8, 1, 8, 8))  # statistics that are not the identity
    return net.eval()


def remove(model: Any, number: int, optimizer: Any = None) -> None:
    """Make a block an identity, and take it away."""
    norm = model.blocks[number].norm_b
    norm.weight.data.zero_()
    norm.bias.data.zero_()
    done = bypass(model, f"blocks.{number}", X, optimizer=optimizer)
    assert done.error == 0.0


def thin(model: nn.Module, inputs: Tensor = X) -> None:
    groups = find_groups(model, inputs)
    cut(model, groups, {n: np.array([0]) for n in range(len(groups.groups))}, inputs=inputs)


def bypassed() -> Residual:
    net = residual()
    remove(net, 1)
    return net


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["safetensors", "compact"])
def test_a_registered_architecture_is_loaded_by_name(profile: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net: Any = lilliput.build("resnet20").eval()
    net.layer1[2].bn2.weight.data.zero_()
    x = torch.randn(2, 3, 32, 32)
    answer, wide = net(x), size(net).parameters
    bypass(net, "layer1.2", x)
    settings = lilliput.ArtifactSettings(profile=profile)
    io.save(net, tmp_path / "net", settings=settings)
    loaded: Any = lilliput.load(tmp_path / "net")
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(loaded(x), answer)
    assert type(loaded.layer1[2]) is nn.Identity
    assert size(loaded).parameters == wide - 4672
    assert plan_of(loaded) == plan_of(net)
    io.save(loaded, tmp_path / "again", settings=settings)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()


def test_a_fresh_instance_of_a_user_s_class_loses_the_blocks_and_is_filled(tmp_path: Path) -> None:
    net = bypassed()
    thin(net)
    remove(net, 0)
    lilliput.save(net, tmp_path / "net")
    for fresh in (Residual(), bypassed(), copy.deepcopy(net)):
        loaded: Any = lilliput.load(tmp_path / "net", model=fresh)
        assert torch.equal(loaded(X), net(X))
        assert [type(b) for b in loaded.blocks] == [nn.Identity, nn.Identity, Block]
        assert plan_of(loaded) == plan_of(net)
    with pytest.raises(InputError, match="YourNetwork"):
        lilliput.load(tmp_path / "net")
    filled = io.load_weights(Residual(), _named(tmp_path / "net")).eval()
    assert torch.equal(filled(X), net(X))


def _named(path: Path) -> Path:
    return path.rename(path.with_suffix(".safetensors"))


def test_an_instance_that_does_not_fit_is_left_alone(tmp_path: Path) -> None:
    lilliput.save(bypassed(), tmp_path / "net")
    other = residual()
    remove(other, 2)
    for fresh in (other, Residual(4), nn.Sequential(nn.Linear(2, 2))):
        before, plan = copy.deepcopy(fresh.state_dict()), plan_of(fresh)
        with pytest.raises(ModelMismatch, match="net"):
            lilliput.load(tmp_path / "net", model=fresh)
        after = fresh.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert plan_of(fresh) is plan


HOSTILE: dict[str, Any] = {
    "a text": "blocks.1",
    "the network": [""],
    "no module": ["blocks.1.a.weight"],
    "a method": ["forward"],
    "twice": ["blocks.1", "blocks.1"],
    "too much": ["blocks.1", "head"],
    "inside of each other": ["blocks", "blocks.1"],
    "another one": ["blocks.0"],
}


@pytest.mark.parametrize("removed", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_plan_changes_nothing(removed: Any, tmp_path: Path) -> None:
    plan = {"sets": [], "tensors": {}, "removed": removed}
    artifact.write(tmp_path / "net", io.parts(bypassed()), structure={"plan": plan})
    fresh = Residual()
    before, modules = copy.deepcopy(fresh.state_dict()), list(fresh.modules())
    with pytest.raises((CorruptArtifact, ModelMismatch)) as caught:
        lilliput.load(tmp_path / "net", model=fresh)
    assert "net" in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in fresh.state_dict().items())
    assert all(a is b for a, b in zip(fresh.modules(), modules, strict=True))
    assert plan_of(fresh) is None


def test_a_part_that_was_cut_alone_is_not_saved(tmp_path: Path) -> None:
    """What loading would refuse is said while the network can still be saved otherwise."""
    net = residual()
    parent = nn.Sequential(net, nn.Linear(3, 3))
    thin(parent)
    lilliput.save(parent, tmp_path / "before")
    remove(net, 1)
    with pytest.raises(ModelMismatch, match=r"0\.blocks\.1.* could not be loaded.* save the part"):
        lilliput.save(parent, tmp_path / "after")
    assert not (tmp_path / "after").exists()
    plain = residual()
    thin(plain)
    thin(plain.blocks[0], torch.randn(2, 5, 8, 8))
    with pytest.raises(ModelMismatch, match=r"blocks\.0\..*on its own"):
        lilliput.save(plain, tmp_path / "after")
    lilliput.save(nn.Sequential(bypassed(), nn.Linear(3, 3)), tmp_path / "part")  # cut before


# -- runs ---------------------------------------------------------------------------------------


class Remover(Method):
    """Takes a block away in the middle of training, and another one at the end."""

    family: ClassVar[str] = "prune"

    def after_step(self, run: Run) -> None:
        if run.step == 3:
            remove(run.model, 1, run.optimizer)

    def finish(self, run: Run) -> list[Change]:
        remove(run.model, 2, run.optimizer)
        return [Change("blocks", "block", 3, 1)]


class Stop(Exception):
    """Ends a run as if its process had died."""


class Stopper(Watcher):
    def __init__(self, *at: tuple[int, int]) -> None:
        self.at = at

    def step_done(self, run: Run) -> None:
        if (run.stage, run.step) in self.at:
            raise Stop


def compress(directory: Path, *watchers: Watcher) -> Any:
    train = Train(epochs=2, lr=0.01, optimizer="adam", checkpoint_minutes=1e-9)
    methods = lilliput.methods
    stages = [
        Stage(methods=[Remover(), methods.Magnitude(sparsity=0.5)], train=train),
        Stage(methods=[methods.Codebook(bits=3)], train=train),
    ]
    return lilliput.compress(
        residual().train(), NETWORKS[1].task(), stages, directory=directory, watchers=watchers
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compress(tmp_path_factory.mktemp("undisturbed") / "run")


def test_the_file_holds_what_is_left(undisturbed: Any) -> None:
    assert [type(b) for b in undisturbed.model.blocks] == [Block, nn.Identity, nn.Identity]
    figures, dense = undisturbed.figures, residual()
    assert figures["parameters"] == size(dense).parameters - 2 * size(dense.blocks[1]).parameters
    assert figures["macs"] < macs(dense, X[:1]).total / 2
    assert (undisturbed.model.blocks[0].a.weight == 0).float().mean() > 0.4
    loaded = lilliput.load(undisturbed.artifact, model=Residual())
    assert torch.equal(loaded(X), undisturbed.model(X))


@pytest.mark.parametrize("moment", [(0, 1), (0, 2), (0, 3), (0, 4), (0, 7), (1, 2)])
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


def test_masks_and_shared_values_of_the_other_blocks_survive(tmp_path: Path) -> None:
    net = residual()
    for number in (0, 1):
        weight = Weight(f"blocks.{number}.a", net.blocks[number].a, "weight")
        encode(weight, Mask(torch.rand(weight.value.shape) < 0.5))
        encode(weight, Codebook.fitted(weight.value, 3, "linear"))
    remove(net, 1)
    lilliput.save(net, tmp_path / "net")
    assert torch.equal(lilliput.load(tmp_path / "net", model=Residual())(X), net(X))
    with artifact.open(tmp_path / "net") as file:
        assert file.info("blocks.0.a.weight").levels
        assert not any(name.startswith("blocks.1") for name in file.names())


def test_a_copy_loses_blocks_alone() -> None:
    net = bypassed()
    answer, plan = net(X), plan_of(net)
    other = copy.deepcopy(net)
    remove(other, 0)
    assert torch.equal(net(X), answer)
    assert plan_of(net) == plan
    assert plan_of(other).removed == ("blocks.0", "blocks.1")


# -- elsewhere ----------------------------------------------------------------------------------


def test_it_exports_to_onnx_and_answers_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = str(tmp_path / "net.onnx")
    net = bypassed()
    torch.onnx.export(net, (X,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [answer] = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    np.testing.assert_allclose(answer, net(X).detach().numpy(), atol=1e-5)
    convolutions = [n for n in onnx.load(path).graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 5


def test_it_exports_to_a_program() -> None:
    net = bypassed()
    torch.testing.assert_close(torch.export.export(net, (X,)).module()(X), net(X))
