"""Turn the bytes of an image file into the 32x32 RGB pixels that the model takes.

The order of the steps matters: recognise the format by content (never by name or Content-Type) among a
short list, check the size in the header before decoding a pixel, crop the centred square, lay
transparency over white, convert to RGB, resize, apply the EXIF orientation. The image is cropped and not
stretched, because the network has seen objects in their natural proportions. Colour profiles are not
applied, and only the first frame of an animation counts.
"""

import io
import math
import re
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

from serving.errors import ImageError, TooLargeError

SIDE = 32
# Formats that a person would send. TIFF and the dozens of others that Pillow reads are left out:
# each would be another decoder for hostile bytes.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size in a fraction of the time; four times the
# target's side still has all the detail that the resize can use.
DRAFT_SIDE = 4 * SIDE

# Averaging before the bicubic resize leaves at least this many times the target's side.
REDUCING_GAP = 3
BAND_PIXELS = 2**20

# An image with more pixels in memory counts as large. A camera's JPEG hardly ever does, as it is decoded
# row by row, at the draft's size.
LARGE_PIXELS = 4_000_000
MAX_SIDE = 65_535  # for each row Pillow keeps a pointer and makes a call; only PNG and BMP can have more
WEBP_COPIES = 4  # of the pixels that Pillow's WebP decoder has in memory

# JPEG: how a scan begins, including the first byte of its length, which can only be 0; and how
# progressive and lossless frames begin.
SCAN = b"\xff\xda\0"
WHOLE = re.compile(rb"\xff[\xc2\xc3\xc6\xc7\xca\xcb\xce\xcf]")

# The limits of a small PNG: on its sides, and on its bytes too, as a few of them can hold a long text.
SMALL_SIDE = 64
SMALL_BYTES = 4 * 1024
PNG_DEPTH = 24  # offset of the bits per channel in a PNG
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

# What a few bytes of a file can ask for again and again, each time causing work on the whole image or on
# all that was read before: how files of the format begin, what is counted in them, its name, and a limit
# that no camera or program exceeds.
REPEATABLE = (
    (b"\xff\xd8", SCAN, "scans", 100),
    (b"\xff\xd8", b"Exif\0\0", "Exif segments", 100),
    (b"\xff\xd8", b"8BIM", "Photoshop resources", 1000),
    (b"\x89PNG", b"iCCP", "colour profiles", 10),
    (b"\x89PNG", b"zTXt", "compressed texts", 100),
    (b"\x89PNG", b"iTXt", "international texts", 100),
)

PIECE = 2**20  # bytes searched in one call, during which all else waits
MAX_READS = 100_000  # reads of one file: a marker, chunk or block takes one to five
# JPEG: segments that list layers or tables, of which an image has only a few, and their greatest length.
LISTING = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xdb\xde]..", re.DOTALL)
MAX_LISTING = 1024

# `decode` checks `max_pixels` itself, so that the limit is a setting and the answer a 413.
Image.MAX_IMAGE_PIXELS = None

# Pillow warns of odd EXIF, which does not belong in the log. Set once for the whole process, as changing
# the filters around a call is not safe with threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class LargeImageError(Exception):
    """An image would have more pixels in memory than the caller allows."""


class _Pieces(io.BytesIO):
    """A file that limits how often it is read, and the length of JPEG segments that list something.

    Pillow walks in Python over the markers, chunks and blocks around the pixels, and keeps what it
    finds; a file of megabytes can consist of millions of them.
    """

    _left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0 or (size and size > MAX_LISTING and self._begins_a_listing(size)):
            raise ImageError("The image has too many pieces; save it anew.")
        return super().read(size)

    def _begins_a_listing(self, size: int) -> bool:
        """Return whether the next `size` bytes are such a segment; its marker and length come before."""
        start = self.tell()
        self.seek(max(0, start - 4))
        before = super().read(start - self.tell())
        return bool(LISTING.fullmatch(before)) and int.from_bytes(before[2:]) == size + 2


