"""Chen, Goodfellow, Shlens 2016: Net2Net."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import Stage, Train, compress
from lilliput.api import run_recipe
from lilliput.architectures.digits_cnn import digits_cnn
from lilliput.core.run import Run
from lilliput.core.task import Task, accuracy
from lilliput.core.types import Change
from lilliput.errors import InputError, ModelMismatch, NothingChanged, NothingMatched
from lilliput.methods import Magnitude, Net2net, SoftTargets
from lilliput.methods.grow import net2net
from lilliput.methods.grow.net2net import even_mapping, identity, random_mapping, replicated
from lilliput.testing.networks import NETWORKS

MLP = NETWORKS[0]


class Residual(nn.Module):
    """Blocks of two convolutions with batch normalization, each added to its input."""

    def __init__(self, width: int, inner: int, blocks: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(_Block(width, inner) for _ in range(blocks))
        self.fc = nn.Linear(4 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class _Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Concatenated(nn.Module):
    """Each layer sees all earlier ones; a depthwise and a grouped convolution, and a gate."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        both = width + growth
        self.a, self.b = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, growth, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(both), nn.Conv2d(both, growth, 1)
        self.each = nn.Conv2d(both + growth, both + growth, 3, padding=1, groups=both + growth)
        self.mix, self.grouped = (
            nn.Conv2d(both + growth, 4 * width, 1),
            nn.Conv2d(4 * width, 8, 1, groups=2),
        )
        self.gate = nn.Linear(4 * width, 4 * width)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.cat([x, F.relu(self.b(x))], 1)
        x = torch.cat([torch.sigmoid(self.c(self.norm(x))), x], 1)
        x = torch.tanh(self.mix(self.each(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return self.fc(self.grouped(x).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(9, words), nn.LSTM(words, width, 2, batch_first=True)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(self.embed(x))[0][:, -1])


class Normalized(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(12, width), nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.norm(self.a(x))))


def chain(*layers: tuple[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def mlp(
    *widths: int, activation: Callable[[], nn.Module] = nn.ReLU, new: bool = False
) -> nn.Module:
    """Two hidden layers; with ``new`` a third one between them, as wide as the first."""
    first, second = widths
    layers: list[tuple[str, nn.Module]] = [("fc1", nn.Linear(12, first)), ("act1", activation())]
    if new:
        layers += [("fc1b", nn.Linear(first, first)), ("act1b", activation())]
    layers += [("fc2", nn.Linear(first, second)), ("act2", activation())]
    return chain(*layers, ("fc3", nn.Linear(second, 3)))


IMAGES, VECTORS, TOKENS = (1, 8, 8), (12,), None


def inputs(shape: tuple[int, ...] | None, samples: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if shape is None:
        return torch.randint(9, (samples, 5), generator=generator)
    return torch.randn(samples, *shape, generator=generator)


def trained(network: nn.Module, shape: tuple[int, ...] | None) -> nn.Module:
    """Let nothing be at its initial value: running statistics, scales and shifts."""
    with torch.no_grad():
        for number in range(3):
            network.train()(inputs(shape, seed=7 + number))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.LayerNorm):
                nn.init.normal_(module.weight, 1.0, 0.5)
                nn.init.normal_(module.bias)
    return network.eval()


def grown(
    small: nn.Module, large: nn.Module, shape: tuple[int, ...] | None, **settings: Any
) -> tuple[nn.Module, list[Change]]:
    """The larger network after ``attach``, and what ``finish`` reports."""
    x = inputs(shape)
    batches = [(x[:16], torch.zeros(16)), (x[16:], torch.zeros(16))]
    task = Task(batches, batches, None, F.cross_entropy, accuracy)
    method = Net2net(**settings)
    run = Run(large, task, earlier={"previous": lambda: small}, methods=[method])
    method.attach(run)
    return large, method.finish(run)


def difference(small: nn.Module, large: nn.Module, shape: tuple[int, ...] | None) -> float:
    """On samples that calibration has not seen, in single precision."""
    x = inputs(shape, seed=99)
    with torch.no_grad():
        answer, reference = large.eval()(x), small.eval()(x)
    return float((answer - reference).abs().max() / reference.abs().max())


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "wider mlp": (lambda: mlp(8, 6), lambda: mlp(11, 17), VECTORS, {}),
    "wider behind tanh": (
        lambda: mlp(8, 6, activation=nn.Tanh),
        lambda: mlp(11, 9, activation=nn.Tanh),
        VECTORS,
        {},
    ),
    "wider, flattened maps": (lambda: digits_cnn(width=4), lambda: digits_cnn(width=7), IMAGES, {}),
    "deeper": (lambda: digits_cnn(width=4), lambda: digits_cnn(width=4, depth=3), IMAGES, {}),
    "both": (lambda: digits_cnn(width=4), lambda: digits_cnn(width=9, depth=3), IMAGES, {}),
    "residual": (lambda: Residual(4, 3, 2), lambda: Residual(7, 9, 2), IMAGES, {}),
    "residual, more blocks": (
        lambda: Residual(4, 3, 1),
        lambda: Residual(7, 9, 3),
        IMAGES,
        {"zero": "*.norm2"},
    ),
    "concatenated": (lambda: Concatenated(4, 3), lambda: Concatenated(6, 8), IMAGES, {}),
    "recurrent": (lambda: Recurrent(3, 4), lambda: Recurrent(5, 7), TOKENS, {}),
    "layer normalization": (lambda: Normalized(6), lambda: Normalized(18), VECTORS, {}),
    "equal": (lambda: Residual(4, 3, 2), lambda: Residual(4, 3, 2), IMAGES, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_larger_network_computes_the_same(case: str) -> None:
    make_small, make_large, shape, settings = CASES[case]
    torch.manual_seed(1)
    small = trained(make_small(), shape)
    large, changes = grown(small, make_large(), shape, **settings)
    assert difference(small, large, shape) < 1e-5
    assert {c.where for c in changes} == {
        n for n, m in large.named_modules() if [*m.parameters(False), *m.buffers(False)]
    }


# -- Net2WiderNet ---------------------------------------------------------------------------------


def test_random_mapping() -> None:
    """g(j) = j for the first n; the others are drawn from all n, each about equally often."""
    g = random_mapping(5, 5005, torch.Generator().manual_seed(0))
    assert g[:5].tolist() == [0, 1, 2, 3, 4]
    counts = np.bincount(g[5:], minlength=5)
    assert len(g) == 5005
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)
    assert even_mapping(3, 6).tolist() == [0, 1, 2, 0, 1, 2]


def test_wider_is_the_papers_formula() -> None:
    """By loops over the matrices as the paper has them: U[k, j] = W[k, g(j)], V[j, h] = W[g(j), h] / |g|."""
    torch.manual_seed(0)
    small = mlp(3, 4)
    large, _ = grown(small, mlp(5, 4), VECTORS)
    w1, w2 = (layer.weight.detach().T for layer in (small.fc1, small.fc2))  # type: ignore[union-attr,operator]
    u1, u2 = (layer.weight.detach().T for layer in (large.fc1, large.fc2))  # type: ignore[union-attr,operator]
    g = [next(i for i in range(3) if torch.equal(u1[:, j], w1[:, i])) for j in range(5)]
    assert g[:3] == [0, 1, 2]
    for j in range(5):
        same = sum(g[x] == g[j] for x in range(5))
        for h in range(4):
            assert float(u2[j, h]) == pytest.approx(float(w2[g[j], h]) / same)
        assert large.fc1.bias[j] == small.fc1.bias[g[j]]  # type: ignore[index,union-attr]
    assert torch.equal(large.fc3.weight, small.fc3.weight)  # type: ignore[union-attr,arg-type]


def test_statistics_of_batch_normalization_are_copied() -> None:
    torch.manual_seed(0)
    small = trained(Residual(4, 3, 1), IMAGES)
    large, _ = grown(small, Residual(9, 3, 1), IMAGES)
    known = {round(float(v), 6) for v in small.norm.running_mean}  # type: ignore[union-attr]
    assert {round(float(v), 6) for v in large.norm.running_mean} == known  # type: ignore[union-attr]


def test_a_copy_that_is_not_divided_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic mistake; the network is left bit for bit as it was, and the layer is named."""
    torch.manual_seed(0)
    small, large = mlp(8, 6), mlp(11, 6)
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    monkeypatch.setattr(net2net, "replicated", lambda v, s, copies: replicated(v, s, {}))
    with pytest.raises(ModelMismatch, match=r"first in 'fc2'.*The network is as it was"):
        grown(small, large, VECTORS)
    assert all(torch.equal(before[name], tensor) for name, tensor in large.state_dict().items())


def test_without_noise_copies_stay_equal_and_with_noise_they_part() -> None:
    """Why the paper adds noise where there is no dropout."""

    def copies(noise: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        large, _ = grown(mlp(2, 4), mlp(6, 4), VECTORS, noise=noise)
        start = large.fc1.weight.detach().clone()  # type: ignore[union-attr,operator]
        optimizer = torch.optim.SGD(large.parameters(), lr=0.1)
        x, labels = inputs(VECTORS), torch.arange(32) % 3
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(large(x), labels).backward()
            optimizer.step()
        return start, large.fc1.weight.detach()  # type: ignore[union-attr,return-value]

    start, end = copies(noise=0.0)
    assert not torch.equal(start, end)
    pairs = [(i, j) for i in range(6) for j in range(i) if torch.equal(start[i], start[j])]
    assert len(pairs) >= 4
    for i, j in pairs:
        torch.testing.assert_close(end[i], end[j], rtol=1e-4, atol=1e-5)
    noisy, _ = copies(noise=0.1)
    assert all(not torch.equal(noisy[i], noisy[j]) for i, j in pairs)


def test_noise_is_on_the_copies_only_and_as_large_as_asked() -> None:
    torch.manual_seed(0)
    small = mlp(50, 4)
    large, _ = grown(small, mlp(200, 4), VECTORS, noise=0.1)
    ours, theirs = large.fc1.weight.detach(), small.fc1.weight.detach()  # type: ignore[union-attr,operator]
    assert torch.equal(ours[:50], theirs), "the first copy of each stays exact"
    nearest = torch.cdist(ours[50:], theirs).argmin(1)  # type: ignore[arg-type]
    noise = ours[50:] - theirs[nearest]
    assert float(noise.std()) == pytest.approx(0.1 * float(theirs.std()), rel=0.1)
    assert 1e-4 < difference(small, large, VECTORS) < 0.2, "nearly the same function"


# -- Net2DeeperNet --------------------------------------------------------------------------------


def test_new_layers_are_identities() -> None:
    """A 1 in the middle of the kernel of the same channel, zeros elsewhere."""
    torch.manual_seed(0)
    large, changes = grown(digits_cnn(width=3), digits_cnn(width=3, depth=2), IMAGES)
    expected = torch.zeros(6, 6, 3, 3)
    for channel in range(6):
        expected[channel, channel, 1, 1] = 1.0
    assert torch.equal(large.conv2_2.weight, expected)  # type: ignore[union-attr,arg-type]
    assert not large.conv2_2.bias.any()  # type: ignore[union-attr,operator]
    told = {c.where: (c.what, c.after) for c in changes}
    assert told["conv2_2"] == ("start", "identity")
    assert told["conv2"] == ("start", "copied")


def test_an_identity_of_copies_is_their_mean() -> None:
    """Wider and deeper at once is first deeper, then wider: 1 / copies where the channel is the same."""
    torch.manual_seed(3)
    large, changes = grown(mlp(2, 4), mlp(5, 4, new=True), VECTORS)
    first = large.fc1.weight.detach()  # type: ignore[union-attr,operator]
    weight = large.fc1b.weight.detach()  # type: ignore[union-attr,operator]
    assert torch.allclose(weight.sum(1), torch.ones(5))
    same = (first[:, None] == first[None]).all(2).double()
    copies = same.sum(1)
    rows = (weight > 0).double()
    assert torch.equal((rows @ same) > 0, rows > 0), "a row reads all copies of one channel"
    assert torch.allclose(weight.double(), rows / copies[None, :])
    assert {c.where: c.after for c in changes}["fc1"] == 5


def test_identity_by_hand() -> None:
    like = torch.empty(3, 2, 3)
    weight = identity(like, np.array([4, 5, 4]), np.array([5, 4]), np.array([1, 1]))
    assert weight is not None
    assert weight[:, :, 1].tolist() == [[0, 1], [1, 0], [0, 1]]
    assert not weight[:, :, [0, 2]].any()
    assert identity(like, np.array([4, 5, 6]), np.array([5, 4]), np.array([1, 1])) is None


def conv_net(*new: tuple[str, nn.Module], activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return chain(
        ("conv", nn.Conv2d(1, 4, 3, padding=1)),
        ("norm", nn.BatchNorm2d(4)),
        ("act", activation()),
        *new,
        ("pool", nn.AdaptiveAvgPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(16, 3)),
    )


FINE: dict[str, list[nn.Module]] = {
    "5x5": [nn.Conv2d(4, 4, 5, padding=2, bias=False), nn.ReLU()],
    "same": [nn.Conv2d(4, 4, (3, 1), padding="same"), nn.ReLU()],
    "dilated": [nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.ReLU()],
    "reflecting": [nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()],
    "depthwise": [nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU()],
    "no non-linearity": [nn.Conv2d(4, 4, 1)],
    "three in a row": [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)],
    "normalized": [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()],
    "in front of dropout": [nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Dropout()],
}


@pytest.mark.parametrize("case", FINE)
def test_layers_that_can_be_added(case: str) -> None:
    torch.manual_seed(0)
    small = trained(conv_net(), IMAGES)
    large, _ = grown(small, conv_net(*((f"new{n}", m) for n, m in enumerate(FINE[case]))), IMAGES)
    assert difference(small, large, IMAGES) < 1e-5


def test_clipped_relu_is_as_good_as_relu() -> None:
    torch.manual_seed(0)
    small = trained(conv_net(activation=nn.ReLU6), IMAGES)
    new = [("new", nn.Conv2d(4, 4, 3, padding=1)), ("act2", nn.ReLU6())]
    assert (
        difference(small, grown(small, conv_net(*new, activation=nn.ReLU6), IMAGES)[0], IMAGES)
        < 1e-5
    )


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.GELU])
def test_other_non_linearities_are_refused_and_the_network_is_left_alone(activation: Any) -> None:
    torch.manual_seed(0)
    small = trained(conv_net(activation=activation), IMAGES)
    new = [("new", nn.Conv2d(4, 4, 3, padding=1)), ("act2", activation())]
    large = conv_net(*new, activation=activation)
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    with pytest.raises(ModelMismatch, match=r"first in 'pool' \(new layers: new\)"):
        grown(small, large, IMAGES)
    assert all(torch.equal(before[name], tensor) for name, tensor in large.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(4, 4, 3, stride=2, padding=1), "does not keep height and width"),
        (nn.Conv2d(4, 4, 3), "does not keep height and width"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), "grouped convolution"),
        (nn.ConvTranspose2d(4, 4, 3, padding=1), "ConvTranspose2d"),
        (nn.GroupNorm(2, 4), "GroupNorm"),
        (nn.BatchNorm2d(4, affine=False), "no scale and shift"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_layers_that_cannot_pass_their_input_on_are_named(layer: nn.Module, why: str) -> None:
    small = trained(conv_net(), IMAGES)
    with pytest.raises(ModelMismatch, match=f"new layer 'new' cannot pass its input on.*{why}"):
        grown(small, conv_net(("new", layer)), IMAGES)


def test_a_new_normalization_undoes_itself_also_while_training() -> None:
    """Its scale and shift are its input's deviation and mean, so the batch's own statistics change little."""
    torch.manual_seed(0)
    small = trained(conv_net(), IMAGES)
    large, _ = grown(small, conv_net(("new", nn.BatchNorm2d(4))), IMAGES)
    with torch.no_grad():
        feature = small[:3](inputs(IMAGES))  # type: ignore[index]
    mean, variance = feature.mean((0, 2, 3)), feature.var((0, 2, 3), correction=0)
    norm: Any = large.new
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    torch.testing.assert_close(norm.bias, mean)
    torch.testing.assert_close(norm.weight, (variance + norm.eps).sqrt())
    with torch.no_grad():
        torch.testing.assert_close(norm.train()(feature), feature, rtol=1e-4, atol=1e-5)


def test_a_new_residual_block_answers_zero() -> None:
    torch.manual_seed(0)
    small = trained(Residual(4, 3, 1), IMAGES)
    large = Residual(4, 5, 2)
    random = large.blocks[1].conv1.weight.detach().clone()  # type: ignore[union-attr,operator]
    with pytest.raises(ModelMismatch, match=r"first in 'fc' \(new layers: blocks\.1\.conv1"):
        grown(small, large, IMAGES)
    with pytest.raises(
        NothingMatched, match=r"zero='norm3' covers none of the new layers: blocks\.1"
    ):
        grown(small, large, IMAGES, zero="norm3")
    _, changes = grown(small, large, IMAGES, zero="*.norm2")
    block: Any = large.blocks[1]
    assert not block.norm2.weight.any() and not block.norm2.bias.any()
    assert torch.equal(block.conv1.weight, random), "the rest of the block may learn at once"
    told = {c.where: c.after for c in changes}
    assert told["blocks.1.norm2"] == "zero"
    assert told["blocks.1.conv1"] == "random"


# -- Bad input ------------------------------------------------------------------------------------


def test_a_narrower_network_is_refused() -> None:
    with pytest.raises(ModelMismatch, match="'fc2' has 5 channels, in the smaller network 6"):
        grown(mlp(8, 6), mlp(8, 5), VECTORS)


def test_a_missing_layer_is_named() -> None:
    with pytest.raises(ModelMismatch, match=r"lacks fc1b\.weight, fc1b\.bias"):
        grown(mlp(8, 6, new=True), mlp(8, 6), VECTORS)


def test_other_classes_are_refused() -> None:
    large = mlp(8, 6)
    large.fc3 = nn.Linear(6, 4)
    with pytest.raises(
        ModelMismatch, match=r"dim 0 of fc3\.weight is 3 .* and 4 .*network's output"
    ):
        grown(mlp(8, 6), large, VECTORS)


def test_a_statistic_over_channels_needs_a_multiple() -> None:
    with pytest.raises(
        ModelMismatch, match=r"'a'.*copied equally often.*multiple of 6 instead of 9"
    ):
        grown(Normalized(6), Normalized(9), VECTORS)


def test_queries_and_keys_keep_their_width() -> None:
    class Attention(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(4, width), nn.Linear(4, width), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1) @ self.v(x)).mean(1)

    with pytest.raises(ModelMismatch, match=r"multiplied with each other.*Leave its width at 5"):
        grown(Attention(5), Attention(8), (6, 4))


def test_other_connections_are_refused() -> None:
    """The same tensors, connected in another way: the self-check finds it and names the layer."""

    class Skipping(nn.Module):
        def __init__(self, skip: bool) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.skip = skip

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.c(torch.relu(self.b(x)) + (x if self.skip else 0))

    with pytest.raises(ModelMismatch, match=r"net2net: .*(first in 'c'|ties channels)"):
        grown(Skipping(False), Skipping(True), VECTORS)


def test_the_network_itself_is_no_source() -> None:
    with pytest.raises(NothingChanged, match="Give the stage a larger network"):
        compress(MLP.build(), MLP.task(), [Stage(methods=[Net2net()], train=Train(epochs=1))])


def test_encoded_weights_are_refused() -> None:
    methods = [Magnitude(sparsity=0.5), Net2net()]
    stage = Stage(model=MLP.build(1), methods=methods, train=Train(epochs=1))
    with pytest.raises(InputError, match=r"encoded already.*List net2net before"):
        compress(MLP.build(), MLP.task(), [stage])


# -- In a run -------------------------------------------------------------------------------------


def test_training_goes_on_where_the_smaller_network_stopped(tmp_path: Path) -> None:
    """The score of the larger network before it has learned anything is that of the smaller one."""
    torch.manual_seed(0)
    nothing = Train(epochs=1, lr=1e-9, optimizer="sgd")
    stages = [
        Stage(name="small", train=Train(epochs=15, lr=0.02)),
        Stage(
            model=mlp(20, 9, new=True),
            methods=[Net2net(), SoftTargets(teacher="small")],
            train=nothing,
        ),
    ]
    result = compress(mlp(8, 6), MLP.task(), stages, directory=tmp_path)
    first, second = result.figures["stages"]
    assert first["score"] == second["score"] > 50
    assert second["parameters"] > first["parameters"]
    told = json.loads((tmp_path / "changes.json").read_text())[1]
    assert {c["where"]: (c["before"], c["after"]) for c in told} == {
        "fc1": (8, 20),
        "fc1b": ("random", "identity"),
        "fc2": (6, 9),
        "fc3": ("random", "copied"),
    }


def test_the_shipped_recipe_grows_step_by_step(tmp_path: Path) -> None:
    short = [f"stages.{n}.train.epochs=2" for n in range(3)]
    result = run_recipe("progressive_digits", short, directory=tmp_path / "run", watchers=())
    sizes = [stage["parameters"] for stage in result.figures["stages"]]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 10 * sizes[0]
