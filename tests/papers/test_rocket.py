"""Zhou, Fan, Cui, Bian, Zhu, Gai 2018: rocket launching."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Stage, Task, Train
from lilliput.architectures.resnet_cifar import resnet8, resnet14, resnet20
from lilliput.core.run import Run
from lilliput.core.task import accuracy
from lilliput.core.types import Batch, Term
from lilliput.engine.progress import Watcher
from lilliput.errors import InputError, ModelMismatch, NothingMatched, UnknownName
from lilliput.methods import Apoz, Gradual, Rocket, SoftTargets
from lilliput.methods.distill.rocket import Upper, hint_loss, shared_tensors
from lilliput.testing import NETWORKS

MLP, CNN, TRANSFORMER = NETWORKS
# The first layer under the last ones of the network that there was.
FIRST = Rocket(booster="original", share="1", above="1")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def doubled(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in double precision, with weights that follow from the seed."""
    network = network.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * 0.5)
    return network


def light(seed: int = 0) -> nn.Module:
    return doubled(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), seed)


def upper(seed: int = 1) -> nn.Module:
    return doubled(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)), seed)


BATCH = Batch(random(8, 5), torch.arange(8) % 3)


def stepped(
    method: Rocket, model: nn.Module, batch: Batch = BATCH
) -> tuple[Run, dict[str, Tensor]]:
    """A run in the middle of its first step, and the values of the method's terms."""
    data = [batch]
    run = Run(model, Task(data, data, None, F.cross_entropy, accuracy), methods=[method])
    run.original = copy.deepcopy(model)
    method.attach(run)
    run.batch = batch
    method.before_step(run)
    run.output = model.train()(batch.inputs)
    terms = method.loss(run)
    return run, {n: t.value * t.weight if isinstance(t, Term) else t for n, t in terms.items()}


def gradients(loss: Tensor, network: nn.Module) -> list[Tensor | None]:
    return list(
        torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
    )


class TestLoss:
    def test_hint_is_the_sum_over_classes_and_the_mean_over_the_batch(self) -> None:
        one, other = random(6, 4), random(6, 4, seed=1)
        expected = (
            sum(float((one[n, c] - other[n, c]) ** 2) for n in range(6) for c in range(4)) / 6
        )
        assert float(hint_loss(one, other)) == pytest.approx(expected)

    def test_the_whole_loss_by_hand(self) -> None:
        """H(y, p) + H(y, q) + lambda ||l - z||^2 on three linear layers."""
        model, booster = light(), upper()
        _, terms = stepped(Rocket(booster=booster, share="1", weight=0.25), model)
        h = torch.tanh(BATCH.inputs @ model[0].weight.T + model[0].bias)  # type: ignore[index, operator]
        l = h @ model[2].weight.T + model[2].bias  # type: ignore[index, operator] # noqa: E741
        u = torch.tanh(h @ booster[0].weight.T + booster[0].bias)  # type: ignore[index, operator]
        z = u @ booster[2].weight.T + booster[2].bias  # type: ignore[index, operator]
        rows = torch.arange(8)
        q = z.exp() / z.exp().sum(1, keepdim=True)
        assert terms["booster"].item() == pytest.approx(-q[rows, BATCH.target].log().mean().item())
        assert terms["hint"].item() == pytest.approx(0.25 * (l - z).square().sum(1).mean().item())

    def test_probabilities_instead_of_logits(self) -> None:
        model, booster = light(), upper()
        _, terms = stepped(
            Rocket(booster=booster, share="1", weight=1.0, hint="probabilities"), model
        )
        h = model[:2](BATCH.inputs)  # type: ignore[index]
        p, q = model[2](h).softmax(1), booster(h).softmax(1)  # type: ignore[index]
        assert terms["hint"].item() == pytest.approx((p - q).square().sum(1).mean().item())

    def test_loss_is_logged_as_its_parts(self, tmp_path: Path) -> None:
        methods = [Gradual(sparsity=0.5), SoftTargets(), FIRST]
        stage = Stage(methods=methods, train=Train(epochs=1, lr=0.01))
        lilliput.compress(MLP.build(), MLP.task(), [stage], directory=tmp_path)
        found = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
        assert found["weight/hint"] == pytest.approx(0.03)
        parts = sum(v for k, v in found.items() if k.startswith("loss/"))
        assert found["loss"] == pytest.approx(parts, rel=1e-5)
        assert {"loss/task", "loss/booster", "loss/hint", "loss/soft_targets"} <= set(found)


