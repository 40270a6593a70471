"""Everything wrong that can be handed over in Python: a clear error, and nothing lost or half done."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import ArtifactSettings, Stage, Task, Train
from lilliput.core.digests import weights_digest
from lilliput.core.run import Run
from lilliput.core.task import accuracy
from lilliput.engine.checkpoint import load_tree
from lilliput.engine.progress import Watcher
from lilliput.engine.recipes import validate
from lilliput.engine.records import RunDirectory
from lilliput.errors import (
    ArtifactError,
    CorruptArtifact,
    Diverged,
    EmptyData,
    InputError,
    LilliputError,
    ModelMismatch,
    NothingChanged,
    NothingMatched,
    RecipeError,
    RunConflict,
    RunError,
    UnknownName,
)
from lilliput.methods import Codebook, Gradual, Magnitude, SoftTargets
from lilliput.testing import NETWORKS

MLP, CNN, _ = NETWORKS
Content = dict[str, Any]


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """A user's model; whatever the test does, it must be as it was afterwards."""
    network = MLP.build()
    before, flags = weights_digest(network), [m.training for m in network.modules()]
    names = list(network.state_dict())
    yield network
    assert weights_digest(network) == before
    assert [m.training for m in network.modules()] == flags
    assert list(network.state_dict()) == names
    assert all(p.requires_grad for p in network.parameters())


def changed_task(**parts: Any) -> Task:
    task = MLP.task()
    for name, value in parts.items():
        setattr(task, name, value)
    return task


def trained(*methods: Any, **train: Any) -> Stage:
    return Stage(methods=list(methods), train=Train(**{"epochs": 1, **train}))


def content(**method: Any) -> Content:
    return {
        "task": "digits",
        "model": "lenet_300_100",
        "stages": [{"methods": [{"method": "magnitude", **method}]}],
    }


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [1.5, 1.0, -0.1, math.nan, math.inf, "much", None])
def test_sparsity_out_of_range(sparsity: Any) -> None:
    for build in (Magnitude, Gradual):
        with pytest.raises(ValueError, match="sparsity"):
            build(sparsity=sparsity)
        with pytest.raises(ValueError, match="sparsity"):
            build(sparsity={"0": 0.5, "*": sparsity})
    with pytest.raises(RecipeError, match=r"stages\.0\.methods\.0"):
        validate(content(sparsity=sparsity))


@pytest.mark.parametrize("bits", [0, 40, 17, -1, 2.5, math.nan])
def test_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(ValueError, match="bits"):
        Codebook(bits=bits)
    with pytest.raises(ValueError, match="bits"):
        Codebook(bits={"*": bits})


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0}, {"lr": math.nan}, {"epochs": -1}, {"epochs": 1.5}, {"momentum": 1.5},
        {"weight_decay": -1}, {"warmup": 2}, {"keep": "worst"}, {"precision": "int3"},
        {"lr_schedule": "zigzag"}, {"clip": 0}, {"evaluate_every": 0}, {"milestones": [2.0]},
    ],
)  # fmt: skip
def test_training_settings_out_of_range(settings: Content) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Train(**settings)


@pytest.mark.parametrize(
    ("attempt", "where"),
    [
        (lambda: SoftTargets(temperature=0), "temperature"),
        (lambda: SoftTargets(hard_weight=-1), "hard_weight"),
        (lambda: SoftTargets(mean="median"), "mean"),
        (lambda: Codebook(init="best"), "init"),
        (lambda: Magnitude(sparsity=0.5, rounds=0), "rounds"),
        (lambda: Magnitude(threshold=0), "threshold"),
        (lambda: Magnitude(sparsity=0.5, threshold=1.0), "not both"),
        (lambda: Magnitude(threshold=1.0, scope="global"), "scope: global"),
        (lambda: Gradual(sparsity=0.5, schedule={"begin": 0.8, "end": 0.2}), "before its begin"),
        (lambda: Gradual(sparsity=0.5, schedule={"shape": "wavy"}), "shape"),
        (lambda: Stage(), "neither methods nor epochs"),
    ],
)
def test_method_settings_out_of_range(attempt: Callable[[], Any], where: str) -> None:
    with pytest.raises(ValueError, match=where):
        attempt()


