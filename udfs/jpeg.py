"""A JPEG's size -> by how much its decode scales it down, and Pillow's decoder set to that.

What a tower looks at is some 224 pixels, so a photograph is decoded to a half, a quarter or an eighth of its sides: the inverse DCT makes
fewer pixels, and whatever reduces them further has less to do. One rule for every output of an image, whichever run.

Chosen by measurement (`python -m benchmarks.decode_part`): against Pillow's full decode and the reduction to 224 this takes .50 of the CPU
at 1 MP, .45 at 2, .30 at 4 and .29 at 12. simplejpeg is 5 to 15 % faster at the same factors and offers the eighths between, but its check of broken
files is either stricter than Pillow's or none; OpenCV scales alike and reads truncated files as whole; torchvision does not scale. Factors
between the powers of two save little (no SIMD code in libjpeg-turbo) and lie further from the full decode.
"""

from __future__ import annotations

from PIL import Image, JpegImagePlugin

SHORTER = 384  # pixels that the shorter side keeps: at 320 the mean cosine of CLIP ViT-B/16 to the full decode goes below .9991
LONGER = 512  # and the longer: pixel_statistics looks at so many
CHOICE = f"pillow-draft:{SHORTER}:{LONGER}"


def divisor(width: int, height: int) -> int:
    """(width, height as stored) -> 1, 2, 4 or 8: the sides of the decoded picture are the stored ones over that, rounded up."""
    return next(by for by in (8, 4, 2, 1) if by == 1 or (min(width, height) // by >= SHORTER and max(width, height) // by >= LONGER))


def scale(image: Image.Image, by: int) -> None:
    """Sets Pillow's decoder, before the pixels are loaded."""
    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    image.draft(None, (image.width // by, image.height // by))
