"""Pairs of stages that once went wrong, beside those whose turn it is in the contract suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lilliput
from lilliput import Stage
from lilliput.core.select import weights
from lilliput.errors import InputError
from lilliput.mechanisms.encodings import Codebook, StepGrid, encoding_of, original_of
from lilliput.testing import NETWORKS
from lilliput.testing.contract import Trained, stage_of
from lilliput.testing.examples import registered_examples
from lilliput.testing.networks import TinyNetwork

EXAMPLES = {method.method_name(): method for method in registered_examples()}
MLP, CNN, TRANSFORMER = NETWORKS


def ran(names: tuple[str, str], network: TinyNetwork, folder: Path) -> Trained:
    """The network that a stage for each of the methods has trained; its file holds it."""
    trained = Trained()
    stages = [stage_of([EXAMPLES[name]], network) for name in names]
    result = lilliput.compress(
        network.build(), network.task(), stages, directory=folder, watchers=[trained]
    )
    trained.assert_is_in(result)
    return trained


@pytest.mark.parametrize("pruning", ["neuron_merging", "energy_aware", "surgeon"])
@pytest.mark.parametrize("shared", ["hessian_codebook", "entropy_codebook"])
def test_what_prunes_finds_the_nearest_of_values_that_all_layers_share(
    shared: str, pruning: str, tmp_path: Path
) -> None:
    """A layer without zeros has a code for zero all the same there."""
    run = ran((shared, pruning), MLP, tmp_path).run
    assert run is not None
    for weight in weights(run.model):
        if encoding_of(weight, Codebook) is not None:
            possible = torch.cat([original_of(weight).new_zeros(1), original_of(weight)])
            assert torch.isin(weight.value, possible).all()


@pytest.mark.parametrize("shared", ["codebook", "hessian_codebook", "soft_weight_sharing"])
@pytest.mark.parametrize("integers", ["post_training", "learned_step"])
def test_values_that_are_shared_on_a_grid_stay_on_it(
    integers: str, shared: str, tmp_path: Path
) -> None:
    """The list of values lies inside, the grid with its step for each filter around it."""
    run = ran((integers, shared), CNN, tmp_path).run
    assert run is not None
    both = [w for w in weights(run.model) if encoding_of(w, Codebook) is not None]
    assert both
    for weight in both:
        grid = encoding_of(weight, StepGrid)
        assert grid is not None and weight.encodings()[0].kind == "codebook"
        torch.testing.assert_close(grid.integers(weight.value) * grid.step, weight.value)


@pytest.mark.parametrize("later", ["surgeon", "energy_aware", "post_training", "learned_step"])
def test_a_linear_layer_that_looks_up_is_not_taken_for_one_that_multiplies(
    later: str, tmp_path: Path
) -> None:
    """Trees and additive models have such layers; their inputs are places, not numbers."""
    stages = [stage_of([EXAMPLES["transparent"]], MLP), Stage(methods=[EXAMPLES[later]])]
    with pytest.raises(InputError, match=r"leaves|layers"):
        lilliput.compress(MLP.build(), MLP.task(), stages, directory=tmp_path)
