"""What makes sampling need less memory, in the manner of diffusers' pipelines."""

from collections.abc import Callable

import torch
from torch import Tensor

from lumina.encoders.text import TextEncoder
from lumina.encoders.vae import Vae
from lumina.inference.offload import Offload
from lumina.model.flag_dit import FlagDiT


class MemorySaving:
    """The part of `LuminaPipeline` that concerns memory."""

    model: FlagDiT
    vae: Vae
    text_encoder: TextEncoder | None
    _offloaded: Offload | None = None

    def enable_vae_tiling(self) -> None:
        """See `lumina.encoders.vae.Vae.enable_tiling`."""
        self.vae.enable_tiling()

    def enable_vae_slicing(self) -> None:
        """See `lumina.encoders.vae.Vae.enable_slicing`."""
        self.vae.enable_slicing()

    def enable_model_cpu_offload(self, device: str | torch.device | None = None) -> None:
        """Keep weights on the CPU and bring them to a GPU for their turn: the text encoder's, the transformer's blocks,
        the autoencoder's. The largest of them has to fit, not their sum. A call then takes as much longer as it takes
        to bring each once. The transformer's embedders and its head, small, stay on the GPU.

        Open the pipeline with `device="cpu"` first, and with the dtype that it is to compute in.

        Args:
            device: a GPU; the current one by default.

        Raises:
            ValueError: where there is no GPU, or it is done already.
        """
        if device is None and not torch.cuda.is_available():
            raise ValueError("there is no GPU here, so that all weights are on the CPU already; leave CPU offload out")
        device = torch.device("cuda" if device is None else device)
        if device.type == "cpu":
            raise ValueError("CPU offload is for sampling on a GPU; on the CPU all weights are there already")
        self._offload(device, lambda tensor: tensor.to(device))

    def _offload(self, device: torch.device, bring: Callable[[Tensor], Tensor]) -> None:
        if self._offloaded is not None:
            raise ValueError("the weights of this pipeline wait on the CPU already")
        for name, part in self.model.named_children():
            part.to("cpu" if name == "layers" else device)
        for parameter in self.model.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        encoders = [encoder for encoder in (self.text_encoder, self.vae) if encoder is not None]
        networks = [network for network in (encoder.compute_on(device) for encoder in encoders) if network is not None]
        self._offloaded = Offload([self.model.layers, *(network.to("cpu") for network in networks)], bring)
