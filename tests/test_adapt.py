"""Adapting scores against the slow truth, in float64, over every way to cut the text into windows."""

import math
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.func import functional_call

import reference
from ulimi import adapt
from ulimi.adapt import Cache, Dynamic, adaptive_nll, gradient_stats, run_stats
from ulimi.data import encode_file
from ulimi.engine import TorchEngine, load_model, write_tensors
from ulimi.errors import UlimiError
from ulimi.model import AWDLSTM, detach_state
from ulimi.run import Run, open_run
from ulimi.score import score_stream

V, EOS = 17, 16
STATIC_WINDOW = 256  # tokens that the cache alone reads at once


def make_model(*, tie_weights=True, seed=2) -> AWDLSTM:
    """A network in float64 that has all dropouts and is in training mode; its weights are far from zero."""
    dropouts = ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout")
    model = AWDLSTM(
        vocab_size=V,
        embedding_size=5,
        hidden_size=7,
        num_layers=2,
        tie_weights=tie_weights,
        **dict.fromkeys(dropouts, 0.3),
    ).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return model.train()


@pytest.fixture
def model():
    return make_model()


def make_ids(num, seed=2):
    """Ids in which words come back soon, as a cache likes it."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, V, size=num)
    for i in range(5, num):
        if rng.random() < 0.4:
            ids[i] = ids[i - rng.integers(1, 5)]
    return ids.astype(np.uint16)


def score_adaptive(*args, **kwargs) -> float:
    return float(adaptive_nll(*args, **kwargs).sum())


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model, before):
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def cut(ids, window):
    """Give (inputs, targets) of each segment, each (1, T)."""
    targets = torch.from_numpy(ids.astype(np.int64))
    inputs = torch.cat([torch.tensor([EOS]), targets[:-1]])
    return [(inputs[None, s : s + window], targets[None, s : s + window]) for s in range(0, len(ids), window)]


class RecurrentLoss:
    """The loss that `reference` asks for: mean nats of a segment, the state carried in here, dropout off.

    `logits` and `raw` keep what each segment gave.
    """

    def __init__(self, model) -> None:
        self._model = make_model(tie_weights=model.tie_weights).eval()
        self._state = None
        self.logits: list[np.ndarray] = []
        self.raw: list[np.ndarray] = []

    def __call__(self, params, segment):
        inputs_BT, targets_BT = segment
        out = functional_call(self._model, params, (inputs_BT, self._state))
        self._state = detach_state(out.state)
        self.logits.append(reference.f64(out.logits[0]))
        self.raw.append(reference.f64(out.raw[0]))
        return F.cross_entropy(out.logits.flatten(0, 1), targets_BT.flatten())


def static_outputs(model, ids):
    """Logits (T, V) and raw outputs (T, E) of the unchanging network over one stream, in one pass."""
    loss = RecurrentLoss(model)
    loss(weights_of(model), cut(ids, len(ids))[0])
    return loss.logits[0], loss.raw[0]


def static_nats(model, ids) -> float:
    logits, _ = static_outputs(model, ids)
    return len(ids) * reference.cross_entropy_nats(logits, ids)


def cache_nats(logits, raw, ids, cache: Cache) -> float:
    return -reference.neural_cache(logits, raw, ids, cache.theta, cache.lambda_, cache.window).sum()


def some_stats(model, seed=7):
    """Mean squared gradients that differ from element to element and from tensor to tensor by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (parameter.new_empty(parameter.shape).normal_(std=2, generator=generator) - 6 - i).exp()
        for i, (name, parameter) in enumerate(model.named_parameters())
    }


# --- Neither -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2, STATIC_WINDOW, STATIC_WINDOW + 44])
def test_without_adapting_it_is_the_score_of_the_stream(model, num):
    ids = make_ids(num)
    nats = score_adaptive(model, ids, EOS)
    assert nats == pytest.approx(static_nats(model, ids), rel=1e-12)
    assert nats == pytest.approx(score_stream(TorchEngine(model), ids, EOS), rel=1e-6)


# --- Neural cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cache",
    [
        Cache(),
        Cache(theta=0.0, lambda_=0.3),
        Cache(theta=2.5, lambda_=0.9, window=2000),
        Cache(theta=1.0, lambda_=0.5, window=1),
        Cache(theta=1.0, lambda_=0.5, window=20),
        Cache(theta=1.0, lambda_=0.5, window=255),
    ],
    ids=str,
)
@pytest.mark.parametrize("num", [1, 2, 30, STATIC_WINDOW + 44])
def test_cache_is_the_slow_truth(model, cache, num):
    ids = make_ids(num)
    truth = cache_nats(*static_outputs(model, ids), ids, cache)
    assert score_adaptive(model, ids, EOS, cache=cache) == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("segment", [1, 7, 20, 1000])
