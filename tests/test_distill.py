"""Distillation: the loss against plain autograd, what a teacher says, exact resume, and teachers that do not fit."""

import hashlib
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from conftest import TINY, refusal, synthetic_lines
from test_train import NO_DROPOUT, Recorder, assert_same_run, make_trainer, read_checkpoint, stop_after, tiny
from ulimi.baseline import TokenizerSettings, make_ngram_run
from ulimi.corpus import open_corpus
from ulimi.distill import Teacher, load_teacher
from ulimi.distribution import log_probs
from ulimi.engine import OnnxEngine, TorchEngine, load_engine, load_model
from ulimi.loss import LOGITS_AT_ONCE, training_loss
from ulimi.mixture import make_mixture_run
from ulimi.model import AWDLSTM
from ulimi.ngram import NgramEngine
from ulimi.run import WEIGHTS, open_run
from ulimi.train import Interrupted, train


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out what takes longer than the training itself."""
    monkeypatch.setattr("ulimi.train.plot_curve", lambda rows, path: path.touch())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """So little text that an epoch has about 30 steps."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = synthetic_lines(72, seed=4)
    (folder / "train.txt").write_text("\n".join(lines[:60]) + "\n")
    (folder / "valid.txt").write_text("\n".join(lines[60:]) + "\n")
    return open_corpus(folder, folder)


def tiny_model(seed, num_layers=2, hidden_size=12, **dropouts):
    rng = torch.Generator().manual_seed(seed)
    model = AWDLSTM(
        vocab_size=30, embedding_size=8, hidden_size=hidden_size, num_layers=num_layers, tie_weights=False, rng=rng,
        **dropouts,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory, corpus_dir):
    """A network of another shape than the pupil's; no test may write into its folder."""
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    sizes = ("model.hidden_size=40", "model.num_layers=1", "optim.max_epochs=4", "tokenizer.vocab_size=330")
    train(open_corpus(corpus_dir, run_dir / "corpus"), run_dir, tiny("model.tie_weights=false", *sizes))
    return run_dir


@pytest.fixture(scope="module")
def ngram_dir(tmp_path_factory, corpus_dir, teacher_dir):
    run_dir = tmp_path_factory.mktemp("ngram") / "run"
    make_ngram_run(corpus_dir / "train.txt", run_dir, order=3, settings=TokenizerSettings(teacher_dir))
    return run_dir


@pytest.fixture(scope="module")
def ensemble_dir(tmp_path_factory, teacher_dir, ngram_dir):
    """A mixture of the teacher, an n-gram model and a copy of the teacher with other weights."""
    folder = tmp_path_factory.mktemp("ensemble")
    other = Path(shutil.copytree(teacher_dir, folder / "other"))
    (other / "model.onnx").unlink()
    weights = load_file(other / WEIGHTS)
    save_file({name: tensor * 0.5 for name, tensor in weights.items()}, other / WEIGHTS, {"format": "pt"})
    runs = [open_run(path) for path in (teacher_dir, ngram_dir, other)]
    make_mixture_run(runs, ["a", "n", "b"], folder / "mixed", weights=[0.5, 0.2, 0.3])
    return folder / "mixed"


