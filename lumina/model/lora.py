"""LoRA beside a Flag-DiT (arXiv 2106.09685): which layers have adapters, and what an adapter adds to a weight."""

import difflib
import re
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

ATTENTION_AND_FEED_FORWARD = ("wq", "wk", "wv", "wo", "wk_y", "wv_y", "w1", "w2", "w3")


def adapted_layers(model: nn.Module, targets: Sequence[str] | str | None) -> list[str]:
    """Names of the linear layers that `targets` mean, in the model's order.

    Args:
        targets: names, or their last parts (`wq`, `attention.wq`); a string is a regular expression that whole names
            match; None: `ATTENTION_AND_FEED_FORWARD`, as far as the model has them.

    Raises:
        ValueError: for what matches nothing, naming the nearest, or something that is no linear layer.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if targets is None:
        return [name for name in linear if name.rpartition(".")[2] in ATTENTION_AND_FEED_FORWARD]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"lora.target_modules={targets!r} is no regular expression ({error})") from error
        found = [name for name in linear if pattern.fullmatch(name)]
        if not found:
            raise ValueError(
                f"lora.target_modules={targets!r} matches the whole name of no linear layer; they are named as "
                f"{linear[len(linear) // 2]}"
            )
        return found
    if not targets:
        raise ValueError("lora.target_modules is empty; name layers, or leave it out for attention and feed-forward")
    for target in targets:
        named = [name for name in modules if _ends(name, target)]
        if not named:
            ends = {".".join(parts[i:]) for parts in (name.split(".") for name in linear) for i in range(len(parts))}
            close = difflib.get_close_matches(target, sorted(ends, key=len), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"the layers are named as {linear[len(linear) // 2]}"
            raise ValueError(f"lora.target_modules: no layer is called {target}; {hint}")
        if not any(name in linear for name in named):
            kind = type(modules[named[0]]).__name__
            raise ValueError(f"lora.target_modules: {target} is a {kind}; adapters go beside linear layers alone")
    return [name for name in linear if any(_ends(name, target) for target in targets)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def merged(
    weight: Float[Tensor, "o i"], a: Float[Tensor, "r i"], b: Float[Tensor, "o r"], scale: float
) -> Float[Tensor, "o i"]:
    """``weight + scale · b·a``, reckoned in fp64 and rounded once, to the weight's dtype."""
    return (weight.double() + scale * (b.double() @ a.double())).to(weight.dtype)
