"""Sparse execution: the same outputs, and a decision for every layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import Stage, Train
from lilliput.deploy import csr, sparse
from lilliput.deploy.csr import SparseProduct
from lilliput.errors import InputError, ModelMismatch
from lilliput.methods import Magnitude
from lilliput.testing import NETWORKS

LAYERS = [
    (nn.Linear(40, 30), (40,)),
    (nn.Linear(40, 30, bias=False), (7, 40)),
    (nn.Linear(40, 30), (2, 5, 40)),
    (nn.Conv2d(16, 24, 1), (3, 16, 6, 5)),
    (nn.Conv2d(16, 24, 1, stride=2, bias=False), (3, 16, 7, 5)),
    (nn.Conv1d(16, 24, 1, stride=3), (2, 16, 9)),
    (nn.Conv3d(4, 6, 1), (2, 4, 3, 3, 3)),
]


def pruned(layer: Any, density: float = 0.1) -> Any:
    with torch.no_grad():
        layer.weight.mul_(
            torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < density
        )
    return layer


@pytest.mark.parametrize("library", ["torch", "scipy"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: type(x).__name__)
def test_the_product_is_the_layer(layer: Any, shape: tuple[int, ...], library: str) -> None:
    layer, inputs = pruned(copy.deepcopy(layer)), torch.randn(shape)
    product = SparseProduct(layer, library)
    with torch.no_grad():
        for module in (product, copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
            torch.testing.assert_close(module(inputs), layer(inputs))
    assert len(product.values) == int(layer.weight.count_nonzero())


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), pruned(nn.Conv2d(32, 64, 1), 0.05), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), pruned(nn.Linear(1024, 300), 0.02), nn.ReLU(),
        nn.Linear(300, 10),
    ).eval()  # fmt: skip


def settings(**more: Any) -> dict[str, Any]:
    return {"seconds": 0.02, **more}


def test_every_layer_has_a_decision_and_the_model_stays() -> None:
    model, x = network().train(), torch.randn(4, 3, 16, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = sparse(model, x, **settings(faster=float("inf"), remove_channels=False))
    assert [d.layer for d in found.decisions] == ["0", "2", "6", "8"]
    by = {d.layer: d for d in found.decisions}
    assert by["0"].reason == "a convolution that is not 1x1"
    assert by["8"].reason == "100.0 % of the weights are not zero"
    assert {by["2"].runs, by["6"].runs} <= {"torch", "scipy"}
    assert by["2"].ratio is not None
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "2 of 4 layers skip zeros" in repr(found)
    assert len(found.summary().splitlines()) == 4


def test_what_is_not_faster_stays_dense() -> None:
    found = sparse(network(), torch.randn(4, 3, 16, 16), **settings(faster=1e-9))
    assert all(d.runs == "dense" for d in found.decisions)
    tried = [d for d in found.decisions if d.ratio is not None]
    assert [d.reason for d in tried] == ["dense is faster here"] * 2
    assert not any(isinstance(m, SparseProduct) for m in found.model.modules())


def test_channels_that_nobody_reads_are_removed() -> None:
    model, x = network(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        model[2].weight[:, 5:9] = 0.0  # type: ignore[index]
        model[8].weight[:, :100] = 0.0  # type: ignore[index]
    found = sparse(model, x, **settings())
    widths = {c.where: (c.before, c.after) for c in found.removed}
    assert widths["0"][1] <= 28
    assert widths["6"][1] == 200
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_pruned_run_gets_thinner() -> None:
    """Dead neurons of unstructured pruning go physically."""
    mlp = NETWORKS[0]
    stage = Stage(methods=[Magnitude(sparsity=0.95, scope="global")], train=Train(epochs=1))
    model = lilliput.compress(mlp.build(), mlp.task(), [stage]).model
    x = next(iter(mlp.task().validation)).inputs
    found = sparse(model, x, **settings())
    assert found.removed
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_layer_called_twice_and_one_in_another_type_stay_dense() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = pruned(nn.Linear(20, 20), 0.05)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    (decision,) = sparse(Twice(), torch.randn(2, 20), **settings()).decisions
    assert decision.reason == "not called on the example, or more than once"
    double = nn.Sequential(pruned(nn.Linear(20, 20), 0.05)).double()
    (decision,) = sparse(double, torch.randn(2, 20).double(), **settings()).decisions
    assert decision.reason == "of type float64"


def test_bad_input() -> None:
    with pytest.raises(ModelMismatch):
        sparse(network(), torch.randn(4, 5, 16, 16))
    with pytest.raises(InputError, match=r"model\.cpu"):
        sparse(nn.Linear(3, 3, device="meta"), torch.randn(1, 3))


def encoder() -> tuple[nn.TransformerEncoder, Tensor]:
    layer = nn.TransformerEncoderLayer(16, 2, 256, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    for module in model.layers:
        pruned(module.linear1, 0.05)
    return model, torch.randn(3, 7, 16)


def test_a_transformers_layer_is_not_run_on_the_dense_weights() -> None:
    """Torch would run it as one operator, and looks for the weights of its layers on the way to that."""
    model, x = encoder()
    padded = torch.arange(7).expand(3, 7) >= torch.tensor([[7], [5], [4]])
    found = sparse(model, x, **settings(faster=float("inf"), remove_channels=False)).model
    alone = sparse(model.layers[0], x, **settings(faster=float("inf"), remove_channels=False)).model
    assert isinstance(found.get_submodule("layers.1.linear1"), SparseProduct)
    assert isinstance(alone.get_submodule("linear1"), SparseProduct)
    calls: list[str] = []
    for name, module in found.named_modules():
        if isinstance(module, SparseProduct):
            times = module._times
            module._times = lambda c, t=times, n=name: calls.append(n) or t(c)  # type: ignore
    with torch.no_grad():
        torch.testing.assert_close(alone(x), model.layers[0](x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-5)
        ours = found(x, src_key_padding_mask=padded)[~padded]
        theirs = model(x, src_key_padding_mask=padded)[~padded]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert calls == ["layers.0.linear1", "layers.1.linear1"] * 2


@pytest.mark.parametrize("index", [1, 4, 5, 6])
def test_the_weight_is_there_for_who_asks(index: int) -> None:
    layer = pruned(copy.deepcopy(LAYERS[index][0]))
    assert torch.equal(SparseProduct(layer, "scipy").weight, layer.weight)


def test_outputs_want_no_gradient(monkeypatch: Any) -> None:
    """A dense layer in front would hand scipy a tensor that it cannot take."""
    monkeypatch.delitem(csr._PRODUCTS, "torch")
    model = nn.Sequential(nn.Linear(30, 40), pruned(nn.Linear(40, 30), 0.05)).eval()
    x = torch.randn(4, 30)
    found = sparse(model, x, **settings(faster=float("inf"), remove_channels=False))
    assert found.decisions[1].runs == "scipy"
    torch.testing.assert_close(found.model(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_alone_is_replaced_itself() -> None:
    layer, x = pruned(nn.Linear(128, 128), 0.01), torch.randn(4, 128)
    found = sparse(layer, x, **settings(faster=float("inf")))
    assert isinstance(found.model, SparseProduct)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", ["torch", "scipy"])
def test_a_product_follows_its_tensors(library: str) -> None:
    """What it multiplies by is made once, and made anew when the tensors become others."""
    one, x = pruned(nn.Linear(40, 30)), torch.randn(5, 40)
    two = pruned(nn.Linear(40, 30))
    two.weight.data = two.weight.data.flip(1).contiguous()
    product, other = SparseProduct(one, library), SparseProduct(two, library)
    with torch.no_grad():
        product(x)
        product.load_state_dict(other.state_dict())
        torch.testing.assert_close(product(x), two(x))
        torch.testing.assert_close(product.double()(x.double()), two.double()(x.double()))
