"""The model card of an inference folder: what is known of a model, for those who find it."""

from math import prod
from pathlib import Path
from typing import Any

from lumina.checkpoint.sources import Source


def model_card(name: str, source: Source, kind: str, dtype: str, settings: dict[str, Any], weights: str) -> str:
    """README.md.

    Args:
        name: of the folder.
        source: what the weights are from.
        kind: of its weights.
        dtype: that they are written in, as "bf16".
        settings: flow, vae and text, as config.json has them.
        weights: "ema" or "model".
    """
    model = source.model
    parameters = sum(prod(stored.shape) for stored in source.tensors[kind].values())
    text, flow, vae = settings.get("text"), settings["flow"], settings["vae"]
    task = "text-to-image" if model.text_conditional else "unconditional-image-generation"
    condition = (
        f"captions, {model.cap_feat_dim} wide" if model.text_conditional else f"labels, {model.num_classes} classes"
    )
    which = "exponential moving average" if weights == "ema" else "last"
    rows = {
        "parameters": f"{parameters:,}",
        "sizes": f"dim {model.dim}, {model.n_layers} layers, {model.n_heads} heads"
        + (f" ({model.kv_heads} of keys and values)" if model.kv_heads != model.n_heads else "")
        + f", feed-forward {model.ffn_dim}, patch {model.patch_size}, {model.in_channels} latent channels"
        + (", several frames" if model.frames else ""),
        "conditioned on": condition,
        "weights": f"{which}, {dtype}",
        "flow": f"{flow['path']} path, {flow['prediction']} prediction",
        "text encoder": _encoder(text) if model.text_conditional else None,
        "autoencoder": vae["model"],
        "trained for": _trained(source),
        "training loss": f"{source.training['loss']} (mean of the last 100 steps)"
        if "loss" in source.training
        else None,
        "data": _data(source),
        "converted from": f"{_FORMATS[source.format]} `{source.path.name}`",
        "software": ", ".join(f"{package} {version}" for package, version in source.software.items()) or None,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    return f"""---
library_name: lumina
pipeline_tag: {task}
tags: [flow-matching, diffusion-transformer, flag-dit, lumina-t2x]
---

# {name}

A Flag-DiT (Lumina-T2X, arXiv 2405.05945), for [Lumina](https://pypi.org/project/lumina-t2x/).

| | |
|---|---|
{table}

`conversion.json` lists the files with their SHA-256 and how they were compared with what they were made from.

## Use

```bash
lumina sample {name} {_options(model.text_conditional, text)} --count 4 --out samples
```

```python
from lumina import LuminaPipeline

pipeline = LuminaPipeline.from_pretrained("{name}"{_arguments(model.text_conditional, text)})
pipeline([{_prompt(model.text_conditional)}]).images[0].save("sample.png")
```
"""


_FORMATS = {
    "checkpoint": "the checkpoint",
    "inference": "the inference folder",
    "public": "the public Lumina-T2I folder",
    "deepspeed": "the DeepSpeed checkpoint",
}


def _prompt(captions: bool) -> str:
    return '"a lighthouse in the fog"' if captions else "0"


def _options(captions: bool, text: dict[str, Any] | None) -> str:
    unnamed = " --text-encoder NAME" if captions and text is None else ""
    return f"--prompt {_prompt(captions)}{unnamed}"


def _arguments(captions: bool, text: dict[str, Any] | None) -> str:
    return ', text="NAME"' if captions and text is None else ""


def _encoder(text: dict[str, Any] | None) -> str:
    if text is None:
        return "not recorded: name the one that it was trained with"
    return f"{text['encoder']}, hidden state {text['layer']}, at most {text['max_tokens']} tokens"


def _trained(source: Source) -> str | None:
    facts = [f"{source.step:,} steps"] if source.step else []
    facts += [f"{source.training[key]:,} {key}" for key in ("samples", "tokens") if source.training.get(key)]
    return ", ".join(facts) or None


def _data(source: Source) -> str | None:
    if source.config is None:
        return source.training.get("data")
    data = source.config.data
    sets = data.shards or [shard for one in data.sets for shard in one.shards]
    # Of paths, which may say more of a cluster than its owner would have others read, the last part.
    named = ", ".join(f"`{Path(shard).name}`" for shard in sets[:5])
    return named + (f" and {len(sets) - 5} more" if len(sets) > 5 else "")
