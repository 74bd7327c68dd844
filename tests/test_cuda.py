"""The training step on a GPU against the CPU's; what of it can be tested without one is."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import TINY
from ulimi.adapt import Dynamic, adaptive_nll, gradient_stats, without_dropout
from ulimi.corpus import open_corpus
from ulimi.cuda import GraphedStep, lstm, product_precision
from ulimi.distill import KEPT, load_teacher
from ulimi.errors import UlimiError
from ulimi.model import AWDLSTM
from ulimi.recipe import load_recipe
from ulimi.run import open_run
from ulimi.start import choose_precision
from ulimi.train import Interrupted, Silent, Trainer, train

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_what_a_device_cannot_compute_in_is_refused(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_precision("auto", cpu) == "fp32"
    monkeypatch.setattr("ulimi.start.has_bfloat16", lambda: True)
    assert choose_precision("auto", cpu) == "bf16"
    assert choose_precision("auto", cuda) == choose_precision("bf16", cuda) == choose_precision("bf16", cpu) == "bf16"
    with pytest.raises(UlimiError, match=r"--precision tf32: allowed on cpu: auto, fp32, bf16$"):
        choose_precision("tf32", cpu)
    with pytest.raises(UlimiError, match=r"--precision double: allowed on cuda: auto, fp32, tf32, bf16, fp16$"):
        choose_precision("double", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_precision("auto", cuda) == "fp32"
    with pytest.raises(UlimiError, match=r"--precision bf16: allowed on cuda: auto, fp32$"):
        choose_precision("bf16", cuda)


def layer_and_input(input_size, hidden_size, batch_size, length):
    torch.manual_seed(1)
    layer = torch.nn.LSTM(input_size, hidden_size, batch_first=True)
    rng = torch.Generator().manual_seed(2)
    x, h, c = (
        torch.randn(shape, generator=rng) * 0.5
        for shape in ((batch_size, length, input_size), (1, batch_size, hidden_size), (1, batch_size, hidden_size))
    )
    return layer, x, h, c


def results(function, layer, x, h, c):
    """Outputs, and the gradients of a sum that weighs all of them differently."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, h, c)]
    layer.zero_grad()
    y, h_n, c_n = function(layer, *inputs)
    rng = torch.Generator().manual_seed(3)
    loss = sum((out.cpu().double() * torch.randn(out.shape, generator=rng).double()).sum() for out in (y, h_n, c_n))
    loss.backward()
    return [
        t.detach().double().cpu().numpy()
        for t in (y, h_n, c_n, *(i.grad for i in inputs), *(p.grad for p in layer.parameters()))
    ]


def plain(layer, x, h, c):
    y, (h_n, c_n) = layer(x, (h, c))
    return y, h_n, c_n


def ours(layer, x, h, c):
    y, (h_n, c_n) = lstm(x, (h, c), *layer.all_weights[0])
    return y, h_n, c_n


@gpu
@pytest.mark.parametrize("sizes", [(8, 16, 4, 5), (7, 13, 3, 2), (1, 1, 1, 1), (400, 1150, 20, 70), (256, 512, 32, 70)])
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("tf32", 2e-3), ("bf16", 3e-2), ("fp16", 3e-3)])
def test_the_layer_is_pytorchs_on_a_cpu(sizes, precision, error):
    layer, *inputs = layer_and_input(*sizes)
    expected = results(plain, layer.double(), *(t.double() for t in inputs))
    layer = layer.float().cuda()
    with product_precision(torch.device("cuda"), precision):
        found = results(ours, layer, *(t.cuda() for t in inputs))
    for ours_, theirs in zip(found, expected, strict=True):
        assert np.linalg.norm(ours_ - theirs) <= error * np.linalg.norm(theirs)


