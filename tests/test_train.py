"""The training loop: exact resume, which weights are kept, averaging, finetuning, and runs that fail."""

import hashlib
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import reference
from conftest import TINY, refusal, synthetic_lines
from ulimi.corpus import open_corpus
from ulimi.engine import choose_device, load_model
from ulimi.recipe import load_recipe
from ulimi.run import CHECKPOINT, WEIGHTS, open_run
from ulimi.train import Interrupted, Silent, Trainer, train, validation_nats

KINDS = {
    "sgd": ("optim.kind=sgd", "optim.lr=8", "optim.lr_drops=[1]", "optim.max_epochs=3"),
    "nt-asgd": ("optim.kind=nt-asgd", "optim.lr=8", "optim.lr_drops=[1]", "optim.max_epochs=4"),
    "adamw": ("optim.kind=adamw", "optim.warmup_steps=40", "optim.max_epochs=3", "optim.average_share=0"),
    "averaged adamw": ("optim.kind=adamw", "optim.warmup_steps=40", "optim.max_epochs=3", "optim.average_share=0.3"),
    "growing dropouts": ("optim.warmup_steps=40", "optim.max_epochs=3", "optim.dropout_warmup_epochs=2"),
}


def make_corpus(folder, lines):
    (folder / "train.txt").write_text("\n".join(lines[:-12]) + "\n")
    (folder / "valid.txt").write_text("\n".join(lines[-12:]) + "\n")
    return open_corpus(folder, folder)


