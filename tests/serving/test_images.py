import io
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from serving.errors import ImageError, TooLargeError
from serving.images import LARGE_PIXELS, SMALL_BYTES, LargeImageError, decode, is_small
from tests.serving.corpus.make import many_pieces, many_scans, png_of
from tests.serving.samples import encoded

LIMIT = 10**6


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_32x32_comes_through_pixel_by_pixel(images: npt.NDArray[np.uint8], kind: str) -> None:
    for pixels in images[:50]:
        np.testing.assert_array_equal(decode(encoded(pixels, kind), LIMIT), pixels)


def test_lossless_webp_comes_through_pixel_by_pixel(images: npt.NDArray[np.uint8]) -> None:
    content = encoded(images[0], "WEBP", lossless=True)
    np.testing.assert_array_equal(decode(content, LIMIT), images[0])


def test_jpeg_is_what_pillow_decodes(images: npt.NDArray[np.uint8]) -> None:
    content = encoded(images[0], "JPEG", quality=95)
    np.testing.assert_array_equal(decode(content, LIMIT), np.asarray(Image.open(io.BytesIO(content))))


def test_photograph_of_an_object_shrinks_back_to_it(images: npt.NDArray[np.uint8]) -> None:
    """A 24x enlargement, saved as JPEG, shrinks back to nearly the original image."""
    large = np.asarray(Image.fromarray(images[0]).resize((768, 768), Image.Resampling.BICUBIC))
    small = decode(encoded(large, "JPEG", quality=95), LIMIT)
    assert np.abs(small.astype(int) - images[0].astype(int)).mean() < 4


@pytest.mark.parametrize(
    ("options", "change", "large"),
    [
        ({}, (b"", b""), False),
        ({"subsampling": 0}, (b"", b""), False),
        ({"progressive": True}, (b"", b""), True),
        # A scan of one of three components, as in a file whose others have scans of their own.
        ({}, (b"\xff\xda\0\x0c\x03", b"\xff\xda\0\x08\x01"), True),
        # What a decoder may take for the start of another scan.
        ({}, (b"\xff\xdb", b"\xff\xfe\0\x06\xff\xda\0\x08\xff\xdb"), True),
    ],
)
def test_an_image_is_large_where_all_of_it_is_kept_in_memory(
    options: dict[str, Any], change: tuple[bytes, bytes], large: bool
) -> None:
    content = saved(plain((255, 0, 0), (2500, 2000)), "JPEG", **options).replace(*change, 1)
    if large:
        with pytest.raises(LargeImageError):
            decode(content, 10**7, LARGE_PIXELS)
    if not any(change):
        assert (decode(content, 10**7, None if large else LARGE_PIXELS) == [254, 0, 0]).all()
    elif not large:
        decode(content, 10**7, LARGE_PIXELS)