class TestGradientBlock:
    def test_the_booster_gets_no_gradient_from_the_hint(self) -> None:
        run, terms = stepped(Rocket(booster=upper(), share="1"), light())
        (booster,) = run.extras.values()
        assert gradients(terms["hint"], booster) == [None] * 4
        assert all(
            g is not None and g.abs().sum() > 0 for g in gradients(terms["booster"], booster)
        )

    def test_shared_layers_get_the_hint_through_the_light_network_only(self) -> None:
        """dL_hint/dh = 2/N (l - z) W: the way through z is blocked."""
        model = light()
        run, terms = stepped(Rocket(booster=upper(), share="1", weight=1.0), model)
        (booster,) = run.extras.values()
        h = model[:2](BATCH.inputs).detach()  # type: ignore[index]
        difference = model[2](h) - booster(h)  # type: ignore[index]
        towards_h = 2 / 8 * difference @ model[2].weight  # type: ignore[index]
        expected = (towards_h * (1 - h**2)).T @ BATCH.inputs
        found = gradients(terms["hint"], model)[0]
        torch.testing.assert_close(found, expected)

    def test_without_it_the_booster_is_drawn_too(self) -> None:
        method = Rocket(booster=upper(), share="1", gradient_block=False)
        run, terms = stepped(method, light())
        (booster,) = run.extras.values()
        assert all(g is not None and g.abs().sum() > 0 for g in gradients(terms["hint"], booster))

    @pytest.mark.parametrize("block", [True, False])
    def test_in_the_interval_variant(self, block: bool) -> None:
        method = Rocket(booster=light(3), share=["0"], gradient_block=block)
        run, terms = stepped(method, light())
        (booster,) = run.extras.values()
        own = [p for p in booster.parameters() if p.requires_grad]
        found = torch.autograd.grad(terms["hint"], own, retain_graph=True, allow_unused=True)
        assert all((g is None) == block for g in found)


