"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

TO_DO = "What to do"
DATA = "Data and accuracy"
OUTPUT = "Output"
DEBUG = "Looking inside"


class VerifyMode(str, Enum):
    """How much the passes are checked."""

    each = "each"
    ends = "ends"
    off = "off"


Model: TypeAlias = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="An .onnx file, or zoo:NAME for a reference model."),
]
Recipe: TypeAlias = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME|FILE",
        help="A recipe by name (see: qgraph recipes) or a .toml or .json file.",
        rich_help_panel=TO_DO,
    ),
]
Target: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        metavar="NAME",
        help="What will run the model (see: qgraph targets). Default: what the recipe says.",
        rich_help_panel=TO_DO,
    ),
]
Overrides: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change the recipe, e.g. linear.weights=int4.g64 or min_elements=0. May be repeated.",
        rich_help_panel=TO_DO,
    ),
]
Data: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        metavar="SOURCE",
        help="Real inputs: FILE.npz, FILE.npy, a folder of them (one sample each), a folder of images, "
        "FILE.txt, FILE.toml that describes images or text, or FILE.py:FUNCTION.",
        rich_help_panel=DATA,
    ),
]
Preprocess: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--preprocess",
        metavar="KEY=VALUE,...",
        help="What images or text become, e.g. values=imagenet,resize=256 or tokenizer=tokenizer.json,length=128.",
        rich_help_panel=DATA,
    ),
]
Samples: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--samples",
        metavar="N",
        min=1,
        help="Use N samples: the first, of images and text evenly spaced ones. Default: all.",
        rich_help_panel=DATA,
    ),
]
MinSqnr: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--min-sqnr",
        metavar="DB",
        help="Fail (exit 3) where the SQNR of an output is below DB decibels.",
        rich_help_panel=DATA,
    ),
]
MaxKl: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        help="Fail (exit 3) where predictions diverge by more than NATS on average.",
        rich_help_panel=DATA,
    ),
]
MinAgreement: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--min-agreement",
        metavar="SHARE",
        help="Fail (exit 3) where fewer top-1 predictions than SHARE (0..1) are those of the float model.",
        rich_help_panel=DATA,
    ),
]
MaxSize: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--max-size",
        metavar="SIZE",
        help="Choose formats weight by weight such that the file, external data included, takes at most SIZE bytes "
        "(4500000, 4.5MB, 4MiB). Needs --data.",
        rich_help_panel=DATA,
    ),
]
AvgBits: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--avg-bits",
        metavar="BITS",
        help="The same, such that weights take BITS bits on average, scales included. Needs --data.",
        rich_help_panel=DATA,
    ),
]
MaxLatency: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--max-latency",
        metavar="TIME",
        help="The same, such that one run in one thread takes 0.8x of the float model's time, or 12ms. Needs --data.",
        rich_help_panel=DATA,
    ),
]
MaxTime: TypeAlias = Annotated[
    float,
    typer.Option(
        "--max-time",
        metavar="SECONDS",
        min=0,
        help="How long to look for weights to give bits back to where a floor is missed, or to improve a mixture of "
        "formats by measuring; 0 does not.",
        rich_help_panel=DATA,
        show_default=True,
    ),
]
Logits: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--logits",
        metavar="NAME",
        help="The output that holds predictions over classes. Default: told by its name.",
        rich_help_panel=DATA,
    ),
]
Threads: TypeAlias = Annotated[
    int,
    typer.Option(
        "--threads",
        metavar="N",
        min=0,
        help="Threads to use; 0 is one per core.",
        show_default=True,
    ),
]
Force: TypeAlias = Annotated[
    bool,
    typer.Option("--force", "-f", help="Replace files that exist already.", rich_help_panel=OUTPUT),
]
Json: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document instead of text; errors as well.",
        rich_help_panel=OUTPUT,
    ),
]
Dump: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--dump-dir",
        metavar="DIR",
        help="Save the model after every pass as DIR/NN-PASS.onnx, with its text beside it.",
        rich_help_panel=DEBUG,
    ),
]
Name: TypeAlias = Annotated[
    str | None, typer.Argument(metavar="NAME", help="One of them, in full.", show_default=False)
]