@pytest.mark.parametrize("cache_window", [1, 5, 20, 500])
def test_cache_does_not_depend_on_the_segments(model, segment, cache_window):
    ids = make_ids(70)
    cache = Cache(theta=1.0, lambda_=0.5, window=cache_window)
    standstill = Dynamic(lr=0.0, decay=0.0, window=segment)
    nats = score_adaptive(model, ids, EOS, cache=cache, dynamic=standstill, stats=some_stats(model))
    assert nats == pytest.approx(cache_nats(*static_outputs(model, ids), ids, cache), rel=1e-10)


def test_the_first_token_has_the_vocabularys_probability_alone(model):
    ids = make_ids(1)
    nats = score_adaptive(model, ids, EOS, cache=Cache(lambda_=0.9))
    assert nats == pytest.approx(static_nats(model, ids), rel=1e-12)


def test_lambda_zero_is_the_static_score(model):
    ids = make_ids(STATIC_WINDOW + 44)
    nats = score_adaptive(model, ids, EOS, cache=Cache(lambda_=0.0))
    assert nats == pytest.approx(static_nats(model, ids), rel=1e-12)


def test_a_cache_helps_where_words_come_back(model):
    ids = np.tile(make_ids(8), 10)
    assert score_adaptive(model, ids, EOS, cache=Cache(lambda_=0.3)) < static_nats(model, ids) - 1.0


def test_the_cache_holds_no_more_than_its_window(model):
    memory = adapt._Memory(Cache(window=12))
    ids = torch.from_numpy(make_ids(40).astype(np.int64))
    logits, raw = (torch.from_numpy(array) for array in static_outputs(model, make_ids(40)))
    held = []
    for start in range(0, 40, 5):
        segment = slice(start, start + 5)
        memory.nll(raw[segment], logits[segment], ids[segment])
        held.append((len(memory._keys_WE), len(memory._next_W)))
    assert held == [(5, 5), (10, 10), *[(12, 12)] * 6]


def test_large_scores_do_not_overflow(model):
    ids = make_ids(40)
    cache = Cache(theta=1e6, lambda_=0.5)
    nats = score_adaptive(model, ids, EOS, cache=cache)
    assert nats == pytest.approx(cache_nats(*static_outputs(model, ids), ids, cache), rel=1e-8)


# --- Dynamic evaluation ------------------------------------------------------------------------------

SETTINGS = pytest.mark.parametrize(
    "settings",
    [
        Dynamic(lr=0.003, decay=0.0, epsilon=1e-3, window=5),
        Dynamic(lr=0.003, decay=0.05, epsilon=1e-3, window=5),
        Dynamic(lr=0.001, decay=0.9, epsilon=1e-4, window=8),  # of many weights the decay is cut at 1
        Dynamic(lr=0.01, decay=1.0, epsilon=0.1, window=47),
        Dynamic(lr=0.0005, decay=0.02, epsilon=1e-3, window=1),
        Dynamic(lr=0.01, decay=0.02, epsilon=1e-2, window=1000),
    ],
    ids=str,
)