class TestSharedLayers:
    @pytest.mark.parametrize("share", ["1", ["0"], {"0": "0"}])
    def test_get_the_gradients_of_both_cross_entropies(self, share: Any) -> None:
        model = light()
        booster = upper() if share == "1" else light(3)
        run, terms = stepped(Rocket(booster=booster, share=share), model)
        own = gradients(F.cross_entropy(run.output, BATCH.target), model)
        other = gradients(terms["booster"], model)
        assert all(g is not None and g.abs().sum() > 0 for g in own)
        assert [g is not None and bool(g.abs().sum() > 0) for g in other] == [
            True,
            True,
            False,
            False,
        ]

    def test_interval_booster_computes_with_the_students_weights(self) -> None:
        """As if they had been copied, and its gradient reaches the student's tensors."""
        model, booster = light(), light(3)
        _, terms = stepped(Rocket(booster=booster, share=["0"]), model)
        copied = copy.deepcopy(booster)
        copied[0].load_state_dict(model[0].state_dict())  # type: ignore[index]
        expected = F.cross_entropy(copied(BATCH.inputs), BATCH.target)
        assert terms["booster"].item() == pytest.approx(expected.item())
        expected.backward()
        found = gradients(terms["booster"], model)
        torch.testing.assert_close(found[0], copied[0].weight.grad)  # type: ignore[index]
        torch.testing.assert_close(found[1], copied[0].bias.grad)  # type: ignore[index]

    def test_a_training_step_by_hand(self) -> None:
        """Plain SGD: the shared layer moves along both gradients, each head along its own."""
        model, booster, rate = light(), light(3), 0.1
        method = Rocket(booster=booster, share=["0"], weight=0.5)
        run, terms = stepped(method, model)
        total = F.cross_entropy(run.output, BATCH.target) + sum(terms.values())
        expected = [
            p.detach() - rate * g  # type: ignore[operator]
            for p, g in zip(model.parameters(), gradients(total, model), strict=True)
        ]
        data = [BATCH]
        task = Task(data, data, None, F.cross_entropy, accuracy)
        stage = Stage(methods=[method], train=Train(epochs=1, optimizer="sgd", lr=rate))
        result = lilliput.compress(light(), task, [stage])
        for found, wanted in zip(result.model.parameters(), expected, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)

    def test_masked_weights_are_shared_as_they_are_used(self) -> None:
        """The booster sees the zeros, and the shared tensor is no second parameter of the optimizer."""
        seen: list[tuple[Tensor, Tensor]] = []

        class Look(Watcher):
            def step_done(self, run: Run) -> None:
                (method,) = (m for m in run.methods if isinstance(m, Rocket))
                seen.append((method._weights(run)["0.weight"], run.model[0].weight))  # type: ignore[index]
                (group,) = run.optimizer.param_groups  # type: ignore[union-attr]
                ids = [id(p) for p in group["params"]]
                assert len(ids) == len(set(ids)) == len(list(run.model.parameters())) + 4

        methods = [Gradual(sparsity=0.8), Rocket(booster=MLP.build(3), share=["0"])]
        stage = Stage(methods=methods, train=Train(epochs=3, lr=0.01))
        lilliput.compress(MLP.build(), MLP.task(), [stage], watchers=[Look()])
        given, used = seen[-1]
        assert torch.equal(given, used)
        assert float((given == 0).float().mean()) == pytest.approx(0.8, abs=0.05)


