# mypy: ignore-errors
# The `train` extra (torch) is not part of the type-checked environment.
"""The decoders as torch modules, as small as they can be written.

Parameter names here are the tensor names in `models/weights/*.safetensors`. Linear weights are
[N, K] as torch has them; the store transposes them to the [K, N] that MatMul reads.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from qgraph.models.shapes import Gpt, Llama


class BitLinear(nn.Linear):
    """y = x^ W^ with W^ in {-s, 0, +s} and x^ int8 per token: BitNet b1.58, arXiv 2402.17764.

    s = mean |W|, W^ = s clip(round(W / s), -1, 1). Rounding passes gradients straight through.
    Once `frozen`, the stored weight is W^ itself and activations stay float, as in the graph.
    """

    frozen = False

    def ternary(self) -> torch.Tensor:
        """Return W^ [N, K]."""
        scale = self.weight.abs().mean().clamp(min=1e-5)
        return (self.weight / scale).round().clamp(-1, 1) * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] -> [..., N]."""
        if self.frozen:
            return super().forward(x)
        scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        x = x + ((x / scale).round() * scale - x).detach()
        w = self.weight + (self.ternary() - self.weight).detach()
        return F.linear(x, w)


class LlamaBlock(nn.Module):
    """Pre-norm attention with rotary positions and grouped keys, then SwiGLU."""

    def __init__(self, shape: Llama, linear: type[nn.Linear], dropout: float) -> None:
        super().__init__()
        self.shape = shape
        hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.key_width
        self.input_norm = nn.RMSNorm(hidden, eps=shape.epsilon)
        self.q_proj = linear(hidden, queries, bias=False)
        self.k_proj = linear(hidden, keys, bias=False)
        self.v_proj = linear(hidden, keys, bias=False)
        self.o_proj = linear(queries, hidden, bias=False)
        self.post_norm = nn.RMSNorm(hidden, eps=shape.epsilon)
        self.gate_proj = linear(hidden, shape.ffn, bias=False)
        self.up_proj = linear(hidden, shape.ffn, bias=False)
        self.down_proj = linear(shape.ffn, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, hidden]; cos, sin: [seq, head_dim]."""
        h = self.input_norm(x)
        q = _rotate(self._heads(self.q_proj(h)), cos, sin)
        k = _rotate(self._heads(self.k_proj(h)), cos, sin)
        v = self._heads(self.v_proj(h))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.dropout(self.o_proj(mixed.transpose(1, 2).flatten(2)))
        h = self.post_norm(x)
        return x + self.dropout(self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h)))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (-1, self.shape.head_dim)).transpose(1, 2)


class LlamaModel(nn.Module):
    """input_ids [batch, seq] -> logits [batch, seq, vocabulary]."""

    def __init__(self, shape: Llama, linear: type[nn.Linear], dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        blocks = [LlamaBlock(shape, linear, dropout) for _ in range(shape.layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.epsilon)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        self.dropout = nn.Dropout(dropout)
        _initialise(self, shape.layers)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, seq] -> [batch, seq, vocabulary]."""
        half = torch.arange(0, self.shape.head_dim, 2) / self.shape.head_dim
        angles = torch.outer(torch.arange(ids.shape[1]), self.shape.theta**-half).repeat(1, 2)
        x = self.dropout(self.embed_tokens(ids))
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.lm_head(self.norm(x))


class GptBlock(nn.Module):
    """Pre-norm attention and GELU feed-forward, biases everywhere."""

    def __init__(self, shape: Gpt, dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.ln_1 = nn.LayerNorm(shape.hidden, eps=shape.epsilon)
        self.c_attn = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.c_proj = nn.Linear(shape.hidden, shape.hidden)
        self.ln_2 = nn.LayerNorm(shape.hidden, eps=shape.epsilon)
        self.fc_in = nn.Linear(shape.hidden, shape.ffn)
        self.fc_out = nn.Linear(shape.ffn, shape.hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, hidden] -> the same shape."""
        heads = self.c_attn(self.ln_1(x)).unflatten(2, (3, self.shape.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.c_proj(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.fc_out(F.gelu(self.fc_in(self.ln_2(x)))))


class GptModel(nn.Module):
    """input_ids [batch, seq <= positions] -> logits [batch, seq, vocabulary]; tied embeddings."""

    def __init__(self, shape: Gpt, dropout: float) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocabulary, shape.hidden)
        self.wpe = nn.Embedding(shape.positions, shape.hidden)
        self.h = nn.ModuleList([GptBlock(shape, dropout) for _ in range(shape.layers)])
        self.ln_f = nn.LayerNorm(shape.hidden, eps=shape.epsilon)
        self.dropout = nn.Dropout(dropout)
        _initialise(self, shape.layers)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, seq] -> [batch, seq, vocabulary]."""
        x = self.dropout(self.wte(ids) + self.wpe.weight[: ids.shape[1]])
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def _initialise(model: nn.Module, layers: int) -> None:
    """Normal(0, 0.02), and less by sqrt(2 layers) where a block writes the residual (GPT-2)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
            writes_residual |= name.endswith("fc_out.weight")
            spread = 0.02 / math.sqrt(2 * layers) if writes_residual else 0.02
            nn.init.normal_(parameter, std=spread)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
