"""Perplexity and divergence of tiny models whose answers are known."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import errors, evaluate, models
from qgraph.evaluate import language

# Row t is p(next | t): token 0 is followed by 0, 1 or 2 with 1/2, 1/4, 1/4; the others by anything.
BIGRAMS = np.log([[1 / 2, 1 / 4, 1 / 4], [1 / 3, 1 / 3, 1 / 3], [1 / 3, 1 / 3, 1 / 3]])


def bigram(
    table: Any, inputs: str = "int64[1, seq] input_ids", body: str = "", seq: str = "seq"
) -> ir.Model:
    """A model whose logits are the table row of the token before."""
    size = len(table)
    model = ir.from_onnx_text(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g ({inputs}) => (float[1, {seq}, {size}] logits)
        {{ {body} logits = Gather(table, input_ids) }}
        """.replace("g (", f"g (float[{size}, {size}] table, ")
    )
    value = model.graph.inputs[0]
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(np.asarray(table, np.float32), name="table")
    model.graph.register_initializer(value)
    return model


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    tokens = np.random.default_rng(0).integers(0, 37, 1000)
    found = evaluate.perplexity(bigram(np.zeros((37, 37))), tokens, 64)
    assert found.perplexity == pytest.approx(37, rel=1e-12)
    assert found.nll == pytest.approx(math.log(37), rel=1e-12)
    assert (found.windows, found.tokens) == (15, 15 * 63)


def test_bigrams_by_hand() -> None:
    # Windows 0 0 1 and 1 0 2: p = 1/2, 1/4 and 1/3, 1/4; the trailing 0 fills no window.
    found = evaluate.perplexity(bigram(BIGRAMS), np.array([0, 0, 1, 1, 0, 2, 0]), 3)
    assert found.perplexity == pytest.approx((2 * 4 * 3 * 4) ** (1 / 4), rel=1e-6)
    assert (found.windows, found.tokens) == (2, 4)


def test_texts_are_windows_of_their_own() -> None:
    texts = [np.array([0, 0, 1, 2]), np.array([0, 1]), np.array([2])]
    found = evaluate.perplexity(bigram(BIGRAMS), texts, 3)
    assert found.perplexity == pytest.approx((2 * 4 * 4) ** (1 / 3), rel=1e-6)
    assert (found.windows, found.tokens) == (2, 3)


def test_divergence_by_hand() -> None:
    other = BIGRAMS.copy()
    other[0] = np.log([1 / 4, 1 / 2, 1 / 4])
    tokens = np.array([0, 0, 1, 1, 0, 2])
    found = evaluate.divergence(bigram(BIGRAMS), bigram(other), tokens, 3)
    # After token 0 (3 of 4 predictions) KL is 1/2 ln 2 - 1/4 ln 2; after others it is 0.
    assert found.divergence.kl_mean.value == pytest.approx(3 / 4 * math.log(2) / 4, rel=1e-6)
    assert found.divergence.kl_max == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert found.divergence.agreement.value == 1 / 4
    assert found.divergence.predictions == 4
    assert found.float_perplexity == evaluate.perplexity(bigram(BIGRAMS), tokens, 3)
    assert found.quant_perplexity == evaluate.perplexity(bigram(other), tokens, 3)
    # p of 0 -> 0 halves, p of 0 -> 1 doubles: window 1 gains nothing, window 2 nothing either.
    assert found.nll_change.value == pytest.approx(0, abs=1e-7)
    json.dumps(found.to_json(), allow_nan=False)


def test_the_same_model_has_no_divergence() -> None:
    tokens = np.random.default_rng(0).integers(0, 3, 90)
    found = evaluate.divergence(bigram(BIGRAMS), bigram(BIGRAMS), tokens, 9).divergence
    assert (found.kl_mean.value, found.kl_max, found.agreement.value) == (0, 0, 1)
    assert (found.agreement.low, found.agreement.high) == (1, 1)


def test_broken_logits_are_told_not_raised() -> None:
    broken = np.full((3, 3), np.nan)
    found = evaluate.perplexity(bigram(broken), np.array([0, 1, 2]), 3)
    assert math.isnan(found.perplexity)
    json.dumps(found.to_json(), allow_nan=False)
    steep = np.array([[0, -1e4, 0]] * 3)
    assert evaluate.perplexity(bigram(steep), np.array([0, 1]), 2).perplexity == math.inf


# inputs


