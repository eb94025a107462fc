"""Images as data: real files made here, and what each key of the preprocessing does to them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qgraph import data, errors
from qgraph.data import Images, InputInfo

NCHW = InputInfo("x", np.dtype(np.float32), ("batch", 3, 4, 6))
NHWC = InputInfo("x", np.dtype(np.float32), ("batch", 4, 6, 3))
BYTES = InputInfo("x", np.dtype(np.uint8), (1, 4, 6, 3))
OPEN = InputInfo("x", np.dtype(np.float32), ("batch", 3, "h", "w"))
STATE = InputInfo("state", np.dtype(np.float32), (2, "batch", 8))


def pixels(height: int = 4, width: int = 6, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for index in range(10):
        place = folder / f"class{index // 5}" / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed=index)).save(place)
    (folder / "labels.csv").write_text("no image")
    return folder


def made(source: Any, info: InputInfo, preprocess: str | None = None, **more: Any) -> list[Any]:
    return [s[info.name] for s in data.load(source, [info], preprocess=preprocess, **more)]


def refusal(source: Any, info: InputInfo | list[InputInfo], preprocess: str | None = None) -> str:
    inputs = info if isinstance(info, list) else [info]
    with pytest.raises(errors.InputError) as caught:
        data.load(source, inputs, preprocess=preprocess)
    return str(caught.value)


def test_values_are_those_of_the_formula_in_both_layouts(photos: Path) -> None:
    text = "scale=1/255,mean=0.5,0.4,0.3,std=0.2,0.25,0.3"
    first = made(photos, NCHW, text)[0]
    wanted = (pixels() / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]
    assert first.shape == (1, 3, 4, 6) and first.dtype == np.float32
    np.testing.assert_allclose(first[0].transpose(1, 2, 0), wanted, rtol=1e-5, atol=1e-6)
    last = made(photos, NHWC, text)[0]
    np.testing.assert_array_equal(last.transpose(0, 3, 1, 2), first)
    flipped = made(photos, NCHW, "scale=1/255,mean=0.3,0.4,0.5,std=0.3,0.25,0.2,color=bgr")[0]
    np.testing.assert_array_equal(flipped[:, ::-1], first)


@pytest.mark.parametrize(
    ("values", "scale", "shift"), [("0..255", 1, 0), ("0..1", 1 / 255, 0), ("-1..1", 1 / 127.5, -1)]
)
def test_named_ranges(photos: Path, values: str, scale: float, shift: float) -> None:
    found = made(photos, NHWC, f"values={values}")[0][0]
    np.testing.assert_allclose(found, pixels() * scale + shift, atol=1e-5)


def test_imagenet_follows_the_order_of_colours(photos: Path) -> None:
    rgb = made(photos, NCHW, "values=imagenet")[0]
    np.testing.assert_array_equal(made(photos, NCHW, "values=imagenet,color=bgr")[0][:, ::-1], rgb)


def test_bytes_need_no_range_and_other_integers_must_fit(photos: Path) -> None:
    np.testing.assert_array_equal(made(photos, BYTES)[0][0], pixels())
    signed = InputInfo("x", np.dtype(np.int8), (1, 4, 6, 3))
    np.testing.assert_array_equal(
        made(photos, signed, "mean=128")[0][0].astype(int), pixels().astype(int) - 128
    )
    assert "QG114" in refusal(photos, signed, "values=0..255")


def test_unbatched_gray_input(tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    gray = InputInfo("x", np.dtype(np.float32), (1, 4, 6))
    found = made(tmp_path, gray, "values=0..255")[0]
    np.testing.assert_array_equal(found[0], np.asarray(Image.fromarray(pixels()).convert("L")))


def test_fits_differ_as_they_say(tmp_path: Path) -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 200  # the centre square; the sides are black
    Image.fromarray(image).save(tmp_path / "a.png")
    info = InputInfo("x", np.dtype(np.uint8), (1, 4, 4, 3))
    assert (made(tmp_path, info)[0] == 200).all()
    padded = made(tmp_path, info, "fit=pad,interpolation=nearest")[0][0, :, :, 0]
    assert (padded[[0, 3]] == 0).all() and (padded[1:3, 1:3] == 200).all()
    stretched = made(tmp_path, info, "fit=stretch,interpolation=nearest")[0][0, 0, :, 0]
    assert stretched.tolist() == [0, 200, 200, 0]


def test_resize_before_the_cut_is_as_in_two_steps(tmp_path: Path) -> None:
    source = Image.fromarray(pixels(64, 96)).resize((192, 128), Image.Resampling.BICUBIC)
    source.save(tmp_path / "a.png")
    info = InputInfo("x", np.dtype(np.uint8), (1, 28, 28, 3))
    two_steps = source.resize((48, 32), Image.Resampling.BILINEAR).crop((10, 2, 38, 30))
    found = made(tmp_path, info, "resize=32")[0][0]
    assert np.abs(found.astype(int) - np.asarray(two_steps).astype(int)).max() <= 1


def test_upright_as_the_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(pixels(6, 4)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(made(tmp_path, BYTES)[0][0], np.rot90(pixels(6, 4), -1))


def test_a_fixed_batch_takes_so_many_images(photos: Path) -> None:
    four = InputInfo("x", np.dtype(np.uint8), (4, 4, 6, 3))
    dataset = data.load(photos, [four])
    assert len(dataset) == 2
    first = next(iter(dataset))["x"]
    np.testing.assert_array_equal(first, [pixels(seed=index) for index in range(4)])


@pytest.mark.parametrize(
    ("choose", "wanted"),
    [("spread", [0, 2, 5, 7]), ("first", [0, 1, 2, 3]), ("random,seed=3", None)],
)
def test_choice(photos: Path, choose: str, wanted: list[int] | None) -> None:
    def used() -> list[int]:
        found = made(photos, BYTES, f"choose={choose}", samples=4)
        return [k for f in found for k in range(10) if np.array_equal(f[0], pixels(seed=k))]

    assert used() == used() and len(set(used())) == 4
    if wanted is not None:
        assert used() == wanted
    notes = list(map(str, data.load(photos, [BYTES], 4, preprocess=f"choose={choose}").notes))
    assert any("QG154" in n and "4 of 10 samples are used" in n for n in notes)


def test_nothing_is_decoded_before_it_is_used(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    module: Any = sys.modules[Images.__module__]
    decode = module._decoded
    monkeypatch.setattr(module, "_decoded", lambda *a: decoded.append(a[1].name) or decode(*a))
    dataset = data.load(photos, [BYTES])
    assert decoded == ["0.png"]
    next(iter(dataset))
    assert decoded == ["0.png"] * 2


def test_digest_covers_files_choice_and_preprocessing(photos: Path) -> None:
    def digest(text: str = "values=0..1", info: InputInfo = NCHW, count: int | None = None) -> str:
        return data.load(photos, [info], count, preprocess=text).digest()

    others = [
        digest("values=-1..1"),
        digest(info=NHWC),
        digest(count=4),
        digest("values=0..1,fit=pad"),
    ]
    assert digest() == digest("scale=1/255")
    assert len({digest(), *others}) == 5
    before = digest()
    Image.fromarray(pixels(seed=99)).save(photos / "class1" / "9.png")
    assert digest() != before


def test_what_was_inferred_is_told(photos: Path) -> None:
    (note,) = data.load(photos, [NCHW], preprocess="values=0..1").notes
    assert str(note).startswith(
        "note QG152 input x float32[batch, 3, 4, 6]: gets 4x6 (crop, bilinear), nchw, rgb"
    )


def test_toml_text_and_python_say_the_same(photos: Path) -> None:
    config = photos.parent / "photos.toml"
    config.write_text('[images]\npath = "photos"\nscale = "1/255"\nmean = [0.5]\nsize = [4, 6]\n')
    python = Images(path=photos, scale=1 / 255, mean=(0.5,), size=(4, 6))
    digests = {
        data.load(config, [OPEN]).digest(),
        data.load(python, [OPEN]).digest(),
        data.load(str(photos), [OPEN], preprocess="scale=1/255,mean=0.5,size=4x6").digest(),
    }
    assert len(digests) == 1


def test_a_state_beside_the_image_is_zeros(photos: Path) -> None:
    dataset = data.load(photos, [NCHW, STATE], preprocess="values=0..1")
    first = next(iter(dataset))["state"]
    assert first.shape == (2, 1, 8) and not first.any()
    assert [n.severity for n in dataset.notes if n.code == "QG153"] == ["warning"]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("sise=4", "QG150 Images.sise: is no key of the preprocessing", "did you mean size"),
        ("size=4x5x6", "QG150 Images.size: a size is one number, or HEIGHTxWIDTH", "keys:"),
        ("size=big", "QG150 Images.size", "keys:"),
        ("values=0..2", "QG150 Images.values", "keys:"),
        ("values=0..1,scale=2", "QG150 Images: values stands for scale, mean and std", ""),
        ("mean=1,2", "mean is one number or three, found 2", ""),
        ("std=0", "std divides: it must not be 0", ""),
        ("scale=1/0", "QG150 Images.scale", "found '1/0'"),
        ("fit=pad,resize=9", "resize is the shorter side before fit=crop", ""),
        ("values=0..1,resize=2", "QG150 Images.resize: 2 is less than size 6", ""),
        ("fit=crop,fit=pad", "QG150 --preprocess fit: is given twice", ""),
        ("224", "QG150 --preprocess 224: is no key=value", "keys: choose"),
        ("path=x", "QG150 --preprocess path", "leave it out"),
        ("", "what pixels become is not said", "values=0..1"),
        (
            "values=0..1,size=5",
            "QG116 input x float32[batch, 3, 4, 6]: takes 4, and size is 5x5",
            "",
        ),
        ("values=0..1,color=gray", "takes 3 channels in nchw, and color is gray", ""),
        ("values=0..1,layout=nhwc", "takes 6 channels in nhwc", "change layout"),
        ("values=0..1,input=y", "'y' is no input of the model", "known: x"),
    ],
)
def test_refused_preprocessing(photos: Path, text: str, message: str, hint: str) -> None:
    found = refusal(photos, NCHW, text)
    assert message in found
    assert hint in found


def test_all_wrong_keys_at_once(photos: Path) -> None:
    assert refusal(photos, NCHW, "sise=4,colour=bgr").count("is no key") == 2


def test_refused_models(photos: Path) -> None:
    assert "leaves height or width open" in refusal(photos, OPEN, "values=0..1")
    both = InputInfo("x", np.dtype(np.float32), (1, 3, 4, 3))
    assert "its shape does not tell the layout" in refusal(photos, both, "values=0..1")
    flat = InputInfo("x", np.dtype(np.float32), (1, 72))
    assert "no single input takes images" in refusal(photos, flat, "values=0..1")
    rate = InputInfo("rate", np.dtype(np.int64), ())
    assert "only one input can get images" in refusal(photos, [NCHW, rate], "values=0..1")


def test_bad_files_are_named_before_the_first_run(photos: Path) -> None:
    (photos / "z.jpg").write_text("no image")
    assert f"error QG112 {photos / 'z.jpg'}: cannot be read" in refusal(photos, BYTES)
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(photos / "z.png")
    (photos / "z.jpg").unlink()
    assert "not 8 bits for each channel" in refusal(photos, BYTES)


def test_a_cut_file_is_named_when_it_is_used(photos: Path) -> None:
    place = photos / "class1" / "9.png"
    Image.fromarray(pixels(64, 64)).save(place)
    place.write_bytes(place.read_bytes()[:3000])
    with pytest.raises(errors.InputError, match="QG112 .*9.png: cannot be read"):
        list(data.load(photos, [BYTES]))


def test_pillow_missing_is_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    found = refusal(photos, BYTES)
    assert "QG151" in found and "pip install 'qgraph[images]'" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[image]\n", "is no kind of data: 'image'\n  help: did you mean images?"),
        ("", "needs exactly one table"),
        ("images = 1\n", "needs exactly one table"),
        ("[images\n", "QG112"),
        ("[images]\n", "QG150 Images.path: is missing"),
        ('[images]\npath = "none"\n', "does not exist"),
    ],
)
def test_refused_toml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    assert message in refusal(tmp_path / "a.toml", BYTES)


def test_preprocess_is_for_images_and_text_only(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 4, 6, 3), np.uint8))
    assert "holds neither images nor text" in refusal(tmp_path / "a.npy", BYTES, "size=4")
    assert "QG150" in refusal([], BYTES, "size=4")
