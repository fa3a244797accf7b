"""Annotated scenes and pairs of views -> instance files for sft.py and grpo.py.

    python -m tools.build --scenes scenes.jsonl --out cot.json        # with traces, for sft.py
    python -m tools.build --scenes scenes.jsonl --out rl.json --rl    # only answers, for grpo.py
    python -m tools.build --pairs pairs.jsonl --out views.json        # two views of one place

The paper has its chains of thought (traces) written by a paid expert model. Here they follow from
the annotation (world/questions.py), for both paths: LOR (language-only reasoning) and DTR
(detect-then-reason: 3D coordinates first). Each is checked before it is written; one that fails is
left out and counted, with the reason (`fault`).

What a line of scenes.jsonl holds is told in formats/scenes.py. A line of pairs.jsonl is

    {"id", "K", "source": {"image", "depth", "cam_to_world"}, "target": {"image", ...}}

two RGB-D views of one place; cam_to_world is the camera's pose, 4 x 4, in metres. Pairs become
questions about the camera's motion and about points, marked in one view and seen in both.
"""

import filecmp
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

from engine.output import check_outputs, is_same_file, whole_file
from engine.settings import parse, run_main, setting
from formats.errors import BadRow
from formats.instances import POINT_REGION, centers_of, images_of, path_of
from formats.scenes import check, numbers, project, read_lines, read_scene, unproject
from rewards import accuracy_reward, detection_reward, extract_answer, format_reward
from world.questions import (
    MARKS,
    NEEDS,
    REGION_FAMILIES,
    TEXT_ONLY,
    ask_questions,
    box_line,
    finish,
    grounding,
    rounded,
    tenths,
)


@dataclass
class Settings:
    out: str = setting(None, "instance file: a JSON list, or JSON lines if it ends in .jsonl")
    scenes: str = setting("", "annotated pictures, scenes.jsonl")
    pairs: str = setting("", "two views each, pairs.jsonl")
    rounds: int = setting(
        3, "most questions of each family about a picture", at_least=1, at_most=1000
    )
    seed: int = setting(0, "of the questions", at_least=0)
    sensor: bool = setting(
        False, "centres as a depth sensor sees them, on the visible surface", only_with=("scenes",)
    )
    rl: bool = setting(False, "only rows with an answer, for grpo.py: no captions, no bare boxes")
    pictures: str = setting(
        "", "copy pictures and depth there, so that the file can travel with them"
    )


def build(args):
    """Write the checked instances to --out, and print how many there are and why others are not.

    BadRow where there would be none.
    """
    if not (args.scenes or args.pairs):
        raise BadRow("build: needs --scenes scenes.jsonl or --pairs pairs.jsonl")
    check_outputs({"--out": args.out}, [args.scenes, args.pairs])
    written = Counter()  # {(task, column of the table): instances}
    dropped = Counter()  # {(task, column of the table, reason): instances}
    as_list = not args.out.endswith(".jsonl")
    with whole_file(args.out, "--out") as file:
        for row in rows_of(args):
            column = column_of(row)
            reason = None if column == "no trace" else fault(row)
            if reason:
                dropped[row["task"], column, reason] += 1
                continue
            if as_list:
                file.write(",\n" if written else "[\n")
                file.write(json.dumps(row))
            else:
                file.write(json.dumps(row) + "\n")
            written[row["task"], column] += 1
        if not written:
            raise BadRow(
                f"{args.scenes or args.pairs}: "
                "no question could be made: nothing annotated, or all dropped"
            )
        if as_list:
            file.write("\n]\n")
    print_counts(written, dropped)
    print(f"{written.total():,} instances -> {args.out}")


COLUMNS = ["lor", "dtr", "no trace"]  # a caption or a bare box has no trace


def column_of(row):
    """The column of the printed table that an instance counts in."""
    target = row["conversations"][1]["value"]
    return "no trace" if extract_answer(target) is None else path_of(row)


def print_counts(written, dropped):
    """The table of instances, a line per task and one for all; then what was dropped, and why."""
    print(f"{'':16}" + "".join(f"{column:>10}" for column in COLUMNS))
    totals = Counter()
    for (_, column), count in written.items():
        totals["all", column] += count
    tasks = dict.fromkeys(task for task, _ in written)  # each once, in order
    for task in [*tasks, "all"]:
        counts = totals if task == "all" else written
        print(f"{task:16}" + "".join(f"{counts[task, column]:10,}" for column in COLUMNS))
    for (task, column, reason), count in dropped.items():
        print(f"dropped {count:,} of {task} ({column}): {reason}")