NO_DROPOUT = tuple(f"model.{name}_dropout=0" for name in ("embedding", "input", "hidden", "output", "weight"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """So little text that an epoch has about 30 steps."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), synthetic_lines(72, seed=4))


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory):
    """Other text, with letters that the first one lacks."""
    lines = [line.replace("a", "x").replace("th", "qw") for line in synthetic_lines(60, seed=5)]
    return make_corpus(tmp_path_factory.mktemp("other"), lines)


@pytest.fixture(scope="module")
def source(corpus, tmp_path_factory):
    """A finished run to finetune from; no test may write into its folder."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    train(corpus, run_dir, tiny())
    return open_run(run_dir)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out what takes longer than the training itself."""
    monkeypatch.setattr("ulimi.train.plot_curve", lambda rows, path: path.touch())
    monkeypatch.setattr("ulimi.provenance._commit", lambda: None)


@pytest.fixture
def trigger_after_two_epochs(monkeypatch):
    monkeypatch.setattr("ulimi.train.non_monotonic", lambda history, newest, n: len(history) == 1)


class Recorder(Silent):
    """Keep all that a run reports."""

    def __init__(self):
        self.notes, self.rows = [], []

    def note(self, text):
        self.notes.append(text)

    def epoch(self, row):
        self.rows.append(row)


def tiny(*overrides):
    return load_recipe(None, [*TINY, *overrides])


def make_trainer(corpus, run_dir, *overrides, **options):
    defaults = {"init_from": None, "new_tokenizer": False, "resume": False, "reporter": Silent()}
    return Trainer(corpus, run_dir, tiny(*overrides), device="cpu", cache_dir=None, **{**defaults, **options})


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def stop_after(num_steps):
    steps = itertools.count(1)
    return lambda: next(steps) == num_steps


def script_validation(monkeypatch, losses):
    """Let the validation losses, in nats per token, be these."""
    left = iter(losses)
    monkeypatch.setattr("ulimi.train.validation_nats", lambda model, ids, *_, **__: next(left) * len(ids))


def read_checkpoint(run_dir):
    """Give the tensors and the progress of a checkpoint."""
    with safe_open(run_dir / CHECKPOINT, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["progress"])  # noqa: SIM118


def raw_weights(run_dir):
    tensors, _ = read_checkpoint(run_dir)
    return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def timeless_metrics(run_dir):
    rows = open_run(run_dir).metrics()
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_run(one_dir, other_dir):
    """Compare all that a run leaves, but for the time that it took."""
    assert timeless_metrics(one_dir) == timeless_metrics(other_dir)
    assert (one_dir / WEIGHTS).read_bytes() == (other_dir / WEIGHTS).read_bytes()
    one, one_progress = read_checkpoint(one_dir)
    other, other_progress = read_checkpoint(other_dir)
    assert_equal_weights(one, other)
    for progress in (one_progress, other_progress):
        del progress["seconds"], progress["metrics_bytes"]
    assert one_progress == other_progress
    assert open_run(one_dir).meta["scores"] == open_run(other_dir).meta["scores"]
    for name in ("config.json", "recipe.toml", "tokenizer.json"):
        assert (one_dir / name).read_bytes() == (other_dir / name).read_bytes()


def contents(folder: Path):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


# Resume


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("trigger_after_two_epochs")
def test_a_run_stopped_anywhere_and_resumed_is_the_uninterrupted_run(tmp_path, corpus, kind):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    train(corpus, whole, tiny(*KINDS[kind]))
    ends = [row["step"] for row in open_run(whole).metrics()]
    assert open_run(whole).metrics()[-1]["averaging"] is (kind not in ("sgd", "adamw"))
    # In the middle of an epoch, at the last step of one, at the first step of one, twice in the (averaged) last one,
    # and at the very last step, when all that is left is to validate.
    stops = [13, ends[0], ends[0] + 1, ends[-2] + 6, ends[-2] + 17, ends[-1]]
    before = 0
    for stop in stops:
        with pytest.raises(Interrupted):
            train(corpus, pieces, tiny(*KINDS[kind]), resume=before > 0, should_stop=stop_after(stop - before))
        assert read_checkpoint(pieces)[1]["step"] == stop
        before = stop
    train(corpus, pieces, tiny(*KINDS[kind]), resume=True)
    assert_same_run(whole, pieces)


def test_the_windows_after_a_resume_are_those_that_were_to_come(tmp_path, corpus):
    def lengths(resume, stop):
        trainer = make_trainer(corpus, tmp_path, "optim.max_epochs=1", resume=resume)
        ends = [trainer.progress.position]

        def note_end():
            ends.append(trainer.progress.position)
            return len(ends) > stop

        if stop == math.inf:
            trainer.run(5.0, False, note_end)
        else:
            with pytest.raises(Interrupted):
                trainer.run(5.0, False, note_end)
        return np.diff(ends).tolist(), trainer

    first, trainer = lengths(False, 12)
    rest, _ = lengths(True, math.inf)
    rng = np.random.default_rng(trainer.recipe.optim.seed)
    drawn = [reference.window_length(rng.random(), rng.standard_normal(), 10) for _ in range(len(first + rest))]
    assert len(first) == 12
    assert len(set(drawn)) > 3  # else the order could not show
    # The base length is drawn before the normal, so the two streams of numbers agree only if all goes as in sec. 4.1.
    assert (first + rest)[:-2] == drawn[:-2]
    assert sum(first + rest) == trainer.streams_BS.shape[1] - 1


def test_resume_drops_the_rows_that_came_after_the_checkpoint(tmp_path, corpus, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(corpus, whole, tiny("optim.max_epochs=3"))

    class Killed(BaseException):
        pass

    save = Trainer.save_checkpoint

    def killed_before_the_second_epoch_is_kept(self):
        if self.progress.epoch == 2:
            raise Killed
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", killed_before_the_second_epoch_is_kept)
        with pytest.raises(Killed):
            train(corpus, killed, tiny("optim.max_epochs=3"))
    assert [row["epoch"] for row in open_run(killed).metrics()] == [1, 2]
    assert read_checkpoint(killed)[1]["epoch"] == 1
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "valid_n')
    assert [row["epoch"] for row in open_run(killed).metrics()] == [1, 2]

    train(corpus, killed, tiny("optim.max_epochs=3"), resume=True)
    assert [row["epoch"] for row in open_run(killed).metrics()] == [1, 2, 3]
    assert_same_run(whole, killed)


def test_a_checkpoint_inside_an_epoch_is_written_when_it_is_due(tmp_path, corpus):
    class Killed(BaseException):
        pass

    steps = itertools.count(1)

    def killed_at_step_7():
        if next(steps) == 7:
            raise Killed
        return False

    with pytest.raises(Killed):
        train(corpus, tmp_path, tiny(), checkpoint_minutes=0.0, should_stop=killed_at_step_7)
    assert read_checkpoint(tmp_path)[1]["step"] == 6


def test_the_end_of_an_epoch_is_written_when_some_time_has_gone_by(tmp_path, corpus, monkeypatch):
    """Quick epochs: what is not written yet, best weights too, is made again after a kill, and written at the end."""

    class Killed(BaseException):
        pass

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(corpus, whole, tiny("optim.max_epochs=4"))
    monkeypatch.setattr("ulimi.train.SECONDS_BETWEEN_SAVES", 3600.0)
    rows = itertools.count(1)

    class KilledInEpochThree(Silent):
        def epoch(self, row):
            if next(rows) == 3:
                raise Killed

    with pytest.raises(Killed):
        train(corpus, killed, tiny("optim.max_epochs=4"), reporter=KilledInEpochThree())
    assert read_checkpoint(killed)[1]["epoch"] == 0
    assert not (killed / WEIGHTS).exists()
    train(corpus, killed, tiny("optim.max_epochs=4"), resume=True)
    assert [row["epoch"] for row in open_run(killed).metrics()] == [1, 2, 3, 4]
    assert_same_run(whole, killed)


def test_half_precision_trains_on_a_cpu(tmp_path, corpus):
    train(corpus, tmp_path / "exact", tiny("optim.max_epochs=6"))
    train(corpus, tmp_path / "half", tiny("optim.max_epochs=6"), precision="bf16")
    exact, half = ([row["valid_nll"] for row in open_run(tmp_path / name).metrics()] for name in ("exact", "half"))
    assert half != exact
    assert half == pytest.approx(exact, rel=0.02)
    assert open_run(tmp_path / "half").meta["machine"]["precision"] == "bf16"


def test_a_resumed_run_goes_on_in_its_precision(tmp_path, corpus):
    train(corpus, tmp_path / "whole", tiny(), precision="bf16")
    steps = itertools.count()
    with pytest.raises(Interrupted):
        train(corpus, tmp_path / "run", tiny(), precision="bf16", should_stop=lambda: next(steps) == 5)
    train(corpus, tmp_path / "run", tiny(), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_processor_that_knows_bfloat16_takes_it_by_itself(tmp_path, corpus, monkeypatch):
    train(corpus, tmp_path / "named", tiny(), precision="bf16")
    monkeypatch.setattr("ulimi.start.has_bfloat16", lambda: True)
    train(corpus, tmp_path / "auto", tiny())
    assert_same_run(tmp_path / "named", tmp_path / "auto")
    assert open_run(tmp_path / "auto").meta["machine"]["precision"] == "bf16"


@pytest.mark.parametrize("failing", ["safetensors.torch.save_file", "ulimi.train.plot_curve", "ulimi.train.json.dumps"])
def test_a_write_that_fails_leaves_the_last_good_checkpoint(tmp_path, corpus, monkeypatch, failing):
    whole = tmp_path / "whole"
    train(corpus, whole, tiny())
    run_dir = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(corpus, run_dir, tiny(), should_stop=stop_after(15))
    before = (run_dir / CHECKPOINT).read_bytes()

    def fail(*args, **kwargs):
        for path in args:
            if isinstance(path, Path):
                path.write_bytes(b"half of a fi")
        raise OSError("no space left")

    should_stop = stop_after(5) if failing == "safetensors.torch.save_file" else bool
    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match="no space left"):
            train(corpus, run_dir, tiny(), resume=True, should_stop=should_stop)
    if failing != "ulimi.train.plot_curve":
        assert (run_dir / CHECKPOINT).read_bytes() == before
    assert not [path for path in run_dir.rglob("*") if path.name.endswith(".tmp")]
    train(corpus, run_dir, tiny(), resume=True)
    assert_same_run(whole, run_dir)


@pytest.mark.parametrize("constant", [("optim.kind=sgd", "optim.lr=8"), ("optim.kind=adamw",)])
def test_a_resumed_run_may_become_longer_and_its_recipe_says_so(tmp_path, corpus, constant):
    train(corpus, tmp_path / "whole", tiny(*constant, "optim.max_epochs=2", "optim.patience=9"))
    train(corpus, tmp_path / "longer", tiny(*constant, "optim.max_epochs=1"))
    train(corpus, tmp_path / "longer", tiny(*constant, "optim.max_epochs=2", "optim.patience=9"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "longer")


def test_a_run_without_an_average_does_not_get_one_on_the_way(tmp_path, corpus):
    train(corpus, tmp_path, tiny("optim.max_epochs=1", "optim.average_share=0"))
    averaged = tiny("optim.max_epochs=2", "optim.average_share=0.3")
    assert "optim.average_share" in refusal(lambda: train(corpus, tmp_path, averaged, resume=True))
    # As of a version that had no such setting, and now has a default for it.
    (tmp_path / "recipe.toml").write_text(averaged.to_toml())
    assert "it holds no average" in refusal(lambda: train(corpus, tmp_path, averaged, resume=True))


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path, corpus):
    score = train(corpus, tmp_path, tiny("optim.max_epochs=1"))
    before = contents(tmp_path)
    recorder = Recorder()
    assert train(corpus, tmp_path, tiny("optim.max_epochs=1"), resume=True, reporter=recorder) == score
    assert contents(tmp_path) == before
    assert recorder.notes[-2] == "finished, 1 epoch done; a larger optim.max_epochs or optim.patience lets it go on"


def test_a_run_cannot_be_made_shorter_than_it_is(tmp_path, corpus):
    train(corpus, tmp_path, tiny("optim.max_epochs=2"))
    before = contents(tmp_path)
    said = refusal(lambda: train(corpus, tmp_path, tiny("optim.max_epochs=1"), resume=True))
    assert "optim.max_epochs is 1; the run in" in said
    assert "has 2 epochs: allowed: 2 or more" in said
    assert contents(tmp_path) == before


def test_the_seed_decides_the_run(tmp_path, corpus):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        train(corpus, tmp_path / name, tiny("optim.max_epochs=1", f"optim.seed={seed}"))
    assert_same_run(tmp_path / "one", tmp_path / "same")
    assert timeless_metrics(tmp_path / "one") != timeless_metrics(tmp_path / "other")


def test_the_global_random_state_has_no_say(tmp_path, corpus):
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        train(corpus, tmp_path / str(seed), tiny("optim.max_epochs=1"))
    assert_same_run(tmp_path / "1", tmp_path / "2")


# Which weights are kept


def test_the_weights_kept_are_those_of_the_lowest_validation_loss(tmp_path, corpus, monkeypatch):
    script_validation(monkeypatch, [5.0, 4.0, 4.5, 3.9, 3.9, 7.0])
    seen = []

    class Keeper(Recorder):
        def epoch(self, row):
            super().epoch(row)
            seen.append(weights_of(trainer.model))

    keeper = Keeper()
    trainer = make_trainer(corpus, tmp_path, "optim.max_epochs=6", "optim.average_share=0", reporter=keeper)
    trainer.run(5.0, False, bool)
    assert [row["best"] for row in keeper.rows] == [True, True, False, True, False, False]
    assert_equal_weights(load_file(tmp_path / WEIGHTS), seen[3])
    assert open_run(tmp_path).meta["training"]["best_epoch"] == 4
    assert not torch.equal(seen[3]["lm_head.bias"], seen[4]["lm_head.bias"])


def test_dropouts_grow_from_none_to_what_the_recipe_says(tmp_path, corpus):
    names = ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout")
    overrides = [
        f"model.{name}={p}" for name, p in zip((*names, "weight_dropout"), (0.1, 0.2, 0.3, 0.4, 0.5), strict=True)
    ]
    seen = []

    class Keeper(Recorder):
        def epoch(self, row):
            super().epoch(row)
            model = trainer.model
            seen.append([*(getattr(model, name) for name in names), *{layer.weight_dropout for layer in model.layers}])

    trainer = make_trainer(
        corpus, tmp_path, *overrides, "optim.max_epochs=4", "optim.dropout_warmup_epochs=2", reporter=Keeper()
    )
    trainer.run(5.0, False, bool)
    full = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert seen == [[0.0] * 5, [p / 2 for p in full], full, full]
    assert open_run(tmp_path).config["input_dropout"] == 0.2


def test_the_first_epoch_of_growing_dropouts_is_one_without_any(tmp_path, corpus):
    train(corpus, tmp_path / "growing", tiny("optim.dropout_warmup_epochs=1", "optim.max_epochs=1"))
    train(corpus, tmp_path / "without", tiny(*NO_DROPOUT, "optim.max_epochs=1"))
    assert_equal_weights(load_file(tmp_path / "growing" / WEIGHTS), load_file(tmp_path / "without" / WEIGHTS))


@pytest.mark.usefixtures("trigger_after_two_epochs")
def test_the_weights_kept_have_the_validation_loss_that_is_reported(tmp_path, corpus):
    score = train(corpus, tmp_path, tiny(*KINDS["nt-asgd"]))
    run = open_run(tmp_path)
    rows = run.metrics()
    best = min(rows, key=lambda row: row["valid_nll"])
    assert best["averaging"]  # the interesting case: raw and kept weights differ
    assert run.meta["training"]["best_epoch"] == best["epoch"]

    lines = corpus.valid_path.read_text().splitlines()
    ids = np.array([token for line in run.tokenizer.encode_lines(lines) for token in line])
    model = load_model(run)
    batch_size = tiny().data.eval_batch_size
    assert validation_nats(model, ids, batch_size, run.tokenizer.eos_id) / len(ids) == best["valid_nll"]
    # The final score reads one stream, state carried; the text is short, so the two differ.
    in_one_stream = validation_nats(model, ids, 1, run.tokenizer.eos_id)
    assert score["nats"] == pytest.approx(in_one_stream, rel=1e-5)
    assert score["num_tokens"] == len(ids)
    assert score["bits_per_char"] == pytest.approx(
        in_one_stream / math.log(2) / len(corpus.valid_path.read_text()), rel=1e-5
    )
    assert best["valid_bits_per_char"] == pytest.approx(
        best["valid_nll"] * len(ids) / math.log(2) / len(corpus.valid_path.read_text())
    )
    assert best["valid_perplexity"] == pytest.approx(math.exp(best["valid_nll"]))


def test_training_is_what_the_equations_say(tmp_path, corpus):
    """Without dropout plain `nn.LSTM`s, AR, TAR, clipping, decay and lr x T / bptt in float64 give the same weights."""
    overrides = (*NO_DROPOUT, "optim.kind=sgd", "optim.lr=2", "optim.weight_decay=1e-3", "optim.max_grad_norm=0.24",
                 "loss.ar_alpha=30", "loss.tar_beta=20")  # fmt: skip
    trainer = make_trainer(corpus, tmp_path, *overrides)
    weights = {name: weight.double().numpy() for name, weight in weights_of(trainer.model).items()}
    ends = [(0, 0)]

    def note_end():
        ends.append((trainer.progress.epoch, trainer.progress.position))
        return False

    trainer.run(5.0, False, note_end)

    streams = torch.from_numpy(trainer.streams_BS.astype(np.int64))
    norms, state = [], [None, None]
    for (epoch_before, start), (epoch, end) in itertools.pairwise(ends):
        if epoch != epoch_before:
            start, state = 0, [None, None]  # each epoch begins with a zero state
        leaves = {name: torch.tensor(weight, requires_grad=True) for name, weight in weights.items()}
        x = leaves["model.embed_tokens.weight"][streams[:, start:end]]
        for i in range(2):
            lstm = {k.rpartition(".")[2]: w for k, w in leaves.items() if k.startswith(f"model.layers.{i}.")}
            module = torch.nn.LSTM(lstm["weight_ih_l0"].shape[1], lstm["weight_hh_l0"].shape[1], batch_first=True)
            x, (h, c) = torch.func.functional_call(module.double(), lstm, (x, state[i]))
            state[i] = (h.detach(), c.detach())
        logits = x @ leaves["model.embed_tokens.weight"].T + leaves["lm_head.bias"]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), streams[:, start + 1 : end + 1].flatten())
        loss = loss + 30 * (x**2).mean() + 20 * ((x[:, 1:] - x[:, :-1]) ** 2).mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norms.append(reference.clip_by_global_norm(gradients, 0.24)[1])
        weights = reference.sgd_step(weights, gradients, 2 * (end - start) / 10, 1e-3, 0.24)
    assert min(norms) < 0.24 < max(norms)
    for name, weight in raw_weights(tmp_path).items():
        np.testing.assert_allclose(weight.numpy(), weights[name], rtol=0, atol=2e-5, err_msg=name)
    assert np.abs(weights["lm_head.bias"]).max() > 0.1


def test_the_training_loss_is_the_cross_entropy_alone(tmp_path, corpus):
    """AR and TAR enter the gradient, never a figure: without dropout and steps, it is the initial weights' loss."""
    overrides = ("optim.kind=sgd", "optim.lr=1e-30", "optim.weight_decay=0", "loss.ar_alpha=50")
    trainer = make_trainer(corpus, tmp_path, *overrides, *NO_DROPOUT)
    trainer._epoch(5.0, bool)
    row = trainer._end_epoch()
    streams = torch.from_numpy(trainer.streams_BS.astype(np.int64))
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(streams[:, :-1]).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), streams[:, 1:].flatten())
    assert row["train_loss"] == pytest.approx(nll.item(), rel=1e-5)
    assert row["tokens"] == streams[:, 1:].numel()


