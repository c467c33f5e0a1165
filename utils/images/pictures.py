"""Pictures in files: those of a folder, and one as 8-bit RGB. Without torch, as `export` runs."""

import re
import unicodedata
from pathlib import Path

from PIL import Image, ImageOps

LARGEST = 256  # pixels a side: a photo of a camera would take 36 MB, and a training step minutes
ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
HIDDEN = (".", "__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")  # so begins what systems leave
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that are no UTF-8, ends of lines


def find_images(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The files of a folder of images: split → class → paths, in the order of their names.

    Exactly train/<class>/<image> and test/<class>/<image> count; a printed line says what else
    there is. Raises ValueError unless both splits have images of the same two or more classes.
    """
    found: dict[str, dict[str, list[Path]]] = {"train": {}, "test": {}}
    skipped = []
    paths = [p for split in found for depth in ("*", "*/*") for p in (folder / split).glob(depth)]
    for path in sorted(paths, key=lambda path: (_nfc(str(path)), str(path))):
        split, name, *file = path.relative_to(folder).parts
        if any(part.startswith(HIDDEN) for part in (name, *file)):
            continue
        if path.is_dir() and not file:
            found[split].setdefault(_nfc(name), [])
        elif file and path.suffix.lower() in ENDINGS and not path.is_dir():
            found[split][_nfc(name)].append(path)
        else:
            skipped.append(str(path.relative_to(folder)))
    if skipped:
        no_image = f"skipped {len(skipped):,} that are no <split>/<class>/<image>, among them"
        print(f"{folder}: {no_image} {skipped[:5]}")
    names = sorted(found["train"].keys() | found["test"].keys())
    for name in names:
        if not name.strip() or {unicodedata.category(c) for c in name} & UNPRINTABLE:
            raise ValueError(
                f"data = {str(folder)!r}: {name!r} can't be the name of a class (spaces alone, or "
                "what can't be printed); rename the folder in train and test"
            )
    empty = [f"{split}/{name}" for split in found for name in names if not found[split].get(name)]
    if empty or len(names) < 2:
        missing = ", ".join(empty[:5]) or folder / "train/<class>"
        raise ValueError(
            f"data = {str(folder)!r}: no image in {missing}; must hold train/<class>/<image> and "
            "test/<class>/<image>, the same two or more classes in both, and images end in "
            f"{' '.join(ENDINGS)}. The built-in images are data = 'digits' and data = 'cifar10' in "
            "a profile; LAB_DATA is a folder"
        )
    return found


def _nfc(name: str) -> str:
    # A Mac may spell é as e and an accent; the same class has one name.
    return unicodedata.normalize("NFC", name)


def read_image(path: Path) -> Image.Image:
    """The picture in a file as 8-bit RGB, turned upright as its EXIF data say.

    Raises ValueError, naming the file, for what is no image or more than 8-bit RGB can hold.
    """
    try:
        with Image.open(path) as image:
            if lost := _lost_as_rgb(image):
                raise ValueError(f"8-bit RGB can't hold its {lost}; save an 8-bit RGB copy of it")
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # a damaged file makes Pillow raise all kinds, TypeError among them
        raise ValueError(f"{path}: can't be used as an image ({error})") from None
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
    may_be_seen_through = "A" in image.getbands() or "transparency" in image.info
    if may_be_seen_through and image.convert("RGBA").getextrema()[3][0] < 255:
        return "transparency"
    return ""
