"""One step on a page: its numbers against the formulas in float64, the step against that of a run, the page as text.

python -m pytest -q tests/test_explain.py                                   # seconds
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import base64
import copy
import dataclasses
import hashlib
import json
import math
import re
import statistics
import sys
import zlib
from html.parser import HTMLParser

import pytest
import torch
import torch.distributed as dist
from common import process_group  # noqa: F401  (at work in every test)
from test_model import ROWS, make_model, make_processor, make_tokenizer, whole

import data
import grpo
import model as plain_model
from engine import distributed, explain
from engine.settings import run_main
from model import token_rules

CPU = torch.device("cpu")
ATTACK = '</pre></span><script>alert("1")</script><img src=x onerror=alert(2)>'
BASE = dataclasses.replace(
    grpo.Settings(),
    prompts=4,
    group_size=4,
    minibatches=2,
    steps=1,
    max_new_tokens=12,
    lr=3e-2,  # large: ratios leave the clip range
    kl=0.3,
    filter="none",
    questions=0,
    show_every=0,
    save_every=0,
)
VOID = ("meta", "img", "input")


class Page(HTMLParser):
    """A page read back: tags [(name, attributes)], and per section its articles with their tokens."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.open, self.sections, self.words = text, [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open  # every element that was opened is closed

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.tags.append((name, attributes))
        if name not in VOID:
            self.open.append((name, attributes))
        if name == "section":
            self.sections.append({**attributes, "articles": []})
        if name == "article":
            self.sections[-1]["articles"].append({**attributes, "tokens": [], "text": ""})
        if "data-n" in attributes:
            self.sections[-1]["articles"][-1]["tokens"].append(numbers(attributes["data-n"]))
        for key in ("data-group-loss", "data-step-loss"):
            if key in attributes:
                self.sections[-1][key] = float(attributes[key])
        if "data-change" in attributes:
            self.sections[-1].setdefault("changes", []).append(float(attributes["data-change"]))

    def handle_startendtag(self, name, attributes):
        self.tags.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop()[0] == name

    def handle_data(self, text):
        if any("data-n" in attributes for _, attributes in self.open):
            self.sections[-1]["articles"][-1]["text"] += text
        elif self.open and self.open[-1][0] not in ("script", "style"):
            self.words += text


def numbers(text):
    """The numbers of a token, by their names; NaN where there is none."""
    values = [math.nan if value == "-" else float(value) for value in text.split()]
    return dict(zip(explain.COLUMNS, values, strict=True))


class Rows:
    """The four rows, again and again."""

    def __getitem__(self, position):
        return ROWS[position % 4]


def rule(row, response, parts):
    """A reward that differs from response to response."""
    return zlib.crc32(response.encode()) % 7 / 6


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def train(tokenizer, out, reward=rule, **more):
    """grpo.train with a tiny model -> its weights, by name."""
    settings = dataclasses.replace(BASE, out=str(out), **more)
    parts = make_model(tokenizer, dtype=torch.float32), tokenizer, make_processor()
    trained = grpo.train(settings, *parts, Rows(), CPU, reward)
    return trained, {name: whole(p.detach()) for name, p in trained.named_parameters()}


def explained(tokenizer, folder, reward=rule, **more):
    """The page of a step, read back."""
    file = folder / "page.html"
    train(tokenizer, folder / "out", reward, explain=str(file), **more)
    assert os.listdir(folder) == ["page.html"]  # nothing else is written
    return Page(file.read_text())


@pytest.fixture(scope="module")
def page(tokenizer, tmp_path_factory):
    return explained(tokenizer, tmp_path_factory.mktemp("page"))


# ----------------------------------------------------------------------------------------------
# the numbers


