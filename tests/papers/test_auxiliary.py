"""Zhang and others 2019, Lee and others 2015: classifiers inside a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import Stage, Train, compress, io
from lilliput.core.run import Run
from lilliput.core.schedule import Ramp
from lilliput.core.task import Task, accuracy
from lilliput.core.types import Batch
from lilliput.errors import InputError, LilliputError, ModelMismatch, UnknownName
from lilliput.methods import Auxiliary, FilterL1
from lilliput.methods.distill.auxiliary import AuxiliaryClassifier, feature_distance, pooled
from lilliput.testing.networks import CLASSES, NETWORKS

MLP, CNN, _ = NETWORKS
TRAIN = Train(epochs=2, lr=0.01)


def one_step(method: Auxiliary, model: nn.Module, batch: Batch) -> tuple[Run, dict[str, Any]]:
    """Attach, run forward, and ask for the terms."""
    task = Task([batch], [batch], None, F.cross_entropy, accuracy)
    run = Run(model, task, methods=[method], total_steps=4)
    method.attach(run)
    run.batch = batch
    method.before_step(run)
    run.output = model(batch.inputs)
    return run, method.loss(run)


def first_batch() -> Batch:
    torch.manual_seed(0)
    return Batch(torch.randn(8, 1, 8, 8), torch.arange(8) % 3)


def quiet_cnn() -> nn.Module:
    """Without dropout, so that a second forward pass shows the same features."""
    return nn.Sequential(*(m for m in CNN.build() if not isinstance(m, nn.Dropout2d)))


def test_the_three_terms_by_hand() -> None:
    """Two classifiers behind maps, the deepest feature being what the last layer reads."""
    model, batch = quiet_cnn(), first_batch()
    method = Auxiliary(
        places=["2", "5"],
        alpha=0.25,
        temperature=2.0,
        feature="8:input",
        feature_weight=0.01,
        weight=3.0,
    )
    run, terms = one_step(method, model, batch)
    features = {"2": model[:3](batch.inputs), "5": model[:6](batch.inputs)}  # type: ignore[index]
    final = model[:8](batch.inputs)  # type: ignore[index]
    logits = model[8](final)  # type: ignore[index]
    p = (logits / 2).softmax(1)
    labels = soft = distance = 0.0
    for number, place in enumerate(("2", "5")):
        classifier = run.extras[f"0.auxiliary.{number}"]
        own_feature = classifier.adapter(features[place].mean((2, 3)))
        assert own_feature.shape == final.shape
        q = classifier.classify(own_feature)
        for n in range(8):
            labels -= float(q.detach().softmax(1)[n, batch.target[n]].log()) / 8
            ratio = (p[n] / (q[n] / 2).softmax(0)).log()
            soft += 4 * float((p[n] * ratio).sum().detach()) / 8
            distance += float(((own_feature[n] - final[n]) ** 2).sum().detach()) / 8
    assert float(terms["auxiliary"].value.detach()) == pytest.approx(labels, rel=1e-4)
    assert float(terms["auxiliary_soft"].value.detach()) == pytest.approx(soft, rel=1e-4)
    assert float(terms["auxiliary_features"].value.detach()) == pytest.approx(distance, rel=1e-4)
    weights = {name: term.weight for name, term in terms.items()}
    assert weights == pytest.approx(
        {"auxiliary": 3 * 0.75, "auxiliary_soft": 3 * 0.25, "auxiliary_features": 3 * 0.01}
    )


def test_the_end_is_a_constant_target() -> None:
    """Layers behind the deepest place get no gradient from any term; those before it do."""
    model, batch = quiet_cnn(), first_batch()
    _, terms = one_step(Auxiliary(places=["2"], feature="8:input"), model, batch)
    sum(term.value for term in terms.values()).backward()
    assert all(p.grad is None for p in model[3:].parameters())  # type: ignore[index]
    assert all(p.grad is not None for p in model[:3].parameters())  # type: ignore[index]


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({"alpha": 0.0}, {"auxiliary"}),
        ({"alpha": 1.0}, {"auxiliary_soft"}),
        ({"alpha": 0.5, "feature": "5"}, {"auxiliary", "auxiliary_soft", "auxiliary_features"}),
    ],
)
def test_terms_that_are_asked_for(settings: dict[str, Any], terms: set[str]) -> None:
    _, found = one_step(Auxiliary(places=["2"], **settings), quiet_cnn(), first_batch())
    assert set(found) == terms


def test_deep_supervision_may_fade_out() -> None:
    model, batch = quiet_cnn(), first_batch()
    method = Auxiliary(places=["2"], alpha=0.0, weight=Ramp(start=1.0, end=0.0))
    run, terms = one_step(method, model, batch)
    assert terms["auxiliary"].weight == 1.0
    run.step = 1
    method.before_step(run)
    model(batch.inputs)
    assert method.loss(run)["auxiliary"].weight == pytest.approx(0.75)


def test_means_over_positions() -> None:
    maps = torch.arange(16.0).view(1, 2, 2, 4)
    assert pooled(maps).tolist() == [[3.5, 11.5]]
    tokens = torch.arange(6.0).view(1, 3, 2)
    assert pooled(tokens).tolist() == [[2.0, 3.0]]
    assert torch.equal(pooled(tokens[:, 0]), tokens[:, 0])


def test_distance_is_summed_over_the_feature_and_averaged_over_the_batch() -> None:
    assert float(feature_distance(torch.zeros(4, 2, 3, 3), torch.full((4, 2, 3, 3), 2.0))) == 4 * 18


@pytest.mark.parametrize(
    ("own", "final"),
    [
        ((1, 6, 8, 8), (1, 9, 4, 4)),
        ((1, 6, 8, 8), (1, 32)),
        ((1, 24), (1, 16)),
        ((1, 6, 8), (1, 6, 5)),
        ((1, 6, 8), (1, 5)),
        ((1, 6, 4, 4), None),
        ((1, 6, 8), None),
    ],
)
def test_classifiers_are_built_from_shapes(own: Any, final: Any) -> None:
    logits, feature = AuxiliaryClassifier(own, 7, final)(torch.zeros(5, *own[1:]))
    assert logits.shape == (5, 7)
    if final is not None:
        assert feature.shape == (5, *final[1:])


def test_classifiers_train_and_stay_out_of_the_file(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Look(Auxiliary):
        def finish(self, run: Run) -> Any:
            seen.append(run.extras[f"{run.key_of(self)}.0"].classify.weight.detach().clone())  # type: ignore[union-attr]
            return super().finish(run)

        def attach(self, run: Run) -> None:
            super().attach(run)
            seen.append(run.extras[f"{run.key_of(self)}.0"].classify.weight.detach().clone())  # type: ignore[union-attr]

    stage = Stage(methods=[Look(places=["2"], feature="8")], train=TRAIN)
    result = compress(CNN.build(), CNN.task(), [stage], directory=tmp_path)
    assert not torch.equal(*seen)
    assert result.model.state_dict().keys() == CNN.build().state_dict().keys()
    assert (
        io.load(result.artifact, model=CNN.build(1)).state_dict().keys()
        == CNN.build().state_dict().keys()
    )
    assert not any(m._forward_hooks for m in result.model.modules())


def test_inner_layers_learn_to_classify() -> None:
    """With the task's own loss switched off, only the classifiers' terms reach the first layers."""
    found: dict[str, float] = {}

    class Score(Auxiliary):
        def finish(self, run: Run) -> Any:
            model = run.model.eval()
            right = total = 0
            for batch in run.task.validation:
                self._taps.open()
                model(batch.inputs)
                logits, _ = self._classifiers[0](self._taps["1"])
                right += int((logits.argmax(1) == batch.target).sum())
                total += len(batch.target)
            found["score"] = 100 * right / total
            return super().finish(run)

    train = Train(epochs=30, lr=0.01, task_weight=0.0)
    stage = Stage(methods=[Score(places=["1"], alpha=0.0)], train=train)
    compress(MLP.build(), MLP.task(), [stage])
    assert found["score"] > 75, "33 is chance"


def test_terms_and_weights_are_logged(tmp_path: Path) -> None:
    stage = Stage(methods=[Auxiliary(places=["2"], feature="8")], train=TRAIN)
    compress(CNN.build(), CNN.task(), [stage], directory=tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    names = ("task", "auxiliary", "auxiliary_soft", "auxiliary_features")
    assert line["loss"] == pytest.approx(sum(line[f"loss/{name}"] for name in names), rel=1e-4)
    assert line["weight/auxiliary"] == pytest.approx(0.7)


def refuse(method: Auxiliary, **task: Any) -> LilliputError:
    with pytest.raises(LilliputError) as caught:
        compress(CNN.build(), task.get("task", CNN.task()), [Stage(methods=[method], train=TRAIN)])
    return caught.value


def test_bad_places() -> None:
    with pytest.raises(InputError, match="named twice"):
        Auxiliary(places=["2", "2"])
    with pytest.raises(InputError, match="at least 1 item"):
        Auxiliary(places=[])
    assert isinstance(refuse(Auxiliary(places=["relu"])), UnknownName)


def test_a_place_whose_value_is_overwritten_is_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))
    with pytest.raises(ModelMismatch, match="overwritten in place"):
        compress(model, MLP.task(), [Stage(methods=[Auxiliary(places=["0"])], train=TRAIN)])


def test_outputs_that_are_no_classes_are_refused() -> None:
    with pytest.raises(
        ModelMismatch, match=r"outputs \(batch, classes\), and the network's is \(8, 3, 1\)"
    ):
        one_step(
            Auxiliary(places=["0"]),
            nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1))),
            Batch(torch.randn(8, 4), None),
        )


def test_channels_that_are_cut_behind_its_back_are_noticed() -> None:
    methods = [Auxiliary(places=["2"]), FilterL1(keep=0.5, round_to=1)]
    with pytest.raises(
        ModelMismatch, match=r"'2' had 6 channels .* has 3 now.*List auxiliary behind"
    ):
        compress(CNN.build(), CNN.task(), [Stage(methods=methods, train=TRAIN)])
    compress(CNN.build(), CNN.task(), [Stage(methods=methods[::-1], train=TRAIN)])
