"""Surgery on small networks: everything that belongs to a channel goes with it, and nothing else does.

Groups are written by hand here, so that these tests stand without the analysis that finds them.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from lilliput.core.select import Weight
from lilliput.errors import CorruptArtifact, InputError, ModelMismatch, SurgeryFailed
from lilliput.mechanisms.encodings import (
    Codebook,
    Mask,
    encode,
    encoding_of,
    original_of,
    reapply,
    stored_masks,
)
from lilliput.mechanisms.groups.classes import Group, Groups, Member, Site
from lilliput.mechanisms.surgery import Plan, apply_plan, cut, plan_of, replace
from lilliput.mechanisms.surgery.transaction import rehearsal

Place = tuple[str, int, str] | tuple[str, int, str, int]


class ByHand(Groups):
    """Groups with corrections of integers that a test gives."""

    corrections: dict[str, int] = {}  # noqa: RUF012

    def attributes(self, removal: Any) -> dict[str, int]:
        return self.corrections


def group(channels: int, *places: Place, **settings: Any) -> Group:
    """A group at places (tensor, dim, role, repeats)."""
    members = []
    for tensor, dim, role, *rest in places:
        repeats = rest[0] if rest else 1
        index = np.arange(channels * repeats).reshape(channels, repeats)
        members.append(Member(tensor, dim, role, index))  # type: ignore[arg-type]
    return Group(channels, tuple(members), **settings)


def norm(name: str, *, buffers: bool = True) -> list[Place]:
    leaves = ["weight", "bias", *(["running_mean", "running_var"] if buffers else [])]
    return [(f"{name}.{leaf}", 0, "along") for leaf in leaves]


def mlp() -> tuple[nn.Module, ByHand, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    hidden = group(8, ("0.weight", 0, "makes"), ("0.bias", 0, "along"), ("2.weight", 1, "uses"))
    second = group(6, ("2.weight", 0, "makes"), ("2.bias", 0, "along"), ("4.weight", 1, "uses"))
    return net, ByHand((hidden, second)), torch.randn(4, 5)


def cnn() -> tuple[nn.Module, ByHand, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip
    net(torch.randn(8, 2, 5, 5))  # statistics that are not the identity
    first = group(
        6, ("0.weight", 0, "makes"), *norm("1"), ("3.weight", 0, "along"), ("3.bias", 0, "along"),
        ("4.weight", 1, "uses"),
    )  # fmt: skip
    second = group(4, ("4.weight", 0, "makes"), ("4.bias", 0, "along"), ("7.weight", 1, "uses", 9))
    return net, ByHand((first, second)), torch.randn(2, 2, 5, 5)


REMOVAL = {0: np.array([1, 4]), 1: np.array([2])}
STAYS = [0, 2, 3, 5, 6, 7]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 2) -> Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        loss: Tensor = net(x).square().mean()
        loss.backward()
        optimizer.step()
    return loss


def everything(net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    """Copies of all that a failed cut must leave as it is."""
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    plain = [
        {k: repr(v) for k, v in vars(m).items() if not isinstance(v, Tensor | dict)}
        for m in net.modules()
    ]
    return [
        {k: t.detach().clone() for k, t in tensors.items()},
        {k: None if t.grad is None else t.grad.clone() for k, t in tensors.items()},
        {k: (id(t), t.requires_grad, t.dtype, t.stride()) for k, t in tensors.items()},
        plain,
        [(type(m), list(m._forward_hooks), list(m._modules)) for m in net.modules()],
        copy.deepcopy(optimizer.state_dict()) if optimizer else None,
        torch.get_rng_state().clone(),
    ]


def same(a: Any, b: Any) -> bool:
    ours, theirs = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(ours) == len(theirs) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(ours, theirs, strict=True)
    )


@pytest.fixture
def untouched() -> Iterator[Callable[..., None]]:
    """Call it with the model before the failure; at the end the model must be the same."""
    watched: list[tuple[Any, ...]] = []

    def watch(*parts: Any) -> None:
        watched.append((parts, everything(*parts)))

    yield watch
    assert watched
    for parts, before in watched:
        assert same(everything(*parts), before)


# -- tensors ------------------------------------------------------------------------------------


def test_values_gradients_and_buffers_are_the_parts_that_stay() -> None:
    net, groups, x = cnn()
    net(x).sum().backward()
    before = {k: v.detach().clone() for k, v in net.state_dict().items()}
    gradients = {k: p.grad.clone() for k, p in net.named_parameters()}
    objects = {k: id(p) for k, p in net.named_parameters()}
    stays = [0, 2, 3, 5]
    cut(net, groups, {0: np.array([1, 4])})
    after = net.state_dict()
    for name in ("0.weight", "1.weight", "1.running_mean", "1.running_var", "3.weight", "3.bias"):
        assert torch.equal(after[name], before[name][stays])
    assert torch.equal(after["4.weight"], before["4.weight"][:, stays])
    assert torch.equal(after["7.weight"], before["7.weight"])
    for name, parameter in net.named_parameters():
        part = gradients[name][:, stays] if name == "4.weight" else gradients[name]
        assert torch.equal(parameter.grad, part[stays] if name[0] in "013" else part)
        assert id(parameter) == objects[name]


def test_a_cut_network_answers_as_the_one_with_silenced_channels() -> None:
    net, groups, x = cnn()
    silent = copy.deepcopy(net).eval()
    with torch.no_grad():
        silent[4].weight[:, [1, 4]] = 0
        silent[7].weight[:, 18:27] = 0  # channel 2 has 9 pixels
    done = cut(net, groups, REMOVAL, inputs=x)
    assert torch.allclose(net.eval()(x), silent(x), atol=1e-6)
    assert done.error is not None and done.error < 1e-6
    assert [(c.where, c.before, c.after) for c in done.changes] == [("0", 6, 4), ("4", 4, 3)]
    assert net[3].groups == net[3].in_channels == 4 and net[7].in_features == 27


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False), nn.Linear(4, 6))
    net[2].weight = net[0].weight
    tied = group(6, ("0.weight", 0, "makes"), ("1.weight", 1, "uses"), ("2.bias", 0, "along"))
    cut(net, ByHand((tied,)), {0: np.array([0, 5])})
    assert net[2].weight is net[0].weight and net[0].weight.shape == (4, 4)
    assert net(torch.randn(2, 4)).shape == (2, 4)


def test_a_module_that_is_called_twice_is_cut_once() -> None:
    torch.manual_seed(0)
    stem = nn.Linear(3, 6)
    shared = nn.Linear(6, 6)
    net = nn.Sequential(stem, shared, nn.ReLU(), shared, nn.Linear(6, 2))
    everywhere = group(
        6, ("0.weight", 0, "makes"), ("0.bias", 0, "along"), ("1.weight", 0, "makes"),
        ("1.weight", 1, "uses"), ("1.bias", 0, "along"), ("4.weight", 1, "uses"),
    )  # fmt: skip
    done = cut(net, ByHand((everywhere,)), {0: np.array([3])}, inputs=torch.randn(2, 3))
    assert net[1] is net[3] and net[3].weight.shape == (5, 5) and done.error < 1e-6


def test_frozen_parameters_stay_frozen() -> None:
    net, groups, x = mlp()
    net[0].requires_grad_(False)
    cut(net, groups, REMOVAL, inputs=x)
    assert not net[0].weight.requires_grad and net[2].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_keep_theirs_and_are_checked_in_float32(dtype: torch.dtype) -> None:
    net, groups, x = cnn()
    done = cut(net.to(dtype), groups, REMOVAL, inputs=x.to(dtype))
    assert net[0].weight.dtype == net[1].running_mean.dtype == dtype
    assert done.error is not None and done.error < 1e-6


def test_the_layout_of_the_weights_is_kept() -> None:
    net, groups, x = cnn()
    net.to(memory_format=torch.channels_last)
    cut(net, groups, REMOVAL, inputs=x)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not net[0].weight.is_contiguous()


def test_a_graph_that_is_still_alive_does_not_spoil_the_next_step() -> None:
    net, groups, x = mlp()
    loss = net(x).sum()
    loss.backward()
    cut(net, groups, REMOVAL)
    net.zero_grad()
    net(x).sum().backward()  # with the nodes that `loss` keeps alive it would have the old shapes
    assert net[0].weight.grad.shape == (6, 5) and loss.grad_fn is not None


def test_inside_inference_mode_the_weights_stay_trainable() -> None:
    net, groups, x = mlp()
    with torch.inference_mode():
        cut(net, groups, REMOVAL, inputs=x)
    net(x).sum().backward()
    assert net[0].weight.grad is not None


# -- optimizers ---------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "sgd_foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
}


def thinned(name: str, tensor: Tensor) -> Tensor:
    rows, columns = STAYS, [0, 1, 3, 4, 5]
    return {
        "0.weight": lambda t: t[rows], "0.bias": lambda t: t[rows], "2.bias": lambda t: t[columns],
        "2.weight": lambda t: t[columns][:, rows], "4.weight": lambda t: t[:, columns],
    }.get(name, lambda t: t)(tensor)  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_is_the_part_of_the_step_of_the_whole_network(name: str) -> None:
    """These optimizers treat each weight alone, so the parts must go on exactly as in the whole."""
    net, groups, x = mlp()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, x)
    whole = copy.deepcopy(net)
    other = OPTIMIZERS[name](whole.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    cut(net, groups, REMOVAL, optimizer=optimizer)
    for (tensor, ours), theirs in zip(net.named_parameters(), whole.parameters(), strict=True):
        theirs.grad = torch.randn(theirs.shape)
        ours.grad = thinned(tensor, theirs.grad).clone()
    optimizer.step()
    other.step()
    for (tensor, ours), theirs in zip(net.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, thinned(tensor, theirs), rtol=1e-6, atol=1e-7)


def test_factored_moments_are_cut_where_they_have_the_channels() -> None:
    net, groups, x = mlp()
    optimizer = torch.optim.Adafactor(net.parameters())
    train(net, optimizer, x)
    state = optimizer.state[net[2].weight]
    rows, columns = state["row_var"].clone(), state["col_var"].clone()
    cut(net, groups, REMOVAL, optimizer=optimizer)
    state = optimizer.state[net[2].weight]
    assert torch.equal(state["row_var"], rows[[0, 1, 3, 4, 5]])
    assert torch.equal(state["col_var"], columns[:, STAYS])
    train(net, optimizer, x)


def test_state_of_another_shape_is_left_alone() -> None:
    net, groups, _ = mlp()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    odd = torch.randn(3, 3)
    optimizer.state[net[0].weight] = {
        "odd": odd,
        "count": 7,
        "master": net[0].weight.detach().double(),
    }
    cut(net, groups, REMOVAL, optimizer=optimizer)
    state = optimizer.state[net[0].weight]
    assert state["odd"] is odd and state["count"] == 7 and state["master"].shape == (6, 5)


def test_an_optimizer_with_flat_state_is_refused(untouched: Callable[..., None]) -> None:
    net, groups, x = mlp()
    optimizer = torch.optim.LBFGS(net.parameters())
    untouched(net)
    with pytest.raises(InputError, match="LBFGS"):
        cut(net, groups, REMOVAL, inputs=x, optimizer=optimizer)


@pytest.mark.parametrize("hook", ["register_step_pre_hook", "register_step_post_hook"])
def test_a_cut_in_the_middle_of_an_optimizer_step(hook: str) -> None:
    net, groups, x = mlp()
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, x)

    def operate(*_: Any) -> None:
        cut(net, groups, REMOVAL, inputs=x, optimizer=optimizer)

    handle = getattr(optimizer, hook)(operate)
    train(net, optimizer, x, steps=1)
    handle.remove()
    train(net, optimizer, x)
    assert net[0].weight.shape == optimizer.state[net[0].weight]["exp_avg"].shape == (6, 5)


def test_a_cut_during_backward_is_refused() -> None:
    net, groups, x = mlp()
    loss = net(x).sum()
    net[4].bias.register_hook(lambda gradient: cut(net, groups, REMOVAL))
    before = everything(net)[0]
    with pytest.raises(InputError, match="backward"):
        loss.backward()
    assert same(everything(net)[0], before)


# -- encodings and parametrizations -------------------------------------------------------------


@pytest.mark.parametrize(
    "kinds", [["hard"], ["straight_through"], ["codebook"], ["codebook", "hard"]]
)
def test_encodings_are_cut_with_their_weight(kinds: list[str]) -> None:
    net, groups, x = mlp()
    weight = Weight("2", net[2], "weight")
    for kind in kinds:
        mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.6
        encode(
            weight,
            Codebook.fitted(weight.value, 2, "exact") if kind == "codebook" else Mask(mask, kind),
        )
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, x)
    stored = stored_masks(net)
    reapply(stored)
    before = thinned("2.weight", weight.value.detach().clone())
    centroids = copy.deepcopy(optimizer.state[original_of(weight)]) if "codebook" in kinds else {}
    done = cut(net, groups, REMOVAL, inputs=x, optimizer=optimizer)
    assert torch.equal(weight.value, before) and done.error < 1e-6
    if centroids:
        assert same(optimizer.state[original_of(weight)], centroids)
    train(net, optimizer, x)
    reapply(stored)
    mask = encoding_of(weight, Mask)
    if mask is not None:
        assert not weight.value[~mask.mask].any() and mask.mask.shape == (5, 6)


def test_weight_normalization_keeps_the_weight() -> None:
    net, groups, x = mlp()
    parametrizations.weight_norm(net[2])
    before = thinned("2.weight", net[2].weight.detach().clone())
    optimizer = torch.optim.Adam(net.parameters())
    originals = [id(p) for p in net.parameters()]
    cut(net, groups, REMOVAL, inputs=x, optimizer=optimizer)
    torch.testing.assert_close(net[2].weight, before)
    assert [id(p) for p in net.parameters()] == originals
    train(net, optimizer, x)


def test_spectral_normalization_is_refused(untouched: Callable[..., None]) -> None:
    net, groups, x = mlp()
    parametrizations.spectral_norm(net[2])
    net.train()
    untouched(net)
    with pytest.raises(SurgeryFailed, match=r"2\.weight.*_SpectralNorm.*remove_parametrizations"):
        cut(net, groups, REMOVAL, inputs=x)


@pytest.mark.parametrize("kind", ["weight", "spectral"])
def test_normalization_by_hooks_is_refused(kind: str, untouched: Callable[..., None]) -> None:
    net, _, _ = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(nn.utils, f"{kind}_norm")(net[2])
    leaf = "weight_v" if kind == "weight" else "weight_orig"
    groups = ByHand((group(8, ("0.weight", 0, "makes"), (f"2.{leaf}", 1, "uses")),))
    untouched(net)
    with pytest.raises(InputError, match=f"remove_{kind}_norm"):
        cut(net, groups, {0: np.array([1])})


# -- the numbers that modules keep --------------------------------------------------------------


def sizes_after(
    net: nn.Module, kept: dict[str, dict[int, list[int]]], **attributes: int
) -> nn.Module:
    plan = {t: {d: np.array(i) for d, i in dims.items()} for t, dims in kept.items()}
    apply_plan(net, Plan(plan, attributes))
    return net


def test_convolutions_know_their_channels() -> None:
    some = {0: [0, 1, 4, 5]}
    multiplied = sizes_after(
        nn.Sequential(nn.Conv2d(3, 6, 3, groups=3)), {"0.weight": some, "0.bias": some}
    )
    assert (multiplied[0].in_channels, multiplied[0].out_channels, multiplied[0].groups) == (
        2,
        4,
        2,
    )
    grouped = sizes_after(
        nn.Sequential(nn.Conv1d(8, 8, 3, groups=2)),
        {"0.weight": {0: [0, 1, 4, 5], 1: [1, 2, 3]}, "0.bias": some},
    )
    assert (grouped[0].in_channels, grouped[0].out_channels, grouped[0].groups) == (6, 4, 2)
    transposed = sizes_after(
        nn.Sequential(nn.ConvTranspose2d(6, 4, 2)),
        {"0.weight": {0: [1, 2], 1: [0, 3]}, "0.bias": {0: [0, 3]}},
    )
    assert (transposed[0].in_channels, transposed[0].out_channels) == (2, 2)
    both = sizes_after(
        nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=4)),
        {"0.weight": {0: [1, 2]}, "0.bias": {0: [1, 2]}},
    )
    assert (both[0].in_channels, both[0].out_channels, both[0].groups) == (2, 2, 2)
    for net, shape in (
        (multiplied, (1, 2, 5, 5)),
        (grouped, (1, 6, 5)),
        (transposed, (1, 2, 5, 5)),
        (both, (1, 2, 5, 5)),
    ):
        assert net(torch.randn(shape)).shape[1] == net[0].out_channels


@pytest.mark.parametrize(
    ("layer", "kept", "expected"),
    [
        (nn.LayerNorm(4), {"weight": {0: [0, 2]}, "bias": {0: [0, 2]}}, {"normalized_shape": (2,)}),
        (nn.RMSNorm(4), {"weight": {0: [0, 2]}}, {"normalized_shape": (2,)}),
        (
            nn.GroupNorm(2, 4),
            {"weight": {0: [0, 2]}, "bias": {0: [0, 2]}},
            {"num_channels": 2, "num_groups": 2},
        ),
        (
            nn.InstanceNorm1d(4, affine=True),
            {"weight": {0: [1]}, "bias": {0: [1]}},
            {"num_features": 1},
        ),
        (
            nn.BatchNorm1d(4, affine=False),
            {"running_mean": {0: [1]}, "running_var": {0: [1]}},
            {"num_features": 1},
        ),
        (nn.Embedding(5, 4), {"weight": {1: [0, 3]}}, {"embedding_dim": 2, "num_embeddings": 5}),
        (nn.PReLU(4), {"weight": {0: [0, 3]}}, {"num_parameters": 2}),
        (
            nn.Bilinear(4, 5, 6),
            {"weight": {0: [0, 1], 1: [1, 2, 3], 2: [0, 4]}, "bias": {0: [0, 1]}},
            {"out_features": 2, "in1_features": 3, "in2_features": 2},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_other_layers_know_their_sizes(
    layer: nn.Module, kept: dict[str, dict[int, list[int]]], expected: dict[str, Any]
) -> None:
    sizes_after(layer, kept)
    assert {name: getattr(layer, name) for name in expected} == expected


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("encoded", [False, True])
def test_recurrent_layers_answer_as_with_silenced_units(
    kind: type[nn.RNNBase], encoded: bool
) -> None:
    torch.manual_seed(0)
    layer = kind(3, 5, num_layers=2, batch_first=True)
    if encoded:
        encode(Weight("", layer, "weight_hh_l0"), Mask(torch.rand(layer.weight_hh_l0.shape) < 0.7))
    gates = len(layer.weight_hh_l0) // 5
    rows = [5 * gate + unit for gate in range(gates) for unit in (0, 2, 4)]
    silent = copy.deepcopy(layer)
    with torch.no_grad():  # what units 1 and 3 say arrives nowhere
        for tensor in (
            original_of(Weight("", silent, "weight_hh_l0")),
            silent.weight_hh_l1,
            silent.weight_ih_l1,
        ):
            tensor[:, [1, 3]] = 0
    kept: dict[str, dict[int, list[int]]] = {}
    for number in range(2):
        kept[f"weight_ih_l{number}"] = {0: rows} | ({1: [0, 2, 4]} if number else {})
        kept[f"weight_hh_l{number}"] = {0: rows, 1: [0, 2, 4]}
        kept |= {f"bias_{side}_l{number}": {0: rows} for side in ("ih", "hh")}
    x = torch.randn(2, 7, 3)
    sizes_after(layer, kept)
    assert layer.hidden_size == 3
    torch.testing.assert_close(layer(x)[0], silent(x)[0][..., [0, 2, 4]])


def test_unequal_layers_of_a_recurrent_network_are_refused(untouched: Callable[..., None]) -> None:
    layer = nn.RNN(3, 5, num_layers=2)
    untouched(layer)
    with pytest.raises(SurgeryFailed, match="weight_hh_l1"):
        sizes_after(layer, {"weight_hh_l0": {0: [0], 1: [0]}, "weight_ih_l0": {0: [0]}})


def test_attention_knows_its_width_and_heads() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.MultiheadAttention(8, 4, batch_first=True))
    stays = [0, 1, 4, 5]
    packed = [8 * part + row for part in range(3) for row in stays]
    sizes_after(
        net,
        {
            "0.in_proj_weight": {0: packed, 1: stays},
            "0.in_proj_bias": {0: packed},
            "0.out_proj.weight": {0: stays, 1: stays},
            "0.out_proj.bias": {0: stays},
        },
        **{"0.num_heads": 2},
    )
    x = torch.randn(2, 5, 4)
    assert net[0](x, x, x)[0].shape == (2, 5, 4)
    assert (net[0].embed_dim, net[0].num_heads, net[0].head_dim, net[0].kdim) == (4, 2, 2, 4)


def test_attention_of_unequal_widths_is_refused(untouched: Callable[..., None]) -> None:
    layer = nn.MultiheadAttention(8, 4)
    untouched(layer)
    with pytest.raises(SurgeryFailed, match="two widths equal"):
        sizes_after(layer, {"in_proj_weight": {1: [0, 1, 2, 3]}})


class Heads(nn.Module):
    """Holds widths as Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.use = nn.Linear(4, 6), nn.Linear(6, 2)
        self.heads, self.shape = 3, (3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x).view(-1, self.heads, 2).relu()
        return self.use(y.reshape(-1, self.shape[0] * self.shape[1]))