def token_loss(n, advantage, settings):
    """The formulas of grpo.py's docstring, for one token."""
    w = math.exp(n["now"] - n["old"])
    bounded = min(max(w, 1 - settings.clip_low), 1 + settings.clip_high)
    objective = min(w * advantage, bounded * advantage)
    is_clipped = objective < w * advantage
    if advantage < 0:
        objective = max(objective, settings.dual_clip * advantage)
    k3 = 0.0
    if settings.kl:
        gap = n["ref"] - n["now"]
        k3 = math.exp(gap) - gap - 1
    return w, is_clipped, k3, settings.kl * k3 - objective


def check_numbers(section, settings):
    """All numbers of a group against the formulas, from its rewards and log-probabilities."""
    rewards = [float(article["data-reward"]) for article in section["articles"]]
    mean = statistics.mean(rewards)
    deviation = statistics.stdev(rewards)
    tokens = float(section["data-tokens"])
    total = 0.0
    for article, reward, change in zip(section["articles"], rewards, section["changes"]):
        advantage = float(article["data-advantage"])
        assert advantage == pytest.approx((reward - mean) / (deviation + 1e-6), abs=1e-5)
        for n in article["tokens"]:
            w, is_clipped, k3, loss = token_loss(n, advantage, settings)
            assert n["ratio"] == pytest.approx(w, rel=1e-4)
            assert n["clipped"] == is_clipped
            if settings.kl:
                assert n["k3"] == pytest.approx(k3, abs=2e-6, rel=1e-3)
            assert n["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
            assert n["share"] == pytest.approx(n["loss"] / tokens, rel=1e-6)
            total += n["share"]
        moved = sum(n["new"] - n["old"] for n in article["tokens"])
        assert change == pytest.approx(moved, abs=1e-5)
    assert section["data-group-loss"] == pytest.approx(total, rel=1e-5, abs=1e-9)
    return total


def test_the_numbers_are_those_of_the_formulas(page):
    assert len(page.sections) == 2  # a group of each path
    tokens = []
    for section in page.sections:
        check_numbers(section, BASE)
        assert len(section["articles"]) == 4
        tokens += [n for article in section["articles"] for n in article["tokens"]]
    assert any(n["clipped"] for n in tokens)
    assert max(n["k3"] for n in tokens) > 1e-3  # of the second optimizer step


@pytest.mark.parametrize("kl", [0.3, 0.0])
def test_the_shares_of_a_group_add_up_to_the_loss_of_its_step(kl, tokenizer, tmp_path):
    page = explained(tokenizer, tmp_path, prompts=1, minibatches=1, kl=kl)
    (section,) = page.sections
    total = check_numbers(section, dataclasses.replace(BASE, kl=kl))
    assert section["data-step-loss"] == pytest.approx(total, rel=1e-4, abs=1e-6)
    assert math.isnan(section["articles"][0]["tokens"][0]["ref"]) == (kl == 0)


def test_the_log_probabilities_are_those_of_the_plain_forward(tokenizer, tmp_path, monkeypatch):
    """Before the step those of the start, as sampled and as reference; afterwards those of the trained model."""
    seen = {}
    write = explain.write

    def spy(settings, tokenizer, shown, new_logprobs, counts):
        seen.update(shown=shown, counts=counts)
        write(settings, tokenizer, shown, new_logprobs, counts)

    monkeypatch.setattr(explain, "write", spy)
    file = tmp_path / "page.html"
    trained, _ = train(
        tokenizer, tmp_path / "out", explain=str(file), prompts=1, minibatches=1, max_new_tokens=9
    )
    (group,) = seen["shown"]
    assert seen["counts"] == {"sampled": 1, "kept": 1, "updates": 1}
    (section,) = Page(file.read_text()).sections
    prompts = data.collate([group["sample"]], tokenizer)
    start = make_model(tokenizer, dtype=torch.float32)
    _, banned = token_rules(start, tokenizer, CPU)
    for model, names in ((start, ("old", "now", "ref")), (trained, ("new",))):
        with torch.no_grad():
            logprobs, _ = plain_model.token_logprobs(
                model, prompts, group["features"], group["tokens"], group["mask"], banned
            )
        for article in section["articles"]:
            i = int(article["data-response"]) - 1
            expected = logprobs[i][group["mask"][i].bool()].tolist()
            for name in names:
                found = [n[name] for n in article["tokens"]]
                assert found == pytest.approx(expected, abs=1e-4), name


def test_the_text_of_the_tokens_is_the_response(page, tokenizer):
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    text = "é深😀a"
    found = explain.pieces(Bytes(), list(text.encode()))
    assert "".join(found) == text and found == ["", "é", "", "", "深", "", "", "", "😀", "a"]
    assert "".join(explain.pieces(Bytes(), [255, 255, 255, 255, 97])) == "�" * 4 + "a"
    for section in page.sections:
        for article in section["articles"]:
            assert len(article["tokens"]) > 0 and article["text"]


# ----------------------------------------------------------------------------------------------
# the step is a run's, and a run is what it was


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timing = ("seconds", "memory_gb", "tokens_per_s")
    return [
        {k: v for k, v in line.items() if not k.endswith("_s") and k not in timing}
        for line in lines
    ]


def test_the_step_is_the_first_of_the_run_and_the_run_stays_as_it_is(
    tokenizer, page, tmp_path, monkeypatch
):
    _, shown = train(tokenizer, tmp_path / "none", explain=str(tmp_path / "page.html"))
    assert Page((tmp_path / "page.html").read_text()).sections == page.sections
    _, run = train(tokenizer, tmp_path / "run")
    monkeypatch.setattr(explain, "record_tokens", lambda *_: None)
    monkeypatch.setattr(explain, "record_step", lambda *_: None)
    _, bare = train(tokenizer, tmp_path / "bare")
    for name, weights in run.items():
        assert torch.equal(weights, bare[name]) and torch.equal(weights, shown[name])
    assert metrics(tmp_path / "run") == metrics(tmp_path / "bare")
    assert not (tmp_path / "none").exists()


def test_groups_that_the_filter_dropped_are_shown_as_such(tokenizer, tmp_path):
    page = explained(tokenizer, tmp_path, lambda *_: 0.5, filter="spread")
    (section,) = page.sections
    assert "dropped this group" in page.words and "data-step-loss" not in section
    tokens = [n for article in section["articles"] for n in article["tokens"]]
    assert all(math.isnan(n["ratio"]) and math.isnan(n["share"]) for n in tokens)
    assert all(n["new"] == pytest.approx(n["old"], abs=1e-4) for n in tokens)


def test_what_is_marked_is_clear_mixed_late_and_of_both_paths():
    def group(path, rewards, detection=None):
        return {
            "row": {"3d_pos": {}} if path == "dtr" else {},
            "rewards": torch.tensor(rewards),
            "parts": [{"detection": detection}],
        }

    mixed, single, flat = [0.0, 1, 0, 1, 1, 0], [0.0, 0, 0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5, 0.5, 0.6]
    early, late = group("lor", mixed), group("lor", mixed)
    boxes, others = group("dtr", single, 0.5), [group("lor", flat), group("lor", single)]
    chosen = explain.mark([[early], [late, boxes], others], [])
    assert len(chosen) == 2 and chosen[0] is boxes and chosen[1] is late
    assert "record" in late and "record" not in early
    (alone,) = explain.mark([], [early, late])
    assert alone is early


# ----------------------------------------------------------------------------------------------
# the page


def test_the_page_asks_for_nothing_from_elsewhere(page):
    rest = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", page.text)
    assert "//" not in rest and "http:" not in rest and "@import" not in rest and "url(" not in rest
    assert not {name for name, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "a"}
    (policy,) = [a["content"] for name, a in page.tags if "http-equiv" in a]
    (script,) = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def hostile_view(text, tokenizer_text):
    """A group whose every text is this one."""

    class Tokenizer:
        def decode(self, ids):
            return tokenizer_text

    row = copy.deepcopy(ROWS[2])
    row["conversations"][0]["value"] += text
    row["conversations"][1] = {"from": "gpt", "value": f"<answer>{text}</answer>"}
    row["source"] = text
    values = torch.tensor([[-0.5, -0.1], [-0.2, -0.3]])
    parts = {"reward": 0.5, "accuracy": 0.5, "format": 0.5, "detection": None}
    group = {
        "row": row,
        "texts": [f"<answer>{text}</answer>", text],
        "tokens": torch.ones(2, 2, dtype=torch.long),
        "mask": torch.ones(2, 2),
        "old_logprobs": values,
        "parts": [parts, {**parts, "reward": 0.4}],
        "rewards": torch.tensor([0.6, 0.4]),
        "advantages": torch.tensor([0.7, -0.7]),
        "kept": True,
        "record": {},
    }
    terms = {"logprobs": values, "ratio": values, "clipped": values, "kl": values, "loss": values}
    explain.record_tokens([group], {**terms, "ref_logprobs": values})
    explain.record_step([group], {"tokens": 4.0, "loss": 0.1}, True)
    return explain.view_of(group, values, Tokenizer())


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
def test_no_text_becomes_a_part_of_the_page(attack):
    counts = {"sampled": 1, "kept": 1, "updates": 1}
    pages = []
    for text in (attack, "plain"):
        settings = dataclasses.replace(BASE, model=text, group_size=2)
        pages.append(Page(explain.page_of(settings, [hostile_view(text, text)], counts)))
    hostile, harmless = pages
    assert [name for name, _ in hostile.tags] == [name for name, _ in harmless.tags]
    for (_, found), (_, expected) in zip(hostile.tags, harmless.tags):
        assert found.keys() == expected.keys()
    assert hostile.sections[0]["articles"][0]["text"] == attack * 2 and attack in hostile.words


def test_parts_that_are_normalised_one_by_one_are_told_so():
    counts = {"sampled": 1, "kept": 1, "updates": 1}
    view = hostile_view("plain", "plain")
    view["responses"][0]["parts"]["accuracy"] = 0.9
    view["responses"][1]["parts"] = {**view["responses"][1]["parts"], "accuracy": 0.5}
    settings = dataclasses.replace(BASE, group_size=2, normalize="each")
    words = Page(explain.page_of(settings, [view], counts)).words
    assert "weight 0.8, mean 0.7000, deviation 0.2828" in words and "reward − mean)" not in words
    settings = dataclasses.replace(settings, normalize="sum")
    words = Page(explain.page_of(settings, [view], counts)).words
    assert "(0.60 + 0.40) / 2 = 0.5000" in words and "deviation 0.2828" not in words


# ----------------------------------------------------------------------------------------------
# the flag


@pytest.mark.parametrize(
    "words, says",
    [
        ("--explain .", "--explain .: is a folder"),
        ("--explain m/config.json/a.html", "--explain m/config.json/a.html: cannot write there"),
        ("--explain /dev/full", "--explain /dev/full: is a device"),
        ("--explain m/config.json", "is read by this command"),
        ("--explain d.json --data d.json*2", "is read by this command"),
        ("--explain page.html --resume", "--resume: has no effect with --explain"),
        ("--explain page.html", "--model m: "),  # no model; but the flag is fine
    ],
)
def test_mistakes_are_one_line_before_any_work(words, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    (tmp_path / "d.json").write_text("[]")
    monkeypatch.setattr(distributed, "setup", lambda seed: CPU)
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--model", "m", *words.split()])
    with pytest.raises(SystemExit) as end, monkeypatch.context() as context:
        context.setattr(dist, "is_initialized", lambda: False)
        run_main(grpo.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert says in lines[0]
    assert sorted(os.listdir()) == ["d.json", "m"] and os.listdir("m") == ["config.json"]