def test_the_learning_rate_of_a_step_follows_the_length_of_its_window(tmp_path, corpus):
    trainer = make_trainer(corpus, tmp_path, "optim.kind=sgd", "optim.lr=2", "optim.max_epochs=1")
    rates, ends = [], [0]

    def note_rate():
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        ends.append(trainer.progress.position)
        return False

    trainer.run(5.0, False, note_rate)
    assert rates == pytest.approx(2 * np.diff(ends) / 10)
    assert len(set(rates)) > 3


# Averaging


def run_and_record(corpus, run_dir, *overrides, **options):
    """Run; give the trainer, its reports, and after each step (epoch, learning rate, weights)."""
    recorder = Recorder()
    trainer = make_trainer(corpus, run_dir, *overrides, reporter=recorder, **options)
    iterates = []

    def record():
        iterates.append((trainer.progress.epoch, trainer.optimizer.param_groups[0]["lr"], weights_of(trainer.model)))
        return False

    trainer.run(5.0, False, record)
    return trainer, recorder, iterates


def assert_is_mean(weights, iterates):
    for name, weight in weights.items():
        mean = reference.running_mean_of_iterates([iterate[name].numpy() for iterate in iterates])
        np.testing.assert_allclose(weight.numpy(), mean, rtol=0, atol=2e-6 * max(1.0, np.abs(mean).max()))


