"""Make one small encoder twice: with channels before tokens (1 x 1 convolutions), and with tokens before channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

VOCABULARY, WIDTH, HEADS, LONGEST = 160, 64, 4, 64


class Norm(nn.Module):
    """Normalise along axis 1, as written by hand, or along the last."""

    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.turns = turns
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(WIDTH, 1))
        self.bias = nn.Parameter(0.1 * torch.randn(WIDTH, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.turns:
            return functional.layer_norm(x.transpose(1, 2), (WIDTH,), self.weight[:, 0], self.bias[:, 0]).transpose(
                1, 2
            )
        centred = x - x.mean(1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-5) * self.weight + self.bias


class Layer(nn.Module):
    """Compute attention and a feed-forward block by convolutions with kernel 1."""

    def __init__(self, turns: bool, groups: int, keys_first: bool) -> None:
        super().__init__()
        self.keys_first = keys_first
        self.query, self.key, self.value = (nn.Conv1d(WIDTH, WIDTH, 1, groups=groups) for _ in range(3))
        self.output, self.norms = nn.Conv1d(WIDTH, WIDTH, 1), nn.ModuleList(Norm(turns) for _ in range(2))
        self.up, self.down = nn.Conv1d(WIDTH, 4 * WIDTH, 1, groups=groups), nn.Conv1d(4 * WIDTH, WIDTH, 1)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], HEADS, WIDTH // HEADS, x.shape[2])
        query, key, value = (part(x).view(shape) for part in (self.query, self.key, self.value))
        scale = math.sqrt(shape[2])
        if self.keys_first:
            shares = (key.transpose(2, 3) @ query / scale + bias.transpose(2, 3)).softmax(2)
            mixed = value @ shares
        else:
            shares = (query.transpose(2, 3) @ key / scale + bias).softmax(-1)
            mixed = value @ shares.transpose(2, 3)
        x = self.norms[0](x + self.output(mixed.reshape(x.shape)))
        return self.norms[1](x + self.down(functional.gelu(self.up(x))))


class Encoder(nn.Module):
    """Keep [batch, channels, tokens] throughout, and pool over axis 2.

    Args:
        turns: let the norms turn the tokens, instead of computing along axis 1.
        groups: of the convolutions.
        keys_first: let a softmax over axis 2 make attention's shares.
        before: makes a module that the tokens pass first, given their width.
        pooling: "mean" or "max", over axis 2.
    """

    def __init__(
        self,
        turns: bool = False,
        groups: int = 1,
        keys_first: bool = False,
        before: Callable[[int], nn.Module] | None = None,
        pooling: str = "mean",
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(0.3 * torch.randn(1, WIDTH, LONGEST))
        self.norm, self.pooling = Norm(turns), pooling
        self.layers = nn.ModuleList(Layer(turns, groups, keys_first) for _ in range(2))
        self.before = before(WIDTH) if before is not None else None
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                module.weight.data *= 1.7

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask[:, None, :].to(torch.float32)
        x = self.norm(self.table(input_ids).transpose(1, 2) + self.positions[:, :, : input_ids.shape[1]])
        if self.before is not None:
            x = self.before(x * mask) * mask
        for layer in self.layers:
            x = layer(x, (1.0 - mask[:, None]) * -10000.0)
        if self.pooling == "max":
            return functional.normalize(x.masked_fill(mask == 0, -1e4).max(2).values, dim=-1)
        return functional.normalize((x * mask).sum(2) / mask.sum(2).clamp(min=1e-9), dim=-1)


class TokensFirst(nn.Module):
    """Compute what an encoder of this file computes, with its weights, on [batch, tokens, channels]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        own, mask = self.encoder, attention_mask[:, :, None].to(torch.float32)
        x = self._normed(own.norm, own.table(input_ids) + own.positions[0].T[: input_ids.shape[1]])
        bias = (1.0 - mask.transpose(1, 2)[:, None]) * -10000.0
        for layer in own.layers:
            shape = (x.shape[0], x.shape[1], HEADS, WIDTH // HEADS)
            parts = (layer.query, layer.key, layer.value)
            query, key, value = (self._product(part, x).view(shape).transpose(1, 2) for part in parts)
            shares = (query @ key.transpose(2, 3) / math.sqrt(shape[3]) + bias).softmax(-1)
            mixed = (shares @ value).transpose(1, 2).reshape(x.shape)
            x = self._normed(layer.norms[0], x + self._product(layer.output, mixed))
            up = functional.gelu(self._product(layer.up, x))
            x = self._normed(layer.norms[1], x + self._product(layer.down, up))
        return functional.normalize((x * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)

    @staticmethod
    def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (WIDTH,), norm.weight[:, 0], norm.bias[:, 0])

    @staticmethod
    def _product(convolution: Any, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, convolution.weight[:, :, 0], convolution.bias)


def squeezebert(width: int, layers: int) -> nn.Module:
    """Build SqueezeBERT, whose products are grouped convolutions, from its configuration."""
    from transformers import SqueezeBertConfig, SqueezeBertModel

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = SqueezeBertModel(
                SqueezeBertConfig(
                    vocab_size=VOCABULARY, hidden_size=width, embedding_size=width, num_hidden_layers=layers,
                    num_attention_heads=HEADS, intermediate_size=4 * width, max_position_embeddings=LONGEST,
                    initializer_range=0.1,
                )
            )  # fmt: skip

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    return Hidden()


def written(module: nn.Module, folder: Path) -> Path:
    """Export a module as its caller would, and give the ONNX file."""
    from edgeq.frontend.torch.module import write_onnx

    folder.mkdir(parents=True, exist_ok=True)
    return write_onnx(module.eval(), None, folder, LONGEST)