@pytest.mark.parametrize(
    ("attempt", "hint"),
    [
        (lambda: Magnitude(sparsity=1.5), "sparsity"),
        (lambda: Magnitude(sparcity=0.5), "Did you mean 'sparsity'"),
        (lambda: Train(epoch=3), "Did you mean 'epochs'"),  # type: ignore[call-arg]
        (lambda: Stage(methods=["magnitud"]), "Did you mean 'magnitude'"),
    ],
)
def test_settings_in_python_fail_as_everything_else_does(
    attempt: Callable[[], Any], hint: str
) -> None:
    """With an error of the one tree, that names the nearest key."""
    with pytest.raises(InputError, match=hint):
        attempt()


def test_assignment_is_checked_too() -> None:
    method = Magnitude(sparsity=0.5)
    with pytest.raises(ValueError, match="sparsity"):
        method.sparsity = 1.5
    assert method.sparsity == 0.5


# -- names --------------------------------------------------------------------------------------


def test_unknown_setting() -> None:
    with pytest.raises(ValueError, match="sparcity"):
        Magnitude(sparcity=0.5)
    with pytest.raises(
        RecipeError, match=r"stages\.0\.methods\.0.*sparcity.*Did you mean 'sparsity'"
    ):
        validate(content(sparcity=0.5))


@pytest.mark.parametrize(
    ("path", "key", "nearest"),
    [
        ((), "stagse", "stages"),
        (("stages", 0), "metods", "methods"),
        (("artifact",), "codc", "codec"),
    ],
)
def test_unknown_key(path: tuple[Any, ...], key: str, nearest: str) -> None:
    recipe = content(sparsity=0.5) | {"artifact": {}}
    node: Any = recipe
    for part in path:
        node = node[part]
    node[key] = 1
    with pytest.raises(RecipeError, match=f"{key}: unknown. Did you mean '{nearest}'"):
        validate(recipe)


def test_unknown_key_of_training() -> None:
    recipe = content(sparsity=0.5)
    recipe["stages"][0]["train"] = {"epoch": 3}
    with pytest.raises(RecipeError, match=r"epoch: unknown\. Did you mean 'epochs'"):
        validate(recipe)


def test_unknown_method(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="Did you mean 'magnitude'"):
        Stage(methods=["magnitud"])
    with pytest.raises(
        RecipeError,
        match=r"stages\.0\.methods\.0.*no method is named 'magnitud'.*Did you mean 'magnitude'",
    ):
        validate({**content(), "stages": [{"methods": [{"method": "magnitud"}]}]})
    with pytest.raises(AttributeError, match="Magnitud"):
        lilliput.methods.Magnitud  # noqa: B018


def test_unknown_architecture_and_task() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'lenet_5'"):
        lilliput.build("lenet5")
    with pytest.raises(RecipeError, match=r"model: no architecture.*Did you mean 'lenet_5'"):
        validate(content(sparsity=0.5) | {"model": "lenet_5x"})
    with pytest.raises(RecipeError, match=r"task: no task.*Did you mean 'digits'"):
        validate(content(sparsity=0.5) | {"task": "digit"})


def test_unknown_optimizer(model: nn.Module) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'adam'"):
        lilliput.compress(model, MLP.task(), [trained(Magnitude(sparsity=0.5), optimizer="adamm")])


def test_unknown_option_of_the_optimizer(model: nn.Module) -> None:
    with pytest.raises(InputError, match="adam does not know momentum"):
        lilliput.compress(model, MLP.task(), [trained(Magnitude(sparsity=0.5), momentum=0.9)])


def test_unknown_codec_is_noticed_before_training(model: nn.Module) -> None:
    """Not after hours, when the file is to be written."""
    steps: list[int] = []

    class Count(Watcher):
        def step_done(self, run: Run) -> None:
            steps.append(run.step)

    with pytest.raises(InputError, match="codec"):
        lilliput.compress(
            model,
            MLP.task(),
            [trained()],
            artifact=ArtifactSettings(codec="zip"),
            watchers=[Count()],
        )
    assert not steps


@pytest.mark.parametrize("device", ["gpu7", "cuda:99"])
def test_unknown_device(model: nn.Module, device: str) -> None:
    with pytest.raises(InputError, match=device):
        lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.5)], device=device)


@pytest.mark.parametrize("method", [Magnitude(sparsity=0.5, layers="fc*"), Codebook(layers="fc*"),
                                    Gradual(sparsity=0.5, layers=["fc*", "head"])])  # fmt: skip
