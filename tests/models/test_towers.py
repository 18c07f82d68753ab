"""One face over open_clip and Hugging Face towers, saved and loaded whole, with a fingerprint of what they are."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipkit.core import ClipkitError, pick_device
from clipkit.models import ModelConfig, create_model, load_model, load_model_of, model_reference, openai_templates
from clipkit.models.model_spec import model_folder
from clipkit.models.openclip import _NothingDrawn
from tests.conftest import TINY_VIT, tiny_model

TEXTS = ["a red heart", "ein großer Hund", "x " * 90]


def noise(side=50, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side + 9, 3), dtype=np.uint8))


def test_features_are_open_clips(model):
    backbone = model.backbone
    image = noise()
    mean, std = model.preprocess.mean, model.preprocess.std
    theirs = open_clip.transform.image_transform(32, False, mean, std)(image)[None]
    with torch.inference_mode():
        assert np.allclose(model.embed_images([image]), backbone.encode_image(theirs, normalize=True), atol=1e-5)
        tokens = open_clip.SimpleTokenizer(context_length=24)(TEXTS)
        assert torch.equal(model.tokenize(TEXTS), tokens)
        assert np.allclose(model.embed_texts(TEXTS), backbone.encode_text(tokens, normalize=True), atol=1e-6)


def test_saved_and_loaded_it_is_the_same_model(model, model_dir):
    loaded = load_model(model_dir)
    assert (
        loaded.fingerprint()
        == model.fingerprint()
        == json.loads((model_dir / "clipkit.json").read_text())["fingerprint"]
    )
    assert np.array_equal(loaded.embed_texts(TEXTS), model.embed_texts(TEXTS))
    assert np.array_equal(loaded.embed_images([noise()]), model.embed_images([noise()]))
    assert loaded.preprocess == model.preprocess
    assert (loaded.context_length, loaded.embed_dim, loaded.activation) == (24, 32, "gelu")
    assert loaded.logit_bias is None


def test_loading_a_folder_draws_no_weights_and_lacks_none(model, model_dir):
    before = torch.random.get_rng_state()
    with _NothingDrawn():
        torch.nn.init.normal_(torch.nn.Conv2d(3, 4, 2).weight)
        torch.nn.Linear(3, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    loaded = load_model(model_dir)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[name], tensor), name


def test_who_may_read_its_settings_may_read_its_weights(model_dir):
    assert len({path.stat().st_mode for path in model_dir.iterdir()}) == 1


def test_open_clip_itself_loads_what_we_save(model, model_dir):
    theirs = open_clip.create_model(f"local-dir:{model_dir}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{model_dir}")(TEXTS)
    with torch.inference_mode():
        assert np.allclose(model.embed_texts(TEXTS), theirs.encode_text(tokens, normalize=True), atol=1e-6)
    assert theirs.visual.preprocess_cfg["size"] in ((32, 32), [32, 32])


def test_the_fingerprint_follows_values_not_files(model, model_dir, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(model_dir, moved)
    tensors = load_file(moved / "model.safetensors")
    save_file(dict(reversed(tensors.items())), moved / "model.safetensors", metadata={"any": "thing"})
    assert load_model(moved).fingerprint() == model.fingerprint()
    tensors["logit_scale"] += 1e-3
    save_file(tensors, moved / "model.safetensors")
    assert load_model(moved).fingerprint() != model.fingerprint()
    other = tiny_model()
    other.preprocess = other.preprocess.model_copy(update={"background": (0, 0, 0)})
    assert other.fingerprint() != model.fingerprint()
    assert tiny_model(quick_gelu=True).fingerprint() != model.fingerprint()


def test_quick_gelu_and_bias_survive(tmp_path):
    model = tiny_model(quick_gelu=True, init_logit_bias=-10.0, init_logit_scale=2.3)
    model.save(tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.activation == "quick_gelu"
    assert loaded.logit_bias.item() == -10.0
    assert np.array_equal(loaded.embed_texts(TEXTS), model.embed_texts(TEXTS))
    _, _, scale, bias = loaded(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), loaded.tokenize(["a"]))
    assert scale.item() == pytest.approx(np.exp(2.3))
    assert bias.item() == -10.0


def test_a_convolutional_tower_and_another_background(tmp_path):
    config = {**TINY_VIT, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 32}}
    model = create_model(ModelConfig.model_validate(config), {"background": (0, 0, 0)}).eval()
    model.save(tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.preprocess.background == (0, 0, 0)
    assert loaded.fingerprint() == model.fingerprint()
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert loaded.load_image(clear).max() == 0
    assert np.array_equal(loaded.embed_images([noise()]), model.embed_images([noise()]))


def hugging_face_folder(folder, kind):
    """A random CLIP or SigLIP of a few thousand parameters, as `save_pretrained` writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        PreTrainedTokenizerFast,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
    )

    words = ["<pad>", "<unk>", "<end>", "a", "red", "heart", "dog"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **shared,
        "vocab_size": 7,
        "max_position_embeddings": 12,
        "eos_token_id": 2,
        "bos_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {**shared, "image_size": 24, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    else:
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        SiglipImageProcessor(
            size={"height": 24, "width": 24}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "dim", "bias"), [("clip", 8, False), ("siglip", 16, True)])