@pytest.mark.usefixtures("trigger_after_two_epochs")
def test_after_the_trigger_the_mean_of_the_iterates_is_kept_and_the_raw_weights_go_on(tmp_path, corpus, monkeypatch):
    script_validation(monkeypatch, [5.0, 6.0, 4.0, 3.0])
    trainer, recorder, iterates = run_and_record(corpus, tmp_path / "asgd", *KINDS["nt-asgd"])
    assert [row["averaging"] for row in recorder.rows] == [False, False, True, True]
    assert sum("averaging begins" in note for note in recorder.notes) == 1
    after = [weights for epoch, _, weights in iterates if epoch >= 2]
    kept = load_file(tmp_path / "asgd" / WEIGHTS)
    assert_is_mean(kept, after)
    assert read_checkpoint(tmp_path / "asgd")[1]["num_iterates"] == len(after)
    assert not torch.allclose(kept["lm_head.bias"], after[-1]["lm_head.bias"], atol=1e-4)
    # The average is only looked at: the steps are those of plain SGD, to the last bit, and the checkpoint has them.
    script_validation(monkeypatch, [5.0, 6.0, 4.0, 3.0])
    train(corpus, tmp_path / "sgd", tiny(*KINDS["nt-asgd"], "optim.kind=sgd"))
    assert_equal_weights(raw_weights(tmp_path / "asgd"), raw_weights(tmp_path / "sgd"))
    assert_equal_weights(raw_weights(tmp_path / "asgd"), after[-1])
    assert_equal_weights(weights_of(trainer.model), after[-1])


