"""Small random networks in PyTorch, written as their authors' public implementations are written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, HEAD, HIDDEN, POSITIONS = 96, 32, 4, 8, 48, 24


class RMSNorm(nn.Module):
    """As transformers has it: in float32, gain last."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


class Rotary(nn.Module):
    """Cosines and sines from positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequency", 10000.0 ** (-torch.arange(0, HEAD, 2).float() / HEAD))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, :, None].float() * self.frequency
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos()[:, None], angles.sin()[:, None]


def repeat_kv(x: Tensor, times: int) -> Tensor:
    batch, heads, seq, n = x.shape
    x = x[:, :, None].expand(batch, heads, times, seq, n)
    return x.reshape(batch, heads * times, seq, n)


class LlamaAttention(nn.Module):
    """Grouped heads; biases and norms of queries and keys if asked for."""

    def __init__(self, kv_heads: int = 2, *, bias: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.q = nn.Linear(WIDTH, HEADS * HEAD, bias=bias)
        self.k = nn.Linear(WIDTH, kv_heads * HEAD, bias=bias)
        self.v = nn.Linear(WIDTH, kv_heads * HEAD, bias=bias)
        self.o = nn.Linear(HEADS * HEAD, WIDTH, bias=False)
        self.q_norm, self.k_norm = (
            (RMSNorm(HEAD), RMSNorm(HEAD)) if qk_norm else (nn.Identity(), nn.Identity())
        )

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, seq, _ = x.shape
        q = self.q_norm(self.q(x).view(batch, seq, -1, HEAD)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(batch, seq, -1, HEAD)).transpose(1, 2)
        v = self.v(x).view(batch, seq, -1, HEAD).transpose(1, 2)
        cos, sin = rotary
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        kept, times = (k, v), HEADS // self.kv_heads
        if times > 1:
            k, v = repeat_kv(k, times), repeat_kv(v, times)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(out.transpose(1, 2).reshape(batch, seq, -1)), kept


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Mixture of two experts, both computed, the router's weights beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2, bias=False)
        self.experts = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        share = F.softmax(self.router(x), dim=-1)
        first, second = (e(x) for e in self.experts)
        return first * share[..., :1] + second * share[..., 1:]


class LlamaLayer(nn.Module):
    def __init__(
        self,
        *,
        parallel: bool,
        experts: bool,
        kv_heads: int,
        bias: bool,
        qk_norm: bool,
        sandwich: bool,
    ) -> None:
        super().__init__()
        self.parallel, self.sandwich = parallel, sandwich
        self.before = RMSNorm(WIDTH)
        self.attention = LlamaAttention(kv_heads, bias=bias, qk_norm=qk_norm)
        self.mlp = Experts() if experts else Gated()
        if not parallel:
            self.between = RMSNorm(WIDTH)
        if sandwich:
            self.after = nn.ModuleList(RMSNorm(WIDTH) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        normed = self.before(x)
        a, kept = self.attention(normed, rotary, past, mask)
        if self.parallel:
            return x + a + self.mlp(normed), kept
        x = x + (self.after[0](a) if self.sandwich else a)
        m = self.mlp(self.between(x))
        return x + (self.after[1](m) if self.sandwich else m), kept


class Llama(nn.Module):
    """A pre-norm decoder with rotary positions."""

    def __init__(
        self,
        layers: int = 2,
        kv_heads: int = 2,
        *,
        tied: bool = False,
        cache: bool = False,
        bias: bool = False,
        qk_norm: bool = False,
        parallel: bool = False,
        experts: bool = False,
        sandwich: bool = False,
    ) -> None:
        super().__init__()
        self.cache = cache
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.rotary = Rotary()
        self.layers = nn.ModuleList(
            LlamaLayer(
                parallel=parallel,
                experts=experts,
                kv_heads=kv_heads,
                bias=bias,
                qk_norm=qk_norm,
                sandwich=sandwich,
            )
            for _ in range(layers)
        )
        self.norm = RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor, past: list[Tensor] | None = None) -> tuple[Tensor, ...]:
        start = past[0].shape[2] if past is not None else 0
        seq = input_ids.shape[1]
        positions = torch.arange(start, start + seq)[None]
        mask = None
        if past is not None:
            every = torch.arange(start + seq)
            mask = (every[None] <= positions[0][:, None])[None, None]
        rotary = self.rotary(positions)
        x = self.table(input_ids)
        kept: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            own = None if past is None else (past[2 * i], past[2 * i + 1])
            x, pair = layer(x, rotary, own, mask)
            kept += pair
        return (self.head(self.norm(x)), *(kept if self.cache else ()))


class SelfAttention(nn.Module):
    """Heads with biases; one fused projection or three."""

    def __init__(self, *, fused: bool, causal: bool = False) -> None:
        super().__init__()
        self.fused, self.causal = fused, causal
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, seq, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).split(WIDTH, dim=2)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (t.view(batch, seq, HEADS, HEAD).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.o(out.transpose(1, 2).reshape(batch, seq, WIDTH))


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention(fused=False)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    """A post-norm encoder with a classifier on the first token."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.types = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(BertLayer() for _ in range(layers))
        self.pooler, self.classifier = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.types(torch.zeros_like(input_ids))
        x = self.norm(x + self.positions(torch.arange(input_ids.shape[1])[None]))
        mask = (1.0 - attention_mask[:, None, None, :].float()) * -10000.0
        for layer in self.layers:
            x = layer(x, mask)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class Block(nn.Module):
    """Pre-norm, LayerNorm, GELU: what a GPT-2 and a ViT have in common; in parallel as GPT-J has it."""

    def __init__(self, *, causal: bool, approximate: str, parallel: bool = False) -> None:
        super().__init__()
        self.parallel = parallel
        self.attention = SelfAttention(fused=True, causal=causal)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = None if parallel else nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.act = nn.GELU(approximate)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        if self.norm2 is None:
            return x + self.attention(normed) + self.down(self.act(self.up(normed)))
        x = x + self.attention(normed)
        return x + self.down(self.act(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """A pre-norm decoder with learned positions and a tied head."""

    def __init__(self, layers: int = 2, *, parallel: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.Sequential(
            *(Block(causal=True, approximate="tanh", parallel=parallel) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        return self.head(self.norm(self.layers(x)))


class Vit(nn.Module):
    """Patches, a class token, a pre-norm encoder."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.layers = nn.Sequential(
            *(Block(causal=False, approximate="none") for _ in range(layers))
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


class TorchEncoder(nn.Module):
    """PyTorch's own encoder layer, pre-norm, with Relu and its fused input projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, WIDTH)
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.embed(x))))
