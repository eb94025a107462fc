"""Gradients through Attention and RotaryEmbedding, operators of their own since opset 23."""

from __future__ import annotations

import math

import numpy as np

from qgraph import errors, graph
from qgraph.gradients.rules import Array, Gradients, Site, rule

_PAST = (4, 5)


@rule("RotaryEmbedding")
def _rotary(site: Site, g: Gradients) -> Gradients:
    """Pairs are turned by an angle; the way back turns them by its opposite."""
    dy = g[0]
    x, cos, sin = site.x[:3]
    heads = site.attribute("num_heads", 0)
    if len(site.x) > 3 and site.x[3] is not None:
        cos, sin = cos[site.x[3]], sin[site.x[3]]
    by_head = _split_heads(dy, heads) if dy.ndim == 3 else dy
    width = site.attribute("rotary_embedding_dim", 0) or by_head.shape[-1]
    is_interleaved = site.attribute("interleaved", 0)
    even, odd = (slice(0, width, 2), slice(1, width, 2)) if is_interleaved else (
        slice(0, width // 2), slice(width // 2, width)
    )  # fmt: skip
    cos, sin = cos[:, None], sin[:, None]
    turned = by_head.copy()
    turned[..., even] = cos * by_head[..., even] + sin * by_head[..., odd]
    turned[..., odd] = cos * by_head[..., odd] - sin * by_head[..., even]
    whole = _join_heads(turned) if dy.ndim == 3 else turned
    return [whole.astype(x.dtype, copy=False), *[None] * (len(site.x) - 1)]


@rule("Attention")
def _attention(site: Site, g: Gradients) -> Gradients:
    """Of y = softmax(c(q kᵀ scale) + mask) v, c being the soft cap; what reads a shared head adds up.

    Raises:
        errors.InputError: QG410 for what has no rule yet: lengths of padded caches, windows, masks that weights decide.
    """
    _require_plain(site)
    q, k, v = (site.x[i] for i in range(3))
    heads = site.attribute("q_num_heads", 0), site.attribute("kv_num_heads", 0)
    dy = g[0]
    is_flat = q.ndim == 3
    if is_flat:
        q, k, v = (_split_heads(a, n) for a, n in ((q, heads[0]), (k, heads[1]), (v, heads[1])))
        dy = None if dy is None else _split_heads(dy, heads[0])
    new = k.shape[2]
    past = [site.x[i] if len(site.x) > i else None for i in _PAST]
    if past[0] is not None and past[1] is not None:
        k, v = np.concatenate([past[0], k], axis=2), np.concatenate([past[1], v], axis=2)
    dq, dk, dv = (np.zeros_like(a) for a in (q, k, v))
    if dy is not None:
        dq, dk, dv = _core(site, q, k, v, dy, k.shape[2] - new)
    for index, whole in ((1, dk), (2, dv)):
        given = g[index] if len(g) > index else None
        if given is not None:
            whole += given
    old = k.shape[2] - new
    back = [dq, dk[:, :, old:], dv[:, :, old:]]
    if is_flat:
        back = [_join_heads(a) for a in back]
    found: list[Array | None] = [*back, *[None] * (len(site.x) - 3)]
    for index, whole in zip(_PAST, (dk, dv), strict=True):
        if len(site.x) > index and site.x[index] is not None:
            found[index] = whole[:, :, :old]
    return found


def _core(
    site: Site, q: Array, k: Array, v: Array, dy: Array, offset: int
) -> tuple[Array, Array, Array]:
    """dL/d of queries, keys and values [batch, heads, length, size]."""
    scale = q.dtype.type(site.attribute("scale", None) or 1 / math.sqrt(q.shape[-1]))
    shared = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, shared, axis=1), np.repeat(v, shared, axis=1)
    scores = (q @ keys.swapaxes(-1, -2)) * scale
    mask = _mask(site, scores.shape[-2], scores.shape[-1], offset)
    cap = q.dtype.type(site.attribute("softcap", 0.0))
    if cap:
        bent = np.tanh(scores / cap)
        scores = cap * bent
    scores = scores + mask
    peak = scores.max(axis=-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(peak), peak, 0))
    total = p.sum(axis=-1, keepdims=True)
    p /= np.where(total == 0, 1, total)  # a row that is masked as a whole attends to nothing
    dv = p.swapaxes(-1, -2) @ dy
    dp = dy @ values.swapaxes(-1, -2)
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    if cap:
        ds *= 1 - bent * bent
    ds *= scale
    dq, dk = ds @ keys, ds.swapaxes(-1, -2) @ q
    if shared > 1:
        dk, dv = (a.reshape(a.shape[0], -1, shared, *a.shape[2:]).sum(axis=2) for a in (dk, dv))
    return dq, dk, dv


def _mask(site: Site, queries: int, keys: int, offset: int) -> Array:
    """What is added to scores; -inf where a query does not see a key."""
    dtype = site.x[0].dtype
    bias = np.zeros((queries, keys), dtype)
    given = site.x[3] if len(site.x) > 3 else None
    if given is not None:
        if given.dtype == np.bool_:
            given = np.where(given, dtype.type(0), dtype.type(-np.inf))
        missing = keys - given.shape[-1]
        ends = [(0, 0)] * (given.ndim - 1) + [(0, missing)]
        bias = bias + np.pad(given, ends, constant_values=-np.inf)
    if site.attribute("is_causal", 0):
        sees = np.arange(keys) <= np.arange(queries)[:, None] + offset
        bias = bias + np.where(sees, dtype.type(0), dtype.type(-np.inf))
    return bias


def _split_heads(x: Array, heads: int) -> Array:
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def _join_heads(x: Array) -> Array:
    batch, heads, length, size = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * size)


def _require_plain(site: Site) -> None:
    odd = [
        name
        for name in ("left_window_size", "right_window_size")
        if site.attribute(name, -1) not in (-1, None)
    ]
    if len(site.x) > 6 and site.x[6] is not None:
        odd.append("nonpad_kv_seqlen")
    if any(site.wanted[3:4]):
        odd.append("a mask that depends on weights")
    if odd:
        raise errors.InputError(
            errors.Diagnostic(
                "error", "QG410", graph.where(site.node),
                f"there is no rule for gradients through Attention with {', '.join(odd)}",
                "leave pass tune out of the recipe's pipeline for this model",
            )
        )  # fmt: skip
