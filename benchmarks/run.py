"""Run the experiments that are missing or have changed, each with its seeds; print what came out.

    python benchmarks/run.py                       # all experiments
    python benchmarks/run.py lenet_300_100 --jobs 2
    python benchmarks/run.py --table               # only print the tables

An experiment is a YAML file in ``benchmarks/experiments``: a shipped recipe, overrides, and seeds. Its result
lies in ``benchmarks/results/NAME.json``. It is done again when the recipe, the overrides or the
seeds have changed; seeds that are done already are kept. Killed and started again, it goes on.

An experiment about thinner networks has ``widths``: the layers whose widths are shown (``inputs`` stands for
the inputs that are still used) and, for each stage that is shown, what the paper reports of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from lilliput import artifact
from lilliput.engine.recipes import find_recipe

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of experiments' names; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--experiments", type=Path, default=HERE / "experiments")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/benchmarks"), help="run directories"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables")
    options = parser.parse_args()
    known = sorted(options.experiments.glob("**/*.yaml"))
    chosen = [p for p in known if not options.names or any(n in p.stem for n in options.names)]
    if not options.table:
        run_all(chosen, options)
    for path in chosen:
        show(options.results / f"{path.stem}.json")
    found = [p for path in chosen if (p := options.results / f"{path.stem}.json").exists()]
    results = [json.loads(path.read_text()) for path in found]
    thin = [content for content in results if "widths" in content["experiment"]]
    small = [content for content in results if content not in thin]
    if small:
        print("\n" + markdown(small))
    if coded := [c for c in small if all(run["deep_compression"] for run in c["runs"])]:
        print("\n" + columns(coded))
    if thin:
        print("\n" + widths(thin))


def run_all(paths: list[Path], options: argparse.Namespace) -> None:
    work = [(path, seed) for path in paths for seed in missing(path, options)]
    print(f"{len(work)} runs to do", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(lambda item: run_one(*item, options), work):
            pass


def missing(path: Path, options: argparse.Namespace) -> list[int]:
    experiment = read(path)
    result = options.results / f"{path.stem}.json"
    known = json.loads(result.read_text()) if result.exists() else {}
    if not same(known, experiment):
        return experiment["seeds"]
    done = {run["seed"] for run in known["runs"]}
    return [seed for seed in experiment["seeds"] if seed not in done]


def same(known: dict[str, Any], experiment: dict[str, Any]) -> bool:
    """Whether a result was made by this experiment: its recipe's text and its overrides."""
    made_by = known.get("experiment", {})
    return all(made_by.get(k) == experiment.get(k) for k in ("recipe_digest", "overrides"))