class TestInterval:
    def test_patterns_pair_the_first_blocks_of_each_group(self) -> None:
        """The authors' code: block i of the light network is block i of the booster."""
        found = shared_tensors(resnet8(), resnet20(), ["conv1", "layer*"])
        blocks = [f"layer{g}.0.conv{c}.weight" for g in (1, 2, 3) for c in (1, 2)]
        assert set(found) == {"conv1.weight", *blocks}
        assert all(name == f"{module}.{leaf}" for name, (module, leaf) in found.items())

    def test_every_second_block(self) -> None:
        found = shared_tensors(resnet14(), resnet20(), ["layer2.*"], every=2)
        pairs = {name: module for name, (module, _) in found.items()}
        assert pairs == {
            "layer2.0.conv1.weight": "layer2.0.conv1",
            "layer2.0.conv2.weight": "layer2.0.conv2",
            "layer2.2.conv1.weight": "layer2.1.conv1",
            "layer2.2.conv2.weight": "layer2.1.conv2",
        }

    def test_a_mapping_pairs_by_name(self) -> None:
        found = shared_tensors(resnet8(), resnet20(), {"layer1.0": "layer1.2"})
        assert {n: m for n, (m, _) in found.items()} == {
            "layer1.2.conv1.weight": "layer1.0.conv1",
            "layer1.2.conv2.weight": "layer1.0.conv2",
        }

    def test_what_a_pattern_leaves_out(self) -> None:
        found = shared_tensors(resnet8(), resnet20(), ["layer1.0", "!layer1.0.conv2"])
        assert list(found) == ["layer1.0.conv1.weight"]

    def test_batch_normalization_is_separate(self) -> None:
        """Statistics, scale and shift: both networks' are those of their own activations."""
        batch = Batch(torch.randn(8, 3, 16, 16), torch.arange(8))
        model, booster = resnet8(), resnet20()
        alone = copy.deepcopy(model).train()
        run, terms = stepped(Rocket(booster=booster, share=["conv1", "layer*"]), model, batch)
        alone(batch.inputs)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, dict(alone.named_buffers())[name]), name
        (made,) = run.extras.values()
        inside = made.network
        norm, other = model.layer1[0].bn2, inside.layer1[0].bn2  # type: ignore[union-attr, index]
        assert norm.num_batches_tracked == other.num_batches_tracked == 1
        assert norm.weight is not other.weight
        # The first block's input is the same but for bn1, whose parameters are equal: so are statistics.
        torch.testing.assert_close(norm.running_mean, other.running_mean)
        # In the second group the booster comes from two further blocks.
        far, off = model.layer2[0].bn1, inside.layer2[0].bn1  # type: ignore[union-attr, index]
        assert not torch.allclose(far.running_mean, off.running_mean, atol=1e-4)
        found = dict(
            zip(
                (n for n, _ in model.named_parameters()),
                gradients(terms["booster"], model),
                strict=True,
            )
        )
        assert found["layer2.0.conv1.weight"] is not None
        assert found["layer2.0.bn1.weight"] is None
        assert found["linear.weight"] is None

    def test_without_a_common_name(self) -> None:
        with pytest.raises(
            UnknownName, match=r"no module of the booster is named 'layer1\.1\.conv1'"
        ):
            shared_tensors(resnet14(), resnet8(), ["layer1.*"])

    def test_without_a_common_shape(self) -> None:
        with pytest.raises(ModelMismatch, match=r"0\.weight of the student is \(6, 5\)"):
            shared_tensors(light(), nn.Sequential(nn.Linear(5, 9)), ["0"])
        with pytest.raises(ModelMismatch, match="is not there"):
            shared_tensors(light(), nn.Sequential(nn.Linear(5, 6, bias=False)), ["0"])

    def test_patterns_that_cover_nothing(self) -> None:
        with pytest.raises(NothingMatched, match=r"'layr1\*' .* Did you mean 'layer1'"):
            shared_tensors(resnet8(), resnet20(), ["conv1", "layr1*"])
        with pytest.raises(NothingMatched, match="never shared"):
            shared_tensors(resnet8(), resnet20(), ["bn1"])


class TestUpper:
    def test_is_the_network_above_the_place(self) -> None:
        """What leads to the place is gone, and the rest computes what it did."""
        network = resnet20().eval()
        x = torch.randn(4, 3, 16, 16)
        expected = network(x)
        feature = network.layer1(F.relu(network.bn1(network.conv1(x))))  # type: ignore[operator]
        made = Upper(copy.deepcopy(network), "layer1", x).eval()
        assert isinstance(made.network.conv1, nn.Identity)
        assert isinstance(made.network.bn1, nn.Identity)
        assert torch.equal(made(feature, x), expected)
        assert not torch.equal(made(2 * feature, x), expected)
        kept = sum(
            p.numel()
            for n, p in network.named_parameters()
            if n[:6] in ("layer2", "layer3", "linear")
        )
        assert sum(p.numel() for p in made.parameters()) == kept

    def test_inside_a_group(self) -> None:
        made = Upper(resnet20().eval(), "layer1.1", torch.randn(4, 3, 16, 16))
        assert isinstance(made.network.layer1[0], nn.Identity)  # type: ignore[index]
        assert sum(p.numel() for p in made.network.layer1.parameters()) == 2 * 9 * 16 * 16 + 4 * 16  # type: ignore[union-attr]

    def test_what_cannot_go_is_frozen(self) -> None:
        """A network that computes the place's input with more than its modules."""

        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.low, self.place, self.top = nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                low = self.low(x)
                return self.top(self.place(low)) + low[:, :3]  # type: ignore[no-any-return]

        network, x = Odd().eval(), torch.randn(4, 5)
        expected, feature = network(x), network.place(network.low(x))
        made = Upper(network, "place", x)
        assert torch.equal(made(feature, x), expected)
        assert isinstance(network.low, nn.Linear)
        assert not network.low.weight.requires_grad
        assert network.top.weight.requires_grad

    def test_a_place_that_is_passed_twice(self) -> None:
        activation = nn.ReLU()
        network = nn.Sequential(nn.Linear(5, 4), activation, nn.Linear(4, 4), activation)
        with pytest.raises(ModelMismatch, match=r"comes by '1' 2 times"):
            Upper(network, "1", torch.randn(4, 5))

    def test_no_such_place(self) -> None:
        with pytest.raises(UnknownName, match="layr1"):
            Upper(resnet8(), "layr1", torch.randn(4, 3, 16, 16))


