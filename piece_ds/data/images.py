"""Find, check and read the image of a row.

A path in a row is looked up in this order:

1. the path itself, if it is absolute and exists;
2. the path below --image_dir (if not given: below the data file's folder), then ever shorter tails of it:
   "a/b/c.jpg", "b/c.jpg", "c.jpg";
3. the file name in any subfolder of --image_dir, if only one subfolder has it.
"""

import os
from pathlib import Path, PurePath

from PIL import Image, ImageOps, UnidentifiedImageError

from piece_ds.runtime.errors import UserError

# What PIL raises for files that are no images, are truncated, or decompress to more than it deems safe.
_BROKEN = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageFolder:
    """Finds images by the paths that rows give them."""

    def __init__(self, image_dir: str | None, data_file: str) -> None:
        """Set where to look.

        Args:
            image_dir: --image_dir, or None.
            data_file: file whose rows name the images.
        Raises:
            UserError: image_dir is no folder.
        """
        if image_dir is not None and not Path(image_dir).is_dir():
            raise UserError(f"--image_dir {image_dir}: no such folder")
        self.root = Path(image_dir or Path(data_file).parent)
        self._searched = image_dir is not None
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, path: str) -> Path | None:
        """Return the file that path means, or None if there is none. Raise UserError if two files may be meant."""
        # Data sets made on Windows have backslashes.
        given = PurePath(path.replace("\\", "/"))
        if given.is_absolute() and os.path.isfile(given):
            return Path(given)
        parts = given.relative_to(given.anchor).parts
        for start in range(len(parts)):
            candidate = self.root.joinpath(*parts[start:])
            if candidate.is_file():
                return candidate
        return self._in_subfolder(given.name) if self._searched else None

    def _in_subfolder(self, name: str) -> Path | None:
        if self._by_name is None:
            # One walk serves all rows.
            self._by_name = {}
            for folder, _, files in os.walk(self.root):
                for file in files:
                    self._by_name.setdefault(file, []).append(Path(folder, file))
        found = self._by_name.get(name, [])
        if len(found) > 1:
            raise UserError(
                f"--image_dir {self.root} holds {name} more than once ({found[0]}, {found[1]}): name the "
                "subfolder in the row"
            )
        return found[0] if found else None


def read_image(path: str | Path, where: str) -> Image.Image:
    """Return the image in RGB, upright as its EXIF data says.

    Args:
        path: of the file.
        where: file and row that name it, for the message.
    Raises:
        UserError: the image cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except _BROKEN as error:
        raise UserError(
            f"{where}: the image {path} cannot be read ({_reason(error)}); replace it, or leave such rows "
            "out with --skip_bad_images"
        ) from error


def check_header(path: str | Path, where: str) -> None:
    """Raise UserError unless the file begins like an image. Its pixels are not decoded."""
    try:
        with Image.open(path):
            pass
    except _BROKEN as error:
        raise UserError(
            f"{where}: the image {path} cannot be read ({_reason(error)}); replace it, or leave such rows "
            "out with --skip_bad_images"
        ) from error


def _reason(error: Exception) -> str:
    return "no image file" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]
