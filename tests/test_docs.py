"""README and docs: what they name exists, and their commands run as they stand.

python -m pytest -q tests/test_docs.py
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU, also for the programs
os.environ["HF_HUB_OFFLINE"] = "1"

import importlib
import re
import subprocess
import sys

import pytest
from common import ROOT

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("docs/*.md")}
PAGES["README.md"] = (ROOT / "README.md").read_text()
PROGRAMS = {
    **{f"{name}.py": name for name in ("sft", "grpo", "eval")},
    **{
        f"-m tools.{name}": f"tools.{name}"
        for name in ("check", "build", "convert", "depth", "bench", "findings")
    },
    "-m benchmarks": "benchmarks.__main__",
}
# The programs of a test run of the docs' commands: few steps, few questions.
SMALL = {
    "sft.py": "--pretrain 1 --steps 1 --batch 4",
    "grpo.py": "--steps 1 --prompts 4 --group_size 2 --questions 11 --max_new_tokens 8",
    "eval.py": "--questions 11 --max_new_tokens 8",
}


def blocks(page):
    """The fenced blocks of a page."""
    return re.findall(r"^```\w*\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def commands():
    """(page, program, the rest of the line) of every command that starts a program of the project."""
    programs = "|".join(map(re.escape, PROGRAMS))
    found = []
    for page, whole in PAGES.items():
        text = "\n".join(blocks(page)).replace("\\\n", " ")
        text += "\n" + "\n".join(re.findall(r"`([^`\n]+)`", whole))
        for program, rest in re.findall(
            rf"(?:python|torchrun)[^\n|&]*? ({programs})\b([^\n|&#]*)", text
        ):
            found.append((page, program, rest))
    return found


def test_the_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 10_000
    names = ("findings", "data", "benchmarks", "scale", "traps", "change_it")
    assert {f"docs/{name}.md" for name in names} <= set(PAGES)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_what_a_page_names_exists(page):
    text = PAGES[page]
    for target in re.findall(r"\]\((?!http)([^)#]*)", text):  # links and pictures
        folder = (ROOT / page).parent
        assert target == "" or (folder / target).exists(), f"{page} links to {target}"
    for file in re.findall(r"`((?:[a-z_]+/)?\w+\.(?:py|md|svg))`", text):
        places = [ROOT / file, ROOT / "docs" / file, *ROOT.glob(f"*/{file}")]
        assert any(place.is_file() for place in places), f"{page} names {file}"
    for file, names in re.findall(r"`([\w/]+\.py)` ((?:`\w+`(?:, )?)+)", text):
        for name in re.findall(r"`(\w+)`", names):
            source = (ROOT / file).read_text()
            pattern = rf"^ *(def |class )?{name}\b"
            assert re.search(pattern, source, re.MULTILINE), f"{page}: {file} has no {name}"
    for file, name in re.findall(r"\b((?:tests/)?test_\w+\.py)::(\w+)", text):
        source = (ROOT / file).read_text()
        assert f"def {name}(" in source, f"{page}: {file} has no {name}"


def test_the_readme_names_functions_and_the_traps_their_tests():
    named = re.findall(r"`[\w/]+\.py` ((?:`\w+`(?:, )?)+)", PAGES["README.md"])
    assert len(named) > 12
    traps = PAGES["docs/traps.md"]
    assert {int(number) for number in re.findall(r"\bT(\d+)\b", traps)} >= set(range(1, 33))
    assert len(re.findall(r"test_\w+\.py::test_\w+", traps)) > 20


def test_the_tree_of_the_readme_is_the_project():
    tree = PAGES["README.md"].split("## Files")[1].split("```")[1]
    named = set(re.findall(r"\b(\w+\.(?:py|md))\b", tree))
    folders = ("formats", "world", "engine", "benchmarks", "tools")
    files = [*ROOT.glob("*.py"), *ROOT.glob("docs/*.md")]
    for folder in folders:
        files += ROOT.glob(f"{folder}/*.py")
    assert named == {file.name for file in files} - {"__init__.py"}
    assert set(re.findall(r"^(\w+)/", tree, re.MULTILINE)) == {*folders, "tests", "docs"}


def test_the_commands_have_flags_that_exist():
    found = commands()
    assert len(found) > 30 and {program for _, program, _ in found} == set(PROGRAMS)
    for page, program, rest in found:
        module = importlib.import_module(PROGRAMS[program])
        settings = module.Settings.__dataclass_fields__
        known = set(settings) | {field.metadata["flag"] for field in settings.values()}
        for flag in re.findall(r"--([a-z][\w-]*)", rest):
            assert flag.replace("-", "_") in known | {"help"}, f"{page}: {program} has no --{flag}"


def test_the_commands_run(tmp_path):
    """The blocks that train and evaluate the embedded world, as they stand.

    Only the first turn of loops over seeds, one step, few questions; without what needs data, a
    stock model or eight processes.
    """
    lines = []
    for page in ("README.md", "docs/findings.md"):
        for block in blocks(page):
            if re.match(r"for |python |torchrun ", block):
                lines += block.splitlines()
    skip = r"Qwen|--size base|pip install|nnodes|--data|tools\.bench|nproc_per_node 8"
    script = "\n".join(line for line in lines if not re.search(skip, line))
    # One seed; but all worlds, paths, rewards and blends, which tools.findings asks for by name.
    script = re.sub(
        r"for (?!world|path|reward|blend)(\w+) in (\w+)[\w ]*;", r"for \1 in \2;", script
    )
    for program, flags in SMALL.items():
        script = re.sub(
            rf"\b(python|torchrun --nproc_per_node \d) ({re.escape(program)}\b.*?)( *(?:#.*)?)$",
            rf"\1 {ROOT}/\2 {flags}\3",
            script,
            flags=re.MULTILINE,
        )
    # A model that is there learns no perception; without a blend there is no cold start.
    script = re.sub(r"(sft\.py .*--model .*) --pretrain 1", r"\1", script)
    script = re.sub(r"(sft\.py .*--blend none .*) --steps 1", r"\1", script)
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node"
    script = script.replace("torchrun --nproc_per_node", torchrun)
    script = re.sub(r"(?<!\S)python ", f"{sys.executable} ", script)
    assert script.count(f"{ROOT}/") > 12 and "for s in 0;" in script and "tools.findings" in script
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-2500:]}"
    assert (tmp_path / "figure1.svg").is_file()
