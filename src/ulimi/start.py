"""What a training starts from: its folder and the run in it, another model's weights, a teacher, a device.

Whatever is wrong with these is said before anything is written.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ulimi.cpu import has_bfloat16
from ulimi.cuda import PRECISIONS
from ulimi.engine import read_weights
from ulimi.errors import UlimiError
from ulimi.model import AWDLSTM
from ulimi.provenance import describe_machine
from ulimi.recipe import SIZES, Recipe, build_recipe, changed_keys
from ulimi.run import CHECKPOINT, SOURCE_CARD, Run, open_run, refuse_file, refuse_foreign
from ulimi.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

RESUMABLE_CHANGES = ("optim.max_epochs", "optim.patience")
"""settings that a resumed run may change: they decide when it ends, not what a step does (AdamW's cosine excepted)"""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep a second training out of a run folder until the block ends.

    Raises:
        UlimiError: another training is writing to it.
    """
    is_new = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK
    with path.open("w") as file:
        try:
            # flock is let go by the system when a process dies, however it dies; Windows has none, and no lock here.
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UlimiError(f"another training is writing to {run_dir}; wait for it, or give another --out") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):  # it is not empty: there is a run now
                    run_dir.rmdir()


def check_processes(processes: int, recipe: Recipe, device: torch.device) -> None:
    """Refuse a number of processes that cannot share a training.

    Raises:
        UlimiError: there are none, the streams do not divide by it, or it is for a GPU.
    """
    if processes < 1:
        raise UlimiError(f"--processes {processes}: allowed: 1 or more")
    if processes > 1 and device.type != "cpu":
        raise UlimiError(f"--processes {processes}: allowed on {device.type}: 1; several are for --device cpu")
    batch_size = recipe.data.batch_size
    if batch_size % processes:
        allowed = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise UlimiError(
            f"--processes {processes}: each gets as many streams, and data.batch_size is {batch_size}; allowed: "
            + ", ".join(map(str, allowed))
        )


def claim_folder(run_dir: Path, recipe: Recipe, *, resume: bool, init_from: Run | None) -> Run | None:
    """Decide whether the run folder may be written to; give the run in it when resuming. Changes nothing.

    Raises:
        UlimiError: the folder holds a run, or none, or something else, or `recipe` does not go on with its run.
    """
    refuse_file(run_dir)
    if init_from is not None and run_dir.exists() and run_dir.resolve() == init_from.dir.resolve():
        raise UlimiError(f"--out {run_dir} is the run that --init-from names; it would be overwritten")
    if init_from is not None:
        init_from.need_network("--init-from")
        _ = init_from.weights_path  # are there any yet?
        _check_sizes(init_from, recipe)
    has_run = (run_dir / CHECKPOINT).is_file()
    if resume:
        if not has_run:
            raise UlimiError(f"nothing to resume in {run_dir}: it holds no {CHECKPOINT}")
        old = open_run(run_dir)
        changed = changed_keys(build_recipe(old.recipe, source=f"{run_dir}/recipe.toml"), recipe)
        if fixed := [key for key in changed if key not in RESUMABLE_CHANGES]:
            raise UlimiError(
                f"{', '.join(fixed)}: differs from the run in {run_dir}; with --resume only "
                f"{' and '.join(RESUMABLE_CHANGES)} may change; for other settings start a new run"
            )
        # Its recipe would say what is not so.
        if "optim.max_epochs" in changed and (done := len(old.metrics())) > recipe.optim.max_epochs:
            raise UlimiError(
                f"optim.max_epochs is {recipe.optim.max_epochs}; the run in {run_dir} has {done} epochs: allowed: "
                f"{done} or more"
            )
        return old
    if has_run:
        raise UlimiError(f"{run_dir} already holds a run: continue it with --resume, or give another --out")
    # Before its first checkpoint a run has only these.
    refuse_foreign(run_dir, {"corpus", LOCK}, {"recipe.toml", "last", SOURCE_CARD})
    return None


def _check_sizes(source: Run, recipe: Recipe) -> None:
    """Refuse a network of other sizes than the one that it is to start from."""
    own = recipe.model.model_dump()
    for key in SIZES:
        # Older runs know nothing of rounds. A network without them may be given some, of any rank.
        is_new = key.startswith("mogrifier") and not source.config.get("mogrifier_rounds")
        if not is_new and (theirs := source.config.get(key)) != own[key]:
            raise UlimiError(
                f"--init-from {source.name}: its network has other sizes: model.{key} is {theirs} there, "
                f"{own[key]} here"
            )


def find_teacher(given: Run | None, old: Run | None, init_from: Run | None, recipe: Recipe) -> Run | None:
    """Give the teacher of a run: the one that is named, or, when resuming, the one that the run remembers.

    Raises:
        UlimiError: it is not the run's, or does not go with its tokenizer or its loss.
    """
    known = old.meta.get("teacher") if old is not None else None
    if old is not None and known is None:
        if given is not None:
            raise UlimiError(f"--teacher {given.dir}: the run in {old.dir} has no teacher; leave out --teacher")
        return None
    if old is not None and old.meta.get("training", {}).get("epochs", 0) >= recipe.optim.max_epochs:
        return None  # it is finished
    teacher = given
    if known is not None and teacher is None:
        if not Path(known["path"]).is_dir():
            raise UlimiError(f"the teacher of this run, {known['path']}, is gone; say where it is now: --teacher RUN")
        teacher = open_run(Path(known["path"]))
    if teacher is None:
        return None
    hashes = teacher.model_sha256  # also of a new run's: is the model there?
    if known is not None and hashes != known.get("sha256"):
        raise UlimiError(f"--teacher {teacher.dir}: is not the model that this run has learnt from so far")
    start = old or init_from or teacher
    if start.tokenizer.to_str() != teacher.tokenizer.to_str():
        raise UlimiError(
            f"--teacher {teacher.dir}: has another tokenizer than {start.dir}; both must have the same one"
        )
    if recipe.loss.kind != "cross_entropy":
        raise UlimiError(f"--teacher needs loss.kind = 'cross_entropy', not {recipe.loss.kind!r}")
    return teacher


def place(run: Run) -> str:
    """Say where a run is to be found again: of the hub, as it was then."""
    return str(run.dir.resolve()) if run.origin is None else f"{run.origin.split('@')[0]}@{run.dir.name}"


def adopt_weights(model: AWDLSTM, tokenizer: Tokenizer, source: Run, rng: np.random.Generator | None = None) -> None:
    """Start from another run's best weights; pieces that its tokenizer lacks get the mean vector.

    A Mogrifier may start from plain LSTMs: each round's second matrix is 0 then, its scale 1, so that it computes what
    they do until it has learnt something else. `rng` is that of `ulimi.graph_weights.read_graph_weights`.

    Raises:
        UlimiError: the weights are not of these sizes.
    """
    weights = read_weights(source, rng)
    own = dict(model.named_parameters())
    old_vocab, new_vocab = source.tokenizer.backend.get_vocab(), tokenizer.backend.get_vocab()
    same_tokens = old_vocab == new_vocab
    per_token = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    grown = {n for n in own if ".rounds." in n} if not any(".rounds." in n for n in weights) else set()
    if set(weights) != set(own) - grown or any(
        weights[n].shape[n in per_token :] != own[n].shape[n in per_token :] for n in weights
    ):
        raise UlimiError(f"--init-from {source.name}: {source.weights_path} does not fit its config.json")
    with torch.no_grad():
        for name, parameter in own.items():
            if name in grown:
                if name.endswith(".1.weight"):
                    parameter.zero_()
                continue
            old = weights[name].to(parameter.device)
            if name in per_token and not same_tokens:
                parameter.copy_(old.mean(dim=0, keepdim=True).expand_as(parameter))
                shared = [(new, old_vocab[piece]) for piece, new in new_vocab.items() if piece in old_vocab]
                into, out_of = (torch.tensor(column, device=parameter.device) for column in zip(*shared, strict=True))
                parameter[into] = old[out_of]
            else:
                parameter.copy_(old)


def choose_precision(name: str, device: torch.device) -> str:
    """Turn "auto" or one of `PRECISIONS` into what the device can do.

    Raises:
        UlimiError: it cannot, or there is no such precision.
    """
    allowed: tuple[str, ...] = ("fp32", "bf16")
    has_bf16 = device.type == "cpu" and has_bfloat16()
    if device.type == "cuda":
        # Before Ampere a GPU has neither TF32 nor bf16, which the loss of fp16 needs, too.
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        allowed = PRECISIONS if has_bf16 else ("fp32",)
    if name == "auto":
        return "bf16" if has_bf16 else "fp32"
    if name not in allowed:
        raise UlimiError(f"--precision {name}: allowed on {device.type}: auto, {', '.join(allowed)}")
    return name


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name what a figure was measured on, PyTorch included."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {**describe_machine(torch.get_num_threads(), name), "torch": torch.__version__}
