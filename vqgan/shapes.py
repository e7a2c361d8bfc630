"""Small images drawn from a seed: a data set that needs no download.

Each image shows one of ten shapes, of random color, size, position and tilt, on a textured
background, and has a caption ("small red star on blue"). A model that blurs will lose the edges and
textures.

Everything is computed with sums, products and quotients, which IEEE 754 rounds alike on every
machine, unlike sines and exponentials. So a seed gives the same bytes anywhere.
"""

import numpy as np

TEXTURES = ("stripes", "checks", "bumps", "speckle")
SIZES = ("small", "medium", "large")
COLORS = {
    "red": (205, 45, 45),
    "orange": (235, 140, 35),
    "yellow": (235, 220, 60),
    "green": (50, 150, 60),
    "blue": (45, 80, 200),
    "purple": (135, 55, 165),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
PALETTE = np.array(list(COLORS.values()), dtype=np.float32)  # (8, 3)
GRAY = 110.0  # the middle of the palette; a texture mixes the background's color with it
SIZE_IN_PIXELS = 32
MIN_AREA = 20  # every shape has at least this many pixels
CHUNK_SIZE = 64  # images whose points, 1 MiB in float32, stay in a processor's cache
SUPERSAMPLING = 2  # each pixel's coverage is the mean of 2x2 points, so that edges are smooth

# Outward normals of the sides of a regular triangle and pentagon; the first points down (y grows
# downwards). They are decimals because np.cos is not rounded alike everywhere.
TRIANGLE = ((0.0, 1.0), (0.8660254, -0.5), (-0.8660254, -0.5))
PENTAGON = [(0.0, 1.0), (0.9510565, 0.3090170), (0.5877853, -0.8090170)]
PENTAGON += [(-0.5877853, -0.8090170), (-0.9510565, 0.3090170)]


def _is_in_heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x^2 + y^2 - 1)^3 <= x^2 y^3 with y upwards, shrunk into the unit circle."""
    x, y = 1.2 * x, 0.1 - 1.2 * y
    body = x * x + y * y - 1
    return body * body * body <= x * x * y * y * y


# Whether points (x, y) of the plane belong to each shape; y grows downwards.
SHAPES = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.36),
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.85,
    "triangle": lambda x, y: np.sum([a * x + b * y <= 0.5 for a, b in TRIANGLE], axis=0) == 3,
    "diamond": lambda x, y: 1.6 * abs(x) + abs(y) <= 1,
    "cross": lambda x, y: (
        (np.minimum(abs(x), abs(y)) <= 0.28) & (np.maximum(abs(x), abs(y)) <= 0.95)
    ),
    # Each tip lies outside one side of the pentagon, and no point lies outside two.
    "star": lambda x, y: np.sum([a * x + b * y <= 0.31 for a, b in PENTAGON], axis=0) >= 4,
    "heart": _is_in_heart,
    "crescent": lambda x, y: (x * x + y * y <= 1) & ((x - 0.45) * (x - 0.45) + y * y >= 0.6),
    "hourglass": lambda x, y: (abs(x) <= 0.12 + 0.75 * abs(y)) & (abs(y) <= 0.9),
}
CLASSES = tuple(SHAPES)

# What is drawn: images uint8 (N, 3, 32, 32), labels int64 (N,), captions, and the classes' names.
Rendered = tuple[np.ndarray, np.ndarray, list[str] | None, tuple[str, ...]]


def render_shapes(num_images: int, *, seed: int | tuple[int, ...] = 0) -> Rendered:
    """Draw labeled images; a seed gives the same ones on every machine.

    Returns:
        images: uint8 (N, 3, 32, 32)
        labels: int64 (N,), the index of the shape in the class names
        captions: N strings, "<size> <color> <shape> on <background color>"
        class_names: the ten shapes
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(CLASSES), size=num_images)
    size = rng.integers(len(SIZES), size=num_images)
    color = rng.integers(len(COLORS), size=num_images)
    # Any color but the shape's: a step of 1 to 7 around the wheel of eight.
    background = (color + rng.integers(1, len(COLORS), size=num_images)) % len(COLORS)

    # How much of every pixel its shape covers, in [0, 1], (N, 32, 32).
    radius = np.array([0.32, 0.50, 0.72])[size] * rng.uniform(0.9, 1.1, size=num_images)
    center = rng.uniform(-1.0, 1.0, size=(2, num_images)) * (0.95 - radius)  # shapes stay inside
    # A rotation without sines: (1 - t^2, 2t) / (1 + t^2); t in +-0.25 is a tilt of +-28 degrees.
    t = rng.uniform(-0.25, 0.25, size=num_images)
    rotation = np.stack([1 - t * t, 2 * t]) / (1 + t * t)
    coverage = np.empty((num_images, SIZE_IN_PIXELS, SIZE_IN_PIXELS), dtype=np.float32)
    for label, is_inside in enumerate(SHAPES.values()):
        indices = np.nonzero(labels == label)[0]
        for chunk in np.split(indices, range(CHUNK_SIZE, len(indices), CHUNK_SIZE)):
            x, y = _local_coordinates(center[:, chunk], radius[chunk], rotation[:, chunk])
            coverage[chunk] = _mean_of_blocks(is_inside(x, y))

    # The texture mixes two shades of the background, and the shape covers them.
    jitter = rng.uniform(-18.0, 18.0, size=(2, num_images, 3, 1, 1)).astype(np.float32)
    foreground = PALETTE[color, :, None, None] + jitter[0]  # (N, 3, 1, 1)
    light = PALETTE[background, :, None, None] + jitter[1]
    contrast = rng.uniform(0.3, 0.6, size=(num_images, 1, 1, 1)).astype(np.float32)
    # The second shade lies between the color and gray.
    dark = light * (1 - contrast) + np.float32(GRAY) * contrast
    texture, _ = _texture(rng, num_images)
    images = np.empty((num_images, 3, SIZE_IN_PIXELS, SIZE_IN_PIXELS), dtype=np.uint8)
    for start in range(0, num_images, CHUNK_SIZE):
        part = slice(start, start + CHUNK_SIZE)
        shape, shade = coverage[part, None], texture[part, None]  # (n, 1, 32, 32)
        pixels = light[part] * (1 - shade) + dark[part] * shade  # (n, 3, 32, 32)
        pixels += shape * (foreground[part] - pixels)
        images[part] = np.clip(pixels + np.float32(0.5), 0, 255)

    names = list(COLORS)
    traits = zip(size, color, labels, background, strict=True)
    captions = [f"{SIZES[s]} {names[c]} {CLASSES[k]} on {names[b]}" for s, c, k, b in traits]
    return images, labels.astype(np.int64), captions, CLASSES