def fault(row):
    """Why the trace of a row must not be trained on; None where it is sound.

    It must be the whole grammar of its path. Its own answer must be the right letter or score above
    0.9: traces write lengths in tenths of a metre, too coarse for some below 1 m. Its centres must
    earn the full detection reward: rounding to tenths moves a centre by 0.087 m at most, and 0.1 m
    is paid in full.
    """
    question, target = (turn["value"] for turn in row["conversations"])
    images = len(images_of(row))
    accuracy = accuracy_reward(target, row["answer"])
    if format_reward(target, path_of(row), images) < 1:
        return "not the grammar of its path"
    if accuracy == 0:
        return "its answer is wrong"
    if accuracy <= 0.9:
        return "its own answer scores 0.9 or less: tenths of a metre are too coarse"
    centers = centers_of(row)
    if centers and detection_reward(target, centers, images, question) < 1:
        return "its centres are off"
    return None


# ----------------------------------------------------------------------------------------------
# rows


def rows_of(args):
    """All instances of --scenes and --pairs, one picture or pair after the other.

    Memory does not grow with their number.
    """
    for path, make_rows in ((args.scenes, scene_rows), (args.pairs, pair_rows)):
        if path:
            for number, (line, where) in enumerate(tqdm(read_lines(path), desc=path, unit="")):
                yield from numbered(make_rows(line, where, number, args))


def numbered(rows):
    """The rows about one picture with a number in their "id", without repeats.

    Another round may ask the same question again.
    """
    asked = set()
    for row in rows:
        marks = [value for field, value in row.items() if field.endswith(("bbox", "point"))]
        key = json.dumps([row["conversations"], marks])
        if key not in asked:
            yield {**row, "id": f"{row['id']}/{len(asked)}"}
            asked.add(key)


def conversation(question, target):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": target}]


# ----------------------------------------------------------------------------------------------
# annotated scenes


def scene_rows(line, where, number, args):
    """Questions about one annotated picture: --rounds of each family that needs a picture.

    line: of scenes.jsonl; where: its place, for error messages; number: of the picture.
    """
    folder = Path(args.scenes).parent
    scene = read_scene(line, where, folder)
    files = {"image": link(line["image"], folder, f"{number:06d}", args)}
    if line.get("depth"):
        files["depth"] = link(line["depth"], folder, f"{number:06d}_depth", args)
        if "depth_scale" in line:
            files["depth_scale"] = line["depth_scale"]
    for k in range(args.rounds):
        seed = 1000 * args.seed + k
        rows = ask_questions(scene, seed, args.sensor)
        if not args.rl:
            untraced = grounding(scene, seed, args.sensor)
            rows += [row for row in untraced if row["task"] not in TEXT_ONLY]
        for row in rows:
            del row["source"]
            del row["depth"]  # an array; a file may take its place
            yield {**row, **files}


# ----------------------------------------------------------------------------------------------
# pairs of views. View 0 is "source", view 1 is "target"; the frame of a view is its camera's:
# metres, x right, y down, z forward.

SIDES = ("source", "target")
DEPTH_SCALE = 0.001  # metres per unit, where neither a line nor a row says otherwise


def pair_rows(line, where, number, args):
    """Questions about one pair of views: the camera's motion, and points, --rounds of each family.

    line: of pairs.jsonl; where: its place, for error messages; number: of the pair.
    """
    folder = Path(args.pairs).parent
    views, poses = read_pair(line, where, folder)
    files = {}
    for field, end in (("image", ""), ("depth", "_depth")):
        files[field] = []
        for side in SIDES:
            copy = f"pair{number:06d}_{side}{end}"
            files[field].append(link(line[side][field], folder, copy, args))
    row = {
        "id": views[0].id,
        **files,
        "intrinsics": [list(view.intrinsics) for view in views],
        "image_hw": list(views[0].image.shape[:2]),
    }
    scales = [{**line, **line[side]}.get("depth_scale", DEPTH_SCALE) for side in SIDES]
    check(scales[0] == scales[1], where, "depth_scale", "must be the same for both views")
    if scales[0] != DEPTH_SCALE:
        row["depth_scale"] = scales[0]

    yield from motion_rows(poses[0, 1], row)
    for k in range(args.rounds):
        rng = np.random.default_rng([crc32(views[0].id.encode()), args.seed, k])
        yield from point_rows(rng, views, poses, row)


