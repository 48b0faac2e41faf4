"""Samples as one packed token sequence: patches, nextline and nextframe tokens, and the way back.

A sample (F, C, H, W) becomes F frames one after another, each frame H/p rows of W/p patches. With learned
tokens (the text-conditional model) every row ends in `nextline`, and a `nextframe` stands between each two
frames; the label-conditional model has patches alone. A pack is the concatenation of its samples.

Shape suffixes: t token of the pack, n sample, p element of a patch in the order (C, p, p).
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lumina.kernels import AttentionPlan

PATCH, NEXTLINE, NEXTFRAME = 0, 1, 2

Shape = tuple[int, int, int, int]
Counts = int | Int[np.ndarray, "n"]


def token_count(frames: Counts, height: Counts, width: Counts, patch_size: int, nextline: bool) -> Counts:
    """Tokens of a sample of latent size `height` × `width`, or of many; nextline and nextframe tokens counted."""
    rows, columns = height // patch_size, width // patch_size
    return frames * rows * (columns + nextline) + (frames - 1 if nextline else 0)


@dataclass(frozen=True, eq=False)
class Layout:
    """What each token of a pack, or of a stretch of one, is. Tensors are indexed by token unless said otherwise."""

    shapes: tuple[Shape, ...]
    patch_size: int
    lengths: tuple[int, ...]  # of the whole samples
    kind_t: Int[Tensor, "t"]  # PATCH, NEXTLINE or NEXTFRAME
    position_t: Int[Tensor, "t"]  # counts every token of a sample from 0
    sample_id_t: Int[Tensor, "t"]
    patch_index: Int[Tensor, "patches"]  # where the patches are, in raster order
    attention: AttentionPlan  # the tokens at hand, sample by sample, and the whole samples that they attend to

    @property
    def cu_seqlens(self) -> Int[Tensor, "n+1"]:
        """Where each sample starts, and the end."""
        return self.attention.cu_queries

    @property
    def is_patch_t(self) -> Bool[Tensor, "t"]:
        return self.kind_t == PATCH

    @property
    def patch_counts(self) -> tuple[int, ...]:
        """Patches of each whole sample."""
        p = self.patch_size
        return tuple(frames * (height // p) * (width // p) for frames, _, height, width in self.shapes)

    def stretch(self, start: int, stop: int) -> "Layout":
        """The tokens [start, stop) of this layout: what one of several holders of a pack has."""
        here = (self.patch_index >= start) & (self.patch_index < stop)
        ends = list(itertools.accumulate(self.attention.query_lengths))
        held = [
            max(0, min(stop, end) - max(start, end - length))
            for end, length in zip(ends, self.attention.query_lengths, strict=True)
        ]
        return replace(
            self,
            kind_t=self.kind_t[start:stop],
            position_t=self.position_t[start:stop],
            sample_id_t=self.sample_id_t[start:stop],
            patch_index=self.patch_index[here] - start,
            attention=AttentionPlan(tuple(held), self.attention.key_lengths, self.attention.device),
        )


def layout_of(shapes: Sequence[Shape], patch_size: int, nextline: bool, device: torch.device | str) -> Layout:
    """The layout of samples of the given (F, C, H, W) shapes, on `device`.

    Raises:
        ValueError: for a height or width that the patch size does not divide.
    """
    return _layout_of(tuple(shapes), patch_size, nextline, torch.device(device))


# A sampler asks for the same layout at every one of its steps.
@functools.lru_cache(maxsize=16)
def _layout_of(shapes: tuple[Shape, ...], patch_size: int, nextline: bool, device: torch.device) -> Layout:
    for _, _, height, width in shapes:
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"a sample of {height} × {width} cannot be cut into patches of {patch_size} × {patch_size}; "
                f"both sides must be multiples of {patch_size}"
            )
    kinds = [_kinds(shape, patch_size, nextline) for shape in shapes]
    lengths = tuple(len(kind) for kind in kinds)
    kind_t = torch.cat(kinds)
    return Layout(
        shapes=shapes,
        patch_size=patch_size,
        lengths=lengths,
        kind_t=kind_t.to(device),
        position_t=torch.cat([torch.arange(length) for length in lengths]).to(device),
        sample_id_t=torch.repeat_interleave(torch.tensor(lengths)).to(device),
        patch_index=(kind_t == PATCH).nonzero().squeeze(1).to(device),
        attention=AttentionPlan(lengths, lengths, device),
    )


def _kinds(shape: Shape, patch_size: int, nextline: bool) -> Int[Tensor, "t"]:
    frames, _, height, width = shape
    rows, columns = height // patch_size, width // patch_size
    if not nextline:
        return torch.full((frames * rows * columns,), PATCH, dtype=torch.int8)
    row = torch.full((columns + 1,), PATCH, dtype=torch.int8)
    row[-1] = NEXTLINE
    frame = torch.cat((row.repeat(rows), torch.tensor([NEXTFRAME], dtype=torch.int8)))
    return frame.repeat(frames)[:-1]


def pack(samples: Sequence[Float[Tensor, "_f _c _h _w"]], layout: Layout) -> Float[Tensor, "t p"]:
    """The samples' patches at their places in the pack; rows of learned tokens are zero."""
    patches = torch.cat([_patchify(sample, layout.patch_size) for sample in samples])
    rows = patches.new_zeros(len(layout.kind_t), patches.shape[1])
    return rows.index_copy(0, layout.patch_index, patches)