class TestFile:
    @pytest.mark.parametrize("method", [FIRST, Rocket(booster="original", share=["0"])])
    def test_the_booster_never_reaches_it(self, method: Rocket) -> None:
        stage = Stage(methods=[method], train=Train(epochs=1))
        result = lilliput.compress(MLP.build(), MLP.task(), [stage])
        assert result.model.state_dict().keys() == MLP.build().state_dict().keys()
        assert not any(m._forward_hooks for m in result.model.modules())

    def test_a_booster_that_was_found_frozen_learns(self) -> None:
        before = MLP.build()
        trained: list[Tensor] = []

        class Look(Watcher):
            def step_done(self, run: Run) -> None:
                (booster,) = run.extras.values()
                assert all(m.training for m in booster.modules())
                trained.append(booster.network[3].weight.detach().clone())  # type: ignore[union-attr, index]

        stage = Stage(methods=[FIRST], train=Train(epochs=1, lr=0.01))
        lilliput.compress(before, MLP.task(), [stage], watchers=[Look()])
        assert not torch.equal(trained[0], trained[-1])


class TestBadInput:
    def run(self, method: Rocket, network: Any = MLP) -> None:
        stage = Stage(methods=[method], train=Train(epochs=1))
        lilliput.compress(network.build(), network.task(), [stage])

    def test_other_classes(self) -> None:
        with pytest.raises(ModelMismatch, match="Both need the same classes"):
            self.run(Rocket(booster=nn.Linear(24, 5), share="1"))

    def test_upper_layers_that_do_not_fit(self) -> None:
        with pytest.raises(ModelMismatch, match="cannot take"):
            self.run(Rocket(booster=nn.Linear(7, 3), share="1"))

    def test_places_of_other_shapes(self) -> None:
        with pytest.raises(ModelMismatch, match=r"hands over \(24,\).*take \(16,\)"):
            self.run(Rocket(booster="original", share="1", above="3"))

    def test_no_such_place(self) -> None:
        with pytest.raises(UnknownName, match="nowhere"):
            self.run(Rocket(booster="original", share="nowhere", above="1"))

    def test_a_place_that_is_overwritten_behind(self) -> None:
        model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(inplace=True), nn.Linear(24, 3))
        stage = Stage(methods=[Rocket(booster=nn.Linear(24, 3), share="0")], train=Train(epochs=1))
        with pytest.raises(ModelMismatch, match="overwritten in place"):
            lilliput.compress(model, MLP.task(), [stage])

    @pytest.mark.parametrize("method", [FIRST, Rocket(booster="original", share=["0"])])
    def test_channels_that_are_cut_meanwhile(self, method: Rocket) -> None:
        methods = [method, Apoz(keep=0.5)]
        stage = Stage(methods=methods, train=Train(epochs=2))
        with pytest.raises(
            ModelMismatch, match=r"was \(24,.* and is \(16,.* in an earlier or a later"
        ):
            lilliput.compress(MLP.build(), MLP.task(), [stage])
        stages = [Stage(methods=[m], train=Train(epochs=1)) for m in methods]
        lilliput.compress(MLP.build(), MLP.task(), stages)

    def test_settings_that_do_not_belong_together(self) -> None:
        with pytest.raises(InputError, match="above belongs to"):
            Rocket(booster="original", share=["0"], above="1")
        with pytest.raises(InputError, match="every belongs to"):
            Rocket(booster="original", share="0", every=2)
