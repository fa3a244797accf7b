"""The one door for pictures and depth maps: no other file of the project opens one.

    open_picture(file)        RGB, upright, on white where it is transparent
    open_depth(file, scale)   (H, W) float32 metres, NaN = no measurement
    picture_size(file)        (width, height) of what open_picture gives

file: a path, or the encoded bytes. Whatever is wrong is a BadPicture, a few words that name the
file; the reader of rows or scenes adds where the file is named.
"""

import io
import os
import stat
import warnings
from contextlib import contextmanager

import numpy as np
from PIL import Image

from formats.cache import ByteCache
from formats.errors import UserError, quote
from formats.values import is_number

# Raster formats that PIL decodes itself. (For others, such as EPS, it starts another program.)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
MOST_PIXELS = 2**27  # of a picture, twelve thousand by eleven thousand
MOST_BYTES = 2**30  # of its file
SMALLEST_SCALE, LARGEST_SCALE = 1e-6, 1e3  # metres per unit of depth
FARTHEST = 1e5  # metres; a depth that is larger, or infinite, stands for the sky

# EXIF's orientation: how a picture is turned to stand upright.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # of these, which exchange width and height

# A row is checked and then encoded: its pictures are read once.
cache = ByteCache(128 * 2**20)


class BadPicture(UserError):
    """A picture or a depth map that cannot be used: which, and why."""


def open_picture(file):
    """The picture of a file: RGB, upright, on white where it is transparent. Not to be changed."""
    return cache.get(("RGB", *key_of(file)), lambda: in_rgb(decode(file), name_of(file)), bytes_of)


def open_depth(file, scale=None):
    """A depth map of whole units or of metres -> (H, W) float32 metres, NaN = no measurement.

    scale: metres per unit (`is_scale`); without it a unit of whole numbers is a millimetre, and numbers with
    a fraction (a float TIFF) are metres.
    """
    picture = cache.get(("units", *key_of(file)), lambda: decode(file, units=True), bytes_of)
    if picture.mode == "L" and scale is None:
        raise BadPicture(
            f"{name_of(file)}: of 8 bits, holds no metres, only relative depth; write a 16-bit "
            "PNG, add 'depth_scale' (metres per unit), or leave the depth out"
        )
    if picture.mode != "L" and picture.mode[0] not in "IF":
        raise BadPicture(
            f"{name_of(file)}: holds no metres, it is of PIL's mode {picture.mode}; write a "
            "16-bit grey PNG"
        )
    if scale is None:
        scale = 1.0 if picture.mode == "F" else 0.001
    with np.errstate(over="ignore"):
        return measured(np.asarray(picture, np.float32) * np.float32(scale))


def is_scale(value):
    """Can this be the metres of a unit of depth?"""
    return is_number(value, SMALLEST_SCALE, LARGEST_SCALE)


def measured(depth):
    """Depth (H, W) metres -> the same with NaN where there is no measurement."""
    return np.where((depth > 0) & (depth < FARTHEST), depth, np.float32(np.nan))


def picture_size(file):
    """(width, height) of a picture, upright."""
    with opened(file) as image:
        return image.size[::-1] if turn_of(image) in SIDEWAYS else image.size


def lies_sideways(file):
    """Does EXIF turn this picture by a quarter? Then its depth and camera may be of the other
    way."""
    with opened(file) as image:
        return turn_of(image) in SIDEWAYS


# ----------------------------------------------------------------------------------------------


def name_of(file):
    """What messages call a file: its path, or how many bytes it has."""
    return f"{len(file)} embedded bytes" if isinstance(file, bytes) else quote(str(file), 60)


def key_of(file):
    """What a cache knows a file by. BadPicture for what is no regular file, or too large.

    A pipe or a device could be read for ever.
    """
    if isinstance(file, bytes):
        size = len(file)
        key = (file,)
    else:
        try:
            found = os.stat(file)
        except FileNotFoundError:
            raise BadPicture(f"no such file: {name_of(file)}") from None
        except (OSError, ValueError) as error:
            # Encoded bytes, as text, make a name that is too long; a zero in it is a ValueError.
            reason = getattr(error, "strerror", None) or error
            raise BadPicture(f"{name_of(file)}: needs the path of a file ({reason})") from None
        if not stat.S_ISREG(found.st_mode):
            raise BadPicture(f"{name_of(file)}: not a regular file")
        size = found.st_size
        key = (str(file), found.st_mtime_ns, size)
    if size > MOST_BYTES:
        raise BadPicture(f"{name_of(file)}: {size:,} bytes, at most {MOST_BYTES:,} are read")
    return key


@contextmanager
def opened(file):
    """PIL's picture of a file, its header read and its size bounded.

    BadPicture also for what goes wrong while it is in use.
    """
    key_of(file)
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures and of odd metadata
        try:
            with Image.open(source, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise BadPicture(
                        f"{name_of(file)}: {image.width} x {image.height} pixels, at most "
                        f"{MOST_PIXELS:,} are read"
                    )
                yield image
        except BadPicture:
            raise
        except Image.UnidentifiedImageError:
            raise BadPicture(
                f"{name_of(file)}: unreadable image, needs one of {', '.join(FORMATS)}"
            ) from None
        # A damaged file lets almost any exception out of PIL's decoders.
        except Exception as error:  # noqa: BLE001
            raise BadPicture(f"{name_of(file)}: unreadable image ({quote(str(error))})") from None


def decode(file, units=False):
    """The picture of a file in its own mode, upright; units: its values are to be those stored."""
    with opened(file) as image:
        if units and is_stretched(image):
            raise BadPicture(
                f"{name_of(file)}: its values would be stretched to 8 or 16 bits, and be no units "
                "of depth; write a 16-bit PNG"
            )
        image.load()
        turn = turn_of(image)
        return image.transpose(TURNS[turn]) if turn in TURNS else image


def is_stretched(image):
    """Does PIL stretch the values of this file, not loaded yet, to those of 8 or 16 bits?

    It does so where the largest value is another one: in a PGM, or in a PNG of 2 or 4 bits.
    """
    arguments = [tile[3] for tile in image.tile]
    if image.format == "PPM":
        return any(isinstance(found, tuple) for found in arguments)  # (mode, largest value)
    return image.format == "PNG" and any(found in ("L;2", "L;4") for found in arguments)


def turn_of(image):
    """The orientation that EXIF gives, 1 to 8; 1, upright, where there is none or it is damaged.

    Of a TIFF it is always 1: PIL turns that itself.
    """
    try:
        return 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001 (damaged metadata of a good picture, as above)
        return 1


def in_rgb(image, name):
    """A picture in RGB: of more bits per channel scaled to 8, transparent ones on white."""
    if image.mode[0] in "IF":
        image = eight_bits(image, name)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def eight_bits(image, name):
    """A grey picture of 16 bits -> of 8; with alpha where one of its values is transparent."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise BadPicture(f"{name}: needs at most 16 bits per channel; save the picture with 8")
    grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def bytes_of(image):
    """The most memory that PIL takes for a picture."""
    return image.width * image.height * 4
