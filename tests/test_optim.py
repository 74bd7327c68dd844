"""Steps, learning rates, the average and its trigger against the reference, alone and in the training loop."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import reference
from ulimi.corpus import Corpus
from ulimi.data import Windows, make_streams
from ulimi.model import AWDLSTM, detach_state
from ulimi.optim import RunningAverage, learning_rate, make_optimizer, non_monotonic
from ulimi.recipe import build_recipe
from ulimi.run import WEIGHTS
from ulimi.train import Silent, Trainer

V, E, H, B, T = 9, 3, 5, 2, 6
WORDS = ["umfundi", "ufunda", "incwadi", "uthisha", "uyabhala", "ikati", "lidla", "inja"]
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(reference.f64(a), reference.f64(b), rtol=tolerance, atol=tolerance)


def optim_recipe(kind="sgd", **values):
    return build_recipe({"optim": {"kind": kind, **values}}).optim


def make_model(tied=True, seed=1):
    sizes = {"vocab_size": V, "embedding_size": E, "hidden_size": H, "num_layers": 2}
    model = AWDLSTM(**sizes, tie_weights=tied).double()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.8, 0.8, generator=rng)
    return model


def weights_of(model):
    return {name: reference.f64(parameter) for name, parameter in model.named_parameters()}


def make_batch(seed):
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(V, (B, T), generator=rng) for _ in range(2))


def backward(model, batch):
    """Leave the gradient of the mean cross entropy, and give it by name."""
    inputs, targets = batch
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).backward()
    return {name: reference.f64(parameter.grad) for name, parameter in model.named_parameters()}


# --- Steps -------------------------------------------------------------------------------------------


@tied_or_not
@pytest.mark.parametrize("kind", ["sgd", "nt-asgd"])
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e3], ids=["clipped", "unclipped"])
def test_sgd_takes_the_references_steps(tied, kind, max_grad_norm):
    model = make_model(tied)
    recipe = optim_recipe(kind, lr=3.0, weight_decay=0.01, max_grad_norm=max_grad_norm)
    optimizer = make_optimizer(model, recipe)
    for step in range(4):
        before, grads = weights_of(model), backward(model, make_batch(step))
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        expected = reference.sgd_step(before, grads, 3.0, weight_decay=0.01, max_grad_norm=max_grad_norm)
        after = weights_of(model)
        assert after.keys() == expected.keys()
        for name in expected:
            close(after[name], expected[name])
            assert not np.array_equal(after[name], before[name])


@tied_or_not
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)], ids=["momentum", "none"])
def test_adamw_takes_the_references_steps(tied, betas):
    model = make_model(tied)
    recipe = optim_recipe("adamw", lr=0.02, weight_decay=0.1, beta1=betas[0], beta2=betas[1])
    optimizer = make_optimizer(model, recipe)
    expected, state = weights_of(model), None
    for step in range(5):
        grads = backward(model, make_batch(step))
        optimizer.step()
        expected, state = reference.adamw_step(expected, grads, state, 0.02, betas, weight_decay=0.1)
        after = weights_of(model)
        for name in expected:
            close(after[name], expected[name], 1e-11)


@tied_or_not
@pytest.mark.parametrize("kind", ["sgd", "nt-asgd", "adamw"])
def test_an_optimizer_holds_every_parameter_once(tied, kind):
    model = make_model(tied)
    (group,) = make_optimizer(model, optim_recipe(kind)).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert len({p.data_ptr() for p in group["params"]}) == 1 + 2 * 4 + (not tied) + 1


@pytest.mark.parametrize("kind", ["sgd", "nt-asgd", "adamw"])
def test_weight_decay_is_on_all_parameters(kind):
    # Without a gradient only the decay moves them: by the same share whichever optimizer it is.
    model = make_model(tied=False)
    optimizer = make_optimizer(model, optim_recipe(kind, lr=0.5, weight_decay=0.1))
    before = weights_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, weight in weights_of(model).items():
        close(weight, before[name] * (1 - 0.5 * 0.1))


@pytest.mark.parametrize(
    ("kind", "lr", "weight_decay", "max_grad_norm"),
    [("sgd", 30.0, 1.2e-6, 0.25), ("nt-asgd", 30.0, 1.2e-6, 0.25), ("adamw", 5e-3, 0.01, 1.0)],
)
def test_each_optimizer_has_defaults_of_its_own(kind, lr, weight_decay, max_grad_norm):
    recipe = optim_recipe(kind)
    assert (recipe.lr, recipe.weight_decay, recipe.max_grad_norm) == (lr, weight_decay, max_grad_norm)
    (group,) = make_optimizer(make_model(), recipe).param_groups
    assert (group["lr"], group["weight_decay"]) == (lr, weight_decay)


@pytest.mark.parametrize("kind", ["sgd", "nt-asgd"])
def test_a_changed_learning_rate_acts_in_the_same_step(kind):
    # torch.optim.ASGD would take steps of 30, 30, 15, 60.
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = make_optimizer(model, optim_recipe(kind, weight_decay=0.0))
    for lr in (30.0, 15.0, 60.0, 30.0):
        before = model.weight.item()
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        close(before - model.weight.item(), lr)


# --- Learning rate -----------------------------------------------------------------------------------


def rate(recipe, *, step=10**6, progress=0.0, epochs_done=0, window=70, bptt=70):
    return learning_rate(recipe, step=step, progress=progress, epochs_done=epochs_done, window=window, bptt=bptt)


@pytest.mark.parametrize("kind", ["sgd", "nt-asgd", "adamw"])
def test_a_windows_own_length_rescales_the_rate(kind):
    recipe = optim_recipe(kind, lr=2.0)
    for window in (2, 35, 70, 90):
        assert rate(recipe, window=window) == pytest.approx(2.0 * window / 70)
        assert rate(optim_recipe(kind, lr=2.0, rescale_lr=False), window=window) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "values",
    [{"kind": "sgd"}, {"kind": "nt-asgd"}, {"kind": "nt-asgd", "average_at_start": True}, {"kind": "adamw"}],
)
def test_the_rate_drops_at_the_end_of_the_epochs_named(values):
    recipe = optim_recipe(lr_drops=(2, 3, 6), lr=30.0, **values)
    rates = [rate(recipe, epochs_done=epochs_done) for epochs_done in range(8)]
    assert rates == pytest.approx([30, 30, 3, 0.3, 0.3, 0.3, 0.03, 0.03])


@pytest.mark.parametrize("kind", ["sgd", "nt-asgd"])
def test_the_rate_of_sgd_is_constant_otherwise(kind):
    recipe = optim_recipe(kind, lr=30.0, warmup_steps=200, final_lr_ratio=0.1)
    for step, progress in ((0, 0.0), (50, 0.3), (1000, 1.0)):
        assert rate(recipe, step=step, progress=progress, epochs_done=100) == 30.0


def test_adamw_warms_up_linearly():
    recipe = optim_recipe("adamw", lr=0.1, warmup_steps=4)
    assert [rate(recipe, step=step) for step in range(6)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert rate(optim_recipe("adamw", lr=0.1, warmup_steps=0), step=0) == pytest.approx(0.1)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_adamw_follows_a_cosine_to_its_final_rate(ratio):
    recipe = optim_recipe("adamw", lr=0.1, final_lr_ratio=ratio)
    assert rate(recipe, progress=0.0) == pytest.approx(0.1)
    assert rate(recipe, progress=0.5) == pytest.approx(0.1 * (1 + ratio) / 2)
    assert rate(recipe, progress=1.0) == pytest.approx(0.1 * ratio)
    assert rate(recipe, progress=1.5) == pytest.approx(0.1 * ratio), "a resumed run may have more epochs"
    for progress in np.linspace(0, 1, 11):
        expected = 0.1 * (ratio + (1 - ratio) * (1 + math.cos(math.pi * progress)) / 2)
        assert rate(recipe, progress=progress) == pytest.approx(expected)


def test_warm_up_and_cosine_and_window_multiply():
    recipe = optim_recipe("adamw", lr=0.1, warmup_steps=10, final_lr_ratio=0.0, lr_drops=(1,))
    assert rate(recipe, step=4, progress=0.5, epochs_done=1, window=7) == pytest.approx(0.1 * 0.5 * 0.5 * 0.1 * 0.1)


# --- The trigger -------------------------------------------------------------------------------------

losses = st.sampled_from([1.0, 2.0, 3.0, math.inf]) | st.floats(0, 10)


@given(history=st.lists(losses, max_size=15), newest=losses, n=st.integers(1, 8))
@example(history=[1.0] * 5, newest=9.0, n=5)
@example(history=[1.0] * 6, newest=9.0, n=5)
@settings(max_examples=500, deadline=None)
def test_the_trigger_is_the_references(history, newest, n):
    assert non_monotonic(history, newest, n) == reference.averaging_trigger(history, newest, n)


def test_the_seventh_evaluation_is_the_first_that_can_trigger_with_an_interval_of_five():
    assert not non_monotonic([1.0] * 5, 9.0, 5)
    assert non_monotonic([1.0] * 6, 9.0, 5)


def test_the_trigger_compares_with_the_best_before_the_last_n():
    assert non_monotonic([2.0, 3.0, 9.0, 9.0], 2.5, 2)
    assert not non_monotonic([2.0, 3.0, 1.0, 1.0], 1.5, 2), "the last two do not count"
    assert not non_monotonic([2.0, 9.0, 9.0], 2.0, 2), "as good as the best is no reason"


# --- The average -------------------------------------------------------------------------------------


@tied_or_not
def test_the_average_is_the_plain_mean_from_the_first_iterate_after_its_beginning(tied):
    model = make_model(tied)
    optimizer = make_optimizer(model, optim_recipe(lr=3.0))

    def step(seed):
        backward(model, make_batch(seed))
        optimizer.step()

    step(0)
    average, iterates = RunningAverage(model), []
    for seed in range(1, 8):
        step(seed)
        average.update()
        iterates.append(weights_of(model))
        assert average.num_iterates == seed
        assert average.weights.keys() == iterates[0].keys()
        for name, mean in average.weights.items():
            close(mean, reference.running_mean_of_iterates([iterate[name] for iterate in iterates]))
    assert any(not np.array_equal(iterates[0][name], iterates[-1][name]) for name in iterates[0])


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_an_average_over_a_last_share_is_the_references(share):
    model = nn.Linear(3, 2).double()
    average, iterates = RunningAverage(model, share), []
    rng = torch.Generator().manual_seed(0)
    for _ in range(40):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng))
        average.update()
        iterates.append(weights_of(model))
        for name, mean in average.weights.items():
            close(mean, reference.power_mean_of_iterates([iterate[name] for iterate in iterates], share))


def test_the_share_says_which_iterates_count():
    # Of 1,000 iterates, each of which is its own number: the mean stands half of the share from the end.
    for share in (1.0, 0.5, 0.1, 0.01):
        mean = reference.power_mean_of_iterates(np.arange(1, 1001), share)
        assert mean == pytest.approx(1000 * (1 - share / 2), abs=0.6)


def test_the_average_does_not_move_the_weights():
    plain, averaged = make_model(), make_model()
    average = RunningAverage(averaged)
    for model in (plain, averaged):
        optimizer = make_optimizer(model, optim_recipe(lr=3.0))
        for seed in range(5):
            backward(model, make_batch(seed))
            optimizer.step()
            if model is averaged:
                average.update()
                with average.applied():
                    model(make_batch(0)[0])
    for a, b in zip(plain.parameters(), averaged.parameters(), strict=True):
        assert torch.equal(a, b)


def moved_average(model):
    average = RunningAverage(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        average.update()
    return average


@tied_or_not
def test_the_average_is_swapped_in_place_and_out_again(tied):
    model = make_model(tied)
    optimizer = make_optimizer(model, optim_recipe())
    average = moved_average(model)
    own, buffers = weights_of(model), [p.data_ptr() for p in model.parameters()]
    mean = {name: tensor.clone() for name, tensor in average.weights.items()}
    for _ in range(2):
        with average.applied():
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, mean[name])
                assert not np.array_equal(reference.f64(parameter), own[name])
            assert [p.data_ptr() for p in model.parameters()] == buffers
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        for name, weight in weights_of(model).items():
            assert np.array_equal(weight, own[name])
        assert [p.data_ptr() for p in optimizer.param_groups[0]["params"]] == buffers
        assert all(torch.equal(tensor, mean[name]) for name, tensor in average.weights.items())


def test_the_models_own_weights_come_back_after_an_error():
    model = make_model()
    average = moved_average(model)
    own = weights_of(model)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    for name, weight in weights_of(model).items():
        assert np.array_equal(weight, own[name])


def test_trigger_and_average_together_are_the_references_nt_asgd():
    # A noisy quadratic bowl: SGD at a constant rate soon only circles the minimum, and the trigger fires.
    lr, decay, interval, n, num_steps, size = 0.4, 0.01, 3, 2, 60, 4
    noise = np.random.default_rng(0).normal(size=(num_steps, size))
    start = np.full(size, 3.0)

    def valid_loss(w):
        return float((w**2).sum())

    expected = reference.nt_asgd(
        start, lambda w, k: w + noise[k], valid_loss, lr=lr, interval=interval, n=n, num_steps=num_steps,
        weight_decay=decay,
    )  # fmt: skip

    model = nn.Linear(size, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(start)[None])
    optimizer = make_optimizer(model, optim_recipe("nt-asgd", lr=lr, weight_decay=decay, nonmono_interval=n))
    average, history, trigger_step = None, [], None
    for k in range(num_steps):
        model.weight.grad = model.weight.detach() + torch.from_numpy(noise[k])
        optimizer.step()
        if average is not None:
            average.update()
        elif (k + 1) % interval == 0:
            newest = valid_loss(reference.f64(model.weight))
            if non_monotonic(history, newest, n):
                average, trigger_step = RunningAverage(model), k + 1
            history.append(newest)

    assert trigger_step == expected.trigger_step
    assert trigger_step is not None
    close(history, expected.history)
    close(model.weight[0], expected.iterates[-1])
    with average.applied():
        close(model.weight[0], expected.average)


# --- In the training loop ----------------------------------------------------------------------------


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("ulimi.train.plot_curve", lambda _, path: path.touch())  # most of such an epoch's time
    rng = np.random.default_rng(0)
    for name, num_lines in (("train", 22), ("valid", 3)):
        lines = [" ".join(rng.choice(WORDS, 5)) for _ in range(num_lines)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return Corpus(tmp_path / "train.txt", tmp_path / "valid.txt", None, {})


def run_recipe(*, optim, loss=None, dropout=0.0, tied=True):
    names = ("embedding", "input", "hidden", "output", "weight")
    return build_recipe(
        {
            "tokenizer": {"kind": "word", "vocab_size": 0},
            "data": {"batch_size": B, "bptt": 10},
            "model": {"embedding_size": E, "hidden_size": H, "num_layers": 2, "tie_weights": tied}
            | {f"{name}_dropout": dropout for name in names},
            "loss": loss or {},
            "optim": {"seed": 5, **optim},
        }
    )


def train(corpus, run_dir, recipe):
    """Train, and give the trainer, the weights after each step, the rate of each step, and the metrics."""
    trainer = Trainer(
        corpus, run_dir, recipe, init_from=None, new_tokenizer=False, resume=False, device="cpu", reporter=Silent(),
        cache_dir=run_dir.parent / "cache",
    )  # fmt: skip
    iterates, rates = [weights_of(trainer.model)], []

    def look():
        iterates.append(weights_of(trainer.model))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return False

    trainer.run(60.0, False, look)
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return trainer, iterates, rates, metrics


@pytest.mark.usefixtures("in_double")
@tied_or_not
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_loop_takes_the_references_steps(corpus, tmp_path, tied, kind):
    """Cross entropy, then AR and TAR, then the clip over everything, then one step at the window's own rate."""
    optim = {"kind": kind, "lr": 4.0 if kind == "sgd" else 0.01, "weight_decay": 0.01, "max_grad_norm": 0.2}
    optim |= {"max_epochs": 3, "lr_drops": [1], "warmup_steps": 3, "final_lr_ratio": 0.0, "average_share": 0.0}
    recipe = run_recipe(optim=optim, loss={"ar_alpha": 2.0, "tar_beta": 1.0}, tied=tied)
    trainer, iterates, rates, metrics = train(corpus, tmp_path / "run", recipe)

    streams_BS = make_streams(trainer.train_text.ids, B)
    tokens_per_epoch = B * (streams_BS.shape[1] - 1)
    window_rng = np.random.default_rng(5)
    model = trainer.model.train()
    theta, adam, step, tokens, num_clipped = iterates[0], None, 0, 0, 0

    def loss(params, batch):
        inputs, targets, state = batch
        out = functional_call(model, params, (inputs, state))
        ar = 2.0 * out.dropped.square().mean()
        tar = 1.0 * (out.raw[:, 1:] - out.raw[:, :-1]).square().mean()
        return F.cross_entropy(out.logits.flatten(0, 1), targets.flatten()) + ar + tar

    for epoch in range(3):
        state, nats = model.initial_state(B), 0.0
        for arrays in Windows(streams_BS, bptt=10, variable_length=True, rng=window_rng):
            inputs, targets = (torch.from_numpy(array) for array in arrays)
            with torch.no_grad():
                out = functional_call(model, {name: torch.from_numpy(w) for name, w in theta.items()}, (inputs, state))
            nats += reference.cross_entropy_nats(out.logits, targets) * targets.numel()
            _, grads = reference.value_and_gradient(loss, theta, (inputs, targets, state))
            clipped, norm = reference.clip_by_global_norm(grads, 0.2)
            num_clipped += norm > 0.2
            lr = (0.1 if epoch >= 1 else 1.0) * recipe.optim.lr * inputs.shape[1] / 10
            if kind == "adamw":
                lr *= (1 + math.cos(math.pi * tokens / (3 * tokens_per_epoch))) / 2 * min(1.0, (step + 1) / 3)
                theta, adam = reference.adamw_step(theta, clipped, adam, lr, (0.0, 0.999), weight_decay=0.01)
            else:
                theta = reference.sgd_step(theta, grads, lr, weight_decay=0.01, max_grad_norm=0.2)
            assert rates[step] == pytest.approx(lr, rel=1e-12)
            step, tokens, state = step + 1, tokens + targets.numel(), detach_state(out.state)
            for name in theta:
                close(iterates[step][name], theta[name], 1e-9)
        # The reported loss is per predicted token and has neither AR nor TAR in it.
        close(metrics[epoch]["train_loss"], nats / tokens_per_epoch, 1e-9)
    assert len(iterates) == step + 1
    assert num_clipped > 0, "the clip must have been at work"