def read_pair(line, where, folder):
    """A line of pairs.jsonl -> its two views, Scenes without objects, and poses (2, 2, 4, 4).

    poses[k, i] takes points from the frame of view i to that of view k.
    """
    shared = {key: line[key] for key in ("id", "K", "intrinsics", "depth_scale") if key in line}
    views = []
    cameras = []  # their poses in the common frame, (4, 4) each
    for side in SIDES:
        given = line.get(side)
        check(
            isinstance(given, dict) and given.get("depth"),
            where,
            side,
            "must be {image, depth, cam_to_world}",
        )
        views.append(read_scene({**shared, **given, "objects": []}, f"{where}: {side}", folder))
        pose = numbers(given, "cam_to_world", (4, 4), where, f"{side}.")
        check(
            is_rigid(pose),
            where,
            f"{side}.cam_to_world",
            "must be a rotation and a position in metres, last row 0, 0, 0, 1",
        )
        cameras.append(pose)
    poses = [[np.linalg.inv(to) @ camera for camera in cameras] for to in cameras]
    return views, np.array(poses)


def is_rigid(pose):
    """Is this (4, 4) matrix a rotation, up to rounding, and a translation?"""
    rotation = pose[:3, :3]
    orthogonal = np.allclose(rotation @ rotation.T, np.eye(3), atol=0.01)
    return orthogonal and (pose[3] == (0, 0, 0, 1)).all()


def aligned(frame, lines):
    """The <detect> block of several images; frame: the view in whose frame the centres are."""
    header = f"After aligning to the reference frame {frame}, find {len(lines)} relevant objects:"
    return "<detect>" + "\n".join([header, *lines]) + "</detect>\n"


# ----------------------------------------------------------------------------------------------
# pairs of views: how the camera moved

# Smaller motion is neither asked for nor answered.
LEAST_METERS = 0.05
LEAST_DEGREES = 2
# The values of camera_motion: names for above and below 0, least size, decimals that are written.
MOTION_AXES = [
    ("move_right", "move_left", LEAST_METERS, 2),
    ("move_up", "move_down", LEAST_METERS, 2),
    ("move_forward", "move_back", LEAST_METERS, 2),
    ("rotate_right", "rotate_left", LEAST_DEGREES, 0),
    ("rotate_up", "rotate_down", LEAST_DEGREES, 0),
]


def camera_motion(second):
    """Pose (4, 4) of the second camera in the frame of the first -> how it moved, a list of five.

    Right, up and forward in metres; then right and up in degrees: where the second camera looks.
    Its roll is no part of the answer.
    """
    x, y, z = second[:3, 3]
    look_x, look_y, look_z = second[:3, 2]
    yaw = np.degrees(np.arctan2(look_x, look_z))
    pitch = np.degrees(np.arcsin(np.clip(-look_y, -1, 1)))
    return [x, -y, z, yaw, pitch]


def motion_steps(second):
    """The motion of the camera as it is answered: ["move_left:0.30", "rotate_up:5"]."""
    steps = []
    for value, (plus, minus, least, decimals) in zip(camera_motion(second), MOTION_AXES):
        if abs(value) >= least:
            direction = plus if value > 0 else minus
            steps.append(f"{direction}:{abs(value):.{decimals}f}")
    return steps


def motion_rows(second, row):
    """One question on both paths: how did the camera move? None where it hardly did.

    second: pose (4, 4) of the second camera in the frame of the first. The trace of LOR names the
    directions, that of DTR the pose.
    """
    steps = motion_steps(second)
    if not steps:
        return
    question = (
        "How did the camera move from the first image to the second? Name motion of at least "
        f"{LEAST_METERS} meters or {LEAST_DEGREES} degrees, like this: move_left:0.30,rotate_up:5"
    )
    answer = ",".join(steps)
    directions = [step.partition(":")[0] for step in steps]
    words = ", ".join(directions).replace("move_", "moves ").replace("rotate_", "turns ")
    position = coordinates(second[:3, 3])
    look = coordinates(second[:3, 2])
    pose = (
        f"In the frame of the first camera the second one is at {position} and looks along {look}."
    )
    lor = finish(f"The camera {words}.", answer)
    dtr = aligned(0, []) + finish(pose, answer)

    row = {**row, "task": "motion"}
    yield {
        **row,
        "id": f"{row['id']}/motion/lor",
        "conversations": conversation(question, lor),
        "answer": answer,
    }
    yield {
        **row,
        "id": f"{row['id']}/motion/dtr",
        "conversations": conversation(question, dtr),
        "answer": answer,
        "bbox": {"0": [], "1": []},
        "mask_idx": {},
        "3d_pos": {},  # no object: no detection reward
        "main_frame_idx": 0,
    }