def test_layer_pattern_without_a_layer(model: nn.Module, method: Any) -> None:
    with pytest.raises(NothingMatched, match=r"covers no layer.*Known: 0, 3, 5"):
        lilliput.compress(model, MLP.task(), [method])


@pytest.mark.parametrize("method", [Magnitude(sparsity={"fc*": 0.5}), Codebook(bits={"fc*": 2}),
                                    Gradual(sparsity={"fc*": 0.5})])  # fmt: skip
def test_amounts_of_which_no_pattern_covers_a_layer(model: nn.Module, method: Any) -> None:
    with pytest.raises(InputError, match=r"fc\*"):
        lilliput.compress(model, MLP.task(), [method])


def test_trainable_pattern_without_a_layer(model: nn.Module) -> None:
    with pytest.raises(NothingMatched, match="nothing to train"):
        lilliput.compress(model, MLP.task(), [trained(Magnitude(sparsity=0.5), trainable="fc*")])


def test_model_without_weights(model: nn.Module) -> None:
    with pytest.raises(NothingMatched, match="no such layer at all"):
        lilliput.compress(nn.Flatten(), MLP.task(), [Magnitude(sparsity=0.5)])


def test_no_stages(model: nn.Module) -> None:
    with pytest.raises(InputError, match="stage"):
        lilliput.compress(model, MLP.task(), [])


def test_nothing_to_do(model: nn.Module) -> None:
    with pytest.raises(NothingChanged, match="magnitude has finished stage 1 and changed nothing"):
        lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.0)])


def test_tied_weights_are_refused() -> None:
    tied = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3))
    tied[1].weight = tied[0].weight
    before = weights_digest(tied)
    with pytest.raises(InputError, match=r"tied: 0\.weight and 1\.weight"):
        lilliput.compress(tied, MLP.task(), [Magnitude(sparsity=0.5)])
    assert weights_digest(tied) == before


# -- model, data and loss -------------------------------------------------------------------------


def test_output_that_does_not_fit_the_loss(model: nn.Module) -> None:
    """Three classes; the labels go up to nine."""
    batches = [(torch.randn(8, 12), torch.arange(8) + 2)]
    task = changed_task(train=batches)
    for stage in (trained(Magnitude(sparsity=0.5)), trained()):
        with pytest.raises(ModelMismatch, match=r"loss cannot take.*shape \(8, 3\)"):
            lilliput.compress(model, task, [stage])


def test_output_that_does_not_fit_the_score(model: nn.Module) -> None:
    def score(output: Tensor, target: Tensor) -> Tensor:
        return output - target

    with pytest.raises(ModelMismatch, match=r"score cannot take.*shape \(32, 3\)"):
        lilliput.compress(model, changed_task(score=score), [Magnitude(sparsity=0.5)])


def test_output_that_does_not_fit_a_metric(model: nn.Module) -> None:
    class Metric:
        def reset(self) -> None: ...

        def update(self, output: Tensor, target: Tensor) -> None:
            raise ValueError("expected one column")

        def compute(self) -> float:
            return 0.0

    with pytest.raises(ModelMismatch, match=r"score cannot take.*expected one column"):
        lilliput.compress(model, changed_task(score=Metric()), [Magnitude(sparsity=0.5)])


@pytest.mark.parametrize("with_method", [True, False])
def test_inputs_that_do_not_fit_the_model(model: nn.Module, with_method: bool) -> None:
    stage = trained(Magnitude(sparsity=0.5)) if with_method else trained()
    with pytest.raises(ModelMismatch, match="cannot take the task's inputs"):
        lilliput.compress(model, CNN.task(), [stage])


@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_single_sample_under_batch_normalization(with_teacher: bool) -> None:
    inputs, labels = torch.randn(3, 8), torch.tensor([0, 1, 0])
    batches = [(inputs[i : i + 1], labels[i : i + 1]) for i in range(3)]
    student = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    task = Task(batches, batches, batches, loss=nn.functional.cross_entropy, score=accuracy)
    before = weights_digest(student)
    stage = trained(*([SoftTargets(teacher=nn.Linear(8, 2))] if with_teacher else []))
    with pytest.raises(ModelMismatch, match=r"needs at least two samples a batch.*drop_last=True"):
        lilliput.compress(student, task, [stage])
    assert weights_digest(student) == before


