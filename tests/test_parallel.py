"""Several processes: what goes round between them, and a training that they share."""

import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from conftest import TINY, refusal, synthetic_lines
from test_train import (
    NO_DROPOUT,
    Recorder,
    assert_same_run,
    make_corpus,
    make_trainer,
    read_checkpoint,
    stop_after,
    tiny,
)
from ulimi.info import summary
from ulimi.parallel import Group, started
from ulimi.run import WEIGHTS, open_run
from ulimi.train import Interrupted, train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """So little text that an epoch has about 30 steps."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), synthetic_lines(72, seed=4))


# What goes round


def parameters_of(rank):
    """The same shapes everywhere, each process with gradients of its own."""
    rng = torch.Generator().manual_seed(rank)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (5,), (1, 1, 4))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    return parameters


def talk(group, _):
    """What each process does in the test below; the first one gives what it has heard."""
    parameters = parameters_of(group.rank)
    heard = {}
    for _turn in range(2):  # the second one finds its memory laid out
        heard["loss"] = group.average_gradients(parameters, torch.tensor(float(group.rank)))
    gradients = torch.cat([parameter.grad.flatten() for parameter in parameters])
    heard["gradients"] = group.gather(gradients)
    heard["total"] = group.total(torch.tensor(10.0**group.rank, dtype=torch.float64)).item()
    heard["agreed"] = group.agree(group.rank == 0, group.rank == 1, True)
    heard["threads"] = group.gather(torch.tensor([torch.get_num_threads()]))
    ignores = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)]
    heard["ignores"] = group.gather(torch.tensor(ignores))
    heard["rows"] = group.gather(torch.tensor([*range(12)][group.rows(12)]))
    return heard


def test_three_processes_hear_one_another(capfd):
    with started(3, talk, None) as group:
        assert group.size == 3
        heard = talk(group, None)
    own = [torch.cat([parameter.grad.flatten() for parameter in parameters_of(rank)]) for rank in range(3)]
    mean = sum(own) / 3
    assert len(heard["gradients"]) == 3
    for gradients in heard["gradients"]:
        # To the bit, or their weights would part.
        assert torch.equal(gradients, heard["gradients"][0])
        torch.testing.assert_close(gradients, mean)
    assert heard["loss"] == 1
    assert heard["total"] == 111
    assert heard["agreed"] == [True, False, True]
    assert [threads.item() for threads in heard["threads"]] == [torch.get_num_threads()] * 3
    # Ctrl-C goes to all processes of a terminal, a batch system's SIGTERM to all of a job: the first one decides.
    assert [ignores.tolist() for ignores in heard["ignores"][1:]] == [[True, True], [True, True]]
    assert [rows.tolist() for rows in heard["rows"]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert capfd.readouterr() == ("", "")
    assert not active_children()


def test_one_process_is_a_group_that_sends_nothing():
    group, parameters = Group(), parameters_of(7)
    loss = torch.tensor(2.0)
    assert group.average_gradients(parameters, loss) is loss
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(parameters, parameters_of(7), strict=True))
    assert group.total(loss) is loss
    assert group.agree(True, False) == [True, False]
    assert group.gather(loss) == [loss]
    assert group.rows(5) == slice(0, 5)


def fail(group, how):
    if group.rank < group.size - 1:
        group.total(torch.zeros(1))  # and hears that the last one has hung up
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise how


def test_a_process_that_is_killed_ends_the_others_with_one_line():
    def wait():
        with started(3, fail, "killed") as group:
            group.total(torch.zeros(1))

    said = refusal(wait)
    assert "SIGKILL" in said
    assert "--resume" in said
    assert not active_children()


@pytest.mark.parametrize(("size", "error"), [(2, RuntimeError("can't allocate memory")), (3, ValueError("the cause"))])
def test_a_process_that_fails_says_how_and_the_others_do_not(size, error):
    with pytest.raises(RuntimeError, match=str(error)) as caught, started(size, fail, error) as group:
        group.total(torch.zeros(1))
    assert "hung up" not in str(caught.value)
    assert "in fail" in str(caught.value)
    assert not active_children()


class EndsAtOnce:
    """A process that is given this ends as it reads it."""

    def __init__(self, status):
        self.status = status

    def __reduce__(self):
        return os._exit, (self.status,)


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_that_never_begins_is_not_waited_for(status):
    def begin():
        with started(3, talk, EndsAtOnce(status)):
            pytest.fail("began")

    said = refusal(begin)
    assert f"ended with status {status} before it began" in said
    assert "__main__" in said
    assert not active_children()


def test_a_start_that_fails_halfway_leaves_no_process_behind(monkeypatch):
    starts = iter([BaseProcess.start, None])

    def start(process):
        begin = next(starts)
        if begin is None:
            raise OSError("too many open files")
        begin(process)

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", start)
    with pytest.raises(OSError, match="too many"), started(3, talk, None):
        pytest.fail("began")
    assert not active_children()


def test_a_group_that_the_program_has_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none99")
    with started(2, talk, None) as group:  # it is not asked what that leads to
        talk(group, None)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "none99"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert "of its own" in refusal(lambda: started(2, talk, None).__enter__())
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


SLEEPS = """
import time
import torch
from ulimi.info import summary
from ulimi.parallel import started
def work(group, _):
    time.sleep(600)