def heads() -> ByHand:
    return ByHand(
        (
            group(
                3,
                ("make.weight", 0, "makes", 2),
                ("make.bias", 0, "along", 2),
                ("use.weight", 1, "uses", 2),
            ),
        )
    )


def test_integers_of_a_user_s_module_are_corrected() -> None:
    net, groups, x = Heads(), heads(), torch.randn(3, 4)
    groups.corrections = {"heads": 2, "shape.0": 2}
    fresh = copy.deepcopy(net)
    done = cut(net, groups, {0: np.array([1])}, inputs=x)
    assert done.error < 1e-6 and (net.heads, tuple(net.shape)) == (2, (2, 2))
    apply_plan(fresh, Plan.from_dict(json.loads(json.dumps(plan_of(net).as_dict()))))
    assert torch.equal(fresh(x), net(x))


@pytest.mark.parametrize(
    "path", ["_modules", "no.such", "training", "make", "shape.7", "heads.0", "make.bias"]
)
def test_what_is_no_width_is_not_set(path: str, untouched: Callable[..., None]) -> None:
    net = Heads()
    untouched(net)
    with pytest.raises(ModelMismatch):
        apply_plan(net, Plan({}, {path: 1}))


@pytest.mark.parametrize("value", [0, -1, 4])
def test_widths_only_shrink(value: int, untouched: Callable[..., None]) -> None:
    net = Heads()
    untouched(net)
    with pytest.raises(ModelMismatch, match="only shrinks"):
        apply_plan(net, Plan({}, {"heads": value}))


