"""The embedded world as sources of a blend (data.py), [(name, rows, weight), ...]; its held-out
questions.

A scene is a number, the seed that it is drawn from. The ranges of scenes never meet: cold starts
take a million per --seed from 0 on, held-out questions begin at HELD_OUT, reinforcement learning at
FRESH.
"""

from functools import lru_cache

import numpy as np

from formats.instances import path_of
from world.questions import (
    GENERAL_FAMILIES,
    REGION_FAMILIES,
    ask_questions,
    box_area,
    grounding,
    reword,
)
from world.raycast import make_scene
from world.transfer import VARIANTS

SCENES_OF_SEED = 10**6
HELD_OUT = 9 * 10**8
FRESH = 10**9
MOST_QUESTIONS = 10**6  # held out; each may take 100 scenes, then come the fresh ones
MOST_FRESH = 10**7  # questions; a blend of so many takes 5 GB
OVERLOOKED = 0.6  # share of the annotated scenes in which the smallest object was overlooked

# Short questions without reasoning, in place of a stock VLM's pretraining, easy before hard: what a
# region token holds, and to look up a word in a list; what the picture shows, and in its marks;
# where things are, and how to compute with that. (share of the steps that are done, {task: rows per
# scene})
PERCEPTION_STAGES = [
    (0.2, {"region_qa": 3, "lookup": 2}),
    (0.5, {"region_qa": 1, "listing": 3, "mark_qa": 3, "lookup": 1, "measure": 2}),
    (
        1.0,
        {
            "region_qa": 1,
            "listing": 3,
            "mark_qa": 4,
            "center": 5,
            "ground2d": 1,
            "derive": 4,
            "lookup": 1,
            "measure": 6,
        },
    ),
]
# The parts of the cold start and of reinforcement learning with reasoning: name, path, families,
# rows per scene with a trace (cold start), share of the fresh questions (reinforcement learning).
REASONING = [
    ("lor_region", "lor", REGION_FAMILIES, 6, 3),
    ("lor_general", "lor", GENERAL_FAMILIES, 5, 2),
    ("dtr_region", "dtr", REGION_FAMILIES, 8, 3),
    ("dtr_general", "dtr", GENERAL_FAMILIES, 2, 2),
]
# The parts of the cold start without reasoning: {task: rows per scene}.
GROUNDING_PARTS = {
    "center": 2,
    "box3d": 1,
    "ground2d": 1,
    "region_qa": 2,
    "mark_qa": 3,
    "listing": 5,
    "vqa": 1,
    "derive": 2,
    "lookup": 1,
    "measure": 3,
}


@lru_cache(maxsize=4096)
def cached_scene(seed, size, overlooked=False):
    """The scene of a seed; overlooked: as annotators leave it, who miss small objects.

    What they miss, the smallest object of the picture, is not in scene.objects. It stays in the
    picture and in the depth.
    """
    scene = make_scene(seed, size)
    if overlooked and np.random.default_rng([seed, 5]).random() < OVERLOOKED:
        smallest = int(np.argmin([box_area(o) for o in scene.objects]))
        del scene.objects[smallest]
    return scene


class WorldRows:
    """The embedded world as a list of instances of one kind: "lor", "dtr" or "grounding".

    Item i is question k = i // scenes (of rows_per_scene) about scene s = i % scenes, of the task
    tasks[(s + k) % len(tasks)]. annotated: from the imperfect annotation, with centres as a depth
    sensor sees them and with objects overlooked.
    """

    def __init__(self, kind, tasks, first_scene, scenes, rows_per_scene, size, annotated=False):
        self.kind = kind
        self.tasks = list(tasks)
        self.first_scene = first_scene
        self.scenes = scenes
        self.rows_per_scene = rows_per_scene
        self.size = size
        self.annotated = annotated

    def __len__(self):
        return self.scenes * self.rows_per_scene

    def __getitem__(self, index):
        k, s = divmod(index % len(self), self.scenes)
        # Not every scene allows every question: then the next task, and after all tasks the next
        # scene.
        for attempt in range(self.scenes * len(self.tasks)):
            seed = self.first_scene + (s + attempt // len(self.tasks)) % self.scenes
            scene = cached_scene(seed, self.size, self.annotated)
            rows = self.ask(scene, k, self.tasks[(s + k + attempt) % len(self.tasks)])
            if rows:
                return rows[(s + k) % len(rows)]
        raise ValueError(f"no scene allows a question of {self.tasks}")

    def ask(self, scene, k, task):
        if self.kind == "grounding":
            return grounding(scene, k, self.annotated, [task])
        rows = ask_questions(scene, k, self.annotated, [task])
        return [row for row in rows if path_of(row) == self.kind]


def perception_stages(scenes, first_scene, size):
    """The blends of PERCEPTION_STAGES, from the imperfect annotation: [(share done, sources),
    ...]."""
    stages = []
    for share_done, tasks in PERCEPTION_STAGES:
        sources = []
        for task, count in tasks.items():
            rows = WorldRows("grounding", [task], first_scene, scenes, count, size, annotated=True)
            sources.append((task, rows, 1.0))
        stages.append((share_done, sources))
    return stages


def cold_start_blend(traces, scenes, first_scene, size):
    """The cold-start mixture, from the imperfect annotation: a list of sources.

    Scenes with reasoning traces are few (`traces`); what needs no reasoning comes from all
    `scenes`. A source's weight keeps an epoch as long as the traces last.
    """
    blend = []
    for name, path, tasks, count, _ in REASONING:
        rows = WorldRows(path, tasks, first_scene, traces, count, size, annotated=True)
        blend.append((name, rows, 1.0))
    for task, count in GROUNDING_PARTS.items():
        rows = WorldRows("grounding", [task], first_scene, scenes, count, size, annotated=True)
        blend.append((task, rows, traces / scenes))
    return blend


def rl_blend(count, first_scene, size, path="both"):
    """At least `count` fresh questions with exact answers, none twice, for one path or both."""
    apart = max(10**6, 4 * count)  # no two sources ask about the same scene
    blend = []
    for i, (name, of_path, tasks, _, share) in enumerate(REASONING):
        if path in (of_path, "both"):
            rows = WorldRows(of_path, tasks, first_scene + apart * i, count * share, 1, size)
            blend.append((name, rows, 1.0))
    return blend


def held_out(count, size, first_scene=HELD_OUT, world=""):
    """`count` questions that no training uses, as many of each family, each on both paths.

    world: a name of VARIANTS (transfer.py), for another world than the trained one.
    """
    tasks = [*REGION_FAMILIES, *GENERAL_FAMILIES]
    per_task = -(-count // len(tasks))
    rows_of_task = {task: [] for task in tasks}
    for seed in range(first_scene, first_scene + 100 * count):
        open_tasks = [task for task in tasks if len(rows_of_task[task]) < 2 * per_task]
        if not open_tasks:
            break
        scene = make_scene(seed, size, **VARIANTS[world]) if world else cached_scene(seed, size)
        asked = ask_questions(scene, seed, tasks=open_tasks)
        if not asked:
            continue
        task = asked[2 * (seed % (len(asked) // 2))][
            "task"
        ]  # one question per scene, on both paths
        rows_of_task[task] += [row for row in asked if row["task"] == task]
    rows = [row for task in tasks for row in rows_of_task[task]]
    if world == "wording":
        for row in rows:
            turn = row["conversations"][0]
            turn["value"] = reword(turn["value"])
    return rows