def test_the_average_is_what_is_validated(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("ulimi.train.non_monotonic", lambda history, newest, n: len(history) == 0)
    seen = []

    def measure(model, ids, batch_size, eos_id, **options):
        seen.append(weights_of(model))
        return float(len(ids))

    monkeypatch.setattr("ulimi.train.validation_nats", measure)
    _, _, iterates = run_and_record(corpus, tmp_path, *KINDS["nt-asgd"], "optim.max_epochs=2")
    assert_equal_weights(seen[0], [weights for epoch, _, weights in iterates if epoch == 0][-1])
    assert_is_mean(seen[1], [weights for epoch, _, weights in iterates if epoch == 1])


def test_the_trigger_sees_the_losses_before_and_the_recipes_interval(tmp_path, corpus, monkeypatch):
    calls = []

    def trigger(history, newest, n):
        calls.append((list(history), newest, n))
        return True  # always: a second time must not start the average anew

    monkeypatch.setattr("ulimi.train.non_monotonic", trigger)
    script_validation(monkeypatch, [5.0, 4.0, 3.0])
    _, _, iterates = run_and_record(
        corpus, tmp_path, "optim.kind=nt-asgd", "optim.max_epochs=3", "optim.nonmono_interval=7"
    )
    assert [history for history, _, _ in calls] == [[], [5.0], [5.0, 4.0]]
    assert [newest for _, newest, _ in calls] == [5.0, 4.0, 3.0]
    assert {n for _, _, n in calls} == {7}
    assert read_checkpoint(tmp_path)[1]["num_iterates"] == sum(epoch >= 1 for epoch, _, _ in iterates)


def test_the_real_trigger_fires_on_a_loss_that_rises_again(tmp_path, corpus, monkeypatch):
    script_validation(monkeypatch, [5.0, 4.0, 4.5, 4.4, 4.3])
    recorder = Recorder()
    recipe = tiny("optim.kind=nt-asgd", "optim.nonmono_interval=1", "optim.max_epochs=5")
    train(corpus, tmp_path, recipe, reporter=recorder)
    # 4.5 is above neither 5.0 alone, the best of all but the last; 4.4 is above 4.0.
    assert [row["averaging"] for row in recorder.rows] == [False, False, False, False, True]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_other_optimizers_have_no_trigger(tmp_path, corpus, monkeypatch, kind):
    monkeypatch.setattr("ulimi.train.non_monotonic", lambda history, newest, n: True)
    _, recorder, _ = run_and_record(corpus, tmp_path, f"optim.kind={kind}", "optim.lr=0.01", "optim.average_share=0")
    assert not any(row["averaging"] for row in recorder.rows)
    assert "average.lm_head.bias" not in read_checkpoint(tmp_path)[0]


@pytest.mark.usefixtures("trigger_after_two_epochs")
def test_learning_rate_drops_work_before_and_while_averaging(tmp_path, corpus):
    _, recorder, iterates = run_and_record(
        corpus, tmp_path, "optim.kind=nt-asgd", "optim.lr=8", "optim.lr_drops=[1, 3]", "optim.max_epochs=4",
        "optim.rescale_lr=false",
    )  # fmt: skip
    assert [row["averaging"] for row in recorder.rows] == [False, False, True, True]
    rates = [{rate for epoch, rate, _ in iterates if epoch == e} for e in range(4)]
    assert [len(r) for r in rates] == [1, 1, 1, 1]
    assert [r.pop() for r in rates] == pytest.approx([8, 0.8, 0.8, 0.08])
    assert [row["lr"] for row in recorder.rows] == pytest.approx([8, 0.8, 0.8, 0.08])


def test_finetuning_averages_from_the_first_step_and_the_trigger_ends_it(tmp_path, corpus, source, monkeypatch):
    script_validation(monkeypatch, [5.0, 4.0, 4.5, 4.4, 4.3, 4.2])
    overrides = (
        "optim.kind=nt-asgd", "optim.lr=1", "optim.average_at_start=true", "optim.nonmono_interval=1",
        "optim.max_epochs=9",
    )  # fmt: skip
    trainer, recorder, iterates = run_and_record(corpus, tmp_path, *overrides, init_from=source)
    assert [row["averaging"] for row in recorder.rows] == [True] * 4
    assert any("finetuning ends" in note for note in recorder.notes)
    num_kept = sum(epoch <= 1 for epoch, _, _ in iterates)
    assert_is_mean(load_file(tmp_path / WEIGHTS), [weights for _, _, weights in iterates[:num_kept]])
    assert read_checkpoint(tmp_path)[1]["num_iterates"] == len(iterates)

    before = contents(tmp_path)
    train(corpus, tmp_path, trainer.recipe, resume=True)  # it is over, whatever max_epochs says
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("patience", "num_epochs"), [(0, 6), (1, 3), (2, 4), (3, 6)])
def test_patience_counts_the_epochs_since_the_best(tmp_path, corpus, monkeypatch, patience, num_epochs):
    script_validation(monkeypatch, [5.0, 4.0, 4.0, 4.2, 3.9, 3.8])
    recorder = Recorder()
    train(corpus, tmp_path, tiny("optim.max_epochs=6", f"optim.patience={patience}"), reporter=recorder)
    assert len(recorder.rows) == num_epochs


