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

import pytest
from common import ROOT

import eval
import grpo
import rewards
import sft
from engine import distributed
from engine.settings import run_main

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