@pytest.mark.usefixtures("in_double")
def test_reported_losses_do_not_contain_ar_and_tar(corpus, tmp_path):
    # At a rate of nothing, only what is reported could differ.
    optim = {"kind": "sgd", "lr": 1e-300, "max_epochs": 1}
    rows = []
    for alpha, beta in ((0.0, 0.0), (1000.0, 1000.0)):
        recipe = run_recipe(optim=optim, loss={"ar_alpha": alpha, "tar_beta": beta}, dropout=0.3)
        (row,) = train(corpus, tmp_path / f"run{alpha}", recipe)[3]
        rows.append({key: row[key] for key in ("train_loss", "valid_nll", "valid_perplexity", "valid_bits_per_char")})
    assert rows[0] == rows[1]


def script_validation(monkeypatch, script):
    """Let validation find these losses, in nats per token, and note the weights that it is given."""
    seen = []

    def validate(model, ids, batch_size, eos_id, **options):
        seen.append(weights_of(model))
        return script[len(seen) - 1] * len(ids)

    monkeypatch.setattr("ulimi.train.validation_nats", validate)
    return seen


def mean_of(iterates):
    return {name: reference.running_mean_of_iterates([i[name] for i in iterates]) for name in iterates[0]}


def assert_same_weights(weights, expected):
    assert weights.keys() == expected.keys()
    for name in weights:
        close(weights[name], expected[name])


