"""The entmax loss against its authors' package and finite differences; a sparse model, and all who report its nats."""

import math

import entmax as peer
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import TINY
from ulimi.corpus import open_corpus
from ulimi.data import IGNORED, encode_file
from ulimi.distribution import EPSILON, log_probs, smoothed_nats
from ulimi.engine import OnnxEngine, TorchEngine, load_engine, load_model
from ulimi.generate import generate, score_prompt
from ulimi.loss import ROWS_AT_ONCE, entmax, target_nats, training_loss
from ulimi.recipe import load_recipe
from ulimi.run import ONNX, open_run
from ulimi.sampling import Sampling
from ulimi.score import score_stream
from ulimi.train import train, validation_nats

ALPHAS = [1.01, 1.1, 1.3, 1.5, 1.75, 1.9, 2.0]


def random_logits(num_rows: int, num_tokens: int, scale: float = 2.0, dtype: torch.dtype = torch.float64):
    rng = torch.Generator().manual_seed(num_rows * 1000 + num_tokens)
    logits_NV = (torch.randn(num_rows, num_tokens, generator=rng, dtype=torch.float64) * scale).to(dtype)
    return logits_NV, torch.randint(num_tokens, (num_rows,), generator=rng)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (ROWS_AT_ONCE + 5, 7), (4, 300)])
def test_entmax_is_that_of_its_authors_and_ours_in_numpy(alpha, shape):
    logits_NV, _ = random_logits(*shape)
    logits_NV[0] = 0.25  # all alike
    probs_NV = entmax(logits_NV, alpha)
    assert not probs_NV.requires_grad
    np.testing.assert_allclose(probs_NV, peer.entmax_bisect(logits_NV, alpha=alpha, dim=-1, n_iter=100), atol=1e-10)
    np.testing.assert_allclose(probs_NV, np.exp(log_probs(logits_NV, alpha)), atol=1e-12)
    narrow_NV = entmax(logits_NV.float(), alpha)
    assert narrow_NV.dtype == torch.float32
    np.testing.assert_allclose(narrow_NV, probs_NV, atol=3e-5 if alpha < 1.1 else 2e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax_of_ties_huge_and_excluded_logits(alpha):
    logits_NV = torch.tensor([[1e30, -1e30, 1e30], [2.0, 2.0, -math.inf], [-5.0, -math.inf, -math.inf]])
    np.testing.assert_allclose(entmax(logits_NV, alpha), [[0.5, 0, 0.5], [0.5, 0.5, 0], [1, 0, 0]], atol=1e-6)


def of_logits(logits_NV, targets_N, kind, alpha):
    """The training loss behind a decoder that changes nothing."""
    num = logits_NV.size(1)
    return training_loss(
        logits_NV, torch.eye(num, dtype=logits_NV.dtype), logits_NV.new_zeros(num), targets_N, kind, alpha
    )


def theirs(alpha: float):
    if alpha == 1.5:
        return peer.Entmax15Loss(reduction="elementwise_mean")
    if alpha == 2:
        return peer.SparsemaxLoss(reduction="elementwise_mean")
    return peer.EntmaxBisectLoss(alpha=alpha, n_iter=100, reduction="elementwise_mean")


@pytest.mark.parametrize("kind", ["cross_entropy", "entmax"])
def test_a_second_derivative_is_refused_and_not_wrong(kind):
    logits_NV, targets_N = random_logits(4, 7, dtype=torch.float32)
    loss = of_logits(logits_NV.requires_grad_(), targets_N, kind, 1.5)
    # Of the square, since its gradient depends on the loss: otherwise there is nothing to be wrong about.
    (grad_NV,) = torch.autograd.grad(loss.square(), logits_NV, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_NV.square().sum().backward()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (ROWS_AT_ONCE + 9, 11), (6, 500)])
def test_loss_and_gradient_are_those_of_its_authors(alpha, shape):
    logits_NV, targets_N = random_logits(*shape)
    results = []
    for loss in (lambda x, y: of_logits(x, y, "entmax", alpha), theirs(alpha)):
        x_NV = logits_NV.clone().requires_grad_()
        value = loss(x_NV, targets_N)
        (3 * value).backward()
        results.append((value.item(), x_NV.grad))
    (ours, our_grad), (peers, peers_grad) = results
    assert ours == pytest.approx(peers, abs=1e-9)
    np.testing.assert_allclose(our_grad, peers_grad, atol=1e-9)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.75, 2.0])
def test_the_gradient_is_that_of_the_value(alpha):
    logits_NV, targets_N = random_logits(4, 6)
    assert torch.autograd.gradcheck(lambda x: of_logits(x, targets_N, "entmax", alpha), logits_NV.requires_grad_())


