"""The embedded RGB-D world: cubes, spheres and cylinders on a checkered ground, ray-cast exactly.

    scene = make_scene(7)   # seed 7: picture, depth, camera, and the 3D box of every object

A Scene (formats/scenes.py) is the same record for these pictures and for real ones.

Coordinates: metres in the camera frame, x right, y down, z forward. Depth is z, not the length of
the ray. The level frame has the camera's position and x axis, but its y points straight down.
Pixels: column i covers [i, i + 1) and its ray goes through i + 0.5; a box x1, y1, x2, y2 ends
before x2 and y2.

Dimensions: H x W pixels of the picture, h x w pixels of the window that one object shows in.
"""

import numpy as np

from formats.scenes import Scene, corners, project, unproject

# Unlike each other, the ground, the sky, and the colours of marks.
COLORS = {
    "orange": (250, 125, 15),
    "yellow": (250, 225, 40),
    "purple": (150, 50, 180),
    "white": (250, 250, 250),
    "cyan": (50, 215, 215),
    "pink": (250, 150, 190),
}
# A shape is flat along some of its own axes (x 0, y 1, z 2) and round about the others.
SHAPES = {  # (flat axes, round axes)
    "cube": ([0, 1, 2], []),
    "sphere": ([], [0, 1, 2]),
    "cylinder": ([1], [0, 2]),
}
SIZE = (0.5, 1.4)  # metres, full length of a side or a diameter
CAMERA_HEIGHT = (1.0, 2.2)  # metres above the ground
DISTANCE = (1.5, 6.5)  # metres along the ground from camera to object
FLOATING = 0.25  # share of objects in the air: gives "above" and "below" a meaning
LIFT = (0.2, 1.0)  # metres between the ground and a floating object
FAR = 12.0  # metres; beyond is sky without depth, as for a depth camera
RIM = 0.05  # share of the picture's side by which an object may stick out
# An object that shows less than one of these is dropped.
MIN_PIXELS = 80 / 96**2  # share of the picture
MIN_VISIBLE = 0.5  # share of what the object would show if it stood alone
TRIES = 100  # objects tried per scene, and scenes tried per seed
# Unit vector to the lamp in the level frame: left, above, on the camera's side.
LIGHT = np.array([-0.52, -0.82, -0.24])
TILE = np.array([1, 0.92, 0.8])  # tint of the ground: red, green, blue
SKY = np.array([0.93, 1, 1.07])  # tint of the sky
NOISE = 4  # standard deviation of the picture's sensor noise, of 255


def make_scene(seed, size=96, objects=(3, 6), fov=(50, 80), pitch=(8, 28), colors=COLORS):
    """A synthetic Scene of size x size pixels; the same seed gives the same scene.

    objects: how many to place, least and most; at least objects[0] of them are visible. fov (of the
    width) and pitch (how far the camera looks down): ranges in degrees. colors: {name: (r, g, b)},
    each given to one object at most, so that a color names an object.
    ValueError if no try shows enough objects.
    """
    least = objects[0]
    rng = np.random.default_rng(seed)
    for _ in range(TRIES):
        camera = random_camera(rng, size, fov, pitch)
        placed = place_objects(rng, camera, size, objects, colors)
        depth_one = np.ones((size, size))
        rays = unproject(depth_one, camera["intrinsics"])  # (H, W, 3), all with z = 1
        ground = background(rng, rays, camera)
        layers = [draw(obj, rays, camera, colors[obj["color"]]) for obj in placed]
        visible = visible_layers(layers, ground)
        if len(visible) >= least:
            break
    else:
        raise ValueError(
            f"seed {seed}: no room for {least} visible objects with fov {fov} and pitch {pitch}: "
            "ask for fewer objects or a wider view"
        )
    # Without the dropped objects the others show at least as much, so no more are to be dropped.
    layers = [layers[i] for i in visible]
    annotated = [placed[i] for i in visible]
    depth, image, instances = composite(layers, ground)
    depth[np.isinf(depth)] = np.nan
    depth = depth.astype(np.float32)
    annotate(annotated, instances, unproject(depth, camera["intrinsics"]))
    noisy = image + NOISE * rng.standard_normal(image.shape)
    return Scene(
        id=f"synthetic_{seed}",
        image=np.clip(noisy, 0, 255).astype(np.uint8),
        depth=depth,
        intrinsics=camera["intrinsics"],
        objects=annotated,
        source=f"seed {seed}",
        instances=instances,
    )


def annotate(objects, instances, points):
    """Give each object its 2D box and the mean point of its visible surface.

    instances (H, W): index of the object that a pixel shows; points (H, W, 3), metres.
    """
    for i, obj in enumerate(objects):
        rows, columns = np.nonzero(instances == i)
        left = int(columns.min())
        top = int(rows.min())
        right = int(columns.max()) + 1
        bottom = int(rows.max()) + 1
        obj["box"] = (left, top, right, bottom)
        obj["surface"] = points[rows, columns].mean(0)


# ----------------------------------------------------------------------------------------------
# what stands where: the camera and the objects, at random


