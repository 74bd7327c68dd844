"""A run in Hugging Face's transformers: it computes what ulimi computes, without ulimi."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import TINY, refusal, synthetic_lines
from test_release import change_meta
from ulimi.cli import DEFAULT_MODEL
from ulimi.corpus import open_corpus
from ulimi.engine import load_engine, load_model, read_tensors, write_tensors
from ulimi.hub_folder import write_hub_folder
from ulimi.recipe import load_recipe
from ulimi.release import release
from ulimi.run import AWD_LSTM, CARD, ONNX, READ_BACK, SOURCE_CARD, WEIGHTS, Run, open_run
from ulimi.sampling import Sampling
from ulimi.score import score_lines
from ulimi.train import train
from ulimi.words import Ending
from ulimi.writer import TOP_P, Writer, Writing, choose_sampling

KINDS = {
    "tied": (),
    "untied, unigram": ("tokenizer.kind=unigram", "model.tie_weights=false"),
    "deep, char": ("tokenizer.kind=char", "model.num_layers=3"),
    "word": ("tokenizer.kind=word",),
    "mogrifier": ("model.mogrifier_rounds=3", "model.mogrifier_rank=8"),
}

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of itself, and of what it will be


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory, corpus_dir) -> Run:
    """A run of each kind that there is."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(open_corpus(corpus_dir, run_dir / "corpus"), run_dir, load_recipe(None, (*TINY, *KINDS[request.param])))
    return open_run(run_dir)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "given"
    write_hub_folder(run, out)
    return out


@pytest.fixture(scope="module")
def model(folder, transformers):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def tokenizer(folder, transformers):
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_run) -> Path:
    """The folder of one run, for what does not depend on its kind."""
    out = tmp_path_factory.mktemp("hub") / "plain"
    write_hub_folder(tiny_run, out)
    return out


@pytest.fixture(scope="module")
def plain_model(plain, transformers):
    return transformers.AutoModelForCausalLM.from_pretrained(plain, trust_remote_code=True)


def some_ids(model, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def state_of(output):
    """The state among what transformers gives, whatever this version calls it."""
    return next((value for name, value in output.items() if name in ("cache", "past_key_values")), None)


def state_name(model) -> str:
    return sys.modules[type(model).__module__].CACHE


# It computes what ulimi computes


@torch.no_grad()
def test_its_logits_are_those_of_the_run(run, model):
    ids_BT = some_ids(model, 3, 17)
    ours = load_model(run)(ids_BT).logits
    assert torch.allclose(model(input_ids=ids_BT).logits, ours, atol=1e-5)
    assert float(ours.std()) > 0.01


@torch.no_grad()
def test_what_it_reads_in_parts_is_what_it_reads_at_once(model):
    ids_BT = some_ids(model, 2, 11)
    whole = model(input_ids=ids_BT).logits
    state, parts = None, []
    for part in ids_BT.split([5, 1, 1, 4], dim=1):
        output = model(input_ids=part, **{state_name(model): state})
        state = state_of(output)
        parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)
    assert state.get_seq_length() == 11
    assert state_of(model(input_ids=ids_BT, use_cache=False)) is None


def test_its_tokens_are_those_of_the_run_after_eos(run, tokenizer):
    for text in [*synthetic_lines(20, seed=5), "", "<eos>", "caf\u00e9 cafe\u0301", "a  b ", "\u65e5\u672c"]:
        ids = tokenizer(text)["input_ids"]
        assert ids == [run.tokenizer.eos_id, *run.tokenizer.encode(text)]
        if run.tokenizer.is_lossless:
            assert tokenizer.decode(ids, skip_special_tokens=True) == run.tokenizer.decode(ids[1:])
    eos_id = run.tokenizer.eos_id
    assert tokenizer.pad_token_id == tokenizer.bos_token_id == tokenizer.eos_token_id == eos_id
    pair = tokenizer("abantu", "umfundi")["input_ids"]
    assert pair == [eos_id, *run.tokenizer.encode("abantu"), eos_id, *run.tokenizer.encode("umfundi")]
    padded = tokenizer(["abantu bafunda namhlanje kakhulu", "umfundi"], padding=True)["attention_mask"]
    assert padded[0] == [1] * len(padded[0])
    assert padded[1] == sorted(padded[1])
    assert padded[1][0] == 0