def test_the_loss_is_never_negative_and_nothing_for_a_sure_target():
    logits_NV, targets_N = random_logits(50, 6)
    for alpha in ALPHAS:
        for logits_V, target in zip(logits_NV, targets_N, strict=True):
            assert of_logits(logits_V[None], target[None], "entmax", alpha) >= -1e-12
    sure_NV = torch.tensor([[9.0, 0.0, 1.0]], requires_grad=True)
    loss = of_logits(sure_NV, torch.tensor([0]), "entmax", 1.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert sure_NV.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_near_one_the_loss_is_the_cross_entropy():
    logits_NV, targets_N = random_logits(9, 6)
    nats = F.cross_entropy(logits_NV, targets_N)
    assert of_logits(logits_NV, targets_N, "cross_entropy", 1.5).item() == pytest.approx(nats.item(), rel=1e-14)
    assert of_logits(logits_NV, targets_N, "entmax", 1.0001).item() == pytest.approx(nats.item(), abs=1e-3)


def test_in_half_precision_the_entmax_loss_keeps_its_digits():
    rng = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(200, 64, generator=rng), torch.randn(500, 64, generator=rng) / 2
    targets, bias = torch.randint(500, (200,), generator=rng), torch.zeros(500)
    exact = training_loss(hidden, weight, bias, targets, "entmax", 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        half = training_loss(hidden, weight, bias, targets, "entmax", 1.5)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_target_nats_count_every_target_but_the_ignored(alpha):
    logits_NV, targets_N = random_logits(ROWS_AT_ONCE + 3, 9)
    kept = list(range(0, len(targets_N), 2))
    targets_N[1::2] = IGNORED
    log_probs_NV = log_probs(logits_NV, alpha)
    expected = math.fsum(
        float(smoothed_nats(np.exp(log_probs_NV[row, targets_N[row]]), 9, 0.0 if alpha == 1 else EPSILON))
        for row in kept
    )
    assert target_nats(logits_NV, targets_N, alpha).item() == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_nothing_but_ignored_targets_is_no_nats(alpha):
    logits_NV, targets_N = random_logits(3, 4)
    assert target_nats(logits_NV, torch.full_like(targets_N, IGNORED), alpha).item() == 0.0


def test_logits_that_are_not_finite_are_not_worked_on_for_ever():
    assert entmax(torch.full((1, 3), math.nan), 1.5).isnan().all()


# A sparse model


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory, corpus_dir):
    run_dir = tmp_path_factory.mktemp("runs") / "sparse"
    settings = [*TINY, "loss.kind=entmax", "loss.alpha=1.5", "optim.max_epochs=4", "optim.lr=0.3"]
    train(open_corpus(corpus_dir, run_dir / "corpus"), run_dir, load_recipe(None, settings))
    return open_run(run_dir)


@pytest.fixture(scope="module")
def valid_ids(sparse_run, corpus_dir):
    return encode_file(corpus_dir / "valid.txt", sparse_run.tokenizer).ids


@pytest.fixture(scope="module")
def engines(sparse_run):
    return [load_engine(sparse_run, kind="torch"), load_engine(sparse_run, kind="onnx")]


def test_every_engine_knows_that_it_is_sparse(sparse_run, engines):
    assert sparse_run.alpha == 1.5
    assert [type(engine) for engine in engines] == [TorchEngine, OnnxEngine]
    assert [engine.alpha for engine in engines] == [1.5, 1.5]
    logits_1V, _ = engines[0].prime([sparse_run.tokenizer.eos_id], engines[0].initial_state(1))
    assert 0 < np.isfinite(log_probs(logits_1V, 1.5)).sum() < sparse_run.tokenizer.vocab_size


def test_all_who_report_nats_agree(sparse_run, valid_ids, engines):
    eos_id = sparse_run.tokenizer.eos_id
    model = load_model(sparse_run)
    exact = score_stream(engines[0], valid_ids, eos_id)
    assert validation_nats(model, valid_ids, 1, eos_id, alpha=1.5) == pytest.approx(exact, rel=1e-5)
    assert sparse_run.meta["scores"]["valid"]["nats"] == pytest.approx(exact, rel=1e-5)
    # Token by token, from the probabilities themselves.
    steps = score_prompt(engines[0], [eos_id, *valid_ids.tolist()])
    slow = math.fsum(float(smoothed_nats(math.exp(step.logprob), model.vocab_size)) for step in steps)
    assert slow == pytest.approx(exact, rel=1e-5)
    assert any(step.logprob == -math.inf for step in steps)  # the smoothing is at work
    assert score_stream(engines[1], valid_ids, eos_id) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("sampling", [Sampling(alpha=1.5), Sampling(alpha=1.5, top_p=0.9), Sampling(temperature=0)])
def test_a_sparse_model_never_writes_what_it_rules_out(sparse_run, engines, sampling):
    for engine in engines:
        steps = list(generate(engine, [sparse_run.tokenizer.eos_id], sampling=sampling, max_tokens=60, num=3, seed=1))
        assert all(step.logprob > -math.inf for step in steps)


def test_softmax_on_its_logits_would(sparse_run, engines):
    """The test above can fail."""
    steps = list(generate(engines[0], [sparse_run.tokenizer.eos_id], sampling=Sampling(), max_tokens=60, num=3, seed=1))
    assert any(step.logprob == -math.inf for step in steps)


def test_the_graph_alone_is_sparse_too(sparse_run, tmp_path):
    for path in sparse_run.dir.iterdir():
        if path.suffix in (".json", ".toml") or path.name == ONNX:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    engine = load_engine(open_run(tmp_path))
    assert isinstance(engine, OnnxEngine)
    assert engine.alpha == 1.5


def test_it_is_said_that_the_nats_of_a_sparse_model_are_smoothed(works, sparse_run, tiny_run, corpus_dir):
    path = corpus_dir / "valid.txt"
    for command in (["evaluate", path], ["score", path]):
        assert "is a sparse model: 1e-05 is added" in works(*command, "-m", sparse_run.dir).err
        assert "sparse" not in works(*command, "-m", tiny_run.dir).err
