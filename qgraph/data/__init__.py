"""Samples for calibration and evaluation: what `--data` can be, checked before the first run.

A sample is one `feeds` dict {model input: array}. Sources:

    calib.npz          one array per model input with a sample axis in front; sample i is
                       arr[i:i+1], or arr[i] where arr has one dimension more than the input
    calib.npy          the same for a model with one input
    folder/            one sample per .npz or .npy file, in the order of the file names
    photos/            a folder of images, with what `Images` says of their preprocessing
    lines.txt          a text file, with what `Text` says of its tokenizer
    data.toml          images or text with all that: a table [images] or [text] with its path
    file.py:function   a function (or package.module:function) that yields feeds
    Python             `Images(...)`, `Text(...)`, a list of feeds, any other iterable of feeds, or a
                       function that returns one

Codes: QG110 model inputs, QG111 no such source, QG112 unreadable, QG113 names, QG114 dtype,
QG115 rank, QG116 dimension, QG117 symbolic dimension, QG118 not finite, QG119 number of samples,
QG150 preprocessing, QG151 not installed, QG152 what the model takes, QG153 states, QG154 choice.
"""

from __future__ import annotations

from qgraph.data.dataset import Dataset, load
from qgraph.data.images import Images
from qgraph.data.infos import Array, Feeds, InputInfo, inputs_of
from qgraph.data.sources import Source
from qgraph.data.text import Text

__all__ = [
    "Array",
    "Dataset",
    "Feeds",
    "Images",
    "InputInfo",
    "Source",
    "Text",
    "inputs_of",
    "load",
]