# Finetuning


def test_finetuning_starts_from_the_best_weights_and_the_same_tokenizer(tmp_path, corpus, source, monkeypatch):
    before = contents(source.dir)
    trainer = make_trainer(corpus, tmp_path, init_from=source)
    assert_equal_weights(raw_weights(tmp_path), load_file(source.weights_path))
    assert open_run(tmp_path).tokenizer.to_str() == source.tokenizer.to_str()
    assert open_run(tmp_path).meta["init_from"] == str(source.dir.resolve())
    ids = trainer.valid_text.ids
    nats = validation_nats(trainer.model, ids, tiny().data.eval_batch_size, trainer.tokenizer.eos_id)
    assert nats / len(ids) == min(row["valid_nll"] for row in source.metrics())
    trainer.run(5.0, False, bool)
    assert (tmp_path / WEIGHTS).read_bytes() != source.weights_path.read_bytes()
    assert contents(source.dir) == before


def test_finetuning_takes_the_best_weights_and_not_the_last(tmp_path, corpus, monkeypatch):
    script_validation(monkeypatch, [4.0, 5.0])
    train(corpus, tmp_path / "source", tiny())
    best, last = load_file(tmp_path / "source" / WEIGHTS), raw_weights(tmp_path / "source")
    assert not torch.equal(best["lm_head.bias"], last["lm_head.bias"])
    make_trainer(corpus, tmp_path / "next", init_from=open_run(tmp_path / "source"))
    assert_equal_weights(raw_weights(tmp_path / "next"), best)


def test_a_finetuned_run_resumes_from_its_own_weights(tmp_path, corpus, source):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    train(corpus, whole, tiny("optim.max_epochs=1"), init_from=source)
    with pytest.raises(Interrupted):
        train(corpus, pieces, tiny("optim.max_epochs=1"), init_from=source, should_stop=stop_after(11))
    train(corpus, pieces, tiny("optim.max_epochs=1"), resume=True)
    assert_same_run(whole, pieces)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_with_a_new_tokenizer_known_pieces_keep_their_vectors_and_new_ones_get_the_mean(
    tmp_path, corpus, other_corpus, tied
):
    sizes = (f"model.tie_weights={tied}", "optim.max_epochs=1")
    train(corpus, tmp_path / "source", tiny(*sizes))
    source = open_run(tmp_path / "source")
    trainer = make_trainer(other_corpus, tmp_path / "next", *sizes, init_from=source, new_tokenizer=True)
    old, new = load_file(source.weights_path), raw_weights(tmp_path / "next")
    old_vocab, new_vocab = source.tokenizer.backend.get_vocab(), trainer.tokenizer.backend.get_vocab()
    fresh = new_vocab.keys() - old_vocab.keys()
    moved = [piece for piece in new_vocab.keys() & old_vocab.keys() if new_vocab[piece] != old_vocab[piece]]
    assert fresh
    assert moved
    assert new_vocab["<eos>"] == trainer.tokenizer.eos_id
    per_token = {"model.embed_tokens.weight", "lm_head.bias", *(["lm_head.weight"] if tied == "false" else [])}
    for name in old:
        if name not in per_token:
            assert torch.equal(new[name], old[name]), name
            continue
        for piece, index in new_vocab.items():
            expected = old[name][old_vocab[piece]] if piece in old_vocab else old[name].mean(dim=0)
            torch.testing.assert_close(new[name][index], expected, rtol=0, atol=1e-7)
    assert set(new) == set(old)


@pytest.mark.parametrize("change", ["embedding_size=20", "hidden_size=20", "num_layers=3", "tie_weights=false"])
def test_finetuning_needs_a_network_of_the_same_size(tmp_path, corpus, source, change):
    run_dir = tmp_path / "next"
    message = refusal(lambda: train(corpus, run_dir, tiny(f"model.{change}"), init_from=source))
    assert "other sizes" in message
    assert not run_dir.exists()


def test_a_run_is_never_finetuned_into_itself(tmp_path, corpus, source):
    before = contents(source.dir)
    (tmp_path / "link").symlink_to(source.dir)
    for path in (source.dir, tmp_path / "link", source.dir / ".." / source.dir.name):
        message = refusal(lambda path=path: train(corpus, path, tiny(), init_from=source))
        assert "would be overwritten" in message
    assert contents(source.dir) == before


def test_damaged_weights_to_finetune_from_are_one_line(tmp_path, corpus):
    train(corpus, tmp_path / "source", tiny("optim.max_epochs=1"))
    path = tmp_path / "source" / WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    message = refusal(lambda: train(corpus, tmp_path / "next", tiny(), init_from=open_run(tmp_path / "source")))
    assert "cannot be read" in message
    assert WEIGHTS in message