def test_loss_that_is_not_one_number(model: nn.Module) -> None:
    task = changed_task(loss=lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"))
    with pytest.raises(ModelMismatch, match="instead of one number"):
        lilliput.compress(model, task, [trained(Magnitude(sparsity=0.5))])


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_empty_batches(model: nn.Module, part: str) -> None:
    with pytest.raises(EmptyData, match="yields no batch"):
        lilliput.compress(model, changed_task(**{part: []}), [trained(Magnitude(sparsity=0.5))])


def test_generator_that_can_be_read_only_once(model: nn.Module) -> None:
    batches = (b for b in list(MLP.task().train))
    with pytest.raises(EmptyData, match="generator can be read only once"):
        lilliput.compress(model, changed_task(train=batches), [trained(Magnitude(sparsity=0.5))])


@pytest.mark.parametrize("item", [torch.ones(4), (1, 2, 3, 4), "batch", {"x": 1}])
def test_batches_of_another_form(model: nn.Module, item: Any) -> None:
    with pytest.raises(InputError, match=r"should be \(inputs, target\)"):
        lilliput.compress(model, changed_task(train=[item]), [trained(Magnitude(sparsity=0.5))])


class Turning:
    """A loss that is not finite from its n-th call on."""

    def __init__(self, calls: int, value: float) -> None:
        self.left, self.value = calls, value

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.left -= 1
        loss = nn.functional.cross_entropy(output, target)
        return loss * self.value if self.left < 0 else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite(model: nn.Module, value: float, tmp_path: Path) -> None:
    task = changed_task(loss=Turning(6, value))
    stage = trained(Magnitude(sparsity=0.5), epochs=3, checkpoint_minutes=1e-9)
    with pytest.raises(Diverged, match=r"at step 6 \(epoch 2\) of stage 1.*checkpoint is kept"):
        lilliput.compress(model, task, [stage], directory=tmp_path / "run")
    kept = load_tree(tmp_path / "run" / "checkpoints" / "inside.safetensors")
    assert kept["place"] == [0, 1, 6, 2]
    assert all(t.isfinite().all() for t in kept["model"]["tensors"].values())
    result = lilliput.compress(model, MLP.task(), [stage], directory=tmp_path / "run")
    assert math.isfinite(result.figures["score"])


# -- the run directory ----------------------------------------------------------------------------


def test_directory_of_another_recipe(model: nn.Module, tmp_path: Path) -> None:
    lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(
        RunConflict, match=r"stages\.0\.methods\.0\.sparsity is 0\.5 there and 0\.6"
    ):
        lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.6)], directory=tmp_path)
    with pytest.raises(RunConflict, match="seed is 0 there and 1 here"):
        lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path, seed=1)
    with pytest.raises(RunConflict, match="weights is"):
        lilliput.compress(MLP.build(1), MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_directory_with_other_files(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(RunConflict, match=r"not a run directory, and holds thesis\.txt"):
            lilliput.compress(
                model, MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path, fresh=fresh
            )
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_fresh_starts_anew(model: nn.Module, tmp_path: Path) -> None:
    lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path)
    result = lilliput.compress(
        model, MLP.task(), [Magnitude(sparsity=0.6)], directory=tmp_path, fresh=True
    )
    assert result.figures["nonzeros"] < 400


def test_two_processes_in_one_directory(model: nn.Module, tmp_path: Path) -> None:
    with RunDirectory(tmp_path, {}), pytest.raises(RunConflict, match="another process is writing"):
        lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path)


def test_directory_that_is_a_file(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(LilliputError, match="run"):
        lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_damaged_checkpoint(model: nn.Module, tmp_path: Path) -> None:
    lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path)
    file = tmp_path / "checkpoints" / "stage-0.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CorruptArtifact, match=r"stage-0.*Delete it"):
        lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path)
    file.unlink()
    lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path)


def test_damaged_record_of_the_recipe(model: nn.Module, tmp_path: Path) -> None:
    lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path)
    (tmp_path / "resolved.json").write_text("{")
    with pytest.raises(LilliputError, match="resolved"):
        lilliput.compress(model, MLP.task(), [Magnitude(sparsity=0.5)], directory=tmp_path)