def coordinates(vector):
    return ",".join(f"{axis}:{value:.2f}" for axis, value in zip("xyz", vector))


# ----------------------------------------------------------------------------------------------
# pairs of views: points that both views see

RIM = 0.06  # of the image: points keep this far from its border
FLAT = 0.03  # most relative change of depth in the 5 x 5 pixels of a point: none on an edge
NEAREST = 0.1  # metres before the other camera
AGREE = (
    0.05  # most relative difference of a point's depth in the two views: more is hidden or moved
)
SPOTS = 6  # points to choose from, per pair and round


def spots(rng, views, poses):
    """Up to SPOTS points of one view that the other sees, too.

    -> [{view: that it was found in, pixel: (x, y) there, frames (2, 3): metres in the frame of each
    view, label and color: as of an object}, ...]
    """
    found = []
    for _ in range(50 * SPOTS):
        i = int(rng.integers(2))
        depth = views[i].depth  # (H, W)
        height, width = depth.shape
        x = int(rng.uniform(RIM, 1 - RIM) * width)
        y = int(rng.uniform(RIM, 1 - RIM) * height)
        if not is_flat(depth[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]):
            continue
        here = unproject(depth[y : y + 1, x : x + 1], views[i].intrinsics, x, y)[0, 0]  # (3,)
        to_other = poses[1 - i, i]
        there = to_other[:3, :3] @ here + to_other[:3, 3]  # (3,)
        if not sees(views[1 - i], there):
            continue
        found.append(
            {
                "view": i,
                "pixel": (x + 0.5, y + 0.5),
                "label": "spot",
                "color": None,
                "frames": np.array([here, there] if i == 0 else [there, here]),
            }
        )
        if len(found) == SPOTS:
            break
    return found


def is_flat(patch):
    """Is a patch (h, w) of depth measured everywhere, and on one surface?"""
    return np.isfinite(patch).all() and np.ptp(patch) <= FLAT * patch.mean()


def sees(view, point):
    """Does a view see a point (3,) of its frame: in the picture, and not behind something?"""
    if point[2] < NEAREST:
        return False
    height, width = view.depth.shape
    u, v = project(point, view.intrinsics)
    if not RIM * width < u < (1 - RIM) * width:
        return False
    if not RIM * height < v < (1 - RIM) * height:
        return False
    gap = abs(view.depth[int(v), int(u)] - point[2])
    return gap <= AGREE * point[2]  # False where nothing is measured: NaN


def point_rows(rng, views, poses, row):
    """The region families about points, each on both paths, as far as the points allow."""
    sizes = [(view.image.shape[1], view.image.shape[0]) for view in views]  # (width, height)
    points = spots(rng, views, poses)
    for task in REGION_FAMILIES:
        asked = ask_about_points(rng, task, points)
        if asked is None:
            continue
        frame, ask, (derivation, solution) = asked
        marked = {of_points(mark): point for mark, point in zip(MARKS, ask.marked)}
        question = f"Seen from the {['first', 'second'][frame]} image: {of_points(ask.text)}"
        lor = finish(of_points(ask.words), rounded(ask.answer))
        lines = [
            box_line(tenths(point["center"]), f"point ({mark})") for mark, point in marked.items()
        ]
        dtr = aligned(frame, lines) + finish(of_points(derivation), of_points(solution))

        shared = {
            **row,
            **drawn(marked, sizes),
            "task": f"{task}_views",
            "answer": ask.answer,
            "point_img_idx": [[point["view"] for point in marked.values()]],
        }
        yield {
            **shared,
            "id": f"{row['id']}/{task}/lor",
            "conversations": conversation(question, lor),
        }
        question, boxes, mask_idx = with_regions(question, marked, sizes)
        yield {
            **shared,
            "id": f"{row['id']}/{task}/dtr",
            "bbox": boxes,
            "mask_idx": mask_idx,
            "3d_pos": true_centers(marked),
            "main_frame_idx": frame,
            "conversations": conversation(question, dtr),
        }


