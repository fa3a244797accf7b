"""The embedded world: cubes, spheres and cylinders on a checkered ground, ray-cast with exact geometry.

make_scene(seed) gives a Scene: picture, depth, camera, and the 3D box of every object (see scenes.py, which also reads
real pictures into the same record).

Coordinates: metres in the camera frame, x right, y down, z forward. Depth is z, not the length of the ray.
Pixels: column i covers [i, i + 1) and its ray goes through i + 0.5; a box x1, y1, x2, y2 ends before x2 and y2.
"""

import numpy as np

from formats.scenes import Scene, corners, project, unproject

COLORS = {
    "orange": (250, 125, 15),
    "yellow": (250, 225, 40),
    "purple": (150, 50, 180),
    "white": (250, 250, 250),
    "cyan": (50, 215, 215),
    "pink": (250, 150, 190),
}  # unlike each other, ground, sky, and the colours of marks
SHAPES = {
    "cube": ((0, 1, 2), ()),
    "sphere": ((), (0, 1, 2)),
    "cylinder": ((1,), (0, 2)),
}  # flat axes, round axes
SIZE = (0.5, 1.4)  # metres, full length of a side or a diameter
CAMERA_HEIGHT = (1.0, 2.2)  # metres above the ground
DISTANCE = (1.5, 6.5)  # metres along the ground from camera to object
FLOATING = 0.25  # share of objects in the air: gives "above" and "below" a meaning
LIFT = (0.2, 1.0)  # metres between the ground and a floating object
FAR = 12.0  # metres; beyond is sky without depth, as for a depth camera
MIN_PIXELS = 80 / 96**2  # of the image, and
MIN_VISIBLE = 0.5  # of the object itself: an object that shows less is dropped
LIGHT = np.array(
    [-0.52, -0.82, -0.24]
)  # unit vector to the lamp before pitching: left, above, on the camera's side


def random_object(rng, height, level, half_width, colors):
    """A cube (any box, with a yaw), sphere or upright cylinder. level (3, 3): level frame -> camera frame."""
    shape = str(rng.choice(list(SHAPES)))
    size = rng.uniform(*SIZE, 3)
    size[list(SHAPES[shape][1])] = size[0]  # one diameter for all round axes
    lift = rng.uniform(*LIFT) if rng.random() < FLOATING else 0.0
    z = np.exp(rng.uniform(*np.log(DISTANCE)))  # as many from 1.5 to 3 m as from 3 to 6 m
    x = rng.uniform(-1, 1) * half_width * z
    yaw = rng.uniform(0, np.pi / 2) if shape == "cube" else 0.0
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    return {
        "label": shape,
        "color": str(rng.choice(colors)),
        "size": size,
        "center": level @ (x, height - size[1] / 2 - lift, z),
        "rotation": level @ turn,
    }


def fits(obj, others, intrinsics, size):
    """In front of the camera, in the picture but for a narrow rim, clear of the others' bounding spheres."""
    points, radius = corners(obj), np.linalg.norm(obj["size"]) / 2
    if obj["center"][2] < 1.0 or points[:, 2].min() < 0.5:
        return False
    uv = np.stack(project(points, intrinsics))
    clear = (
        np.linalg.norm(obj["center"] - o["center"]) > radius + np.linalg.norm(o["size"]) / 2
        for o in others
    )
    return uv.min() > -0.05 * size and uv.max() < 1.05 * size and all(clear)


def cast(obj, rays):
    """Rays (..., 3) from the camera -> multiple of the ray at the first hit (...), inf = miss; unit normals (..., 3).
    A shape is where slabs and a round part meet: a ray is inside from its last entry to its first exit."""
    flat_axes, round_axes = SHAPES[obj["label"]]
    origin, rays, half = (
        -obj["center"] @ obj["rotation"],
        rays @ obj["rotation"],
        obj["size"] / 2,
    )  # in the box's axes
    enter, leave, normals = (
        np.full(rays.shape[:-1], -np.inf),
        np.full(rays.shape[:-1], np.inf),
        np.zeros(rays.shape),
    )
    if round_axes:  # |o + t d| = radius in the round axes
        o, d, radius = origin[list(round_axes)], rays[..., round_axes], half[round_axes[0]]
        a, b, c = (d * d).sum(-1), d @ o, o @ o - radius**2
        root = np.sqrt(
            np.maximum(b * b - a * c, 0)
        )  # 0 where the ray misses: empty interval, enter = leave
        enter, leave = (-b - root) / a, (-b + root) / a
        normals[..., round_axes] = (o + d * enter[..., None]) / radius
    for k in flat_axes:
        middle, reach = -origin[k] / rays[..., k], np.abs(half[k] / rays[..., k])
        last = middle - reach > enter
        normals[last] = 0
        normals[last, k] = -np.sign(rays[last, k])
        enter, leave = np.maximum(enter, middle - reach), np.minimum(leave, middle + reach)
    return np.where((enter < leave) & (enter > 0), enter, np.inf), normals @ obj["rotation"].T