def unpack(rows: Float[Tensor, "t p"], layout: Layout) -> list[Float[Tensor, "_f _c _h _w"]]:
    """The inverse of `pack`; rows of learned tokens are dropped."""
    p = layout.patch_size
    patches = rows[layout.patch_index].split(layout.patch_counts)
    return [_unpatchify(rows_i, shape, p) for rows_i, shape in zip(patches, layout.shapes, strict=True)]


def _patchify(sample: Float[Tensor, "f c h w"], p: int) -> Float[Tensor, "patches p"]:
    f, c, h, w = sample.shape
    return sample.reshape(f, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, c * p * p)


def _unpatchify(patches: Float[Tensor, "patches p"], shape: Shape, p: int) -> Float[Tensor, "f c h w"]:
    f, c, h, w = shape
    return patches.view(f, h // p, w // p, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(shape)


@dataclass(frozen=True, eq=False)
class Captions:
    """Caption features of a pack without padding: tokens s of all captions one after another."""

    features: Float[Tensor, "s width"]
    lengths: tuple[int, ...]
    sample_id_s: Int[Tensor, "s"]

    @staticmethod
    def from_padded(features: Float[Tensor, "n l width"], mask: Tensor) -> "Captions":
        """`mask` (N, L), bool or 0/1, is true at tokens.

        Raises:
            ValueError: for a caption of no tokens; the empty caption keeps its BOS or one null token.
        """
        mask = mask.bool()
        lengths = tuple(mask.sum(1).tolist())
        if 0 in lengths:
            raise ValueError(
                f"caption {lengths.index(0)} of the batch has no tokens (its mask is all false); "
                "an empty caption keeps its BOS or one null token"
            )
        return Captions.of(features[mask], lengths)

    @staticmethod
    def of(features: Float[Tensor, "s width"], lengths: tuple[int, ...]) -> "Captions":
        """Captions of these lengths one after another.

        Raises:
            ValueError: for one of no tokens.
        """
        if 0 in lengths:
            raise ValueError(f"caption {lengths.index(0)} of the batch has no tokens; an empty one keeps a null token")
        return Captions(features, lengths, torch.repeat_interleave(torch.tensor(lengths)).to(features.device))

    def to(self, *, dtype: torch.dtype) -> "Captions":
        """The same captions with features of another dtype."""
        return Captions(self.features.to(dtype), self.lengths, self.sample_id_s)

    def pooled(self) -> Float[Tensor, "n width"]:
        """Mean of each caption's tokens, summed in fp32."""
        lengths = torch.tensor(self.lengths, device=self.features.device)
        mean = torch.segment_reduce(self.features.float(), "mean", lengths=lengths, axis=0)
        return mean.to(self.features.dtype)
