"""Budgets: how large, how many bits per weight, or how slow a model may be at most."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, field_validator

UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
}  # fmt: skip
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(x|ms|s)\s*")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


def size(text: str | int) -> int:
    """Bytes: "4.5MB" is 4500000, "4.5MiB" is 4718592, and a bare number counts bytes.

    >>> size("1.5kB"), size("1KiB"), size(7)
    (1500, 1024, 7)

    Raises:
        ValueError: what is wrong with the text.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(
            f"{text!r} is no size: write bytes or a number with kB, MB, GB, KiB, MiB or GiB"
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


@dataclass(frozen=True, slots=True)
class Latency:
    """A limit of time: a share of the float model's, or seconds; the other is 0."""

    ratio: float = 0.0
    seconds: float = 0.0


def latency(text: str) -> Latency:
    """A limit of time: "0.8x" of the float model's, "12ms" or "0.5s" of one run.

    >>> latency("0.8x").ratio, latency("12ms").seconds
    (0.8, 0.012)

    Raises:
        ValueError: what is wrong with the text.
    """
    match = _TIME.fullmatch(text)
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is no time: write 0.8x (of the float model's), 12ms or 0.5s")
    value = float(match[1])
    if match[2] == "x":
        return Latency(ratio=value)
    return Latency(seconds=value * (1e-3 if match[2] == "ms" else 1.0))


class Budget(BaseModel):
    """What the weights with choices may take. Zero, or an empty text, is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_size: str | int = 0
    """Of the written file with its external data: bytes, or "4.5MB"."""
    avg_bits: float = 0.0
    """Stored bits per element, scales, zero points and padding included, over the weights with choices."""
    max_latency: str = ""
    """Of one run of the sample of middle size in one thread on this machine: "0.8x" of the float model's, or "12ms"."""
    tie_readers: bool | None = None
    """Products that read the same tensor share a format; left out, where the target fuses them."""

    @field_validator("max_size")
    @classmethod
    def _is_size(cls, value: str | int) -> str | int:
        size(value or 0)
        return value

    @field_validator("max_latency")
    @classmethod
    def _is_time(cls, value: str) -> str:
        if value:
            latency(value)
        return value

    @field_validator("avg_bits")
    @classmethod
    def _is_positive(cls, value: float) -> float:
        if not 0 <= value < float("inf"):
            raise ValueError(f"a positive number of bits expected, found {value!r}")
        return value

    @field_validator("avg_bits", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return float(value) if isinstance(value, int) else value

    @property
    def max_bytes(self) -> int:
        """`max_size` in bytes, 0 for no limit."""
        return size(self.max_size or 0)

    @property
    def latency(self) -> Latency:
        """`max_latency`; zeros for no limit."""
        return latency(self.max_latency) if self.max_latency else Latency()

    @property
    def is_set(self) -> bool:
        """Something is limited."""
        return bool(self.max_bytes or self.avg_bits or self.max_latency)

    def __str__(self) -> str:
        parts = [f"--max-size {self.max_size}"] if self.max_bytes else []
        parts += [f"--avg-bits {self.avg_bits:g}"] if self.avg_bits else []
        parts += [f"--max-latency {self.max_latency}"] if self.max_latency else []
        return " ".join(parts)
