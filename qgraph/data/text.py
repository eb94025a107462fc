"""Text as samples: one line each, or windows of a length cut from the whole file; token ids by `tokenizers`."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import field_validator, model_validator

from qgraph import errors
from qgraph.data import specs, states
from qgraph.data.infos import Array, InputInfo, fail
from qgraph.data.opened import Located, Opened, Progress, joined

ROLES = {
    "ids": ("input_ids", "ids", "tokens", "token_ids"),
    "mask": ("attention_mask", "input_mask", "mask"),
    "types": ("token_type_ids", "segment_ids"),
    "positions": ("position_ids", "positions"),
}
"""What an input gets, by its name."""
PADS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")
AT_ONCE = 64  # lines that are tokenized by one call


class Text(specs.Spec):
    """A text file in UTF-8. Empty lines are no samples."""

    tokenizer: str
    """A tokenizer.json."""
    cut: Literal["lines", "windows"] = "lines"
    """A sample is a line, or `length` tokens of the text, one after the other."""
    length: int | None = None
    """Longer lines are cut to it. Default: what the model fixes, else what the tokenizer says."""
    pad: bool | None = None
    """Whether shorter lines are padded to the length. Default: only where the model fixes it."""
    pad_id: int | None = None
    """The token that pads. Default: what the tokenizer says."""
    special: bool | None = None
    """Whether the tokenizer adds its special tokens. Default: to lines, not to windows."""

    @field_validator("length", "pad_id", "seed", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return specs.whole(value)

    @field_validator("pad", "special", mode="before")
    @classmethod
    def _flag(cls, value: Any) -> Any:
        return specs.flag(value)

    @model_validator(mode="after")
    def _consistent(self) -> Text:
        if self.length is not None and self.length < 1:
            raise ValueError("length is at least 1")
        if self.cut == "windows" and (self.pad or self.special):
            raise ValueError(
                "windows are full, and a piece of the text: pad and special are for lines"
            )
        return self


@dataclass(frozen=True, slots=True)
class _Resolved:
    """All that decides a sample's bytes, with nothing left to be inferred."""

    inputs: tuple[tuple[InputInfo, str], ...]
    cut: str
    length: int | None
    pad_id: int | None
    special: bool
    at_once: int

    def __str__(self) -> str:
        gets = ", ".join(f"{info.name} {role}" for info, role in self.inputs)
        if self.length is None:
            size = "whole lines of their own lengths"
        elif self.cut == "windows":
            size = f"windows of {self.length} tokens"
        else:
            size = f"lines of at most {self.length} tokens"
            if self.pad_id is not None:
                size = f"lines of {self.length} tokens, cut or padded with id {self.pad_id}"
        taken = f", {self.at_once} per sample" if self.at_once > 1 else ""
        return f"{size}{', special tokens added' if self.special else ''}{taken}; {gets}"

    def sample(self, ids: Sequence[int], types: Sequence[int]) -> dict[str, Array]:
        """One sample, of shape [1, length], or [length] where an input has no batch axis."""
        used, feeds = len(ids), {}
        missing = 0 if self.pad_id is None else (self.length or 0) - used
        rows = {
            "ids": [*ids, *[self.pad_id or 0] * missing],
            "mask": [1] * used + [0] * missing,
            "types": [*types, *[0] * missing],
            "positions": range(used + missing),
        }
        for info, role in self.inputs:
            row = np.array(rows[role], info.dtype)
            feeds[info.name] = row[None] if len(info.shape or (0, 0)) == 2 else row
        return feeds