@SETTINGS
@pytest.mark.parametrize("tie_weights", [True, False])
def test_dynamic_evaluation_is_the_slow_truth(settings, tie_weights):
    model = make_model(tie_weights=tie_weights)
    ids, stats = make_ids(47), some_stats(model)
    segments = cut(ids, settings.window)
    lengths = [targets.shape[1] for _, targets in segments]

    adapted = []
    nats = score_adaptive(
        model, ids, EOS, dynamic=settings, stats=stats, on_tokens=lambda done: adapted.append((done, weights_of(model)))
    )

    # What the authors' program does: the mean RMS is a mean over tensors.
    options = {"lr": settings.lr, "decay": settings.decay, "eps": settings.epsilon, "average": "tensors"}
    losses, _ = reference.dynamic_evaluation(RecurrentLoss(model), weights_of(model), stats, segments, **options)
    assert nats == pytest.approx(float(losses @ lengths), rel=1e-9)
    # After every segment the weights are the truth's, and a text that ends there had the same score.
    assert [done for done, _ in adapted] == np.cumsum(lengths).tolist()
    for i in {0, len(segments) // 2, len(segments) - 1}:
        done, weights = adapted[i]
        losses, truth = reference.dynamic_evaluation(
            RecurrentLoss(model), weights_of(model), stats, islice(segments, i + 1), **options
        )
        for name, weight in weights.items():
            np.testing.assert_allclose(weight.numpy(), truth[name], rtol=1e-8, atol=1e-10, err_msg=name)
        part = score_adaptive(model, ids[:done], EOS, dynamic=settings, stats=stats)
        assert part == pytest.approx(float(losses @ lengths[: i + 1]), rel=1e-9)


def test_the_two_means_differ_in_what_the_decay_is(model):
    # Or the test above could not tell the program's rule from the paper's formula.
    stats = some_stats(model)
    by_tensors, by_elements = (reference.rms_norm(stats, average) for average in ("tensors", "elements"))
    ratios = [by_tensors[name] / by_elements[name] for name in stats]
    assert np.allclose(ratios[0], ratios[0].flat[0])
    assert abs(ratios[0].flat[0] - 1) > 0.1


@pytest.mark.parametrize("window", [1, 6, 100])
def test_a_segment_is_scored_before_it_is_learned_from(model, window):
    ids = make_ids(window)
    wild = Dynamic(lr=100.0, decay=0.5, window=window)
    static = static_nats(model, ids)
    stats = some_stats(model)
    assert score_adaptive(model, ids, EOS, dynamic=wild, stats=stats) == pytest.approx(static, rel=1e-10)
    # With one more token something was learned, and not what it is.
    longer = np.append(ids, ids[-1])
    both = [score_adaptive(model, longer, EOS, dynamic=Dynamic(lr, 0, 1e-3, window), stats=stats) for lr in (0.0, 0.01)]
    assert both[0] != pytest.approx(both[1], rel=1e-6)


def test_the_score_so_far_does_not_depend_on_what_comes(model):
    ids, stats = make_ids(30), some_stats(model)
    other = ids.copy()
    other[20:] = (other[20:] + 1) % V
    settings = Dynamic(lr=0.01, decay=0.1, window=5)
    weights = []
    for text in (ids, other):
        snapshots = []
        score_adaptive(
            model,
            text,
            EOS,
            dynamic=settings,
            stats=stats,
            on_tokens=lambda done, s=snapshots: s.append(weights_of(model)),
        )
        weights.append(snapshots)
    for name in weights[0][0]:
        assert torch.equal(weights[0][3][name], weights[1][3][name])
        assert not torch.equal(weights[0][4][name], weights[1][4][name])


@pytest.mark.parametrize("window", [1, 9, 1000])
def test_standing_still_is_the_static_score(model, window):
    ids = make_ids(60)
    standstill = Dynamic(lr=0.0, decay=0.0, window=window)
    nats = score_adaptive(model, ids, EOS, dynamic=standstill, stats=some_stats(model))
    assert nats == pytest.approx(static_nats(model, ids), rel=1e-12)


def test_learning_helps_where_a_text_repeats_itself(model):
    ids = np.tile(make_ids(8), 20)
    stats = gradient_stats(model, make_ids(400, seed=1), batch_size=2, bptt=20)
    nats = score_adaptive(model, ids, EOS, dynamic=Dynamic(lr=0.01, decay=0.0, window=8), stats=stats)
    assert nats < 0.9 * static_nats(model, ids)


def test_cache_and_dynamic_evaluation_together(model):
    ids, stats = make_ids(50), some_stats(model)
    cache, settings = Cache(theta=1.0, lambda_=0.4, window=12), Dynamic(lr=0.003, decay=0.05, window=7)
    loss = RecurrentLoss(model)
    reference.dynamic_evaluation(
        loss,
        weights_of(model),
        stats,
        cut(ids, settings.window),
        lr=settings.lr,
        decay=settings.decay,
        eps=settings.epsilon,
        average="tensors",
    )
    truth = cache_nats(np.concatenate(loss.logits), np.concatenate(loss.raw), ids, cache)
    nats = score_adaptive(model, ids, EOS, cache=cache, dynamic=settings, stats=stats)
    assert nats == pytest.approx(truth, rel=1e-9)


def test_dynamic_evaluation_needs_the_statistics_of_this_network(model):
    with pytest.raises(ValueError, match="gradient statistics"):
        score_adaptive(model, make_ids(5), EOS, dynamic=Dynamic())
    stats = some_stats(model)
    smaller = {name: square[:-1] if name == "lm_head.bias" else square for name, square in stats.items()}
    fewer = {name: square for name, square in stats.items() if name != "lm_head.bias"}
    for wrong in (smaller, fewer, some_stats(make_model(tie_weights=False))):
        with pytest.raises(UlimiError, match="another network"):
            score_adaptive(model, make_ids(5), EOS, dynamic=Dynamic(), stats=wrong)
        assert model.training


# --- What is left behind -----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_and_modes_are_as_before(model, training, fails):
    model.train(training)
    ids, stats, before = make_ids(40), some_stats(model), weights_of(model)
    changed = []

    def on_tokens(done):
        changed.append(any(not torch.equal(p, before[name]) for name, p in model.named_parameters()))
        if fails and done > 20:
            raise InterruptedError

    def score():
        return score_adaptive(
            model, ids, EOS, cache=Cache(), dynamic=Dynamic(lr=0.01, window=5), stats=stats, on_tokens=on_tokens
        )

    if fails:
        with pytest.raises(InterruptedError):
            score()
        assert len(changed) == 5
    else:
        assert score() == score()
    assert all(changed)
    assert_same_weights(model, before)
    assert all(module.training == training for module in model.modules())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_a_static_pass_too_leaves_modes_as_before(model, fails):
    def on_tokens(done):
        assert not torch.is_grad_enabled()
        if fails:
            raise InterruptedError

    try:
        score_adaptive(model, make_ids(10), EOS, cache=Cache(), on_tokens=on_tokens)
    except InterruptedError:
        assert fails
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_gradients_are_taken_with_lstms_that_miopen_can_differentiate(model):
    # It refuses, as cuDNN does, the backward pass of an LSTM in evaluation mode; ours has no dropout of its own.
    modes = []

    def look(_):
        modes.append((model.training, *((layer.training, layer.lstm.training) for layer in model.layers)))

    score_adaptive(model, make_ids(6), EOS, dynamic=Dynamic(window=6), stats=some_stats(model), on_tokens=look)
    gradient_stats(model, make_ids(30), batch_size=1, bptt=29, on_batches=look)
    assert modes == [(False, (False, True), (False, True))] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_scores_of_the_cpu(model):
    ids = make_ids(40)
    on_cpu, on_gpu = model.float(), make_model().float().to("cuda")
    scores = []
    for network in (on_cpu, on_gpu):
        stats = gradient_stats(network, make_ids(200, seed=1), batch_size=2, bptt=20)
        scores.append(score_adaptive(network, ids, EOS, cache=Cache(), dynamic=Dynamic(window=5), stats=stats))
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


# --- Gradient statistics -----------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize(
    ("batch_size", "bptt", "max_batches", "starts"),
    [
        (3, 10, 200, [0, 10, 20]),
        (3, 10, 2, [0, 10]),
        (1, 10, 4, [0, 10, 20, 30]),
        (1, 98, 200, [0]),
        (50, 40, 200, [0]),  # no more streams than the text has windows for
    ],
)
def test_statistics_are_the_mean_of_squared_gradients(tie_weights, batch_size, bptt, max_batches, starts):
    model = make_model(tie_weights=tie_weights)
    ids = make_ids(99)
    num_streams = min(batch_size, 99 // (bptt + 1))
    length = 99 // num_streams
    streams = torch.from_numpy(ids[: num_streams * length].astype(np.int64)).view(num_streams, length)
    batches = [(streams[:, s : s + bptt], streams[:, s + 1 : s + bptt + 1]) for s in starts]
    assert all(targets.shape == (num_streams, bptt) for _, targets in batches)
    truth = reference.mean_squared_gradients(RecurrentLoss(model), weights_of(model), batches)

    done: list[int] = []
    before = weights_of(model)
    stats = gradient_stats(
        model, ids, batch_size=batch_size, bptt=bptt, max_batches=max_batches, on_batches=done.append
    )
    assert stats.keys() == truth.keys()
    for name, square in stats.items():
        np.testing.assert_allclose(square.numpy(), truth[name], rtol=1e-9, atol=1e-15, err_msg=name)
    assert done == list(range(1, len(starts) + 1))
    assert_same_weights(model, before)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_statistics_of_a_short_text(model):
    ids = torch.from_numpy(make_ids(12).astype(np.int64))[None]
    truth = reference.mean_squared_gradients(RecurrentLoss(model), weights_of(model), [(ids[:, :-1], ids[:, 1:])])
    for name, square in gradient_stats(model, make_ids(12)).items():
        np.testing.assert_allclose(square.numpy(), truth[name], rtol=1e-9, atol=1e-15, err_msg=name)


def test_training_mode_comes_back_after_an_error_in_the_statistics(model):
    def on_batches(done):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        gradient_stats(model, make_ids(30), batch_size=1, bptt=10, on_batches=on_batches)
    assert all(module.training for module in model.modules())


# --- The statistics of a run -------------------------------------------------------------------------


@pytest.fixture
def run(tiny_run, corpus_dir, tmp_path) -> Run:
    """A copy of the trained run that may be written to, its training text likewise."""
    shutil.copytree(tiny_run.dir, tmp_path / "run")
    shutil.copy(corpus_dir / "train.txt", tmp_path / "train.txt")
    run = open_run(tmp_path / "run")
    run.meta["data"]["train"]["path"] = str(tmp_path / "train.txt")
    return run


def kept_files(run):
    return sorted(run.dir.glob("gradient_stats*"))


def assert_same_stats(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_a_run_keeps_its_statistics(run, tmp_path, monkeypatch):
    model = load_model(run)
    stats = run_stats(run, model)
    text = encode_file(tmp_path / "train.txt", run.tokenizer)
    assert_same_stats(stats, gradient_stats(model, text.ids))
    (kept,) = kept_files(run)
    assert_same_stats(load_file(kept), stats)
    # From now on neither the text nor the work is needed.
    (tmp_path / "train.txt").unlink()
    monkeypatch.setattr(adapt, "gradient_stats", lambda *args, **kwargs: pytest.fail("worked out anew"))
    assert_same_stats(run_stats(run, model), stats)
    assert not [path for path in run.dir.iterdir() if path.name.endswith(".tmp")]


def test_statistics_let_a_run_be_scored(run, corpus_dir):
    model = load_model(run)
    text = encode_file(corpus_dir / "test.txt", run.tokenizer)
    nats = score_adaptive(model, text.ids, run.tokenizer.eos_id, dynamic=Dynamic(lr=1e-4), stats=run_stats(run, model))
    assert 0 < nats < len(text.ids) * math.log(model.vocab_size)


def test_weights_that_were_trained_on_have_their_own_statistics(run):
    stats = run_stats(run, load_model(run))
    changed = load_model(run)
    with torch.no_grad():
        changed.lm_head.bias.add_(torch.linspace(-1, 1, changed.vocab_size))
    write_tensors(dict(changed.named_parameters()), run.weights_path)
    run = Run(run.dir, run.meta)
    renewed = run_stats(run, load_model(run))
    assert len(kept_files(run)) == 2
    assert not torch.equal(stats["lm_head.bias"], renewed["lm_head.bias"])


def test_a_training_text_that_is_gone_is_one_error(run, tmp_path, corpus_dir):
    (tmp_path / "train.txt").unlink()
    model = load_model(run)
    with pytest.raises(UlimiError, match=r"training text of .* is not here; name it, or .*, with --stats-from"):
        run_stats(run, model)
    assert kept_files(run) == []
    with pytest.raises(UlimiError, match="elsewhere"):
        run_stats(run, model, tmp_path / "elsewhere.txt")
    # Another text's statistics are not the run's own, and are not kept.
    run_stats(run, model, corpus_dir / "valid.txt")
    assert kept_files(run) == []
    # Naming it works, and once is enough.
    stats = run_stats(run, model, corpus_dir / "train.txt")
    assert_same_stats(run_stats(run, model), stats)


# --- Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field", "option", "wrong", "right"),
    [
        (Cache, "theta", "--cache-theta", (-0.1, math.inf, math.nan), (0.0, 5.0)),
        (Cache, "lambda_", "--cache-lambda", (-0.1, 1.0, 1.5, math.nan), (0.0, 0.999)),
        (Cache, "window", "--cache-window", (0, -5), (1, 10**6)),
        (Dynamic, "lr", "--dynamic-lr", (-1e-3, math.inf, math.nan), (0.0, 3.0)),
        (Dynamic, "decay", "--dynamic-decay", (-1e-3, 1.1, math.nan), (0.0, 1.0)),
        (Dynamic, "epsilon", "--dynamic-epsilon", (0.0, -1e-3, math.inf, math.nan), (1e-8, 1.0)),
        (Dynamic, "window", "--dynamic-window", (0, -5), (1, 10**6)),
    ],
)
def test_settings_out_of_range_are_named_with_what_is_allowed(kind, field, option, wrong, right):
    for value in wrong:
        with pytest.raises(UlimiError, match=f"^{option} {value}: allowed is a "):
            kind(**{field: value})
    for value in right:
        assert getattr(kind(**{field: value}), field) == value