def render_textures(num_images: int, *, seed: int | tuple[int, ...] = 0) -> Rendered:
    """Draw textures of two colors, without shapes: images that look the same everywhere.

    `sampling.sample_sliding_window` can continue them for as long as one likes.

    Returns:
        images: uint8 (N, 3, 32, 32)
        labels: int64 (N,), the index of the texture in the class names
        captions: None
        class_names: the four textures
    """
    rng = np.random.default_rng(seed)
    first = rng.integers(len(COLORS), size=num_images)
    second = (first + rng.integers(1, len(COLORS), size=num_images)) % len(COLORS)
    light, dark = PALETTE[first, :, None, None], PALETTE[second, :, None, None]  # (N, 3, 1, 1)
    texture, kind = _texture(rng, num_images)
    images = np.empty((num_images, 3, SIZE_IN_PIXELS, SIZE_IN_PIXELS), dtype=np.uint8)
    for start in range(0, num_images, CHUNK_SIZE):
        part = slice(start, start + CHUNK_SIZE)
        shade = texture[part, None]  # (n, 1, 32, 32)
        images[part] = light[part] * (1 - shade) + dark[part] * shade + np.float32(0.5)
    return images, kind.astype(np.int64), None, TEXTURES


def _local_coordinates(
    center: np.ndarray, radius: np.ndarray, rotation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (n, 64, 64) in which the shape is upright, at the origin, with radius one."""
    side = SIZE_IN_PIXELS * SUPERSAMPLING
    axis = (np.arange(side, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / side) - 1
    parameters = np.concatenate([center, rotation, radius[None]]).astype(np.float32)
    center_x, center_y, cosine, sine, radius = parameters[..., None, None]
    x, y = axis[None, None, :] - center_x, axis[None, :, None] - center_y
    return (cosine * x + sine * y) / radius, (cosine * y - sine * x) / radius


def _mean_of_blocks(inside: np.ndarray) -> np.ndarray:
    """Fraction of each pixel's 2x2 points that are inside: bool (n, 64, 64) -> (n, 32, 32)."""
    points = inside.view(np.uint8)
    top, bottom = points[:, ::2], points[:, 1::2]
    count = top[..., ::2] + bottom[..., ::2] + top[..., 1::2] + bottom[..., 1::2]
    return count * np.float32(1 / SUPERSAMPLING**2)


def detect_colors(images: np.ndarray) -> list[tuple[str, str]]:
    """Detect the colors of drawn or sampled images: (shape's, background's) for each.

    A background runs from its color towards gray, so in color space it is a line that ends at gray.
    The pixels at the border, which no shape reaches, show which of the eight lines it is. The shape
    is where pixels are farthest from that line, and their mean gives its color.

    Args:
        images: uint8 (N, 3, 32, 32).
    """
    rays = PALETTE - GRAY  # (8, 3), from gray to each color
    lengths = np.linalg.norm(rays, axis=1)
    rays = rays / lengths[:, None]
    pixels = images.transpose(0, 2, 3, 1).astype(np.float32)  # (N, 32, 32, 3)

    def distances(points: np.ndarray) -> np.ndarray:
        """From points (..., 3) to the eight segments from gray to a color: (..., 8)."""
        offset = points - GRAY
        along = np.clip(offset @ rays.T, 0, lengths)
        return np.linalg.norm(offset[..., None, :] - along[..., None] * rays, axis=-1)

    sides = (pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1])
    border = np.concatenate(sides, axis=1)
    background = distances(border).mean(axis=1).argmin(axis=1)  # (N,)
    from_background = np.stack(
        [distances(image)[..., b].ravel() for image, b in zip(pixels, background, strict=True)]
    )  # (N, 1024)
    farthest = np.argsort(-from_background, axis=1)[:, :MIN_AREA]
    flat = pixels.reshape(len(pixels), -1, 3)
    mean = np.take_along_axis(flat, farthest[..., None], axis=1).mean(axis=1)  # (N, 3)
    to_palette = np.linalg.norm(mean[:, None] - PALETTE, axis=2)  # (N, 8)
    to_palette[np.arange(len(mean)), background] = np.inf  # a shape has another color
    shape = to_palette.argmin(axis=1)
    names = list(COLORS)
    return [(names[s], names[b]) for s, b in zip(shape, background, strict=True)]


