"""``lilliput profile``: what a network costs, which channels may go, which layers bear compression.

The surprising rule: the figures are those of one sample. MACs, memory, energy and latency need
inputs, which come from a task, from ``--input``, or from the recipe that a compressed file carries.
"""

from __future__ import annotations

import json as json_text
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from torch import nn

from ..core.recipe import TaskSettings
from ..core.task import Task
from ..engine.recipes import build_task
from ..errors import InputError
from ..measure import HOROWITZ_45NM, Macs, Size, measure, size
from ..mechanisms.groups import find_groups
from ._network import inputs_of, network_of
from ._print import columns, note, print_json, print_text


def profile(
    model: str,
    /,
    *,
    task: str | None = None,
    input_: str | None = None,
    weights: Path | None = None,
    sensitivity: bool = False,
    save: Path | None = None,
    deploy: bool = False,
    picture: Path | None = None,
    json: bool = False,
) -> int:
    """Measure a network: size, work, memory, latency, sensitivity.

    The energy is an estimate. Without a task and without an input only the size is counted.

    Args:
        model: an architecture's name, timm:NAME and the like, package.module:function, or a compressed file.
        task: a task's name or package.module:function; its first sample is the input.
        input_: shape of a random input instead, for example 1,3,224,224.
        weights: a file to fill the network from.
        sensitivity: scan each layer: the score against sparsity and against bits. Needs a task.
        save: write the scan to this file. The report shows RUN/sensitivity.json of its runs.
        deploy: time the network in each runtime that is installed, as it is, in 8-bit integers, and with half
            of the channels, against the most that this machine can do.
        picture: write an SVG picture of these times as well.
        json: print one JSON object.
    """
    if picture is not None and not deploy:
        raise InputError("--picture draws the times of --deploy: give both.")
    with redirect_stdout(sys.stderr if json else sys.stdout):
        network, found = network_of(model, weights, "profile")
        asked = TaskSettings(name=task) if task else found
        job = build_task(asked) if asked else None
        content = _figures(network, inputs_of(job, input_))
        if sensitivity:
            content["sensitivity"] = _scan(network, job, save)
        if deploy:
            content["deployment"] = _deployment(network, job, input_)
    content = {"model": model, **content}
    if picture is not None:
        _draw(content, picture)
    if json:
        print_json(content)
    else:
        print_text(_render(content))
    return 0


def _figures(model: nn.Module, inputs: Any) -> dict[str, Any]:
    if inputs is None:
        held = size(model)
        return {
            "parameters": held.parameters,
            "nonzeros": held.nonzeros,
            "dense_bytes": held.dense_bytes,
            "layers": _layers(held, None),
        }
    taken = measure(model, inputs, also=("latency", "memory", "energy"))
    figures = {**taken.as_dict(), "energy_source": HOROWITZ_45NM.source}
    return {
        **figures,
        "layers": _layers(taken.size, taken.macs),
        "channels": _channels(model, inputs),
    }