def draw(obj, rays, intrinsics, light, color):
    """One object alone -> (its window of the image, depth (h, w) with inf = not there, shaded colour (h, w, 3))."""
    u, v = project(corners(obj), intrinsics)
    window = tuple(
        slice(max(int(p.min()), 0), int(p.max()) + 1) for p in (v, u)
    )  # it shows nowhere else
    depth, normals = cast(obj, rays[window])  # rays have z = 1: the multiple is the depth
    paint = np.where(dark_paint(obj, rays[window], depth), 0.3, 1.0)
    return (
        window,
        depth,
        (paint * (0.7 + 0.3 * normals @ light))[..., None] * color,
    )  # unlit faces differ


def dark_paint(obj, rays, depth):
    """Where an object is painted dark: a cube's edges, a cylinder's belt, nowhere on a sphere. Shape at a glance."""
    hit = np.where(np.isfinite(depth), depth, 0)[..., None] * rays
    place = np.sort(
        np.abs((hit - obj["center"]) @ obj["rotation"]) / (obj["size"] / 2)
    )  # 1 = on a face
    belt = np.abs((hit - obj["center"]) @ obj["rotation"][:, 1]) < 0.2 * obj["size"][1]
    return {"cube": place[..., 1] > 0.7, "cylinder": belt, "sphere": np.zeros(depth.shape, bool)}[
        obj["label"]
    ]


def background(rng, rays, height, level):
    """Ground with tiles of 1 m, and sky: depth (H, W) with inf = sky, colour (H, W, 3)."""
    directions = rays @ level  # (H, W, 3) in the level frame
    depth = height / np.maximum(directions[..., 1], height / (2 * FAR))
    dark = np.floor(directions * depth[..., None])[..., ::2].sum(-1) % 2
    tile, sky = (
        rng.uniform(70, 115) * np.array([1, 0.92, 0.8]),
        rng.uniform(120, 150) * np.array([0.93, 1, 1.07]),
    )
    depth[depth > FAR] = np.inf
    return depth, np.where(np.isinf(depth)[..., None], sky, tile * (1 - 0.2 * dark[..., None]))


def composite(layers, depth, image):
    """z-buffer: the nearest surface wins, whatever the order. -> depth, image, instances (H, W), -1 = no object."""
    depth, image, instances = depth.copy(), image.copy(), np.full(depth.shape, -1, np.int8)
    for i, (window, z, color) in enumerate(layers):
        nearer = z < depth[window]
        depth[window][nearer], image[window][nearer], instances[window][nearer] = (
            z[nearer],
            color[nearer],
            i,
        )
    return depth, image, instances


def make_scene(seed, size=96, objects=(3, 6), fov=(50, 80), pitch=(8, 28), colors=COLORS):
    """Synthetic Scene, size x size pixels, with objects[0] to objects[1] objects; the same seed gives the same scene.
    fov (horizontal) and pitch (camera looking down) are ranges in degrees; colors is {name: (r, g, b)}, each given to
    one object at most, so that a color names an object."""
    rng = np.random.default_rng(seed)
    for _ in range(100):
        half_width = np.tan(np.radians(rng.uniform(*fov)) / 2)
        intrinsics = (size / 2 / half_width, size / 2 / half_width, size / 2, size / 2)
        height, angle = rng.uniform(*CAMERA_HEIGHT), np.radians(rng.uniform(*pitch))
        level = np.array(
            [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
        )
        placed, wanted, tries = [], min(rng.integers(objects[0], objects[1] + 1), len(colors)), 0
        while len(placed) < wanted and tries < 100:
            free = [color for color in colors if color not in {o["color"] for o in placed}]
            obj, tries = random_object(rng, height, level, half_width, free), tries + 1
            placed += [obj] if fits(obj, placed, intrinsics, size) else []

        rays = unproject(np.ones((size, size)), intrinsics)
        ground = background(rng, rays, height, level)
        layers = [
            draw(obj, rays, intrinsics, level @ LIGHT, np.array(colors[obj["color"]]))
            for obj in placed
        ]
        instances = composite(layers, *ground)[2]
        keep = [
            i
            for i, layer in enumerate(layers)
            if (instances == i).sum()
            >= max(MIN_PIXELS * size**2, MIN_VISIBLE * np.isfinite(layer[1]).sum())
        ]
        if len(keep) >= objects[0]:
            break
    else:
        raise ValueError(
            f"seed {seed}: no room for {objects[0]} visible objects with fov {fov} and pitch {pitch}: "
            "ask for fewer objects or a wider view"
        )
    # Without the dropped objects the others show at least as much, so nothing more is to be dropped.
    depth, image, instances = composite([layers[i] for i in keep], *ground)
    depth = np.where(np.isfinite(depth), depth, np.nan).astype(np.float32)
    kept, points = [placed[i] for i in keep], unproject(depth, intrinsics)
    for i, obj in enumerate(kept):
        y, x = np.nonzero(instances == i)
        obj["box"] = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
        obj["surface"] = points[y, x].mean(0)
    image = np.clip(image + 4 * rng.standard_normal(image.shape), 0, 255).astype(
        np.uint8
    )  # sensor noise
    return Scene(f"synthetic_{seed}", image, depth, intrinsics, kept, f"seed {seed}", instances)