def random_camera(rng, size, fov, pitch):
    """A camera above the ground, for a picture of size x size pixels.

    intrinsics: fx, fy, cx, cy in pixels. half_width: of the view one metre ahead, metres. height:
    metres above the ground. level (3, 3): takes points of the level frame to the camera frame.
    """
    view = np.radians(rng.uniform(*fov))
    half_width = np.tan(view / 2)
    focal = size / 2 / half_width
    height = rng.uniform(*CAMERA_HEIGHT)
    down = np.radians(rng.uniform(*pitch))
    return {
        "intrinsics": (focal, focal, size / 2, size / 2),
        "half_width": half_width,
        "height": height,
        "level": turn_about_x(down),
    }


def place_objects(rng, camera, size, objects, colors):
    """From objects[0] to objects[1] objects at random places; fewer where there is no room.

    They touch no other, and each has another color.
    """
    least, most = objects
    wanted = min(rng.integers(least, most + 1), len(colors))
    placed = []
    for _ in range(TRIES):
        if len(placed) == wanted:
            break
        used = [obj["color"] for obj in placed]
        unused = [color for color in colors if color not in used]
        obj = random_object(rng, camera, unused)
        if fits(obj, placed, camera["intrinsics"], size):
            placed.append(obj)
    return placed


def random_object(rng, camera, colors):
    """A cube (a box with sides of any length, turned), a sphere or an upright cylinder.

    size (3,): full lengths along its own axes; center (3,) and rotation (3, 3) are in the camera
    frame.
    """
    shape = str(rng.choice(list(SHAPES)))
    _, round_axes = SHAPES[shape]
    size = rng.uniform(*SIZE, 3)
    size[round_axes] = size[0]  # one diameter for all round axes
    lift = 0.0
    if rng.random() < FLOATING:
        lift = rng.uniform(*LIFT)
    y = camera["height"] - size[1] / 2 - lift
    z = np.exp(rng.uniform(*np.log(DISTANCE)))  # as many from 1.5 to 3 m as from 3 to 6 m
    x = rng.uniform(-1, 1) * camera["half_width"] * z
    yaw = 0.0
    if shape == "cube":
        yaw = rng.uniform(0, np.pi / 2)
    return {
        "label": shape,
        "color": str(rng.choice(colors)),
        "size": size,
        "center": camera["level"] @ (x, y, z),
        "rotation": camera["level"] @ turn_about_y(yaw),
    }


def turn_about_x(angle):
    """The rotation (3, 3) by an angle in radians about the x axis."""
    cosine = np.cos(angle)
    sine = np.sin(angle)
    return np.array(
        [
            [1, 0, 0],
            [0, cosine, -sine],
            [0, sine, cosine],
        ]
    )


def turn_about_y(angle):
    """The rotation (3, 3) by an angle in radians about the y axis."""
    cosine = np.cos(angle)
    sine = np.sin(angle)
    return np.array(
        [
            [cosine, 0, sine],
            [0, 1, 0],
            [-sine, 0, cosine],
        ]
    )


def fits(obj, others, intrinsics, size):
    """Is an object in front of the camera, in the picture but for its rim, and clear of others?"""
    points = corners(obj)  # (8, 3)
    nearest = points[:, 2].min()
    if nearest < 0.5 or obj["center"][2] < 1.0:  # metres
        return False
    pixels = np.stack(project(points, intrinsics))  # (2, 8)
    if pixels.min() <= -RIM * size:
        return False
    if pixels.max() >= (1 + RIM) * size:
        return False
    for other in others:
        gap = np.linalg.norm(obj["center"] - other["center"])
        if gap <= bounding_radius(obj) + bounding_radius(other):
            return False
    return True


def bounding_radius(obj):
    """Radius of the sphere about an object's 3D box, metres."""
    return np.linalg.norm(obj["size"]) / 2


# ----------------------------------------------------------------------------------------------
# drawing: each object alone, one over the other


def draw(obj, rays, camera, color):
    """One object alone, as a layer: (window, depth, image).

    window: where in the picture the object is, and nowhere else, as two slices; depth (h, w)
    metres, inf = not there; image (h, w, 3), the shaded colour.
    """
    u, v = project(corners(obj), camera["intrinsics"])
    window = (pixel_range(v), pixel_range(u))
    rays = rays[window]  # (h, w, 3)
    depth, normals = cast(obj, rays)  # rays have z = 1, so the multiple of a ray is the depth
    # Real light would be cut off at 0; here faces turned away from the lamp differ, too.
    lit = 0.7 + 0.3 * normals @ (camera["level"] @ LIGHT)  # (h, w)
    paint = np.where(dark_paint(obj, rays, depth), 0.3, 1.0)
    shade = (paint * lit)[..., None]  # (h, w, 1)
    return window, depth, shade * np.array(color)


def pixel_range(coordinates):
    """The slice of the pixels that a run of coordinates covers; it may end beyond the picture."""
    start = int(coordinates.min())
    end = int(coordinates.max()) + 1
    return slice(max(start, 0), end)


