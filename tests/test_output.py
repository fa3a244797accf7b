"""What was computed is kept: outputs are tried before any work, and no stream stops a run.

python -m pytest -q tests/test_output.py                           # seconds
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from common import ROOT
from PIL import Image

import benchmarks.__main__ as benchmarks
import eval
import grpo
from engine import distributed, report
from engine.output import printable, whole_file
from engine.settings import run_main
from formats.errors import UserError
from tools import bench, build, convert, dryrun, findings
from world.sources import held_out

# ----------------------------------------------------------------------------------------------
# lines on a terminal


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain ± 深度\n\tnext", "plain ± 深度\n\tnext"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b2J\x7f\x00\x08", "\\x9b2J\\x7f\\x00\\x08"),
        ("safe\rhidden", "safe\\rhidden"),
        ("\rbar", "\rbar"),  # how a bar is drawn again
        ("a\u202eb\u2028c", "a\\u202eb\\u2028c"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


# Prints hostile text in each way that the programs print, then many lines, then leaves a result.
SCRIPT = """
import sys
from tqdm import tqdm
from engine.settings import run_main

def main():
    print("said \\x1b]0;t\\x07 ± \\ud800")
    for _ in tqdm(range(1), desc="file\\x1b[2J"):
        tqdm.write("response\\x1b[8m")
    for i in range(20_000):
        print("line", i)
    with open(sys.argv[1], "w") as file:
        file.write("done")

run_main(main)
"""


def run_script(folder, shell="", **environment):
    """SCRIPT under a shell's redirections -> what came out; it must reach its end, with code 0."""
    (folder / "script.py").write_text(SCRIPT)
    command = f'set -o pipefail; "{sys.executable}" script.py result {shell}'
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "result").read_text() == "done"
    return done.stdout, done.stderr


def test_no_escape_sequence_reaches_a_terminal(tmp_path):
    out, err = run_script(tmp_path)
    assert out.startswith("said \\x1b]0;t\\x07 ± \\ud800\nresponse\\x1b[8m\n".encode())
    assert b"\x1b" not in out + err and b"file\\x1b[2J" in err


def test_a_terminal_without_a_character_gets_an_escape(tmp_path):
    out, _ = run_script(tmp_path, PYTHONIOENCODING="ascii")
    assert out.startswith(b"said \\x1b]0;t\\x07 \\xb1 \\ud800\n")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert run_script(tmp_path, **plain)[0].startswith(b"said \\x1b]0;t\\x07 \\xb1 \\ud800\n")


@pytest.mark.parametrize(
    "shell, says",
    [
        ("| head -1", ""),
        ("2>&1 | head -c 1", ""),
        ("2>&1 >/dev/null | head -c 1", ""),
        (">/dev/full", "No space left"),
        ("2>/dev/full", ""),
        (">/dev/full 2>/dev/full", ""),
        (">&-", ""),
        (">&- 2>&-", ""),
    ],
)
def test_a_stream_that_ends_does_not_end_the_run(shell, says, tmp_path):
    _, err = run_script(tmp_path, shell)
    assert says in err.decode()
    assert b"Traceback" not in err and b"Exception ignored" not in err


# ----------------------------------------------------------------------------------------------
# files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as file:
        file.write("half \ud800 ±")
        assert not path.exists()
    assert path.read_text("utf-8") == "half ? ±"
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write("other")
        raise KeyError
    assert path.read_text("utf-8") == "half ? ±" and os.listdir(path.parent) == ["a.txt"]
    link = tmp_path / "link"
    link.symlink_to(path)
    with whole_file(link) as file:
        file.write("through")
    assert link.is_symlink() and path.read_text() == "through"


