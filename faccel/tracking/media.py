"""From the images, tables and figures of a user to what trackers write: arrays, rows and PNG."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from faccel.errors import ConfigError, short_repr
from faccel.tracking.tracker import Cell
from faccel.tracking.values import full_tensor_of, to_json

_PNG_COLORS = {1: 0, 3: 2, 4: 6}
LAYOUTS = ("HWC", "CHW")


def image_array(images: object, layout: str = "HWC") -> np.ndarray:
    """Return images as `uint8[n, h, w, c]` of NumPy, with 1, 3 or 4 channels.

    Effects: ambient. Waits for the device of a tensor.

    Args:
        images: A tensor or an array of four dimensions: uint8, bool, or floats between 0 and 1.
        layout: `"HWC"` for `[n, h, w, c]`, `"CHW"` for `[n, c, h, w]`.

    Raises:
        ConfigError: The shape, the dtype or a value is invalid.

    Examples:
        >>> image_array(torch.ones(2, 3, 4, 5), "CHW").shape
        (2, 4, 5, 3)
        >>> image_array(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 1, 3, 1)).ravel().tolist()
        [0, 128, 255]
    """
    array = _numpy_array(images)
    if array.ndim != 4:
        raise ConfigError(
            "the images must have four dimensions",
            got=f"shape {array.shape}",
            fix="write `images[None]` for one image",
        )
    if layout == "CHW":
        array = array.transpose(0, 2, 3, 1)
    if array.shape[3] not in _PNG_COLORS:
        raise ConfigError(
            "the images must have 1, 3 or 4 channels",
            got=f"{array.shape[3]} channels with `layout={short_repr(layout)}`",
            fix=_layout_fix(array, layout),
        )
    return _as_uint8(array)


def _numpy_array(images: object) -> np.ndarray:
    if isinstance(images, torch.Tensor):
        tensor = full_tensor_of(images).detach()
        if tensor.is_floating_point():
            tensor = tensor.float()  # NumPy has no bfloat16
        return tensor.cpu().numpy()
    # One array of the user's images if they have one size.
    if isinstance(images, Sequence) and images and isinstance(images[0], torch.Tensor):
        return np.stack([_numpy_array(image) for image in images])
    return np.asarray(images)


def _layout_fix(array: np.ndarray, layout: str) -> str:
    # `array` is in the layout HWC: of images in the other one, its channels are elsewhere.
    if layout == "HWC" and array.shape[1] in _PNG_COLORS:
        return 'pass `layout="CHW"`'
    if layout == "CHW" and array.shape[2] in _PNG_COLORS:
        return 'pass `layout="HWC"`'
    return "select the channels, as in `images[..., :3]`"


def _as_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return np.ascontiguousarray(array * np.uint8(255))
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(
            "the images must be uint8, or floats between 0 and 1",
            got=f"dtype {array.dtype}",
            fix="convert values of 0 to 255 with `images.to(torch.uint8)`",
        )
    if array.size == 0:
        return array.astype(np.uint8)
    low, high = float(array.min()), float(array.max())
    # NaN compares as false
    if not (low >= 0 and high <= 1):
        raise ConfigError(
            "the images must be uint8, or floats between 0 and 1",
            got=f"values from {low:.4g} to {high:.4g}",
            fix="scale them, as in `(images - images.min()) / (images.max() - images.min())`",
        )
    # `rint` rounds half to even, as torchvision and PIL do not: add a half and cut.
    return np.ascontiguousarray((array * 255 + 0.5).astype(np.uint8))


def image_of(image: np.ndarray) -> np.ndarray:
    """Return one image without its channel if it has only one, as Pillow expects.

    Effects: pure.

    Examples:
        >>> image_of(np.zeros((4, 5, 1))).shape, image_of(np.zeros((4, 5, 3))).shape
        ((4, 5), (4, 5, 3))
    """
    if image.shape[-1] == 1:
        return image[..., 0]
    return image


def named_images(name: str, images: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a name and the image, for trackers in which a name is one image.

    Effects: pure.

    Examples:
        >>> [label for label, _ in named_images("digits", np.zeros((2, 4, 4, 1)))]
        ['digits/0', 'digits/1']
        >>> [label for label, _ in named_images("digits", np.zeros((1, 4, 4, 1)))]
        ['digits']
    """
    if len(images) == 1:
        yield name, images[0]
        return
    for index, image in enumerate(images):
        yield f"{name}/{index}", image


def quoted(name: str) -> str:
    """Return the name of a file for any name.

    Effects: pure.

    Examples:
        >>> quoted("val/samples"), quoted("../x")
        ('val%2Fsamples', '..%2Fx')
    """
    # A name such as "val/samples" must not name a folder, and "../x" not leave this one.
    return quote(name, safe="")