@gpu
def test_float16_keeps_gradients_that_it_cannot_hold():
    layer, *inputs = layer_and_input(8, 16, 4, 5)
    layer, inputs = layer.cuda(), [t.cuda() for t in inputs]
    gradients = []
    for factor in (1.0, 1e-9):
        layer.zero_grad()
        with product_precision(torch.device("cuda"), "fp16"):
            y, *_ = ours(layer, *inputs)
        (y.sum() * factor).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in layer.parameters()]) / factor)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-3)
    assert gradients[0].abs().max() > 0.1


def tiny_model(**changes):
    sizes = {"vocab_size": 50, "embedding_size": 12, "hidden_size": 20, "num_layers": 3, **changes}
    return AWDLSTM(**sizes, rng=torch.Generator().manual_seed(4)).cuda().train()


@gpu
def test_without_dropout_the_model_is_the_evaluated_one_and_its_gradients_are_the_cpus():
    model = tiny_model()
    tokens = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(5))
    state = [(torch.randn_like(h), torch.randn_like(c)) for h, c in model.initial_state(3)]
    on_cpu, state_cpu = copy.deepcopy(model).cpu(), [(h.cpu(), c.cpu()) for h, c in state]
    for one, ids, start in ((model, tokens.cuda(), state), (on_cpu, tokens, state_cpu)):
        out = one(ids, start)
        (F.cross_entropy(out.logits.flatten(0, 1), ids.flatten()) + out.raw.square().mean()).backward()
    for p, q in zip(model.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=2e-3, atol=1e-6)
    trained = model(tokens.cuda(), state).logits
    with without_dropout(model):
        torch.testing.assert_close(model(tokens.cuda(), state).logits, trained, rtol=1e-3, atol=1e-4)


@gpu
def test_dynamic_evaluation_is_the_cpus():
    model = tiny_model()
    ids = np.random.default_rng(6).integers(0, 50, 300)
    scores = {}
    for device in ("cuda", "cpu"):
        model.to(device)
        stats = gradient_stats(model, ids, batch_size=3, bptt=20)
        kept = [p.detach().clone() for p in model.parameters()]
        scores[device] = adaptive_nll(model, ids, 0, dynamic=Dynamic(lr=2e-3), stats=stats)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), kept, strict=True))
    static = adaptive_nll(model, ids, 0)
    assert np.abs(scores["cpu"] - static).max() > 0.05
    np.testing.assert_allclose(scores["cuda"], scores["cpu"], atol=5e-3)


@gpu
def test_weight_dropout_masks_the_recurrent_gradient_alone():
    model = tiny_model(weight_dropout=0.5)
    out = model(torch.randint(50, (3, 9), device="cuda"), rng=torch.Generator("cuda").manual_seed(1))
    out.logits.square().sum().backward()
    for layer in model.layers:
        share = (layer.lstm.weight_hh_l0.grad == 0).float().mean().item()
        assert 0.3 < share < 0.7
        assert (layer.lstm.weight_ih_l0.grad == 0).float().mean() < 0.1


@pytest.fixture
def corpus(tmp_path):
    lines = [f"umfana {i % 7} uthanda incwadi {i * i % 11} kakhulu" for i in range(400)]
    for part, chosen in (("train", lines[:300]), ("valid", lines[300:350]), ("test", lines[350:])):
        (tmp_path / f"{part}.txt").write_text("\n".join(chosen) + "\n")
    return open_corpus(tmp_path, tmp_path / "parts")


def trainer(corpus, run_dir, *overrides, precision="fp32", graphs=True, teacher=None):
    made = Trainer(
        corpus, run_dir, load_recipe(None, [*TINY, *overrides]), init_from=None, new_tokenizer=False, resume=False,
        device="cuda", precision=precision, reporter=Silent(), cache_dir=None, teacher=teacher,
    )  # fmt: skip
    if not graphs:
        made.take_gradients = made.gradients
    return made