if __name__ == "__main__":
    with started(2, work, None) as group:
        print("began", flush=True)
        time.sleep(600)
"""


def test_nobody_outlives_the_first_process(tmp_path):
    """Whatever the others do, and though they ignore what ends a program."""
    script = tmp_path / "sleeps.py"
    script.write_text(SLEEPS)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, process_group=0) as process:
        assert process.stdout.readline() == "began\n"
        process.kill()
    assert ended(process.pid)


def test_whoever_fails_here_leaves_no_process_behind():
    with pytest.raises(KeyError), started(2, talk, None):
        raise KeyError
    assert not active_children()


# A training


@pytest.mark.parametrize("kind", ["adamw", "nt-asgd"])
def test_two_processes_without_dropout_do_what_one_does(tmp_path, corpus, kind):
    settings = {
        # Its rate falls with the share of all tokens that is done, and there are fewer stretches than processes.
        "adamw": (
            "optim.warmup_steps=40",
            "optim.average_share=0.3",
            "optim.final_lr_ratio=0.1",
            "data.eval_batch_size=1",
        ),
        # It clips at each step.
        "nt-asgd": ("optim.kind=nt-asgd", "optim.lr=8", "optim.max_grad_norm=0.05", "optim.average_at_start=true"),
    }[kind]
    recipe = tiny(*NO_DROPOUT, "data.eval_batch_size=5", "loss.ar_alpha=20", "loss.tar_beta=10", *settings)
    alone = train(corpus, tmp_path / "alone", recipe)
    shared = train(corpus, tmp_path / "shared", recipe, processes=2)
    assert shared["bits_per_char"] == pytest.approx(alone["bits_per_char"], rel=1e-4)
    first, second = (open_run(tmp_path / name) for name in ("alone", "shared"))
    assert len(second.metrics()) == len(first.metrics()) == 2
    for one, two in zip(first.metrics(), second.metrics(), strict=True):
        assert {key: two[key] for key in ("step", "tokens", "lr", "averaging", "best")} == {
            key: one[key] for key in ("step", "tokens", "lr", "averaging", "best")
        }
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert two["valid_nll"] == pytest.approx(one["valid_nll"], rel=1e-4)
    weights = load_file(first.dir / WEIGHTS)
    for name, weight in load_file(second.dir / WEIGHTS).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-2, atol=1e-3, msg=name)
    assert second.meta["machine"]["processes"] == 2
    assert "processes" not in first.meta["machine"]
    assert dict(summary(second))["machine"].endswith("threads: 1, processes: 2")
    assert not active_children()


def test_each_process_draws_its_own_masks(tmp_path, corpus):
    """With one mask for all, a second process would only do what a first one does."""
    reporter = Recorder()
    train(corpus, tmp_path, tiny("optim.max_epochs=1"), processes=2, reporter=reporter)
    assert any(note.endswith("on cpu, fp32, 2 processes") for note in reporter.notes)
    tensors, _ = read_checkpoint(tmp_path)
    assert not torch.equal(tensors["rng"], tensors["rng.1"])
    assert "rng.2" not in tensors
    assert tensors["state.0.h"].shape == (1, 4, 24)


def test_two_processes_stopped_and_resumed_are_the_uninterrupted_ones(tmp_path, corpus):
    recipe = tiny("optim.warmup_steps=40", "optim.average_share=0.3")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    train(corpus, whole, recipe, processes=2)
    with pytest.raises(Interrupted):
        train(corpus, pieces, recipe, processes=2, should_stop=stop_after(45))  # in the middle of the second epoch
    assert not active_children()
    train(corpus, pieces, recipe, processes=2, resume=True)
    assert_same_run(whole, pieces)


def test_a_run_may_go_on_with_more_processes_and_with_fewer(tmp_path, corpus):
    """Without dropout it makes no difference, so the states of all streams are where they belong."""
    recipe = tiny(*NO_DROPOUT, "optim.warmup_steps=40")
    alone = train(corpus, tmp_path / "alone", recipe)
    run_dir = tmp_path / "run"
    reporter = Recorder()
    for processes, stop in ((1, 10), (2, 30)):
        with pytest.raises(Interrupted):
            train(
                corpus, run_dir, recipe, processes=processes, resume=processes > 1, should_stop=stop_after(stop),
                reporter=reporter,
            )  # fmt: skip
    differ = [note for note in reporter.notes if "--processes" in note]
    assert differ == ["begun with --processes 1; 2 will draw other dropout masks"]
    score = train(corpus, run_dir, recipe, resume=True)
    assert score["bits_per_char"] == pytest.approx(alone["bits_per_char"], rel=1e-4)
    assert [row["step"] for row in open_run(run_dir).metrics()] == [
        row["step"] for row in open_run(tmp_path / "alone").metrics()
    ]


def test_each_process_has_its_streams_read_by_the_teacher(tmp_path, corpus):
    """Little of what it says is drawn where so few letters come, so that both trainings hear nearly the same."""
    chars = ("tokenizer.kind=char", "tokenizer.vocab_size=0", *NO_DROPOUT, "optim.max_epochs=1")
    train(corpus, tmp_path / "teacher", tiny(*chars))
    teacher = open_run(tmp_path / "teacher")
    recipe = tiny(*chars, "optim.seed=5", "loss.teacher_share=0.9")
    scores = []
    for processes in (1, 2):
        run_dir = tmp_path / f"by {processes}"
        scores.append(train(corpus, run_dir, recipe, teacher=teacher, processes=processes)["bits_per_char"])
    assert scores[1] == pytest.approx(scores[0], rel=2e-3)
    untaught = train(corpus, tmp_path / "untaught", tiny(*chars, "optim.seed=5"))["bits_per_char"]
    assert abs(untaught - scores[0]) > 5 * abs(scores[1] - scores[0])


def test_the_first_process_alone_writes(tmp_path, corpus, monkeypatch):
    train(corpus, tmp_path, tiny("optim.max_epochs=1"))

    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()
    other = make_trainer(corpus, tmp_path, "optim.max_epochs=2", resume=True, rank=1)
    other.run(0.0, False, lambda: False)  # a checkpoint is due after each step
    assert other.progress.epoch == 2
    assert contents() == before


def test_a_loss_that_is_not_finite_is_told_once(tmp_path, corpus, capfd):
    wild = tiny("optim.kind=sgd", "optim.lr=1e9", "optim.max_grad_norm=1e30")
    assert "the training loss is nan" in refusal(lambda: train(corpus, tmp_path / "run", wild, processes=2))
    assert capfd.readouterr() == ("", "")
    assert not active_children()


def test_a_finished_run_starts_no_process(tmp_path, corpus, monkeypatch):
    score = train(corpus, tmp_path, tiny("optim.max_epochs=1"))
    monkeypatch.setattr("ulimi.train.started", lambda *_: pytest.fail("started"))
    assert train(corpus, tmp_path, tiny("optim.max_epochs=1"), resume=True, processes=2) == score


# What users do wrong


@pytest.mark.parametrize(
    ("processes", "allowed"), [(3, "1, 2, 4"), (8, "1, 2, 4"), (0, "1 or more"), (-2, "1 or more")]
)
def test_a_number_that_does_not_share_the_streams_is_refused(tmp_path, corpus, processes, allowed):
    said = refusal(lambda: train(corpus, tmp_path / "run", tiny(), processes=processes))
    assert f"--processes {processes}" in said
    assert said.endswith(f"allowed: {allowed}")
    assert processes < 1 or "batch_size is 4" in said
    assert not (tmp_path / "run").exists()


def test_a_gpu_is_for_one_process(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("ulimi.train.choose_device", lambda name: torch.device("cuda"))
    assert "allowed on cuda: 1" in refusal(lambda: train(corpus, tmp_path / "run", tiny(), processes=2))
    assert not (tmp_path / "run").exists()


def test_the_command_line_refuses_before_it_makes_anything(tmp_path, corpus_dir, ulimi):
    out = tmp_path / "run"
    result = ulimi("train", corpus_dir, "--out", out, "--processes", 3, *TINY)
    assert result.code == 2
    assert result.err.startswith("ulimi: error: --processes 3: ")
    assert not out.exists()
    assert ulimi("train", corpus_dir, "--out", out, "--processes", 0, *TINY).code == 2


def ended(group):
    """Tell whether soon nobody is left of a process group."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def wait_for_an_epoch(process, run_dir):
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


