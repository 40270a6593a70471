"""Networks of other packages by name: ``timm:resnet18``, ``torchvision:vgg16``, ``hf:vit``.

Their arguments are those of the package, with three surprising rules. Weights are random unless
``pretrained=True``, and nothing is fetched without it; what would fetch or unpickle in another way is
refused. An artifact holds the weights itself, so loading one asks for none, even if the file says so. And
a network of transformers returns a tensor: its logits, or the first of its outputs.

``hf:NAME`` takes a kind of network of transformers (``vit``, ``bert``), a folder with a ``config.json``,
or a repository of the hub whose ``config.json`` is in the cache. Its arguments are settings of the
configuration, and ``head``: ``ImageClassification`` for ``AutoModelForImageClassification``; without it
there is no head. With ``pretrained=True`` weights come from the folder or the repository, and a
repository is downloaded. What cannot be had offline: a repository that is not in the cache. Never:
networks that bring their own code.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.optional import optional
from ..errors import InputError, LilliputError, UnknownName

#: ``(pretrained, arguments)`` to a network, and the name and arguments under which to build it again.
Make = Callable[[bool, dict[str, Any]], tuple[nn.Module, str, dict[str, Any]]]

#: Arguments by which these packages would fetch weights or code, or unpickle a file.
_REFUSED = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights",
    "weights_backbone", "use_pretrained_backbone", "quantization_config", "auto_map", "trust_remote_code",
}  # fmt: skip
#: How a name begins that timm would look for elsewhere than among its own.
_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:", "https:", "http:")
#: What a configuration of transformers says of its past, not of the network. Labels are only counted.
_HISTORY = {
    "model_type", "transformers_version", "architectures", "id2label", "label2id", "_name_or_path",
}  # fmt: skip


class FirstOutput(nn.Module):
    """A network of transformers that returns a tensor, as losses and other runtimes want it.

    Args:
        network: of transformers; its tensors' names begin with ``network.`` here.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The logits, or without a head the hidden states of the last layer."""
        output = self.network(*inputs, **named)
        found: Tensor = output.logits if hasattr(output, "logits") else output[0]
        return found


def builder(reference: str) -> Callable[..., nn.Module]:
    """A function that builds a network of another package, and lets it remember how.

    Args:
        reference: for example ``"timm:resnet18"``.

    Raises:
        UnknownName: there is no such collection, or it has no such network.
        MissingDependency: the package is not installed.
        InputError: it is, and cannot be imported.

    Example::

        builder("timm:resnet18")(num_classes=10, in_chans=1)
        builder("hf:vit")(head="ImageClassification", num_labels=10, image_size=32, patch_size=4)
    """
    collection, _, name = reference.partition(":")
    if collection not in COLLECTIONS:
        raise UnknownName("collection of networks", collection, COLLECTIONS)
    make = COLLECTIONS[collection](name)

    def build(pretrained: bool = False, **arguments: Any) -> nn.Module:
        _refuse(reference, arguments)
        try:
            model, found, kept = make(pretrained, arguments)
        except LilliputError:
            raise
        except Exception as error:  # these packages raise whatever they like
            raise InputError(_failure(reference, pretrained, arguments, error)) from error
        origin: Any = {"architecture": f"{collection}:{found}", "arguments": kept}
        model.lilliput_origin = origin
        return model

    return build


def _refuse(reference: str, arguments: Any, key: str = "") -> None:
    """Refuse what would fetch, at any depth; what is empty or false fetches nothing."""
    if arguments and (_fetches(key) or str(arguments).startswith(_ELSEWHERE)):
        raise InputError(
            f"{reference}: the argument {key!r} is not taken, since it could fetch weights or code. Give "
            "pretrained: true for the published weights, or a file as weights beside the architecture."
        )
    if isinstance(arguments, dict):
        for name, value in arguments.items():
            _refuse(reference, value, str(name))
    elif isinstance(arguments, list):
        for value in arguments:
            _refuse(reference, value)


def _fetches(key: str) -> bool:
    bare = key.lstrip("_")
    return bare in _REFUSED or bare.startswith(("attn_implementation", "experts_implementation"))


def _failure(reference: str, pretrained: bool, arguments: Any, error: BaseException) -> str:
    told = f"{type(error).__name__}: {error}"
    while error.__cause__ is not None:  # transformers puts its own words around what has failed
        error = error.__cause__
        told += f" ({type(error).__name__}: {error})"
    advice = ""
    if pretrained:
        advice = (
            " Where there is no connection, get the weights elsewhere and give the file as weights."
        )
    return f"{reference} cannot be built with {arguments}: {told}{advice}"


