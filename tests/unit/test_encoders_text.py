"""Transformers text models of random weights: features against direct calls, and every refusal."""

import json
import pickle
import shutil
from unittest.mock import MagicMock

import pytest
import torch

from lumina.config.schema import TextConfig
from lumina.encoders.text import build_text_encoder

VOCABULARY = 260
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
CLIP_TEXT = SIZES | {"max_position_embeddings": 77, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
CAPTIONS = ["a red circle", "", "a caption of more than forty byte tokens, so that it is cut", "é🙂"]


def save_tokenizer(folder, bos=True, eos=False, pad=True, longest=None, padding_side="right"):
    """A token a byte, 260 entries."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    entries = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos or eos:
        template = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    settings = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": padding_side}
    if pad:
        settings["pad_token"] = "<pad>"
    if longest:
        settings["model_max_length"] = longest
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


def make(family, folder):
    """Saves a model that a user would download, and returns the part of it whose features are wanted."""
    import transformers as hf

    torch.manual_seed(0)
    if family == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))
        save_tokenizer(folder, pad=False, padding_side="left")
        trunk = model.model
    elif family == "gemma":
        model = hf.GemmaForCausalLM(hf.GemmaConfig(**LLAMA))
        save_tokenizer(folder, padding_side="left")
        trunk = model.model
    elif family == "qwen":
        sizes = {key: value for key, value in LLAMA.items() if key != "head_dim"}
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes))
        save_tokenizer(folder, bos=False)
        trunk = model.model
    elif family == "t5":
        config = hf.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=1, num_heads=2
        )
        model = hf.T5ForConditionalGeneration(config)
        save_tokenizer(folder, bos=False, eos=True)
        trunk = model.encoder
    elif family == "clip":
        model = hf.CLIPModel(hf.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION))
        save_tokenizer(folder, eos=True, longest=77)
        trunk = model.text_model
    elif family == "clip_text":
        model = trunk = hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP_TEXT))
        save_tokenizer(folder, eos=True, longest=77)
    elif family == "gemma3":
        text = LLAMA | {"sliding_window": 8, "query_pre_attn_scalar": 8}
        text["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
        config = hf.Gemma3Config(text_config=text, vision_config=VISION, image_token_index=5, mm_tokens_per_image=4)
        model = hf.Gemma3ForConditionalGeneration(config)
        save_tokenizer(folder)
        trunk = model.model.language_model
    elif family == "bert":
        model = hf.BertForMaskedLM(hf.BertConfig(**SIZES))  # has no pooler, which BertModel would want
        save_tokenizer(folder, eos=True)
        trunk = model.bert
    else:
        assert family == "bart"
        config = hf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=3,
            decoder_layers=1,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=64,
        )
        model = hf.BartForConditionalGeneration(config)
        save_tokenizer(folder, eos=True)
        trunk = model.model.encoder
    model.save_pretrained(folder)
    return trunk.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family → (folder, the trunk in memory), made on first use."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, make(family, folder)
        return made[family]

    return get


@pytest.fixture
def llama(models, tmp_path):
    """A copy of a LLaMA folder to break."""
    folder = tmp_path / "llama"
    shutil.copytree(models("llama")[0], folder)
    return folder


def build(folder, **settings):
    return build_text_encoder(TextConfig(encoder=str(folder), **({"max_tokens": 40} | settings)))


def ids(caption: str, family: str) -> list[int]:
    """Token ids of the byte tokenizer by hand: 4 special entries, then the byte alphabet in sorted order."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # GPT-2's table: printable bytes stand for themselves, the others follow from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    found = [4 + alphabet.index(letter[byte]) for byte in caption.encode()]
    start = [] if family in ("qwen", "t5") else [1]
    end = [2] if family in ("t5", "clip", "clip_text", "bert", "bart") else []
    return (start + found[: 40 - len(start) - len(end)] + end) or [1]


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen", "gemma3", "t5", "clip", "clip_text", "bert", "bart"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_features_are_those_of_a_direct_call(models, family, layer):
    folder, trunk = models(family)
    encoder = build(folder, layer=layer)
    features, mask = encoder(CAPTIONS)
    assert (features.shape, features.dtype, encoder.width) == ((4, 40, 16), torch.float32, 16)
    assert not features.requires_grad
    assert features[~mask].abs().max() == 0
    for number, caption in enumerate(CAPTIONS):
        tokens = ids(caption, family)
        assert mask[number].tolist() == [True] * len(tokens) + [False] * (40 - len(tokens))
        with torch.no_grad():
            output = trunk(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        expected = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        torch.testing.assert_close(features[number, : len(tokens)], expected[0], rtol=1e-4, atol=1e-5)


def test_any_unicode(models):
    features, mask = build(models("llama")[0])(["\ud800 lone surrogate", "\0"])
    assert features.isfinite().all()
    assert mask.sum(1).tolist() == [1 + len("? lone surrogate"), 2]


@pytest.mark.parametrize("family", ["llama", "t5", "clip"])
def test_features_do_not_depend_on_the_batch(models, family):
    encoder = build(models(family)[0])
    together, mask = encoder(CAPTIONS)
    for number, caption in enumerate(CAPTIONS):
        alone, alone_mask = encoder([caption])
        assert alone_mask.all()
        length = alone.shape[1]
        assert int(mask[number].sum()) == length
        torch.testing.assert_close(together[number, :length], alone[0], rtol=1e-4, atol=1e-5)


def test_the_last_layer_by_its_number_is_the_normed_one(models):
    folder, _ = models("clip")
    assert torch.equal(build(folder, layer=3)(["red"])[0], build(folder, layer=-1)(["red"])[0])


def test_layers_that_are_not_needed_are_dropped(models):
    folder, _ = models("llama")
    full, short = build(folder), build(folder, layer=1)
    count = [sum(p.numel() for p in encoder._model.layers.parameters()) for encoder in (full, short)]
    assert count[1] * 3 == count[0] * 2


def test_frozen_and_in_the_asked_precision(models):
    folder, _ = models("llama")
    exact, coarse = build(folder), build(folder, dtype="bf16")
    parameters = list(coarse._model.parameters())
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    assert not any(p.requires_grad for p in parameters)
    assert not coarse._model.training
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast, _ = exact(CAPTIONS)
    reference, mask = exact(CAPTIONS)
    assert torch.equal(under_autocast, reference)
    features, _ = coarse(CAPTIONS)
    assert features.dtype == torch.float32
    error = (features - reference)[mask].norm() / reference[mask].norm()
    assert 0 < error < 0.05


def test_description(models):
    folder, _ = models("llama")
    told = build(folder, layer=-2, dtype="bf16").describe()
    for part in (str(folder), "LlamaModel", "hidden state 2", "bfloat16", "width 16", "40 tokens"):
        assert part in told


def test_pipeline_folder(models, tmp_path):
    folder, _ = models("clip_text")
    for home in ("text_encoder_2", "text_encoder"):
        shutil.copytree(folder, tmp_path / home, ignore=shutil.ignore_patterns("token*"))
        shutil.copytree(folder, tmp_path / home.replace("text_encoder", "tokenizer"))
    expected, _ = build(folder)(CAPTIONS)
    assert torch.equal(build(tmp_path)(CAPTIONS)[0], expected)
    assert torch.equal(build(tmp_path / "text_encoder_2")(CAPTIONS)[0], expected)


def test_pytorch_weights_without_code(models, llama):
    """A .bin of tensors is read; one with code in it is refused, and the code is not run."""
    from safetensors.torch import load_file

    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(weights, llama / "pytorch_model.bin")
    assert torch.equal(build(llama)(CAPTIONS)[0], build(models("llama")[0])(CAPTIONS)[0])

    class Trap:
        def __reduce__(self):
            return (open, (str(llama / "ran"), "w"))

    (llama / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Trap()}))
    with pytest.raises(ValueError, match="no readable text model"):
        build(llama)
    torch.save({"weight": Trap()}, llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no readable text model"):
        build(llama)
    assert not (llama / "ran").exists()


def test_loading_is_quiet(models, capfd, caplog):
    build(models("llama")[0])  # lm_head is left out, which transformers reports at length
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"layer": 4}, "text.layer: .* has 4 hidden states.* -4 to 3, not 4"),
        ({"layer": -5}, "text.layer: .* -4 to 3, not -5"),
        ({"max_tokens": 65}, "text.max_tokens: .* at most 64 tokens, not 65"),
        ({"max_tokens": 1}, "text.max_tokens: .* adds 1 tokens.* at least 2"),
    ],
)
def test_settings_out_of_range(models, settings, told):
    with pytest.raises(ValueError, match=told):
        build(models("llama")[0], **settings)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (drop_tokenizer, "no readable tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "no readable tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "no readable text model .*JSON"),
        (lambda folder: (folder / "config.json").unlink(), "no readable text model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no readable text model .*model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x07" * 100), "no readable text model"),
        (lambda folder: change_config(folder, num_hidden_layers=4), "lacks weights .*9, such as layers.3"),
        (lambda folder: change_config(folder, intermediate_size=34), "other shapes"),
        (lambda folder: change_config(folder, model_type="unheard_of"), "unheard_of"),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}'
            ),
            "own code, which is never run",
        ),
    ],
)
def test_damaged_folders(llama, damage, told):
    damage(llama)
    with pytest.raises(ValueError, match=told) as caught:
        build(llama)
    assert str(llama) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_that_read_no_text(llama):
    import transformers as hf

    hf.ViTModel(hf.ViTConfig(**VISION)).save_pretrained(llama)
    with pytest.raises(ValueError, match=r"\(vit\) is not a text model"):
        build(llama)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 4, "max_source_positions": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    config = hf.WhisperConfig(vocab_size=VOCABULARY, max_target_positions=64, **sizes, **heads, pad_token_id=3)
    hf.WhisperModel(config).save_pretrained(llama)
    with pytest.raises(ValueError, match=r"\(whisper\) does not read text"):
        build(llama)


