"""Encodings: whatever is stacked on a weight, the rules of the module's docstring hold."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lilliput.core.select import Weight, select
from lilliput.errors import UnknownName
from lilliput.mechanisms.encodings import (
    Binary,
    Codebook,
    Encoding,
    Held,
    IntegerGrid,
    LeftOut,
    Mask,
    Threshold,
    bake,
    describe,
    encode,
    encoding_of,
    original_of,
    reapply,
    rebuild,
    stored_masks,
    strip,
    take_off,
)
from lilliput.mechanisms.ranking import count, keep_largest, keep_largest_together

#: Those of which a weight has one at most: they lie innermost and say which values there are.
VALUES = ("codebook", "binary", "by_filter", "integer_grid")
KINDS = ("hard", "straight_through", "held", "threshold", "left_out", *VALUES)


def one_of_values(kinds: list[str]) -> bool:
    return len(set(kinds) & set(VALUES)) <= 1


stacks = st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).filter(one_of_values)
seeds = st.integers(0, 2**31)
few = settings(max_examples=30, deadline=None)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def make(kind: str, weight: Weight, seed: int) -> Encoding:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(weight.value.shape, generator=generator)
    made = {
        "codebook": lambda: Codebook.fitted(weight.value, 2, "exact"),
        "binary": lambda: Binary(drawn + 0.1),
        "by_filter": lambda: Binary(drawn + 0.1, by_filter=True),
        "integer_grid": lambda: IntegerGrid(3, 4.0),
        "held": lambda: Held(drawn < 0.6, drawn),
        "threshold": lambda: Threshold(weight.value.detach(), 5e-3, 1e-2),
        "left_out": lambda: LeftOut(drawn < 0.3),
    }
    return made[kind]() if kind in made else Mask(drawn < 0.6, kind)


def stack_up(model: nn.Module, kinds: list[str], seed: int) -> nn.Module:
    for number, kind in enumerate(kinds):
        for weight in select(model):
            if weight.value.count_nonzero():
                encode(weight, make(kind, weight, seed + number))
    return model


def outputs(model: nn.Module) -> Tensor:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: Tensor = model(x)
        return result


@few
@given(stacks, seeds)
def test_one_of_a_kind_and_always_in_the_same_order(kinds: list[str], seed: int) -> None:
    model = stack_up(network(seed), kinds, seed)
    for weight in select(model):
        found = [e.kind for e in weight.encodings()]
        assert len(set(found)) == len(found)
        depths = [e.depth for e in weight.encodings()]
        assert depths == sorted(depths)
        innermost = [e.innermost for e in weight.encodings()]
        assert innermost == [place == 0 for place in range(len(found))]


@few
@given(stacks, seeds)
def test_what_trains_stays_as_it_is_when_more_is_put_on_and_taken_off(
    kinds: list[str], seed: int
) -> None:
    """A mask that lets everything through changes nothing, nor does taking it off again."""
    model = stack_up(network(seed), kinds, seed).eval()
    with torch.no_grad():
        for weight in select(model):
            if any(e.kind in ("codebook", "binary", "integer_grid") for e in weight.encodings()):
                original_of(weight).mul_(1.7)  # it has trained since it was put on
    known = [(original_of(w).detach().clone(), w.value.detach().clone()) for w in select(model)]
    for weight in select(model):
        if weight.encodings() and encoding_of(weight, Mask) is None:
            encode(weight, Mask(torch.ones_like(weight.value, dtype=torch.bool)))
    middle = [(original_of(w).detach().clone(), w.value.detach().clone()) for w in select(model)]
    for weight in select(model):
        if len(weight.encodings()) > 1 and "hard" not in kinds and "straight_through" not in kinds:
            take_off(weight, Mask)
    after = [(original_of(w).detach().clone(), w.value.detach().clone()) for w in select(model)]
    for one, two, three in zip(known, middle, after, strict=True):
        assert all(
            torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True)
        )


@few
@given(stacks, seeds)
def test_order_of_putting_on_does_not_matter(kinds: list[str], seed: int) -> None:
    """A mask and a codebook that are built beforehand give the same weight in either order."""
    results = []
    for reverse in (False, True):
        model = network(seed)
        for weight in select(model):
            both = [make("hard", weight, seed), make("codebook", weight, seed)]
            for encoding in reversed(both) if reverse else both:
                encode(weight, encoding)
        results.append([w.value.detach().clone() for w in select(model)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@few
@given(stacks, seeds)
@example(
    ["hard", "held"], 11139
)  # what is held may be under the mask and above the codebook's zero
def test_a_mask_outside_a_codebook_stays_zero(kinds: list[str], seed: int) -> None:
    plain = [kind for kind in kinds if kind not in VALUES]
    model = stack_up(network(seed), [*plain, "codebook", "hard"], seed)
    for weight in select(model):
        mask = encoding_of(weight, Mask)
        # A weight of which the masks left nothing has no codebook, and its zeros are stored.
        if mask is not None and encoding_of(weight, Codebook) is not None:
            with torch.no_grad():
                original_of(weight).add_(1.0)
            assert not weight.value[~mask.mask].any()


@few
@given(stacks, seeds)
def test_deep_copies_are_independent(kinds: list[str], seed: int) -> None:
    model = stack_up(network(seed), kinds, seed)
    before = outputs(model)
    copied = copy.deepcopy(model)
    assert torch.equal(outputs(copied), before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert torch.equal(outputs(model), before)
    bake(copied)
    assert torch.equal(outputs(model), before)
    assert describe(model) and not describe(copied)


@few
@given(stacks, seeds)
def test_baking_leaves_outputs_bit_equal(kinds: list[str], seed: int) -> None:
    model = stack_up(network(seed), kinds, seed)
    before, names = outputs(model), set(network(seed).state_dict())
    bake(model)
    assert torch.equal(outputs(model), before)
    assert set(model.state_dict()) == names
    assert all(isinstance(w.value, nn.Parameter) for w in select(model))


@few
@given(stacks, seeds)
def test_describe_and_rebuild(kinds: list[str], seed: int) -> None:
    """Through JSON, into another network, with the state on top."""
    model = stack_up(network(seed), kinds, seed)
    other = network(seed + 1)
    rebuild(other, json.loads(json.dumps(describe(model))))
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other), outputs(model))
    assert describe(other) == describe(model)


@few
@given(stacks, seeds, st.sampled_from(["sgd", "adam"]))
def test_zeros_persist_under_an_optimizer(kinds: list[str], seed: int, optimizer: str) -> None:
    """SGD with momentum and weight decay, and Adam; the momentum is there before the masks are."""
    model = network(seed)
    x, y = torch.randn(16, 5), torch.randn(16, 3)

    def step(moves: torch.optim.Optimizer) -> None:
        moves.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        moves.step()
        reapply(stored_masks(model))

    stack_up(model, [k for k in kinds if k != "straight_through"] + ["hard"], seed)
    model.eval()  # where nothing is left out
    moves: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 0.1, weight_decay=1e-2)
    if optimizer == "sgd":
        moves = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    masks = {w.name: encoding_of(w, Mask) for w in select(model)}
    zeros = {name: ~mask.mask for name, mask in masks.items() if mask is not None}
    for _ in range(10):
        step(moves)
        for weight in select(model):
            if weight.name in zeros:
                assert not weight.value[zeros[weight.name]].any()


@few
@given(seeds)
def test_straight_through_gives_the_dense_gradient(seed: int) -> None:
    """At the masked weight, for pruned weights too."""
    model = nn.Linear(5, 4, bias=False)
    (weight,) = select(model)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)) < 0.5
    value = weight.value.detach().clone()
    encode(weight, Mask(mask, "straight_through"))
    x = torch.randn(8, 5)
    model(x).square().sum().backward()
    dense = (value * mask).requires_grad_(True)
    (x @ dense.T).square().sum().backward()
    original = original_of(weight)
    assert original.grad is not None
    assert dense.grad is not None
    torch.testing.assert_close(original.grad, dense.grad)
    assert torch.equal(original.detach(), value), "pruned values are kept"


@few
@given(seeds)
def test_updated_mask_is_stored_at_reapply(seed: int) -> None:
    model = stack_up(network(seed), ["hard"], seed)
    for weight in select(model):
        mask = encoding_of(weight, Mask)
        assert mask is not None
        mask.update(torch.zeros_like(mask.mask))
    reapply(stored_masks(model))
    assert not any(w.value.any() for w in select(model))


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_follow_their_encodings(cls: type[nn.LSTM]) -> None:
    torch.manual_seed(0)
    layer = cls(4, 6, batch_first=True)
    x = torch.randn(2, 3, 4)
    for weight in select(layer):
        encode(weight, Mask(torch.rand(weight.value.shape) < 0.5))
    masked = layer(x)[0]
    plain = cls(4, 6, batch_first=True)
    plain.load_state_dict(bake(copy.deepcopy(layer)).state_dict())
    assert torch.equal(masked, plain(x)[0])
    masked.sum().backward()
    assert all(original_of(w).grad is not None for w in select(layer))


def test_stripping_what_is_plain_does_nothing() -> None:
    model = network(0)
    parameter = model[0].weight
    strip(select(model)[0])
    assert model[0].weight is parameter


def test_unknown_policy_and_kind_are_refused() -> None:
    with pytest.raises(UnknownName, match="mask policy is named 'soft'"):
        Mask(torch.ones(2), "soft")
    with pytest.raises(UnknownName, match="encoding is named 'wavelet'"):
        rebuild(network(0), {"0.weight": [{"kind": "wavelet"}]})


# -- ranking ------------------------------------------------------------------------------------

scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 7.0]), min_size=1, max_size=60)
sparsities = st.floats(0, 1, exclude_max=True)


@given(scores, sparsities)
def test_keep_largest_drops_exactly_the_rounded_count(values: list[float], sparsity: float) -> None:
    """However many ties there are."""
    tensor = torch.tensor(values)
    mask = keep_largest(tensor, sparsity)
    assert int((~mask).sum()) == round(sparsity * len(values)) == count(len(values), sparsity)
    if 0 < int(mask.sum()) < len(values):
        assert tensor[mask].min() >= tensor[~mask].max()


@given(st.lists(scores, min_size=1, max_size=5), sparsities)
def test_together_every_tensor_keeps_its_largest(parts: list[list[float]], sparsity: float) -> None:
    tensors = [torch.tensor(part) for part in parts]
    masks = keep_largest_together(tensors, sparsity)
    total = sum(len(part) for part in parts)
    for tensor, mask in zip(tensors, masks, strict=True):
        assert mask.shape == tensor.shape
        if total - round(sparsity * total) >= len(parts):
            assert mask.any()
            assert tensor[mask].max() == tensor.max()
    if total - round(sparsity * total) >= len(parts):
        assert sum(int((~m).sum()) for m in masks) == round(sparsity * total)


def test_together_keeps_one_weight_a_tensor_at_any_sparsity() -> None:
    tensors = [torch.rand(10), torch.rand(10) + 100, torch.rand(10)]
    for sparsity in (0.9, 0.95, 0.999):
        assert all(m.any() for m in keep_largest_together(tensors, sparsity))


@given(st.integers(1, 30), st.integers(1, 30), sparsities, seeds)
def test_keep_largest_keeps_the_shape(rows: int, columns: int, sparsity: float, seed: int) -> None:
    tensor = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = keep_largest(tensor, sparsity)
    assert mask.shape == tensor.shape
    expected = tensor.flatten().sort().values[count(tensor.numel(), sparsity) :]
    assert torch.equal(tensor[mask].sort().values, expected)


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv2d(2, 3, 1), nn.LSTM(3, 4)], ids=repr)
def test_parameters_come_back_in_their_order(layer: nn.Module) -> None:
    before = [name for name, _ in layer.named_parameters()]
    for weight in list(select(layer, "*")):
        encode(weight, Mask(torch.ones_like(weight.value, dtype=torch.bool)))
        encode(weight, Codebook.fitted(weight.value, bits=2, init="linear"))
    bake(layer)
    assert [name for name, _ in layer.named_parameters()] == before
    assert [name for name, _ in copy.deepcopy(layer).named_parameters()] == before


@few
@given(stacks, seeds)
def test_no_gradient_of_another_shape_is_left(kinds: list[str], seed: int) -> None:
    """Neither of the dense weight behind shared values nor of these behind a dense weight."""
    net = network(seed)

    def backward_and_check() -> None:
        for parameter in net.parameters():
            assert parameter.grad is None or parameter.grad.shape == parameter.shape
        net(torch.randn(4, 5)).sum().backward()

    backward_and_check()
    for kind in kinds:
        for weight in select(net):
            encode(weight, make(kind, weight, seed))
        backward_and_check()
    bake(net)
    backward_and_check()
