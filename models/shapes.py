"""Sizes of the reference models: shared by the graph builders and the training scripts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Llama:
    """Decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU."""

    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 5
    heads: int = 8
    key_heads: int = 4
    head_dim: int = 16
    ffn: int = 384
    theta: float = 10000.0
    epsilon: float = 1e-5

    @property
    def key_width(self) -> int:
        """Width of the key and of the value projection."""
        return self.key_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Gpt:
    """Decoder with LayerNorm, learned positions, biases, GELU and tied embeddings."""

    vocabulary: int = 1024
    positions: int = 256
    hidden: int = 128
    layers: int = 5
    heads: int = 8
    ffn: int = 512
    epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


@dataclass(frozen=True, slots=True)
class ConvLayer:
    """Convolution, batch normalization, perhaps a residual, then an activation."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    depthwise: bool = False
    activation: str = "relu"  # relu, clip (relu6) or none
    adds: str = ""  # output of this earlier layer is added before the activation

    @property
    def groups(self) -> int:
        """Channels are convolved alone when depthwise."""
        return self.inputs if self.depthwise else 1


CNN = (
    ConvLayer("stem", 1, 32, 3),
    ConvLayer("depthwise1", 32, 32, 3, depthwise=True, activation="clip"),
    ConvLayer("pointwise1", 32, 64, 1),
    ConvLayer("residual1", 64, 64, 3),
    ConvLayer("residual2", 64, 64, 3, adds="pointwise1"),
    ConvLayer("depthwise2", 64, 64, 3, stride=2, depthwise=True, activation="clip"),
    ConvLayer("pointwise2", 64, 96, 1, activation="none"),
)
CNN_EPSILON = 1e-5
CLASSES = 10
