"""Towers taken from other models: pretrained image towers, and Hugging Face text models, offline ever after."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.core import ClipkitError
from clipkit.models import ModelConfig, TowersConfig, create_model, load_model
from tests.conftest import TINY_VIT, tiny_model
from tests.models.test_towers import hugging_face_folder

TEXTS = ["a red heart", "dog", "a dog a red a red heart"]
WORDS = ["a", "red", "heart", "dog", "blue"]


def text_model_folder(folder, kind, *, masked=False, **sizes):
    """A random BERT or XLM-R of a few thousand parameters with its tokenizer, as `save_pretrained` writes them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    bert = kind == "bert"
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"] if bert else ["<s>", "<pad>", "</s>", "<unk>"]
    first, end = ("[CLS]", "[SEP]") if bert else ("<s>", "</s>")
    ids = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {end}", special_tokens=[(first, ids[first]), (end, ids[end])]
    )
    named = {"pad_token": special[0 if bert else 1], "unk_token": special[3], "sep_token": end, "cls_token": first}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    settings = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(ids),
        "max_position_embeddings": 40,
        "pad_token_id": ids[named["pad_token"]],
        **sizes,
    }
    torch.manual_seed(1)
    config = (transformers.BertConfig if bert else transformers.XLMRobertaConfig)(**settings)
    name = ("Bert" if bert else "XLMRoberta") + ("ForMaskedLM" if masked else "Model")
    getattr(transformers, name)(config).eval().save_pretrained(folder)
    return folder


def towers(**inits):
    return TowersConfig.model_validate({side: {"init": str(init)} for side, init in inits.items()})