# -- the self-check -----------------------------------------------------------------------------


def test_the_check_leaves_no_trace() -> None:
    """Modes, statistics, counters, gradients and generators are as without it."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.add_(1)
            return x + 0 * torch.rand(1)

    net, groups, x = cnn()
    net[2] = Noisy()
    net.train()
    net[4].eval()
    quiet = copy.deepcopy(net)
    state = torch.get_rng_state()
    cut(net, groups, REMOVAL, inputs=x)
    assert torch.equal(torch.get_rng_state(), state)
    cut(quiet, groups, REMOVAL)
    assert same(everything(net)[0], everything(quiet)[0]) and net[2].calls == 0
    assert [m.training for m in net.modules()] == [m.training for m in quiet.modules()]


def test_a_wrong_group_is_found_out_and_the_layer_named(untouched: Callable[..., None]) -> None:
    net, groups, x = cnn()
    wrong = group(6, *[(m.tensor, m.dim, m.role) for m in groups.groups[0].members[:-1]])
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, x)
    untouched(net, optimizer)
    with pytest.raises(SurgeryFailed, match=r"first in 4: .*as it was"):
        cut(net, ByHand((wrong,)), {0: np.array([2])}, inputs=x, optimizer=optimizer)


def test_a_group_that_mixes_up_channels_is_found_out(untouched: Callable[..., None]) -> None:
    """It runs, and answers something else: only the comparison can tell."""
    net, groups, x = mlp()
    members = list(groups.groups[0].members)
    members[2] = Member("2.weight", 1, "uses", members[2].index[::-1].copy())
    made = [Site(layer, "output", 0, 0, 1, members[0].index) for layer in "01"]
    mixed_up = ByHand((Group(8, tuple(members), tuple(made)),))
    untouched(net)
    with pytest.raises(SurgeryFailed, match=r"first in 2: relative error"):
        cut(net, mixed_up, {0: np.array([0])}, inputs=x)
    cut(copy.deepcopy(net), mixed_up, {0: np.array([0])}, inputs=x, tolerance=None)


def test_statistics_over_channels_are_not_compared_but_run() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    normed = group(
        6,
        ("0.weight", 0, "makes"),
        ("0.bias", 0, "along"),
        *norm("1", buffers=False),
        ("2.weight", 1, "uses"),
        mixed_by=("layer_norm",),
    )
    plain = group(8, ("2.weight", 0, "makes"), ("2.bias", 0, "along"), ("4.weight", 1, "uses"))
    x = torch.randn(3, 4)
    only = cut(copy.deepcopy(net), ByHand((normed, plain)), {0: np.array([0])}, inputs=x)
    both = cut(net, ByHand((normed, plain)), {0: np.array([0]), 1: np.array([2, 3])}, inputs=x)
    assert only.error is None and only.unchecked == both.unchecked == ("0: layer_norm",)
    assert both.error is not None and both.error < 1e-6 and net(x).shape == (3, 2)


def test_a_mixed_group_that_does_not_run_is_refused(untouched: Callable[..., None]) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    broken = group(6, ("0.weight", 0, "makes"), ("0.bias", 0, "along"), mixed_by=("layer_norm",))
    x = torch.randn(3, 4)
    untouched(net)
    with pytest.raises(SurgeryFailed, match="first in 1"):
        cut(net, ByHand((broken,)), {0: np.array([0])}, inputs=x)


def test_queries_and_keys_are_silenced_where_they_are_made() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) @ self.k(x).mT

    torch.manual_seed(0)
    pair = group(
        6, ("q.weight", 0, "makes"), ("q.bias", 0, "along"), ("k.weight", 0, "makes"), ("k.bias", 0, "along"),
        pairwise=True,
    )  # fmt: skip
    done = cut(Scores(), ByHand((pair,)), {0: np.array([0, 3])}, inputs=torch.randn(5, 4))
    assert done.error is not None and done.error < 1e-6


def test_inputs_that_do_not_fit_are_told(untouched: Callable[..., None]) -> None:
    net, groups, _ = mlp()
    wrong = torch.randn(4, 7)
    untouched(net)
    with pytest.raises(ModelMismatch, match=r"cannot run on the example inputs: .*, in 0"):
        cut(net, groups, REMOVAL, inputs=wrong)


def test_the_check_computes_in_true_float32() -> None:
    net, groups, x = mlp()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            done = cut(net, groups, REMOVAL, inputs=x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert done.error is not None and done.error < 1e-6


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        ({2: [0]}, "no group 2"), ({-1: [0]}, "no group -1"), ({0: [8]}, "counted from 0"),
        ({0: [-1]}, "counted from 0"), ({0: [2, 1]}, "ascending"), ({0: [1, 1]}, "ascending"),
        ({0: [[1]]}, "numbers"), ({0: [0.5]}, "numbers"), ({0: list(range(8))}, "Keep one"),
        ({0: [True, False]}, "numbers"),
    ],
)  # fmt: skip
def test_a_wrong_removal_is_refused(
    removal: dict[int, Any], message: str, untouched: Callable[..., None]
) -> None:
    net, groups, _ = mlp()
    untouched(net)
    with pytest.raises(InputError, match=message):
        cut(net, groups, {k: np.array(v) for k, v in removal.items()})


def test_nothing_to_remove_changes_nothing(untouched: Callable[..., None]) -> None:
    net, groups, x = mlp()
    untouched(net)
    done = cut(net, groups, {0: np.array([], int)}, inputs=x)
    assert done.changes == [] and done.plan.kept == {} and plan_of(net) is None


def test_groups_from_before_an_earlier_cut_are_refused() -> None:
    net, groups, _ = mlp()
    cut(net, groups, REMOVAL)
    with pytest.raises(ModelMismatch, match="earlier cut"):
        cut(net, groups, {1: np.array([0])})


def test_groups_of_another_network_are_refused(untouched: Callable[..., None]) -> None:
    groups, (net, _, _) = cnn()[1], mlp()
    untouched(net)
    with pytest.raises(ModelMismatch, match=r"1\.weight"):
        cut(net, groups, {0: np.array([0])})


def test_models_that_cannot_be_cut_are_refused() -> None:
    net, groups, _ = mlp()
    gone = {0: np.array([0])}
    with pytest.raises(InputError, match="meta"):
        cut(copy.deepcopy(net).to("meta"), groups, gone)
    with pytest.raises(InputError, match="Run the model once"):
        cut(nn.Sequential(nn.LazyLinear(3)), groups, gone)
    with pytest.raises(InputError, match="compile"):
        cut(torch.compile(net), groups, gone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(net)
    with pytest.raises(InputError, match="TorchScript"):
        cut(scripted, groups, gone)


def test_a_sparse_tensor_is_refused_only_where_it_would_be_cut() -> None:
    net, groups, x = mlp()
    net.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(SurgeryFailed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cut(net, groups, REMOVAL, inputs=x, edit=lambda model: 1 / 0)
    assert net.graph.to_dense().equal(torch.eye(3)) and net[0].weight.shape == (8, 5)
    cut(net, groups, REMOVAL, inputs=x)
    net[4].weight = nn.Parameter(net[4].weight.detach().to_sparse())
    last = group(5, ("2.weight", 0, "makes"), ("2.bias", 0, "along"), ("4.weight", 1, "uses"))
    with pytest.raises(InputError, match="to_dense"):
        cut(net, ByHand((last,)), {0: np.array([0])})
    assert net[2].weight.shape == (5, 6)


def test_a_tensor_of_another_class_is_refused(untouched: Callable[..., None]) -> None:
    class Sharded(torch.Tensor):
        pass

    net, groups, _ = mlp()
    net[2].register_buffer("scale", torch.ones(6).as_subclass(Sharded))
    members = (*groups.groups[1].members, Member("2.scale", 0, "along", np.arange(6)[:, None]))
    untouched(net)
    with pytest.raises(InputError, match="Sharded"):
        cut(net, ByHand((Group(6, members),)), {0: np.array([0])})


def test_a_data_parallel_wrapper_is_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        net, groups, _ = mlp()
        with pytest.raises(InputError, match=r"model\.module"):
            cut(nn.parallel.DistributedDataParallel(net), groups, {0: np.array([0])})
    finally:
        torch.distributed.destroy_process_group()


# -- edits, and failures ------------------------------------------------------------------------


def test_an_edit_belongs_to_the_cut() -> None:
    net, groups, x = mlp()

    def double(model: nn.Module) -> None:
        assert model[2].weight.shape == (5, 6)
        replace(model[2].bias, 2 * model[2].bias)

    expected = 2 * net[2].bias.detach()[[0, 1, 3, 4, 5]]
    cut(net, groups, REMOVAL, inputs=x, edit=double)
    assert torch.equal(net[2].bias, expected)


@pytest.mark.parametrize(
    ("problem", "seen"),
    [
        (RuntimeError("no"), SurgeryFailed),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (InputError("no"), InputError),
    ],
)
def test_a_failing_edit_undoes_everything(
    problem: BaseException, seen: type[BaseException], untouched: Callable[..., None]
) -> None:
    net, groups, x = cnn()
    encode(Weight("0", net[0], "weight"), Mask(torch.rand(6, 2, 3, 3) < 0.5))
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, x)

    def spoil(model: nn.Module) -> None:
        replace(model[4].bias, torch.zeros(3))
        model[4].bias.requires_grad_(False)
        model.register_buffer("extra", torch.zeros(1))
        model[2] = nn.Identity()
        model[7].register_forward_hook(lambda *_: None)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        optimizer.zero_grad()
        torch.rand(3)
        model.eval()
        raise problem

    untouched(net, optimizer)
    with pytest.raises(seen):
        cut(net, groups, REMOVAL, inputs=x, optimizer=optimizer, edit=spoil)


def test_a_replacement_has_the_shape_that_it_replaces() -> None:
    layer = nn.Linear(2, 3)
    with pytest.raises(ModelMismatch, match="shape"):
        replace(layer.weight, torch.zeros(2, 3))


def test_a_rehearsal_is_undone() -> None:
    net, groups, x = mlp()
    before = everything(net)
    with rehearsal(net):
        cut(net, groups, REMOVAL, inputs=x)
        assert net(x).shape == (4, 3)
    assert same(everything(net), before) and plan_of(net) is None


# -- plans --------------------------------------------------------------------------------------


def test_a_plan_adds_up_over_cuts_and_thins_a_fresh_network() -> None:
    net, groups, x = mlp()
    fresh, early = copy.deepcopy(net), copy.deepcopy(net)
    cut(net, groups, REMOVAL)
    apply_plan(early, plan_of(net))
    again = group(6, ("0.weight", 0, "makes"), ("0.bias", 0, "along"), ("2.weight", 1, "uses"))
    cut(net, ByHand((again,)), {0: np.array([0, 5])})
    plan = plan_of(net)
    assert plan.kept["0.weight"][0].tolist() == [2, 3, 5, 6]
    for other in (fresh, early):
        apply_plan(other, plan)
        assert torch.equal(other(x), net(x)) and plan_of(other) == plan
    apply_plan(net, plan)  # there is nothing left to do
    assert torch.equal(copy.deepcopy(net)(x), fresh(x)) and plan_of(copy.deepcopy(net)) == plan


def test_a_thinned_part_of_another_network_keeps_its_plan() -> None:
    net, groups, x = mlp()
    whole = copy.deepcopy(net)
    cut(net, groups, REMOVAL)
    parent, fresh = nn.ModuleDict({"body": net}), nn.ModuleDict({"body": whole})
    apply_plan(fresh, plan_of(parent))
    assert torch.equal(fresh["body"](x), net(x))
    assert plan_of(fresh) == plan_of(parent)
    assert plan_of(nn.ModuleDict({"body": mlp()[0]})) is None


def test_a_network_that_is_too_thin_for_a_plan_is_refused(untouched: Callable[..., None]) -> None:
    net, groups, _ = mlp()
    other = copy.deepcopy(net)
    cut(net, groups, REMOVAL)
    cut(other, groups, {0: np.array([0])})
    untouched(net)
    with pytest.raises(ModelMismatch, match="fresh instance"):
        apply_plan(net, plan_of(other))


def test_a_plan_is_small() -> None:
    wide = np.flatnonzero(np.random.default_rng(0).random(512) < 0.5)
    pixels = (wide[:, None] * 49 + np.arange(49)).reshape(-1)
    plan = Plan({"a.weight": {0: wide}, "a.bias": {0: wide}, "b.weight": {1: pixels}})
    text = json.dumps(plan.as_dict())
    assert len(text) < 300
    assert Plan.from_dict(json.loads(text)) == plan


HOSTILE = {
    "not a plan": [1],
    "unknown key": {"sets": [], "tensors": {}, "code": "x"},
    "no sets": {"tensors": {}},
    "sets no list": {"sets": "AA", "tensors": {}},
    "set no text": {"sets": [3], "tensors": {}},
    "no base64": {"sets": ["%%%"], "tensors": {}},
    "not ASCII": {"sets": ["ä"], "tensors": {}},
    "empty": {"sets": [""], "tensors": {}},
    "empty bits": {"sets": ["AA"], "tensors": {}},
    "runs of nothing": {"sets": ["0*gA"], "tensors": {}},
    "negative runs": {"sets": ["-3*gA"], "tensors": {}},
    "runs no number": {"sets": ["٣*gA"], "tensors": {}},
    "huge": {"sets": ["99999999*gA"], "tensors": {}},
    "many huge": {"sets": ["2097152*gA"] * 99, "tensors": {}},
    "beyond its size": {"sets": ["3:+A"], "tensors": {}},
    "size of nothing": {"sets": ["0:gA"], "tensors": {}},
    "no such set": {"sets": ["gA"], "tensors": {"0.weight": [1]}},
    "negative set": {"sets": ["gA"], "tensors": {"0.weight": [-1]}},
    "set no number": {"sets": ["gA"], "tensors": {"0.weight": [True]}},
    "dims no list": {"sets": ["gA"], "tensors": {"0.weight": 0}},
    "many dims": {"sets": ["gA"], "tensors": {"0.weight": [0] * 99}},
    "attribute no number": {"sets": [], "tensors": {}, "attributes": {"heads": "3"}},
    "attributes no mapping": {"sets": [], "tensors": {}, "attributes": [3]},
}


@pytest.mark.parametrize("plan", HOSTILE.values(), ids=HOSTILE)
def test_a_broken_plan_is_corrupt(plan: Any) -> None:
    with pytest.raises(CorruptArtifact, match="plan"):
        Plan.from_dict(plan)


@pytest.mark.parametrize(
    "plan",
    [
        {"sets": ["gA"], "tensors": {"9.weight": [0]}},
        {"sets": ["gA"], "tensors": {"0.nothing": [0]}},
        {"sets": ["gA"], "tensors": {"": [0]}},
        {"sets": ["9:gA"], "tensors": {"0.weight": [0]}},
        {"sets": ["gA"], "tensors": {"0.training": [0]}},
        {"sets": ["gA"], "tensors": {"0.weight": [None, None, 0]}},
        {"sets": ["AAE"], "tensors": {"0.weight": [0]}},
        {"sets": ["gA"], "tensors": {"0.weight": [0]}, "attributes": {"0.in_features": 9}},
    ],
)
def test_a_plan_of_another_network_is_refused(plan: Any, untouched: Callable[..., None]) -> None:
    net, _, _ = mlp()
    untouched(net)
    with pytest.raises(ModelMismatch):
        apply_plan(net, Plan.from_dict(plan))