def _package(module: str, extra: str, name: str) -> Any:
    package = module.partition(".")[0]
    try:
        return optional(module, package, extra, f"the network {name!r}")
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # a binary that was built for another torch
        raise InputError(
            f"{package} is installed and cannot be imported: {error}. Install the {package} that belongs to "
            f"torch {torch.__version__}."
        ) from error


def _timm(name: str) -> Make:
    timm = _package("timm", "zoo", f"timm:{name}")
    known = timm.list_models()
    if name not in known and name not in timm.list_models(
        pretrained=True
    ):  # with a tag, resnet18.a1_in1k
        raise UnknownName("network of timm", name, known)

    def make(pretrained: bool, arguments: dict[str, Any]) -> tuple[nn.Module, str, dict[str, Any]]:
        return timm.create_model(name, pretrained=pretrained, **arguments), name, arguments

    return make


def _torchvision(name: str) -> Make:
    models = _package("torchvision.models", "zoo", f"torchvision:{name}")
    known = models.list_models()
    if name not in known:
        raise UnknownName("network of torchvision", name, known)
    function = models.get_model_builder(name)

    def make(pretrained: bool, arguments: dict[str, Any]) -> tuple[nn.Module, str, dict[str, Any]]:
        weights: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
        if "weights_backbone" in inspect.signature(function).parameters:
            weights["weights_backbone"] = None  # by default torchvision would fetch them
        return function(**weights, **arguments), name, arguments

    return make


def _hf(name: str) -> Make:
    transformers = _package("transformers", "text", f"hf:{name}")
    kinds = list(transformers.CONFIG_MAPPING.keys())
    if name not in kinds and "/" not in name and not (Path(name) / "config.json").is_file():
        raise UnknownName("kind of network of transformers", name, kinds)
    return partial(_make_hf, transformers, name, name in kinds)


def _make_hf(
    transformers: Any, name: str, is_kind: bool, pretrained: bool, arguments: dict[str, Any]
) -> tuple[nn.Module, str, dict[str, Any]]:
    if pretrained and is_kind:
        raise InputError(
            f"hf:{name} is a kind of network and has no weights of its own: name a folder or a repository, "
            "or leave pretrained out."
        )
    settings: dict[str, Any] = _floats(arguments)
    head = settings.pop("head", "")
    auto = _auto(transformers, head)
    config = _config(transformers, name, is_kind, pretrained, settings)
    if pretrained:
        network = auto.from_pretrained(name, config=config, use_safetensors=True)
    else:
        network = auto.from_config(config)
    told = _told(json.loads(config.to_json_string(use_diff=False)))  # all, since defaults change
    kept = {k: v for k, v in told.items() if k not in _HISTORY}
    kept |= {"head": head, "num_labels": config.num_labels}
    return FirstOutput(network), config.model_type, kept


def _told(settings: Any) -> Any:
    """What may be an argument again: how attention is computed, say, is no property of the network."""
    if isinstance(settings, dict):
        return {k: _told(v) for k, v in settings.items() if not _fetches(k)}
    return settings


def _floats(settings: Any) -> Any:
    """Numbers that JSON lacks, from the form that transformers gives them: {"__float__": "Infinity"}."""
    if isinstance(settings, list):
        return [_floats(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    if settings.keys() == {"__float__"}:
        return float(settings["__float__"])
    return {key: _floats(value) for key, value in settings.items()}


def _auto(transformers: Any, head: str) -> Any:
    """The class that chooses a class."""
    name = f"AutoModelFor{head}" if head else "AutoModel"
    if not hasattr(transformers, name):
        heads = [n.removeprefix("AutoModelFor") for n in dir(transformers) if "AutoModelFor" in n]
        raise UnknownName("head of transformers", head, heads)
    return getattr(transformers, name)


def _config(
    transformers: Any, name: str, is_kind: bool, online: bool, settings: dict[str, Any]
) -> Any:
    """A configuration, after checking that it has the settings: transformers would take any."""
    if is_kind:
        make = partial(transformers.AutoConfig.for_model, name)
    else:
        make = partial(transformers.AutoConfig.from_pretrained, name, local_files_only=not online)
    try:
        plain = make()
    except OSError as error:
        raise InputError(
            f"hf:{name}: its config.json cannot be had: {str(error).partition(chr(10))[0]} Nothing is "
            "fetched without pretrained: true; a folder with a config.json can be named too."
        ) from error
    known = {*plain.to_dict(), *plain.attribute_map, "num_labels"} - _HISTORY
    for key in settings:
        if key not in known:
            raise UnknownName(f"setting of hf:{name}", key, known)
    return make(**settings) if settings else plain


COLLECTIONS: dict[str, Callable[[str], Make]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _hf,
}