def test_hugging_face_models(tmp_path, kind, dim, bias):
    from transformers import AutoImageProcessor, AutoModel

    folder = hugging_face_folder(tmp_path / "hf", kind)
    model = load_model(folder)
    assert (model.embed_dim, model.context_length) == (dim, 12)
    assert (model.logit_bias is not None) == bias
    theirs = AutoModel.from_pretrained(folder).eval()
    image = noise()
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    tokens = model.tokenize(["a red heart", "dog"])
    assert tokens.tolist()[1][:3] == [6, 2, 0]
    with torch.inference_mode():
        wanted = theirs(input_ids=tokens, pixel_values=pixels)
    # Their image processor resizes tensors, ours Pillow images as the models were trained: a grey level apart at most.
    assert np.allclose(model.embed_images([image]), wanted.image_embeds, atol=2e-2)
    assert np.allclose(model.embed_texts(["a red heart", "dog"]), wanted.text_embeds, atol=1e-6)

    model.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.fingerprint() == model.fingerprint()
    assert np.array_equal(again.embed_images([image]), model.embed_images([image]))
    assert AutoModel.from_pretrained(tmp_path / "saved").config.model_type == kind


def test_an_open_clip_model_with_a_hugging_face_text_tower_needs_no_hub(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "red", "heart"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    base = tmp_path / "bert"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(base)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertConfig(**sizes, vocab_size=5, max_position_embeddings=12).save_pretrained(base)
    text_cfg = {"hf_model_name": str(base), "hf_tokenizer_name": str(base), "context_length": 12}
    model = tiny_model(text_cfg=text_cfg)
    model.save(tmp_path / "m")
    shutil.rmtree(base)
    loaded = load_model(tmp_path / "m")
    assert loaded.fingerprint() == model.fingerprint()
    assert np.array_equal(loaded.embed_texts(["a red heart"]), model.embed_texts(["a red heart"]))


def test_pretrained_weights_bring_their_activation(monkeypatch, tmp_path, model):
    """`open_clip:NAME/TAG` goes through open_clip's own download; here the file is one that we made."""
    torch.manual_seed(0)
    source = open_clip.create_model("RN50", force_quick_gelu=True)
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "w.safetensors"))
    loaded = load_model("open_clip:RN50/openai")
    assert loaded.activation == "quick_gelu"
    assert loaded.preprocess.size == (224, 224)
    with torch.inference_mode():
        tokens = loaded.tokenize(["a red heart"])
        assert torch.allclose(loaded.backbone.encode_text(tokens), source.eval().encode_text(tokens), atol=1e-5)


def test_names_from_the_library_make_random_models():
    torch.manual_seed(0)
    model = create_model("open_clip:RN50")
    assert model.embed_dim == 1024
    assert model.context_length == 77


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere/", "no such model"),
        ("open_clip:ViT-B-32", "names no weights"),
        ("open_clip:ViT-B-33/openai", "did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32/opnai", "did you mean 'openai'"),
        ("hf:justaname", "has the form hf:ORG/NAME"),
    ],
)
def test_wrong_names_are_told(spec, message):
    with pytest.raises(ClipkitError, match=message):
        load_model(spec)


def test_broken_folders_are_named(model_dir, tmp_path):
    def copy(name):
        shutil.copytree(model_dir, tmp_path / name)
        return tmp_path / name

    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ClipkitError, match=r"cut/model\.safetensors is broken"):
        load_model(cut)
    none = copy("none")
    (none / "model.safetensors").rename(none / "pytorch_model.bin")
    with pytest.raises(ClipkitError, match=r"pytorch_model\.bin is a pickle"):
        load_model(none)
    other = copy("other")
    config = json.loads((other / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 16
    (other / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ClipkitError, match="does not fit"):
        load_model(other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipkitError, match="is no model"):
        load_model(tmp_path / "empty")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ClipkitError, match="holds a 'bert' model; known are clip, siglip"):
        load_model(tmp_path / "bert")


def test_a_run_and_its_checkpoints(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "run/checkpoints/step-000002/model")
    with pytest.raises(ClipkitError, match="use .*run@step-000002"):
        model_folder(tmp_path / "run")
    assert model_folder(f"{tmp_path}/run@step-000002") == tmp_path / "run/checkpoints/step-000002/model"
    with pytest.raises(ClipkitError, match="no checkpoint 'step-000003' .*it has step-000002"):
        model_folder(f"{tmp_path}/run@step-000003")
    shutil.copytree(model_dir, tmp_path / "run/model")
    assert model_folder(tmp_path / "run") == tmp_path / "run/model"


def test_an_artifact_finds_its_model_and_refuses_another(model, model_dir, tmp_path):
    manifest = {"model": model_reference(model, model_dir, tmp_path / "emb")}
    (tmp_path / "emb").mkdir()
    assert load_model_of(manifest, tmp_path / "emb").fingerprint() == model.fingerprint()
    other = tiny_model(seed=5)
    other.save(tmp_path / "other")
    with pytest.raises(
        ClipkitError, match=f"made with model {model.fingerprint()[:12]}.*model {other.fingerprint()[:12]}"
    ):
        load_model_of(manifest, tmp_path / "emb", str(tmp_path / "other"))
    manifest["model"]["path"] = "gone"
    with pytest.raises(ClipkitError, match="not at .*gone any more; name it with --model"):
        load_model_of(manifest, tmp_path / "emb")


def test_openai_templates():
    templates = openai_templates()
    assert len(templates) == 80
    assert all(template.count("{}") == 1 for template in templates)


@pytest.mark.parametrize(
    ("told", "device"),
    [
        ({}, "cuda"),
        ({"LOCAL_RANK": "0"}, "cuda:0"),
        ({"LOCAL_RANK": "2", "SLURM_LOCALID": "1"}, "cuda:2"),
        ({"SLURM_LOCALID": "3"}, "cuda:3"),
        ({"LOCAL_RANK": "5"}, "cuda:1"),
        ({"LOCAL_RANK": ""}, "cuda"),
    ],
)
def test_each_of_several_processes_takes_a_gpu_of_its_own(monkeypatch, told, device):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert str(pick_device()) == device
    assert str(pick_device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each sees one, its own
    assert pick_device().index in (0, None)
