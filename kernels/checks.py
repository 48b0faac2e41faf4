"""What all implementations of an operation ask of its tensors: kernels read past the end of what is too small."""

from torch import Tensor

from .dispatch import REFERENCE_FORCED


def expect(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """
    Raises:
        ValueError: where `x` has another shape.
    """
    if x.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(x.shape)}, not {tuple(shape)}")


def expect_pack(
    x_td: Tensor,
    sample_id_t: Tensor,
    tokens: dict[str, Tensor],
    samples: dict[str, Tensor],
    weight: Tensor | None = None,
) -> None:
    """The tensors of a pack: `tokens` are shaped as x, `samples` (N, D); under LUMINA_KERNELS=reference, ids too.

    Raises:
        ValueError: where one has another shape, or ids are not sorted or not below N.
    """
    if x_td.ndim != 2:
        raise ValueError(f"x has the shape {tuple(x_td.shape)}, not (tokens, dim)")
    for name, y_td in tokens.items():
        expect(name, y_td, tuple(x_td.shape))
    count = len(next(iter(samples.values())))
    for name, vectors in samples.items():
        expect(name, vectors, (count, x_td.shape[1]))
    if weight is not None:
        expect("weight", weight, (x_td.shape[1],))
    expect("sample_id", sample_id_t, (len(x_td),))
    # The values are looked at for debugging alone: on a GPU that waits for it.
    if REFERENCE_FORCED and len(sample_id_t):
        if bool((sample_id_t.diff() < 0).any()):
            raise ValueError("sample_id is not sorted: samples of a pack lie one after another")
        if not 0 <= int(sample_id_t[0]) <= int(sample_id_t[-1]) < count:
            raise ValueError(f"sample_id goes from {int(sample_id_t[0])} to {int(sample_id_t[-1])} for {count} samples")
