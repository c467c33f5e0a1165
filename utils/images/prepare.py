"""A copy of a folder of images in one size: python -m utils.images.prepare SOURCE TARGET."""

import argparse
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from utils.images.pictures import LARGEST, find_images, read_image
from utils.profile import typed_path


def prepare(source: Path, target: Path, size: int) -> int:
    """Copy a folder of images to a new folder `target`, stretched to size×size, and count them.

    The copy is whole or not there: raises ValueError that names all that can't be, or OSError.
    """
    if not 1 <= size <= LARGEST:
        raise ValueError(f"size = {size}: must be 1 to {LARGEST} pixels")
    if target.exists():
        raise ValueError(f"target = {str(target)!r}: exists; name a new folder")
    images = {  # numbered, for names may be as long as a system allows
        Path(split, name, f"{number:06}.png"): path
        for split, classes in find_images(source).items()
        for name, paths in classes.items()
        for number, path in enumerate(paths)
    }
    refused = []
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="part-of-a-copy-") as folder:
        copy = Path(folder) / "copy"
        for new, path in tqdm(images.items(), unit="image"):
            (copy / new).parent.mkdir(parents=True, exist_ok=True)
            try:
                read_image(path).resize((size, size)).save(copy / new)
            except ValueError as error:
                refused.append(str(error))
        if refused:
            fault = f"{len(refused):,} of {len(images):,} images can't be kept:"
            raise ValueError("\n  ".join([fault, *refused]))
        copy.rename(target)
    return len(images)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # names of files, on Windows too
    parser = argparse.ArgumentParser(description="Stretch all images of a folder to one size.")
    parser.add_argument("source", type=typed_path, help="a folder of images; it stays as it is")
    parser.add_argument("target", type=typed_path, help="a folder that does not exist yet")
    parser.add_argument("--size", type=int, default=32, help="pixels a side (%(default)s)")
    chosen = parser.parse_args()
    try:
        print(f'{prepare(**vars(chosen)):,} images are ready: LAB_DATA="{chosen.target}"')
    except (ValueError, OSError) as error:
        sys.exit(f"{error}\nNothing was written to {chosen.target}.")
