"""Tiles, slices and weights that wait on the CPU: each does what it says, and changes samples as little as it may."""

import gc
import json
import shutil
from dataclasses import replace

import pytest
import torch

from lumina import LuminaPipeline
from lumina.benchmark.live_bytes import LiveBytes
from lumina.cli import main
from lumina.config.schema import VaeConfig
from lumina.encoders.vae import build_vae
from lumina.inference.offload import Offload
from tests.unit.test_pipeline import TINY, write_folder

SIDE = 32
"""Of a tile, in pixels; a quarter of it in latents."""


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    folder = tmp_path_factory.mktemp("autoencoder") / "somebodys"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A LLaMA of random weights with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("text") / "llama"
    words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "two": 3, "six": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaModel(LlamaConfig(vocab_size=5, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, autoencoder, text_model):
    text = {"encoder": str(text_model), "max_tokens": 8, "dtype": "fp32"}
    vae = {"model": str(autoencoder), "dtype": "fp32", "scale": 0.5}
    config = replace(TINY, in_channels=4)
    return write_folder(tmp_path_factory.mktemp("folder") / "model", config, text=text, vae=vae)


def latents(count, side):
    return torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(1))


def fresh(autoencoder):
    return build_vae(VaeConfig(model=str(autoencoder), dtype="fp32", scale=1.0), 4)


def peak_of(vae, z):
    """Most bytes that tensors held at once while z was decoded, beside the weights."""
    gc.collect()
    with LiveBytes() as live, torch.no_grad():
        vae.decode(z)
    return live.peak


def test_tiles_are_nearly_the_whole(autoencoder, tmp_path):
    large = shutil.copytree(autoencoder, tmp_path / "large")
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | {"sample_size": 4 * SIDE}))
    whole, tiled = fresh(large), fresh(large)
    tiled.enable_tiling()
    z = latents(1, 64)  # twice a tile
    expected, found = whole.decode(z), tiled.decode(z)
    assert found.shape == expected.shape == (1, 3, 256, 256)
    # A tile is normalised by itself. With random weights on noise the numbers differ by a tenth of their spread; tiles
    # of a quarter of the side, 0.54.
    difference = (found - expected).abs().mean() / expected.std()
    assert 0 < difference < 0.15
    # What no other tile reaches is what the first tile alone gives.
    torch.testing.assert_close(found[..., :90, :90], whole.decode(z[..., :32, :32])[..., :90, :90])
    small = latents(2, 32)
    assert torch.equal(tiled.decode(small), whole.decode(small))


def test_tiles_need_less_memory(autoencoder):
    vae, z = fresh(autoencoder), latents(1, 48)
    before = peak_of(vae, z)
    vae.enable_tiling()
    # 36 tiles of 8 by 8 latents: what a tile needs, and the picture.
    assert peak_of(vae, z) < before / 3


def test_slices_are_the_whole_and_need_less_memory(autoencoder):
    vae, z = fresh(autoencoder), latents(8, 16)
    expected, before = vae.decode(z), peak_of(vae, z)
    vae.enable_slicing()
    torch.testing.assert_close(vae.decode(z), expected, atol=1e-5, rtol=1e-5)
    assert peak_of(vae, z) < before / 3


def test_each_does_its_own_thing(autoencoder):
    """Tiles do not slice, and slices do not tile."""
    tiled, sliced = fresh(autoencoder), fresh(autoencoder)
    tiled.enable_tiling()
    sliced.enable_slicing()
    seen = []
    for vae in (tiled, sliced):
        vae._model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    tiled.decode(latents(3, 8))
    sliced.decode(latents(2, 24))
    assert seen == [(3, 4, 8, 8), (1, 4, 24, 24), (1, 4, 24, 24)]