def full_disk(path):
    """Write more to a path than the disk takes: RLIMIT_FSIZE stands for it."""
    with whole_file(path, "--json") as file:
        file.write("x" * 100_000)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"--json .*a.json: cannot write there \(File too"):
            full_disk(tmp_path / "a.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not os.listdir(tmp_path)


MAINS = {
    "eval": eval.main,
    "bench": bench.main,
    "build": build.main,
    "convert": convert.main,
    "dryrun": dryrun.main,
    "findings": findings.show,
    "benchmarks": benchmarks.main,
}


def refused(monkeypatch, capsys, line):
    """The one line on standard error of a command that ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as end:
        run_main(MAINS[line.split()[0]])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert len(lines[0]) < 200 + max(map(len, line.split()))
    return lines[0]


@pytest.mark.parametrize(
    "line",
    [
        "eval --json",
        "eval --report",
        "bench --json",
        "dryrun --json",
        "findings x=*.json --figure",
        "build --scenes nothing.jsonl --out",
        "convert nothing --from kitti --out",
        "benchmarks blink --data data.json --json",
    ],
)
@pytest.mark.parametrize("path", [".", "data.json/a.json", "/dev/full", "/proc/a.json", "x" * 300])
def test_an_output_that_cannot_be_written_is_refused_first(
    line, path, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text("[]")
    flag = line.split()[-1]
    # Nothing was done before: there is no model, and the data are none.
    assert f"{flag} {path[:40]}" in refused(monkeypatch, capsys, f"{line} {path}")
    assert os.listdir() == ["data.json"]


@pytest.mark.parametrize("path", ["data.json", "/dev/null", "/proc/a", "new/" + "x" * 300])
def test_a_folder_that_cannot_be_written_is_refused_first(path, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").touch()
    assert f"--show {path[:40]}" in refused(monkeypatch, capsys, f"eval --model none --show {path}")
    assert os.listdir() == ["data.json"]


@pytest.mark.parametrize(
    "line",
    [
        "eval --model none --data d.json --json d.json",
        "eval --model none --data d.json*2 --json ./x/../d.json",
        "eval --model none --data d.json --json hard.json",
        "eval --model none --data d.json --json soft.json",
        "eval --model none --scenes d.json --report d.json",
        "eval --compare other.json d.json --report d.json",
        "eval --model m --json m/config.json",
        "eval --model m --report m/metrics.jsonl",
        "eval --model none --json new.json --report new.json",
        "build --scenes d.json --out d.json",
        "build --pairs d.json --out d.json",
        "convert d.json --from omni3d --out d.json",
        "benchmarks blink --model none --data d.json --json d.json",
        "benchmarks blink --model none --data d.jsonl --json d.json",
        "benchmarks blink --score d.jsonl --json d.jsonl",
    ],
)
def test_an_input_is_never_replaced(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "x").mkdir()
    for name in ("d.json", "d.jsonl", "other.json", "m/config.json", "m/metrics.jsonl"):
        (tmp_path / name).write_text('{"mine": 1}')
    (tmp_path / "hard.json").hardlink_to(tmp_path / "d.json")
    (tmp_path / "soft.json").symlink_to(tmp_path / "d.json")
    said = refused(monkeypatch, capsys, line)
    assert "is read by this command" in said or "is also the file of" in said
    for path in tmp_path.rglob("*.json*"):
        assert path.read_text() == '{"mine": 1}'


def test_responses_of_a_benchmark_replace_no_other_file(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"mine": 1}')  # without an end of its line, as many tools write it
    with pytest.raises(UserError, match="d.jsonl"):
        benchmarks.resume(path, {"bench": "blink"}, [])
    assert path.read_text() == '{"mine": 1}'


def test_copied_pictures_replace_no_other(tmp_path):
    for name in ("a", "pictures/000000"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_text(name)
    args = build.Settings(out=str(tmp_path / "o.json"), pictures=str(tmp_path / "pictures"))
    with pytest.raises(UserError, match="000000.png: is another picture"):
        build.link("a.png", tmp_path, "000000", args)
    assert build.link("a.png", tmp_path, "000001", args) == "pictures/000001.png"
    assert build.link("a.png", tmp_path, "000001", args) == "pictures/000001.png"  # again
    assert (tmp_path / "pictures" / "000000.png").read_text() == "pictures/000000"


# ----------------------------------------------------------------------------------------------
# an evaluation


TASKS = [None, [1, "b"], {"a": 1}, 7, True, "", "a/b", "../up", "x" * 300, "two\nlines", "\ud800"]
TASKS += ["\x1b[2J", "all", "region", "general", "<b>&"]


@pytest.fixture(scope="module")
def odd():
    """Rows with odd tasks, one of each on either path, and their results."""
    rows = []
    for row, task in zip(held_out(4 * len(TASKS), 96), [t for t in TASKS for _ in range(2)]):
        rows.append({**row, "task": task})
    response = "<think>\x1b[2J \ud800</think><answer>3</answer>"
    return rows, [eval.result_of(i, row, response) for i, row in enumerate(rows)]


def test_any_task_survives_table_page_and_pictures(odd, tmp_path, capsys):
    rows, results = odd
    eval.write_json(tmp_path / "a.json", results)
    table = eval.make_table(results)
    keys = [(line["path"], line["task"]) for line in table]
    assert len(set(keys)) == len(keys)
    for path in eval.PATHS:
        counts = {line["task"]: line["n"] for line in table if line["path"] == path}
        asked = sum(result["path"] == path for result in results)
        assert counts["all"] == asked == sum(counts[task] for task in counts if task != "all")
        assert "all (task)" in counts and "question" in counts
    eval.show_table(("run", table))
    eval.show_paths("run", results)
    report.write(tmp_path / "a.html", [("run", table, results)], rows)
    eval.show_pictures(tmp_path / "show", rows, results)
    assert len(list((tmp_path / "show").glob("*.png"))) == len(rows)
    assert sorted(os.listdir(tmp_path)) == ["a.html", "a.json", "show"]
    widths = {len(line) for line in capsys.readouterr().out.splitlines() if "±" in line[30:60]}
    assert max(widths) < 200
    found = eval.load_json(tmp_path / "a.json")
    assert [result["task"] for result in found["responses"]] == [r["task"] for r in results]


@pytest.fixture()
def answered(odd, monkeypatch, tmp_path):
    """eval.evaluate without a model: what it answers is there already."""
    rows, results = odd
    monkeypatch.setattr(eval, "load_model", lambda name: (None, None, None))
    monkeypatch.setattr(eval, "answer", lambda *_: results)
    monkeypatch.setattr(eval, "on_paths", lambda rows, path: rows)
    for name in ("use_attention", "freeze", "shard"):
        monkeypatch.setattr(distributed, name, lambda *_: None)
    return eval.Settings(json=str(tmp_path / "a.json"), model="none"), rows, results


@pytest.mark.parametrize("broken", ["show_table", "show_paths"])
def test_the_json_is_there_before_anything_is_printed(broken, answered, monkeypatch):
    settings, rows, results = answered

    def fail(*_):
        raise TypeError("cannot be printed")

    monkeypatch.setattr(eval, broken, fail)
    with pytest.raises(TypeError, match="cannot be printed"):
        eval.evaluate(settings, [("rows", rows, 1.0)])
    assert len(eval.load_json(settings.json)["responses"]) == len(results)


def test_the_tables_are_printed_where_the_json_cannot_be_written(
    answered, monkeypatch, capsys, tmp_path
):
    settings, rows, _ = answered
    settings.report = str(tmp_path / "a.html")
    replace = os.replace

    def full(source, target):
        if target.endswith(".json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"a.json: cannot write there \(No space left"):
        eval.evaluate(settings, [("rows", rows, 1.0)])
    assert "all (task)" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["a.html"]


def test_a_broken_log_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    line = f"eval --model {tmp_path} --report {tmp_path}/a.html"
    assert "metrics.jsonl: line 2" in refused(monkeypatch, capsys, line)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"responses": [7]}', "\x00"])
def test_a_broken_evaluation_of_the_cold_start_is_one_line(text, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "fingerprint", lambda model: "0")
    (tmp_path / "eval_cold_start.json").write_text(text)
    settings = grpo.Settings(out=str(tmp_path), resume=True)
    with pytest.raises(UserError, match=r"eval_cold_start.json: .*remove it") as error:
        grpo.evaluate_start(settings, None, None, None, [], None)
    assert len(str(error.value)) < 300


def test_an_evaluation_of_another_cold_start_is_refused_by_name(odd, tmp_path, monkeypatch):
    rows, results = odd
    monkeypatch.setattr(grpo, "fingerprint", lambda model: model)
    settings = grpo.Settings(out=str(tmp_path), resume=True)
    file = tmp_path / "eval_cold_start.json"
    origin = {"model": "one", "max_new_tokens": settings.max_new_tokens}
    eval.write_json(file, results, origin=origin)
    assert len(grpo.evaluate_start(settings, "one", None, None, rows, None)) == len(rows)
    for model, tokens in (("two", settings.max_new_tokens), ("one", 7)):
        other = grpo.Settings(out=str(tmp_path), resume=True, max_new_tokens=tokens)
        with pytest.raises(UserError, match=r"eval_cold_start.json: of another --model"):
            grpo.evaluate_start(other, model, None, None, rows, None)
    eval.write_json(file, results)  # as earlier versions did
    assert len(grpo.evaluate_start(settings, "two", None, None, rows, None)) == len(rows)


def test_a_picture_of_half_a_character_and_of_many_lines(odd):
    rows, results = odd
    result = {**results[0], "response": "\ud800 \x1b \x00 深度\n" * 3000}
    picture = eval.picture_of(rows[0], result)
    assert picture.height < 5000
    assert np.asarray(picture).std() > 0
    assert isinstance(picture, Image.Image)


def test_results_are_json_whatever_the_row_is_called(odd):
    row = {**odd[0][0], "id": [1, {"a": 2}]}
    result = eval.result_of(0, row, "")
    assert isinstance(result["id"], str) and json.loads(json.dumps(result)) == result
