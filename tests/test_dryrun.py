"""A step at the real widths on fake CUDA: no error, and the memory plan agrees with what was counted.

python -m pytest -q tests/test_dryrun.py

Each dry run is a process of its own, since it changes torch for good, and takes about 12 seconds.
"""

import json
import subprocess
import sys

import pytest
from common import ROOT

from tools import fake_cuda

pytestmark = pytest.mark.skipif(
    not fake_cuda.is_supported(),
    reason=f"the dry run reaches into the insides of torch {fake_cuda.TORCH}; this is another",
)
RUNS = {
    "GRPO, 8 ranks": ["--world", "8"],
    "GRPO, 1 rank": ["--world", "1"],
    "LoRA, 8 ranks": ["--world", "8", "--lora", "16"],
    "LoRA, 1 rank": ["--world", "1", "--lora", "16"],
    "SFT, 8 ranks": ["--world", "8", "--stage", "sft"],
    "SFT, 1 rank": ["--world", "1", "--stage", "sft"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_runs_and_takes_what_was_planned(name, tmp_path):
    file = tmp_path / "numbers.json"
    command = ["-m", "tools.dryrun", "--size", "8B", "--layers", "2", "--json", file]
    done = subprocess.run(
        [sys.executable, *map(str, command), *RUNS[name]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads(file.read_text())
    planned = {phase: line for phase, line in numbers["phases"].items() if line["plan"]}
    assert set(planned) == ({"update"} if "SFT" in name else {"rollout", "update"})
    assert numbers["peak_gb"] == max(line["peak_gb"] for line in numbers["phases"].values())
    for phase, line in planned.items():
        assert 0.95 <= sum(line["plan"].values()) / line["peak_gb"] <= 1.25, phase
        for term, gb in line["plan"].items():
            assert 0.85 <= gb / line["tracked"].get(term, 0.01) <= 1.15, (phase, term)
        assert set(line["tracked"]) == set(line["plan"]), phase


FAULTS = {
    "advantages that stay on the CPU": (
        """
collate_groups = grpo.collate_groups
grpo.collate_groups = lambda *args: (*(parts := collate_groups(*args))[:-1], parts[-1].cpu())
""",
        "to be on the same device",
    ),
    "adapters that are not cast": (
        """
def forward(self, x):
    return torch.nn.functional.linear(x, self.weight) + x @ self.lora_a.T @ self.lora_b.T
lora.LoRALinear.forward = forward
""",
        "of torch.bfloat16 and torch.float32",
    ),
    "points that are not cast": (
        """
def forward(self, points):
    hidden = torch.nn.functional.gelu(self.norm(self.fc1(points.nan_to_num())))
    return self.fc2(hidden) * points.isfinite().all(-1, keepdim=True)
model.PointEmbedding.forward = forward
""",
        "of torch.bfloat16 and torch.float32",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused_as_on_a_real_card(name):
    fault, words = FAULTS[name]
    script = f"""
import torch
import grpo
import model
from engine import lora
from tools import dryrun
{fault}
dryrun.dry_run(dryrun.Settings(size="8B", layers=1, world=1, lora=16, prompts=2, group_size=2))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and words in done.stderr, done.stderr[-2000:]