@pytest.mark.usefixtures("in_double")
def test_averaging_begins_once_and_validation_sees_the_average(corpus, tmp_path, monkeypatch):
    # With n = 1: 2.6 in epoch 4 is worse than 2.0 of epoch 2. Epochs 7 and 8 fire again, to no effect.
    seen = script_validation(monkeypatch, [3.0, 2.0, 2.5, 2.6, 2.2, 1.9, 2.4, 2.7])
    optim = {"kind": "nt-asgd", "lr": 1.0, "nonmono_interval": 1, "max_epochs": 8, "lr_drops": [6]}
    trainer, iterates, rates, metrics = train(corpus, tmp_path / "run", run_recipe(optim=optim, dropout=0.2))
    assert [row["averaging"] for row in metrics] == [False] * 4 + [True] * 4

    ends = [row["step"] for row in metrics]
    for epoch in range(4):
        assert_same_weights(seen[epoch], iterates[ends[epoch]])
    for epoch in range(4, 8):
        assert_same_weights(seen[epoch], mean_of(iterates[ends[3] + 1 : ends[epoch] + 1]))
    # The best weights are averaged ones; SGD goes on from the raw ones, and its rate still drops.
    assert [row["best"] for row in metrics] == [True, True, False, False, False, True, False, False]
    assert_same_weights(load_file(tmp_path / "run" / WEIGHTS), seen[5])
    assert_same_weights(weights_of(trainer.model), iterates[-1])
    assert not np.allclose(iterates[-1]["lm_head.bias"], seen[-1]["lm_head.bias"])
    assert max(rates[ends[5] :]) < 0.1 * 3.1 < min(1.0, max(rates[ends[3] : ends[5]]))
    assert [row["lr"] for row in metrics] == pytest.approx([1.0] * 6 + [0.1] * 2)


