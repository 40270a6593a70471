"""list, show, init and validate."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _typed import TINY, typed

from lilliput import artifact
from lilliput.cli import EXIT_CODES, VERBS
from lilliput.core import registry

KINDS = ["methods", "architectures", "tasks", "recipes"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize("asked", [(), ("--help",), ("-h",)])
def test_the_overview_names_every_verb_and_exit_code(asked: tuple[str, ...]) -> None:
    answer = typed(*asked)
    assert answer.code == 0
    assert all(f"  {verb} " in answer.out for verb in VERBS)
    assert all(f"{code} " in answer.out for code in (0, 1, 2, 3, 130))


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str) -> None:
    home, summary = VERBS[verb]
    module, _, function = home.partition(":")
    doc = inspect.getdoc(getattr(importlib.import_module(f"lilliput.cli.{module}"), function))
    assert doc is not None
    assert doc.partition("\n")[0] == summary  # the overview says the same as the verb
    answer = typed(verb, "--help")
    assert answer.code == 0
    assert summary in answer.out
    assert "--json" in answer.out
    assert " ".join(EXIT_CODES.split())[:40] in " ".join(answer.out.split())


def test_version() -> None:
    assert typed("--version").out.strip().count(".") == 2


def test_list_shows_every_entry_with_its_paper_and_year() -> None:
    answer = typed("list")
    for kind in registry.KINDS:
        for entry in registry.entries(kind).values():
            line = next(x for x in answer.out.splitlines() if x.split()[:1] == [entry.name])
            assert entry.summary in line
            assert all(str(paper.year) in line for paper in entry.papers)


def test_list_as_json() -> None:
    found = typed("list", "--json").json
    assert list(found) == KINDS
    magnitude = next(m for m in found["methods"] if m["name"] == "magnitude")
    assert magnitude["family"] == "prune"
    assert magnitude["papers"][0]["year"] == 2015
    assert list(typed("list", "tasks", "--json").json) == ["tasks"]


def test_show_a_method() -> None:
    settings = {s["name"]: s for s in typed("show", "gradual", "--json").json["settings"]}
    assert settings["sparsity"]["required"]
    assert settings["sparsity"]["type"].startswith("number >= 0 < 1")
    assert settings["scope"]["default"] == "layer"
    assert settings["scope"]["type"] == "layer | global"
    assert settings["schedule"]["default"]["shape"] == "cubic"
    assert all(s["description"] for s in settings.values())
    text = typed("show", "gradual").out
    assert "1710.01878" in text
    assert "sparsity: number >= 0 < 1" in text


@pytest.mark.parametrize("kind", ["method", "architecture", "task", "recipe"])
def test_everything_that_is_listed_can_be_shown(kind: str) -> None:
    for name in registry.entries(kind):
        content = typed("show", name, "--json")
        assert content.code == 0
        assert (content.json["kind"], content.json["name"]) == (kind, name)
        assert name in typed("show", name).out or kind == "recipe"


def test_every_argument_of_a_task_is_explained() -> None:
    settings = typed("show", "digits", "--json").json["settings"]
    assert [s["name"] for s in settings] == list(
        inspect.signature(registry.load("task", "digits")).parameters
    )
    assert all(s["description"] for s in settings)


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    codes = np.random.default_rng(0).integers(0, 4, (50, 40)).astype(np.uint8)
    table = np.array([0, -1, 1, 2], np.float32)
    tensors = {"fc.weight": artifact.Coded(codes, table), "fc.bias": np.zeros(50, np.float32)}
    structure = {"architecture": "lenet_300_100", "arguments": {}}
    artifact.write(path, tensors, structure=structure, figures={"score": 97.5})
    return path


def test_show_a_compressed_file(compressed: Path) -> None:
    content = typed("show", compressed, "--verify", "--json").json
    assert content["bytes"] == compressed.stat().st_size
    assert content["dense_bytes"] == 4 * (50 * 40 + 50)
    assert [t["name"] for t in content["tensors"]] == ["fc.weight", "fc.bias"]
    assert content["figures"]["score"] == 97.5
    text = typed("show", compressed, "--verify").out
    assert "score: 97.5" in text
    assert f"{compressed.stat().st_size:,} bytes" in text
    assert "every checksum" in text
    assert "every checksum" not in typed("show", compressed).out


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flipped(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]


def _foreign(data: bytes) -> bytes:
    return b"PK\x03\x04 this is a zip archive" * 10


@pytest.mark.parametrize("damage", [_truncated, _flipped, _foreign])
@pytest.mark.parametrize("verb", ["show", "profile"])
def test_a_damaged_file(compressed: Path, damage: Callable[[bytes], bytes], verb: str) -> None:
    compressed.write_bytes(damage(compressed.read_bytes()))
    arguments = ["show", compressed, "--verify"] if verb == "show" else ["profile", compressed]
    answer = typed(*arguments, "--json")
    assert answer.code == 1
    assert answer.json["error"] in ("CorruptArtifact", "UnsupportedArtifact")
    assert str(compressed) in answer.json["message"]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["show", "gradul"], ["gradul", "'gradual'"]),
        (["show", "nothing.safetensors"], ["nothing.safetensors"]),
        (["show", "nothing.yaml"], ["nothing.yaml"]),
        (["show", "gradual", "--verify"], ["--verify", "gradual"]),
        (["lst"], ["lst", "'list'"]),
        (["list", "method"], ["methods", "architectures"]),
        (["list", "--jsn"], ["--jsn", "--json"]),
        (["show"], ["NAME", "--help"]),
        (["init", "x.txt"], ["x.txt", ".yaml"]),
        (["init", "x.yaml", "--from", "digits_deep_compresion"], ["'digits_deep_compression'"]),
        (["profile", "lenet5"], ["lenet5", "'lenet_5'"]),
        (["profile", "lenet_5", "--input", "1,x"], ["1,x", "1,3,224,224"]),
        (["profile", "lenet_5", "--input", "1,1,8,8"], ["(1, 1, 8, 8)"]),
        (["profile", "lenet_5", "--task", "minst"], ["'mnist'"]),
        (["profile", "lenet_5", "--sensitivity"], ["--task"]),
        (["profile", "lenet_5", "--weights", "no.pt"], ["no.pt"]),
        (["profile", "nowhere.nets:make"], ["nowhere", "PYTHONPATH"]),
        (["report", "nothing"], ["nothing"]),
        (["report", "a", "b", "--picture", "x.svg"], ["--picture"]),
        (["report"], ["RUN"]),
    ],
    ids=" ".join,
)
def test_wrong_usage(
    arguments: list[str], fragments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = typed(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert answer.err.startswith("lilliput: ")
    assert all(fragment in answer.err for fragment in fragments), answer.err
    assert not list(tmp_path.iterdir())


def test_profile_of_a_file_that_names_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    artifact.write(path, {"w": np.ones(3, np.float32)})
    answer = typed("profile", path)
    assert (answer.code, str(path) in answer.err) == (2, True)


def test_init_writes_a_recipe_that_is_valid_and_commented(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert typed("init", path).code == 0
    assert path.read_text().count("#") > 5
    assert typed("validate", path).code == 0


def test_init_from_a_shipped_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    answer = typed("init", path, "--from", "digits_deep_compression", "--json")
    assert answer.json == {"recipe": str(path)}
    shipped = registry.find("recipe", "digits_deep_compression").path
    assert shipped is not None
    assert path.read_text() == shipped.read_text()


def test_init_does_not_overwrite(tiny: Path) -> None:
    answer = typed("init", tiny, "--json")
    assert (answer.code, answer.json["error"]) == (2, "InputError")
    assert tiny.read_text() == TINY


def test_validate_prints_the_resolved_recipe(tiny: Path, tmp_path: Path) -> None:
    answer = typed("validate", tiny, "stages.1.methods.0.sparsity=0.75", "task.limit=100", "--json")
    assert answer.json["stages"][1]["methods"][0] == {"method": "magnitude", "sparsity": 0.75}
    assert answer.json["task"]["arguments"]["limit"] == 100
    again = tmp_path / "again.yaml"
    again.write_text(typed("validate", tiny, "seed=4").out)
    assert (
        typed("validate", again, "--json").json == typed("validate", tiny, "seed=4", "--json").json
    )


@pytest.mark.parametrize("name", registry.entries("recipe"))
def test_shipped_recipes_are_valid(name: str) -> None:
    assert typed("validate", name).code == 0


_METHOD = "stages.1.methods.0"
BAD = {
    f"{_METHOD}.sparcity=0.5": ["tiny.yaml:8", f"{_METHOD}.sparcity", "'sparsity'"],
    f"{_METHOD}.method=magnitud": ["tiny.yaml:8", "'magnitude'"],
    f"{_METHOD}.sparsity=1.5": ["tiny.yaml:8", "sparsity", "less than 1", "1.5"],
    f"{_METHOD}.sparsity=-0.1": ["tiny.yaml:8", "greater than or equal to 0", "-0.1"],
    f"{_METHOD}.sparsity=.nan": ["tiny.yaml:8", "finite", "nan"],
    f"{_METHOD}={{method: codebook, bits: 0}}": ["tiny.yaml:8", "bits", "equal to 1", "0"],
    f"{_METHOD}={{method: codebook, bits: 40}}": ["tiny.yaml:8", "bits", "equal to 16", "40"],
    f"{_METHOD}.sparsity={{'conv*': 1.5}}": ["sparsity.conv*", "less than 1", "1.5"],
    f"{_METHOD}={{method: gradual, sparsity: 0.5, schedule: {{shap: cubic}}}}": ["shap", "'shape'"],
    "stages.0.train.epoch=3": ["tiny.yaml:6", "'epochs'"],
    "stages.0.train.lr=fast": ["tiny.yaml:6", "lr", "number", "fast"],
    "stages.0.train.optimizer=adm": ["tiny.yaml:6", "'adam'"],
    "stages.7.train.epochs=1": ["stages.7", "0 to 1"],
    "stagez=3": ["stagez", "'stages'"],
    "artifact.codek=gap": ["artifact.codek", "'codec'"],
    "model=lenet5": ["lenet5", "'lenet_5'"],
    "model.classez=3": ["classez", "classes"],
    "task=digts": ["digts", "'digits'"],
    "task.batchsize=3": ["batchsize", "batch_size"],
    "expect.size_ratio=big": ["size_ratio", "big", ">= 40"],
    "nonsense": ["nonsense", "key=value"],
}


@pytest.mark.parametrize(("override", "fragments"), BAD.items(), ids=list(BAD))
def test_a_mistake_in_a_recipe(tiny: Path, override: str, fragments: list[str]) -> None:
    answer = typed("validate", tiny, override)
    assert answer.code == 2
    assert answer.out == ""
    assert all(fragment in answer.err for fragment in fragments), answer.err
    assert answer.err.count("\n") == 1  # one mistake, one line
    as_json = typed("validate", tiny, override, "--json")
    assert (as_json.code, as_json.err) == (2, "")
    assert set(as_json.json) == {"error", "message"}


def test_a_condition_needs_no_quotes_on_the_command_line(tiny: Path) -> None:
    answer = typed("validate", tiny, "expect.size_ratio=>= 40", "--json")
    assert answer.json["expect"] == {"size_ratio": ">= 40"}


def test_a_file_that_is_not_yaml(tiny: Path) -> None:
    tiny.write_text("stages: [1, 2")
    answer = typed("validate", tiny)
    assert answer.code == 2
    assert str(tiny) in answer.err


def test_a_network_of_the_users_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cli_own_nets.py").write_text(
        "from torch import nn\ndef make(width=4):\n    print('hello')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert typed("validate", tiny, "model={build: 'cli_own_nets:make', width: 10}").code == 0
    wrong = typed("validate", tiny, "model={build: 'cli_own_nets:mak'}")
    assert (wrong.code, "no 'mak'" in wrong.err) == (2, True)
    profile = typed("profile", "cli_own_nets:make", "--input", "1,1,8,8", "--json")
    assert profile.json["macs"] == 64 * 4  # and what the user's code prints stays off stdout
    assert "hello" in profile.err
