"""Text as data: a tokenizer made here and a real one; states that samples leave out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qgraph import data, errors
from qgraph.data import InputInfo, Text

I64 = np.dtype(np.int64)
IDS = InputInfo("input_ids", I64, ("batch", "seq"))
MASK = InputInfo("attention_mask", I64, ("batch", "seq"))
TYPES = InputInfo("token_type_ids", I64, ("batch", "seq"))
PLACES = InputInfo("position_ids", I64, ("batch", "seq"))
FIXED = InputInfo("input_ids", np.dtype(np.int32), (1, 6))
FIXED_MASK = InputInfo("attention_mask", I64, (1, 6))
PAST = InputInfo("past_key_values.0.key", np.dtype(np.float32), ("batch", 2, "past_length", 4))
LINES = ["a b c", "b", "c c a b a b a b", "a a"]
CODES = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "c": 5, "[UNK]": 6}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    made = Tokenizer(models.WordLevel(CODES, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    place = tmp_path / "lines.txt"
    place.write_text("\n\n".join(LINES) + "\n", encoding="utf-8")
    return place


def load(lines: Path, inputs: list[InputInfo], count: int | None = None, more: str = "") -> Any:
    text = f"tokenizer={lines.parent / 'tokenizer.json'},{more}"
    return data.load(lines, inputs, count, preprocess=text)


def rows(dataset: Any, name: str = "input_ids") -> list[list[int]]:
    return [each[name][0].tolist() for each in dataset]


def refusal(lines: Path, inputs: list[InputInfo], more: str = "") -> str:
    with pytest.raises(errors.InputError) as caught:
        load(lines, inputs, more=more)
    return str(caught.value)


def test_lines_have_their_own_lengths_where_the_model_lets_them(lines: Path) -> None:
    dataset = load(lines, [IDS, MASK, TYPES, PLACES])
    assert rows(dataset)[:2] == [[1, 3, 4, 5, 2], [1, 4, 2]]
    assert rows(dataset, "attention_mask")[1] == [1, 1, 1]
    assert rows(dataset, "token_type_ids")[1] == [0, 0, 0]
    assert rows(dataset, "position_ids")[0] == [0, 1, 2, 3, 4]
    assert len(dataset) == 4


def test_a_fixed_length_cuts_and_pads(lines: Path) -> None:
    dataset = load(lines, [FIXED, FIXED_MASK])
    assert rows(dataset)[1:3] == [[1, 4, 2, 0, 0, 0], [1, 5, 5, 3, 4, 2]]
    assert rows(dataset, "attention_mask")[1] == [1, 1, 1, 0, 0, 0]
    assert next(iter(dataset))["input_ids"].dtype == np.int32


def test_padding_where_asked_for(lines: Path) -> None:
    dataset = load(lines, [IDS, MASK], more="length=4,pad=true,pad_id=9")
    assert rows(dataset)[1] == [1, 4, 2, 9]


def test_windows_are_pieces_of_the_whole_text(lines: Path) -> None:
    codes = [CODES[word] for line in LINES for word in line.split()]
    found = rows(load(lines, [IDS], more="cut=windows,length=4"))
    assert found == [codes[i : i + 4] for i in range(0, 12, 4)]
    first = load(lines, [IDS], 2, "cut=windows,length=4,choose=first")
    assert len(first) == 2 and rows(first) == found[:2]


def test_a_fixed_batch_takes_so_many_lines(lines: Path) -> None:
    two = [InputInfo(i.name, i.dtype, (2, 6)) for i in (FIXED, FIXED_MASK)]
    dataset = load(lines, two)
    assert [s["input_ids"].shape for s in dataset] == [(2, 6)] * 2
    np.testing.assert_array_equal(
        np.concatenate([s["input_ids"][:, 0] for s in dataset]), [1, 1, 1, 1]
    )


def test_choice(lines: Path) -> None:
    every = rows(load(lines, [IDS]))
    assert rows(load(lines, [IDS], 2)) == [every[0], every[2]]
    assert rows(load(lines, [IDS], 2, "choose=first")) == every[:2]
    seeds = [rows(load(lines, [IDS], 2, f"choose=random,seed={k}")) for k in range(8)]
    assert rows(load(lines, [IDS], 2, "choose=random,seed=0")) == seeds[0]
    assert any(each != seeds[0] for each in seeds)


def test_toml_and_python(lines: Path) -> None:
    config = lines.parent / "data.toml"
    config.write_text('[text]\npath = "lines.txt"\ntokenizer = "tokenizer.json"\nlength = 4\n')
    python = Text(path=lines, tokenizer=lines.parent / "tokenizer.json", length=4)
    digests = {data.load(each, [IDS]).digest() for each in (config, python)}
    assert digests == {load(lines, [IDS], more="length=4").digest()}


def test_digest_covers_text_and_preprocessing(lines: Path) -> None:
    found = [load(lines, [IDS], more=more).digest() for more in ("", "length=3", "special=no")]
    found.append(load(lines, [IDS], 2).digest())
    lines.write_text("a b\n")
    found.append(load(lines, [IDS]).digest())
    assert len(set(found)) == 5


def test_an_empty_cache_is_fed_with_a_note(lines: Path) -> None:
    dataset = load(lines, [IDS, MASK, PAST])
    assert next(iter(dataset))[PAST.name].shape == (1, 2, 0, 4)
    assert [n.severity for n in dataset.notes if n.code == "QG153"] == ["note"]


def test_states_in_any_source() -> None:
    sound = InputInfo("input", np.dtype(np.float32), ("batch", "time"))
    state = InputInfo("state", np.dtype(np.float32), (2, "batch", 3))
    feeds = [{"input": np.ones((4, 5), np.float32)}]
    dataset = data.load(feeds, [sound, state])
    np.testing.assert_array_equal(next(iter(dataset))["state"], np.zeros((2, 4, 3)))
    given = [{**feeds[0], "state": np.ones((2, 4, 3), np.float32)}]
    kept = data.load(given, [sound, state])
    assert next(iter(kept))["state"].all() and not kept.notes
    with pytest.raises(errors.InputError, match="QG153 .*shape cannot be told"):
        data.load(feeds, [sound, InputInfo("state", np.dtype(np.float32), ("layers", 3))])
    with pytest.raises(errors.InputError, match="'encoder_hidden_states' is missing"):
        data.load(feeds, [sound, InputInfo("encoder_hidden_states", sound.dtype, (1, 3))])


@pytest.mark.parametrize(
    ("inputs", "more", "message"),
    [
        ([IDS], "lenght=3", "did you mean length?"),
        ([IDS], "length=0", "length is at least 1"),
        ([IDS], "pad=maybe", "QG150 Text.pad"),
        ([IDS], "cut=windows", "QG150 Text.length: is needed for windows"),
        ([IDS, MASK], "pad=true", "QG150 Text.length"),
        ([IDS], "cut=windows,length=4,pad=true", "windows are full"),
        ([IDS], "cut=windows,length=40", "QG119"),
        ([FIXED, FIXED_MASK], "length=5", "QG116"),
        ([FIXED, FIXED_MASK], "pad=no", "samples of one length are needed"),
        ([FIXED], "", "padding would be read as text"),
        (
            [IDS, InputInfo("rate", I64, (1,))],
            "",
            "not known what of a text these inputs get: rate",
        ),
    ],
)
def test_refusals(lines: Path, inputs: list[InputInfo], more: str, message: str) -> None:
    assert message in refusal(lines, inputs, more)


def test_refused_files(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.InputError, match="QG150 Text.tokenizer: is missing"):
        data.load(lines, [IDS])
    tokenizer = lines.parent / "tokenizer.json"
    kept = lines.read_bytes()
    lines.write_bytes(b"\xff\xfe\x00")
    assert f"QG112 {lines}: cannot be read" in refusal(lines, [IDS])
    lines.write_bytes(b"\n")
    assert "QG119" in refusal(lines, [IDS])
    lines.write_bytes(kept)
    tokenizer.write_text("{}")
    assert f"QG112 {tokenizer}: is no tokenizer.json" in refusal(lines, [IDS])
    tokenizer.unlink()
    assert f"QG111 {tokenizer}: does not exist" in refusal(lines, [IDS])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'qgraph[text]'" in refusal(lines, [IDS])


@pytest.mark.skipif("QGRAPH_TEST_DATA" not in os.environ, reason="QGRAPH_TEST_DATA is not set")
def test_real_sentences_for_a_real_model() -> None:
    root = Path(os.environ["QGRAPH_TEST_DATA"])
    model = root / "encoder/minilm_l6_v2"
    place, tokenizer = root / "text/stsb/stsb-en-dev.csv", model / "tokenizer.json"
    inputs = data.inputs_of(model / "minilm_l6_v2.onnx")
    dataset = data.load(Text(path=place, tokenizer=tokenizer), inputs, 5)
    line = place.read_text(encoding="utf-8").splitlines()[0]
    real = Tokenizer.from_file(str(tokenizer))
    real.no_padding()
    assert rows(dataset)[0] == real.encode(line).ids
    assert len({each["input_ids"].shape for each in dataset}) > 1


@pytest.mark.skipif("QGRAPH_TEST_DATA" not in os.environ, reason="QGRAPH_TEST_DATA is not set")
def test_real_photos_for_a_real_model() -> None:
    root = Path(os.environ["QGRAPH_TEST_DATA"])
    model = root / "vision/mobilenetv2_tf/mobilenetv2_1.0_224_tf.onnx"
    photos = root / "images/imagenet_sample"
    dataset = data.load(photos, data.inputs_of(model), 8, preprocess="values=-1..1")
    found = [each["input"] for each in dataset]
    assert [each.shape for each in found] == [(1, 3, 224, 224)] * 8
    assert all(-1 <= each.min() < each.max() <= 1 for each in found)
