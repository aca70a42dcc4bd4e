"""From the bytes of an image file to the 32x32 RGB pixels that the model takes.

The order matters: the format is recognised by content (never by name or Content-Type) among a
short list, the size is checked from the header before a pixel is decoded, then a centred square crop,
then transparency over white, then RGB, then the resize, then EXIF orientation. The crop rather than a
stretch, because the network has seen objects in their natural proportions. Colour profiles are not
applied and of an animation the first frame counts.
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
# Formats that a person would send. TIFF and the dozens of others that Pillow reads stay out:
# each is another decoder for hostile bytes.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the time; at four times the
# target's side the resize still has all that it can use.
DRAFT_SIDE = 4 * SIDE

# Before the bicubic resize, averaging leaves at least so many times the target's side.
REDUCING_GAP = 3
BAND_PIXELS = 2**20

# An image with more pixels in memory is a large one. A camera's JPEG never is, as it is decoded row by
# row, at the draft's size.
LARGE_PIXELS = 4_000_000
MAX_SIDE = 65_535  # Pillow keeps a pointer for each row and makes a call; only PNG and BMP can have more
WEBP_COPIES = 4  # that Pillow's decoder of WebP has of the pixels

# JPEG: how a scan begins, with the first byte of the length that it can have; and how those frames begin
# that are progressive or lossless.
SCAN = b"\xff\xda\0"
WHOLE = re.compile(rb"\xff[\xc2\xc3\xc6\xc7\xca\xcb\xce\xcf]")

# What a small PNG is: by its header, and by its bytes too, since a few can stand for a long text.
SMALL_SIDE = 64
SMALL_BYTES = 4 * 1024
PNG_DEPTH = 24  # where a PNG has its bits for each channel
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

# What a few bytes of a file can ask for again and again, each time for work on the whole image or on all
# that was read before: how a format's files begin, what is counted in them, its name, and how many of it
# are more than any camera or program writes.
REPEATABLE = (
    (b"\xff\xd8", SCAN, "scans", 100),
    (b"\xff\xd8", b"Exif\0\0", "Exif segments", 100),
    (b"\xff\xd8", b"8BIM", "Photoshop resources", 1000),
    (b"\x89PNG", b"iCCP", "colour profiles", 10),
    (b"\x89PNG", b"zTXt", "compressed texts", 100),
    (b"\x89PNG", b"iTXt", "international texts", 100),
)

PIECE = 2**20  # bytes that are searched in one go, for which all else waits
MAX_READS = 100_000  # of a file's pieces: a marker, chunk or block is one to five
# JPEG: what lists layers or tables, of which an image has a few, and how long that is at most.
LISTING = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xdb\xde]..", re.DOTALL)
MAX_LISTING = 1024

# The check against `max_pixels` is ours, so that the limit is a setting and the answer a 413.
Image.MAX_IMAGE_PIXELS = None

# Pillow warns of odd EXIF; the log is not its place. Here, as filters are the whole process's: to change
# them around a call is not for threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class LargeImageError(Exception):
    """An image has more pixels in memory than are to be decoded here."""


class _Pieces(io.BytesIO):
    """A file that is not read in any number of pieces.

    Pillow walks in Python over the markers, chunks and blocks around the pixels, and keeps what it
    meets; a file of megabytes can consist of millions of them.
    """

    _left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0 or (size and size > MAX_LISTING and self._begins_a_listing(size)):
            raise ImageError("The image has too many pieces; save it anew.")
        return super().read(size)

    def _begins_a_listing(self, size: int) -> bool:
        """Whether that many bytes are a segment that lists; its marker and length were read before."""
        start = self.tell()
        self.seek(max(0, start - 4))
        before = super().read(start - self.tell())
        return bool(LISTING.fullmatch(before)) and int.from_bytes(before[2:]) == size + 2


def decode(content: bytes, max_pixels: int, in_memory: int | None = None) -> npt.NDArray[np.uint8]:
    """Decode an image file.

    Args:
        content: a PNG, JPEG, WebP, GIF or BMP file of any size, mode and EXIF orientation.
        max_pixels: limit of width times height, checked before decoding.
        in_memory: how many of them the decoder may keep in memory; None is any number.

    Returns:
        uint8 [32, 32, 3], RGB; a 32x32 opaque image comes through pixel by pixel.

    Raises:
        ImageError: the bytes are no image of these formats, or a damaged one.
        TooLargeError: the image has more than `max_pixels` pixels, or a side of more than 65,535.
        LargeImageError: it takes more than `in_memory`; it may still be damaged.
    """
    if not content:
        raise ImageError("The image is empty (0 bytes); send a PNG, JPEG, WebP, GIF or BMP file.")
    _check_repetition(content)
    try:
        with Image.open(_Pieces(content), formats=FORMATS) as image:
            pixels = image.width * image.height
            limit = max_pixels // WEBP_COPIES if image.format == "WEBP" else max_pixels
            if pixels > limit:
                raise TooLargeError(
                    f"The image has {image.width}x{image.height} pixels; "
                    f"the limit is {limit} pixels in all."
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
            # At a half of its size, say, an odd side is half a pixel shorter than what was decoded.
            size = drawn[1][2:] if drawn else image.size
            return np.array(_upright(_square(image, size), image), dtype=np.uint8)
    except (ImageError, TooLargeError, LargeImageError):
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
    """Whether a file is a small PNG, whose decoding is so short that the event loop can wait for it."""
    # With a second header there could be other pixels than the first one has.
    if len(content) > SMALL_BYTES or not content.startswith(PNG_HEAD) or content.count(b"IHDR") > 1:
        return False
    width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    return max(width, height) <= SMALL_SIDE


def _is_read_by_rows(image: Image.Image, content: bytes) -> bool:
    """Whether an image is a JPEG of which the decoder keeps some rows, not all of its coefficients.

    It keeps them where an image comes in several scans. So the file must not have anything that could be
    the beginning of a scan of some of the layers only, or of a frame that is made of such scans.
    """
    layers = getattr(image, "layers", 0)  # of a JPEG
    starts = range(0, len(content), PIECE)
    if not layers or any(WHOLE.search(content, start, start + PIECE + 1) for start in starts):
        return False
    of_all = bytes([*SCAN, 6 + 2 * layers, layers])
    return _count(content, of_all) == _count(content, SCAN)


def _check_repetition(content: bytes) -> None:
    """Refuse a file of few bytes that would take minutes to decode."""
    for start, part, name, most in REPEATABLE:
        if content.startswith(start) and _count(content, part) > most:
            raise ImageError(f"The image has more than {most} {name}; save it anew, without them.")


def _count(content: bytes, part: bytes) -> int:
    """How often a `part` that cannot overlap itself is in there."""
    longer = PIECE + len(part) - 1
    return sum(content.count(part, start, start + longer) for start in range(0, len(content), PIECE))


def _scale_colour_key(image: Image.Image, content: bytes) -> None:
    """Bring a PNG's transparent colour to the 8 bits that its pixels have after decoding.

    Pillow leaves it as the file has it. Of 16-bit colours, whose low bytes are gone, all with its high
    bytes are then transparent.
    """
    key, depth = image.info.get("transparency"), content[PNG_DEPTH] if image.format == "PNG" else 8
    if image.mode == "L" and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif image.mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> (depth - 8) for value in key)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency over white, 16-bit grey scaled to 8 bits."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion differs between versions: some clip at 255.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        grey[grey == image.info.get("transparency", -1)] = 65535
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _square(image: Image.Image, size: tuple[float, float]) -> Image.Image:
    """The centred square of the image as 32x32 RGB; bicubic, which Pillow antialiases on reduction.

    The picture has the `size`, width and height; what there is beyond it is the decoder's.

    A large one is first averaged down to three to six times that side. That, and all that makes it
    RGB, is done in bands of rows: a small file can have many pixels, and no second copy is made of them.
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
    """Turn the `square` of an image as the image's EXIF orientation says."""
    try:
        orientation = image.getexif().get(Base.Orientation, 1)
    except ImageError:
        raise
    except Exception:  # of what is no EXIF Pillow raises nearly anything; the pixels are good
        return square
    if orientation != 1:
        square.getexif()[Base.Orientation] = orientation
        ImageOps.exif_transpose(square, in_place=True)
    return square
