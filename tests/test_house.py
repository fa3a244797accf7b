"""The layout of the project: which way its imports run, what stands at the top, what can be copied.

python -m pytest -q tests/test_house.py
"""

import ast
import os
import re
import runpy
import subprocess
import sys

import pytest
from common import ROOT

# A file imports from its left or from its own place, never from its right.
ORDER = [
    ["rewards"],
    ["formats"],
    ["model"],
    ["world"],
    ["data"],
    ["engine"],
    ["sft", "eval"],
    ["grpo"],
    ["tools", "benchmarks"],
]
PLACE = {name: place for place, names in enumerate(ORDER) for name in names}
FOR_ALL = {"formats.errors", "engine.settings", "engine.output"}  # leaves that every file may use
STAGES = {"model", "data", "rewards", "sft", "grpo", "eval"}
TOP = {
    *("README.md", "LICENSE", "requirements.txt", "test_rewards.py"),
    *(f"{stage}.py" for stage in STAGES),
    *("formats", "world", "engine", "benchmarks", "tools", "tests", "docs"),
}


def modules():
    """{module name: its syntax tree} of the project without its tests."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        path = file.relative_to(ROOT)
        if path.parts[0] in {*PLACE, *(f"{stage}.py" for stage in STAGES)}:
            name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(file.read_text())
    return found


def imports_of(tree, names):
    """The modules of the project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & names) or {node.module}
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError("a relative import")
    return found & names


@pytest.fixture(scope="module")
def graph():
    trees = modules()
    names = set(trees)
    assert names >= STAGES | FOR_ALL | {"engine.shared_prefix", "world.raycast", "tools.check"}
    return {name: imports_of(tree, names) for name, tree in trees.items()}


def test_imports_run_one_way(graph):
    for name, imported in graph.items():
        here = PLACE[name.split(".")[0]]
        for other in imported - FOR_ALL:
            assert PLACE[other.split(".")[0]] <= here, f"{name} imports {other} from its right"
    for leaf in FOR_ALL:
        assert graph[leaf] <= FOR_ALL


def test_no_import_leads_back(graph):
    def walk(name, way):
        assert name not in way, " -> ".join([*way, name])
        for other in graph[name]:
            walk(other, (*way, name))

    for name in graph:
        walk(name, ())


def test_the_stages_import_no_commands(graph):
    for stage in STAGES | {name for name in graph if name.startswith(("engine.", "world."))}:
        assert not {other.split(".")[0] for other in graph[stage]} & {"tools", "benchmarks"}


def test_the_top_level_is_the_six_stages_and_the_rewards():
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("no git checkout here: what belongs to the project is not known")
    names = {line.split("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == TOP


# ----------------------------------------------------------------------------------------------
# commands


COMMANDS = [
    *("sft", "grpo", "eval", "engine.plan", "benchmarks.__main__"),
    *(f"tools.{name}" for name in ("check", "build", "convert", "depth", "bench", "findings")),
]


def run(*words, cwd=ROOT):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    try:
        runpy.run_module(command, run_name="__main__")
    except SystemExit as end:
        assert not end.code
    out = capsys.readouterr().out
    assert "--help" in out and len(out.splitlines()) > 3


@pytest.mark.parametrize(
    "old, new",
    [
        ("eval.py --bench blink", "python -m benchmarks"),
        ("eval.py --score a.jsonl", "python -m benchmarks"),
        ("data.py check a.json", "python -m tools.check"),
    ],
)
def test_old_spellings_name_the_new_command(old, new):
    done = run(*old.split())
    lines = done.stderr.strip().splitlines()
    assert done.returncode in (1, 2) and len(lines) == 1
    assert lines[0].startswith("error: ") and new in lines[0]


# ----------------------------------------------------------------------------------------------
# what can be copied into another project


def copied(folder, script, **files):
    """Run a script in a folder that holds these files and nothing else of the project."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "use.py").write_text(script)
    done = run("-S" if script.startswith("# standard library") else "-B", "use.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def block(file, start):
    """The text between two rulers of a file, by the first words of its heading."""
    sections = re.split(r"^# -{90,}$", (ROOT / file).read_text(), flags=re.MULTILINE)
    (found,) = [section for section in sections if section.lstrip().startswith(f"# {start}")]
    return found


def test_rewards_work_alone_with_the_standard_library(tmp_path):
    script = """# standard library: -S leaves site-packages out
import rewards
print(rewards.total_reward("<think>Two.</think><answer>3</answer>", "3", "lor")["total"])
"""
    assert copied(tmp_path, script, rewards=(ROOT / "rewards.py").read_text()) == "1.0\n"


def test_the_model_works_alone(tmp_path):
    script = """
import torch, model
from transformers import Qwen2VLImageProcessorPil, Qwen2Tokenizer, Qwen3VLConfig

special = [token for token in model.SPECIAL_TOKENS if token != model.REGION_TOKEN]
tokenizer = Qwen2Tokenizer().train_new_from_iterator(
    ["the chair"] * 9, 300, new_special_tokens=special, show_progress=False)
tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
ids = tokenizer.convert_tokens_to_ids
config = Qwen3VLConfig(
    vision_config=dict(hidden_size=32, depth=2, intermediate_size=32, num_heads=2, patch_size=8,
                       out_hidden_size=32, deepstack_visual_indexes=[0], num_position_embeddings=16),
    text_config=dict(hidden_size=32, num_hidden_layers=2, intermediate_size=32, head_dim=16,
                     num_attention_heads=2, num_key_value_heads=1, vocab_size=320,
                     rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])),
    image_token_id=ids(model.IMAGE_PAD), video_token_id=ids("<|video_pad|>"),
    vision_start_token_id=ids(model.IMAGE_START), vision_end_token_id=ids(model.IMAGE_END))
