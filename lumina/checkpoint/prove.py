"""The proof of a conversion: what was written is opened anew, and compared with what it was made from.

Two things are held against each other, with one block's weights in memory. Values: every tensor of the result is, bit
by bit, the source's rounded to the result's dtype. Function: the same input through each block of both, each with the
sizes that its own folder tells, in fp32; the source's output is the next block's input for both. Where no rounding took
place the outputs are bit-equal; else their relative error stays below what the dtype's rounding explains.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lumina.checkpoint.sources import Source
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.tokens import Captions, pack

# A block is a chain of a few products whose roundings add up: so many unit roundoffs are allowed it.
_ROUNDOFFS = 16
_SEED = 0
_TIMES = (0.3, 0.8)
_CAPTION_LENGTHS = (5, 3)


State = tuple[Tensor, Tensor]
"""Tokens (T, dim), in the end patches (T, p), and the conditions (N, width) that every block is modulated by."""


class ConversionError(RuntimeError):
    """What was written is not what was to be converted."""


@dataclass(frozen=True)
class BlockProof:
    """How far the outputs of a block are apart: largest difference, and ‖difference‖ / ‖output of the source‖."""

    block: str
    max_error: float
    relative_error: float


@dataclass(frozen=True)
class KindProof:
    """The proof of one set of weights."""

    source: str
    result: str
    exact: bool
    """No value was rounded: outputs are bit-equal."""
    tolerance: float
    """Of relative errors."""
    tensors: int
    blocks: list[BlockProof]

    @property
    def worst(self) -> float:
        return max(block.relative_error for block in self.blocks)

    def to_dict(self) -> dict:
        return asdict(self)


def prove_weights(
    source: Source, kind: str, result: Source, result_kind: str, progress: Callable[[int], object]
) -> KindProof:
    """Compare a set of weights of `source` with the one that was made of it.

    Args:
        progress: called with the bytes of the result that were compared since the last call.

    Raises:
        ConversionError: where they differ by more than rounding, naming the block or the tensor.
    """
    ours, theirs = source.tensors[kind], result.tensors[result_kind]
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise ConversionError(f"the proof failed: {', '.join(odd[:8])} is in one of source and result alone")
    exact = all(_holds(theirs[name].dtype, ours[name].dtype) for name in ours)
    # Half the spacing of numbers at 1: what rounding changes a value by, relative to it.
    roundoff = max(torch.finfo(stored.dtype).eps / 2 for stored in theirs.values())
    tolerance = 0.0 if exact else _ROUNDOFFS * roundoff
    walk, walk_of_result = _Walk(source.model), _Walk(result.model)
    if walk.blocks != walk_of_result.blocks:
        raise ConversionError(f"the proof failed: the result has {len(walk_of_result.blocks)} blocks")
    blocks, state = [], None
    with torch.no_grad():
        for block in walk.blocks:
            names = [name for name in ours if _block_of(name) == block]
            weights = {name: source.read(kind, name).float() for name in names}
            expected = walk.run(block, state, weights)
            for name in names:
                written = result.read(result_kind, name)
                if not _same_bits(weights[name].to(written.dtype), written):
                    raise _not_the_same(source, kind, result_kind, name)
                weights[name].copy_(written)
                progress(written.nbytes)
            found = walk_of_result.run(block, state, weights)
            blocks.append(_compare(block, expected, found, exact, tolerance))
            state = expected
            del weights
    return KindProof(kind, result_kind, exact, tolerance, len(ours), blocks)


def prove_values(source: Source, kind: str, result: Source, result_kind: str, progress: Callable[[int], object]) -> int:
    """Compare tensors that no block computes with, as moments; returns how many.

    Raises:
        ConversionError: where one differs.
    """
    for name in result.tensors[result_kind]:
        written = result.read(result_kind, name)
        if not _same_bits(source.read(kind, name).to(written.dtype), written):
            raise _not_the_same(source, kind, result_kind, name)
        progress(written.nbytes)
    return len(result.tensors[result_kind])


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    return wide == narrow or wide == torch.float32


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    whole = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def _not_the_same(source: Source, kind: str, result_kind: str, name: str) -> ConversionError:
    return ConversionError(
        f"the proof failed: {result_kind}/{name} of the result is not {kind}/{name} of {source.path}"
    )


def _compare(block: str, expected: State, found: State, exact: bool, tolerance: float) -> BlockProof:
    largest = relative = 0.0
    for one, other in zip(expected, found, strict=True):
        if not _same_bits(one, other):
            difference, size = (other - one).double(), float(one.double().norm())
            largest = max(largest, float(difference.abs().max()))
            relative = max(relative, float(difference.norm()) / size if size else math.inf)
            # What is not a number is not close to anything, whatever it is compared with.
            if exact or not relative <= tolerance or not math.isfinite(largest):
                allowed = "must be equal" if exact else f"may differ by {tolerance:.2g}"
                raise ConversionError(
                    f"the proof failed: for the same input the outputs of {block} of source and result differ by "
                    f"{relative:.2g} of their norm, and {allowed}"
                )
    return BlockProof(block, largest, relative)


def _block_of(name: str) -> str:
    """`layers.3`, `final_layer`, or `embedders`, to which all else belongs."""
    parts = name.split(".")
    if parts[0] == "layers":
        return ".".join(parts[:2])
    return parts[0] if parts[0] == "final_layer" else "embedders"


class _Walk:
    """A model without weights, and the input it is given; runs a block at a time with the weights it is lent."""

    def __init__(self, config: FlagDiTConfig):
        self.config = config
        with torch.device("meta"):
            self.model = FlagDiT(config).eval()
        draw = torch.Generator().manual_seed(_SEED)
        p, channels = config.patch_size, config.in_channels
        shapes = [(1, channels, 3 * p, 5 * p), (2 if config.frames else 1, channels, 2 * p, 4 * p)]
        self.layout = self.model.layout(shapes, torch.device("cpu"))
        self.patches = pack([torch.randn(shape, generator=draw) for shape in shapes], self.layout)
        self.captions = self.labels = None
        if config.text_conditional:
            features = torch.randn(sum(_CAPTION_LENGTHS), config.cap_feat_dim, generator=draw)
            self.captions = Captions.of(features, _CAPTION_LENGTHS)
        else:
            self.labels = torch.tensor([0, config.num_classes])
        self.inputs = self.model.attention_inputs(self.layout, self.captions)

    @property
    def blocks(self) -> list[str]:
        return ["embedders", *(f"layers.{number}" for number in range(self.config.n_layers)), "final_layer"]

    def run(self, block: str, state: State | None, weights: Mapping[str, Tensor]) -> State:
        """What `block` makes of `state`, or of the input; `weights` are let go again."""
        self.model.load_state_dict(weights, strict=False, assign=True)
        try:
            if block == "embedders":
                conditions = self.model.condition(torch.tensor(_TIMES), self.captions, self.labels)
                return self.model.embed(self.patches, self.layout), conditions
            x_td, c_nw = state
            if block == "final_layer":
                return self.model.final_layer(x_td, c_nw, self.layout.sample_id_t), c_nw
            layer = self.model.layers[int(block.removeprefix("layers."))]
            return layer(x_td, c_nw, self.layout.sample_id_t, self.inputs), c_nw
        finally:
            self.model.to_empty(device="meta")
