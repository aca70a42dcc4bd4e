"""Writes the hostile files of this folder: ``python -m tests.serving.corpus.make``.

The files are committed, so that the tests do not depend on the Pillow and NumPy that wrote them; this
module shows how each was made. ``expected.toml`` has the service's answer to each.
"""

import gzip
import io
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

HERE = Path(__file__).parent
COMMAND = "touch hostile-pickle-ran"


class Call:
    """An object that pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def pickles() -> dict[str, bytes]:
    """Pickles that must all be refused, by file name."""
    data = np.zeros((2, 32, 32, 3), np.uint8)
    good = pickle.dumps({"data": data}, 4)
    head = good[: good.index(b"B", good.index(b"u1"))]  # up to the array's bytes
    shape = good.index(b"(K\x02K K K\x03t")

    def declared(*extents: bytes) -> bytes:
        return good[:shape] + b"(" + b"".join(extents) + b"t" + good[shape + 10 :]

    laughs = b"\x80\x02X\x03\x00\x00\x00lolq\x00"  # a string, then lists of ten times the one before
    for n in range(1, 40):
        laughs += b"]q%c(" % n + b"h%c" % (n - 1) * 10 + b"e"
    return {
        "reduce_os_system.pkl": pickle.dumps({"data": Call(os.system, COMMAND)}),
        "reduce_os_system_protocol_0.pkl": pickle.dumps(Call(os.system, COMMAND), 0),
        "reduce_eval.pkl": pickle.dumps({"data": Call(eval, f"__import__('os').system({COMMAND!r})")}),
        "reduce_getattr.pkl": pickle.dumps(Call(getattr, Call(__import__, "os"), "system")),
        "nested_global.pkl": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.tofile.x\x93.",
        "inst_os_system.pkl": b"\x80\x02(X%s%sios\nsystem\n."
        % (struct.pack("<I", len(COMMAND)), COMMAND.encode()),
        "obj_os_system.pkl": b"\x80\x02(cos\nsystem\nX%s%so."
        % (struct.pack("<I", len(COMMAND)), COMMAND.encode()),
        "persistent_id.pkl": b"\x80\x02Phostile\n.",
        "extension_registry.pkl": b"\x80\x02\x82\x01.",
        "memo_bomb.pkl": laughs + b".",
        "nested_lists.pkl": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "petabyte_shape.pkl": declared(*[b"J\x00\x00\x10\x00"] * 3),
        "overflowing_shape.pkl": declared(*[b"\x8a\x08" + b"\xff" * 7 + b"\x7f"] * 4),
        "negative_shape.pkl": declared(b"J\xff\xff\xff\xff", b"K ", b"K ", b"K\x03"),
        "declared_bytes.pkl": head + b"\x8e" + struct.pack("<Q", 2**62) + b"abc",
        "declared_frame.pkl": b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"]s.",
        "declared_long.pkl": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"1" * 100 + b".",
        "object_array.pkl": pickle.dumps({"data": np.array([Call(os.system, COMMAND)], object)}),
        "structured_array.pkl": pickle.dumps({"data": np.zeros(2, [("a", "u1"), ("b", "i8")])}),
        "wide_dtype.pkl": good.replace(b"\x8c\x02u1", b"\x8c\x0aV100000000"),
        "negative_strides.pkl": pickle.dumps({"data": data[::-1, ::-1]}),
        "float_data.pkl": pickle.dumps({"data": data.astype(np.float32)}),
        "no_images.pkl": pickle.dumps({"data": data[:0]}),
        "many_ids.pkl": pickle.dumps({"data": data, "ids": np.zeros(100_000, np.int8)}),
        "wide_text.pkl": pickle.dumps({"data": data, "text": "\U0001f600" + "a" * 2**16}),
        "nothing.pkl": b"\x80\x04N.",
        "truncated.pkl": good[: len(good) // 2],
        "empty.pkl": b"",
        "only_stop.pkl": b".",
        "gzip.pkl": gzip.compress(good, mtime=0),
        "torch_zip.pkl": _zip({"archive/data.pkl": good}),
        "random.pkl": np.random.default_rng(0).bytes(5000),
        "picture.pkl": _png(Image.new("RGB", (32, 32))),
    }


def images() -> dict[str, bytes]:
    """Images, and files that are not images, by file name."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    picture = Image.fromarray(noise)
    png, jpeg = _png(picture), _save(picture, "JPEG")
    palette = picture.quantize(16)
    palette.info["transparency"] = 3
    frames = [Image.fromarray(np.roll(noise, n)) for n in range(20)]
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "0" * 50_000_000, zip=True)
    html = b"<!doctype html><script>alert(1)</script>"
    return {
        "truncated.png": png[: len(png) // 2],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "one_pixel.png": _png(Image.new("RGB", (1, 1), "red")),
        "wide.png": _png(Image.new("RGB", (65500, 1), "blue")),
        "animated.gif": _save(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": _save(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "cmyk.jpg": _save(picture.convert("CMYK"), "JPEG"),
        "grey_16_bit.png": _png(Image.fromarray(noise[..., 0].astype(np.uint16) * 257)),
        "palette_with_transparency.png": _png(palette),
        "bomb_pixels.png": _blank_png(30_000, 30_000),
        "bomb_claimed_size.png": png_of(
            (b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
        )
        + _chunk(b"IDAT", zlib.compress(b"0"))
        + _chunk(b"IEND", b""),
        "bomb_text.png": _save(Image.new("RGB", (8, 8)), "PNG", pnginfo=text),
        "many_scans.jpg": many_scans(2000, 2000, 4_000),
        "many_exif_segments.jpg": jpeg[:2] + b"\xff\xe1\0\x09Exif\0\0a" * 5_000 + jpeg[2:],
        "many_profiles.png": png[:33]
        + _chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 2**20, 9)) * 50
        + png[33:],
        "many_comments.jpg": many_pieces("COM"),
        "many_application_segments.jpg": many_pieces("APP"),
        "many_comment_blocks.gif": many_pieces("GIF comment"),
        "zero_size.png": png_of((b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)), (b"IEND", b"")),
        "wrong_checksum.png": png[:40] + bytes([png[40] ^ 255]) + png[41:],
        "png_called.jpg": png,
        "jpeg_called.png": jpeg,
        "polyglot_html.png": png + html,
        "polyglot_zip.gif": _save(picture, "GIF") + _zip({"a.txt": b"a"}),
        "polyglot_script.gif": b"GIF89a/*" + b"\x00" * 20 + b"*/=1;alert(1)",
        "picture.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "page.html": html,
        "postscript.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\n",
        "picture.tiff": _save(picture, "TIFF"),
        "picture.ico": _save(picture.resize((32, 32)), "ICO"),
        "picture.ppm": _save(picture, "PPM"),
        "empty.png": b"",
        "random.jpg": b"\xff\xd8\xff\xe0" + np.random.default_rng(1).bytes(4000),
    }


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _png(image: Image.Image) -> bytes:
    return _save(image, "PNG", optimize=True)


