"""LoRA through peft (arXiv 2106.09685): what a run with `lora` does otherwise than one that trains every weight."""

import hashlib
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lumina.checkpoint.load import Checkpoint
from lumina.checkpoint.lora import BASE, BASE_RECORD, Base, MergedWeights, is_adapter, pair_names, read_base, write_base
from lumina.checkpoint.manifest import WEIGHTS
from lumina.config.schema import Config
from lumina.config.schema import LoraConfig as Settings
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.lora import adapted_layers
from lumina.model.pretrained import check_fit
from lumina.parallel.activity import Activity, Phase
from lumina.train.initial import Start, named


class Lora:
    """The adapters beside a model. Every rank makes the same, whatever the layout."""

    def __init__(self, config: Config, model: FlagDiT, anew: Collection[str]):
        """
        Args:
            config: with `lora`.
            model: whole, fp32; adapters are put into it, and of the rest only `anew` trains on.
            anew: parameters that are in no base: nothing had them, so they are trained themselves.

        Raises:
            ValueError: where peft is not installed, and for target modules that the model does not have.
        """
        self._config, self._sizes = config, model.config
        self.names = [name for name, _ in model.named_parameters()]
        self.in_base = [name for name in self.names if name not in anew]
        targets = adapted_layers(model, config.lora.target_modules)
        self.layers = [layer for layer in targets if f"{layer}.weight" not in anew]
        if not self.layers:
            raise ValueError(
                f"lora.target_modules: {named(targets)} start anew and are trained themselves, and no other "
                "layer is left for adapters; name others"
            )
        trains = [name for name, parameter in model.named_parameters() if name in anew and parameter.requires_grad]
        inject(model, config.lora, self.layers, config.run.seed)
        parameters = dict(model.named_parameters())
        for name in trains:
            parameters[name].requires_grad = True
        own = {_public(name): name for name in parameters}
        self.kept_elsewhere = {own[name] for name in self.in_base}
        """Frozen parameters, as the model names them now, that are in the base and so in no checkpoint."""
        self.held = {name: tuple(p.shape) for name, p in parameters.items() if name not in self.kept_elsewhere}
        """Shapes of what checkpoints hold."""
        self.base: Base | None = None
        """There when the run has a folder."""
        adapters = sum(p.numel() for n, p in parameters.items() if is_adapter(n))
        self.said = [
            f"LoRA of rank {config.lora.rank} beside {len(self.layers)} layers: {adapters:,} parameters are trained"
            + (f"; and all of {named(trains)}, which start anew" if trains else "")
        ]

    @staticmethod
    def resumed(config: Config, sizes: FlagDiTConfig, checkpoint: Checkpoint) -> tuple[FlagDiT, "Lora"]:
        """The model for the engine to take over, the base's weights in it, and its adapters, yet to be read.

        Raises:
            ValueError: where the base is missing or damaged, and for a checkpoint of other adapters.
        """
        model, base = read_base(checkpoint, sizes)
        saved = {name: checkpoint.shape(WEIGHTS, name) for name in checkpoint.names(WEIGHTS)}
        lora = Lora(config, model, [name for name in saved if not is_adapter(name)])
        check_fit(lora.held, saved, str(checkpoint.directory))
        lora.base = base
        return model, lora

    def write_base(self, start: Start, activity: Activity) -> None:
        """Put the frozen weights into the run's folder, by its first process.

        Raises:
            ValueError: where the disk does not take them.
        """
        activity.enter(Phase.SAVE)
        folder = Path(self._config.run.dir)
        try:
            record = write_base(
                start.source,
                start.kind,
                self.in_base,
                folder,
                self._config,
                self._sizes,
                lambda _: activity.wrote(),
            )
        except OSError as error:
            raise ValueError(f"{folder / BASE} cannot be written: {error.strerror or error}") from error
        self.base = Base(folder / BASE, record, folder)

    @property
    def texts(self) -> dict[str, str]:
        """Files that checkpoints have beside the tensors, on the first rank."""
        return {} if self.base is None else {BASE_RECORD: self.base.record}

    def whole(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's state, the adapters in `trained` merged into the base; on the first rank."""
        weights = MergedWeights(trained, self._config.lora.scale, trained.__getitem__, self.base.read)
        return {name: weights.read(name) for name in self.names}


def inject(model: FlagDiT, settings: Settings, layers: list[str], seed: int) -> None:
    """Put adapters beside `layers`, which are frozen, as all of the model is.

    B is zero, so that the model stays what it was; A is uniform as peft draws it, as a function of the seed and the
    layer's name alone.

    Raises:
        ValueError: where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora needs peft: pip install 'lumina-t2x[lora]'") from error
    alpha = settings.rank if settings.alpha is None else settings.alpha
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(
            LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=layers, lora_dropout=0.0, bias="none"), model
        )
    parameters = dict(model.named_parameters())
    assert [n for n in parameters if is_adapter(n)] == [n for layer in layers for n in pair_names(layer)]
    for layer in layers:
        a, b = (parameters[name] for name in pair_names(layer))
        digest = hashlib.blake2b(f"{seed}/lora/{layer}".encode(), digest_size=7).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=draw)
        nn.init.zeros_(b)


def _public(name: str) -> str:
    return name.replace(".base_layer.", ".")
