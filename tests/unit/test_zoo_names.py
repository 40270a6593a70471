"""Networks of timm, torchvision and transformers by name: built, refused, trained, saved, loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput import artifact
from lilliput.architectures._zoo import FirstOutput, builder
from lilliput.core.recipe import ModelSettings
from lilliput.engine.recipes import build_model, validate
from lilliput.errors import InputError, MissingDependency, RecipeError, UnknownName
from lilliput.mechanisms.initializing import draw_fresh_weights
from lilliput.testing import stand_in_for_torchvision

stand_in_for_torchvision()

VIT = {
    "head": "ImageClassification", "num_labels": 10, "image_size": 16, "patch_size": 4,
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
# Reference, package, arguments.
NETWORKS: list[tuple[str, str, dict[str, Any]]] = [
    ("timm:mobilenetv3_small_050", "timm", {"num_classes": 10, "in_chans": 3}),
    ("torchvision:shufflenet_v2_x0_5", "torchvision", {"num_classes": 10}),
    ("hf:vit", "transformers", VIT),
]
EACH = pytest.mark.parametrize(("reference", "package", "arguments"), NETWORKS)


def images(reference: str) -> Tensor:
    side = 16 if reference.startswith("hf") else 32
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@EACH
def test_a_recipe_names_it(reference: str, package: str, arguments: dict[str, Any]) -> None:
    pytest.importorskip(package)
    settings = ModelSettings(architecture=reference, arguments=arguments)
    model = build_model(settings).eval()
    with torch.no_grad():
        assert model(images(reference)).shape == (2, 10)


@EACH
def test_its_file_loads_without_a_model(
    reference: str, package: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip(package)
    model = lilliput.build(reference, **arguments).eval()
    path, x = tmp_path / "net.safetensors", images(reference)
    lilliput.save(model, path)
    with torch.no_grad():
        assert torch.equal(lilliput.load(path)(x), model(x))
    with artifact.open(path) as file:
        assert file.structure["architecture"] == reference


def test_a_thinner_one_loads_too(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    model = lilliput.build("torchvision:squeezenet1_1", num_classes=10).eval()
    x = torch.rand(1, 3, 32, 32)
    thin = lilliput.thin(model, x).model
    lilliput.save(thin, tmp_path / "thin.safetensors")
    with torch.no_grad():
        assert torch.equal(lilliput.load(tmp_path / "thin.safetensors")(x), thin(x))


def test_it_can_get_new_weights() -> None:
    pytest.importorskip("timm")
    model = lilliput.build("timm:mobilenetv3_small_050", num_classes=10)
    before = model.conv_stem.weight.clone()
    draw_fresh_weights(model, seed=1)
    assert not torch.equal(model.conv_stem.weight, before)


@pytest.mark.parametrize(
    ("reference", "package", "message"),
    [
        (
            "timm:resnet81",
            "timm",
            "no network of timm is named 'resnet81'. Did you mean 'resnet18'",
        ),
        ("timm:hf-hub:someone/net", "timm", "no network of timm"),
        ("torchvision:vgg61", "torchvision", "no network of torchvision .*Did you mean .*'vgg16'"),
        ("hf:vitt", "transformers", "no kind of network of transformers .* Did you mean 'vit'"),
        ("tim:resnet18", "torch", "no collection of networks is named 'tim'. Did you mean 'timm'"),
    ],
)
def test_unknown_networks(reference: str, package: str, message: str) -> None:
    pytest.importorskip(package)
    with pytest.raises(UnknownName, match=message):
        lilliput.build(reference)
    recipe = {"task": "digits", "model": {"architecture": reference}, "stages": [{"train": {}}]}
    with pytest.raises(RecipeError, match=f"model: {message}"):
        validate(recipe)


def test_a_tag_of_timm_is_part_of_the_name() -> None:
    pytest.importorskip("timm")
    assert callable(builder("timm:resnet18.a1_in1k"))
    with pytest.raises(UnknownName):
        builder("timm:resnet18.b9_in1k")


@pytest.mark.parametrize(
    ("reference", "module", "extra"),
    [("timm:resnet18", "timm", "zoo"), ("torchvision:vgg16", "torchvision.models", "zoo"),
     ("hf:vit", "transformers", "text")],
)  # fmt: skip
def test_without_the_package(
    reference: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, module, None
    )  # what Python does with a module that is not there
    package = module.partition(".")[0]
    message = rf"{reference}' needs the package '{package}'.*pip install 'lilliput\[{extra}\]'"
    with pytest.raises(MissingDependency, match=message):
        build_model(ModelSettings(architecture=reference))


def test_a_package_built_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("lilliput.architectures._zoo.optional", fails)
    with pytest.raises(
        InputError, match=r"timm is installed and cannot be imported.*torchvision::nms"
    ):
        builder("timm:resnet18")


# --- what could fetch -------------------------------------------------------------------------------


def test_nothing_is_fetched_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("torchvision.models")

    def remember(*_: Any, **arguments: Any) -> nn.Module:
        asked.update(arguments)
        return nn.Identity()

    monkeypatch.setattr(timm, "create_model", remember)
    lilliput.build("timm:resnet18", num_classes=3)
    assert asked == {"pretrained": False, "num_classes": 3}
    made = lilliput.build("timm:resnet18", num_classes=3, pretrained=True)
    assert asked == {"pretrained": True, "num_classes": 3}
    # The file brings the weights: to build the network again nothing need be fetched.
    assert made.lilliput_origin == {
        "architecture": "timm:resnet18",
        "arguments": {"num_classes": 3},
    }

    def detector(*, weights: Any = None, weights_backbone: Any = "DEFAULT") -> nn.Module:
        return remember(weights=weights, weights_backbone=weights_backbone)

    monkeypatch.setattr(models, "get_model_builder", lambda _name: detector)
    asked.clear()
    lilliput.build("torchvision:fasterrcnn_resnet50_fpn")
    assert asked == {"weights": None, "weights_backbone": None}
    lilliput.build("torchvision:fasterrcnn_resnet50_fpn", pretrained=True)
    assert asked == {"weights": "DEFAULT", "weights_backbone": None}


@pytest.mark.parametrize(
    ("reference", "package", "arguments", "named"),
    [
        ("timm:resnet18", "timm", {"checkpoint_path": "x.pth"}, "checkpoint_path"),
        ("timm:resnet18", "timm", {"pretrained_cfg": {"url": "http://x"}}, "pretrained_cfg"),
        ("torchvision:resnet18", "torchvision", {"weights": "DEFAULT"}, "weights"),
        ("hf:vit", "transformers", {"attn_implementation": "a/b"}, "attn_implementation"),
        ("hf:vit", "transformers", {"_attn_implementation": "a/b"}, "_attn_implementation"),
        ("hf:detr", "transformers", {"backbone_config": {"use_pretrained_backbone": True}},
         "use_pretrained_backbone"),
        ("hf:timm_wrapper", "transformers", {"architecture": "hf-hub:a/b"}, "architecture"),
    ],
)  # fmt: skip
def test_other_ways_to_fetch_are_refused(
    reference: str, package: str, arguments: dict[str, Any], named: str
) -> None:
    pytest.importorskip(package)
    with pytest.raises(InputError, match=f"'{named}' is not taken.*pretrained: true"):
        build_model(ModelSettings(architecture=reference, arguments=arguments))


def test_a_file_cannot_make_load_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    model = lilliput.build("timm:mobilenetv3_small_050", num_classes=10)
    origin: Any = model.lilliput_origin
    path, real, asked = tmp_path / "net.safetensors", timm.create_model, []

    def create(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        asked.append(pretrained)
        made: nn.Module = real(name, **arguments)
        return made

    monkeypatch.setattr(timm, "create_model", create)
    origin["arguments"]["pretrained"] = True
    lilliput.save(model, path)
    lilliput.load(path)
    assert asked and not any(asked)
    origin["arguments"]["checkpoint_path"] = "evil.pth"
    lilliput.save(model, path)
    with pytest.raises(InputError, match="checkpoint_path"):
        lilliput.load(path)


# --- arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "package", "arguments", "message"),
    [
        ("timm:resnet18", "timm", {"num_clases": 3}, "cannot be built with .*num_clases"),
        ("torchvision:resnet18", "torchvision", {"classes": 3}, "cannot be built with .*classes"),
        ("hf:vit", "transformers", {"hidden_sise": 3}, "Did you mean 'hidden_size'"),
        ("hf:vit", "transformers", {"hidden_size": "wide"}, "expected int, got str"),
        ("hf:vit", "transformers", {"head": "ImageClasification"}, "'ImageClassification'"),
        ("hf:bert", "transformers", {"head": "ImageClassification"}, "Unrecognized configuration"),
        ("hf:vit", "transformers", {"pretrained": True}, "no weights of its own"),
    ],
)
def test_arguments_that_the_package_does_not_take(
    reference: str, package: str, arguments: dict[str, Any], message: str
) -> None:
    pytest.importorskip(package)
    with pytest.raises(InputError, match=message):
        build_model(ModelSettings(architecture=reference, arguments=arguments))


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def offline(*_: Any, **__: Any) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"no route to host Where .* give the file as weights"):
        lilliput.build("timm:resnet18", pretrained=True)


# --- transformers -----------------------------------------------------------------------------------


def test_text_goes_in_as_a_mapping_and_a_tensor_comes_out() -> None:
    pytest.importorskip("transformers")
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 32}
    tokens = torch.randint(50, (2, 7))
    hidden = lilliput.build("hf:bert", **small)
    assert hidden(input_ids=tokens, attention_mask=torch.ones_like(tokens)).shape == (2, 7, 16)
    classes = lilliput.build("hf:bert", head="SequenceClassification", num_labels=5, **small)
    assert classes(tokens).shape == (2, 5)
    assert isinstance(classes, FirstOutput)


@pytest.mark.parametrize("kind", ["mamba2", "gemma3_text"])
def test_unusual_settings_are_remembered(kind: str) -> None:
    """Infinite limits, which JSON lacks; settings whose names begin with an underscore."""
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model = lilliput.build(f"hf:{kind}", num_hidden_layers=1)
        origin: Any = json.loads(json.dumps(model.lilliput_origin, allow_nan=False))
        again = lilliput.build(origin["architecture"], **origin["arguments"])
    assert again.lilliput_origin == origin
    assert [*again.state_dict()] == [*model.state_dict()]


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {k: v for k, v in VIT.items() if k != "head"}
    config = transformers.AutoConfig.for_model("vit", **settings)
    published = transformers.AutoModelForImageClassification.from_config(config).eval()
    folder = tmp_path / "published"
    published.save_pretrained(folder)

    reference = f"hf:{folder}"
    head = {"head": "ImageClassification"}
    x = images("hf:vit")
    fresh = lilliput.build(reference, **head).eval()
    filled = lilliput.build(reference, **head, pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(filled(x), published(x).logits)
        assert not torch.equal(fresh(x), filled(x))
    # The file does not need the folder.
    origin: Any = filled.lilliput_origin
    assert origin["architecture"] == "hf:vit"
    assert json.loads(json.dumps(origin)) == origin
    lilliput.save(filled, tmp_path / "net.safetensors")
    for file in folder.iterdir():
        file.unlink()
    with torch.no_grad():
        assert torch.equal(lilliput.load(tmp_path / "net.safetensors")(x), filled(x))


def test_a_repository_that_is_not_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")

    def empty(_name: str, *, local_files_only: bool) -> Any:
        assert local_files_only
        raise OSError("We couldn't find it in the cached files.\nmore")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", empty)
    with pytest.raises(
        InputError, match=r"config.json cannot be had.*cached files. Nothing is fetched"
    ):
        lilliput.build("hf:someone/net")