def test_a_tokenizer_without_its_vocabulary(models, tmp_path):
    """transformers makes an empty one of a T5 folder without tokenizer files, which reads every word as unknown."""
    shutil.copytree(models("t5")[0], tmp_path / "t5")
    drop_tokenizer(tmp_path / "t5")
    with pytest.raises(ValueError, match="tokenizer files are missing"):
        build(tmp_path / "t5")


def test_a_tokenizer_of_another_model(llama):
    import transformers as hf

    hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA | {"vocab_size": 80})).save_pretrained(llama)
    with pytest.raises(ValueError, match=r"gives token .* where its model knows 80"):
        build(llama)(["zzz"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("./folder", "there is no folder"),
        ("not a name", "neither a folder nor a hub name"),
        ("google/gemma-2b", "not on this machine and the hub cannot be reached"),
    ],
)
def test_missing_models(name, told):
    with pytest.raises(ValueError, match=told):
        build(name)


def test_gated_and_unknown_hub_models(monkeypatch):
    import transformers
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for error, told in [(GatedRepoError, "is gated; accept its licence"), (RepositoryNotFoundError, "has no model")]:

        def refuse(*_, error=error, **__):
            raise OSError("You are trying to access a repo") from error("no", response=MagicMock())

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
        with pytest.raises(ValueError, match=told):
            build("meta-llama/Llama-2-7b-hf")