def _channels(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Which channels can be removed together, and why others cannot."""
    try:
        found = find_groups(model, inputs)
    except InputError as error:  # the network's other figures are worth having
        return {"groups": [], "unprunable": {"all": str(error)}}
    groups = [
        {"group": group.name, "channels": group.channels, "layers": list(group.layers)}
        for group in found.groups
    ]
    return {"groups": groups, "unprunable": found.unprunable}


def _layers(held: Size, work: Macs | None) -> list[dict[str, Any]]:
    """Parameters, non-zeros and MACs of each module that has parameters or work of its own."""
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in held.tensors.items():
        if tensor.is_parameter:
            layer = layers.setdefault(name.rpartition(".")[0], {"parameters": 0, "nonzeros": 0})
            layer["parameters"] += tensor.elements
            layer["nonzeros"] += tensor.nonzeros
    by_module = {} if work is None else work.by_module
    for name in by_module:
        layers.setdefault(name, {"parameters": 0, "nonzeros": 0})
    known = work is not None
    return [
        {"layer": name, **counts, "macs": by_module.get(name, 0) if known else None}
        for name, counts in layers.items()
        if counts["parameters"] or by_module.get(name)
    ]


def _scan(model: nn.Module, task: Task | None, save: Path | None) -> dict[str, Any]:
    if task is None:
        raise InputError("--sensitivity measures scores, so it needs a task: give --task NAME.")
    from ..measure.sensitivity import sensitivity

    note("scanning each layer ...")
    found = {"score_name": task.score_name, **sensitivity(model, task).as_dict()}
    if save is not None:
        save.write_text(json_text.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _deployment(model: nn.Module, task: Task | None, shape: str | None) -> dict[str, Any]:
    from ._deployed import as_dict, profile_deployment

    inputs = inputs_of(task, shape)
    if inputs is None:
        raise InputError(
            "--deploy runs the network, so it needs --task NAME or --input 1,3,224,224."
        )
    return as_dict(*profile_deployment(model, inputs, task))


def _draw(content: dict[str, Any], out: Path) -> None:
    from ..report import Bar, draw_bars

    rows = content["deployment"]["rows"]
    bars = [
        Bar(
            r["runtime"],
            r["seconds"],
            f"{r['variant']}, {r['seconds'] * 1e3:.2f} ms",
            f"{r['faster']:.1f}x",
        )
        for r in rows
    ]
    draw_bars(out, content["model"], "time of one sample", "faster than in torch", bars)


def _render(content: dict[str, Any]) -> str:
    parts = [columns(_summary(content)), _layer_table(content)]
    if "channels" in content:
        parts += _channel_tables(**content["channels"])
    if "macs" not in content:
        parts.append("MACs, memory, energy and latency need --task NAME or --input 1,3,224,224.")
    if "sensitivity" in content:
        parts.append(_scan_table(content["sensitivity"]))
    if "deployment" in content:
        from ._deployed import render

        parts.append(render(content["deployment"]))
    return "\n\n".join(parts)


def _summary(content: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("parameters", f"{content['parameters']:,}"),
        ("non-zeros", f"{content['nonzeros']:,}"),
        ("dense bytes", f"{content['dense_bytes']:,}"),
    ]
    if "macs" not in content:
        return rows
    uncounted = ", ".join(f"{name} ({calls}x)" for name, calls in content["uncounted"].items())
    return [
        *rows,
        ("MACs", f"{content['macs']:,}"),
        ("MACs without zeros", f"{content['sparse_macs']:,} (if a runtime skips them)"),
        ("not counted", uncounted or "nothing"),
        ("peak activations", f"{content['peak_activation_bytes']:,} bytes"),
        ("energy estimate", f"{content['energy_pj'] / 1e6:,.2f} uJ ({content['energy_source']})"),
        ("latency", f"{content['latency_seconds'] * 1e3:.3f} ms (one thread, median)"),
    ]


def _layer_table(content: dict[str, Any]) -> str:
    rows = [
        (
            layer["layer"] or "(model)",
            f"{layer['parameters']:,}",
            f"{layer['nonzeros']:,}",
            "" if layer["macs"] is None else f"{layer['macs']:,}",
        )
        for layer in content["layers"]
    ]
    return columns([("layer", "parameters", "non-zeros", "MACs"), *rows], right=(1, 2, 3))


def _channel_tables(groups: list[dict[str, Any]], unprunable: dict[str, str]) -> list[str]:
    """A row for each group of channels, and a row for each dim whose channels must stay."""
    rows = [(g["group"], f"{g['channels']:,}", ", ".join(g["layers"])) for g in groups]
    parts = [columns([("channels of", "count", "made by"), *rows], right=(1,))] if rows else []
    if unprunable:
        parts.append(columns([("channels that stay", "because"), *unprunable.items()]))
    return parts


def _scan_table(scan: dict[str, Any]) -> str:
    """A table for sparsity and one for bits: a row a layer, a column an amount."""
    kinds = dict.fromkeys(row["kind"] for row in scan["rows"])
    head = f"sensitivity: {scan['score_name']}, {scan['baseline']:.2f} untouched"
    return "\n\n".join([head, *(_amounts(kind, scan["rows"]) for kind in kinds)])


def _amounts(kind: str, rows: list[dict[str, Any]]) -> str:
    scores: dict[str, dict[float, str]] = {}
    for row in rows:
        if row["kind"] == kind:
            scores.setdefault(row["layer"], {})[row["amount"]] = f"{row['score']:.2f}"
    amounts = list(next(iter(scores.values())))
    head = (kind, *(f"{amount:g}" for amount in amounts))
    body = [(layer, *(found[amount] for amount in amounts)) for layer, found in scores.items()]
    return columns([head, *body], right=range(1, len(head)))
