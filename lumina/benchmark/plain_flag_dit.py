"""Flag-DiT as it is commonly written: a padded batch, one operation after another, nothing fused.

What our own step is measured against. The form is that of the public Lumina-T2I model: complex rotary embedding, norms,
modulation and gates each by themselves, samples filled up to the longest of the batch with a learned token, and an
attention mask. State-dict keys are the public ones, so that both models take the same weights.

Shape suffixes: n sample, l token of a padded sample, s token of a padded caption, d model dim, h head, e its element.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.model.config import FlagDiTConfig

_SINUSOID = 256


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_SINUSOID, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_n: Tensor) -> Tensor:
        half = _SINUSOID // 2
        frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=t_n.device))
        angles = t_n.float()[:, None] * frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """Self-attention, and cross-attention to the caption by the same queries behind a gate."""

    def __init__(self, config: FlagDiTConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        dim, kv_width, caption = config.dim, config.kv_heads * config.head_dim, config.cap_feat_dim
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_width, bias=False)
        self.wv = nn.Linear(dim, kv_width, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.wk_y = nn.Linear(caption, kv_width, bias=False)
        self.wv_y = nn.Linear(caption, kv_width, bias=False)
        self.gate = nn.Parameter(torch.zeros(config.n_heads))
        self.q_norm = nn.LayerNorm(dim) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(kv_width) if config.qk_norm else nn.Identity()
        self.ky_norm = nn.LayerNorm(kv_width) if config.qk_norm else nn.Identity()

    def forward(self, x_nld: Tensor, mask_nl: Tensor, turns_le: Tensor, y_nsd: Tensor, mask_ns: Tensor) -> Tensor:
        q = rotated(self._heads(self.q_norm(self.wq(x_nld))), turns_le)
        k = rotated(self._heads(self.k_norm(self.wk(x_nld))), turns_le)
        attended = self._attend(q, k, self._heads(self.wv(x_nld)), mask_nl)
        k, v = self._heads(self.ky_norm(self.wk_y(y_nsd))), self._heads(self.wv_y(y_nsd))
        attended = attended + self._attend(q, k, v, mask_ns) * self.gate.tanh().view(1, 1, -1, 1)
        return self.wo(attended.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _attend(self, q_nlhe: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if self.kv_heads < self.heads:
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q_nlhe, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2)


def rotated(x_nlhe: Tensor, turns_le: Tensor) -> Tensor:
    """Each pair of neighbours as a complex number, turned."""
    turned = torch.view_as_complex(x_nlhe.float().unflatten(-1, (-1, 2))) * turns_le[None, :, None]
    return torch.view_as_real(turned).flatten(-2).type_as(x_nlhe)


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def modulate(x_nld: Tensor, shift_nd: Tensor, scale_nd: Tensor) -> Tensor:
    return x_nld * (1 + scale_nd[:, None]) + shift_nd[:, None]


class Block(nn.Module):
    def __init__(self, config: FlagDiTConfig):
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.attention = Attention(config)
        self.feed_forward = FeedForward(dim, config.ffn_dim)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)
        self.attention_y_norm = RMSNorm(config.cap_feat_dim, eps)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.condition_width, 6 * dim))

    def forward(
        self, x_nld: Tensor, mask_nl: Tensor, turns_le: Tensor, y_nsd: Tensor, mask_ns: Tensor, c_nw: Tensor
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.adaLN_modulation(c_nw).chunk(6, dim=1)
        normed = modulate(self.attention_norm(x_nld), shift_a, scale_a)
        attended = self.attention(normed, mask_nl, turns_le, self.attention_y_norm(y_nsd), mask_ns)
        x_nld = x_nld + gate_a[:, None] * attended
        normed = modulate(self.ffn_norm(x_nld), shift_f, scale_f)
        return x_nld + gate_f[:, None] * self.feed_forward(normed)


class FinalLayer(nn.Module):
    def __init__(self, config: FlagDiTConfig):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.condition_width, 2 * config.dim))

    def forward(self, x_nld: Tensor, c_nw: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_nw).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_nld), shift, scale))


class PlainFlagDiT(nn.Module):
    """The text-conditional model for images, in training. Parameters are to be loaded."""

    def __init__(self, config: FlagDiTConfig):
        """
        Raises:
            ValueError: for sizes of a label-conditional model, or one for frames.
        """
        super().__init__()
        if not config.text_conditional or config.frames:
            raise ValueError(
                "the plain implementation is of the text-conditional model for images: leave model.num_classes and "
                "model.frames out"
            )
        self.config = config
        self.x_embedder = nn.Linear(config.patch_size**2 * config.in_channels, config.dim)
        self.t_embedder = TimestepEmbedder(config.condition_width)
        self.cap_embedder = nn.Sequential(
            nn.LayerNorm(config.cap_feat_dim), nn.Linear(config.cap_feat_dim, config.condition_width)
        )
        self.eol_token = nn.Parameter(torch.empty(config.dim))
        self.pad_token = nn.Parameter(torch.empty(config.dim))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config)
        self._turns: Tensor | None = None

    def forward(self, x: Sequence[Tensor], t_n: Tensor, captions_nsd: Tensor, caption_mask_ns: Tensor) -> list[Tensor]:
        """The velocity of each sample, (C, H, W) as it came in; `caption_mask_ns` is true at tokens."""
        dtype = self.x_embedder.weight.dtype
        x_nld, mask_nl = self.embed([sample.to(dtype) for sample in x])
        share = caption_mask_ns.float()[..., None]
        pooled = (captions_nsd.float() * share).sum(1) / share.sum(1)
        c_nw = self.t_embedder(t_n) + self.cap_embedder(pooled.to(dtype))
        y_nsd, turns_le = captions_nsd.to(dtype), self.turns(x_nld.shape[1], x_nld.device)
        for block in self.layers:
            x_nld = block(x_nld, mask_nl, turns_le, y_nsd, caption_mask_ns, c_nw)
        out_nlp = self.final_layer(x_nld, c_nw)
        return [self._unpatched(rows, sample).to(sample.dtype) for rows, sample in zip(out_nlp, x, strict=True)]

    def embed(self, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens (N, L, D) of all samples, filled up with the padding token, and which are no padding (N, L)."""
        p, embedded = self.config.patch_size, []
        for sample in x:
            channels, height, width = sample.shape
            patches = sample.view(channels, height // p, p, width // p, p).permute(1, 3, 0, 2, 4).flatten(2)
            ends = self.eol_token.expand(height // p, 1, -1)
            embedded.append(torch.cat((self.x_embedder(patches), ends), dim=1).flatten(0, 1))
        lengths = [len(tokens) for tokens in embedded]
        longest = max(lengths)
        filled = [torch.cat((tokens, self.pad_token.expand(longest - len(tokens), -1))) for tokens in embedded]
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        return torch.stack(filled), mask.to(x[0].device)

    def turns(self, length: int, device: torch.device) -> Tensor:
        """(L, E/2) complex; kept for the longest batch so far."""
        if self._turns is None or len(self._turns) < length:
            pairs = torch.arange(0, self.config.head_dim, 2, dtype=torch.float64) / self.config.head_dim
            angles = torch.outer(torch.arange(length, dtype=torch.float64), 10000.0**-pairs)
            self._turns = torch.polar(torch.ones_like(angles), angles).to(device, torch.complex64)
        return self._turns[:length]

    def _unpatched(self, rows_lp: Tensor, sample: Tensor) -> Tensor:
        p, (channels, height, width) = self.config.patch_size, sample.shape
        rows, columns = height // p, width // p
        patches = rows_lp[: rows * (columns + 1)].view(rows, columns + 1, p, p, -1)[:, :-1]
        return patches.permute(4, 0, 2, 1, 3).reshape(-1, height, width)[:channels]
