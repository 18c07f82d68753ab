"""Every recipe parses, says in its first line what it is for, and names an architecture that can be built."""

import pytest
import torch

from clipkit.cli import recipes
from clipkit.models import ModelConfig, create_model
from clipkit.training import load_config

SCRATCH = ("vit_b32", "vit_b16", "siglip_b16")


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_parses_and_says_what_it_is(name):
    path = recipes()[name]
    config = load_config(path)
    assert config.data.train is None
    assert any((config.steps, config.samples, config.epochs))
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    assert first.endswith(".")


@pytest.mark.parametrize("name", SCRATCH)
def test_its_model_can_be_built(name):
    config = load_config(recipes()[name])
    with torch.device("meta"):
        model = create_model(config.model, config.preprocess, config.towers)
    assert model.preprocess.size == (224, 224)
    assert (model.logit_bias is not None) == (config.loss.kind == "sigmoid")
    assert {side for side, _ in model.layer_depths().values()} == {"image", "text", None}


def test_the_locked_towers_architecture_is_that_of_the_model_it_comes_from():
    import open_clip

    config = load_config(recipes()["lit_hf"])
    assert isinstance(config.model, ModelConfig)
    name, tag = config.towers.image.init.removeprefix("open_clip:").split("/")
    wanted = open_clip.get_model_config(name)
    assert (config.model.vision_cfg, config.model.embed_dim) == (wanted["vision_cfg"], wanted["embed_dim"])
    assert tag in open_clip.list_pretrained_tags_by_model(name)
    model, tag = load_config(recipes()["finetune"]).model.removeprefix("open_clip:").split("/")
    assert tag in open_clip.list_pretrained_tags_by_model(model)