def open_text(
    spec: Text, inputs: Sequence[InputInfo], samples: int | None, progress: Progress
) -> Opened:
    """Count the samples, by lines or by tokens, and say how they are made."""
    tokenizer, resolved = _resolve(spec, inputs)
    path = Path(spec.path)
    sha = hashlib.sha256(
        f"text\0{importlib.metadata.version('tokenizers')}\0{resolved!r}\0".encode()
    )
    sha.update(Path(spec.tokenizer).read_bytes())
    lines = 0
    for line in _lines(path):
        sha.update(line.encode() + b"\n")
        lines += 1
        if lines % 4096 == 1:
            progress(f"reading {path}", -1)
    if resolved.cut == "lines":
        items = lines
    elif spec.choose == "first" and samples is not None:
        items = sum(
            1 for _ in islice(_windows(tokenizer, path, resolved), samples * resolved.at_once)
        )
    else:
        progress(f"cutting {path}", -1)
        items = sum(1 for _ in _windows(tokenizer, path, resolved))
    whole = items // resolved.at_once
    if not whole:
        needed = f"{resolved.at_once} of {resolved.cut}"
        fail(
            "QG119",
            spec.path,
            f"is too short for one sample: {items} of {needed}",
            "give more text",
        )
    chosen = spec.chosen(whole, samples)
    sha.update(repr(chosen).encode())

    def read() -> Located:
        picked = {at * resolved.at_once + k for at in chosen for k in range(resolved.at_once)}
        made = _windows(tokenizer, path, resolved)
        if resolved.cut == "lines":
            made = _encoded(tokenizer, path, resolved, picked)
        each = ((i, s) for i, s in made if i in picked)
        kind = "line" if resolved.cut == "lines" else "window"
        return joined(((f"{path} {kind} {i}", s) for i, s in each), resolved.at_once)

    notes = [errors.Diagnostic("note", "QG152", spec.path, f"gives {resolved}")]
    if len(chosen) < whole:
        message = f"{len(chosen)} of {whole} samples are used ({spec.choose})"
        notes.append(errors.Diagnostic("note", "QG154", spec.path, message))
    return Opened(spec.path, read, len(chosen), sha.digest(), tuple(notes))


def _resolve(spec: Text, inputs: Sequence[InputInfo]) -> tuple[Any, _Resolved]:
    tokenizer = _tokenizer(spec.tokenizer)
    roles = _roles(spec, inputs)
    fixed = {i.shape[-1] for i, _ in roles if i.shape and isinstance(i.shape[-1], int)}
    if len(fixed) > 1 or (fixed and spec.length not in (None, *fixed)):
        found = f"the model takes {sorted(fixed)} tokens, and length is {spec.length}"
        fail("QG116", spec.path, found, "leave length out")
    length = next(iter(fixed), spec.length)
    if length is None and tokenizer.truncation and spec.cut == "lines":
        length = tokenizer.truncation["max_length"]
    if length is None and (spec.cut == "windows" or spec.pad):
        fail("QG150", "Text.length", "is needed for windows and for padding", "give length=128")
    batch = {
        i.shape[0]
        for i, _ in roles
        if i.shape and len(i.shape) == 2 and isinstance(i.shape[0], int)
    }
    at_once = max(batch, default=1)
    is_padded = spec.cut == "lines" and (bool(fixed) if spec.pad is None else spec.pad)
    if (fixed or at_once > 1) and spec.cut == "lines" and not is_padded:
        fail(
            "QG150",
            "Text.pad",
            "samples of one length are needed, lines differ",
            "give length=128,pad=true",
        )
    pad_id = _pad_id(spec, tokenizer) if is_padded else None
    if pad_id is not None and all(role != "mask" for _, role in roles):
        roles_shown = ", ".join(i.name for i, _ in roles)
        fail(
            "QG152",
            spec.path,
            f"padding would be read as text: there is no mask among {roles_shown}",
            "give cut=windows",
        )
    special = spec.cut == "lines" if spec.special is None else spec.special
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if length is not None and spec.cut == "lines":
        tokenizer.enable_truncation(length)
    return tokenizer, _Resolved(roles, spec.cut, length, pad_id, special, at_once)


