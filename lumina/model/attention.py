"""Flag-DiT's attention: self-attention over the pack, and a gated text branch that shares its queries.

Shape suffixes: t token of the pack, s caption token, d model dim, h head, e element of a head.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lumina.kernels import AttentionPlan, attention, qk_norm_rope
from lumina.model.tokens import Captions

KQ_NORM_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What all blocks' attention shares in one forward pass, beside the tokens."""

    cos_te: Float[Tensor, "t half"]
    sin_te: Float[Tensor, "t half"]
    plan: AttentionPlan
    query_scale_t: Float[Tensor, "t"] | None  # proportional attention
    captions: Captions | None
    text_plan: AttentionPlan | None
    key_source_s: Int[Tensor, "s"] | None = None  # tokens whose keys and values are seen; None: all, in their order
    text_order_t: Int[Tensor, "t"] | None = None  # tokens as `text_plan` has them; None: in their order


class AttentionCore(nn.Module):
    """Block-diagonal attention on one device. A parallel layout swaps it."""

    def forward(
        self,
        q_the: Float[Tensor, "t h e"],
        k_she: Float[Tensor, "s kv e"],
        v_she: Float[Tensor, "s kv e"],
        plan: AttentionPlan,
    ) -> Float[Tensor, "t h e"]:
        return attention(q_the, k_she, v_she, plan)


class NormRope(nn.Module):
    """KQ-norm over the full width of queries and keys, then rotary embedding. Swapped where heads are split."""

    def forward(
        self,
        q_td: Float[Tensor, "t width"],
        k_td: Float[Tensor, "t kv_width"],
        q_norm: nn.LayerNorm | None,
        k_norm: nn.LayerNorm | None,
        inputs: AttentionInputs,
    ) -> tuple[Float[Tensor, "t h e"], Float[Tensor, "t kv e"]]:
        return qk_norm_rope(q_td, k_td, *_affine(q_norm), *_affine(k_norm), inputs.cos_te, inputs.sin_te)


class Attention(nn.Module):
    """Self-attention with KQ-norm and RoPE, plus, where captions have a width, the zero-gated text branch."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, qk_norm: bool, cap_feat_dim: int | None):
        super().__init__()
        self.head_dim = dim // n_heads
        kv_width = n_kv_heads * self.head_dim
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_width, bias=False)
        self.wv = nn.Linear(dim, kv_width, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.LayerNorm(dim, KQ_NORM_EPS) if qk_norm else None
        self.k_norm = nn.LayerNorm(kv_width, KQ_NORM_EPS) if qk_norm else None
        self.norm_rope = NormRope()
        self.core = AttentionCore()
        if cap_feat_dim is not None:
            self.wk_y = nn.Linear(cap_feat_dim, kv_width, bias=False)
            self.wv_y = nn.Linear(cap_feat_dim, kv_width, bias=False)
            self.ky_norm = nn.LayerNorm(kv_width, KQ_NORM_EPS) if qk_norm else None
            self.gate = nn.Parameter(torch.zeros(n_heads))
            self.text_core = AttentionCore()

    def forward(
        self,
        x_td: Float[Tensor, "t d"],
        inputs: AttentionInputs,
        captions_sd: Float[Tensor, "s width"] | None,
    ) -> Float[Tensor, "t d"]:
        """`captions_sd`: the pack's caption features, normed by the block."""
        q_the, k_the = self.norm_rope(self.wq(x_td), self.wk(x_td), self.q_norm, self.k_norm, inputs)
        v_the = self.wv(x_td).unflatten(-1, (-1, self.head_dim))
        scaled_q = q_the
        if inputs.query_scale_t is not None:
            scaled_q = q_the * inputs.query_scale_t[:, None, None].to(q_the.dtype)
        if inputs.key_source_s is not None:
            k_the, v_the = k_the[inputs.key_source_s], v_the[inputs.key_source_s]
        out_the = self.core(scaled_q, k_the, v_the, inputs.plan)
        if captions_sd is not None:
            out_the = out_the + self._text_branch(q_the, captions_sd, inputs.text_plan, inputs.text_order_t)
        return self.wo(out_the.flatten(1))

    def _text_branch(
        self,
        q_the: Float[Tensor, "t h e"],
        captions_sd: Float[Tensor, "s width"],
        plan: AttentionPlan,
        order_t: Int[Tensor, "t"] | None,
    ) -> Float[Tensor, "t h e"]:
        # Caption keys carry no position: they are normed, not rotated.
        k_sd = self.wk_y(captions_sd)
        if self.ky_norm is not None:
            k_sd = self.ky_norm(k_sd)
        k_she = k_sd.unflatten(-1, (-1, self.head_dim))
        v_she = self.wv_y(captions_sd).unflatten(-1, (-1, self.head_dim))
        if order_t is None:
            out_the = self.text_core(q_the, k_she, v_she, plan)
        else:
            out_the = torch.empty_like(q_the).index_copy(0, order_t, self.text_core(q_the[order_t], k_she, v_she, plan))
        return self.gate.tanh()[:, None] * out_the


def _affine(norm: nn.LayerNorm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.weight, norm.bias)