@gpu
@pytest.mark.parametrize(
    "overrides",
    [(), ("optim.kind=nt-asgd",), ("optim.dropout_warmup_epochs=1",), ("model.mogrifier_rounds=3",)],
)
def test_graphs_take_the_steps_that_are_taken_without(corpus, tmp_path, overrides):
    curves = []
    for graphs in (True, False):
        made = trainer(
            corpus, tmp_path / f"run{graphs}", "optim.max_epochs=4", "data.bptt=12", *overrides, graphs=graphs
        )
        made.run(5.0, False, lambda: False)
        if graphs:
            assert isinstance(made.take_gradients, GraphedStep)
            assert len(made.take_gradients._graphs) > 5
        curves.append([row["valid_nll"] for row in open_run(tmp_path / f"run{graphs}").metrics()])
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-3)
    assert curves[0][-1] < curves[0][0]


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_hold_a_teacher_too(corpus, tmp_path, precision):
    train(corpus, tmp_path / "teacher", load_recipe(None, [*TINY, "optim.max_epochs=6"]), device="cuda")
    curves = []
    for graphs in (True, False):
        made = trainer(
            corpus, tmp_path / f"run{graphs}", "optim.max_epochs=4", "data.bptt=12", graphs=graphs, precision=precision,
            teacher=open_run(tmp_path / "teacher"),
        )  # fmt: skip
        made.run(5.0, False, lambda: False)
        curves.append([row["train_loss"] for row in open_run(tmp_path / f"run{graphs}").metrics()])
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-3 if precision == "fp32" else 2e-2)
    # What the teacher says on the GPU is what it says on the CPU.
    streams_BS, heard = np.arange(30, dtype=np.uint16).reshape(2, 15) * 7, []
    for device in (torch.device("cuda"), torch.device("cpu")):
        lessons = load_teacher(open_run(tmp_path / "teacher"), device).read_streams(
            streams_BS, torch.Generator(device).manual_seed(1)
        )
        heard.append(lessons)
    probs, ids = ([getattr(lessons, name)[..., :KEPT].cpu() for lessons in heard] for name in ("probs", "ids"))
    torch.testing.assert_close(probs[0].float(), probs[1].float(), rtol=0.05, atol=2e-3)
    assert (ids[0] == ids[1]).float().mean() > 0.5  # near ties may change places


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_graphs_on_a_gpu_that_is_not_the_current_one(corpus, tmp_path):
    recipe = load_recipe(None, [*TINY, "optim.max_epochs=4", "data.bptt=12"])
    train(corpus, tmp_path / "run", recipe, device="cuda:1")
    first, *_, last = open_run(tmp_path / "run").metrics()
    assert last["valid_nll"] < first["valid_nll"]


@gpu
def test_a_sparse_model_is_trained_without_graphs(corpus, tmp_path):
    made = trainer(corpus, tmp_path / "run", "loss.kind=entmax")
    assert not isinstance(made.take_gradients, GraphedStep)
    made.run(5.0, False, lambda: False)
    first, *_, last = open_run(tmp_path / "run").metrics()
    assert last["valid_nll"] < first["valid_nll"]


@gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_other_precisions_learn_as_well(corpus, tmp_path, precision):
    scores = []
    for name in ("fp32", precision):
        made = trainer(corpus, tmp_path / f"run-{name}", "optim.max_epochs=6", precision=name)
        scores.append(made.run(5.0, False, lambda: False)["bits_per_char"])
    assert scores[1] == pytest.approx(scores[0], rel=0.05)


@gpu
def test_a_stopped_run_goes_on(corpus, tmp_path):
    recipe = load_recipe(None, [*TINY, "optim.max_epochs=3"])
    calls = iter(range(10**9))
    with pytest.raises(Interrupted):
        train(corpus, tmp_path / "run", recipe, device="cuda", should_stop=lambda: next(calls) == 25)
    train(corpus, tmp_path / "run", recipe, device="cuda", resume=True)
    whole = train(corpus, tmp_path / "whole", recipe, device="cuda")
    assert whole["bits_per_char"] == pytest.approx(
        open_run(tmp_path / "run").meta["scores"]["valid"]["bits_per_char"], rel=2e-3
    )