def with_text(folder, **more):
    text_cfg = {"hf_model_name": str(folder), "context_length": 24, "hf_proj_type": "linear", **more}
    return ModelConfig.model_validate({**TINY_VIT, "text_cfg": text_cfg})


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("kind", "pooler", "masked"),
    [("bert", "cls_pooler", False), ("bert", "mean_pooler", True), ("xlm-roberta", "mean_pooler", True)],
)
def test_a_text_model_from_a_folder_is_the_text_tower_and_moves_with_the_model(tmp_path, kind, pooler, masked):
    from transformers import AutoModel, AutoTokenizer

    folder = text_model_folder(tmp_path / "text", kind, masked=masked)
    model = create_model(with_text(folder, hf_pooler_type=pooler), None, towers(text=folder)).eval()
    # The twin: transformers alone, and the projection.
    encoded = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        out = AutoModel.from_pretrained(folder).eval()(**encoded)
        mask = encoded["attention_mask"][..., None]
        mean = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
        pooled = out.pooler_output if pooler == "cls_pooler" else mean
        wanted = torch.nn.functional.normalize(model.backbone.text.proj(pooled), dim=-1)
    assert np.allclose(model.embed_texts(TEXTS), wanted, atol=1e-6)

    model.save(tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    shutil.rmtree(folder)
    loaded = load_model(tmp_path / "elsewhere")
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.context_length == 24
    assert np.array_equal(loaded.embed_texts(TEXTS), model.embed_texts(TEXTS))
    loaded.save(tmp_path / "again")  # as the last checkpoint of a resumed run
    assert load_model(tmp_path / "again").fingerprint() == model.fingerprint()


def test_pooling_that_was_not_pretrained_is_told(tmp_path, capsys):
    folder = text_model_folder(tmp_path / "text", "bert", masked=True)
    create_model(with_text(folder, hf_pooler_type="cls_pooler"), None, towers(text=folder))
    assert "no pooling layer" in capsys.readouterr().err
    create_model(with_text(folder))
    assert f"random weights; towers.text.init={folder}" in capsys.readouterr().err


def test_text_models_that_do_not_fit_are_refused(tmp_path):
    folder = text_model_folder(tmp_path / "text", "bert")
    wide = text_model_folder(tmp_path / "wide", "bert", intermediate_size=48)
    heads = text_model_folder(tmp_path / "heads", "bert", num_attention_heads=4)
    with pytest.raises(ClipkitError, match=r"set model\.text_cfg\.hf_model_name="):
        create_model(ModelConfig.model_validate(TINY_VIT), None, towers(text=folder))
    with pytest.raises(
        ClipkitError, match=r"encoder\.layer\.0\.intermediate\.dense\.weight is \[48, 16\] there and \[32,"
    ):
        create_model(with_text(folder), None, towers(text=wide))
    with pytest.raises(ClipkitError, match="num_attention_heads is 4 there and 2 here"):
        create_model(with_text(folder), None, towers(text=heads))
    (wide / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ClipkitError, match="cannot load the text model in .*wide"):
        create_model(with_text(folder), None, towers(text=wide))


@pytest.mark.parametrize("custom", [False, True])
def test_towers_come_from_other_models_with_their_preprocessing(tmp_path, custom):
    source = tiny_model(seed=3, custom_text=custom)
    source.set_preprocess(source.preprocess.model_copy(update={"mean": (0.5,) * 3, "interpolation": "bilinear"}))
    source.save(tmp_path / "source")
    config = ModelConfig.model_validate({**TINY_VIT, "custom_text": not custom})
    torch.manual_seed(9)
    model = create_model(config, {"background": (0, 0, 0)}, towers(image=tmp_path / "source")).eval()
    assert model.preprocess == source.preprocess.model_copy(update={"background": (0, 0, 0)})
    assert np.array_equal(model.embed_images([picture()]), source.embed_images([picture()]))
    assert not np.allclose(model.embed_texts(TEXTS), source.embed_texts(TEXTS))
    model = create_model(config, None, towers(text=tmp_path / "source")).eval()
    assert np.array_equal(model.embed_texts(TEXTS), source.embed_texts(TEXTS))
    assert not np.allclose(model.embed_images([picture()]), source.embed_images([picture()]))
    assert model.preprocess.mean != source.preprocess.mean


def test_a_projection_into_another_dimension_is_left_fresh(tmp_path, capsys):
    source = tiny_model(seed=3)
    source.save(tmp_path / "source")
    config = ModelConfig.model_validate({**TINY_VIT, "embed_dim": 24})
    both = towers(image=tmp_path / "source", text=tmp_path / "source")
    torch.manual_seed(9)
    model = create_model(config, None, both).eval()
    assert capsys.readouterr().err.count("its projection has another shape") == 2
    ours, theirs = model.backbone.state_dict(), source.backbone.state_dict()
    different = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert different == {"visual.proj", "text_projection"}


@pytest.mark.parametrize(
    ("changes", "side", "message"),
    [
        (
            {"vision_cfg": {**TINY_VIT["vision_cfg"], "width": 48}},
            "image",
            r"visual\.class_embedding is \[32\] there and \[48\] here",
        ),
        (
            {"vision_cfg": {**TINY_VIT["vision_cfg"], "layers": 1}},
            "image",
            r"resblocks\.1\..* is \[.*\] there and missing",
        ),
        ({"vision_cfg": {**TINY_VIT["vision_cfg"], "head_width": 8}}, "image", "head_width is 16 there and 8 here"),
        (
            {"vision_cfg": {**TINY_VIT["vision_cfg"], "pool_type": "avg"}},
            "image",
            "pool_type is tok there and avg here",
        ),
        ({"quick_gelu": True}, "text", "quick_gelu is False there and True here"),
        (
            {"text_cfg": {**TINY_VIT["text_cfg"], "context_length": 20}},
            "text",
            "positional_embedding is .24, 32. there",
        ),
        ({"text_cfg": {**TINY_VIT["text_cfg"], "tokenizer_kwargs": {"clean": "canonicalize"}}}, "text", "tokenizer"),
    ],
)
def test_towers_that_do_not_fit_are_refused(model_dir, changes, side, message):
    with pytest.raises(ClipkitError, match=message) as error:
        create_model(ModelConfig.model_validate({**TINY_VIT, **changes}), None, towers(**{side: model_dir}))
    assert str(error.value).startswith(f"towers.{side}.init={model_dir}")


def test_towers_of_hugging_face_models_go_among_themselves(tmp_path, model_dir):
    first = hugging_face_folder(tmp_path / "first", "clip")
    second = load_model(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.01)
    second.save(tmp_path / "second")
    model = create_model(str(first), None, towers(text=tmp_path / "second"))
    assert np.array_equal(model.embed_texts(TEXTS), second.embed_texts(TEXTS))
    assert np.array_equal(model.embed_images([picture()]), load_model(first).embed_images([picture()]))
    with pytest.raises(ClipkitError, match="is of another library"):
        create_model(str(first), None, towers(image=model_dir))
