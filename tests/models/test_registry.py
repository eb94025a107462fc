"""The registry of reference models: names, look-ups, held-out data, weights on disk."""

import subprocess
import sys

import numpy as np
import pytest

from qgraph import models
from qgraph.models import checkpoint


def test_names_are_sorted_and_known():
    assert models.names() == sorted(models.names())
    for name in models.names():
        found = models.info(name)
        assert found.name == name
        assert found.summary
        assert found.reached > 0


@pytest.mark.parametrize("look_up", [models.info, models.build, models.eval_tokens])
def test_an_unknown_name_lists_the_nearest(look_up):
    with pytest.raises(ValueError, match=r"'tiny-lama'.*did you mean tiny-llama"):
        look_up("tiny-lama")


def test_a_name_like_no_other_lists_them_all():
    with pytest.raises(ValueError, match="there are tiny-bitnet, tiny-cnn"):
        models.info("zzz")


def test_importing_the_registry_loads_nothing_heavy():
    heavy = "{'onnx_ir', 'onnx', 'numpy', 'safetensors', 'sklearn', 'torch'}"
    code = (
        f"import sys; from qgraph import models; models.names(); print(*{heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_held_out_tokens():
    tokens = models.eval_tokens("tiny-llama")
    assert tokens.dtype == np.int64
    assert 16_000 <= len(tokens) <= 20_000
    assert 0 <= tokens.min() <= tokens.max() < 1024
    with pytest.raises(ValueError, match="use eval_data"):
        models.eval_tokens("tiny-cnn")


def test_held_out_digits_are_apart_from_the_training_ones():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    from qgraph.models.data import digits

    images, labels = models.eval_data()
    train, _ = digits(held_out=False)
    assert images.shape == (360, 1, 8, 8)
    assert images.dtype == np.float32
    assert labels.shape == (360,)
    assert len(train) + len(images) == len(data.images)
    both = np.concatenate([train, images]).sum(dtype=np.float64)
    assert both == pytest.approx(data.images.sum() / 16)


def test_all_weights_together_stay_small():
    total = sum(path.stat().st_size for path in checkpoint.WEIGHTS.iterdir())
    assert total <= 8_000_000


def test_the_tokenizer_gives_the_held_out_tokens_back():
    tokenizers = pytest.importorskip("tokenizers")
    path = checkpoint.WEIGHTS.parent / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokens = models.eval_tokens("tiny-gpt").tolist()
    assert tokenizer.encode(tokenizer.decode(tokens)).ids == tokens


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (1, 1)])
def test_ternary_packing_is_exact(shape):
    codes = np.random.default_rng(0).integers(-1, 2, shape)
    codes[0, 0] = 1
    w = codes.astype(np.float32) * np.float32(0.0371)
    packed = checkpoint.pack_ternary(w)
    assert packed["codes"].size == -(-w.size // 4)
    back = checkpoint.unpack_ternary(packed["codes"], shape, packed["scale"])
    assert np.array_equal(back, w)


def test_packing_refuses_what_is_not_ternary():
    with pytest.raises(ValueError, match="Not a ternary tensor"):
        checkpoint.pack_ternary(np.array([[1.0, 0.5]], np.float32))


@pytest.mark.parametrize("name", models.names())
def test_the_readme_states_what_was_recorded(name):
    readme = (checkpoint.WEIGHTS.parent / "README.md").read_text(encoding="utf-8")
    line = next(line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
    found = models.info(name)
    digits = 2 if found.metric == "perplexity" else 4
    assert line.endswith(f"| {found.metric} {found.reached:.{digits}f} |")
