"""The three programs from end to end, as a user starts them, and what they say to mistakes on the command line.

python -m pytest -q test_pipeline.py                               # a minute on two cores
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU, also for the programs
os.environ["HF_HUB_OFFLINE"] = "1"  # a folder that is missing is not looked for on a hub

import json
import math
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
from common import ROOT
from PIL import Image

import eval
import grpo
import rewards
import sft
from engine import distributed
from engine.settings import parse, run_main
from formats.errors import UserError
from formats.instances import (
    draw_marks,
    on_paths,
    open_depth,
    open_image,
    path_of,
    question_of,
    regions_of,
)
from world.tiny import tiny_image_processor

PROGRAMS = {"sft": sft, "grpo": grpo, "eval": eval}
REGION = {"depth", "move", "distance", "nearer", "axis", "closer"}
GENERAL = {"count", "exist", "color", "shape", "more"}
POOLS = {"region": REGION, "general": GENERAL, "all": REGION | GENERAL}


def python(*words, processes=1):
    """Run a program of this project; on several processes with torchrun."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        if processes > 1
        else []
    )
    command = [sys.executable, *map(str, torchrun), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of cold start and one of GRPO on two processes, then the evaluation on one."""
    folder = tmp_path_factory.mktemp("runs")
    start, rl, small = folder / "sft", folder / "grpo", ["--questions", 11, "--max_new_tokens", 8]
    step = ["--steps", 1, "--prompts", 4, "--group_size", 2, "--filter", "none"]
    files = ["--json", folder / "again.json", "--show", folder / "show"]
    for processes, *words in (
        [2, "sft.py", "--out", start, "--pretrain", 1, "--steps", 2, "--batch", 4],
        [2, "grpo.py", "--model", start, "--out", rl, *step, *small],
        [1, "eval.py", "--model", rl, *files, *small],
    ):
        done = python(*words, processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_programs_leave_the_files_that_they_announce(trained):
    assert [
        json.loads(line)["step"]
        for line in (trained / "sft" / "metrics.jsonl").read_text().splitlines()
    ] == [
        0,
        0,
        1,
    ]
    (line,) = map(json.loads, (trained / "grpo" / "metrics.jsonl").read_text().splitlines())
    assert {
        "step",
        "dtr_reward",
        "lor_reward",
        "loss",
        "kl",
        "grad_norm",
        "entropy",
        "kept",
        "cut",
    } <= set(line)
    assert all(math.isfinite(value) for value in line.values()) and line[
        "first_ratio"
    ] == pytest.approx(1, abs=1e-4)
    assert (
        not list(trained.rglob("*.partial")) and len(list((trained / "show").glob("*.png"))) == 22
    )
    assert "cold start" in (trained / "grpo" / "report.html").read_text()


@pytest.mark.parametrize("name", ["grpo/eval_cold_start.json", "grpo/eval.json", "again.json"])
def test_an_evaluation_is_a_table_and_the_responses_that_it_is_made_of(name, trained):
    def refuse(text):
        raise ValueError(f"{text} is not JSON")

    found = json.loads((trained / name).read_text(), parse_constant=refuse)  # no NaN, no Infinity
    table, responses = found["table"], found["responses"]
    lines = {(path, task) for path in ("lor", "dtr") for task in [*POOLS, *REGION, *GENERAL]}
    assert {(line["path"], line["task"]) for line in table} == lines
    assert len(responses) == 22
    for line in table:
        tasks = POOLS.get(line["task"], {line["task"]})
        rows = [r for r in responses if r["path"] == line["path"] and r["task"] in tasks]
        assert line["n"] == len(rows)
        for key in ("accuracy", "format", "reward"):
            assert line[key] == pytest.approx(statistics.mean(r[key] for r in rows))
    for row in responses:
        assert row["accuracy"] == rewards.accuracy_reward(row["response"], row["answer"])


def test_the_reloaded_model_answers_as_the_trained_one(trained):
    first, again = (
        json.loads((trained / name).read_text())["responses"]
        for name in ("grpo/eval.json", "again.json")
    )
    assert [r["question"] for r in first] == [r["question"] for r in again]
    same = sum(a["response"] == b["response"] for a, b in zip(first, again))
    assert same >= 0.9 * len(first)  # on one process, not two: other batches, other rounding


def command_line(monkeypatch, capsys, program, words, processes=1):
    """(exit code, lines on standard error) of a program's main, as if on so many processes."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
    if processes > 1:
        monkeypatch.setattr(distributed, "world_size", lambda: processes)
    with pytest.raises(SystemExit) as end:
        run_main(program.main)
    return end.value.code, capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize(
    "line, processes",
    [
        ("sft --steps 0", 1),
        ("grpo --steps 0", 1),
        ("grpo --group_size 1", 1),
        ("sft --batch 3", 2),
        ("grpo --rounds 0", 1),
        ("grpo --temperature 0", 1),
        ("grpo --max_new_tokens 0", 1),
        ("sft --seed 900", 1),
        ("grpo --prompts 3", 2),
        ("sft --size huge", 1),
        ("grpo --size huge", 1),
        ("sft --blend half", 1),
        ("grpo --path up", 1),
        ("grpo --detection off", 1),
        ("grpo --filter most", 1),
        ("eval --path up", 1),
        ("eval --world up", 1),
        ("eval --compare nothing.json", 1),
        ("sft --attention fast", 1),
        ("sft --attention flash", 1),
        ("sft --data nothing.json", 1),
        ("sft --model no/such/folder", 1),
        ("grpo --model no/such/folder", 1),
        ("eval --model no/such/folder", 1),
        ("eval --model EMPTY", 1),
        ("sft --out FILE/out", 1),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(line, processes, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    name, flag, value = line.split()
    value = value.replace("EMPTY", str(tmp_path)).replace("FILE", str(tmp_path / "file"))
    safe = [] if flag == "--out" or name == "eval" else ["--out", tmp_path / "out"]
    code, lines = command_line(monkeypatch, capsys, PROGRAMS[name], [flag, value, *safe], processes)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert flag in lines[0] or value in lines[0]  # names the culprit


def test_grpo_makes_no_cold_start_for_data_of_the_user(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, lines = command_line(
        monkeypatch, capsys, grpo, ["--data", "rl.json", "--out", "out/grpo"]
    )
    assert code == 2 and len(lines) == 1 and "--model" in lines[0] and not any(tmp_path.iterdir())


def test_grpo_refuses_to_write_over_a_run_before_it_evaluates(
    trained, monkeypatch, capsys, tmp_path
):
    shutil.copytree(trained / "grpo", tmp_path / "grpo")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = ["--model", trained / "sft", "--out", tmp_path / "grpo", "--questions", 44]
    code, lines = command_line(monkeypatch, capsys, grpo, words)
    assert code == 2 and len(lines) == 1 and "holds a run" in lines[0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_tables_side_by_side_pair_path_and_task(capsys):
    tables = [
        [
            {
                "path": path,
                "task": "depth",
                "n": 5,
                "center_error_m": None,
                "accuracy": value,
                "accuracy_ci": 0.0,
                **{
                    key: None
                    for name in ("format", "detection", "reward")
                    for key in (name, f"{name}_ci")
                },
            }
            for path, value in parts.items()
        ]
        for parts in ({"lor": 0.25, "dtr": 0.5}, {"dtr": 0.75})
    ]
    eval.show_table(("one", tables[0]), ("other", tables[1]))
    lines = [line for line in capsys.readouterr().out.splitlines() if "depth" in line]
    assert [line.split()[0] for line in lines] == ["lor", "dtr"]
    assert (
        "0.250" in lines[0]
        and "0.750" not in lines[0]
        and "0.500" in lines[1]
        and "0.750" in lines[1]
    )


def test_a_size_that_the_model_has_not_is_one_line_and_exit_code_2(
    trained, monkeypatch, capsys, tmp_path
):
    words = ["--size", "small", "--model", trained / "sft", "--out", tmp_path / "out"]
    code, lines = command_line(monkeypatch, capsys, grpo, words)
    assert (
        code == 2
        and len(lines) == 1
        and "--size small" in lines[0]
        and str(trained / "sft") in lines[0]
    )


@pytest.mark.parametrize("harm", ["cut off", "removed"])
def test_a_damaged_model_is_one_line_and_exit_code_2(harm, trained, monkeypatch, capsys, tmp_path):
    shutil.copytree(trained / "sft", tmp_path / "sft")
    weights = tmp_path / "sft" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10000]) if harm == "cut off" else weights.unlink()
    code, lines = command_line(monkeypatch, capsys, eval, ["--model", tmp_path / "sft"])
    assert code == 2 and len(lines) == 1 and str(tmp_path / "sft") in lines[0]


def test_unknown_flags_are_an_error(monkeypatch, capsys):
    for program in PROGRAMS.values():
        code, lines = command_line(monkeypatch, capsys, program, ["--no_such_flag", "1"])
        assert code == 2 and "--no_such_flag" in lines[-1]
    assert python("sft.py", "--steps", 0).returncode == 2  # as a process, once


# ----------------------------------------------------------------------------------------------
# one question


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (200, 100), (90, 120, 90)).save(tmp_path / "photo.png")
    Image.fromarray(np.full((100, 200), 2500, np.uint16)).save(tmp_path / "depth.png")
    return tmp_path


def asked(*words):
    """Settings of a command line of eval.py, and the rows that it asks on both paths."""
    settings = parse(eval.Settings, "", list(map(str, words)), check=eval.check_flags)
    rows = eval.asked_rows(settings, tiny_image_processor(96, 8, 2))
    return settings, on_paths(rows, settings.path)


def test_a_picture_of_ones_own_is_asked_about_on_both_paths(photo):
    question = "How far is the blue bbox from the red bbox?"
    camera = [100.0, 100.0, 100.0, 50.0]
    _, rows = asked(
        *("--ask", photo / "photo.png", question, "--box", "20,10,60,50", "--box", "100,20,180,90"),
        *("--depth", photo / "depth.png", "--intrinsics", "100,100,100,50"),
    )
    assert [path_of(row) for row in rows] == ["lor", "dtr"]
    for row in rows:
        assert row["red_bbox"] == [pytest.approx([100, 100, 300, 500])]  # thousandths
        assert row["blue_bbox"] == [pytest.approx([500, 200, 900, 900])]
        assert (open_depth(row, 200, 100) == 2.5).all() and row["intrinsics"] == camera
        marked = draw_marks(open_image(row), row)
        assert marked.getpixel((20, 10)) == (255, 0, 0) and marked.getpixel((179, 89)) == (
            0,
            0,
            255,
        )
    assert regions_of(rows[0], [(200, 100)]) == []
    # The regions stand in the order of the question, blue first.
    boxes = [pytest.approx(box) for box in ([100, 20, 180, 90], [20, 10, 60, 50])]
    assert [box for _, box in regions_of(rows[1], [(200, 100)])] == boxes


def test_a_picture_of_the_embedded_world_is_asked_about_by_its_seed():
    _, rows = asked("--ask", "7")
    assert [path_of(row) for row in rows] == ["lor", "dtr"]
    assert question_of(rows[0]) == question_of(rows[1]).replace(" <mask>", "")
    assert rows[0]["answer"] == rows[1]["answer"] != eval.UNKNOWN
    _, other = asked("--ask", "7", "how many")
    assert "How many" in question_of(other[0])


@pytest.mark.parametrize(
    "words, error",
    [
        (["--ask", "photo.png"], "needs a picture and a question"),
        (["--ask", "photo.png", "How", "far?"], "needs a picture and a question"),
        (["--ask", "7", "zebra"], "has these words"),
        (["--ask", "7", "--box", "1,2,3,4"], "no effect on a picture of the embedded world"),
        (["--ask", "photo.png", "How far is the blue bbox?", "--box", "1,2,9,9"], "blue bbox"),
        (["--ask", "photo.png", "What?", "--box", "1,2,9"], "four numbers"),
        (["--ask", "photo.png", "What?", "--box", "1,2,9,nan"], "four numbers"),
        (["--ask", "photo.png", "What?", "--box", "150,2,250,9"], "outside the image"),
        (["--ask", "photo.png", "What?", *(["--box", "1,2,9,9"] * 5)], "at most 4"),
        (["--ask", "photo.png", "What?", "--intrinsics", "x"], "--intrinsics x"),
        (["--ask", "gone.png", "What?"], "no such file"),
        (["--box", "1,2,3,4"], "no effect without --ask"),
        (["--ask", "7", "--questions", "5"], "no effect with --ask"),
    ],
)
def test_mistakes_of_a_question_are_one_line(words, error, photo, monkeypatch):
    monkeypatch.chdir(photo)
    with pytest.raises(UserError, match=error):
        asked(*words)


def test_the_answers_are_told(trained, photo):
    show = photo / "show"
    done = python("eval.py", "--model", trained / "grpo", "--ask", "7", "--show", show)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("question   How far") and "(truth: " in line for line in lines) == 1
    for path in ("LOR", "DTR"):
        assert sum(line.startswith(f"{path}        ") for line in lines) == 1
    assert sum("accuracy" in line and "reward" in line for line in lines) == 2
    assert len(list(show.glob("*.png"))) == 2
    own = ["--ask", photo / "photo.png", "What is the red bbox?", "--box", "20,10,60,50"]
    done = python("eval.py", "--model", trained / "grpo", *own)
    assert done.returncode == 0, done.stderr
    assert "truth" not in done.stdout and "accuracy" not in done.stdout
    assert done.stdout.count("format ") == 2