def command(corpus_dir, out, *more):
    code = (
        "import ulimi.train\nulimi.train.CHECK_EVERY = 1\nfrom ulimi.cli import main\nif __name__ == '__main__': main()"
    )
    script = out.parent / "ulimi.main.py"
    script.write_text(code)
    return [sys.executable, script, "train", corpus_dir, "--out", out, "--processes", "2", "--threads", "1", *more]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_signal_to_all_of_them_stops_with_a_checkpoint_and_says_how_to_go_on(tmp_path, corpus_dir):
    out = tmp_path / "run"
    with subprocess.Popen(
        command(corpus_dir, out, *TINY, "optim.max_epochs=500"), stderr=subprocess.PIPE, text=True,
        process_group=0,
    ) as process:  # fmt: skip
        wait_for_an_epoch(process, out)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "--resume" in said
    assert "--processes 2" in said
    assert ended(process.pid)
    assert "rng.1" in read_checkpoint(out)[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_process_is_told_in_one_line_and_the_run_goes_on(tmp_path, corpus_dir, works):
    out = tmp_path / "run"
    with subprocess.Popen(
        command(corpus_dir, out, *TINY, "optim.max_epochs=500"), stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_an_epoch(process, out)
        pids = (int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        (helper,) = (pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(helper, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2, said
    (error,) = re.findall(r"^ulimi: error: .*", said, re.MULTILINE)
    assert "SIGKILL" in error
    assert "Traceback" not in said
    done = len(open_run(out).metrics())
    works("train", corpus_dir, "--out", out, "--resume", f"optim.max_epochs={done + 1}")
    assert len(open_run(out).metrics()) == done + 1