# The loss


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("vocab_size", [7, LOGITS_AT_ONCE // 4])
def test_the_loss_and_its_gradients_are_those_of_plain_autograd(share, vocab_size):
    """The larger vocabulary takes the rows in two pieces."""
    rng = torch.Generator().manual_seed(1)
    hidden_NE, weight_VE = torch.randn(6, 3, generator=rng), torch.randn(vocab_size, 3, generator=rng)
    bias_V, targets_N = torch.randn(vocab_size, generator=rng), torch.randint(vocab_size, (6,), generator=rng)
    top = torch.softmax(3 * torch.randn(6, vocab_size, generator=rng), dim=1).topk(5, dim=1)
    targets_N[0], targets_N[1] = top.indices[0, 2], top.indices[1].max()  # the teacher, too, found these probable
    parts_NK = share * top.values
    wanted_NV = torch.zeros(6, vocab_size, dtype=torch.float64)
    for n in range(6):
        for token, part in zip(top.indices[n], parts_NK[n], strict=True):
            wanted_NV[n, token] += part
        wanted_NV[n, targets_N[n]] += 1 - parts_NK[n].double().sum()
    losses, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.clone().to(dtype).requires_grad_() for x in (hidden_NE, weight_VE, bias_V)]
        if dtype == torch.float32:
            loss = training_loss(*leaves, targets_N, "cross_entropy", 1.0, (top.indices, parts_NK))
        else:
            loss = -(wanted_NV * torch.log_softmax(F.linear(*leaves), dim=1)).sum(dim=1).mean()
        (3 * loss).backward()
        losses.append(loss.item())
        gradients.append([leaf.grad.double() for leaf in leaves])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=3e-5)


def test_in_half_precision_the_loss_is_the_same_but_for_rounding():
    rng = torch.Generator().manual_seed(2)
    args = torch.randn(5, 3, generator=rng), torch.randn(9, 3, generator=rng), torch.randn(9, generator=rng)
    top = torch.softmax(torch.randn(5, 9, generator=rng), dim=1).topk(4, dim=1)
    targets_N, results = torch.tensor([0, 3, 8, 8, 1]), []
    for half in (False, True):
        leaves = [x.clone().requires_grad_() for x in args]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = training_loss(*leaves, targets_N, "cross_entropy", 1.0, (top.indices, 0.6 * top.values))
        loss.backward()
        results.append((loss.item(), [leaf.grad for leaf in leaves]))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.01)
    for plain, rounded in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(rounded.float(), plain, rtol=0.05, atol=0.02)


def test_no_part_of_a_target_is_negative():
    """Rounded to float16, a teacher's parts may add up to more than 1."""
    bias_V, ids_NK = torch.zeros(3, requires_grad=True), torch.tensor([[0, 1]])
    parts_NK = torch.tensor([[0.6, 0.4005]])
    training_loss(
        torch.zeros(1, 2), torch.zeros(3, 2), bias_V, torch.tensor([2]), "cross_entropy", 1.0, (ids_NK, parts_NK)
    ).backward()
    assert bias_V.grad[2].item() == pytest.approx(1 / 3, abs=1e-6)


# What a teacher says


CPU = torch.device("cpu")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_a_teacher_says_the_mean_of_its_models_window_after_window(alpha):
    networks = [tiny_model(1, output_dropout=0.5, weight_dropout=0.5), tiny_model(2, num_layers=1, hidden_size=20)]
    engines = [TorchEngine(networks[0].train()), TorchEngine(networks[1], alpha)]
    tokens_BT = np.random.default_rng(3).integers(0, 30, (3, 11))
    with torch.no_grad():
        logits = [network.eval()(torch.from_numpy(tokens_BT)).logits.numpy() for network in networks]
    whole = [np.exp(log_probs(logits[0])), np.exp(log_probs(logits[1], alpha))]
    assert np.abs(whole[0] - whole[1]).max() > 0.02
    teacher, parts = Teacher(engines, [0.75, 0.25]), []
    states = [engine.initial_state(3) for engine in engines]
    for window in (slice(0, 4), slice(4, 11)):
        probs_BTV, states = teacher.read(tokens_BT[:, window], states, CPU)
        assert not probs_BTV.requires_grad
        parts.append(probs_BTV.numpy())
    np.testing.assert_allclose(np.concatenate(parts, axis=1), 0.75 * whole[0] + 0.25 * whole[1], rtol=1e-4, atol=1e-5)


