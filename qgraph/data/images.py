"""Images as samples: a folder of files, decoded one by one while they are used.

A pixel p of 0..255 becomes (p * scale - mean) / std, in float32, for each channel in the order of `color`. What the
model's input fixes (size, layout, channels, number type, images per sample) is taken from it and told.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import field_validator, model_validator

from qgraph import errors
from qgraph.data import specs, states
from qgraph.data.infos import Array, InputInfo, fail
from qgraph.data.opened import Located, Opened, Progress, joined

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
CHANNELS = (1, 3)
Triple = tuple[float, ...]
VALUES: dict[str, tuple[float, Triple, Triple]] = {
    "0..255": (1.0, (0.0,), (1.0,)),
    "0..1": (1 / 255, (0.0,), (1.0,)),
    "-1..1": (1 / 127.5, (1.0,), (1.0,)),
    # torchvision's reference classification presets
    "imagenet": (1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Common ranges as (scale, mean, std); `imagenet` is in the order red, green, blue."""


class Images(specs.Spec):
    """A folder of images (subfolders included, in the order of their paths), or one image file."""

    input: str = ""
    """The model's input that gets them; needed where several could."""
    size: tuple[int, ...] | None = None
    """Height and width, or one number for both; needed where the model leaves them open."""
    fit: Literal["crop", "stretch", "pad"] = "crop"
    """Cut the centre out, change the proportions, or add black borders."""
    resize: int | None = None
    """With fit=crop: the shorter side before the cut, e.g. 256 with size=224. Default: no more is cut than must be."""
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] = "bilinear"
    values: Literal["0..255", "0..1", "-1..1", "imagenet"] | None = None
    """A common range, instead of scale, mean and std."""
    scale: float | None = None
    mean: Triple | None = None
    std: Triple | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    """Where channels stand; needed where the model's shape does not tell."""
    color: Literal["rgb", "bgr", "gray"] | None = None
    """Default: rgb, or gray where the model takes one channel."""

    @field_validator("size", mode="before")
    @classmethod
    def _sides(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [specs.whole(side) for side in value.lower().split("x")]
        sides = [value] if isinstance(value, int) else value
        if not isinstance(sides, list | tuple):
            return sides
        return tuple(sides) * 2 if len(sides) == 1 else tuple(sides)

    @field_validator("size")
    @classmethod
    def _two(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (len(value) != 2 or min(value) < 1):
            raise ValueError("a size is one number, or HEIGHTxWIDTH")
        return value

    @field_validator("resize", "seed", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return specs.whole(value)

    @field_validator("scale", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return specs.number(value)

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        parts = parts if isinstance(parts, list | tuple) else [parts]
        return None if value is None else tuple(specs.number(part) for part in parts)

    @model_validator(mode="after")
    def _consistent(self) -> Images:
        if self.values is not None and (self.scale, self.mean, self.std) != (None, None, None):
            raise ValueError("values stands for scale, mean and std: give it or them")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None and len(numbers) not in CHANNELS:
                raise ValueError(f"{name} is one number or three, found {len(numbers)}")
        if self.std is not None and 0 in self.std:
            raise ValueError("std divides: it must not be 0")
        if self.resize is not None and (self.fit != "crop" or self.resize < 1):
            raise ValueError("resize is the shorter side before fit=crop, at least 1")
        return self


@dataclass(frozen=True, slots=True)
class _Resolved:
    """All that decides a sample's bytes, with nothing left to be inferred."""

    info: InputInfo
    height: int
    width: int
    layout: str
    color: str
    has_batch: bool
    at_once: int
    scale: float
    mean: Triple
    std: Triple
    fit: str
    resize: int | None
    interpolation: str

    def __str__(self) -> str:
        taken = f", {self.at_once} per sample" if self.at_once > 1 else ""
        cut = f"{self.fit}{f' after {self.resize}' if self.resize else ''}"
        return (
            f"{self.height}x{self.width} ({cut}, {self.interpolation}), {self.layout}, {self.color}, "
            f"{self.info.dtype}, scale {self.scale:.6g}, mean {_shown(self.mean)}, std {_shown(self.std)}{taken}"
        )

    def array(self, image: Any) -> Array:
        """Pixels in the input's type; [1,C,H,W] or [1,H,W,C], without the 1 where the input has no batch axis."""
        pixels = np.asarray(_fitted(image, self), dtype=np.float32)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if self.color == "bgr":
            pixels = pixels[..., ::-1]
        std = np.array(self.std, np.float64)
        factor = (self.scale / std).astype(np.float32)
        shift = (np.array(self.mean, np.float64) / std).astype(np.float32)
        result = pixels * factor - shift
        if self.info.dtype.kind in "iu":
            held = np.iinfo(self.info.dtype)
            if result.min() < held.min or result.max() > held.max:
                found = f"values {result.min():g} … {result.max():g} do not fit {self.info.dtype}"
                fail("QG114", f"input {self.info}", found, "change values, scale or mean")
            result = np.rint(result)
        if self.layout == "nchw":
            result = result.transpose(2, 0, 1)
        result = np.ascontiguousarray(result, dtype=self.info.dtype)
        return result[None] if self.has_batch else result


def open_images(
    spec: Images, inputs: Sequence[InputInfo], samples: int | None, progress: Progress
) -> Opened:
    """Find the files, check them by their headers and say how they become samples."""
    pillow = _pillow()
    resolved = _resolve(spec, inputs)
    found = paths(Path(spec.path))
    if not found:
        fail("QG111", spec.path, "holds no images", f"known: {', '.join(SUFFIXES)}")
    whole = len(found) // resolved.at_once
    if not whole:
        message = f"{len(found)} images are fewer than one sample takes: {resolved.at_once}"
        fail("QG119", spec.path, message, "add images")
    used = [
        found[at * resolved.at_once + offset]
        for at in spec.chosen(whole, samples)
        for offset in range(resolved.at_once)
    ]
    sha = hashlib.sha256(f"images\0{importlib.metadata.version('pillow')}\0{resolved!r}".encode())
    for index, path in enumerate(used):
        progress(f"reading {spec.path}", index / len(used))
        sha.update(_checked(pillow, path))

    def read() -> Located:
        each = ((str(p), {resolved.info.name: _decoded(pillow, p, resolved)}) for p in used)
        return joined(each, resolved.at_once)

    notes = [errors.Diagnostic("note", "QG152", f"input {resolved.info}", f"gets {resolved}")]
    count = len(used) // resolved.at_once
    if count < whole:
        message = f"{count} of {whole} samples are used ({spec.choose})"
        notes.append(errors.Diagnostic("note", "QG154", spec.path, message))
    return Opened(spec.path, read, count, sha.digest(), tuple(notes))


def paths(place: Path) -> list[Path]:
    """The images of a folder and of the folders in it, in the order of their paths."""
    if place.is_file():
        return [place]
    return sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _resolve(spec: Images, inputs: Sequence[InputInfo]) -> _Resolved:
    info = _image_input(spec, inputs)
    shape = info.shape or ()
    has_batch = len(shape) == 4
    c_first, c_last = (shape[-3], shape[-1])
    layout = spec.layout
    if layout is None:
        if (c_first in CHANNELS) == (c_last in CHANNELS):
            fail(
                "QG152",
                f"input {info}",
                "its shape does not tell the layout",
                "give layout=nchw or nhwc",
            )
        layout = "nchw" if c_first in CHANNELS else "nhwc"
    channels, *sides = shape[-3:] if layout == "nchw" else (c_last, *shape[-3:-1])
    color = spec.color or ("gray" if channels == 1 else "rgb")
    if isinstance(channels, int) and channels != (1 if color == "gray" else 3):
        found = f"takes {channels} channels in {layout}, and color is {color}"
        fail("QG152", f"input {info}", found, "change layout or color")
    size = []
    for axis, side in enumerate(sides):
        told = spec.size[axis] if spec.size else None
        if isinstance(side, int) and told not in (None, side):
            shown = "x".join(map(str, spec.size or ()))
            fail("QG116", f"input {info}", f"takes {side}, and size is {shown}", "leave size out")
        if not isinstance(side, int) and told is None:
            fail(
                "QG152", f"input {info}", "leaves height or width open", "give size=224 or size=HxW"
            )
        size.append(side if isinstance(side, int) else told or 0)
    if spec.resize is not None and spec.resize < max(size):
        fail(
            "QG150",
            "Images.resize",
            f"{spec.resize} is less than size {max(size)}",
            "resize first, then cut",
        )
    scale, mean, std = _range(spec, info, color)
    at_once = shape[0] if has_batch and isinstance(shape[0], int) else 1
    return _Resolved(
        info=info,
        height=size[0],
        width=size[1],
        layout=layout,
        color=color,
        has_batch=has_batch,
        at_once=at_once or 1,
        scale=scale,
        mean=mean,
        std=std,
        fit=spec.fit,
        resize=spec.resize,
        interpolation=spec.interpolation,
    )


def _image_input(spec: Images, inputs: Sequence[InputInfo]) -> InputInfo:
    known = [i.name for i in inputs]
    if spec.input and spec.input not in known:
        fail(
            "QG150",
            "Images.input",
            f"{spec.input!r} is no input of the model",
            errors.nearest(spec.input, known),
        )
    needed = states.required(inputs)
    found = [i for i in needed if i.shape is not None and len(i.shape) in (3, 4)]
    found = [i for i in found if i.name == spec.input] if spec.input else found
    if len(found) != 1 or len(needed) != 1:
        shown = ", ".join(map(str, needed))
        others = (
            "only one input can get images" if len(found) == 1 else "no single input takes images"
        )
        hint = (
            "give input=NAME"
            if len(found) > 1 and len(needed) == 1
            else "feed them with FILE.py:FUNCTION"
        )
        fail("QG152", spec.path, f"{others}; the model takes {shown}", hint)
    if found[0].dtype.kind in "bOSU":
        fail("QG152", f"input {found[0]}", "takes no pixels", "images become numbers")
    return found[0]


def _range(spec: Images, info: InputInfo, color: str) -> tuple[float, Triple, Triple]:
    is_said = any(each is not None for each in (spec.values, spec.scale, spec.mean, spec.std))
    if not is_said and info.dtype != np.uint8:
        hint = "give values=0..1, -1..1, 0..255 or imagenet; or scale=1/255,mean=...,std=..."
        fail(
            "QG150",
            f"input {info}",
            "what pixels become is not said, and a model does not tell",
            hint,
        )
    scale, mean, std = VALUES[spec.values or "0..255"]
    if spec.values == "imagenet" and color == "bgr":
        mean, std = mean[::-1], std[::-1]
    if spec.values is None:
        scale = 1.0 if spec.scale is None else spec.scale
        mean, std = spec.mean or mean, spec.std or std
    if color == "gray" and max(len(mean), len(std)) > 1:
        fail("QG150", f"input {info}", "takes gray, and mean or std has three numbers", "give one")
    return scale, mean, std


def _fitted(image: Any, to: _Resolved) -> Any:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image).convert("L" if to.color == "gray" else "RGB")
    method = Image.Resampling[to.interpolation.upper()]
    size, (width, height) = (to.width, to.height), upright.size
    if to.fit == "stretch":
        return upright.resize(size, method)
    if to.fit == "pad":
        ratio = min(to.width / width, to.height / height)
        inner = (max(1, round(width * ratio)), max(1, round(height * ratio)))
        canvas = Image.new(upright.mode, size)
        canvas.paste(
            upright.resize(inner, method), ((to.width - inner[0]) // 2, (to.height - inner[1]) // 2)
        )
        return canvas
    ratio = max(to.width / width, to.height / height)
    if to.resize is not None:
        ratio = max(to.resize / min(width, height), ratio)
    left, top = (width - to.width / ratio) / 2, (height - to.height / ratio) / 2
    # One step: only the part that stays is resized.
    return upright.resize(
        size,
        method,
        box=(max(left, 0), max(top, 0), min(width - left, width), min(height - top, height)),
    )


def _checked(pillow: Any, path: Path) -> bytes:
    """The SHA-256 of the file's bytes, after a look at its header."""
    with _reading(path):
        content = path.read_bytes()
        with pillow.open(io.BytesIO(content)) as image:
            if image.mode in ("F", "I") or image.mode.startswith("I;"):
                raise ValueError(f"pixels of mode {image.mode}, not 8 bits for each channel")
    return hashlib.sha256(content).digest()


def _decoded(pillow: Any, path: Path, to: _Resolved) -> Array:
    with _reading(path), pillow.open(path) as image:
        return to.array(image)


@contextlib.contextmanager
def _reading(path: Path) -> Generator[None]:
    from PIL import Image

    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        fail(
            "QG112",
            str(path),
            f"cannot be read: {e}",
            "convert it to a JPEG or PNG, or remove it",
            e,
        )


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        fail(
            "QG151",
            "images",
            "are read with Pillow, which is not installed",
            "pip install 'qgraph[images]'",
            e,
        )
    return Image


def _shown(numbers: Triple) -> str:
    return " ".join(f"{n:.6g}" for n in numbers)
