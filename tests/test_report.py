"""The report's page: read back with html.parser and compared with the responses and logs that it was made from.

python -m pytest -q test_report.py                                 # seconds
"""

import base64
import hashlib
import io
import itertools
import json
import math
import re
import statistics
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import data
import eval
from engine import report
from formats import instances
from formats.errors import UserError
from tools import findings
from world import questions, sources

ATTACK = '</pre><script>alert("1")</script><img src=x onerror=alert(2)>'
TEXT = (
    '<detect>Find 1 relevant objects:\n<3d_box center="{}">thing (red bbox)</3d_box></detect>\n<think>z.</think>'
    "\n<answer>{}</answer>"
)


class Page(HTMLParser):
    """Everything on a page: tags [(name, attributes)], tables as rows of text, articles, texts of pre elements."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.rows, self.articles, self.pre, self.open = [], [], [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert not self.open  # every element that was opened is closed

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.tags.append((name, attributes))
        if name not in ("meta", "img"):
            self.open.append(name)
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")
        if name == "article":
            self.articles.append(attributes)
        if name == "pre":
            self.pre.append("")

    def handle_startendtag(self, name, attributes):
        self.tags.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += text
        if "pre" in self.open:
            self.pre[-1] += text

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def answered(rows, shift):
    """Results as eval.answer makes them: every third answer right, each centre `shift` metres too far right."""
    results = []
    for i, row in enumerate(rows):
        centers = instances.centers_of(row) or {}
        x, y, z = next(iter(centers.values()), (0, 0, 1))
        text = TEXT.format(
            f"{x + shift},{y},{z}", instances.answer_of(row) if i % 3 == 0 else "-100"
        )
        text = text[text.index("<think>") :] if instances.path_of(row) == "lor" else text
        results.append(
            {
                "index": i,
                "id": row["id"],
                "path": instances.path_of(row),
                "task": row["task"],
                "question": instances.question_of(row),
                "answer": instances.answer_of(row),
                "response": text,
                **data.score(row, text),
            }
        )
    return results


@pytest.fixture(scope="module")
def asked():
    return sources.held_out(44, 96)


@pytest.fixture(scope="module")
def folder(asked, tmp_path_factory):
    """Two evaluations as JSON, logs of both stages, and the page about all of it as eval.py writes it."""
    folder, random = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    for name, shift in (("before", 0.5), ("after", 0.25)):
        results = answered(asked, shift)
        i = {"before": 3, "after": 0}[name]  # right in the other evaluation; wrong and hostile here
        results[i] = {**results[i], "response": ATTACK, **data.score(asked[i], ATTACK)}
        eval.write_json(folder / f"{name}.json", results)
    (folder / "sft").mkdir()
    (folder / "grpo").mkdir()
    sft = [
        {"phase": phase, "step": i, "loss": 0.5 + random.random()}
        for phase in ("one", "two")
        for i in range(40)
    ]
    grpo = [
        {"step": i, "lor_reward": 0.01 * i, "dtr_reward": 0.5, "dtr_detection": 0.9 - 0.01 * i}
        for i in range(30)
    ]
    grpo[7]["lor_reward"] = float("nan")
    for name, lines in (("sft", sft), ("grpo", grpo)):
        (folder / name / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    compare(folder, "before.json", "after.json", runs=["sft", "grpo"])
    return folder


def compare(folder, *files, runs=()):
    """eval.py --compare FILES --report page.html --runs RUNS, in this process."""
    runs = ["--runs", *(str(folder / name) for name in runs)] if runs else []
    sys.argv = [
        "eval.py",
        "--compare",
        *(str(folder / name) for name in files),
        "--report",
        str(folder / "page.html"),
        *runs,
    ]
    eval.main()


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder / "page.html")


def test_the_page_asks_for_nothing_from_elsewhere(page):
    assert not {name for name, _ in page.tags} & {
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "a",
        "use",
        "video",
    }
    for _, attributes in page.tags:
        for key in ("src", "href", "srcset", "action", "xlink:href"):
            assert attributes.get(key, "data:").startswith("data:")
    rest = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", page.text)
    assert "//" not in rest and "@import" not in rest and "url(" not in rest
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policy and "http" not in policy
    assert len(page.text) < 10e6


def test_the_tables_hold_the_means_of_the_responses(folder, page):
    for name in ("before", "after"):
        results = json.loads((folder / f"{name}.json").read_text())["responses"]
        for path, task in {(r["path"], r["task"]) for r in results}:
            part = [r for r in results if (r["path"], r["task"]) == (path, task)]
            expected = [task, name, str(len(part))]
            rows = [row for row in page.rows if row[:3] == expected]
            assert len(rows) == 2  # the same task is in the table of either path
            row = rows[path == "dtr"]
            for place, key in ((3, "accuracy"), (4, "format"), (6, "reward")):
                assert row[place].split()[0] == f"{statistics.mean(r[key] for r in part):.3f}"
                half = 1.96 * statistics.stdev(r[key] for r in part) / len(part) ** 0.5
                assert row[place].split()[1] == f"±{half:.3f}"
            errors = [e for r in part for e in r["center_errors_m"] if e is not None]
            missed = [e for r in part for e in r["center_errors_m"] if e is None]
            if path == "lor" or not errors + missed:
                assert row[5] == row[7] == "–"
            elif not missed:
                assert row[7].startswith(f"{statistics.median(errors):.3f} [")


def test_the_bars_are_as_long_as_the_accuracies(folder, page):
    table = json.loads((folder / "after.json").read_text())["table"]
    wide = [tag["width"] for tag in page.all("rect")]
    assert len(wide) == 2 * len(table)  # two evaluations
    assert {f"{100 * line['accuracy']:.2f}%" for line in table} <= set(wide)


def points(polyline):
    return np.array([pair.split(",") for pair in polyline["points"].split()], float)


def test_the_curves_hold_the_points_of_the_logs(folder, page):
    drawn = [points(line) for line in page.all("polyline") if "raw" in line["class"]]
    expected = []
    for name, keys in (("sft", ["loss"]), ("grpo", ["dtr_detection", "lor_reward", "dtr_reward"])):
        lines = [
            json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        for phase in dict.fromkeys(line.get("phase") for line in lines):
            for key in keys:
                values = [
                    (line["step"], line.get(key, np.nan))
                    for line in lines
                    if line.get("phase") == phase
                ]
                expected.append([pair for pair in values if pair[1] == pair[1]])  # less the one NaN
    assert [len(e) for e in expected] == [40, 40, 30, 29, 30] == [len(d) for d in drawn]
    for curve, values in zip(drawn, expected):
        np.testing.assert_allclose(curve, values, rtol=1e-5)


def test_the_error_curve_is_the_share_of_objects_within_each_distance(folder, page):
    (curves,) = [[points(line) for line in page.all("polyline") if "raw" not in line["class"]][:2]]
    for name, curve in zip(("before", "after"), curves):
        results = json.loads((folder / f"{name}.json").read_text())["responses"]
        errors = [e for r in results for e in r["center_errors_m"]]
        for limit, share in curve[::10]:
            assert share == pytest.approx(
                sum(e is not None and e <= limit for e in errors) / len(errors), abs=1e-5
            )
        assert curve[0, 0] == 0 and curve[-1, 0] >= 1.2


def test_every_example_carries_what_the_filters_ask_for(folder, page):
    before, after = (
        json.loads((folder / f"{name}.json").read_text())["responses"]
        for name in ("before", "after")
    )
    right = lambda result: result["accuracy"] >= 0.5
    expected = [
        (
            a["task"],
            a["path"],
            "right" if right(a) else "wrong",
            {(0, 1): "gained", (1, 0): "lost"}.get((right(b), right(a)), "none"),
        )
        for b, a in zip(before, after)
    ]
    names = ["data-task", "data-path", "data-answer", "data-change"]
    assert [
        tuple(article[name] for name in names) for article in page.articles
    ] == expected  # all 88, in order
    assert [kind[3] for kind in expected[:4]] == ["lost", "none", "none", "gained"]
    assert [select["name"] for select in page.all("select")] == ["task", "path", "answer", "change"]
    assert page.pre == [r["response"] for pair in zip(before, after) for r in pair]


def test_text_of_a_model_stays_text(page):
    assert ATTACK in page.pre and len(page.all("script")) == 1
    assert not [1 for _, attributes in page.tags if "onerror" in attributes]


def test_only_the_script_of_the_page_may_run(page):
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    (script,) = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"


@pytest.mark.parametrize(
    "attack",
    [
        ATTACK,
        '"><script>1</script>',
        "' onload='1",
        "</title></style><svg onload=alert(1)>",
        "<!--",
    ],
)
def test_no_text_becomes_a_part_of_the_page(attack, asked, tmp_path, monkeypatch):
    """Also where no check has seen it: the attack stands wherever a text or a number may come in."""

    def write(attack, name):
        results = []
        for result in answered(asked[:6], 0.1):
            texts = dict.fromkeys(("id", "task", "question", "answer", "response"), attack)
            results.append({**result, **texts, "id": f"{attack}{result['index']}"})
        table = [{**line, "n": attack} for line in eval.make_table(results)]
        evaluations = [(attack, table, results), (f"{attack} again", table, results)]
        report.write(tmp_path / name, evaluations, runs=[attack])
        return Page(tmp_path / name)

    log = [{"step": i, "phase": attack, "loss": 1.0, "lor_reward": i} for i in range(3)]
    monkeypatch.setattr(report, "read_log", lambda folder: log)
    hostile = write(attack, "hostile.html")
    harmless = write("plain", "harmless.html")
    assert [name for name, _ in hostile.tags] == [name for name, _ in harmless.tags]
    for (_, found), (_, expected) in zip(hostile.tags, harmless.tags):
        assert found.keys() == expected.keys()
    assert hostile.pre == [attack] * 12


def test_pictures_of_saved_answers_are_those_that_were_asked_about(page, asked):
    pictures = [tag["src"].partition(",")[2] for tag in page.all("img")]
    assert len(pictures) == 2 * len(asked)  # picture and depth
    for i in (1, 30, 87):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[2 * i]))), float)
        truth = np.asarray(instances.draw_marks(instances.open_image(asked[i]), asked[i]), float)
        assert np.abs(shown - truth).mean() < 10  # JPEG; another scene is 20 or more away
        assert (
            min(
                np.abs(shown - instances.open_image(row)).mean()
                for row in asked
                if row["task"] != asked[i]["task"]
            )
            > 12
        )


def test_the_picture_of_an_example_shows_its_marks(asked):
    for row in asked:
        plain = instances.open_image(row)
        marked = np.asarray(instances.draw_marks(plain, row), float)
        changed = np.abs(marked - np.asarray(plain, float)).sum(-1) > 200
        if changed.sum() < 20:
            continue  # a question without marks, or on a background of their colour
        for responses in ([""], ["", ""]):
            source = re.search(r'base64,([^"]+)', report.figures(row, responses))[1]
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))), float)
            assert np.abs(shown - marked)[changed].mean() < 40
        break
    else:
        raise AssertionError("no question has marks")


def test_centres_lie_where_the_camera_sees_them():
    row = {
        "source": "test",
        "intrinsics": [100, 100, 50, 40],
        "image": "",
        "conversations": [],
        "3d_pos": {mark: {"center_cam": [0.5, -0.2, 2.0]} for mark in ("red_bbox", "blue_point")},
    }
    said = '<detect><3d_box center="1,0,4">a (red bbox)</3d_box><3d_box center="0,0,-1">b (blue point)</3d_box>'
    red, blue = report.center_points(row, said + "</detect>", (96, 96))
    assert red == ((255, 0, 0), (75, 30), (75, 40)) and blue == ((0, 0, 255), (75, 30), None)


def test_depth_is_light_near_dark_far_and_grey_where_there_is_none():
    picture, words = report.depth_picture(
        np.array([[1.0] * 50 + [5.0] * 50 + [np.nan]], np.float32)
    )
    near, far, none = (np.asarray(picture, float)[0, i].mean() for i in (0, 60, 100))
    assert (
        near > 180 and none == 128 and far < 60 and words == "depth: 1.0 m (light) to 5.0 m (dark)"
    )


def test_examples_are_spread_and_few(asked, tmp_path, monkeypatch):
    results = answered(asked, 0.1)
    monkeypatch.setattr(report, "EXAMPLES", 33)
    report.write(tmp_path / "a.html", [("run", eval.make_table(results), results)], asked)
    articles = Page(tmp_path / "a.html").articles
    kinds = [(a["data-task"], a["data-path"], a["data-answer"]) for a in articles]
    assert len(kinds) == 33 and len(set(kinds)) >= 30  # 11 tasks, 2 paths, right and wrong
    monkeypatch.setattr(report, "EXAMPLE_BYTES", 50_000)
    report.write(tmp_path / "b.html", [("run", eval.make_table(results), results)], asked)
    assert 1 <= len(Page(tmp_path / "b.html").articles) < 10
    assert (tmp_path / "b.html").stat().st_size < 100_000


def test_answers_of_unknown_origin_have_no_picture(asked, tmp_path):
    results = [{**r, "id": f"mine {i}"} for i, r in enumerate(answered(asked[:4], 0.1))]
    report.write(tmp_path / "a.html", [("run", eval.make_table(results), results)])
    found = Page(tmp_path / "a.html")
    assert len(found.articles) == 4 and not found.all("img")
    report.write(tmp_path / "empty.html", [("run", [], [])])
    assert not Page(tmp_path / "empty.html").articles


def test_a_run_without_a_log_is_one_line(folder, capsys):
    compare(folder, "after.json", runs=["nothing"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "metrics.jsonl" in line]
    assert len(lines) == 1 and "nothing" in lines[0]


@pytest.mark.parametrize(
    "file, text, says",
    [
        ("bad.json", "{", "bad.json"),
        ("bad.json", "[]", "bad.json"),
        ("bad.json", '{"table": []}', "responses"),
        ("bad.json", '{"table": [], "responses": [{"id": 1}]}', "accuracy"),
        ("log/metrics.jsonl", '{"step": 0}\n{"step": 1', "line 2"),
        ("log/metrics.jsonl", "3\n", "line 1"),
        ("log/metrics.jsonl", '{"loss": 1}\n', "line 1"),
    ],
)
def test_malformed_files_are_one_line(file, text, says, folder, capsys):
    (folder / "log").mkdir(exist_ok=True)
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(file)) as error:
        compare(folder, "bad.json" if file == "bad.json" else "after.json", runs=["log"])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "place, field, value",
    [
        ("table", "n", "<b>"),
        ("table", "n", 10**400),
        ("table", "n", 1.5),
        ("table", "task", None),
        ("table", "task", ["depth"]),
        ("table", "path", "up"),
        ("table", "accuracy", "0.5"),
        ("table", "accuracy", math.nan),
        ("table", "accuracy_ci", None),
        ("table", "reward", math.inf),
        ("table", "reward_ci", [0.1]),
        ("table", "detection", {}),
        ("table", "center_error_m", "near"),
        ("table", "center_error_m_ci", [1]),
        ("table", "center_error_m_ci", "ab"),
        ("responses", "index", "0"),
        ("responses", "id", {"a": 1}),
        ("responses", "path", 7),
        ("responses", "task", 7),
        ("responses", "question", None),
        ("responses", "answer", 2),
        ("responses", "response", ["x" * 10_000]),
        ("responses", "accuracy", "1"),
        ("responses", "accuracy", None),
        ("responses", "reward", -1e300),
        ("responses", "format", "high"),
        ("responses", "center_errors_m", 0.1),
        ("responses", "center_errors_m", ["0.1"]),
        ("responses", "center_errors_m", [math.nan]),
    ],
)
def test_a_field_of_another_type_is_one_line(place, field, value, asked, tmp_path):
    results = answered(asked[:4], 0.1)
    found = {"table": eval.make_table(results), "responses": results}
    sound = tmp_path / "sound.json"
    sound.write_text(json.dumps(found))
    eval.load_json(sound)
    found[place][1][field] = value
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=field) as error:
        eval.load_json(path)
    assert "odd.json" in str(error.value) and place in str(error.value)
    assert len(str(error.value)) < 200 + len(str(path))


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "\x00", '{"table": 7}', "[[]]", "nul", "\ud800"]
)
def test_a_file_that_is_no_evaluation_is_one_line(text, tmp_path):
    path = tmp_path / "odd.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"odd.json: not the JSON of an evaluation") as error:
        eval.load_json(path)
    assert "\n" not in str(error.value)
    for other in (tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="no such file"):
            eval.load_json(other)


@pytest.mark.parametrize("step", ["1", None, 1.5, 10**400, [], math.nan])
def test_a_step_that_is_no_number_is_one_line(step, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1}))
    with pytest.raises(UserError, match=r"metrics.jsonl: line 1: "):
        report.check_logs([tmp_path])


@pytest.mark.parametrize("loss", [-1.0, 0.0, 1e-300, 1e8, "1", None, True, 10**400])
def test_any_loss_is_drawn_or_left_out(loss, tmp_path):
    lines = [{"step": i, "phase": "one", "loss": loss} for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report.write(tmp_path / "a.html", [("run", [], [])], runs=[str(tmp_path)])
    drawn = len(Page(tmp_path / "a.html").all("polyline"))
    is_number = type(loss) in (int, float) and loss < 1e9
    assert drawn == (2 if is_number else 0)


# ---------------------------------------------------------------------------------------------------------------------
# findings.py: several seeds side by side


def test_the_interval_over_seeds_and_questions_is_the_stated_one_and_covers():
    x = np.array([[1.0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 1, 1]])
    seeds, asked = [0.75, 0.5, 0.5], [2 / 3, 0, 2 / 3, 1]
    half = math.hypot(
        4.303 * statistics.stdev(seeds) / 3**0.5, 1.96 * statistics.stdev(asked) / 4**0.5
    )
    assert findings.interval(x) == pytest.approx((7 / 12, half))
    assert findings.interval(x[:1]) == pytest.approx(
        (0.75, 1.96 * 0.5 / 2)
    )  # one seed: its questions
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):  # an effect of each seed, of each question, and noise
        values = (
            0.1 * rng.normal(size=(3, 1))
            + 0.5 * rng.normal(size=(1, 50))
            + 0.5 * rng.normal(size=(3, 50))
        )
        mean, half = findings.interval(values)
        hits += abs(mean) <= half
    assert 0.94 < hits / 400 < 1


@pytest.fixture()
def seeds(tmp_path):
    """Two evaluations, before and after, of two seeds; what changes from before to after is known."""
    rng, found = np.random.default_rng(1), {}
    for seed, when in itertools.product((0, 1), ("before", "after")):
        results = []
        kinds = itertools.product(
            ("lor", "dtr"), [*questions.REGION_FAMILIES, *questions.GENERAL_FAMILIES] * 3
        )
        for i, (path, task) in enumerate(kinds):
            sees = path == "dtr" and task in questions.REGION_FAMILIES
            results.append(
                {
                    "index": i,
                    "id": str(i),
                    "path": path,
                    "task": task,
                    "question": "?",
                    "answer": "A",
                    "response": "",
                    "auto": "lor",
                    "accuracy": float(rng.integers(2)),
                    "format": 1.0,
                    "reward": float(rng.uniform()),
                    "detection": float(rng.uniform()) if sees else None,
                    "center_errors_m": [*map(float, rng.uniform(size=2)), None] if sees else [],
                }
            )
        eval.write_json(tmp_path / f"{when}_{seed}.json", results)
        found.setdefault(when, []).append(results)
    for seed in (0, 1):
        steps = [
            {"step": i, "lor_reward": 0.5 + 0.01 * i, "dtr_reward": 0.6, "dtr_detection": 0.2}
            for i in range(20)
        ]
        (tmp_path / f"{seed}.jsonl").write_text("\n".join(map(json.dumps, steps)))
    return tmp_path, found


@pytest.mark.parametrize("change", ["other questions", "one path"])
def test_findings_subtracts_only_answers_to_the_same_questions(change, seeds, monkeypatch, capsys):
    folder, found = seeds
    rows = (
        [{**row, "id": f"other {row['id']}"} for row in found["after"][0]]
        if change == "other questions"
        else [row for row in found["after"][0] if row["path"] == "dtr"]
    )
    eval.write_json(folder / "changed_0.json", rows)
    monkeypatch.setattr(
        sys, "argv", ["findings.py", f"cold={folder}/before_0.json", f"RL={folder}/changed_0.json"]
    )
    findings.main()
    out = capsys.readouterr().out
    assert "| mean |" in out and "minus cold |" not in out and "different questions" in out
    assert out.count("region +") + out.count("region -") == (
        2 if change == "other questions" else 1
    )


def test_findings_prints_means_and_paired_differences_and_draws_them(seeds, monkeypatch, capsys):
    folder, found = seeds
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "findings.py",
            f"cold={folder}/before_*.json",
            f"RL={folder}/after_*.json",
            "--curves",
            f"{folder}/*.jsonl",
            "--figure",
            f"{folder}/figure.svg",
        ],
    )
    findings.main()
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    heads = [
        i
        for i, row in enumerate(lines)
        if row[0] in ("mean", "minus cold", "seed by seed, minus cold")
    ]
    mean, change, each = (
        {row[0]: row for row in lines[a:b]} for a, b in zip(heads, [*heads[1:], None])
    )
    for path in ("lor", "dtr"):
        gains = [
            [b["reward"] - a["reward"] for a, b in zip(*pair) if a["path"] == path]
            for pair in zip(found["before"], found["after"])
        ]
        halves = [1.96 * statistics.stdev(gain) / len(gain) ** 0.5 for gain in gains]
        wanted = [f"{statistics.mean(gain):+.3f} ± {half:.3f}" for gain, half in zip(gains, halves)]
        assert each[f"{path.upper()} all: reward"][1] == ", ".join(wanted)
    for path, pool in itertools.product(("lor", "dtr"), ("region", "general")):
        tasks = {"region": questions.REGION_FAMILIES, "general": questions.GENERAL_FAMILIES}[pool]
        of = {
            when: statistics.mean(
                r["accuracy"]
                for one in results
                for r in one
                if r["path"] == path and r["task"] in tasks
            )
            for when, results in found.items()
        }
        name = f"{path.upper()} {pool}: accuracy"
        assert [float(cell.split(" ±")[0]) for cell in mean[name][2:]] == pytest.approx(
            [*of.values()], abs=6e-4
        )
        assert float(change[name][2].split(" ±")[0]) == pytest.approx(
            of["after"] - of["before"], abs=6e-4
        )
        assert int(mean[name][1]) == 3 * len(tasks)
    figure = ElementTree.parse(folder / "figure.svg").getroot()
    kinds = [element.tag.split("}")[1] for element in figure.iter()]
    assert kinds.count("polyline") == 3 and kinds.count("rect") > 2 * 6
    assert (
        "NaN" not in (folder / "figure.svg").read_text()
        and "inf" not in (folder / "figure.svg").read_text()
    )


@pytest.mark.filterwarnings("error")
def test_changes_between_two_evaluations(seeds, capsys):
    _, found = seeds
    before, after = found["before"][0], found["after"][0]
    eval.show_changes("RL", before, after)
    text = capsys.readouterr().out
    pairs = [
        (b, a)
        for b, a in zip(before, after)
        if b["path"] == "dtr" and b["task"] in questions.REGION_FAMILIES
    ]
    gains = [a["detection"] - b["detection"] for b, a in pairs]
    half = 1.96 * statistics.stdev(gains) / len(gains) ** 0.5
    (line,) = [line for line in text.splitlines() if line.startswith("  dtr region")]
    assert (
        f"detection {statistics.mean(gains):+.3f} ±{half:.3f}" in line
        and "detection" not in text.split("dtr")[0]
    )
    middle = [
        statistics.median(math.inf if e is None else e for r in side for e in r["center_errors_m"])
        for side in zip(*pairs)
    ]
    assert f"centre error {middle[1] - middle[0]:+.3f} m, 95 % interval [" in text
    lost = [{**row, "center_errors_m": [None] * len(row["center_errors_m"])} for row in before]
    eval.show_changes("RL", lost, lost)  # no centres at all: no median, no change, no warning
    assert "centre error" not in capsys.readouterr().out


def test_findings_tells_how_a_run_went(seeds, monkeypatch, capsys):
    folder, _ = seeds
    path = (
        [0.6] * 20 + [0.2] * 10 + [0.4] * 10
    )  # of the reward; the mean over ten steps falls by 0.4
    (folder / "metrics.jsonl").write_text(
        "\n".join(
            json.dumps(
                {
                    "step": i,
                    "lor_reward": x + 0.1,
                    "dtr_reward": x - 0.1,
                    "lor_format": x,
                    "kept": 0.5,
                    "cut": i / 100,
                }
                | ({"dtr_format": 0.9} if i < 35 else {})
            )
            for i, x in enumerate(path)
        )
    )
    argv = ["findings.py", f"a={folder}/before_0.json", f"b={folder}/after_0.json", "--course"]
    monkeypatch.setattr(sys, "argv", argv)
    findings.main()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.split("during GRPO")[1].splitlines()[2:]
        if line.startswith("|")
    ]
    assert {name: values for name, n, *values in rows if n == "1"} == {
        name: [value] * 2
        for name, value in {
            "LOR: reward, first 10 steps": "0.700",
            "LOR: reward, last 10 steps": "0.500",
            "DTR: reward, first 10 steps": "0.500",
            "DTR: reward, last 10 steps": "0.300",
            "LOR: format, first 10 steps": "0.600",
            "LOR: format, last 10 steps": "0.400",
            "DTR: format, first 10 steps": "0.900",
            "DTR: format, last 10 steps": "–",  # not in every line
            "deepest fall of the reward": "0.400",
            "groups kept": "0.500",
            "responses cut off": "0.195",
        }.items()
    }
    (folder / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}')  # of sft.py
    with pytest.raises(SystemExit):
        findings.main()
    assert "metrics.jsonl is not of grpo.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    "column, words",
    [
        ("cold=nothing.json", "nothing.json"),
        ("nothing", "NAME=PATTERN"),
        ("x={}/before_[01]*.json", "different questions"),
    ],
)
def test_findings_says_what_is_wrong(column, words, seeds, monkeypatch, capsys):
    folder, found = seeds
    eval.write_json(folder / "before_1.json", found["before"][1][:-1])
    monkeypatch.setattr(sys, "argv", ["findings.py", column.format(folder)])
    with pytest.raises(SystemExit) as end:
        findings.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and words in err
