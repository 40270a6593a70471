"""``lilliput init``: a recipe to start from."""

from __future__ import annotations

from pathlib import Path

from ..core import registry
from ..errors import InputError
from ._print import print_json, print_text

TEMPLATE = """\
# One line on what this recipe is for; `lilliput list recipes` shows it.
version: 1

# What the model must do: a name from `lilliput list tasks`, or package.module:function.
# Arguments go beside the name: {name: digits, batch_size: 64}
task: digits

# Which network: a name from `lilliput list architectures`, or your own, with its trained weights:
# {build: package.module:function, weights: trained.safetensors}
model: {architecture: digits_cnn}

seed: 0
device: auto        # a GPU where there is one
threads: 1          # tiny networks run faster on one thread

stages:
  # Without trained weights, train first. What follows is compared with what this stage leaves.
  - name: train
    train: {epochs: 20, optimizer: adam, lr: 2e-3, lr_schedule: cosine}

  # Set nine of ten weights to zero, slowly, while the trained network teaches.
  - name: sparsify
    methods:
      - {method: gradual, sparsity: 0.9}          # `lilliput show gradual` explains the settings
      - {method: soft_targets, teacher: original, temperature: 4}
    train: {epochs: 20, optimizer: adam, lr: 2e-3, lr_schedule: cosine, keep: best}

  # Let the remaining weights of each layer share 2**4 values.
  - name: cluster
    methods:
      - {method: codebook, bits: 4}
    train: {epochs: 5, optimizer: adam, lr: 2e-4, keep: best}

# How the file is written; codec auto takes the smallest for each tensor.
artifact: {codec: auto, floats: float16, profile: compact}

# The run ends with exit code 3 if a condition does not hold. Any figure of result.json will do.
expect: {score_drop: "<= 2", size_ratio: ">= 15"}
"""


def init(recipe: Path, /, *, from_: str | None = None, json: bool = False) -> int:
    """Write a commented recipe to start from.

    Args:
        recipe: the file to write, ending in .yaml; a file that exists is not overwritten.
        from_: copy this shipped recipe instead of the commented example.
        json: print one JSON object with the file's path.
    """
    if recipe.suffix not in (".yaml", ".yml"):
        raise InputError(f"{recipe} should end in .yaml, so that a run takes it for a file.")
    _write_new(recipe, TEMPLATE if from_ is None else _shipped(from_))
    if json:
        print_json({"recipe": str(recipe)})
    else:
        print_text(f"{recipe} is written. Edit it, then: lilliput validate {recipe}")
    return 0


def _shipped(name: str) -> str:
    path = registry.find("recipe", name).path
    assert path is not None  # recipes are files
    return path.read_text(encoding="utf-8")


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InputError(f"{path} exists, and is left as it is. Choose another name.") from error