def test_known_inputs_are_filled() -> None:
    # The logits change unless the mask is 1, the types 0, the positions 0, 1, 2 and the past empty.
    inputs = (
        "int64[batch, seq] input_ids, int64[batch, total] attention_mask, "
        "int32[batch, seq] position_ids, int64[batch, seq] token_type_ids, "
        "float[batch, 2, past_seq, 4] past_key_values_0_key"
    )
    model = bigram(BIGRAMS, inputs)
    feeds: dict[str, Any] = {}

    class Session:
        def get_inputs(self) -> Any:
            return self.real.get_inputs()

        def get_outputs(self) -> Any:
            return self.real.get_outputs()

        def run(self, names: Any, given: Any) -> Any:
            feeds.update(given)
            return self.real.run(names, given)

        def __init__(self) -> None:
            self.real = language.sessions.open_session(model)

    with pytest.MonkeyPatch.context() as patch:
        session = Session()
        patch.setattr(language.sessions, "open_session", lambda *_, **__: session)
        evaluate.perplexity(model, np.array([0, 1, 2]), 3)
    assert feeds["input_ids"].tolist() == [[0, 1, 2]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1]]
    assert feeds["token_type_ids"].tolist() == [[0, 0, 0]]
    assert feeds["position_ids"].tolist() == [[0, 1, 2]]
    assert feeds["position_ids"].dtype == np.int32
    assert feeds["past_key_values_0_key"].shape == (1, 2, 0, 4)


def test_ids_of_any_name_type_and_rank() -> None:
    model = bigram(
        BIGRAMS,
        "int32[seq] tokens",
        "axis = Constant<value_ints=[0]>() input_ids = Unsqueeze(tokens, axis)",
    )
    assert evaluate.perplexity(model, np.array([1, 0, 0]), 3).perplexity == pytest.approx(6**0.5)


def refusal(model: ir.Model, tokens: Any = (0, 1, 2), context: int = 3, **more: Any) -> str:
    with pytest.raises(errors.InputError) as caught:
        evaluate.perplexity(model, np.asarray(tokens), context, **more)
    return str(caught.value)


def test_qg121_output() -> None:
    model = bigram(BIGRAMS)
    assert "did you mean logits?" in refusal(model, logits="logit")
    model.graph.outputs[0].name = "logits_a"
    model.graph.outputs.append(ir.Value(name="logits_b", type=ir.TensorType(ir.DataType.FLOAT)))
    node = ir.node("Identity", [model.graph.outputs[0]], outputs=[model.graph.outputs[1]])
    model.graph.append(node)
    message = refusal(model)
    assert "error QG121: which output holds the predictions? outputs: logits_a, logits_b" in message
    assert "pass logits=NAME" in message
    assert evaluate.perplexity(model, np.array([1, 0]), 2, logits="logits_b").perplexity > 2


def test_qg121_shape() -> None:
    model = bigram(
        BIGRAMS,
        body="first = Constant<value_ints=[0]>()",
        inputs="int64[1, seq] all",
        seq="1",
    )
    node = ir.node(
        "Gather",
        [model.graph.inputs[0], model.graph[0].outputs[0]],
        {"axis": 1},
        outputs=[ir.Value(name="input_ids")],
    )
    gather = model.graph[-1]
    gather.replace_input_with(1, node.outputs[0])
    gather.prepend(node)
    message = refusal(model)
    assert "QG121 output 'logits': has shape [1, 3] for 3 tokens" in message
    assert "expected predictions for every token, [1, T, vocabulary]" in message


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ("int64[1, seq] input_ids, float[1, 4] image", "input 'image': is not understood; inputs:"),
        ("int64[1, seq] input_ids, int64[1, seq] other", "input 'other': is not understood"),
        ("int64[1, 8] input_ids", "input 'input_ids': takes 8 tokens, not 3"),
    ],
)
def test_qg122_inputs(inputs: str, text: str) -> None:
    message = refusal(bigram(BIGRAMS, inputs))
    assert f"error QG122 {text}" in message


def test_qg122_which_ids() -> None:
    body = "input_ids = Add(a, b)"
    message = refusal(bigram(BIGRAMS, "int64[1, seq] a, int64[1, seq] b", body))
    assert "QG122: which input takes the token ids? inputs: a tensor(int64)[1, 'seq'], b" in message


@pytest.mark.parametrize(
    ("tokens", "context", "text"),
    [
        ([0, 1], 3, "2 tokens do not fill one window of 3"),
        ([0, 1], 1, "1 tokens leave nothing to predict"),
        ([0.5, 1], 2, "found float64 of shape [2], expected integers of one dimension"),
        ([[0, 1]], 2, "found int64 of shape [1, 2]"),
        ([0, 1, 2, -1], 4, "id -1 is not in the vocabulary of 3"),
    ],
)
def test_qg123_tokens(tokens: Any, context: int, text: str) -> None:
    message = refusal(bigram(BIGRAMS), tokens, context)
    assert "error QG123" in message
    assert text in message


def test_qg123_texts() -> None:
    with pytest.raises(errors.InputError, match="QG123 tokens: no text has two tokens"):
        evaluate.perplexity(bigram(BIGRAMS), [np.array([1])], 4)


def test_rows_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 3, 100)
    whole = evaluate.perplexity(bigram(BIGRAMS), tokens, 50)
    monkeypatch.setattr(language.distributions, "CHUNK", 10)
    assert evaluate.perplexity(bigram(BIGRAMS), tokens, 50) == whole


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-kv"])
def test_reference_models_reach_their_recorded_perplexity(name: str) -> None:
    # The second also takes past keys and values; their length is 0 here.
    found = evaluate.perplexity(f"zoo:{name}", models.eval_tokens(name), 256)
    assert found.perplexity == pytest.approx(models.info(name).reached, rel=1e-5)