def _zip(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def many_scans(width: int, height: int, count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated ``count`` times; each one goes over all pixels."""
    whole = _save(Image.new("L", (width, height)), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * count + whole[-2:]


def many_pieces(kind: str) -> bytes:
    """A small image with far more pieces of that kind around its pixels than any program writes."""
    image = Image.new("RGB", (32, 32))
    jpeg, png, gif = _save(image, "JPEG"), _png(image), _save(image, "GIF")
    frame = jpeg.index(b"\xff\xc0")
    picture = gif.index(b",")
    spoilt = zlib.compress(bytes(2**20 - 1), 9)[:-1]  # cut short, so Pillow does not count it as text
    return {
        "COM": jpeg[:2] + b"\xff\xfe\0\2" * 40_000 + jpeg[2:],
        "APP": jpeg[:2] + b"\xff\xe5\0\2" * 40_000 + jpeg[2:],
        "fill": jpeg[:2] + b"\xff" * 200_000 + jpeg[2:],
        "tables": jpeg[:2] + _segment(0xDB, (b"\0" + b"\1" * 64) * 1000) + jpeg[2:],
        "layers": jpeg[:frame]
        + _segment(0xC0, b"\x08\0\x20\0\x20\3" + b"\1\x11\0" * 20_000)
        + jpeg[frame:],
        "Photoshop": jpeg[:2]
        + _segment(0xED, b"Photoshop 3.0\0" + b"8BIM\1\1\0\0\0\0\0\0" * 2000)
        + jpeg[2:],
        "GIF comment": gif[:picture] + b"!\xfe" + b"\1a" * 60_000 + b"\0" + gif[picture:],
        "chunks": png[:33] + _chunk(b"prVt", b"") * 60_000 + png[33:],
        "zTXt": png[:33] + _chunk(b"zTXt", b"a\0\0" + spoilt) * 200 + png[33:],
        "iTXt": png[:33] + _chunk(b"iTXt", b"a\0\1\0\0\0" + spoilt) * 200 + png[33:],
    }[kind]


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 255, marker, 2 + len(content)) + content


def _blank_png(width: int, height: int) -> bytes:
    """A PNG of one bit per pixel, all of them equal, so that the file is small."""
    rows = zlib.compress(b"\x00" * (1 + width // 8) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return png_of((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))


def main() -> None:
    """Write all files."""
    for folder, files in (("pickles", pickles()), ("images", images())):
        (HERE / folder).mkdir(exist_ok=True)
        for name, content in files.items():
            (HERE / folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
