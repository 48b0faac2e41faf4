"""Flag-DiT: the flow-matching diffusion transformer of Lumina-T2X (arXiv 2405.05945, section 2.2).

One path through the model: a packed token sequence. Batches and lists of unequal samples are packed on the
way in and unpacked on the way out. Nothing here knows of more than one device.

Shape suffixes: t token of the pack, n sample, s caption token, d model dim, w condition width, p patch element.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lumina.kernels import gated_residual, gated_residual_norm, layer_norm_modulate, rms_norm_modulate, swiglu
from lumina.model.attention import Attention, AttentionInputs
from lumina.model.config import FlagDiTConfig
from lumina.model.initialise import initialise
from lumina.model.modulation import LabelEmbedder, Modulation, RMSNorm, TimestepEmbedder
from lumina.model.reach import OWN, Reach
from lumina.model.rope import TRAINED, Extrapolation, rotary_cos_sin
from lumina.model.tokens import NEXTFRAME, NEXTLINE, AttentionPlan, Captions, Layout, layout_of, pack, unpack

FINAL_NORM_EPS = 1e-6
CAPTION_NORM_EPS = 1e-5

Samples = Tensor | Sequence[Tensor]

__all__ = ["FlagDiT", "FlagDiTConfig"]


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1·x) · w3·x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x_td: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
        return self.w2(swiglu(self.w1(x_td), self.w3(x_td)))


class Block(nn.Module):
    """Attention and feed-forward, each modulated before and gated after (adaLN-Zero, DiT)."""

    def __init__(self, config: FlagDiTConfig):
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.attention = Attention(dim, config.n_heads, config.kv_heads, config.qk_norm, config.cap_feat_dim)
        self.feed_forward = FeedForward(dim, config.ffn_dim)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)
        self.attention_y_norm = RMSNorm(config.cap_feat_dim, eps) if config.cap_feat_dim is not None else None
        self.adaLN_modulation = Modulation(config.condition_width, dim, 6)

    def forward(
        self,
        x_td: Float[Tensor, "t d"],
        c_nw: Float[Tensor, "n w"],
        sample_id_t: Int[Tensor, "t"],
        inputs: AttentionInputs,
    ) -> Float[Tensor, "t d"]:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.adaLN_modulation(c_nw)
        captions_sd = None if self.attention_y_norm is None else self.attention_y_norm(inputs.captions.features)

        norm = self.attention_norm
        attended = self.attention(
            rms_norm_modulate(x_td, norm.weight, scale_a, shift_a, sample_id_t, norm.eps), inputs, captions_sd
        )
        norm = self.ffn_norm
        x_td, normed_td = gated_residual_norm(
            x_td, gate_a, attended, norm.weight, scale_f, shift_f, sample_id_t, norm.eps
        )
        return gated_residual(x_td, gate_f, self.feed_forward(normed_td), sample_id_t)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the projection back to patches."""

    def __init__(self, config: FlagDiTConfig):
        super().__init__()
        self.patch_size, self.in_channels = config.patch_size, config.in_channels
        self.linear = nn.Linear(config.dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = Modulation(config.condition_width, config.dim, 2)

    def forward(
        self, x_td: Float[Tensor, "t d"], c_nw: Float[Tensor, "n w"], sample_id_t: Int[Tensor, "t"]
    ) -> Float[Tensor, "t p"]:
        shift, scale = self.adaLN_modulation(c_nw)
        out = self.linear(layer_norm_modulate(x_td, scale, shift, sample_id_t, FINAL_NORM_EPS))
        # The public weights put channels last on the way out and first on the way in.
        out = out.unflatten(-1, (self.patch_size, self.patch_size, -1))[..., : self.in_channels]
        return out.permute(0, 3, 1, 2).flatten(1)


class FlagDiT(nn.Module):
    """The transformer. State-dict keys are those of the public checkpoints.

    Parameters are initialised from torch's random state: Xavier-uniform projections, zeros for modulations, the
    final and the pooled-caption projection and the text gates.
    """

    def __init__(self, config: FlagDiTConfig):
        super().__init__()
        self.config = config
        dim, width = config.dim, config.condition_width
        self.x_embedder = nn.Linear(config.patch_size**2 * config.in_channels, dim)
        self.t_embedder = TimestepEmbedder(width)
        if config.text_conditional:
            self.cap_embedder = nn.Sequential(
                nn.LayerNorm(config.cap_feat_dim, CAPTION_NORM_EPS), nn.Linear(config.cap_feat_dim, width)
            )
            self.eol_token = nn.Parameter(torch.empty(dim))
            # Of the public layout and read nowhere: a pack has no padding.
            self.pad_token = nn.Parameter(torch.empty(dim), requires_grad=False)
            if config.frames:
                self.nextframe_token = nn.Parameter(torch.empty(dim))
        else:
            self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config)
        initialise(self)

    def forward(
        self,
        x: Samples,
        t: Float[Tensor, "n"],
        cap_feats: Float[Tensor, "n l width"] | None = None,
        cap_mask: Tensor | None = None,
        labels: Int[Tensor, "n"] | None = None,
        extrapolation: Extrapolation = TRAINED,
        *,
        layout: Layout | None = None,
        captions: Captions | None = None,
        reach: Reach = OWN,
    ) -> Samples:
        """The predicted velocity of each sample, in the form `x` came in.

        Args:
            x: (N, C, H, W), (N, F, C, H, W), or a list of (C, H, W) and (F, C, H, W) of any sizes; or, with
                `layout` (and `captions` in place of `cap_feats`), a pack as `tokens.pack` makes it.
            t: times in [0, 1]; t=1 is data.
            cap_feats, cap_mask: caption features and which of their tokens are real, of a text-conditional model.
            labels: classes of a label-conditional model; `config.num_classes` stands for "none".
            extrapolation: how to run at lengths not trained on.
            reach: captions of parts of samples, and keys that samples share, of the tokens of this very pack.

        Raises:
            ValueError: for sides that the patch size does not divide, conditions that the model does not take or
                lacks, or counts that disagree.
        """
        if layout is not None:
            return self.forward_packed(x, t, layout, captions, labels, extrapolation, reach)
        samples = [sample.unsqueeze(0) if sample.dim() == 3 else sample for sample in x]
        if wrong := [sample for sample in samples if sample.dim() != 4]:
            raise ValueError(f"a sample is {tuple(wrong[0].shape)}; samples are (C, H, W) or (F, C, H, W)")
        self._check(samples, t, cap_feats, cap_mask, labels)
        captions = None if cap_feats is None else Captions.from_padded(cap_feats, cap_mask)
        layout = self.layout([tuple(sample.shape) for sample in samples], t.device)
        out = self.forward_packed(pack(samples, layout), t, layout, captions, labels, extrapolation, reach)
        results = [y.reshape(sample.shape) for y, sample in zip(unpack(out, layout), x, strict=True)]
        return torch.stack(results) if isinstance(x, Tensor) else results

    def layout(self, shapes: Sequence[tuple[int, int, int, int]], device: torch.device) -> Layout:
        """How samples of the given (F, C, H, W) shapes lie in this model's packs."""
        return layout_of(shapes, self.config.patch_size, self.config.text_conditional, device)

    def forward_packed(
        self,
        x_tp: Float[Tensor, "t p"],
        t: Float[Tensor, "n"],
        layout: Layout,
        captions: Captions | None = None,
        labels: Int[Tensor, "n"] | None = None,
        extrapolation: Extrapolation = TRAINED,
        reach: Reach = OWN,
    ) -> Float[Tensor, "t p"]:
        """The velocity of every patch of a pack, patches in the order (C, p, p) as `tokens.pack` lays them.

        Rows of learned tokens are meaningless on the way out.
        """
        captions = None if captions is None else captions.to(dtype=self.x_embedder.weight.dtype)
        x_td = self.embed(x_tp, layout)
        inputs = self.attention_inputs(layout, captions, extrapolation, reach)
        sample_id_t = layout.sample_id_t
        if reach.groups is not None:
            # What follows a caption is modulated by it, too: a group is to modulation what a sample is.
            sample_id_t, t, captions = reach.groups.group_t, t[reach.groups.sample_g], inputs.captions
        c_nw = self.condition(t, captions, labels)
        for block in self.layers:
            x_td = block(x_td, c_nw, sample_id_t, inputs)
        return self.final_layer(x_td, c_nw, sample_id_t).to(x_tp.dtype)

    def embed(self, x_tp: Float[Tensor, "t p"], layout: Layout) -> Float[Tensor, "t d"]:
        """Patches projected to the model's width, learned tokens at their places."""
        x_td = self.x_embedder(x_tp.to(self.x_embedder.weight.dtype))
        if not self.config.text_conditional:
            return x_td
        x_td = torch.where((layout.kind_t == NEXTLINE)[:, None], self.eol_token, x_td)
        if self.config.frames:
            x_td = torch.where((layout.kind_t == NEXTFRAME)[:, None], self.nextframe_token, x_td)
        return x_td

    def condition(
        self, t: Float[Tensor, "n"], captions: Captions | None, labels: Int[Tensor, "n"] | None
    ) -> Float[Tensor, "n w"]:
        """Time plus pooled caption or class: what all modulation is made from."""
        embedded = self.y_embedder(labels) if captions is None else self.cap_embedder(captions.pooled())
        return self.t_embedder(t) + embedded

    def attention_inputs(
        self,
        layout: Layout,
        captions: Captions | None,
        extrapolation: Extrapolation = TRAINED,
        reach: Reach = OWN,
    ) -> AttentionInputs:
        """Angles, lengths and captions that every block's attention shares."""
        device = layout.position_t.device
        cos, sin = rotary_cos_sin(layout.position_t, self.config.head_dim, extrapolation)
        query_scale = None
        if extrapolation.base_seqlen is not None:
            scales = [extrapolation.query_scale(length) for length in layout.lengths]
            query_scale = torch.tensor(scales, device=device)[layout.sample_id_t]
        text_plan, text_order = None, None
        if reach.groups is not None:
            captions = reach.groups.captions.to(dtype=self.x_embedder.weight.dtype)
            text_plan, text_order = reach.groups.plan, reach.groups.order_t
        elif captions is not None:
            text_plan = AttentionPlan(layout.attention.query_lengths, captions.lengths, device)
        plan, source = layout.attention, None
        if reach.keys is not None:
            plan, source = reach.keys.plan, reach.keys.source_s
        return AttentionInputs(cos, sin, plan, query_scale, captions, text_plan, source, text_order)

    def forward_with_cfg(
        self,
        x: Float[Tensor, "n2 ..."],
        t: Float[Tensor, "n2"],
        cap_feats: Float[Tensor, "n2 l width"] | None = None,
        cap_mask: Tensor | None = None,
        cfg_scale: float = 4.0,
        rope_scaling_factor: float | None = None,
        ntk_factor: float | None = None,
        base_seqlen: int | None = None,
        proportional_attn: bool = False,
        guided_channels: int | None = None,
        labels: Int[Tensor, "n2"] | None = None,
    ) -> Float[Tensor, "n2 ..."]:
        """Classifier-free guidance: ``uncond + cfg_scale · (cond - uncond)``.

        `x`, `t` and the conditions are doubled, the conditional half first; the second half of `x` is ignored and
        the first repeated. `guided_channels` guides the first so many channels and leaves the others as each half
        predicts them (the public code: 3); None guides all, and both halves of the result are then equal.

        Raises:
            ValueError: for an odd batch, or `proportional_attn` without `base_seqlen`.
        """
        if len(x) % 2:
            raise ValueError(f"guidance takes a doubled batch (conditional half first); this one has {len(x)} samples")
        if proportional_attn and base_seqlen is None:
            raise ValueError("proportional_attn needs base_seqlen, the length in tokens that the model was trained at")
        extrapolation = Extrapolation(
            rope_scaling_factor=1.0 if rope_scaling_factor is None else rope_scaling_factor,
            ntk_factor=1.0 if ntk_factor is None else ntk_factor,
            base_seqlen=base_seqlen if proportional_attn else None,
        )
        half = x[: len(x) // 2]
        out = self(torch.cat((half, half)), t, cap_feats, cap_mask, labels, extrapolation)
        return guide(out, cfg_scale, guided_channels)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model*.safetensors` (with an index where the file is split)."""
        from lumina.model.pretrained import save_pretrained

        save_pretrained(self, Path(directory))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, config: FlagDiTConfig | None = None, *, weights: str = "ema"
    ) -> "FlagDiT":
        """The model in an inference folder or in a public Lumina-T2I checkpoint folder.

        Args:
            directory: holds `config.json` and `model*.safetensors`, or `consolidated*.{pth,safetensors}`.
            config: settles what the tensors of a public checkpoint leave open.
            weights: "ema" or "model"; of a public checkpoint that has both.

        Raises:
            ValueError: for a folder with neither, sizes that cannot be told, or keys missing or left over.
        """
        from lumina.model.pretrained import load_pretrained

        return load_pretrained(Path(directory), config, weights)

    def _check(
        self,
        samples: list[Tensor],
        t: Tensor,
        cap_feats: Tensor | None,
        cap_mask: Tensor | None,
        labels: Tensor | None,
    ) -> None:
        given, needed = ("labels", "cap_feats") if self.config.text_conditional else ("cap_feats", "labels")
        conditions = {"cap_feats": cap_feats, "labels": labels}
        if conditions[given] is not None or conditions[needed] is None:
            raise ValueError(
                f"this model is {'text' if self.config.text_conditional else 'label'}-conditional: "
                f"it takes {needed} and no {given}"
            )
        if t.dim() != 1:
            raise ValueError(f"t is {tuple(t.shape)}; it holds a time for each sample, (N,)")
        if not len(samples) == len(t) == len(conditions[needed]):
            raise ValueError(
                f"{len(samples)} samples, {len(t)} times and {len(conditions[needed])} conditions; "
                "there must be as many of each"
            )
        if not samples:
            raise ValueError("there is no sample; a call takes at least one")
        if cap_feats is not None:
            width = self.config.cap_feat_dim
            if cap_feats.dim() != 3 or cap_feats.shape[-1] != width:
                raise ValueError(
                    f"cap_feats is {tuple(cap_feats.shape)}; this model takes (N, L, cap_feat_dim={width})"
                )
            if cap_mask is None or cap_mask.shape != cap_feats.shape[:2]:
                shape = None if cap_mask is None else tuple(cap_mask.shape)
                raise ValueError(f"cap_mask is {shape}; with these cap_feats it is {tuple(cap_feats.shape[:2])}")
        for sample in samples:
            frames, channels = sample.shape[:2]
            if channels != self.config.in_channels:
                raise ValueError(
                    f"a sample has {channels} channels; this model takes in_channels={self.config.in_channels}"
                )
            if frames > 1 and not self.config.frames:
                raise ValueError(f"a sample has {frames} frames; a model for more than one is built with frames=True")


def guide(out: Float[Tensor, "n2 ..."], scale: float, channels: int | None = None) -> Float[Tensor, "n2 ..."]:
    """Classifier-free guidance of a doubled output, conditional half first; the channel dim is third from last."""
    conditional, unconditional = out.chunk(2)
    guided = (unconditional + scale * (conditional - unconditional)).repeat(2, *[1] * (out.dim() - 1))
    if channels is None:
        return guided
    if not 1 <= channels <= out.shape[-3]:
        raise ValueError(f"guided_channels is {channels}; the latents have {out.shape[-3]} channels")
    return torch.cat((guided.narrow(-3, 0, channels), out.narrow(-3, channels, out.shape[-3] - channels)), dim=-3)
