"""What several test files share: where the project and real data lie, a process group, groups.

Real pictures, pairs of views and benchmark rows are no part of the project. They are looked for in a
folder `shared/realdata` beside the repository, or in $REALDATA; tests of them skip without, and say so.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REALDATA = Path(os.environ.get("REALDATA", ROOT.parent / "shared" / "realdata"))


def needs_real(name):
    """Skips a test where this file or folder of the real data is not there."""
    return pytest.mark.skipif(
        not (REALDATA / name).exists(), reason=f"no real data: {name} is not in shared/realdata"
    )


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """A process group of one, on one thread; for all tests of a file that imports this."""
    import torch

    from engine import distributed

    distributed.setup(0)
    torch.set_num_threads(1)
    yield
    torch.distributed.destroy_process_group()


def make_learner(
    model, tokenizer, processor, rules, generator=None, reference=None, optimizer=None
):
    """grpo.Learner of a model; rules: stop ids and banned ids."""
    import grpo

    return grpo.Learner(
        model,
        reference,
        optimizer,
        tokenizer,
        processor,
        next(model.parameters()).device,
        *rules,
        generator,
    )


def encoded(rows, tokenizer, processor):
    """[(row, encoded sample)] as data.load_ahead yields them for a rollout."""
    import data

    return [(row, data.encode(row, tokenizer, processor, train=False)) for row in rows]


def with_advantages(groups):
    """Groups with the advantages of their rewards, as the loop of grpo.py gives them."""
    import grpo

    return [
        {**group, "advantages": grpo.group_advantages(group["rewards"][None])[0]}
        for group in groups
    ]