def rng_of(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [1, 5, 6, 12])
def test_of_each_place_of_the_streams_the_most_probable_tokens_are_kept_and_others_drawn(monkeypatch, length):
    monkeypatch.setattr("ulimi.distill.KEPT", 4)
    monkeypatch.setattr("ulimi.distill.DRAWN", 3)
    monkeypatch.setattr("ulimi.distill.READING_WINDOW", 5)
    network, told = tiny_model(5), []
    streams_BS = np.random.default_rng(6).integers(0, 30, (3, length)).astype(np.uint16)
    lessons = Teacher([TorchEngine(network)], [1.0]).read_streams(streams_BS, rng_of(1), told.append)
    assert told[-1] == 3 * length
    with torch.no_grad():
        probs_BSV = torch.softmax(network(torch.from_numpy(streams_BS.astype(np.int64))).logits, dim=2)
    assert lessons.ids.shape == lessons.probs.shape == (3, length, 7)
    top = probs_BSV.topk(4, dim=2)
    torch.testing.assert_close(lessons.probs[..., :4].float(), top.values, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(
        probs_BSV.gather(2, lessons.ids[..., :4].long()), top.values, rtol=2e-3, atol=1e-5
    )  # fmt: skip
    rest_BS1 = 1 - top.values.sum(dim=2, keepdim=True)
    torch.testing.assert_close(lessons.probs[..., 4:].float(), (rest_BS1 / 3).expand(-1, -1, 3), rtol=2e-3, atol=1e-4)
    # Nobody is drawn who is kept.
    assert not (lessons.ids[..., 4:, None] == lessons.ids[..., None, :4]).any()
    ids_NK, probs_NK = lessons.window(1, 2)
    assert torch.equal(ids_NK, lessons.ids[:, 1:3].reshape(-1, 7).long())
    assert torch.equal(probs_NK, lessons.probs[:, 1:3].reshape(-1, 7).float())


def test_what_is_drawn_is_in_the_mean_the_whole_distribution(monkeypatch):
    monkeypatch.setattr("ulimi.distill.KEPT", 3)
    monkeypatch.setattr("ulimi.distill.DRAWN", 4)
    network = tiny_model(5)
    same_BS = np.full((4000, 1), 7, dtype=np.uint16)
    lessons = Teacher([TorchEngine(network)], [1.0]).read_streams(same_BS, rng_of(2))
    mean_V = torch.zeros(30, dtype=torch.float64)
    mean_V.index_add_(0, lessons.ids.flatten().long(), lessons.probs.flatten().double() / 4000)
    with torch.no_grad():
        probs_V = torch.softmax(network(torch.tensor([[7]])).logits, dim=2)[0, 0].double()
    assert probs_V.min() > 0.005
    torch.testing.assert_close(mean_V, probs_V, rtol=0.1, atol=1e-4)
    # The draws of one place are spread over the rest: each is in another quarter of it.
    assert (lessons.ids[..., 3:].reshape(4000, 4).diff(dim=1) >= 0).all()
    again = Teacher([TorchEngine(network)], [1.0]).read_streams(same_BS, rng_of(2))
    assert torch.equal(again.ids, lessons.ids)


def test_of_few_tokens_and_of_a_certain_teacher_nothing_is_left_to_draw():
    few = tiny_model(5)
    lessons = Teacher([TorchEngine(few)], [1.0]).read_streams(np.array([[1, 2, 3]], dtype=np.uint16), rng_of(3))
    assert lessons.probs.shape == (1, 3, 32)
    torch.testing.assert_close(lessons.probs.float().sum(dim=2), torch.ones(1, 3), atol=2e-3, rtol=0)
    with torch.no_grad():
        few.lm_head.bias[4] += 1000.0  # all others round to 0
    lessons = Teacher([TorchEngine(few)], [1.0]).read_streams(np.array([[1, 2, 3]], dtype=np.uint16), rng_of(3))
    assert (lessons.ids[..., 0] == 4).all()
    assert (lessons.probs[..., 0] == 1).all()
    assert (lessons.probs[..., 1:] == 0).all()
    assert ((lessons.ids >= 0) & (lessons.ids < 30)).all()


def test_the_members_of_a_mixture_teach_by_their_weights(ensemble_dir):
    """A network by its int8 graph, an n-gram model, and a network of which only the weights are there."""
    run, tokens_BT = open_run(ensemble_dir), np.arange(12).reshape(2, 6) + 260
    teacher = load_teacher(run, CPU)
    assert [type(engine) for engine in teacher.engines] == [OnnxEngine, NgramEngine, TorchEngine]
    expected_BTV = 0
    for member, weight in zip(run.members(), [0.5, 0.2, 0.3], strict=True):
        engine = load_engine(member)
        logits_BTV, _ = engine.logits(tokens_BT, engine.initial_state(2))
        expected_BTV = expected_BTV + weight * np.exp(log_probs(logits_BTV))
    probs_BTV, _ = teacher.read(tokens_BT, [engine.initial_state(2) for engine in teacher.engines], CPU)
    np.testing.assert_allclose(probs_BTV, expected_BTV, rtol=1e-4, atol=1e-6)


# Training


@pytest.fixture
def all_kept(monkeypatch):
    """Keep the whole vocabulary: then a pupil can learn nothing else than what the teacher says."""
    monkeypatch.setattr("ulimi.distill.KEPT", 1000)


def first_window(pupil, length=8):
    """What the first step of a trainer would see, the teacher heard."""
    pupil.lessons = pupil._hear(pupil.teacher, lambda: False)
    pupil._lay_out(pupil.lessons, 0, length)
    tokens_BT = torch.from_numpy(pupil.streams_BS[:, : length + 1].astype(np.int64))
    return tokens_BT[:, :-1], tokens_BT[:, 1:]


@pytest.mark.usefixtures("all_kept")
def test_who_knows_all_that_the_teacher_knows_has_nothing_to_learn(tmp_path, corpus, teacher_dir):
    run, gradients = open_run(teacher_dir), []
    shape = ("model.tie_weights=false", "model.hidden_size=40", "model.num_layers=1", *NO_DROPOUT, "loss.ar_alpha=0")
    for share in (1.0, 0.0):
        settings = (*shape, "loss.tar_beta=0", f"loss.teacher_share={share}", "optim.max_grad_norm=1e9")
        pupil = make_trainer(corpus, tmp_path / f"{share}", *settings, init_from=run, teacher=run)
        pupil.gradients(*first_window(pupil), pupil.state)
        gradients.append(max(p.grad.abs().max().item() for p in pupil.model.parameters()))
    assert gradients[0] < 2e-4 < 1e-2 < gradients[1]


@pytest.mark.usefixtures("all_kept")
def test_each_window_is_taught_what_the_teacher_says_of_it(tmp_path, corpus, teacher_dir):
    """Were the lessons a token beside the window anywhere, the gradients would not vanish there."""
    run, norms = open_run(teacher_dir), []
    settings = (
        "model.tie_weights=false", "model.hidden_size=40", "model.num_layers=1", *NO_DROPOUT, "loss.ar_alpha=0",
        "loss.tar_beta=0", "loss.teacher_share=1", "optim.lr=1e-12", "optim.weight_decay=0",
    )  # fmt: skip
    pupil = make_trainer(corpus, tmp_path / "run", *settings, init_from=run, teacher=run)
    take = pupil.take_gradients

    def noted(*args):
        result = take(*args)
        norms.append(max(p.grad.abs().max().item() for p in pupil.model.parameters()))
        return result

    pupil.take_gradients = noted
    pupil.run(5.0, False, lambda: False)
    assert len(norms) > 20
    assert max(norms) < 1e-3


@pytest.mark.usefixtures("all_kept")
def test_a_pupil_comes_nearer_to_its_teacher_than_the_text_alone_brings_it(tmp_path, corpus, teacher_dir):
    """What is asked is how near, on text that neither was trained on: the divergence of their predictions."""
    teacher = load_teacher(open_run(teacher_dir), CPU)
    distances = {}
    for share in (0.0, 1.0):
        run_dir = tmp_path / f"{share}"
        train(
            corpus, run_dir, tiny(*NO_DROPOUT, f"loss.teacher_share={share}", "optim.max_epochs=12", "optim.lr=2e-2"),
            teacher=open_run(teacher_dir),
        )  # fmt: skip
        run = open_run(run_dir)
        assert run.tokenizer.vocab_size == 330  # the teacher's, whatever the recipe says
        assert run.recipe["tokenizer"]["vocab_size"] == 330
        assert run.meta["teacher"] == {
            "path": str(teacher_dir.resolve()),
            "sha256": [sha256(teacher_dir / name) for name in (WEIGHTS, "model.onnx")],
        }
        ids = run.tokenizer.encode_lines(synthetic_lines(8, seed=77))
        tokens_BT = torch.tensor([[token for line in ids for token in line][:60]])
        states = [engine.initial_state(1) for engine in teacher.engines]
        wanted_NV = teacher.read(tokens_BT.numpy(), states, CPU)[0][0]
        with torch.no_grad():
            log_probs = torch.log_softmax(load_model(run, CPU)(tokens_BT).logits, dim=2)[0]
        distances[share] = F.kl_div(log_probs, wanted_NV, reduction="batchmean").item()
    assert distances[1.0] < 0.8 * distances[0.0]


@pytest.mark.usefixtures("all_kept")
def test_the_recorded_loss_is_that_of_the_mixed_targets(tmp_path, corpus, teacher_dir):
    pupil = make_trainer(
        corpus, tmp_path / "run", *NO_DROPOUT, "loss.teacher_share=0.25", teacher=open_run(teacher_dir)
    )
    inputs_BT, targets_BT = first_window(pupil)
    loss, _ = pupil.gradients(inputs_BT, targets_BT, pupil.state)
    teacher = load_teacher(open_run(teacher_dir), CPU)
    states = [engine.initial_state(4) for engine in teacher.engines]
    probs_NV = teacher.read(inputs_BT.numpy(), states, CPU)[0].flatten(0, 1)
    wanted_NV = 0.25 * probs_NV + 0.75 * F.one_hot(targets_BT.flatten(), 330)
    with torch.no_grad():
        logits_NV = pupil.model(inputs_BT, pupil.model.initial_state(4)).logits.flatten(0, 1)
    assert loss.item() == pytest.approx(F.cross_entropy(logits_NV, wanted_NV).item(), rel=1e-4)


@pytest.mark.parametrize("at", [3, 12, 40])
def test_a_pupil_stopped_and_resumed_is_the_one_that_was_not(tmp_path, corpus, ensemble_dir, at):
    """At 3 the teacher is still reading."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    train(corpus, whole, tiny(), teacher=open_run(ensemble_dir))
    with pytest.raises(Interrupted):
        train(corpus, pieces, tiny(), teacher=open_run(ensemble_dir), should_stop=stop_after(at))
    assert (at == 3) == (not (pieces / "metrics.jsonl").is_file() and read_checkpoint(pieces)[1]["step"] == 0)
    recipe = tiny("tokenizer.vocab_size=330")  # as recipe.toml says
    train(corpus, pieces, recipe, resume=True)
    assert_same_run(whole, pieces)
    assert len(set(open_run(whole).meta["teacher"]["sha256"])) == 4  # of two models of weights, a graph, counts


def test_the_teachers_time_is_part_of_the_run_and_its_progress_is_told(tmp_path, corpus, teacher_dir, monkeypatch):
    recorder = Recorder()
    pupil = make_trainer(corpus, tmp_path / "run", teacher=open_run(teacher_dir), reporter=recorder)
    clock = itertools.count(0, 20)
    monkeypatch.setattr("ulimi.train.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("ulimi.distill.READING_WINDOW", -(-pupil.streams_BS.shape[1] // 4))
    pupil._hear(pupil.teacher, lambda: False)
    assert pupil.progress.seconds == next(clock) - 20
    told = [note for note in recorder.notes if note.startswith("the teacher has read")]
    assert len(told) == 2
    assert told[0].startswith("the teacher has read 5")
    assert told[1].startswith("the teacher has read 100%")


def test_a_teacher_that_has_moved_is_asked_for_and_another_is_refused(tmp_path, corpus, teacher_dir):
    home, run_dir, recipe = tmp_path / "teacher", tmp_path / "run", tiny("tokenizer.vocab_size=330")
    shutil.copytree(teacher_dir, home)
    with pytest.raises(Interrupted):
        train(corpus, run_dir, recipe, teacher=open_run(home), should_stop=stop_after(5))
    moved = home.rename(tmp_path / "moved")
    said = refusal(lambda: train(corpus, run_dir, recipe, resume=True))
    assert said == f"the teacher of this run, {home}, is gone; say where it is now: --teacher RUN"
    for name in (WEIGHTS, "model.onnx"):
        stranger = Path(shutil.copytree(teacher_dir, tmp_path / f"stranger-{name}"))
        (stranger / name).unlink()
        said = refusal(
            lambda stranger=stranger: train(corpus, run_dir, recipe, resume=True, teacher=open_run(stranger))
        )
        assert "is not the model that this run has learnt from so far" in said
    train(corpus, run_dir, recipe, resume=True, teacher=open_run(moved))
    assert open_run(run_dir).meta["teacher"]["path"] == str(moved)
    assert math.isfinite(open_run(run_dir).meta["scores"]["valid"]["nats"])
    moved.rename(home)
    train(corpus, run_dir, recipe, resume=True)  # it is finished: nobody is asked
    said = refusal(lambda: train(corpus, run_dir, tiny("tokenizer.vocab_size=330", "optim.max_epochs=9"), resume=True))
    assert "is gone" in said


def test_a_teacher_that_cannot_be_loaded_leaves_no_run(tmp_path, corpus, teacher_dir):
    broken = Path(shutil.copytree(teacher_dir, tmp_path / "broken"))
    (broken / "model.onnx").unlink()
    (broken / WEIGHTS).write_bytes((broken / WEIGHTS).read_bytes()[:1000])
    assert WEIGHTS in refusal(lambda: train(corpus, tmp_path / "run", tiny(), teacher=open_run(broken)))
    assert not (tmp_path / "run").exists()
    train(corpus, tmp_path / "run", tiny("optim.max_epochs=1"), teacher=open_run(teacher_dir))


def test_a_teacher_without_its_counts_is_refused(tmp_path, corpus, ngram_dir):
    broken = Path(shutil.copytree(ngram_dir, tmp_path / "broken"))
    (broken / "ngram.npz").unlink()
    said = refusal(lambda: train(corpus, tmp_path / "run", tiny(), teacher=open_run(broken)))
    assert said == f"{broken}: no ngram.npz, which holds the counts of an n-gram model"
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_by_the_command_that_began_it(tmp_path, works, corpus_dir, teacher_dir):
    """The recipe says another tokenizer than the teacher's, which was taken."""
    (tmp_path / "recipe.toml").write_text(tiny("optim.max_epochs=1").to_toml())
    begun = (
        "train",
        corpus_dir,
        "-o",
        tmp_path / "run",
        "--recipe",
        tmp_path / "recipe.toml",
        "--teacher",
        teacher_dir,
    )
    works(*begun)
    works(*begun, "optim.max_epochs=2", "--resume")
    assert [row["epoch"] for row in open_run(tmp_path / "run").metrics()] == [1, 2]
    assert open_run(tmp_path / "run").recipe["tokenizer"]["vocab_size"] == 330


# The command line


def test_the_command_line_distils_and_says_so(tmp_path, works, corpus_dir, teacher_dir):
    run_dir = tmp_path / "pupil"
    recipe = [setting for setting in TINY if not setting.startswith("tokenizer")]
    done = works("train", corpus_dir, *recipe, "optim.max_epochs=1", "-o", run_dir, "--teacher", teacher_dir)
    assert "the teacher reads the training text" in done.err + done.out
    shown = works("info", run_dir)
    assert str(teacher_dir) in shown.out
    assert json.loads(works("info", run_dir, "--json").out)["teacher"]["path"] == str(teacher_dir.resolve())


def test_teachers_that_do_not_fit_are_one_line_and_leave_nothing(tmp_path, refused, corpus_dir, teacher_dir, tiny_run):
    out = tmp_path / "run"
    common = ("train", corpus_dir, "-o", out, "--teacher")
    assert "no run folder 'nowhere'" in refused(*common, "nowhere")
    assert "leave out --new-tokenizer" in refused(*common, teacher_dir, "--init-from", tiny_run.dir, "--new-tokenizer")
    assert "leave out the tokenizer settings" in refused(*common, teacher_dir, "tokenizer.kind=char")
    assert "another tokenizer than" in refused(*common, teacher_dir, "--init-from", tiny_run.dir)
    assert "not 'entmax'" in refused(*common, teacher_dir, "loss.kind=entmax")
    assert "teacher_share" in refused(*common, teacher_dir, "loss.teacher_share=1.5")
    assert not out.exists()
    begun = Path(shutil.copytree(teacher_dir, tmp_path / "begun"))
    for name in (WEIGHTS, "model.onnx"):
        (begun / name).unlink()
    assert "the first epoch of its training has not ended" in refused(*common, begun)
    assert not out.exists()
    alone = Path(shutil.copytree(tiny_run.dir, tmp_path / "alone"))
    said = refused("train", corpus_dir, "-o", alone, "--resume", "optim.max_epochs=3", "--teacher", teacher_dir)
    assert "has no teacher" in said


@pytest.mark.parametrize("teacher", ["ngram_dir", "isizulu", "sparse", "ensemble_dir"])
def test_every_kind_of_model_can_teach(tmp_path, works, request, corpus_dir, teacher):
    """An n-gram model, one that has no float weights, one that finds most tokens impossible, and several together."""
    if teacher == "sparse":
        works("train", corpus_dir, *TINY, "optim.max_epochs=1", "loss.kind=entmax", "-o", tmp_path / "sparse")
        teacher = tmp_path / "sparse"
    elif teacher != "isizulu":
        teacher = request.getfixturevalue(teacher)
    recipe = [setting for setting in TINY if not setting.startswith("tokenizer")]
    works("train", corpus_dir, *recipe, "optim.max_epochs=1", "-o", tmp_path / "run", "--teacher", teacher)
    run = open_run(tmp_path / "run")
    assert run.tokenizer.to_str() == open_run(Path(teacher)).tokenizer.to_str()
    assert run.recipe["tokenizer"]["vocab_size"] == run.tokenizer.vocab_size
    assert math.isfinite(run.meta["scores"]["valid"]["nats"])


def test_a_text_of_another_vocabulary_is_read_with_the_teachers_tokens(tmp_path, works, teacher_dir):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(line.upper() for line in synthetic_lines(150, seed=9)) + "\n")
    recipe = [setting for setting in TINY if not setting.startswith("tokenizer")]
    works("train", text, *recipe, "optim.max_epochs=1", "-o", tmp_path / "run", "--teacher", teacher_dir)
    assert open_run(tmp_path / "run").tokenizer.to_str() == open_run(teacher_dir).tokenizer.to_str()
    assert np.isfinite(open_run(tmp_path / "run").meta["scores"]["valid"]["nats"])