def decode(content: bytes, max_pixels: int, in_memory: int | None = None) -> npt.NDArray[np.uint8]:
    """Decode an image file.

    Args:
        content: a PNG, JPEG, WebP, GIF or BMP file of any size, mode and EXIF orientation.
        max_pixels: limit of width times height (a quarter for WebP), checked before decoding.
        in_memory: how many pixels the decoder may keep in memory; None for no limit.

    Returns:
        uint8 [32, 32, 3], RGB; an opaque 32x32 image is not resampled.

    Raises:
        ImageError: the bytes are not an image of these formats, or it is damaged.
        TooLargeError: the image has more than `max_pixels` pixels, or a side of more than 65,535.
        LargeImageError: it takes more than `in_memory`; whether it is damaged is not known yet.
    """
    if not content:
        raise ImageError("The image is empty (0 bytes); send a PNG, JPEG, WebP, GIF or BMP file.")
    _check_repetition(content)
    try:
        with Image.open(_Pieces(content), formats=FORMATS) as image:
            pixels = image.width * image.height
            limit = max_pixels // WEBP_COPIES if image.format == "WEBP" else max_pixels
            if pixels > limit:
                kind = f" for WebP, and {max_pixels} for other formats" if limit < max_pixels else ""
                raise TooLargeError(
                    f"The image has {image.width}x{image.height} pixels; "
                    f"the limit is {limit} pixels in all{kind}."
                )
            if max(image.size) > MAX_SIDE:
                raise TooLargeError(
                    f"The image has {image.width}x{image.height} pixels; "
                    f"the limit of a side is {MAX_SIDE}."
                )
            drawn = image.draft(image.mode, (DRAFT_SIDE, DRAFT_SIDE))
            if in_memory is not None and pixels > in_memory and not _is_read_by_rows(image, content):
                raise LargeImageError
            image.load()
            _scale_colour_key(image, content)
            # Of a draft at half size, say, an odd side ends half a pixel before the decoded pixels do.
            size = drawn[1][2:] if drawn else image.size
            return np.array(_upright(_square(image, size), image), dtype=np.uint8)
    except (ImageError, TooLargeError, LargeImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError(
            "The bytes are not a PNG, JPEG, WebP, GIF or BMP image; send one of these formats."
        ) from None
    except Exception as error:
        # Pillow's decoders raise nearly anything on damaged bytes (OSError, SyntaxError,
        # struct.error, zlib.error, KeyError, ...): all of it means the same to the sender.
        raise ImageError(
            f"The image cannot be decoded ({type(error).__name__}); it is damaged or truncated."
        ) from error


def is_small(content: bytes) -> bool:
    """Return whether a file is a small PNG, which decodes fast enough to do it in the event loop."""
    # A second header could have another size than the first one.
    if len(content) > SMALL_BYTES or not content.startswith(PNG_HEAD) or content.count(b"IHDR") > 1:
        return False
    width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    return max(width, height) <= SMALL_SIDE


def _is_read_by_rows(image: Image.Image, content: bytes) -> bool:
    """Return whether an image is a JPEG of which the decoder keeps a few rows, not all coefficients.

    It keeps all of them if an image comes in several scans. So nothing in the file may be the possible
    beginning of a scan of only some of the layers, or of a frame that is made of such scans.
    """
    layers = getattr(image, "layers", 0)  # only JPEGs have them
    starts = range(0, len(content), PIECE)
    if not layers or any(WHOLE.search(content, start, start + PIECE + 1) for start in starts):
        return False
    of_all = bytes([*SCAN, 6 + 2 * layers, layers])
    return _count(content, of_all) == _count(content, SCAN)


def _check_repetition(content: bytes) -> None:
    """Raise `ImageError` if a file repeats something so often that it could take minutes to decode."""
    for start, part, name, most in REPEATABLE:
        if content.startswith(start) and _count(content, part) > most:
            raise ImageError(f"The image has more than {most} {name}; save it anew, without them.")


def _count(content: bytes, part: bytes) -> int:
    """Return how often `content` has `part`, which must be unable to overlap itself."""
    longer = PIECE + len(part) - 1
    return sum(content.count(part, start, start + longer) for start in range(0, len(content), PIECE))


def _scale_colour_key(image: Image.Image, content: bytes) -> None:
    """Scale a PNG's transparent colour to the 8 bits that its pixels have after decoding.

    Pillow leaves it as it is in the file. The pixels of 16-bit colours lose their low bytes, so all that
    share its high bytes become transparent.
    """
    key, depth = image.info.get("transparency"), content[PNG_DEPTH] if image.format == "PNG" else 8
    if image.mode == "L" and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif image.mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> (depth - 8) for value in key)


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: transparency over white, 16-bit grey scaled to 8 bits."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion differs between versions: some clip at 255.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        grey[grey == image.info.get("transparency", -1)] = 65535
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _square(image: Image.Image, size: tuple[float, float]) -> Image.Image:
    """Return the centred square of the image as 32x32 RGB, by bicubic resizing (antialiased by Pillow).

    `size` is the width and height of the picture; pixels beyond it are the decoder's padding.

    A large square is first averaged down to three to six times the target's side. This and the
    conversion to RGB are done in bands of rows: a small file can have many pixels, and no second copy is
    made of them.
    """
    if size == (SIDE, SIDE):
        return _rgb(image)
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    right, bottom = math.ceil(left + side), math.ceil(top + side)
    factor = max(1, int(side) // (REDUCING_GAP * SIDE))
    width, height = right - int(left), bottom - int(top)
    reduced = Image.new("RGB", (math.ceil(width / factor), math.ceil(height / factor)))
    rows = factor * max(1, BAND_PIXELS // (width * factor))
    for row in range(int(top), bottom, rows):
        band = _rgb(image.crop((int(left), row, right, min(row + rows, bottom))))
        reduced.paste(band.reduce(factor), (0, (row - int(top)) // factor))
    x, y = left % 1, top % 1
    box = (x / factor, y / factor, (x + side) / factor, (y + side) / factor)
    return reduced.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)


def _upright(square: Image.Image, image: Image.Image) -> Image.Image:
    """Turn the `square` of an image upright, by the image's EXIF orientation."""
    try:
        orientation = image.getexif().get(Base.Orientation, 1)
    except ImageError:
        raise
    except Exception:  # on invalid EXIF Pillow raises nearly anything; the pixels are good
        return square
    if orientation != 1:
        square.getexif()[Base.Orientation] = orientation
        ImageOps.exif_transpose(square, in_place=True)
    return square