def test_a_good_image_is_not_called_damaged_for_want_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(saved(plain((255, 0, 0), (5000, 5000)), "PNG"))
    program = f"""
import resource
from pathlib import Path
from serving.images import decode
content = Path({str(path)!r}).read_bytes()
decode(content, {5000**2})
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, used + 2**24))
try:
    decode(content, {5000**2})
except MemoryError:
    print("no memory")
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout == "no memory\n"


@pytest.mark.parametrize("place", [2**20 - 1, 2**20, 2**21 - 2])
def test_what_makes_a_jpeg_large_is_found_wherever_it_is(place: int) -> None:
    head, rest = b"\xff\xd8", saved(plain((255, 0, 0), (2500, 2000)), "JPEG")[2:]
    comments = b""
    while len(head + comments) < place - 60_000:
        comments += b"\xff\xfe" + (50_002).to_bytes(2, "big") + bytes(50_000)
    left = place - len(head + comments) - 4
    comment = bytes(left) + b"\xff\xc2"  # the marker of a progressive frame
    content = head + comments + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + rest
    assert content.index(b"\xff\xc2") == place
    with pytest.raises(LargeImageError):
        decode(content, 10**7, LARGE_PIXELS)
    decode(content.replace(b"\xff\xc2", b"\0\0"), 10**7, LARGE_PIXELS)


@pytest.mark.parametrize("size", [(512, 512), (513, 513), (600, 513), (257, 300), (1100, 1031)])
def test_a_jpeg_is_scaled_from_its_own_edges(
    images: npt.NDArray[np.uint8], size: tuple[int, int]
) -> None:
    """Decoded at a fraction of its size, it has edge pixels that it fills only in part."""
    side, (width, height) = min(size), size
    left, top = (width - side) / 2, (height - side) / 2
    for pixels in images[:5]:
        large = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        content = saved(large, "JPEG", quality=90)
        whole = Image.open(io.BytesIO(content))
        box = (left, top, left + side, top + side)
        expected = np.asarray(whole.resize((32, 32), Image.Resampling.BICUBIC, box=box)).astype(int)
        assert np.abs(decode(content, 10**7) - expected).max() <= 5


def test_wide_image_is_cropped_in_the_middle() -> None:
    image = plain((255, 0, 0), (96, 32))
    image.paste((0, 0, 255), (32, 0, 64, 32))
    assert (decode(saved(image, "PNG"), LIMIT) == [0, 0, 255]).all()


def test_reduction_is_antialiased() -> None:
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(decode(encoded(stripes), LIMIT).astype(int) - 127).max() <= 8


@pytest.mark.parametrize("size", [(1500, 1200), (1201, 900), (97, 200), (3001, 2000)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16"])
def test_reduction_in_bands_is_that_of_the_whole(
    images: npt.NDArray[np.uint8], size: tuple[int, int], mode: str
) -> None:
    image = Image.fromarray(images[2]).resize(size, Image.Resampling.BILINEAR)
    expected = image
    if mode == "RGBA":
        image.putalpha(image.convert("L"))
        expected = Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB")
    elif mode == "P":
        image = image.quantize()
        expected = image.convert("RGB")
    elif mode == "I;16":
        grey = np.asarray(image.convert("L"))
        image, expected = Image.fromarray(grey * np.uint16(257)), Image.fromarray(grey).convert("RGB")
    side = min(size)
    box = ((size[0] - side) / 2, (size[1] - side) / 2, (size[0] + side) / 2, (size[1] + side) / 2)
    whole = expected.resize((32, 32), Image.Resampling.BICUBIC, box=box, reducing_gap=3)
    result = decode(saved(image, "PNG"), 10 * LIMIT).astype(int)
    assert abs(result - np.asarray(whole)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(images: npt.NDArray[np.uint8], orientation: int, kind: str) -> None:
    image = Image.fromarray(images[1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(image, kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    result = decode(content, LIMIT)
    np.testing.assert_array_equal(result, np.asarray(expected))
    assert (orientation == 1) == np.array_equal(result, decode(saved(image, kind), LIMIT))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_a_large_image(images: npt.NDArray[np.uint8], orientation: int) -> None:
    image = Image.fromarray(images[1]).resize((500, 701), Image.Resampling.BILINEAR)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(image, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    expected = decode(saved(upright, "PNG"), LIMIT).astype(int)
    assert abs(decode(content, LIMIT) - expected).max() <= 2


GREY = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (saved(Image.new("L", (32, 32), 200), "PNG"), (200, 200, 200)),
        (saved(Image.new("1", (32, 32), 1), "PNG"), (255, 255, 255)),
        (saved(plain((10, 20, 30)).quantize(4), "PNG"), (10, 20, 30)),
        (saved(plain((10, 20, 30)).quantize(4), "GIF"), (10, 20, 30)),
        (saved(plain((10, 20, 30)).convert("CMYK"), "JPEG", quality=100), (10, 20, 30)),
        (saved(Image.new("RGBA", (32, 32), (10, 20, 30, 0)), "PNG"), (255, 255, 255)),
        (saved(Image.new("RGBA", (32, 32), (0, 0, 0, 51)), "PNG"), (204, 204, 204)),
        (saved(Image.new("LA", (32, 32), (0, 51)), "PNG"), (204, 204, 204)),
        (saved(Image.new("RGBA", (32, 32), (0, 0, 0, 0)), "WEBP", lossless=True), (255,) * 3),
        (saved(plain((10, 20, 30)), "PNG", transparency=(10, 20, 30)), (255, 255, 255)),
        (saved(plain((9, 8, 7)).quantize(4), "GIF", transparency=0), (255, 255, 255)),
    ],
    ids=[
        *("grey", "1-bit", "palette", "gif", "cmyk", "transparent", "half transparent"),
        *("grey alpha", "webp alpha", "rgb colour key", "gif colour key"),
    ],
)
def test_modes(content: bytes, expected: tuple[int, int, int]) -> None:
    np.testing.assert_allclose(
        decode(content, LIMIT).astype(int), np.broadcast_to(expected, (32, 32, 3)), atol=3
    )


@pytest.mark.parametrize(
    ("depth", "colour", "values"),
    [
        *((1, "grey", (1, 0)), (2, "grey", (1, 2)), (4, "grey", (5, 9)), (8, "grey", (200, 99))),
        *((8, "RGB", (200, 99)), (16, "RGB", (0x1234, 0x3412))),
    ],
)
def test_a_transparent_colour_is_laid_over_white_at_any_depth(
    depth: int, colour: str, values: tuple[int, int]
) -> None:
    """The upper half of the image has the transparent colour, the lower half another one."""
    channels = 3 if colour == "RGB" else 1
    rows = []
    for value in values:
        bits = f"{value:0{depth}b}" * (32 * channels)
        rows += [b"\0" + int(bits, 2).to_bytes(len(bits) // 8)] * 16
    content = png_of(
        (b"IHDR", struct.pack(">IIBBBBB", 32, 32, depth, 2 if channels == 3 else 0, 0, 0, 0)),
        (b"tRNS", struct.pack(">H", values[0]) * channels),
        (b"IDAT", zlib.compress(b"".join(rows))),
        (b"IEND", b""),
    )
    pixels = decode(content, LIMIT)
    assert (pixels[:16] == 255).all()
    assert (pixels[16:] == (values[1] >> 8 if depth == 16 else values[1] * 255 // (2**depth - 1))).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"garbage!", b"II*\0", b"II+\0\x08\0\0\0"])
def test_what_is_no_exif_leaves_an_image_upright(kind: str, exif: bytes) -> None:
    content = saved(plain((0, 0, 200), (32, 48)), kind, exif=b"Exif\0\0" * (kind != "PNG") + exif)
    np.testing.assert_allclose(decode(content, LIMIT)[0, 0].astype(int), (0, 0, 200), atol=3)


def test_transparent_16_bit_grey_is_laid_over_white() -> None:
    grey = np.full((32, 32), 0x3333, np.uint16)
    grey[:16] += 1
    pixels = decode(saved(Image.fromarray(grey), "PNG", transparency=0x3334), LIMIT)
    assert (pixels[:16] == 255).all()
    assert (pixels[16:] == 0x33).all()


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    result = decode(saved(Image.fromarray(GREY), "PNG"), LIMIT)
    np.testing.assert_array_equal(result[..., 0], np.rint(GREY / 257))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [plain((200, 0, 0)), plain((0, 200, 0))]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_allclose(decode(content, LIMIT)[0, 0].astype(int), (200, 0, 0), atol=3)


@pytest.mark.parametrize("size", [(1, 1), (1, 32), (65500, 1), (33, 31), (7, 3)])
def test_any_size(size: tuple[int, int]) -> None:
    assert (decode(saved(plain((1, 2, 3), size), "PNG"), LIMIT) == [1, 2, 3]).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_file_is_an_error(images: npt.NDArray[np.uint8], kind: str) -> None:
    large = np.asarray(Image.fromarray(images[0]).resize((256, 256)))
    content = encoded(large, kind)
    with pytest.raises(ImageError):
        decode(content[: len(content) // 2], LIMIT)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        saved(plain((0, 0, 0)), "TIFF"),
        saved(plain((0, 0, 0)), "ICO"),
    ],
    ids=["empty", "text", "svg", "tiff", "ico"],
)
def test_other_formats_are_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="PNG, JPEG, WebP, GIF or BMP"):
        decode(content, LIMIT)


def test_too_many_pixels_are_refused_from_the_header() -> None:
    """A PNG that claims 60000x60000 pixels but has none: nothing needs to be decoded to refuse it."""
    content = bytearray(saved(plain((0, 0, 0)), "PNG"))
    content[16:24] = (60000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(TooLargeError, match="60000x60000 pixels; the limit is 1000000"):
        decode(bytes(content), LIMIT)


@pytest.mark.parametrize(("kind", "pixels"), [("PNG", LIMIT), ("WEBP", LIMIT // 4)])
def test_as_many_pixels_as_the_limit_are_taken(kind: str, pixels: int) -> None:
    assert (decode(saved(plain((0, 0, 0), (pixels // 400, 400)), kind), LIMIT) == 0).all()
    with pytest.raises(TooLargeError):
        decode(saved(plain((0, 0, 0), (pixels // 400, 401)), kind), LIMIT)


def test_the_limit_of_webp_is_told_beside_the_others() -> None:
    with pytest.raises(TooLargeError, match="250000 pixels in all for WebP, and 1000000 for other"):
        decode(saved(plain((0, 0, 0), (600, 600)), "WEBP"), LIMIT)


@pytest.mark.parametrize("size", [(65_535, 2), (65_536, 2), (2, 65_536)])
def test_a_side_that_is_too_long_is_refused(size: tuple[int, int]) -> None:
    content = saved(plain((255, 0, 0), size), "PNG")
    if max(size) <= 65_535:
        assert (decode(content, LIMIT) == [255, 0, 0]).all()
    else:
        with pytest.raises(TooLargeError, match=f"{size[0]}x{size[1]} .* a side is 65535"):
            decode(content, LIMIT)


def test_small_is_a_png_of_few_pixels_and_few_bytes() -> None:
    assert is_small(encoded(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)))
    assert is_small(saved(plain((0, 0, 0), (64, 64)), "PNG"))
    assert not is_small(saved(plain((0, 0, 0), (65, 64)), "PNG"))
    assert not is_small(saved(plain((0, 0, 0), (64, 65)), "PNG"))
    assert not is_small(saved(plain((0, 0, 0)), "PNG") + bytes(SMALL_BYTES))
    assert not is_small(saved(plain((0, 0, 0)), "JPEG"))


def test_a_second_header_makes_no_small_image() -> None:
    """Pillow goes by the last header: all the pixels it claims would be decoded on the event loop."""
    content, larger = saved(plain((0, 0, 0)), "PNG"), saved(plain((9, 9, 9), (300, 300)), "PNG")
    head = 33
    twice = content[:head] + larger[8:]
    assert decode(twice, LIMIT)[0, 0].tolist() == [9, 9, 9]
    assert not is_small(twice)
    assert not is_small(b"")


@given(st.binary(max_size=300))
def test_random_bytes_only_raise_our_error(content: bytes) -> None:
    with pytest.raises(ImageError):
        decode(content, LIMIT)


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), st.data())
def test_damaged_files_decode_or_raise_our_error(kind: str, data: st.DataObject) -> None:
    content = bytearray(encoded(np.full((40, 50, 3), 99, np.uint8), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ImageError, TooLargeError):  # no other error may come
        result = decode(bytes(content), LIMIT)
        assert result.shape == (32, 32, 3)
        assert result.dtype == np.uint8


def test_scans_are_limited_to_more_than_anybody_writes() -> None:
    more = 100 - many_scans(64, 48, 0).count(b"\xff\xda\0")
    assert (decode(many_scans(64, 48, more), LIMIT) == 0).all()
    with pytest.raises(ImageError, match="more than 100 scans; save it anew"):
        decode(many_scans(64, 48, more + 1), LIMIT)


def test_what_only_looks_like_scans_behind_an_image_is_no_hindrance(
    images: npt.NDArray[np.uint8],
) -> None:
    """Phones append a video to a photograph."""
    content = encoded(images[0], "JPEG")
    video = np.random.default_rng(0).bytes(8 * 2**20)
    assert video.count(b"\xff\xda") > 100
    np.testing.assert_array_equal(decode(content + video, LIMIT), decode(content, LIMIT))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        *((kind, "too many pieces") for kind in ("COM", "APP", "fill", "tables", "layers")),
        *((kind, "too many pieces") for kind in ("GIF comment", "chunks")),
        ("Photoshop", "more than 1000 Photoshop resources"),
        ("zTXt", "more than 100 compressed texts"),
        ("iTXt", "more than 100 international texts"),
    ],
)
def test_an_image_of_too_many_pieces_is_refused(kind: str, message: str) -> None:
    with pytest.raises(ImageError, match=f"{message}; save it anew"):
        decode(many_pieces(kind), LIMIT)


@pytest.mark.parametrize(
    ("kind", "side", "options"),
    [
        ("PNG", 3000, {"compress_level": 1}),
        ("JPEG", 3000, {"quality": 100}),
        ("JPEG", 2000, {"quality": 95, "progressive": True}),
        ("GIF", 1100, {}),
        ("BMP", 3000, {}),
        ("WEBP", 1500, {"quality": 100}),
    ],
)
def test_a_large_file_has_no_more_pieces_than_are_taken(
    kind: str, side: int, options: dict[str, object]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    content = encoded(noise, kind, **options)
    assert len(content) > 10**6
    assert decode(content, 10 * LIMIT).shape == (32, 32, 3)


def test_a_photograph_with_its_metadata_is_taken() -> None:
    """As phones write it: a preview, a colour profile in segments, a depth map in long segments."""
    image = plain((10, 20, 30))
    content = saved(image, "JPEG", quality=100, icc_profile=bytes(200_000), comment=bytes(60_000))
    long = b"\xff\xe1\xff\xffhttp://ns.adobe.com/xmp/extension/\0".ljust(2**16 + 1, b"a")
    whole = content[:2] + long * 300 + content[2:]
    np.testing.assert_array_equal(decode(whole, LIMIT), decode(saved(image, "JPEG", quality=100), LIMIT))


def test_a_png_in_the_smallest_pieces_that_libraries_write_is_taken() -> None:
    """libpng's pieces have 8 KiB; these have half of that, in a file as large as a body may be."""
    side = 4500
    rows = zlib.compress(np.zeros((side, 1 + 3 * side), np.uint8).tobytes(), 0)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))]
    chunks += [(b"IDAT", rows[start : start + 4096]) for start in range(0, len(rows), 4096)]
    content = png_of(*chunks, (b"IEND", b""))
    assert len(content) > 60 * 10**6
    assert (decode(content, 30 * LIMIT) == 0).all()
