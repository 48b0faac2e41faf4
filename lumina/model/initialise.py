"""Initial values of every parameter (arXiv 2405.05945; adaLN-Zero of DiT, arXiv 2212.09748)."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from lumina.model.flag_dit import FlagDiT

STD = 0.02


def initialise(model: "FlagDiT") -> None:
    """In place, from torch's random state. Blocks start as the identity, the output as zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=STD)

    zeros = [block.adaLN_modulation[1] for block in model.layers]
    zeros += [model.final_layer.adaLN_modulation[1], model.final_layer.linear]
    if model.config.text_conditional:
        zeros.append(model.cap_embedder[1])
        nn.init.normal_(model.eol_token, std=STD)
        nn.init.normal_(model.pad_token, std=STD)
        if model.config.frames:
            nn.init.normal_(model.nextframe_token, std=STD)
    else:
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=STD)
    for layer in zeros:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