@pytest.mark.parametrize(("option", "shape"), [("--vae-tiling", (2, 4, 8, 8)), ("--vae-slicing", (1, 4, 16, 16))])
def test_from_the_command_line(folder, tmp_path, monkeypatch, option, shape):
    from diffusers.models.autoencoders.vae import Decoder

    seen, forward = [], Decoder.forward
    monkeypatch.setattr(
        Decoder, "forward", lambda self, z, *rest: seen.append(tuple(z.shape)) or forward(self, z, *rest)
    )
    words = ["sample", str(folder), "--prompt", "a two", "a six", "--height", "64", "--width", "64", "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "out"), option]) == 0
    assert shape in seen
    assert (2, 4, 16, 16) not in seen
    settings = json.loads((tmp_path / "out" / "samples.json").read_text())[0]["settings"]
    assert [settings["vae_tiling"], settings["vae_slicing"]] == [option == "--vae-tiling", option == "--vae-slicing"]


def as_if_on_a_device(pipeline):
    """The three networks as offloaded, where no device is: weights that wait are in float64.

    What is used without being brought (to float32) meets tensors of another kind and fails, as it would where weights
    and inputs are on two devices.
    """
    for network in (pipeline.model.layers, pipeline.text_encoder._model, pipeline.vae._model):
        network.double()
    pipeline._offload(torch.device("cpu"), lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    return {
        "text": pipeline.text_encoder._model,
        "transformer": pipeline.model.layers,
        "autoencoder": pipeline.vae._model,
    }


def waiting(networks):
    return {name for name, network in networks.items() if next(network.parameters()).dtype == torch.float64}


def test_one_network_at_a_time_is_where_it_computes(folder):
    settings = {"height": 8, "width": 16, "num_inference_steps": 2}
    generators = lambda: [torch.Generator().manual_seed(seed) for seed in (1, 2)]  # noqa: E731
    plain = LuminaPipeline.from_pretrained(folder, device="cpu")
    expected = plain(["a two", "a six"], generator=generators(), **settings)
    pipeline = LuminaPipeline.from_pretrained(folder, device="cpu")
    networks = as_if_on_a_device(pipeline)
    assert waiting(networks) == set(networks)
    turns = []
    for name, module in (
        ("text", networks["text"]),
        ("transformer", networks["transformer"][1]),
        ("autoencoder", networks["autoencoder"].decoder),
    ):
        module.register_forward_pre_hook(lambda *_, name=name: turns.append((name, waiting(networks))))
    for _ in range(2):  # the second finds what the first left
        turns.clear()
        found = pipeline(["a two", "a six"], generator=generators(), **settings)
        assert torch.equal(found.latents, expected.latents)
        assert [image.tobytes() for image in found.images] == [image.tobytes() for image in expected.images]
        others = {name: set(networks) - {name} for name in networks}
        expected_turns = ["text", "transformer", "transformer", "autoencoder"]
        assert turns == [(name, others[name]) for name in expected_turns]


def test_what_is_used_without_being_brought_fails(folder):
    """The stand-in for a device is no blind one."""
    pipeline = LuminaPipeline.from_pretrained(folder, device="cpu")
    networks = as_if_on_a_device(pipeline)
    layer = networks["autoencoder"].decoder.conv_in
    with pytest.raises(RuntimeError, match="type"):
        layer(torch.zeros(1, 4, 8, 8))


def test_encoding_brings_the_autoencoder(folder):
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipeline = LuminaPipeline.from_pretrained(folder, device="cpu")
    expected = pipeline.vae.encode(pixels, None)
    networks = as_if_on_a_device(pipeline)
    assert torch.equal(pipeline.vae.encode(pixels, None), expected)
    assert waiting(networks) == {"text", "transformer"}


def test_no_more_than_the_largest_is_there(folder):
    """Bytes of what is brought: as much as the largest network, not as all."""
    gc.collect()
    pipeline = LuminaPipeline.from_pretrained(folder, device="cpu")
    held = [0, 0]  # now, at most

    def bring(tensor):
        import weakref

        size = tensor.numel() * 4
        copy = tensor.float() if tensor.is_floating_point() else tensor.clone()
        held[0] += size
        held[1] = max(held)
        weakref.finalize(copy.untyped_storage(), lambda: held.__setitem__(0, held[0] - size))
        return copy

    for network in (pipeline.model.layers, pipeline.text_encoder._model, pipeline.vae._model):
        network.double()
    pipeline._offload(torch.device("cpu"), bring)
    networks = (pipeline.model.layers, pipeline.text_encoder._model, pipeline.vae._model)
    sizes = [sum(t.numel() * 4 for t in (*n.parameters(), *n.buffers())) for n in networks]
    pipeline("a two", 8, 8, 1, 2)
    assert max(sizes) <= held[1] < max(sizes) + min(sizes)
    pipeline._offloaded.release()
    gc.collect()
    assert held[0] == 0


def test_what_waits_is_where_it_was():
    """Nothing is copied back: the tensors that waited are those that wait again."""
    part = torch.nn.Linear(2, 2)
    own = part.weight.data_ptr()
    offload = Offload([part], torch.Tensor.clone)
    part(torch.zeros(1, 2))
    assert part.weight.data_ptr() != own
    offload.release()
    assert part.weight.data_ptr() == own


def test_offload_without_a_gpu_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pipeline = LuminaPipeline.from_pretrained(folder, device="cpu")
    with pytest.raises(ValueError, match=r"^there is no GPU here"):
        pipeline.enable_model_cpu_offload()
    with pytest.raises(ValueError, match=r"^CPU offload is for sampling on a GPU"):
        pipeline.enable_model_cpu_offload("cpu")
    as_if_on_a_device(pipeline)
    with pytest.raises(ValueError, match="wait on the CPU already"):
        pipeline._offload(torch.device("cpu"), torch.Tensor.clone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_on_a_gpu(folder):
    settings = {"height": 8, "width": 16, "num_inference_steps": 2}
    plain = LuminaPipeline.from_pretrained(folder, device="cuda", dtype=torch.float32)
    expected = plain("a two", generator=torch.Generator().manual_seed(1), **settings).latents
    pipeline = LuminaPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)
    pipeline.enable_model_cpu_offload()
    found = pipeline("a two", generator=torch.Generator().manual_seed(1), **settings).latents
    assert found.device.type == "cuda"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert next(pipeline.model.layers.parameters()).device.type == "cpu"
    assert next(pipeline.vae._model.parameters()).device.type == "cuda"


def test_nothing_to_save_is_said(tmp_path):
    pipeline = LuminaPipeline.from_pretrained(write_folder(tmp_path / "plain"), device="cpu")
    with pytest.raises(ValueError, match=r"^there is nothing to tile: the autoencoder is identity"):
        pipeline.enable_vae_tiling()
    with pytest.raises(ValueError, match=r"^there is nothing to slice: the autoencoder is identity"):
        pipeline.enable_vae_slicing()