@torch.no_grad()
@pytest.mark.parametrize("rows", [
    [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],  # left
    [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]],  # right
    [[0, 1, 1, 1, 1, 0], [1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]],  # whatever, and a row of nothing
])  # fmt: skip
def test_pads_are_not_read(model, rows):
    mask_BT = torch.tensor(rows)
    ids_BT, more_B1 = some_ids(model, 3, 6), some_ids(model, 3, 1, seed=1)
    before = model(input_ids=some_ids(model, 3, 4, seed=2))
    output = model(
        input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True, **{state_name(model): state_of(before)}
    )
    next_logits = model(input_ids=more_B1, **{state_name(model): state_of(output)}).logits[:, 0]
    for row, ids_T in enumerate(ids_BT):
        kept = torch.nonzero(mask_BT[row])[:, 0]
        state = state_of(model(input_ids=some_ids(model, 3, 4, seed=2)[row : row + 1]))
        logits = before.logits[row, -1:]
        if len(kept):
            alone = model(input_ids=ids_T[kept][None], **{state_name(model): state})
            logits, state = torch.cat([logits, alone.logits[0]]), state_of(alone)
        # A pad's place has what was there before it.
        places = mask_BT[row].cumsum(0)
        assert torch.allclose(output.logits[row], logits[places], atol=1e-5)
        after = model(input_ids=more_B1[row : row + 1], **{state_name(model): state}).logits[0, 0]
        assert torch.allclose(next_logits[row], after, atol=1e-5)
    assert torch.equal(output.hidden_states[0][mask_BT.bool()], model.get_input_embeddings()(ids_BT)[mask_BT.bool()])
    assert len(output.hidden_states) == 1 + model.config.num_hidden_layers
    assert torch.allclose(model.lm_head(output.hidden_states[-1]), output.logits, atol=1e-5)
    nothing_yet = mask_BT.cumsum(1) == 0
    assert not output.hidden_states[0][nothing_yet].any()


def generate(model, tokenizer, texts, **how):
    asked = tokenizer(texts, return_tensors="pt", padding=True)
    # Random networks end a text soon; what is written after that is pads.
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **how}
    return model.generate(**asked, **how)[:, asked["input_ids"].size(1) :]


def test_its_surest_text_is_that_of_a_loop_by_hand(run, model, tokenizer):
    network = load_model(run)
    texts = ["Abantu", "Umfundi uya", "Izingane zifunda namhlanje"]
    written = generate(model, tokenizer, texts)
    for text, ids in zip(texts, written.tolist(), strict=True):
        read = torch.tensor([[run.tokenizer.eos_id, *run.tokenizer.encode(text)]])
        state = None
        for id in ids:
            with torch.no_grad():
                logits, state, *_ = network(read, state)
            logits[0, -1, run.tokenizer.eos_id] = -math.inf  # as min_new_tokens has it
            assert int(logits[0, -1].argmax()) == id
            read = torch.tensor([[id]])


@pytest.mark.parametrize("how", [
    {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5}, {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2}, {"num_beams": 2, "no_repeat_ngram_size": 3},
])  # fmt: skip
def test_searches_with_the_state_find_what_they_find_without(model, tokenizer, how):
    texts = ["Abantu", "Izingane zifunda namhlanje"]
    with_state = generate(model, tokenizer, texts, **how)
    assert torch.equal(with_state, generate(model, tokenizer, texts, use_cache=False, **how))


@pytest.mark.parametrize("how", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1, "temperature": 0.7}, {"typical_p": 0.9}])
def test_samples_with_the_state_are_those_without(model, tokenizer, how):
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        how = {"num_return_sequences": 2, "do_sample": True, **how}
        drawn.append(generate(model, tokenizer, ["Abantu", "Izingane zi"], use_cache=use_cache, **how))
    assert torch.equal(*drawn)