def cast(obj, rays):
    """Where rays (..., 3) from the camera first hit an object.

    -> multiple of the ray at the hit (...), inf = miss; unit normals there (..., 3).
    A shape is where its parts overlap, a slab per flat axis and one round part: a ray is inside the
    shape from its last entry into a part to its first exit from a part.
    """
    flat_axes, round_axes = SHAPES[obj["label"]]
    half = obj["size"] / 2
    # In the object's own axes, from its centre: the camera and the rays.
    origin = -obj["center"] @ obj["rotation"]
    rays = rays @ obj["rotation"]
    enter = np.full(rays.shape[:-1], -np.inf)
    leave = np.full(rays.shape[:-1], np.inf)
    normals = np.zeros(rays.shape)
    if round_axes:
        radius = half[round_axes[0]]
        enter, leave, outward = cast_round(origin[round_axes], rays[..., round_axes], radius)
        normals[..., round_axes] = outward
    for axis in flat_axes:
        middle = -origin[axis] / rays[..., axis]  # where the ray is halfway through the slab
        reach = np.abs(half[axis] / rays[..., axis])  # from there to either face
        is_last = middle - reach > enter  # 1 = it enters this slab after all parts so far
        normals[is_last] = 0
        normals[is_last, axis] = -np.sign(rays[is_last, axis])
        enter = np.maximum(enter, middle - reach)
        leave = np.minimum(leave, middle + reach)
    hit = (enter < leave) & (enter > 0)
    multiple = np.where(hit, enter, np.inf)
    return multiple, normals @ obj["rotation"].T


def cast_round(origin, rays, radius):
    """Where rays enter and leave a round part, and its unit normals where they enter.

    origin (n,), rays (..., n): in the round axes only. Solves |origin + t ray| = radius for t.
    """
    a = (rays * rays).sum(-1)
    b = rays @ origin
    c = origin @ origin - radius**2
    # Where the ray misses, the root is set to 0: it enters and leaves at once, which is no hit.
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    enter = (-b - root) / a
    leave = (-b + root) / a
    normals = (origin + rays * enter[..., None]) / radius
    return enter, leave, normals


def dark_paint(obj, rays, depth):
    """Where an object is painted dark (h, w), which tells shapes apart at a glance.

    A cube is dark along its edges, a cylinder on a belt around its middle, a sphere nowhere.
    """
    shape = obj["label"]
    depth = np.where(np.isfinite(depth), depth, 0)
    points = depth[..., None] * rays  # (h, w, 3)
    offsets = points - obj["center"]
    if shape == "cube":
        half = obj["size"] / 2
        shares = np.abs(offsets @ obj["rotation"]) / half  # 1 = on a face
        # The largest share is 1 on the surface; where the second is large, too, an edge is near.
        return np.sort(shares)[..., 1] > 0.7
    if shape == "cylinder":
        axis = obj["rotation"][:, 1]
        return np.abs(offsets @ axis) < 0.2 * obj["size"][1]
    return np.zeros(depth.shape, bool)


def background(rng, rays, camera):
    """The ground, with tiles of 1 m, and the sky: depth (H, W), inf = sky, and image (H, W, 3)."""
    height = camera["height"]
    directions = rays @ camera["level"]  # (H, W, 3) in the level frame
    # A ray that goes up, or hardly down, gets twice FAR: no division by 0, and sky in the end.
    slope = np.maximum(directions[..., 1], height / (2 * FAR))
    depth = height / slope
    points = directions * depth[..., None]
    tiles = np.floor(points)[..., [0, 2]]  # x and z
    dark = tiles.sum(-1) % 2  # 1 = a dark tile
    tile = rng.uniform(70, 115) * TILE
    sky = rng.uniform(120, 150) * SKY
    ground = tile * (1 - 0.2 * dark[..., None])
    is_sky = depth > FAR
    depth[is_sky] = np.inf
    return depth, np.where(is_sky[..., None], sky, ground)


def composite(layers, ground):
    """Layers over the ground with a z-buffer: the nearest surface wins, whatever the order.

    -> depth (H, W), image (H, W, 3), instances (H, W), the index of the layer, -1 = no object.
    """
    ground_depth, ground_image = ground
    depth = ground_depth.copy()
    image = ground_image.copy()
    instances = np.full(depth.shape, -1, np.int8)
    for i, (window, layer_depth, layer_image) in enumerate(layers):
        nearer = layer_depth < depth[window]
        depth[window][nearer] = layer_depth[nearer]
        image[window][nearer] = layer_image[nearer]
        instances[window][nearer] = i
    return depth, image, instances


def visible_layers(layers, ground):
    """Indices of the layers that show enough when all are drawn; see MIN_PIXELS, MIN_VISIBLE."""
    _, _, instances = composite(layers, ground)
    visible = []
    for i, (_, depth, _) in enumerate(layers):
        shown = (instances == i).sum()
        alone = np.isfinite(depth).sum()
        enough = max(MIN_PIXELS * instances.size, MIN_VISIBLE * alone)
        if shown >= enough:
            visible.append(i)
    return visible
