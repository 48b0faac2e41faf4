"""LuminaPipeline: from a folder and a prompt to pictures."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from lumina import LuminaPipeline
from lumina.config.schema import TextConfig, VaeConfig
from lumina.encoders.text import build_text_encoder
from lumina.encoders.vae import build_vae
from lumina.flow.loss import Objective
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.pretrained import save_pretrained
from tests.parallel.runs import tensors_of, tiny_config, train_on

TEXT = TextConfig(encoder="bytes", width=16, max_tokens=8)
TINY = FlagDiTConfig(dim=16, n_layers=2, n_heads=2, multiple_of=16, in_channels=1, cap_feat_dim=16)
LABELS = replace(TINY, cap_feat_dim=None, num_classes=5)
SIZE = {"height": 4, "width": 6, "num_inference_steps": 3}


def write_folder(folder, config=TINY, **sections):
    """An inference folder of a model whose every parameter is random."""
    torch.manual_seed(0)
    model = FlagDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text = {"text": TEXT.model_dump()} if config.text_conditional else {}
    save_pretrained(model, folder, extra=text | {"vae": VaeConfig().model_dump()} | sections)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {
        "text": write_folder(root / "text"),
        "labels": write_folder(root / "labels", LABELS),
        "frames": write_folder(root / "frames", replace(TINY, frames=True)),
        "rgb": write_folder(root / "rgb", replace(TINY, in_channels=3, patch_size=1)),
    }


@pytest.fixture(scope="module")
def pipelines(folders):
    return {name: LuminaPipeline.from_pretrained(folder, device="cpu") for name, folder in folders.items()}


@pytest.fixture
def pipeline(pipelines):
    return pipelines["text"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_prompt_becomes_a_picture(pipeline, pipelines):
    output = pipeline("a two", generator=seeded(), **SIZE)
    assert output.latents.shape == (1, 1, 1, 4, 6)
    assert [image.size for image in output.images] == [(6, 4)]
    assert output.images[0].mode == "L"
    pixels = torch.tensor(list(output.images[0].getdata()), dtype=torch.float32).view(4, 6)
    expected = (output.latents[0, 0, 0].clamp(-1, 1) + 1) * 127.5
    torch.testing.assert_close(pixels, expected, atol=0.5, rtol=0)
    assert pipelines["rgb"]("a two", 5, 3, num_inference_steps=1).images[0].mode == "RGB"


def test_seeds_reproduce_and_differ(pipeline):
    first = pipeline("a two", generator=seeded(), **SIZE).latents
    assert torch.equal(first, pipeline("a two", generator=seeded(), **SIZE).latents)
    assert torch.equal(first, pipeline("a two", generator=[seeded()], **SIZE).latents)
    assert not torch.allclose(first, pipeline("a two", generator=seeded(1), **SIZE).latents, atol=1e-2)
    torch.manual_seed(5)
    unseeded = pipeline("a two", **SIZE).latents
    torch.manual_seed(5)
    assert torch.equal(unseeded, pipeline("a two", **SIZE).latents)


@pytest.mark.parametrize("solver", ["euler", "sde_euler", "sde_heun"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_sample_does_not_depend_on_its_batch(pipeline, solver, guidance):
    prompts = ["a two", "", "a very long handwritten three", "a two"]
    settings = {"guidance_scale": guidance, "solver": solver, **SIZE}
    together = pipeline(prompts, generator=[seeded(i) for i in range(4)], **settings).latents
    for i, prompt in enumerate(prompts):
        alone = pipeline(prompt, generator=[seeded(i)], **settings).latents[0]
        torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=1e-3)


def test_one_generator_for_all_gives_each_sample_its_own_noise(pipeline):
    latents = pipeline(["a two", "a two"], generator=seeded(), **SIZE).latents
    assert not torch.allclose(latents[0], latents[1], atol=1e-2)


def test_the_prompt_and_the_negative_prompt_count(pipeline):
    base = pipeline("a two", generator=seeded(), **SIZE).latents
    assert not torch.allclose(base, pipeline("a seven", generator=seeded(), **SIZE).latents, atol=1e-3)
    negative = pipeline("a two", generator=seeded(), negative_prompt="a seven", **SIZE).latents
    assert not torch.allclose(base, negative, atol=1e-3)
    unguided = {"generator": seeded(), "guidance_scale": 1.0, **SIZE}
    assert torch.equal(
        pipeline("a two", **unguided).latents,
        pipeline("a two", **unguided | {"generator": seeded()}, negative_prompt="a seven").latents,
    )


def test_guidance_is_that_of_a_plain_loop(pipeline):
    """Euler in five steps by hand, unguided and with uncond + scale · (cond - uncond)."""
    model, encoder = pipeline.model, build_text_encoder(TEXT)
    for scale in (0.0, 1.0, 3.5):
        x = torch.randn(1, 1, 1, 4, 6, generator=seeded())
        for step in range(5):
            predictions = []
            for caption in ("a two", "a blot"):
                features, mask = encoder([caption])
                with torch.no_grad():
                    predictions.append(model(x, torch.tensor([step / 5]), features, mask))
            wanted, unwanted = predictions
            x = x + (unwanted + scale * (wanted - unwanted)) / 5
        settings = {"height": 4, "width": 6, "num_inference_steps": 5, "guidance_scale": scale}
        found = pipeline("a two", negative_prompt="a blot", generator=seeded(), **settings).latents
        torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_guidance_one_runs_no_second_half(pipeline, monkeypatch):
    monkeypatch.setattr(FlagDiT, "forward_with_cfg", lambda *_, **__: pytest.fail("guided"))
    pipeline("a two", generator=seeded(), guidance_scale=1.0, **SIZE)


@pytest.mark.parametrize(
    ("solver", "steps", "evaluations"),
    [("euler", 7, 7), ("euler", None, 50), ("heun", 3, 6), ("rk4", 2, 8), ("sde_euler", 5, 5), ("sde_heun", 4, 8)],
)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_steps_are_evaluations(pipeline, monkeypatch, solver, steps, evaluations, guidance):
    times, forward = [], FlagDiT.forward

    def counted(self, x, t, *args, **kwargs):
        times.append(t[0].item())
        return forward(self, x, t, *args, **kwargs)

    monkeypatch.setattr(FlagDiT, "forward", counted)
    pipeline("a two", 2, 2, 1, steps, guidance, seeded(), solver=solver)
    assert len(times) == evaluations
    if solver == "euler":
        expected = [i / evaluations for i in range(evaluations)]
        assert times == pytest.approx(expected, abs=2e-3)


def test_adaptive_solvers_choose_their_steps(pipeline):
    fine = pipeline("a two", 2, 2, 1, 40, 1.0, seeded(), solver="rk4").latents
    adaptive = {"solver": "dopri5", "rtol": 1e-3, "atol": 1e-3}
    found = pipeline("a two", 2, 2, generator=seeded(), guidance_scale=1.0, **adaptive).latents
    torch.testing.assert_close(found, fine, atol=2e-2, rtol=2e-2)
    with pytest.raises(ValueError, match="steps"):
        pipeline("a two", 4, 4, 1, 5, solver="dopri5")


def test_the_sde_draws_from_the_generators(pipeline):
    settings = {"solver": "sde_euler", **SIZE}
    first = pipeline("a two", generator=seeded(), **settings).latents
    torch.manual_seed(0)
    assert torch.equal(first, pipeline("a two", generator=seeded(), **settings).latents)
    ode = pipeline("a two", generator=seeded(), **SIZE).latents
    assert not torch.allclose(first, ode, atol=1e-2)
    shifted = pipeline("a two", generator=seeded(), diffusion="constant", last_step="mean", **settings).latents
    assert not torch.allclose(first, shifted, atol=1e-3)


def test_time_shift_moves_the_grid(pipeline):
    base = pipeline("a two", generator=seeded(), **SIZE).latents
    assert not torch.allclose(base, pipeline("a two", generator=seeded(), time_shift=4.0, **SIZE).latents, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 18), (10, 4), (30, 2)])
def test_any_size_that_the_patches_divide(pipeline, height, width):
    image = pipeline("a two", height, width, 1, 1, generator=seeded()).images[0]
    assert image.size == (width, height)


def test_several_pictures_of_each_prompt(pipeline):
    generators = [seeded(i) for i in range(4)]
    found = pipeline(["a two", "a six"], generator=generators, num_images_per_prompt=2, **SIZE).latents
    prompts = ["a two", "a two", "a six", "a six"]
    expected = pipeline(prompts, generator=[seeded(i) for i in range(4)], **SIZE).latents
    assert torch.equal(found, expected)


def test_frames(pipelines):
    pipeline = pipelines["frames"]
    output = pipeline(["a two", "a six"], num_frames=3, generator=seeded(), **SIZE)
    assert output.latents.shape == (2, 3, 1, 4, 6)
    assert [len(frames) for frames in output.frames] == [3, 3]
    assert output.images[1].tobytes() == output.frames[1][0].tobytes()
    for frame in range(3):
        pixels = torch.tensor(list(output.frames[0][frame].getdata()), dtype=torch.float32).view(4, 6)
        expected = (output.latents[0, frame, 0].clamp(-1, 1) + 1) * 127.5
        torch.testing.assert_close(pixels, expected, atol=0.5, rtol=0)


def test_label_conditional(pipelines):
    pipeline = pipelines["labels"]
    settings = {"generator": None, "guidance_scale": 2.0, **SIZE}
    three = pipeline(3, **settings | {"generator": seeded()}).latents
    assert torch.equal(three, pipeline("3", **settings | {"generator": seeded()}).latents)
    assert not torch.allclose(three, pipeline(4, **settings | {"generator": seeded()}).latents, atol=1e-3)
    # Guided away from the class "none", the row after the last.
    x = torch.randn(1, 1, 1, 4, 6, generator=seeded())
    for step in range(3):
        with torch.no_grad():
            wanted, none = (
                pipeline.model(x, torch.tensor([step / 3]), labels=torch.tensor([label])) for label in (3, 5)
            )
        x = x + (none + 2.0 * (wanted - none)) / 3
    torch.testing.assert_close(three, x, atol=1e-4, rtol=1e-4)


def test_the_callback_sees_every_step(pipeline):
    seen = []
    pipeline("a two", generator=seeded(), callback=lambda step, steps, x: seen.append((step, steps, x.shape)), **SIZE)
    assert seen == [(i, 3, torch.Size([1, 1, 1, 4, 6])) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "call", "words"),
    [
        ("text", {"height": 5}, r"height 5 and width 6 must be multiples of 2 pixels \(autoencoder 1 × patch 2\)"),
        ("text", {"width": 7}, "height 4 and width 7"),
        ("text", {"height": -2}, "height -2"),
        ("text", {"height": 0}, "height 0"),
        ("text", {"prompt": []}, "no prompt"),
        ("text", {"prompt": 3}, "prompts are sentences"),
        ("text", {"prompt": [3]}, "prompts are sentences"),
        ("text", {"num_frames": 2}, "num_frames=2, but this model was built without frames"),
        ("text", {"num_frames": 0}, "num_frames=0 must be"),
        ("text", {"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ("text", {"generator": [1, 2]}, "2 generators for 1 samples"),
        ("text", {"num_inference_steps": 0}, "steps must be at least 1"),
        ("text", {"solver": "eule"}, "solver"),
        ("text", {"rtol": 1e-3}, "rtol"),
        ("text", {"diffusion": "sigma"}, "diffusion"),
        ("labels", {"prompt": "a two"}, "a class from 0 to 4, not 'a two'"),
        ("labels", {"prompt": 5}, "a class from 0 to 4, not 5"),
        ("labels", {"prompt": -1}, "a class from 0 to 4, not -1"),
        ("labels", {"negative_prompt": "x", "prompt": 1}, "takes no negative_prompt"),
        ("labels", {"num_frames": 2, "prompt": 1}, "built without frames"),
    ],
)
def test_refusals(pipelines, name, call, words):
    if "generator" in call:
        call = {"generator": [seeded(i) for i in call["generator"]]}
    with pytest.raises(ValueError, match=words):
        pipelines[name](**({"prompt": "a two", **SIZE} | call))


def test_save_and_open_again(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    again = LuminaPipeline.from_pretrained(tmp_path / "copy")
    assert torch.equal(
        pipeline("a two", generator=seeded(), **SIZE).latents, again("a two", generator=seeded(), **SIZE).latents
    )


def test_the_flow_of_the_folder_is_used(tmp_path, pipeline):
    """A noise prediction on the GVP path is not integrated as a velocity on the linear one."""
    write_folder(tmp_path, flow={"path": "gvp", "prediction": "noise"})
    other = LuminaPipeline.from_pretrained(tmp_path)
    assert other.objective.prediction == "noise"
    other.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["flow"]["path"] == "gvp"
    latents = pipeline("a two", generator=seeded(), **SIZE).latents
    assert not torch.allclose(latents, other("a two", generator=seeded(), **SIZE).latents, atol=1e-2)


def test_bf16(folders):
    pipeline = LuminaPipeline.from_pretrained(folders["text"], device="cpu", dtype=torch.bfloat16)
    whole = LuminaPipeline.from_pretrained(folders["text"], device="cpu")
    assert pipeline.model.x_embedder.weight.dtype == torch.bfloat16
    half, full = (p("a two", generator=seeded(), guidance_scale=1.0, **SIZE).latents for p in (pipeline, whole))
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.05)
    assert not torch.equal(half.float(), full)


def test_another_width_of_text_is_refused(folders):
    with pytest.raises(ValueError, match=r"features are 24 wide, the model takes cap_feat_dim=16"):
        LuminaPipeline.from_pretrained(folders["text"], text=TextConfig(encoder="bytes", width=24))
    model = FlagDiT(LABELS)
    with pytest.raises(ValueError, match="needs no text encoder"):
        LuminaPipeline(model, build_vae(VaeConfig(), 1), build_text_encoder(TEXT), Objective.build())
    with pytest.raises(ValueError, match="needs a text encoder"):
        LuminaPipeline(FlagDiT(TINY), build_vae(VaeConfig(), 1), None, Objective.build())


def test_parts_alone_cannot_be_saved(tmp_path):
    pipeline = LuminaPipeline(FlagDiT(TINY), build_vae(VaeConfig(), 1), build_text_encoder(TEXT), Objective.build())
    with pytest.raises(ValueError, match="do not say how to build them again"):
        pipeline.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_folders_that_cannot_be_opened(tmp_path, folders):
    with pytest.raises(ValueError, match="none: no such folder"):
        LuminaPipeline.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="weights is 'best'"):
        LuminaPipeline.from_pretrained(folders["text"], weights="best")
    with pytest.raises(ValueError, match="it is no model folder"):
        LuminaPipeline.from_pretrained(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="a run without a complete checkpoint yet"):
        LuminaPipeline.from_pretrained(tmp_path)
    write_folder(tmp_path / "bad", flow={"path": "linea"})
    with pytest.raises(ValueError, match=r"bad/config.json: "):
        LuminaPipeline.from_pretrained(tmp_path / "bad")
    FlagDiT(TINY).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="which text encoder"):
        LuminaPipeline.from_pretrained(tmp_path / "bare")
    assert LuminaPipeline.from_pretrained(tmp_path / "bare", text=TEXT).text_encoder.width == 16


@pytest.mark.slow
def test_runs_checkpoints_and_inference_folders_open_alike(digits, tmp_path):
    run = tmp_path / "run"
    train_on(1, tiny_config(run, digits, train__steps=3, checkpoint__every=2))
    newest = run / "checkpoints" / "step_00000003"
    pipelines = {weights: LuminaPipeline.from_pretrained(run, weights=weights) for weights in ("ema", "model")}
    pipelines["ema"].save_pretrained(tmp_path / "inference")
    tensors = tensors_of(run)
    for weights, kind in (("ema", "ema"), ("model", "master")):
        state = pipelines[weights].model.state_dict()
        assert all(torch.equal(state[key], tensors[f"{kind}/{key}"]) for key in state)
    latents = pipelines["ema"]("a two", generator=seeded(), **SIZE).latents
    for folder in (newest, tmp_path / "inference"):
        again = LuminaPipeline.from_pretrained(folder)("a two", generator=seeded(), **SIZE).latents
        assert torch.equal(latents, again)
    for other in (pipelines["model"], LuminaPipeline.from_pretrained(run / "checkpoints" / "step_00000002")):
        assert not torch.equal(latents, other("a two", generator=seeded(), **SIZE).latents)
    # A checkpoint is whole by itself, and a run of none is said to be one.
    shutil.move(newest, tmp_path / "moved")
    assert torch.equal(
        latents, LuminaPipeline.from_pretrained(tmp_path / "moved")("a two", generator=seeded(), **SIZE).latents
    )