def _roles(spec: Text, inputs: Sequence[InputInfo]) -> tuple[tuple[InputInfo, str], ...]:
    by_name = {name: role for role, names in ROLES.items() for name in names}
    needed = states.required(inputs)
    roles = [(i, by_name.get(i.name.lower(), "")) for i in needed]
    if len(roles) == 1 and needed[0].dtype.kind in "iu":
        roles = [(needed[0], "ids")]
    wrong = [
        i for i, role in roles if not role or i.dtype.kind not in "iu" or len(i.shape or (0, 0)) > 2
    ]
    if wrong or all(role != "ids" for _, role in roles):
        shown = ", ".join(map(str, wrong or needed))
        known = ", ".join(sorted(by_name))
        message = f"it is not known what of a text these inputs get: {shown}"
        fail(
            "QG152",
            spec.path,
            message,
            f"known are integers named {known}; feed others with FILE.py:FUNCTION",
        )
    return tuple(roles)


def _tokenizer(path: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        fail(
            "QG151",
            "text",
            "is read with tokenizers, which is not installed",
            "pip install 'qgraph[text]'",
            e,
        )
    if not Path(path).is_file():
        fail("QG111", path, "does not exist", "tokenizer=... names a tokenizer.json")
    try:
        return Tokenizer.from_file(path)
    except Exception as e:  # noqa: BLE001 - the library raises plain Exception
        fail("QG112", path, f"is no tokenizer.json: {e}", "save it with tokenizer.save(path)", e)


def tokenize(path: str | Path, tokenizer: str) -> Array:
    """Token ids [n] of a whole text as it stands, line ends included, without special tokens.

    Args:
        path: a text file in UTF-8.
        tokenizer: a tokenizer.json.

    Raises:
        errors.InputError: QG111, QG112 for a file that cannot be used, QG151 where tokenizers is not installed.
    """
    made = _tokenizer(tokenizer)
    made.no_padding()
    made.no_truncation()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        fail("QG112", str(path), f"cannot be read: {e}", "give a text file in UTF-8", e)
    return np.array(made.encode(text, add_special_tokens=False).ids, np.int64)


def _pad_id(spec: Text, tokenizer: Any) -> int:
    told = [spec.pad_id, (tokenizer.padding or {}).get("pad_id"), *map(tokenizer.token_to_id, PADS)]
    found = next((each for each in told if each is not None), None)
    if found is None:
        fail(
            "QG150", "Text.pad_id", "the tokenizer does not tell which token pads", "give pad_id=0"
        )
    return int(found)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from filter(None, map(str.strip, file))
    except (OSError, UnicodeDecodeError) as e:
        fail("QG112", str(path), f"cannot be read: {e}", "give a text file in UTF-8", e)


def _encoded(
    tokenizer: Any, path: Path, to: _Resolved, picked: set[int]
) -> Iterator[tuple[int, dict[str, Array]]]:
    """The lines that are used, a few at a time."""
    wanted = ((i, line) for i, line in enumerate(_lines(path)) if i in picked)
    while block := list(islice(wanted, AT_ONCE)):
        texts = [line for _, line in block]
        codes = tokenizer.encode_batch(texts, add_special_tokens=to.special)
        for (index, _), code in zip(block, codes, strict=True):
            if not code.ids:
                fail("QG119", f"{path} line {index}", "gives no tokens", "remove it")
            yield index, to.sample(code.ids, code.type_ids)


def _windows(tokenizer: Any, path: Path, to: _Resolved) -> Iterator[tuple[int, dict[str, Array]]]:
    """Tokens of the lines, joined by line ends, in windows; the rest at the end is left out."""
    held: list[int] = []
    index, length, lines = 0, to.length or 0, _lines(path)
    while block := list(islice(lines, AT_ONCE)):
        held += tokenizer.encode("\n".join(block) + "\n", add_special_tokens=False).ids
        for start in range(0, len(held) - length + 1, length):
            yield index, to.sample(held[start : start + length], [0] * length)
            index += 1
        held = held[len(held) // length * length :]