def test_a_text_goes_on_from_its_state(model, tokenizer):
    asked = tokenizer("Abantu", return_tensors="pt")
    how = {"do_sample": False, "min_new_tokens": 4}
    whole = model.generate(**asked, **{**how, "max_new_tokens": 8, "min_new_tokens": 8})
    first = model.generate(**asked, **how, max_new_tokens=4, return_dict_in_generate=True)
    state = state_of(first)
    on = model.generate(
        first.sequences, attention_mask=torch.ones_like(first.sequences), **how, max_new_tokens=4,
        **{state_name(model): state},
    )  # fmt: skip
    assert on.tolist() == whole.tolist()


# What transformers expects of a model


def test_assisted_decoding_is_refused(plain_model, transformers):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        plain_model.generate(torch.tensor([[1, 2]]), assistant_model=plain_model, max_new_tokens=3)


@torch.no_grad()
def test_rows_of_a_state_are_taken_and_repeated(plain_model):
    ids_BT = some_ids(plain_model, 3, 5)
    for change, rows in (
        (lambda state: state.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda state: state.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda state: state.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        state = state_of(plain_model(input_ids=ids_BT))
        change(state)
        more_B1 = some_ids(plain_model, len(rows), 1, seed=1)
        given = plain_model(input_ids=more_B1, **{state_name(plain_model): state}).logits
        whole = plain_model(input_ids=torch.cat([ids_BT[rows], more_B1], dim=1)).logits[:, -1:]
        assert torch.allclose(given, whole, atol=1e-5)


@torch.no_grad()
def test_what_it_is_given_must_fit(plain_model, transformers):
    ids_BT = some_ids(plain_model, 2, 5)
    with pytest.raises(ValueError, match="attention_mask has 4 places, fewer than the 5 tokens"):
        plain_model(input_ids=ids_BT, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="there are no tokens to read"):
        plain_model(input_ids=ids_BT[:, :0])
    with pytest.raises(ValueError, match="the state is a DynamicCache; an AWD-LSTM goes on from an AWDLSTMState"):
        plain_model(input_ids=ids_BT, **{state_name(plain_model): transformers.DynamicCache()})


@torch.no_grad()
def test_its_configuration_says_what_it_gives(plain, transformers):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, trust_remote_code=True, output_hidden_states=True, use_cache=False
    )
    output = model(input_ids=some_ids(model, 1, 3))
    assert len(output.hidden_states) == 3
    assert state_of(output) is None
    assert model(input_ids=some_ids(model, 1, 3), output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(input_ids=some_ids(model, 1, 3)), tuple)
    assert {"cache", "past_key_values"} <= set(model.config.keys_to_ignore_at_inference)


@torch.no_grad()
def test_its_loss_is_the_mean_cross_entropy_of_what_is_counted(plain_model):
    ids_BT = some_ids(plain_model, 2, 9)
    labels_BT = ids_BT.clone()
    labels_BT[0, :4] = -100
    output = plain_model(input_ids=ids_BT, labels=labels_BT)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100)
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)
    # As Trainer asks where gradients are added up over batches.
    shared = plain_model(input_ids=ids_BT, labels=labels_BT, num_items_in_batch=100)
    assert float(shared.loss) == pytest.approx(float(expected) * 13 / 100, rel=1e-5)


