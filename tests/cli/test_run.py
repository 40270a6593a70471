"""run, report and profile on one finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from _typed import TINY, Answer, typed

import lilliput
from lilliput.engine.records import RunDirectory
from lilliput.errors import MissingDependency

PROMISED = {
    "score", "baseline_score", "bytes", "dense_bytes", "size_ratio", "entropy_bytes",
    "latency_ratio", "parameters", "nonzeros", "artifact", "run", "stages",
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def done(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """A finished run and what the command printed."""
    home = tmp_path_factory.mktemp("runs") / "tiny"
    return home, typed("run", recipe, "--directory", home)


def test_run_prints_the_table_and_where_the_files_are(done: tuple[Path, Answer]) -> None:
    home, answer = done
    assert answer.code == 0
    assert "non-zeros" in answer.out
    assert "magnitude" in answer.out
    assert str(home / "model.safetensors") in answer.out
    assert (home / "report.html").stat().st_size > 1000
    assert "stage 2: magnitude" in answer.err  # the progress


def test_the_same_command_again_gives_the_same_and_one_json_object(
    done: tuple[Path, Answer], recipe: Path
) -> None:
    home, _ = done
    before = json.loads((home / "result.json").read_text())
    answer = typed("run", recipe, "--directory", home, "--json", "--quiet", "--no-report")
    figures = answer.json
    assert (answer.code, answer.err) == (0, "")
    assert figures == before == json.loads((home / "result.json").read_text())
    assert set(figures) >= PROMISED
    assert all(set(s) >= {"score", "bytes", "size_ratio", "nonzeros"} for s in figures["stages"])
    assert figures["bytes"] == (home / "model.safetensors").stat().st_size
    assert figures["size_ratio"] == figures["dense_bytes"] / figures["bytes"]


def test_removed_blocks_and_thinner_layers_are_printed(
    done: tuple[Path, Answer], recipe: Path, tmp_path: Path
) -> None:
    home = shutil.copytree(done[0], tmp_path / "run")
    block = {"where": "layer1.1", "what": "block", "before": "4,672 parameters", "after": "removed"}
    layer = {"where": "conv1", "what": "channels", "before": 1600, "after": 8}
    changes = [c | {"method": "structured_sparsity", "note": ""} for c in (block, layer)]
    (home / "changes.json").write_text(json.dumps([[], changes]))
    answer = typed("run", recipe, "--directory", home, "--quiet", "--no-report")
    lines = [line.split() for line in answer.out.splitlines()]
    assert ["layer1.1", "4,672", "parameters", "removed"] in lines
    assert ["conv1", "1,600", "8"] in lines


def test_an_expectation_that_fails(done: tuple[Path, Answer], tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        TINY.replace("  - train: {epochs: 1}\n", "") + "expect: {size_ratio: '>= 900'}\n"
    )
    answer = typed("run", path, "--directory", tmp_path / "run", "--json", "--quiet", "--no-report")
    assert answer.code == 3
    assert answer.json["expect"][0]["holds"] is False
    assert "size_ratio" in answer.err
    assert ">= 900" in answer.err


def test_a_directory_of_another_recipe(done: tuple[Path, Answer], recipe: Path) -> None:
    home, _ = done
    before = (home / "result.json").read_bytes()
    answer = typed("run", recipe, "seed=7", "--directory", home, "--json")
    assert (answer.code, answer.json["error"]) == (1, "RunConflict")
    assert "seed" in answer.json["message"]
    assert (home / "result.json").read_bytes() == before


def test_a_directory_that_holds_other_files(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    answer = typed("run", recipe, "--directory", tmp_path, "--fresh")
    assert (answer.code, "thesis.txt" in answer.err) == (1, True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_directory_that_another_process_writes(recipe: Path, tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", {}):
        answer = typed("run", recipe, "--directory", tmp_path / "run")
    assert (answer.code, "another process" in answer.err) == (1, True)


def test_a_directory_that_is_a_file(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    answer = typed("run", recipe, "--directory", tmp_path / "run", "--json")
    assert (answer.code, answer.json["error"]) == (1, "RunConflict")


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("task=digts", "'digits'"),
        ("model=digits_cn", "'digits_cnn'"),
        ("device=tpu9", "tpu9"),
        ("stages.1.methods.0.layers=fc9", "fc9"),
    ],
)
def test_bad_input_leaves_no_result(
    recipe: Path, tmp_path: Path, override: str, fragment: str
) -> None:
    home = tmp_path / "run"
    answer = typed("run", recipe, override, "--directory", home)
    assert answer.code == 2
    assert fragment in answer.err
    assert not (home / "result.json").exists()


def test_a_missing_report_package_is_told_and_the_run_counts(
    done: tuple[Path, Answer], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lilliput.report

    def absent(*_: object) -> Path:
        raise MissingDependency("plotly", "report", "the HTML report")

    monkeypatch.setattr(lilliput.report, "write_report", absent)
    answer = typed("run", recipe, "--directory", done[0], "--quiet")
    assert answer.code == 0
    assert "lilliput[report]" in answer.err
    assert "report           none" in answer.out


def test_only_the_first_of_several_processes_prints(
    done: tuple[Path, Answer], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    answer = typed("run", recipe, "--directory", done[0])
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_tensorboard_events_lie_in_the_run_directory(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    home = tmp_path / "run"
    answer = typed("run", recipe, "--directory", home, "--tensorboard", "--no-report")
    assert answer.code == 0, answer.err
    assert list((home / "tensorboard").glob("events.*"))


def test_report_of_one_run_and_of_two(done: tuple[Path, Answer], tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    home, _ = done
    page, picture = tmp_path / "page.html", tmp_path / "picture.svg"
    answer = typed("report", home, "--out", page, "--picture", picture, "--json")
    assert answer.json == {"report": str(page), "picture": str(picture)}
    assert page.stat().st_size > 1000
    assert picture.read_text().lstrip().startswith("<")
    assert typed("report", home, home, "--out", page).out.strip() == str(page)


def test_profile_of_the_compressed_file_takes_its_task_from_the_recipe(
    done: tuple[Path, Answer],
) -> None:
    home, _ = done
    figures = json.loads((home / "result.json").read_text())
    profile = typed("profile", home / "model.safetensors", "--json").json
    assert profile["parameters"] == figures["parameters"]
    assert profile["nonzeros"] == figures["nonzeros"]
    assert profile["macs"] == figures["macs"] == sum(x["macs"] for x in profile["layers"])
    assert sum(x["parameters"] for x in profile["layers"]) == profile["parameters"]
    assert profile["latency_seconds"] > 0
    assert {"energy_pj", "peak_activation_bytes", "uncounted"} <= set(profile)


def test_profile_without_inputs_counts_the_size_and_says_what_is_missing() -> None:
    answer = typed("profile", "lenet_300_100")
    assert "266,610" in answer.out
    assert "--task" in answer.out
    assert "macs" not in typed("profile", "lenet_300_100", "--json").json


def test_profile_of_an_input_shape() -> None:
    figures = typed("profile", "lenet_5", "--input", "1,1,28,28", "--json").json
    assert figures["macs"] == 2_293_000
    assert "2,293,000" in typed("profile", "lenet_5", "--input", "1,1,28,28").out


def test_profile_shows_which_channels_may_go_and_why_others_may_not() -> None:
    channels = typed("profile", "lenet_5", "--input", "1,1,28,28", "--json").json["channels"]
    assert [(g["group"], g["channels"]) for g in channels["groups"]] == [
        ("conv1", 20), ("conv2", 50), ("fc1", 500),
    ]  # fmt: skip
    assert "output" in channels["unprunable"]["fc2.weight dim 0"]
    printed = typed("profile", "lenet_5", "--input", "1,1,28,28").out
    assert "channels of" in printed
    assert "fc2.weight dim 0" in printed


def test_sensitivity_is_printed_and_saved(done: tuple[Path, Answer], tmp_path: Path) -> None:
    home, _ = done
    weights, out = home / "stages" / "0-train.safetensors", tmp_path / "sensitivity.json"
    arguments = ["--weights", weights, "--task", "digits", "--sensitivity", "--save", out]
    scan = typed("profile", "digits_cnn", *arguments, "--json").json["sensitivity"]
    assert json.loads(out.read_text()) == scan
    assert {row["kind"] for row in scan["rows"]} == {"sparsity", "bits"}
    assert {"layer", "kind", "amount", "score"} <= set(scan["rows"][0])
    assert "accuracy" in scan["score_name"]


def test_the_file_of_a_run_runs_in_python(done: tuple[Path, Answer]) -> None:
    model = lilliput.load(done[0] / "model.safetensors")
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("LILLIPUT_DATA", str(tmp_path))
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    content = typed("doctor", "--json").json
    assert content["packages"]["torch"] == torch.__version__
    assert content["run_directory"]["writable"]
    assert str(tmp_path / "mnist") in content["data"]["mnist"]["tried"]
    assert content["data"]["mnist"]["found"] != str(tmp_path / "mnist")  # it is empty
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"")
    assert typed("doctor", "--json").json["data"]["mnist"]["found"] == str(tmp_path / "mnist")
    assert not list((tmp_path).glob("runs"))
    answer = typed("doctor")
    assert answer.code == 0
    assert torch.__version__ in answer.out


def test_doctor_names_the_extra_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lilliput.cli import doctor

    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_package": "report"})
    assert typed("doctor", "--json").json["optional"] == {
        "no_such_package": {"present": False, "extra": "report"}
    }
    assert "pip install 'lilliput[report]'" in typed("doctor").out