def run_one(path: Path, seed: int, options: argparse.Namespace) -> None:
    """One run in a process of its own, then its line in the result."""
    experiment = read(path)
    directory = options.work / f"{path.stem}-{seed}-{experiment['recipe_digest'][:6]}"
    overrides = [*experiment.get("overrides", []), f"seed={seed}", f"device={options.device}"]
    script = (
        "import json, sys, torch; from pathlib import Path; from lilliput.api import run_recipe;"
        "recipe, home, *more = sys.argv[1:];"
        "from lilliput.engine.memory import keep_freed_memory; keep_freed_memory();"
        "torch.set_num_threads(1);"
        "run_recipe(recipe, more, directory=home, watchers=())"
    )
    command = [sys.executable, "-c", script, experiment["recipe"], str(directory), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{path.stem} seed {seed} failed:\n{done.stderr[-2000:]}", flush=True)
        return
    environment = json.loads((directory / "environment.json").read_text())
    figures = portable(json.loads((directory / "result.json").read_text()))
    for stage in figures["stages"]:
        stage["inputs"] = inputs_used(directory / stage["artifact"])
    figures |= {"seed": seed, "environment": environment}
    add(options.results / f"{path.stem}.json", experiment, figures)
    print(f"{path.stem} seed {seed}: {summary(figures)}", flush=True)


def portable(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures without the directories of the machine that made them: results are committed."""
    home = Path(figures.pop("run"))
    for found in (figures, *figures["stages"]):
        if "artifact" in found:
            found["artifact"] = str(home.joinpath(found["artifact"]).relative_to(home))
    return figures


def inputs_used(path: Path) -> int:
    """How many inputs of a file's first layer have a weight that is not zero."""
    with artifact.open(path) as file:
        first = next(name for name in file.names() if len(file.info(name).shape) > 1)
        weight = file.dense(first)
    return int(np.count_nonzero(weight.any(axis=(0, *range(2, weight.ndim)))))


def add(path: Path, experiment: dict[str, Any], figures: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    runs = known["runs"] if same(known, experiment) else []
    runs = sorted(
        [r for r in runs if r["seed"] != figures["seed"]] + [figures], key=lambda r: r["seed"]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"experiment": experiment, "runs": runs}, indent=1) + "\n")


def show(path: Path) -> None:
    if not path.exists():
        print(f"{path.stem}: not run yet")
        return
    content = json.loads(path.read_text())
    print(
        f"\n{path.stem}: {content['experiment']['recipe']} {content['experiment'].get('overrides', '')}"
    )
    for run in content["runs"]:
        print(f"  seed {run['seed']}: {summary(run)}")
    runs = content["runs"]
    for name in ("baseline_score", "score", "score_drop", "validation", "bytes", "size_ratio"):
        values = [run[name] for run in runs]
        print(f"  {name}: mean {mean(values):.3f}, from {min(values):.3f} to {max(values):.3f}")


def markdown(results: list[dict[str, Any]]) -> str:
    """The table that the README shows: mean and spread over the seeds."""
    rows = [
        "| network, data | score, dense | score, compressed | change | bytes on disk | smaller | reported |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*rows, *map(markdown_row, results)])


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{deviation}"


def markdown_row(content: dict[str, Any]) -> str:
    experiment, runs = content["experiment"], content["runs"]
    drop = -mean(run["score_drop"] for run in runs)
    cells = (
        experiment.get("title", experiment["recipe"]),
        spread([run["baseline_score"] for run in runs]),
        spread([run["score"] for run in runs]),
        f"{drop:+.2f}",
        f"{mean(run['bytes'] for run in runs):,.0f}",
        f"{mean(run['size_ratio'] for run in runs):.1f}x",
        experiment.get("reported", ""),
    )
    return f"| {' | '.join(cells)} |"


def columns(results: list[dict[str, Any]]) -> str:
    """Deep Compression's own table: kept weights, and the ratios of its three steps; means over seeds."""
    rows = [
        "| network, data | kept weights a layer, % | P | P+Q | P+Q+H | file |",
        "|---|---|---|---|---|---|",
    ]
    rows += [columns_row(content["experiment"], content["runs"]) for content in results]
    return "\n".join(rows)


def columns_row(experiment: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    def kept(layer: int) -> float:
        layers = [run["stages"][-1]["layers"][layer] for run in runs]
        return 100 * mean(found["nonzeros"] / found["weights"] for found in layers)

    names = [found["name"] for found in runs[0]["stages"][-1]["layers"]]
    weights = [n for n, name in enumerate(names) if name.endswith("weight")]
    shown = ", ".join(f"{kept(n):.1f}" for n in weights) if len(weights) <= 8 else ""
    steps = [
        mean(run["dense_bytes"] / run["deep_compression"][step] for run in runs)
        for step in ("P", "P+Q", "P+Q+H")
    ]
    file = mean(run["size_ratio"] for run in runs)
    ratios = " | ".join(f"{ratio:.1f}x" for ratio in (*steps, file))
    return f"| {experiment.get('title', experiment['recipe'])} | {shown} | {ratios} |"


def widths(results: list[dict[str, Any]]) -> str:
    """Networks that became thinner: the widths of each seed, beside the paper's; means over seeds."""
    rows = [
        "| network, data | stage | widths of the seeds | parameters left | MACs left | error, % | reported |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for content in results:
        experiment, runs = content["experiment"], content["runs"]
        shown = experiment["widths"]
        for stage, reported in shown["reported"].items():
            rows.append(widths_row(experiment["title"], stage, reported, shown["layers"], runs))
    return "\n".join(rows)


def widths_row(
    title: str, name: str, reported: str, layers: list[str], runs: list[dict[str, Any]]
) -> str:
    stages = [next(s for s in run["stages"] if s["name"] == name) for run in runs]
    pairs = [(stage, run["stages"][0]) for stage, run in zip(stages, runs, strict=True)]
    seeds = dict.fromkeys("-".join(str(width(stage, n)) for n in layers) for stage in stages)
    parameters, work = (
        f"{100 * mean(stage[what] / first[what] for stage, first in pairs):.1f} %"
        for what in ("parameters", "macs")
    )
    error = spread([100 - stage["score"] for stage in stages])
    cells = (title, name, ", ".join(seeds), parameters, work, error, reported)
    return f"| {' | '.join(cells)} |"


def width(stage: dict[str, Any], layer: str) -> int:
    """How many channels a layer has after a stage."""
    if layer == "inputs":
        return int(stage["inputs"])
    shape = next(e["shape"] for e in stage["layers"] if e["name"] == f"{layer}.weight")
    return int(shape[0])


def summary(run: dict[str, Any]) -> str:
    return (
        f"{run['baseline_score']:.2f} -> {run['score']:.2f} (validation {run['validation']:.2f}), "
        f"{run['nonzeros']:,} non-zeros, {run['bytes']:,} bytes, {run['size_ratio']:.1f}x, "
        f"over entropy {run['bytes'] / run['entropy_bytes']:.3f}"
    )


def read(path: Path) -> dict[str, Any]:
    """An experiment with its recipe's fingerprint, so that a changed recipe is run again."""
    content = YAML(typ="safe").load(path)
    text = find_recipe(content["recipe"]).read_bytes()
    digest = hashlib.sha256(text).hexdigest()[:16]
    return {**content, "seeds": content.get("seeds", [0, 1, 2]), "recipe_digest": digest}


if __name__ == "__main__":
    main()