@torch.no_grad()
def test_it_gives_only_what_is_asked_for(plain_model):
    ids_BT = some_ids(plain_model, 2, 5)
    full = plain_model(input_ids=ids_BT, output_hidden_states=True)
    last = plain_model(input_ids=ids_BT, logits_to_keep=2)
    assert torch.equal(last.logits, full.logits[:, -2:])
    some = plain_model(input_ids=ids_BT, logits_to_keep=torch.tensor([0, 3]))
    assert torch.equal(some.logits, full.logits[:, [0, 3]])
    assert torch.equal(plain_model(input_ids=ids_BT, return_dict=False)[0], full.logits)
    assert torch.equal(plain_model.model(input_ids=ids_BT, return_dict=False)[0], full.hidden_states[-1])
    assert last.hidden_states is None
    assert torch.allclose(plain_model.lm_head(full.hidden_states[-1]), full.logits)
    embedded = plain_model(inputs_embeds=plain_model.get_input_embeddings()(ids_BT))
    assert torch.allclose(embedded.logits, full.logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        plain_model()


def test_it_is_written_and_read_again(plain_model, transformers, tmp_path):
    plain_model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    ids_BT = some_ids(plain_model, 2, 5)
    assert torch.equal(again(input_ids=ids_BT).logits, plain_model(input_ids=ids_BT).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.generation_config.top_p == TOP_P


def test_a_new_one_begins_as_ours_do(plain, transformers):
    config = transformers.AutoConfig.from_pretrained(plain, trust_remote_code=True)
    config.mogrifier_rounds, config.vocab_size, config.tie_word_embeddings = 2, 1000, False
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    bounds = {name: float(weight.detach().abs().max()) for name, weight in model.named_parameters()}
    assert bounds.pop("lm_head.bias") == 0
    hidden = config.hidden_size
    for name, bound in bounds.items():
        limit = 0.1 if "embed" in name or "head" in name else hidden**-0.5
        if ".rounds." in name:
            limit = model.get_parameter(name).size(1) ** -0.5
        assert 0.8 * limit < bound <= limit, name


def test_the_layers_alone_give_features(plain, plain_model, transformers, capfd):
    features = transformers.AutoModel.from_pretrained(plain, trust_remote_code=True)
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    ids_BT = some_ids(plain_model, 2, 5)
    out = features(input_ids=ids_BT).last_hidden_state
    assert torch.allclose(plain_model.lm_head(out), plain_model(input_ids=ids_BT).logits)


def test_who_trains_it_is_told_that_it_drops_nothing(plain_model, monkeypatch):
    said = []
    module = sys.modules[type(plain_model).__module__]
    monkeypatch.setattr(module.logger, "warning_once", said.append)
    plain_model(input_ids=some_ids(plain_model, 1, 3))
    assert not said
    plain_model.train()
    try:
        plain_model(input_ids=some_ids(plain_model, 1, 3), labels=some_ids(plain_model, 1, 3)).loss.backward()
    finally:
        plain_model.eval()
    assert ["no dropouts" in text and "ulimi train --init-from" in text for text in said] == [True]
    assert all(weight.grad is not None for weight in plain_model.parameters())
    plain_model.zero_grad()


def test_half_precision_is_near(plain, plain_model, transformers):
    half = transformers.AutoModelForCausalLM.from_pretrained(plain, trust_remote_code=True, dtype=torch.bfloat16)
    ids_BT = some_ids(plain_model, 2, 5)
    assert half(input_ids=ids_BT).logits.dtype == torch.bfloat16
    assert torch.allclose(half(input_ids=ids_BT).logits.float(), plain_model(input_ids=ids_BT).logits, atol=0.05)


def test_a_pipeline_writes_as_ulimi_does_where_nothing_is_asked(plain, plain_model, transformers, tiny_run):
    settings = plain_model.generation_config
    ours = choose_sampling(load_engine(tiny_run))
    assert settings.do_sample
    assert settings.max_new_tokens == Ending().max_tokens
    assert (settings.top_p, settings.temperature, settings.top_k) == (ours.top_p, ours.temperature, ours.top_k)
    write = transformers.pipeline("text-generation", str(plain), trust_remote_code=True)
    for written in write(["Abantu", "Izingane"], max_new_tokens=5, num_return_sequences=2):
        assert len(written) == 2
        assert {row["generated_text"][:6] for row in written} in ({"Abantu"}, {"Izinga"})


def test_without_ulimi_it_says_the_same(tiny_run, plain, plain_model, tmp_path):
    """In a process of its own, where there is no ulimi, and from another place."""
    ids_BT = some_ids(plain_model, 2, 7)
    program = f"""
import json, sys
sys.modules["ulimi"] = sys.modules["torchvision"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(plain)!r}, trust_remote_code=True)
print(json.dumps(model(input_ids=torch.tensor({ids_BT.tolist()})).logits.tolist()))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8",
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), load_model(tiny_run)(ids_BT).logits, atol=1e-5)


# It is a run, too


def test_ulimi_uses_the_folder_as_it_uses_the_run(run, folder, works):
    given = open_run(folder)
    assert given.kind == AWD_LSTM
    assert given.config == run.config
    assert given.recipe == run.recipe
    assert given.metrics() == run.metrics()
    assert given.tokenizer.to_str() == run.tokenizer.to_str()
    lines = synthetic_lines(5, seed=3)
    for kind in ("onnx", "torch"):
        theirs = [s.nats for _, s in score_lines(load_engine(given, kind=kind), given.tokenizer, lines)]
        assert theirs == [s.nats for _, s in score_lines(load_engine(run, kind=kind), run.tokenizer, lines)]
    writing = Writing(sampling=Sampling(temperature=0), ending=Ending(max_tokens=20))
    texts = [Writer(load_engine(made), made.tokenizer, writing).write("Abantu")[0].text for made in (given, run)]
    assert texts[0] == texts[1]
    assert works("info", folder).out


def test_a_release_comes_with_the_weights_that_its_graph_tells(tiny_run, tmp_path, transformers):
    card = tmp_path / "card.md"
    card.write_text("# Imodeli\n\nCC BY-SA 4.0\n", encoding="utf-8")
    release(tiny_run, tmp_path / "released", card)
    released = open_run(tmp_path / "released")
    write_hub_folder(released, tmp_path / "given")
    given = open_run(tmp_path / "given")
    # To ulimi it is what the release is: its graph, which nothing rounds once more.
    assert not given.has_weights
    assert given.weights_path == given.dir / ONNX
    assert given.model_sha256 == released.model_sha256
    assert {**given.meta, READ_BACK: None} == {**released.meta, READ_BACK: None}
    assert (given.dir / ONNX).read_bytes() == (released.dir / ONNX).read_bytes()
    assert "has no float weights" in refusal(lambda: given.need_weights("ulimi export"))
    assert (given.dir / WEIGHTS).stat().st_mode & 0o777 == 0o644
    lines = synthetic_lines(5, seed=3)
    theirs = [s.nats for _, s in score_lines(load_engine(given, kind="onnx"), given.tokenizer, lines)]
    assert theirs == [s.nats for _, s in score_lines(load_engine(released), released.tokenizer, lines)]
    model = transformers.AutoModelForCausalLM.from_pretrained(given.dir, trust_remote_code=True)
    ids_BT = some_ids(model, 2, 9)
    assert torch.allclose(model(input_ids=ids_BT).logits, load_model(tiny_run)(ids_BT).logits, atol=0.1)
    text = (given.dir / "README.md").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in text
    assert "`model.safetensors` holds what `model.onnx` tells" in text
    assert (given.dir / CARD).read_bytes() == card.read_bytes()
    write_hub_folder(given, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (given.dir / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / "meta.json").read_bytes() == (given.dir / "meta.json").read_bytes()


def test_the_shipped_model_is_given_with_its_licence(transformers, tmp_path, works):
    assert "MB; try: AutoModelForCausalLM" in works("hub", "--out", tmp_path / "isizulu").out
    text = (tmp_path / "isizulu" / "README.md").read_text(encoding="utf-8")
    head = text.split("---\n")[1]
    assert "license: cc-by-sa-4.0\n" in head
    assert "language: zu\n" in head
    assert "library_name: transformers\n" in head
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "isizulu", trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "isizulu", trust_remote_code=True)
    shipped = open_run(DEFAULT_MODEL)
    lines = ["Ngiyabonga kakhulu.", "Abantwana bayafunda esikoleni."]
    for line, (_, score) in zip(lines, score_lines(load_engine(shipped), shipped.tokenizer, lines), strict=True):
        ids = torch.tensor([[*tokenizer(line)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            nats = float(model(input_ids=ids, labels=ids).loss) * (ids.numel() - 1)
        assert nats == pytest.approx(score.nats, rel=0.01)


# The folder


def test_what_is_in_it(plain, tiny_run):
    assert {path.name for path in plain.iterdir()} == {
        "config.json", "generation_config.json", "configuration_awd_lstm.py", "modeling_awd_lstm.py", "LICENSE-CODE",
        "README.md",
        WEIGHTS, ONNX, "tokenizer.json", "tokenizer_config.json", "recipe.toml", "metrics.jsonl", "meta.json",
        "curve.png",
    }  # fmt: skip
    for name in (WEIGHTS, ONNX):
        assert (plain / name).read_bytes() == (tiny_run.dir / name).read_bytes()
    assert open_run(plain).has_weights
    config = json.loads((plain / "config.json").read_text())
    assert config["architectures"] == ["AWDLSTMForCausalLM"]
    assert config["dtype"] == "float32"
    assert "Apache License" in (plain / "LICENSE-CODE").read_text()
    text = (plain / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    assert "\n# plain\n" in text
    assert "\n- ulimi\n" in text
    head = text.split("---\n")[1]
    assert "license" not in head
    assert "pipeline_tag: text-generation\n" in head
    assert "library_name: transformers\n" in head
    assert "8 bits" not in text
    assert 'pipeline("text-generation", "USER/plain", trust_remote_code=True)' in text
    assert str(tiny_run.dir) not in text


def test_licence_and_languages_stand_at_the_cards_head(run_dir, tmp_path, works):
    out = tmp_path / "given"
    works("hub", "-m", run_dir, "--out", out, "--license", "cc-by-sa-4.0", "--language", "zu", "--language", "xh")
    head = (out / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert "license: cc-by-sa-4.0\n" in head
    assert "language:\n- zu\n- xh\n" in head
    # Whoever goes on from it learns so.
    assert b"license: cc-by-sa-4.0\n" in open_run(out).source_card()
    works("hub", "-m", out, "--out", tmp_path / "again")
    again = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert again.split("---\n")[1] == head
    assert again.count("## With transformers") == 1


def test_the_licence_of_what_it_started_from_is_its_own(run_dir, tmp_path):
    (run_dir / SOURCE_CARD).write_text("---\nlicense: cc-by-sa-4.0\n---\n# Imodeli\n", encoding="utf-8")
    write_hub_folder(open_run(run_dir), tmp_path / "given")
    head, text = (tmp_path / "given" / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1:]
    assert "license: cc-by-sa-4.0\n" in head
    assert SOURCE_CARD in text
    assert (tmp_path / "given" / SOURCE_CARD).is_file()


def test_a_cards_own_head_stays(run_dir, tmp_path):
    head = "\ufeff\n---\nlicense: mit\ntags:\n- zulu\n- lstm\n---\n# Imodeli\n"
    (run_dir / CARD).write_text(head, encoding="utf-8")
    write_hub_folder(open_run(run_dir), tmp_path / "given")
    text = (tmp_path / "given" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlicense: mit\ntags:\n- zulu\n- lstm\n- awd-lstm\n- ulimi\n")
    assert text.count("---\n") == 2


@pytest.mark.parametrize("card", [
    b"---\nlicense: [a\n---\n# x\n", b"---\n- a\n---\n# x\n", b"---\nmodel-index: 3\n---\n# x\n",
    b"---\n1: 2\n---\n# x\n", b"---\na: \x07\n---\n# x\n", b"---\na: !b c\n---\n# x\n", b"---\nlicense: mit\n",
    b"--- \nlicense: mit\n--- \n# x\n",
    b"# caf\xe9\n",
])  # fmt: skip
def test_a_card_that_cannot_be_read_is_refused(run_dir, tmp_path, refused, card):
    (run_dir / CARD).write_bytes(card)
    said = refused("hub", "-m", run_dir, "--out", tmp_path / "given")
    assert CARD in said
    assert "head" in said or "cannot be read" in said
    assert not (tmp_path / "given").exists()


def test_places_become_names(run_dir, tmp_path):
    change_meta(run_dir, init_from="/home/someone/runs/first")
    write_hub_folder(open_run(run_dir), tmp_path / "given")
    (tmp_path / "named").symlink_to(run_dir)
    write_hub_folder(open_run(run_dir), tmp_path / "a{b} c")
    assert '"USER/a{b} c"' in (tmp_path / "a{b} c" / "README.md").read_text(encoding="utf-8")
    for path in (tmp_path / "given").iterdir():
        if path.name not in (WEIGHTS, ONNX):
            assert b"/home/" not in path.read_bytes(), path.name
            assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert open_run(tmp_path / "given").meta["init_from"] == "first"


@pytest.mark.parametrize("name", [SOURCE_CARD, CARD, "recipe.toml"])
def test_a_place_that_is_left_is_refused(run_dir, tmp_path, name):
    old = (run_dir / name).read_text(encoding="utf-8") if (run_dir / name).is_file() else ""
    (run_dir / name).write_text(f"{old}# see /home/someone/card.md\n", encoding="utf-8")
    said = refusal(lambda: write_hub_folder(open_run(run_dir), tmp_path / "given"))
    assert "names a place on this machine, '/home/someone/card.md'" in said
    assert not (tmp_path / "given").exists()


@pytest.mark.parametrize(("name", "value"), [
    ("--license", "No Such Licence!"), ("--license", ""), ("--license", "mit\nx"), ("--language", ""),
    ("--language", "isiZulu yes"),
])  # fmt: skip
def test_what_the_hub_would_not_know_is_refused(tiny_run, tmp_path, refused, name, value):
    said = refused("hub", "-m", tiny_run.dir, "--out", tmp_path / "given", name, value)
    assert f"{name} {value!r}: allowed: " in said
    assert not (tmp_path / "given").exists()


def test_weights_and_graph_must_be_of_one_another(run_dir, tmp_path, refused):
    weights, graph = (run_dir / WEIGHTS).read_bytes(), (run_dir / ONNX).read_bytes()
    config = json.loads((run_dir / "config.json").read_text())
    for name, data in (
        (WEIGHTS, weights[:1000]), (WEIGHTS, b""), (ONNX, graph[:1000]),
        ("config.json", json.dumps({**config, AWD_LSTM: {**config[AWD_LSTM], "vocab_size": 77}}).encode()),
        ("config.json", json.dumps({**config, AWD_LSTM: {"vocab_size": 320}}).encode()),
    ):  # fmt: skip
        good = (run_dir / name).read_bytes()
        (run_dir / name).write_bytes(data)
        refused("hub", "-m", run_dir, "--out", tmp_path / "given")
        assert not (tmp_path / "given").exists()
        (run_dir / name).write_bytes(good)
    tensors = {name: tensor + 1 for name, tensor in read_tensors(run_dir / WEIGHTS).items()}
    write_tensors(tensors, run_dir / WEIGHTS, {"format": "pt"})
    assert "made of other weights" in refused("hub", "-m", run_dir, "--out", tmp_path / "given")
    (run_dir / ONNX).unlink()
    (run_dir / "curve.png").unlink()
    write_hub_folder(open_run(run_dir), tmp_path / "given")
    assert "curve.png" not in (tmp_path / "given" / "README.md").read_text(encoding="utf-8")


def test_what_cannot_be_given_is_refused(run_dir, tmp_path, corpus_dir, refused, works):
    out = tmp_path / "given"
    works("ngram", corpus_dir, "--out", tmp_path / "ngram")
    assert "ulimi hub: " in refused("hub", "-m", tmp_path / "ngram", "--out", out)
    assert "no run folder" in refused("hub", "-m", tmp_path / "none", "--out", out)
    assert "is there already" in refused("hub", "-m", run_dir, "--out", tmp_path)
    change_meta(run_dir, training=None)
    assert "its training is not finished" in refused("hub", "-m", run_dir, "--out", out)
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**config, "entmax_alpha": 1.5}))
    said = refused("hub", "-m", run_dir, "--out", out)
    assert "its loss is entmax, which transformers does not know; allowed: cross entropy" in said
    assert not out.exists()
