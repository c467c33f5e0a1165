"""One picture as 8-bit RGB, or why it can't be one. Without torch, for `export` runs without it."""

import re
from pathlib import Path

from PIL import Image, ImageOps


def read_image(path: Path) -> Image.Image:
    """The picture in a file as 8-bit RGB, turned upright as its EXIF data say.

    Raises ValueError, naming the file, for what is no readable image and for what 8-bit RGB can't
    hold: more bits, other colour spaces, transparency, several pictures.
    """
    try:
        with Image.open(path) as image:
            if lost := _lost_as_rgb(image):
                raise ValueError(f"8-bit RGB can't hold its {lost}; save an 8-bit RGB copy of it")
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # a damaged file makes Pillow raise all kinds, TypeError among them
        raise ValueError(f"{path}: not a usable image ({error})") from None
    picture.info.clear()  # a colour once marked as transparent is none in a copy
    return picture


def _lost_as_rgb(image: Image.Image) -> str:
    """What converting an opened image to 8-bit RGB would lose, or ""."""
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        return f"pixel format {image.mode!r}"
    if re.search(";16[BLN]", str(image.tile)):  # Pillow would keep 8 of the 16, without a word
        return "16 bits a colour"
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # there it is a preview
        return "several pictures"
    if "A" in image.getbands() or "transparency" in image.info:
        lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
        if lowest < 255:
            return "transparency"
    return ""