@pytest.mark.usefixtures("in_double")
def test_finetuning_averages_from_the_first_step_and_ends_at_the_trigger(corpus, tmp_path, monkeypatch):
    seen = script_validation(monkeypatch, [3.0, 2.0, 2.5, 2.6, 1.0])
    optim = {"kind": "nt-asgd", "lr": 1.0, "nonmono_interval": 1, "max_epochs": 8, "average_at_start": True}
    _, iterates, _, metrics = train(corpus, tmp_path / "run", run_recipe(optim=optim))
    assert [row["averaging"] for row in metrics] == [True] * 4
    for epoch, row in enumerate(metrics):
        assert_same_weights(seen[epoch], mean_of(iterates[1 : row["step"] + 1]))
    assert_same_weights(load_file(tmp_path / "run" / WEIGHTS), seen[1])


@pytest.mark.parametrize(("kind", "share"), [("sgd", 1.0), ("adamw", 0.2)])
@pytest.mark.usefixtures("in_double")
def test_other_optimizers_average_from_the_first_step_where_they_are_told_to(
    corpus, tmp_path, monkeypatch, kind, share
):
    seen = script_validation(monkeypatch, [3.0, 2.0, 2.5])
    optim = {"kind": kind, "lr": 0.1, "max_epochs": 3, "average_share": share, "nonmono_interval": 1}
    trainer, iterates, _, metrics = train(corpus, tmp_path / "run", run_recipe(optim=optim, dropout=0.2))
    assert [row["averaging"] for row in metrics] == [True] * 3
    for epoch, row in enumerate(metrics):
        steps = iterates[1 : row["step"] + 1]
        names = iterates[0]
        assert_same_weights(
            seen[epoch], {n: reference.power_mean_of_iterates([step[n] for step in steps], share) for n in names}
        )
    assert_same_weights(load_file(tmp_path / "run" / WEIGHTS), seen[1])
    assert_same_weights(weights_of(trainer.model), iterates[-1])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_other_optimizers_do_not_average_otherwise(corpus, tmp_path, monkeypatch, kind):
    script_validation(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    optim = {"kind": kind, "nonmono_interval": 1, "max_epochs": 4, "average_share": 0.0}
    trainer, _, _, metrics = train(corpus, tmp_path / "run", run_recipe(optim=optim))
    assert [row["averaging"] for row in metrics] == [False] * 4
    assert trainer.average is None