def _texture(rng: np.random.Generator, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights in [0, 1] of a second shade, (N, 32, 32), and the index of each texture, (N,)."""
    pixel = np.arange(SIZE_IN_PIXELS, dtype=np.float32)
    x, y = pixel[None, None, :], pixel[None, :, None]
    kind = rng.integers(len(TEXTURES), size=num_images)
    # Two waves at right angles, 5 to 10 pixels long, in a direction (a, b) with a^2 + b^2 = 1.
    t = rng.uniform(-1.0, 1.0, size=num_images)
    period = rng.uniform(5.0, 10.0, size=num_images)
    phase = rng.uniform(0.0, 1.0, size=(2, num_images))
    a, b = (1 - t * t) / (1 + t * t) / period, 2 * t / (1 + t * t) / period
    a, b, first, second = np.stack([a, b, *phase]).astype(np.float32)[..., None, None]
    along, across = a * x + b * y + first, a * y - b * x + second
    along, across = along - np.floor(along), across - np.floor(across)  # sawtooth waves in [0, 1)
    noise = rng.random(size=(num_images, SIZE_IN_PIXELS, SIZE_IN_PIXELS), dtype=np.float32)
    textures = {
        "stripes": lambda s: along[s] < 0.5,
        "checks": lambda s: (along[s] < 0.5) ^ (across[s] < 0.5),
        "bumps": lambda s: abs(2 * along[s] - 1) * abs(2 * across[s] - 1),
        "speckle": lambda s: noise[s],  # one value per pixel
    }
    texture = np.empty((num_images, SIZE_IN_PIXELS, SIZE_IN_PIXELS), dtype=np.float32)
    for number, name in enumerate(TEXTURES):
        mask = kind == number
        texture[mask] = textures[name](mask)
    return texture, kind