def copy_file(path: Path, folder: Path, name: str) -> Path:
    """Copy a file into a folder, which is created, under a quoted name.

    Effects: ambient. Writes the copy.

    Returns:
        The path of the copy.

    Raises:
        OSError: The file cannot be read, or the folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    copy = folder / quoted(name)
    shutil.copyfile(path, copy)
    return copy


def png(image: np.ndarray) -> bytes:
    r"""Return an image, `uint8[h, w, c]`, as a PNG file.

    Effects: pure. The format is specified at https://www.w3.org/TR/png-3. Without Pillow, which
    is not a dependency of faccel.

    Examples:
        >>> png(np.zeros((1, 1, 3), np.uint8))[:8]
        b'\x89PNG\r\n\x1a\n'
    """
    height, width, channels = image.shape
    # Bit depth 8; deflate, adaptive filters, no interlacing are 0.
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLORS[channels], 0, 0, 0)
    # Each row starts with the number of its filter: 0, none.
    rows = np.zeros((height, 1 + width * channels), np.uint8)
    rows[:, 1:] = image.reshape(height, width * channels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    data = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in chunks:
        checksum = zlib.crc32(kind + content)
        data.append(struct.pack(">I", len(content)) + kind + content)
        data.append(struct.pack(">I", checksum))
    return b"".join(data)


def figure_array(figure: Any) -> np.ndarray:
    """Return a figure of matplotlib as an image, `uint8[1, h, w, 4]`.

    Effects: ambient. Draws the figure, which matplotlib caches in it.

    Raises:
        ConfigError: It is not a figure of matplotlib.
    """
    if not hasattr(figure, "savefig"):
        raise ConfigError(
            "the tracker records figures of matplotlib",
            got=f"an object of type {type(figure).__name__}",
            fix="pass a `matplotlib.figure.Figure`, or record `figure.write_html(path)` as a file",
        )
    # matplotlib depends on Pillow.
    from PIL import Image

    # As a file: the size of the pixels depends on settings such as "savefig.bbox".
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGBA"))[None]


def table_rows(table: Any) -> tuple[list[str], list[list[Cell]]]:
    """Return the names of the columns and the rows of a table.

    Effects: ambient. Waits for the device of tensors.

    Args:
        table: A mapping from columns to equally many values, a sequence of mappings (the rows), or
            a `DataFrame` of pandas or polars.

    Raises:
        ConfigError: It is something else, or its columns have different lengths.

    Examples:
        >>> table_rows({"text": ["a", "b"], "score": torch.tensor([1.0, 0.5])})
        (['text', 'score'], [['a', 1.0], ['b', 0.5]])
        >>> table_rows([{"text": "a"}, {"text": "b", "score": 3}])
        (['text', 'score'], [['a', None], ['b', 3]])
    """
    if isinstance(table, Mapping):
        return _rows_of_columns(table)
    # A DataFrame iterates over its columns, and each of them has `tolist` or `to_list`.
    if hasattr(table, "columns") and hasattr(table, "__getitem__"):
        return _rows_of_columns({name: list(table[name]) for name in table.columns})
    # A str is a sequence of letters.
    rows: Any = ()
    if isinstance(table, Sequence) and not isinstance(table, str | bytes):
        rows = table
    is_rows = table is rows and all(isinstance(row, Mapping) for row in rows)
    if not is_rows:
        raise ConfigError(
            "the table must have named columns",
            got=f"an object of type {type(table).__name__}",
            fix='write `{"text": ["a", "b"], "score": [1.0, 0.5]}`',
        )
    # A dict keeps the order of the first appearance.
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    return [str(name) for name in columns], cells


def _rows_of_columns(table: Mapping[Any, Any]) -> tuple[list[str], list[list[Cell]]]:
    columns: list[list[Cell]] = []
    for name, values in table.items():
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise ConfigError(
                f"the column `{name}` of the table must be a list of values",
                got=short_repr(values),
                fix=f'write `"{name}": [value]`',
            )
        columns.append([_cell(value) for value in values])
    lengths = {len(column) for column in columns}
    if len(lengths) > 1:
        raise ConfigError(
            "the columns of the table must have equally many values",
            got=", ".join(f"{name}: {len(values)}" for name, values in table.items()),
            fix="add None where a value is missing",
        )
    return [str(name) for name in table], [list(row) for row in zip(*columns, strict=True)]


def _cell(value: Any) -> Cell:
    plain = to_json(value)  # a tensor of no dimensions is a number
    if plain is None or isinstance(plain, str | int | float):
        return plain
    return str(plain)


def end_last_line(path: Path) -> None:
    """End a line that a killed process has written in part, so that the next one is separate.

    Effects: ambient. Appends to the file.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, 2)  # from the end
        if file.read(1) != b"\n":
            file.write(b"\n")