def ask_about_points(rng, task, points):
    """One question of a region family -> frame, Ask, (derivation, answer); None where it has none.

    frame: the view from which the question is seen. It must be the reference frame of the row,
    which is image 0 where the question says "first image", else the image of the first mark
    (formats/instances.py). So a question seen from the second image needs its first mark there.
    """
    for frame in map(int, rng.permutation(2)):
        objects = [{**point, "center": point["frames"][frame]} for point in points]
        if len(objects) < NEEDS.get(task, 1):
            continue
        ask = REGION_FAMILIES[task](rng, objects)
        if not ask:
            continue
        solved = ask.solve([tenths(point["center"]) for point in ask.marked])
        if solved and (frame == 0 or ask.marked[0]["view"] == 1):
            return frame, ask, solved
    return None


def of_points(text):
    """What world/questions.py says of a box that holds an object, said of a point."""
    return text.replace(" holds a spot ", " is ").replace("bbox", "point")


def drawn(marked, sizes):
    """The marks as fields of a row: {"red_point": [[x, y]]}, in thousandths of their image."""
    fields = {}
    for mark, point in marked.items():
        size = sizes[point["view"]]
        position = [round(1000 * value / side) for value, side in zip(point["pixel"], size)]
        fields[mark.replace(" ", "_")] = [position]
    return fields


def with_regions(question, marked, sizes):
    """The question with a `<mask>` behind the first mention of each mark, and the masks' regions.

    -> question; boxes by image, {"0": [[x1, y1, x2, y2], ...], "1": [...]}, in pixels; and for each
    `<mask>` in text order its image and the index of its box there, {"0": [1, 0], ...}.
    """
    boxes = {"0": [], "1": []}
    mask_idx = {}
    for mark in sorted(marked, key=question.find):
        view = marked[mark]["view"]
        of_view = boxes[str(view)]
        mask_idx[str(len(mask_idx))] = [view, len(of_view)]
        of_view.append(region_around(marked[mark]["pixel"], sizes[view]))
        question = question.replace(mark, f"{mark} <mask>", 1)
    return question, boxes, mask_idx


def region_around(pixel, size):
    """The region of a marked point (x, y): a box in pixels, clamped to the image."""
    box = []
    for sign in (-1, 1):
        for center, side in zip(pixel, size):
            half = POINT_REGION / 1000 / 2 * side
            box.append(float(np.clip(center + sign * half, 0, side)))
    return box


def true_centers(marked):
    """The field "3d_pos": the centre of each mark in the frame of each view, in metres."""
    truth = {}
    for mark, point in marked.items():
        frames = {}
        for i, center in enumerate(point["frames"]):
            frames[str(i)] = {"center_cam": [round(float(value), 4) for value in center]}
        truth[mark.replace(" ", "_")] = {
            "current_frame": point["view"],
            "instance_name": "point",
            "all_frame_3d": frames,
        }
    return truth


# ----------------------------------------------------------------------------------------------
# files


def link(name, folder, copy, args):
    """A picture as the instances name it, relative to the folder of --out.

    With --pictures it is a copy there, named `copy` with the ending of `name`. BadRow where that,
    or --out, would replace another file.
    """
    original = os.path.join(folder, name)
    path = original
    if args.pictures:
        path = os.path.join(args.pictures, copy + os.path.splitext(name)[1])
        try:
            copy_picture(original, path)
        except OSError as error:
            raise BadRow(f"{original}: cannot be copied ({error.strerror})") from None
    if is_same_file(original, args.out) or is_same_file(path, args.out):
        raise BadRow(f"--out {args.out}: is one of the pictures; name another file")
    return os.path.relpath(path, os.path.dirname(os.path.abspath(args.out)))


def copy_picture(original, path):
    """Copy a picture to a path that holds no other; a picture is there whole or not at all."""
    if not os.path.exists(path):
        with open(original, "rb") as picture, whole_file(path, "--pictures", binary=True) as file:
            shutil.copyfileobj(picture, file)
    elif not filecmp.cmp(original, path, shallow=False):
        raise BadRow(f"--pictures {path}: is another picture already; name an empty folder")


def main():
    build(parse(Settings, __doc__))


if __name__ == "__main__":
    run_main(main)
