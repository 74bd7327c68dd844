"""The recipe: defaults, files, overrides, and what is said of a mistake in them."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ulimi.errors import UlimiError
from ulimi.model import AWDLSTM
from ulimi.recipe import (
    OPTIM_DEFAULTS,
    Recipe,
    build_recipe,
    changed_keys,
    explain,
    load_recipe,
    recipe_headline,
    recipe_names,
)


def refusal(*overrides, recipe=None):
    with pytest.raises(UlimiError) as caught:
        load_recipe(recipe, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_taken_or_refused(call):
    try:
        recipe, message = call(), ""
    except UlimiError as error:
        recipe, message = None, str(error)
    assert "\n" not in message
    assert isinstance(recipe, Recipe) or message


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def all_keys(recipe):
    return {f"{section}.{key}" for section, values in recipe.model_dump().items() for key in values}


# Shipped recipes


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_says_what_it_is_for(name):
    recipe = load_recipe(name)
    headline = recipe_headline(name)
    assert len(headline) > 20
    assert not headline.startswith("#")
    sizes = {**recipe.model.model_dump(), "embedding_size": 2, "hidden_size": 2}
    AWDLSTM(vocab_size=3, **sizes)  # the [model] section is the network's keyword arguments


def test_recipes_are_shipped():
    assert "isizulu-cpu" in recipe_names()
    assert recipe_names() == sorted(set(recipe_names()))


@pytest.mark.parametrize("name", [None, *recipe_names()])
def test_a_recipe_survives_being_written_and_read(tmp_path, name):
    recipe = load_recipe(name, ["optim.lr_drops=[2, 5]", "optim.seed=7", "model.tie_weights=false"])
    again = load_recipe(write(tmp_path / "recipe.toml", recipe.to_toml()))
    assert again == recipe
    assert again.to_toml() == recipe.to_toml()
    assert changed_keys(recipe, again) == []
    # Complete: a later change of a default would change nothing.
    written = tomllib.loads(recipe.to_toml())
    assert {f"{section}.{key}" for section, values in written.items() for key in values} == all_keys(recipe)


# Precedence


def test_an_override_beats_the_file_and_the_file_beats_the_default(tmp_path):
    path = write(tmp_path / "my.toml", "[data]\nbptt = 33\nbatch_size = 5\n[optim]\nlr = 0.5\n")
    default, recipe = load_recipe(), load_recipe(path, ["data.bptt=44", "optim.patience=3"])
    assert (default.data.bptt, default.data.batch_size, default.optim.patience) == (70, 32, 0)
    assert (recipe.data.bptt, recipe.data.batch_size, recipe.optim.patience, recipe.optim.lr) == (44, 5, 3, 0.5)
    assert set(changed_keys(default, recipe)) == {"data.bptt", "data.batch_size", "optim.patience", "optim.lr"}
    assert load_recipe(None, ["data.bptt=8", "data.bptt=9"]).data.bptt == 9


@pytest.mark.parametrize("kind", OPTIM_DEFAULTS)
def test_each_optimizer_has_defaults_of_its_own(tmp_path, kind):
    for recipe in (
        load_recipe(None, [f"optim.kind={kind}"]),
        load_recipe(write(tmp_path / "kind.toml", f'[optim]\nkind = "{kind}"\n')),
        load_recipe("isizulu-cpu", [f"optim.kind={kind}", "optim.lr=0.1"]),
    ):
        defaults = {**OPTIM_DEFAULTS[kind], "kind": kind}
        for key in ("weight_decay", "max_grad_norm", "kind"):
            assert getattr(recipe.optim, key) == defaults[key]
    assert load_recipe(None, [f"optim.kind={kind}"]).optim.lr == OPTIM_DEFAULTS[kind]["lr"]
    assert load_recipe(None, ["optim.lr=0.1", f"optim.kind={kind}"]).optim.lr == 0.1
    assert load_recipe().optim.kind == "adamw"


def test_settings_are_not_changed_by_building(tmp_path):
    settings = {"optim": {"kind": "sgd"}}
    build_recipe(settings, ["optim.lr=3"])
    assert settings == {"optim": {"kind": "sgd"}}


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe().optim.lr = 1.0


@pytest.mark.parametrize(("override", "expected"), [
    ("optim.lr=3", 3.0),
    ("optim.lr = 3e-2", 0.03),
    ("optim.kind=nt-asgd", "nt-asgd"),
    ('optim.kind="nt-asgd"', "nt-asgd"),
    ("optim.lr_drops=[3, 9]", (3, 9)),
    ("optim.lr_drops=[]", ()),
    ("data.variable_length=false", False),
])  # fmt: skip
def test_overrides_are_toml_values_and_bare_words(override, expected):
    section, key = override.partition("=")[0].strip().split(".")
    assert getattr(getattr(load_recipe(None, [override]), section), key) == expected


def test_a_name_is_a_shipped_recipe_first_and_a_path_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "isizulu-cpu", "[data]\nbptt = 12\n")
    assert load_recipe("isizulu-cpu").data.bptt == 70
    assert load_recipe("./isizulu-cpu").data.bptt == 12


def test_changed_keys_names_each_setting_that_differs():
    old = load_recipe()
    new = load_recipe(None, ["model.hidden_size=9", "optim.lr_drops=[4]", "tokenizer.kind=char"])
    assert changed_keys(old, new) == ["tokenizer.kind", "model.hidden_size", "optim.lr_drops"]
    assert changed_keys(new, old) == changed_keys(old, new)


# Explanation


@pytest.mark.parametrize("name", [None, *recipe_names()])
def test_explain_is_a_recipe_with_every_setting_documented(tmp_path, name):
    recipe = load_recipe(name, ["optim.lr_drops=[2, 5]"])
    text = explain(recipe)
    assert load_recipe(write(tmp_path / "explained.toml", text)) == recipe
    parsed = tomllib.loads(text)
    assert {f"{section}.{key}" for section, values in parsed.items() for key in values} == all_keys(recipe)
    lines = text.splitlines()
    for section in Recipe.model_fields:
        assert any(line.startswith(f"[{section}]  # ") and len(line) > len(section) + 10 for line in lines)
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# "), line
            assert lines[number - 1] != "# None", line


# Mistakes


@pytest.mark.parametrize(("override", "said"), [
    ("optim.lrr=3", ["unknown key 'optim.lrr'", "did you mean 'lr'?"]),
    ("model.hiden_size=3", ["unknown key 'model.hiden_size'", "did you mean 'hidden_size'?"]),
    ("data.zzz=3", ["unknown key 'data.zzz'", "known: batch_size, bptt"]),
    ("optimm.lr=3", ["unknown section 'optimm'", "did you mean 'optim'?"]),
    ("zzz.lr=3", ["unknown section 'zzz'", "known: tokenizer, data, model, loss, optim"]),
    ("optim.lr=fast", ["optim.lr = 'fast'", "number"]),
    ("optim.lr=", ["optim.lr = ''", "number"]),
    ("optim.lr=[1]", ["optim.lr = [1]", "number"]),
    ("optim.lr=nan", ["optim.lr = nan", "finite"]),
    ("optim.lr=inf", ["optim.lr = inf", "finite"]),
    ("optim.lr=1e300", ["optim.lr = 1e+300", "less than or equal to 1000000000"]),
    ("optim.weight_decay=1e300", ["optim.weight_decay = 1e+300", "less than or equal to 1000000"]),
    ("optim.lr=0", ["optim.lr = 0", "greater than 0"]),
    ("optim.max_epochs=0", ["optim.max_epochs = 0", "greater than or equal to 1"]),
    ("optim.kind=adam", ["optim.kind = 'adam'", "'adamw'"]),
    ("optim.lr_drops=[0]", ["optim.lr_drops.0 = 0", "greater than or equal to 1"]),
    ("optim.lr_drops=3", ["optim.lr_drops = 3"]),
    ("model.hidden_size=12.5", ["model.hidden_size = 12.5", "integer"]),
    (f"model.hidden_size={10**21}", [f"model.hidden_size = {10**21}", "less than or equal to 100000000"]),
    (f"model.embedding_size={10**21}", ["model.embedding_size = ", "less than or equal to 100000000"]),
    ("model.num_layers=0", ["model.num_layers = 0"]),
    ("model.num_layers=1001", ["model.num_layers = 1001", "less than or equal to 1000"]),
    ("model.weight_dropout=1", ["model.weight_dropout = 1", "less than 1"]),
    ("model.weight_dropout=-0.1", ["model.weight_dropout = -0.1"]),
    ("model.tie_weights=maybe", ["model.tie_weights = 'maybe'"]),
    ("data.bptt=1", ["data.bptt = 1", "greater than or equal to 2"]),
    ("tokenizer.kind=wordpiece", ["tokenizer.kind = 'wordpiece'", "'unigram'"]),
    ("tokenizer.vocab_size=200", ["tokenizer.vocab_size = 200", "256 bytes"]),
    ("tokenizer.vocab_size=0", ["tokenizer.vocab_size = 0", "256 bytes"]),
    ("optim.average_at_start=true", ["optim.average_at_start needs optim.kind = 'nt-asgd'", "'adamw'"]),
    ("optim.beta1=1", ["optim.beta1 = 1", "less than 1"]),
    ("optim.average_share=1.5", ["optim.average_share = 1.5", "less than or equal to 1"]),
    ("optim.lr", ["'optim.lr' is not a setting", "section.key=value"]),
    ("lr=3", ["'lr=3' is not a setting"]),
    ("optim.=3", ["'optim.=3' is not a setting"]),
    ("=3", ["'=3' is not a setting"]),
    ("", ["'' is not a setting"]),
])  # fmt: skip
def test_a_mistake_in_an_override_is_one_line_that_names_it(override, said):
    message = refusal(override)
    for part in said:
        assert part in message


@pytest.mark.parametrize(("text", "said"), [
    ("[optim]\nlrr = 3\n", "unknown key 'optim.lrr'; did you mean 'lr'?"),
    ("[optimm]\nlr = 3\n", "unknown section 'optimm'"),
    ("lr = 3\n", "unknown section 'lr'"),
    ("optim = 3\n", "optim is a section, [optim], not a value"),
    ("[[optim]]\nlr = 3\n", "optim is a section, [optim], not a value"),
    ("[optim\nlr = 3\n", "not valid TOML"),
    ("[optim]\nlr = 3\nlr = 4\n", "not valid TOML"),
    ("[optim]\nlr = 'x'\n", "optim.lr = 'x'"),
    ("[model.extra]\na = 1\n", "unknown key 'model.extra'"),
])  # fmt: skip
def test_a_mistake_in_a_file_is_one_line_that_names_the_file(tmp_path, text, said):
    path = write(tmp_path / "bad.toml", text)
    message = refusal(recipe=path)
    assert message.startswith(f"{path}: ")
    assert said in message


def test_a_file_that_is_not_utf8_is_one_line(tmp_path):
    path = tmp_path / "latin1.toml"
    path.write_bytes(b"[optim]\nlr = 3 # \xe9\n")
    assert "not valid TOML" in refusal(recipe=str(path))


def test_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf[optim]\r\nlr = 3\r\n")
    assert load_recipe(str(path)).optim.lr == 3


@pytest.mark.parametrize("name", ["isizulu-cpi", "", "no/such/file.toml", "."])
def test_an_unknown_recipe_lists_those_that_there_are(name):
    message = refusal(recipe=name)
    assert all(known in message for known in recipe_names())
    assert ("did you mean 'isizulu-cpu'?" in message) == (name == "isizulu-cpi")


@given(st.text(max_size=30) | st.builds("optim.{}={}".format, st.sampled_from(["lr", "kind", "x"]), st.text()))
def test_whatever_an_override_is_it_is_taken_or_refused_in_one_line(text):
    assert_taken_or_refused(lambda: load_recipe(None, [text]))


keys = st.text(max_size=5) | st.sampled_from(["lr", "kind", "bptt"])
values = st.integers() | st.none() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)


@given(st.dictionaries(keys | st.sampled_from(list(Recipe.model_fields)), values | st.dictionaries(keys, values)))
def test_whatever_settings_are_they_are_taken_or_refused_in_one_line(settings):
    assert_taken_or_refused(lambda: build_recipe(settings))


def test_another_optimizer_brings_its_own_rates():
    changed = load_recipe("isizulu-cpu", ["optim.kind=nt-asgd"])
    assert (changed.optim.lr, changed.optim.max_grad_norm, changed.optim.max_epochs) == (30.0, 0.25, 500)
    assert load_recipe("isizulu-cpu", ["optim.kind=nt-asgd", "optim.lr=20"]).optim.lr == 20.0
    assert load_recipe("isizulu-cpu", ["optim.kind=adamw"]) == load_recipe("isizulu-cpu")
    assert changed.optim.average_share == 0
    averaged = load_recipe("ptb-finetune", ["optim.kind=adamw"]).optim
    assert (averaged.average_at_start, averaged.average_share, averaged.final_lr_ratio) == (False, 0.2, 1.0)


def test_nt_asgd_has_its_own_average():
    assert refusal("optim.kind=nt-asgd", "optim.average_share=0.2").endswith(
        "optim.average_share = 0.2 is for sgd and adamw; nt-asgd averages from its trigger on"
    )
    assert load_recipe(None, ["optim.kind=nt-asgd", "optim.average_share=0"]).optim.average_share == 0


@pytest.mark.parametrize(
    "override", ["model.num_layers=true", 'model.hidden_size="640"', "optim.seed=9223372036854775808"]
)
def test_values_are_not_bent_into_shape(override):
    with pytest.raises(UlimiError, match=override.split("=")[0]):
        load_recipe(None, [override])
    assert load_recipe(None, ["optim.lr=3", "optim.lr_drops=[2, 4]"]).optim.lr_drops == (2, 4)
