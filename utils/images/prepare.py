"""A folder of images: what is in it, and a copy at the network's size.

python -m utils.images.prepare SOURCE TARGET
"""

import argparse
import sys
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from utils.images.data import IMAGE_SIZE
from utils.images.pictures import read_image
from utils.store.files import typed_path

BUILT_IN = ("digits", "cifar10")
"""Data sets that are no folder."""


def find_images(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The files of a folder of images: split → class → paths, in the order of their names.

    Exactly train/<class>/<image> and test/<class>/<image> count. One printed line says how many
    other files and folders were skipped, and which. Raises ValueError where a split or a class is
    missing or empty, where the classes of the splits differ, and where there is only one.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    skipped: dict[str, list[str]] = defaultdict(list)

    def sift(path: Path, wanted: str) -> Iterator[Path]:
        for entry in sorted(path.iterdir(), key=lambda entry: _nfc(entry.name)):
            if (kind := _kind(entry)) == wanted:
                yield entry
            else:
                skipped[kind].append(str(entry.relative_to(folder)))

    for split in ("train", "test"):
        if not (folder / split).is_dir():
            missing = folder / split if folder.is_dir() else folder
            raise ValueError(f"data = {str(folder)!r}: no folder {missing}; {_hint(folder)}")
        found[split] = {}
        for path in sift(folder / split, "folder"):
            found[split].setdefault(_nfc(path.name), []).extend(sift(path, "image"))
    if skipped:
        kinds = (f"{len(names):,} {kind} ({_some(names)})" for kind, names in skipped.items())
        print(f"{folder}: skipped what is not <split>/<class>/<image>: {', '.join(kinds)}")
    _require_classes(folder, found["train"], found["test"])
    return found


def _kind(entry: Path) -> str:
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "folder"
    return "image" if entry.suffix.lower() in IMG_EXTENSIONS else "other file"


def _nfc(name: str) -> str:
    # A Mac may spell é as e and an accent; the same class has one name.
    return unicodedata.normalize("NFC", name)


def _some(names: list[str], most: int = 5) -> str:
    more = [f"{len(names) - most:,} more"] if len(names) > most else []
    return ", ".join(names[:most] + more)


def _hint(folder: Path) -> str:
    letters = "".join(filter(str.isalnum, folder.name.lower()))
    if letters in BUILT_IN:
        return f"the built-in images are data = {letters!r} in a profile, LAB_DATA is a folder"
    return "expected train/<class>/ and test/<class>/ with images in them"


def _require_classes(folder: Path, train: dict[str, list], test: dict[str, list]) -> None:
    for split, one, other in (("train", train, test), ("test", test, train)):
        if only := sorted(set(one) - set(other)):
            raise ValueError(
                f"data = {str(folder)!r}: only {split} has the classes {_some(only)}; both must "
                "have the same"
            )
        if empty := [name for name, paths in one.items() if not paths]:
            raise ValueError(
                f"data = {str(folder)!r}: no image in {split}/{empty[0]} itself; the endings of "
                f"images are {' '.join(IMG_EXTENSIONS)}"
            )
    if len(train) < 2:
        raise ValueError(
            f"data = {str(folder)!r}: must hold two classes or more, as train/<class>/<image>"
        )


def prepare(source: Path, target: Path) -> int:
    """Copy a folder of images to a new folder `target`, stretched to 32×32, and count them.

    The copy is whole or not there: raises ValueError that names each image that can't be kept,
    or where `target` exists or lies in `source`; OSError where it can't be written.
    """
    if target.exists():
        raise ValueError(f"target = {str(target)!r}: exists; name a new folder")
    if source.resolve() in target.resolve().parents:
        raise ValueError(f"target = {str(target)!r}: lies in the source; name a folder beside it")
    paths = [p for classes in find_images(source).values() for c in classes.values() for p in c]
    refused = []
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.part-") as folder:
        copy = Path(folder) / "copy"
        for path in tqdm(paths, unit="image"):
            # The old ending stays in the name: a.jpg and a.png may stand side by side.
            new = copy / path.relative_to(source).with_name(f"{path.name}.png")
            new.parent.mkdir(parents=True, exist_ok=True)
            try:
                read_image(path).resize((IMAGE_SIZE, IMAGE_SIZE)).save(new)
            except ValueError as error:
                refused.append(str(error))
        if refused:
            listed = "\n  ".join(refused)
            raise ValueError(
                f"{len(refused):,} of {len(paths):,} images can't be kept:\n  {listed}"
            )
        copy.rename(target)
    return len(paths)


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # names of files, on Windows too
    parser = argparse.ArgumentParser(
        description="Copy train/<class>/<image> and test/<class>/<image> to a new folder, "
        f"each image stretched to {IMAGE_SIZE}×{IMAGE_SIZE} pixels."
    )
    parser.add_argument("source", type=typed_path, help="a folder of images; it stays as it is")
    parser.add_argument("target", type=typed_path, help="a folder that does not exist yet")
    chosen = parser.parse_args()
    try:
        count = prepare(chosen.source, chosen.target)
    except (ValueError, OSError) as error:
        sys.exit(f"{error}\nNothing was written to {chosen.target}.")
    print(f'{count:,} images are ready: LAB_DATA="{chosen.target}"')


if __name__ == "__main__":
    main()
