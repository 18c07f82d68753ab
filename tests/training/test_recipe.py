"""Recipes, overrides, and what is said when they are wrong."""

import pytest

from clipkit.cli import recipes
from clipkit.core import ClipkitError
from clipkit.training import dump_yaml, load_config
from clipkit.training.recipe import changed_keys

RECIPE = "model: 'open_clip:RN50'\nsamples: 1000\noptim: {lr: 1e-3}\n"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", ".001", "1.0e-3"])
def test_scientific_notation_is_a_number(path, text):
    assert load_config(path, [f"optim.lr={text}"]).optim.lr == 0.001
    assert load_config(path).optim.lr == 0.001


def test_numbers_inside_free_form_settings_are_numbers_too(path):
    overrides = ["model={embed_dim: 8, vision_cfg: {ls_init_value: 1e-5, layers: 2}, text_cfg: {}}"]
    assert load_config(path, overrides).model.vision_cfg["ls_init_value"] == 1e-5
    changed = load_config(path, [*overrides, "model.vision_cfg.layers=7"])
    assert changed.model.vision_cfg == {"ls_init_value": 1e-5, "layers": 7}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown key optim\.lrr \(did you mean 'optim\.lr'\?\)"),
        ("bach_size=1", r"unknown key bach_size \(did you mean 'batch_size'\?\)"),
        ("data.augment.flipp=1", r"unknown key data\.augment\.flipp"),
        ("batch_size=0", r"batch_size: .*greater than 0, got 0"),
        ("optim.lr=fast", r"optim\.lr: .*number.*got 'fast'"),
        ("loss.kind=triplet", r"loss\.kind: .*'infonce' or 'sigmoid'"),
        ("data.augment.scale=[0.9, 0.5]", "in order"),
        ("nonsense", "KEY=VALUE"),
        ("a..b=1", "KEY=VALUE"),
        ("optim.lr=[", "not valid YAML"),
        ("model={embed_dim: 8}", r"model\.(vision|text)_cfg is not set"),
        ("model={embed_dim: 8, vision_cfg: {}, text_cfg: {}, x: 1}", r"unknown key model\.x"),
    ],
)
def test_what_is_wrong_is_said_in_the_users_keys(path, override, message):
    with pytest.raises(ClipkitError, match=message) as error:
        load_config(path, [override])
    assert "\n" not in str(error.value)


def test_the_length_that_is_set_last_wins(path):
    assert load_config(path).total_steps(500) == round(1000 / 256)
    assert load_config(path, ["steps=7"]).total_steps(500) == 7
    assert load_config(path, ["steps=7", "epochs=2", "batch_size=100"]).total_steps(500) == 10
    path.write_text(RECIPE + "steps: 3\n")
    with pytest.raises(ClipkitError, match="steps and samples say the same thing"):
        load_config(path)
    path.write_text("model: 'open_clip:RN50'\n")
    with pytest.raises(ClipkitError, match="sets no length"):
        load_config(path).total_steps(500)


def test_a_resolved_config_reads_back_the_same(path):
    config = load_config(path, ["data.augment.scale=[0.5, 1]", "optim.clip_grad_norm=null"])
    path.write_text(dump_yaml(config))
    assert load_config(path) == config


def test_changed_keys_leave_out_what_a_resumption_may_change(path):
    before = load_config(path)
    assert changed_keys(before, load_config(path, ["steps=9", "log.every_steps=3", "checkpoint.keep=9"])) == []
    after = load_config(path, ["optim.lr=2", "data.augment.flip=0.5", "data.workers=9"])
    assert changed_keys(before, after) == ["data.augment.flip", "optim.lr"]


@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_is_valid(name):
    config = load_config(recipes()[name])
    assert config.total_steps(1000) > 0
    assert recipes()[name].read_text().startswith("# ")


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ClipkitError, match="cannot read the recipe"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "text.yaml").write_text("just text")
    with pytest.raises(ClipkitError, match="is no recipe"):
        load_config(tmp_path / "text.yaml")
