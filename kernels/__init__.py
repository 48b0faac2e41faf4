"""What Flag-DiT does between its matrix products, each operation with a plain torch reference.

Every operation is called through one dispatcher (`lumina.kernels.dispatch`), which picks the fastest
implementation that can run on the tensors at hand.
"""

# From the top of a clone this folder can be found as `kernels`, too. Transformers takes it for the package of that name
# by Hugging Face, imports it and asks its version. Under that name it is empty: imported twice, every custom op would
# be registered anew, and the first be broken.
if __name__ == "lumina.kernels":
    from .attention import AttentionPlan, attention, with_lse
    from .gated_residual import gated_residual
    from .gated_residual_norm import gated_residual_norm
    from .layer_norm_modulate import layer_norm_modulate
    from .merge_attention import merge_attention
    from .qk_norm_rope import qk_norm_rope
    from .rms_norm_modulate import rms_norm, rms_norm_modulate
    from .swiglu import swiglu
else:
    __version__ = "0"

__all__ = [
    "AttentionPlan",
    "attention",
    "gated_residual",
    "gated_residual_norm",
    "layer_norm_modulate",
    "merge_attention",
    "qk_norm_rope",
    "rms_norm",
    "rms_norm_modulate",
    "swiglu",
    "with_lse",
]
