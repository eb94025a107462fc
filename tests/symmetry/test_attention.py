"""Products of activations, head by head; fused attention."""

import numpy as np
import pytest

D, HEADS, KEYS = 4, 6, 2  # three query heads per key head


def attention(found, draw, *, q="", k="", keys=HEADS, scores="", opset=18, **constants):
    """A block in the form that exporters write: split heads, repeat keys, softmax, join heads."""
    repeat = (
        """{0}u = Unsqueeze({0}t, two) {0}e = Expand({0}u, wide) {0}r = Reshape({0}e, heads4)"""
    )
    plain = "{0}r = Identity({0}t)"
    text = f"""g (float[1, 7, 12] x) => (float[1, 7, 5] y) {{
        q0 = MatMul(x, Q) k0 = MatMul(x, K) v0 = MatMul(x, V) vb0 = Add(v0, vb)
        qs = Reshape(q0, qsplit) ks = Reshape(k0, ksplit) vs = Reshape(vb0, ksplit)
        qt = Transpose <perm = [0, 2, 1, 3]> (qs) kt0 = Transpose <perm = [0, 2, 1, 3]> (ks)
        vt = Transpose <perm = [0, 2, 1, 3]> (vs) {q or "qr = Identity(qt)"}
        {k or "kt = Identity(kt0)"}
        {(repeat if keys != HEADS else plain).format("k")}
        {(repeat if keys != HEADS else plain).format("v")}
        kf = Transpose <perm = [0, 1, 3, 2]> (kr) s = MatMul(qr, kf) {scores}
        p = Softmax <axis = -1> (s) m = MatMul(p, vr) mt = Transpose <perm = [0, 2, 1, 3]> (m)
        j = Reshape(mt, join) y = MatMul(j, O) }}"""
    return found(
        text, opset, Q=draw(12, HEADS * D), K=draw(12, keys * D), V=draw(12, keys * D),
        vb=draw(keys * D), O=draw(HEADS * D, 5), qsplit=np.int64([0, 0, HEADS, D]),
        ksplit=np.int64([0, 0, keys, D]), two=np.int64([2]),
        wide=np.int64([1, keys, HEADS // keys, 7, D]), heads4=np.int64([1, HEADS, 7, D]),
        join=np.int64([0, 0, HEADS * D]), **constants,
    )  # fmt: skip


def of(result, kind, writer):
    (group,) = [g for g in result.of(kind) if writer in {m.value.name for m in g.writers}]
    return group


@pytest.mark.parametrize("keys", [HEADS, KEYS])
def test_values_by_head(found, draw, keys):
    result = attention(found, draw, keys=keys)
    rotate = of(result, "rotate", "V")
    assert (rotate.legal, rotate.blocks.shape) == ("orthogonal", (keys, D))
    assert [m.value.name for m in rotate.readers] == ["O"]
    scale = of(result, "scale", "V")
    assert (scale.legal, scale.blocks.shape) == ("diagonal", (1, keys * D))
    assert of(result, "permute", "V").blocks.shape == (keys, D)


@pytest.mark.parametrize("keys", [HEADS, KEYS])
def test_queries_and_keys_rotate_alike(found, draw, keys):
    result = attention(found, draw, keys=keys)
    group = of(result, "rotate", "Q")
    assert (group.legal, group.blocks.shape) == ("orthogonal", (keys, D))
    assert {m.value.name for m in group.writers} == {"Q", "K"}
    assert group.readers == ()
    scale = of(result, "scale", "Q")
    assert (scale.legal, scale.reason) == ("", "sums over channels times another activation's")


def test_norms_of_single_heads_in_pieces(found, draw):
    """x / |x| head by head, as encoders have it without positions: queries and keys still rotate, within heads."""
    norm = """sq{0} = Mul({1}, {1}) me{0} = ReduceMean(sq{0}, last) ro{0} = Sqrt(me{0}) {2} = Div({1}, ro{0})"""
    result = attention(found, draw, q=norm.format("q", "qt", "qr"), k=norm.format("k", "kt0", "kt"),
                       last=np.int64([-1]))  # fmt: skip
    group = of(result, "rotate", "Q")
    assert (group.legal, group.blocks.shape) == ("orthogonal", (HEADS, D))


def test_rotary_positions_forbid_rotations(found, draw):
    """x cos + (-high, low) sin, with angles that depend on the row."""
    rotary = """lo{0} = Slice({1}, zero, half, last) hi{0} = Slice({1}, half, end, last)
        ng{0} = Neg(hi{0}) tu{0} = Concat <axis = -1> (ng{0}, lo{0}) a{0} = Mul({1}, cos)
        b{0} = Mul(tu{0}, sin) {2} = Add(a{0}, b{0})"""
    angles = np.outer(np.arange(7), [1.0, 0.3, 1.0, 0.3]).astype(np.float32)
    result = attention(
        found, draw, q=rotary.format("q", "qt", "qr"), k=rotary.format("k", "kt0", "kt"),
        cos=np.cos(angles)[None, None], sin=np.sin(angles)[None, None], zero=np.int64([0]),
        half=np.int64([2]), end=np.int64([4]), last=np.int64([-1]),
    )  # fmt: skip
    group = of(result, "rotate", "Q")
    assert group.legal == ""
    assert of(result, "rotate", "V").legal == "orthogonal"


def test_masks_are_no_channels(found, draw):
    mask = np.triu(np.full((7, 7), -1e9, np.float32), 1)
    scores = "s1 = Add(s, mask) p = Softmax <axis = -1> (s1) drop = Identity(p)"
    text = scores.replace("p = Softmax <axis = -1> (s1) drop = Identity(p)", "")
    result = attention(found, draw, scores=text, mask=mask)
    assert of(result, "rotate", "V").legal == "orthogonal"


def test_a_cache_forbids_values(found, draw):
    text = """g (float[1, 7, 12] x, float[1, 2, n, 4] past) => (float[1, 2, 7, 4] y, float[1, 2, t, 4] now) {
        v = MatMul(x, V) vs = Reshape(v, split) vt = Transpose <perm = [0, 2, 1, 3]> (vs)
        now = Concat <axis = 2> (past, vt) s = MatMul(vt, W) y = MatMul(s, W) }"""
    result = found(text, V=draw(12, 8), W=draw(4, 4), split=np.int64([0, 0, 2, 4]))
    for group in result.groups:
        if {m.value.name for m in group.writers} == {"V"}:
            assert group.legal == ""
            assert "'past', which is not transformed" in group.reason


def test_attention_operator(found, draw):
    """Opset 23, with grouped heads, on [batch, seq, heads d]."""
    text = f"""g (float[1, 7, 12] x) => (float[1, 7, 5] y) {{
        q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
        m = Attention <q_num_heads = {HEADS}, kv_num_heads = {KEYS}> (q, k, v)
        y = MatMul(m, O) }}"""
    result = found(text, 23, Q=draw(12, HEADS * D), K=draw(12, KEYS * D), V=draw(12, KEYS * D),
                   O=draw(HEADS * D, 5))  # fmt: skip
    assert of(result, "rotate", "V").blocks.shape == (KEYS, D)
    assert of(result, "rotate", "V").legal == "orthogonal"
    assert of(result, "rotate", "Q").legal == "orthogonal"
    assert of(result, "scale", "V").legal == "diagonal"


def test_attention_operator_by_head(found, draw):
    """Opset 23 on [batch, heads, seq, d], as torch exports it."""
    text = """g (float[1, 7, 12] x) => (float[1, 7, 5] y) {
        q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
        qs = Reshape(q, split) ks = Reshape(k, split) vs = Reshape(v, split)
        qt = Transpose <perm = [0, 2, 1, 3]> (qs) kt = Transpose <perm = [0, 2, 1, 3]> (ks)
        vt = Transpose <perm = [0, 2, 1, 3]> (vs) m = Attention(qt, kt, vt)
        mt = Transpose <perm = [0, 2, 1, 3]> (m) j = Reshape(mt, join) y = MatMul(j, O) }"""
    result = found(text, 23, Q=draw(12, 24), K=draw(12, 24), V=draw(12, 24), O=draw(24, 5),
                   split=np.int64([0, 0, 6, 4]), join=np.int64([0, 0, 24]))  # fmt: skip
    assert of(result, "rotate", "V").blocks.shape == (6, 4)
    assert of(result, "rotate", "Q").legal == "orthogonal"


def test_rotary_operator(found, draw):
    text = """g (float[1, 7, 12] x, int64[1, 7] pos) => (float[1, 7, 5] y) {
        q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
        qr = RotaryEmbedding <num_heads = 6> (q, cos, sin, pos)
        kr = RotaryEmbedding <num_heads = 6> (k, cos, sin, pos)
        m = Attention <q_num_heads = 6, kv_num_heads = 6> (qr, kr, v) y = MatMul(m, O) }"""
    angles = np.outer(np.arange(96), [1.0, 0.3]).astype(np.float32)
    result = found(text, 23, Q=draw(12, 24), K=draw(12, 24), V=draw(12, 24), O=draw(24, 5),
                   cos=np.cos(angles), sin=np.sin(angles))  # fmt: skip
    assert of(result, "rotate", "V").legal == "orthogonal"
    group = of(result, "rotate", "Q")
    assert (group.legal, group.reason) == ("", "turns pairs of channels (rotary positions)")


def test_two_streams_multiplied_out(found, draw):
    """(x A)' (x B): channels on both free axes belong to no group."""
    text = """g (float[1, 7, 12] x) => (float[1, 8, 5] y) {
        a = MatMul(x, A) b = MatMul(x, B) t = Transpose <perm = [0, 2, 1]> (a) c = MatMul(t, b)
        y = MatMul(c, O) }"""
    result = found(text, A=draw(12, 8), B=draw(12, 6), O=draw(6, 5))
    assert not any(g.legal for g in result.groups)


def joined(found, draw, between="", batch="b", **constants):
    """Heads are put into the batch, as in torch's MultiheadAttention: [b h, 7, d]."""
    text = f"""g (float[{batch}, 7, 12] x) => (float[{batch}, 7, 5] y) {{
        q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)
        q4 = Reshape(q, split) k4 = Reshape(k, split) v4 = Reshape(v, split)
        qt = Transpose <perm = [0, 2, 1, 3]> (q4) kt = Transpose <perm = [0, 2, 1, 3]> (k4)
        vt = Transpose <perm = [0, 2, 1, 3]> (v4)
        qj = Reshape(qt, put) kj = Reshape(kt, put) vj0 = Reshape(vt, put)
        qs = Mul(qj, scale) kf = Transpose <perm = [0, 2, 1]> (kj) s = MatMul(qs, kf)
        p = Softmax <axis = -1> (s) {between or "vj = Identity(vj0)"} m = MatMul(p, vj)
        m4 = Reshape(m, part) mt = Transpose <perm = [0, 2, 1, 3]> (m4) j = Reshape(mt, join)
        y = MatMul(j, O) }}"""
    return found(
        text, Q=draw(12, 24), K=draw(12, 24), V=draw(12, 24), O=draw(24, 5),
        split=np.int64([0, 0, 6, 4]), put=np.int64([-1, 7, 4]), part=np.int64([-1, 6, 7, 4]),
        join=np.int64([0, 0, 24]), scale=np.float32(0.5), **constants,
    )  # fmt: skip


@pytest.mark.parametrize("batch", ["b", 2])
def test_heads_in_the_batch(found, draw, batch):
    result = joined(found, draw, batch=batch)
    for writer in ("Q", "V"):
        group = of(result, "rotate", writer)
        assert (group.legal, group.blocks.shape) == ("orthogonal", (6, 4))
    assert of(result, "scale", "V").legal == "diagonal"
    assert of(result, "scale", "Q").reason == "sums over channels times another activation's"
    assert [m.value.name for m in of(result, "rotate", "V").readers] == ["O"]


def test_what_is_not_followed_in_the_batch_forbids(found, draw):
    """A Relu would do no harm to permutations; it is not followed there, and is said."""
    result = joined(found, draw, "vj = Relu(vj0)")
    assert not any("V" in {m.value.name for m in g.writers} and g.legal for g in result.groups)
    result = joined(found, draw, "vj = Mul(vj0, each)", each=draw(4))
    assert not any("V" in {m.value.name for m in g.writers} and g.legal for g in result.groups)