# Runs that fail


@pytest.mark.parametrize("overrides", [
    ("optim.kind=sgd", "optim.lr=1e9"),
    ("optim.kind=nt-asgd", "optim.lr=1e9", "optim.average_at_start=true"),
    ("optim.kind=adamw", "optim.lr=1e4", "optim.warmup_steps=0"),
])  # fmt: skip
@pytest.mark.parametrize("checkpoint_minutes", [5.0, 0.0])
def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(
    tmp_path, corpus, overrides, checkpoint_minutes
):
    recipe = tiny(*overrides, "optim.max_epochs=9")
    message = refusal(lambda: train(corpus, tmp_path, recipe, checkpoint_minutes=checkpoint_minutes))
    assert "start again with a lower optim.lr" in message
    assert any(word in message for word in ("loss is nan", "loss is inf", "weight is inf", "weight is nan"))
    tensors, progress = read_checkpoint(tmp_path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert math.isfinite(progress["epoch_loss"])
    assert (progress["step"] > 0) == (checkpoint_minutes == 0.0)
    assert not (tmp_path / WEIGHTS).exists()


def test_a_loss_that_is_not_finite_is_noticed_within_a_few_steps(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("ulimi.train.CHECK_EVERY", 3)
    trainer = make_trainer(corpus, tmp_path)
    monkeypatch.setattr("ulimi.train.regularisation", lambda raw, *_: (raw.sum() * math.nan, torch.zeros(())))
    # The first step's own loss is finite, its gradient is not; the second step has the spoilt weights.
    message = refusal(lambda: trainer.run(5.0, False, bool))
    assert "training loss is nan in epoch 1, step 3," in message


def test_weights_that_the_very_last_step_has_spoilt_are_not_kept(tmp_path, corpus, monkeypatch):
    trainer = make_trainer(corpus, tmp_path)
    step = trainer.optimizer.step

    def spoil():
        step()
        if trainer.progress.step == 4:  # the fifth: its loss was still that of good weights
            with torch.no_grad():
                trainer.model.lm_head.bias[0] = math.inf

    monkeypatch.setattr(trainer.optimizer, "step", spoil)
    message = refusal(lambda: trainer.run(0.0, False, stop_after(5)))
    assert "largest weight is inf in epoch 1, step 5," in message
    tensors, progress = read_checkpoint(tmp_path)
    assert progress["step"] == 4
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_validation_loss_that_is_not_finite_keeps_what_the_epoch_before_left(tmp_path, corpus, monkeypatch):
    script_validation(monkeypatch, [5.0])
    train(corpus, tmp_path, tiny("optim.max_epochs=1"))
    before = [(tmp_path / name).read_bytes() for name in (WEIGHTS, CHECKPOINT, "metrics.jsonl")]
    script_validation(monkeypatch, [math.nan])
    message = refusal(lambda: train(corpus, tmp_path, tiny(), resume=True))
    assert "validation loss is nan in epoch 2" in message
    assert [(tmp_path / name).read_bytes() for name in (WEIGHTS, CHECKPOINT, "metrics.jsonl")] == before


def test_resume_needs_the_same_text(tmp_path, corpus, other_corpus):
    train(corpus, tmp_path, tiny("optim.max_epochs=1"))
    before = contents(tmp_path)
    message = refusal(lambda: train(other_corpus, tmp_path, tiny("optim.max_epochs=2"), resume=True))
    assert "corpus is not the one" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", ["model.hidden_size=25", "optim.lr=0.5", "optim.seed=9", "data.bptt=11",
                                    "tokenizer.vocab_size=330", "loss.tar_beta=0"])  # fmt: skip
def test_resume_changes_no_setting_but_when_to_end(tmp_path, corpus, source, change):
    before = contents(source.dir)
    message = refusal(lambda: train(corpus, source.dir, tiny(change, "optim.max_epochs=9"), resume=True))
    assert message.startswith(change.partition("=")[0] + ":")
    assert "optim.max_epochs and optim.patience" in message
    assert contents(source.dir) == before