stock = super(model.RegionVLM, model.RegionVLM)
from transformers import Qwen3VLForConditionalGeneration
Qwen3VLForConditionalGeneration(config).save_pretrained("stock")
tokenizer.save_pretrained("stock")
Qwen2VLImageProcessorPil(patch_size=8).save_pretrained("stock")

vlm, tokenizer, processor = model.RegionVLM.load("stock")
depth, camera = torch.full((32, 32), 2.0), (30.0, 30.0, 16.0, 16.0)
points = model.to_patches(model.encode_points(model.point_map(depth, camera)), (4, 4), 2)
inside = torch.zeros(1, 32, 32)
inside[:, :8, :8] = 1
regions = model.region_weights(inside, (4, 4), 2)
text = model.IMAGE_START + 4 * model.IMAGE_PAD + model.IMAGE_END + "the <mask> chair"
row = tokenizer(text, return_tensors="pt")["input_ids"]
prompts = dict(input_ids=row, attention_mask=torch.ones_like(row),
               mm_token_type_ids=(row == ids(model.IMAGE_PAD)).long(), points=points, regions=regions,
               pixel_values=torch.randn(16, 3 * 2 * 64), image_grid_thw=torch.tensor([[1, 4, 4]]))
stop, banned = model.token_rules(vlm, tokenizer, "cpu")
tokens, mask, logprobs, features = model.rollout(vlm, prompts, 3, 5, stop, banned)
scored, entropy = model.token_logprobs(vlm, prompts, features, tokens, mask, banned)
print(tokens.shape[0], (scored - logprobs).abs().max().item() < 1e-4)
"""
    out = copied(tmp_path, script, model=(ROOT / "model.py").read_text())
    assert out.split() == ["3", "True"]


def test_the_maths_of_grpo_works_alone(tmp_path):
    script = """
import torch, maths
advantages = maths.group_advantages(torch.tensor([[1.0, 0, 0, 0]]))[0]
logprobs = torch.zeros(4, 2, requires_grad=True)
loss, stats = maths.grpo_loss(logprobs, torch.zeros(4, 2), None, advantages, torch.ones(4, 2))
loss.backward()
print(torch.allclose(logprobs.grad, -advantages[:, None].expand(4, 2)))
"""
    maths = f"import torch\n{block('grpo.py', 'the maths')}"
    assert copied(tmp_path, script, maths=maths) == "True\n"


def test_the_blend_works_alone(tmp_path):
    script = """
import blend
mixed = blend.Blend([("a", list("aaaa"), 1.0), ("b", list("bb"), 1.0)], seed=0)
print("".join(mixed[i] for i in range(len(mixed))))
"""
    text = f"import numpy as np\nfrom functools import lru_cache\n{block('data.py', 'the blend')}"
    out = copied(tmp_path, script, blend=text).strip()
    assert sorted(out[:3]) == sorted(out[3:]) == ["a", "a", "b"]