class FullDisk:
    """From the n-th ``fsync`` on, the disk is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.left, self.real = after, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, handle: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.real(handle)


@pytest.mark.parametrize("after", range(0, 24, 2))
def test_disk_that_fills_up(
    model: nn.Module, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it happens, the error says so, no file is torn, and the run can go on."""
    stages = [
        trained(Gradual(sparsity=0.5), epochs=2, checkpoint_minutes=1e-9),
        trained(Codebook(bits=2), epochs=1, checkpoint_minutes=1e-9),
    ]
    undisturbed = lilliput.compress(model, MLP.task(), stages, directory=tmp_path / "undisturbed")
    home = tmp_path / "run"
    with monkeypatch.context() as patch:
        FullDisk(patch, after)
        with pytest.raises((RunError, ArtifactError), match="No space left on device"):
            lilliput.compress(model, MLP.task(), stages, directory=home)
    assert not list(home.rglob("*.tmp"))
    lilliput.compress(model, MLP.task(), stages, directory=home)
    for file in ("metrics.jsonl", "model.safetensors", "changes.json"):
        assert (home / file).read_bytes() == (undisturbed.directory / file).read_bytes(), file


def test_disk_that_fills_up_under_the_metrics(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are appended, not replaced."""
    real = Path.open

    def refuse(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == "metrics.jsonl" and "a" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(RunError, match="No space left on device"):
            lilliput.compress(
                model, MLP.task(), [trained(Magnitude(sparsity=0.5))], directory=tmp_path / "run"
            )


def test_disk_that_fills_up_under_a_saved_model(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "net.safetensors"
    lilliput.save(model, file)
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        FullDisk(patch, 0)
        with pytest.raises(ArtifactError, match=r"No space left on device.*untouched"):
            lilliput.save(CNN.build(), file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("calls", [1, 6])
def test_ctrl_c_inside_a_step(model: nn.Module, calls: int, tmp_path: Path) -> None:
    """The signal comes when the forward pass has moved batch statistics and drawn random numbers."""
    cnn = CNN.build()

    def task(interrupted: bool) -> Task:
        found = CNN.task()
        left = [calls]

        def loss(output: Tensor, target: Tensor) -> Tensor:
            left[0] -= 1
            if interrupted and left[0] == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return nn.functional.cross_entropy(output, target)

        found.loss = loss
        return found

    stage = trained(Magnitude(sparsity=0.5), epochs=3, lr=0.01)
    first = lilliput.compress(cnn, task(False), [stage], directory=tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        lilliput.compress(cnn, task(True), [stage], directory=tmp_path / "b")
    second = lilliput.compress(cnn, task(False), [stage], directory=tmp_path / "b")
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    for file in ("metrics.jsonl", "model.safetensors"):
        assert (first.directory / file).read_bytes() == (second.directory / file).read_bytes()


# -- artifacts -------------------------------------------------------------------------------------


def test_artifact_of_another_network(model: nn.Module, tmp_path: Path) -> None:
    lilliput.save(CNN.build(), tmp_path / "cnn.safetensors")
    with pytest.raises(ModelMismatch, match="does not fit Sequential"):
        lilliput.load(tmp_path / "cnn.safetensors", model=model)


def test_artifact_without_an_architecture(model: nn.Module, tmp_path: Path) -> None:
    lilliput.save(model, tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="give an instance to fill"):
        lilliput.load(tmp_path / "net.safetensors")


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff" * 100, b"\x00" * 64])
def test_foreign_artifact(model: nn.Module, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError):
        lilliput.load(tmp_path / "x.safetensors", model=model)


def test_damaged_artifact_leaves_the_model_as_it_was(model: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    lilliput.save(MLP.build(1), file)
    data = bytearray(file.read_bytes())
    for place in (len(data) - 3, len(data) // 2):
        data[place] ^= 1
        file.write_bytes(data)
        with pytest.raises(ArtifactError):
            lilliput.load(file, model=model)
    file.write_bytes(data[:-10])
    with pytest.raises(ArtifactError):
        lilliput.load(file, model=model)


def test_missing_artifact(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises((LilliputError, FileNotFoundError), match="nowhere"):
        lilliput.load(tmp_path / "nowhere.safetensors", model=model)
    with pytest.raises(InputError, match="no file"):
        lilliput.compress(
            model, MLP.task(), [trained(SoftTargets(teacher=str(tmp_path / "nowhere.safetensors")))]
        )


def test_ready_teacher_of_another_kind(model: nn.Module) -> None:
    with pytest.raises(LilliputError):
        lilliput.compress(model, MLP.task(), [trained(SoftTargets(teacher=3))])