def test_folders_that_are_not_there_for_us_are_refused(tmp_path, corpus, source):
    before = contents(source.dir)
    assert "already holds a run" in refusal(lambda: train(corpus, source.dir, tiny()))
    assert contents(source.dir) == before
    assert "nothing to resume" in refusal(lambda: train(corpus, tmp_path / "none", tiny(), resume=True))
    assert "nothing to resume" in refusal(lambda: train(corpus, tmp_path, tiny(), resume=True))
    (tmp_path / "thesis.txt").write_text("mine")
    assert "holds other things (thesis.txt)" in refusal(lambda: train(corpus, tmp_path, tiny()))
    assert "is a file" in refusal(lambda: train(corpus, tmp_path / "thesis.txt", tiny()))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "thesis.txt").unlink()
    # Names that a run has too, but no run.
    for path in (tmp_path / "last" / "photo.jpg", tmp_path / "tokenizer.json", tmp_path / "corpus" / "mine.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = contents(tmp_path)
    assert "holds other things (last)" in refusal(lambda: train(corpus, tmp_path, tiny()))
    assert contents(tmp_path) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_started_again(tmp_path, corpus, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", kill)
        with pytest.raises(Killed):
            train(corpus, tmp_path, tiny())
    train(corpus, tmp_path, tiny("optim.max_epochs=1"))
    assert open_run(tmp_path).recipe["optim"]["max_epochs"] == 1


def half(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [half, lambda content: b"", lambda content: b"\xff\x00" * 99, None])
def test_a_damaged_checkpoint_is_one_line(tmp_path, corpus, damage):
    with pytest.raises(Interrupted):
        train(corpus, tmp_path, tiny(), should_stop=stop_after(3))
    path = tmp_path / CHECKPOINT
    if damage is None:
        save_file({"rng": torch.zeros(1)}, path)  # a good file that is no checkpoint
    else:
        path.write_bytes(damage(path.read_bytes()))
    message = refusal(lambda: train(corpus, tmp_path, tiny(), resume=True))
    assert "checkpoint.safetensors: cannot be read" in message


def test_a_checkpoint_of_another_version_is_one_line(tmp_path, corpus):
    with pytest.raises(Interrupted):
        train(corpus, tmp_path, tiny(), should_stop=stop_after(3))
    tensors, progress = read_checkpoint(tmp_path)
    progress["epoch_nats"] = progress.pop("epoch_loss")
    save_file(tensors, tmp_path / CHECKPOINT, {"progress": json.dumps(progress)})
    message = refusal(lambda: train(corpus, tmp_path, tiny(), resume=True))
    assert "written by another ulimi" in message
    assert "epoch_nats" in message


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    assert "not a device" in refusal(lambda: choose_device("gpu"))
    assert "no CUDA device is there" in refusal(lambda: choose_device("cuda:1"))
    assert "not supported" in refusal(lambda: choose_device("mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")


def test_a_run_folder_holds_all_that_a_run_is(tmp_path, corpus):
    train(corpus, tmp_path, tiny("optim.max_epochs=1"))
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} - {"model.onnx"} == {
        "config.json", "recipe.toml", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
        "last/checkpoint.safetensors", "metrics.jsonl", "meta.json", "curve.png", "README.md",
    }  # fmt: skip
    for path in tmp_path.rglob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644
    run = open_run(tmp_path)
    assert load_recipe(str(tmp_path / "recipe.toml")) == tiny("optim.max_epochs=1")
    weights = load_file(run.weights_path)
    assert "lm_head.weight" not in weights  # tied, so not written twice
    assert run.meta["num_parameters"] == sum(weight.numel() for weight in weights.values())
    assert run.meta["data"]["valid"]["num_chars"] == len(corpus.valid_path.read_text())
    card = (tmp_path / "README.md").read_text()
    assert f"{run.meta['scores']['valid']['bits_per_char']:.4f} bits per character" in card


def test_tensorboard_gets_the_epochs_figures(tmp_path, corpus, monkeypatch):
    figures = []

    class Writer:
        def add_scalar(self, key, value, epoch):
            figures.append((key, epoch))

        def close(self):
            figures.append("closed")

    monkeypatch.setattr("ulimi.train._open_tensorboard", lambda log_dir: Writer())
    train(corpus, tmp_path, tiny(), tensorboard=True)
    assert ("valid_nll", 1) in figures
    assert ("valid_nll", 2) in figures
    assert figures[-1] == "closed"


# --- A folder is one training's ----------------------------------------------------------------------


def test_a_second_training_in_the_same_folder_is_refused(tmp_path, corpus):
    run_dir = tmp_path / "run"
    said = []

    def try_another() -> bool:
        if not said:
            said.append(refusal(lambda: train(corpus, run_dir, tiny(), resume=True)))
        return False

    train(corpus, run_dir, tiny(), should_stop=try_another)
    train(corpus, tmp_path / "whole", tiny())
    assert "another training is writing to" in said[0]
    assert_same_run(tmp_path / "whole", run_dir)
    assert not (run_dir / ".lock").exists()


def test_a_folder_that_nothing_was_written_to_does_not_stay(tmp_path, corpus):
    refusal(lambda: train(corpus, tmp_path / "run", tiny(), device="gpu"))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_that_goes_on_gives_up_its_scores_until_it_ends_again(tmp_path, corpus):
    sgd = ("optim.kind=sgd", "optim.lr=8")
    train(corpus, tmp_path, tiny(*sgd, "optim.max_epochs=1"))
    assert open_run(tmp_path).meta["scores"]
    longer = tiny(*sgd, "optim.max_epochs=2")
    with pytest.raises(Interrupted):
        train(corpus, tmp_path, longer, resume=True, should_stop=lambda: True)
    assert not {"scores", "training", "onnx"} & open_run(tmp_path).meta.keys()
    train(corpus, tmp_path, longer, resume=True)
    assert {"scores", "training", "onnx"} <= open_run(tmp_path).meta.keys()


def test_finetuning_records_the_tokenizer_that_it_takes(tmp_path, corpus):
    train(corpus, tmp_path / "old", tiny("optim.max_epochs=1"))
    old = open_run(tmp_path / "old")
    train(corpus, tmp_path / "new", tiny("optim.max_epochs=1", "tokenizer.vocab_size=400"), init_from=old)
    assert open_run(tmp_path / "new").recipe["tokenizer"] == old.recipe["tokenizer"]


def test_a_graph_that_cannot_be_trusted_costs_no_score(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("ulimi.export.max_difference", lambda model, engine: 1.0)
    score = train(corpus, tmp_path, tiny("optim.max_epochs=1"))
    assert open_run(tmp_path).meta["scores"]["valid"] == score
    assert (tmp_path / "README.md").is_file()
    assert not (tmp_path / "model.onnx").exists()


def test_a_checkpoint_of_another_kind_of_device_is_refused(tmp_path, corpus, monkeypatch):
    with pytest.raises(Interrupted):
        train(corpus, tmp_path, tiny(), should_stop=lambda: True)
    path = tmp_path / CHECKPOINT
    with safe_open(path, framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
    assert progress["device"] == "cpu"
    save_file(load_file(path), path, {"progress": json.dumps({**progress, "device": "cuda"})})
    assert "--device cuda" in refusal(lambda: train(corpus, tmp_path, tiny(), resume=True))
