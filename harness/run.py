"""A run's folder and what happens beside the training.

    folder = RunFolder(...)              # made or resumed, locked; restores the optimizer
    monitor = Monitor(...)               # progress, unreadable images, numbers that are not finite, requests to stop

Both are plain objects that a training loop calls, that of train.py and that of downstream/segment.py.
"""
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from harness.checkpoint import CHECKPOINT, load_optimizer, read_checkpoint, validate
from harness.files import read_bytes
from harness.flags import InputError, flags_of, nonempty, overrides, plural, printable, require, shorten
from harness.processes import (DEVICES, PREEMPTED, all_gather, at_stake, default_workers, ignore_signals, is_rank_0,
                               on_rank_0, print_rank0, processor, progress, shut_down, stop_requests, write_lock)
from model import Config

FILES = ("config.json", "metrics.jsonl", "last.pt", "prev.pt", "best.pt")    # of a run's folder


@dataclass
class Machine:
    """Hardware and output; affects results only by rounding."""
    out: str = ""                # the run's folder; default: NAME-N below out/, N the next free number
    device: str = "auto"         # auto takes a GPU where there is one
    compile: bool = False        # torch.compile the model
    recompute: bool = False      # activation checkpointing of each block: less memory, more time
    deterministic: bool = False  # on GPUs, too, the same command gives the same run, bit for bit; slower
    workers: int = default_workers()   # data-loading workers per rank
    save_every: int = 0          # iterations between two checkpoints; one is also made after each epoch


def add_eval_flags(parser):
    """The flags that programs share which evaluate a model."""
    parser.add_argument("--data", type=nonempty, help="a data set or a folder with val/CLASS/IMAGE; default: the run's")
    parser.add_argument("--soft-mask", type=float, help="alpha for the checkpoint's, from 1 (bidirectional) to 0")
    parser.add_argument("--batch-size", type=int, default=256, help="batch size (per rank)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="data-loading workers per rank")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto takes a GPU where there is one")


def find_checkpoint(given, *parts, out="out"):
    """(path, checkpoint) that --resume means, the newest that is intact; (None, None) if nothing has been saved yet.
    `parts` are the dataclasses of the checkpoint's state, run and recipe."""
    if "resume" not in given:
        return None, None
    require(not (given["resume"] and "out" in given),
            f"--resume {given['resume']} continues in that folder: drop --out")
    explicit = given["resume"] or given.get("out")
    root = Path(explicit or out)
    if root.is_file():
        return root, check_run(read_checkpoint(root), root, *parts)
    names = "last.pt", "prev.pt"                     # by age: whatever time a copied file bears
    folders = [root] if explicit else [root, *root.glob("*")]
    found = [path for name in names for path in (folder / name for folder in folders) if path.exists()]
    require(found or not given["resume"], f"--resume {root}: no checkpoint there; check the path, or give --out {root} "
            "--resume, which starts where nothing has been saved")
    if not found:
        return None, None
    folder, errors = max(found, key=lambda path: path.stat().st_mtime).parent, []
    if is_rank_0() and (folder / ".lock").exists():
        held = lock(folder)                          # an error while another process writes what is read here
        if held:
            held.close()
    for path in (folder / name for name in names if folder / name in found):
        try:
            checkpoint = read_checkpoint(path)
        except InputError as error:                  # it is damaged
            errors.append(str(error))
            continue
        if errors:
            print_rank0(f"warning: resuming from {path}, the one before, for {'; '.join(errors)}", sys.stderr)
        return path, check_run(checkpoint, path, *parts)
    raise InputError(f"no checkpoint in {folder} is intact ({'; '.join(errors)}): restore one, or start anew")


def check_run(checkpoint, path, state, run, recipe):
    """The checkpoint, if it is of such a run. InputError for another."""
    if isinstance(checkpoint.get("run"), dict):
        checkpoint["run"].pop("select", None)            # a flag of earlier versions
    if isinstance(checkpoint.get("recipe"), dict):
        segments, should = "head" in checkpoint["recipe"], "head" in {field.name for field in fields(recipe)}
        require(segments == should, f"{path} is a run of {'downstream.segment' if segments else 'train.py'}: resume it "
                "with that program, or start from its weights with --init-from")
    validate(checkpoint, CHECKPOINT | {field.name: field.type for field in fields(state)} | dict(
        run=run, recipe=recipe, classes=list, train_images=int, ranks=int, optimizer=dict, scaler=dict), path)
    return checkpoint


def check_data(run, recipe, cfg, state, train, val, checkpoint):
    """InputError if there are too few images, if they are not those of the run to resume, or if ranks differ: through a
    file that not all nodes have, or a flag given to some of them."""
    compare_flags(run)
    images = images_of(train, val)
    require(len(train) >= recipe.batch_size, f"--data {run.data} has {len(train)} training images, less than one "
            f"--batch-size {recipe.batch_size}: make it smaller")
    if checkpoint:
        require(list(train.classes) == checkpoint["classes"], f"--data {run.data} has the classes "
                f"{shorten(train.classes)}, but the run to resume had {shorten(checkpoint['classes'])}: give the data "
                "that it was started with")
        require(len(train) == checkpoint["train_images"], f"--data {run.data} has {len(train)} training images, but "
                f"the run to resume had {checkpoint['train_images']}: give the data that it was started with")
        total = getattr(recipe, "iterations", None) or recipe.epochs * (len(train) // recipe.batch_size)
        require(state.iteration <= total, f"the checkpoint is at iteration {state.iteration:,} of {total:,}: use "
                "another one")
        require(checkpoint.get("images", images) == images, f"--data {run.data} has images of other names than the run "
                "to resume had, or other validation images: give the data that it was started with")
    compare_ranks(asdict(state) | asdict(cfg) | asdict(recipe) | dict(
        train_images=len(train), test_images=len(val), classes=train.classes, images=images))


def images_of(train, val):
    """A hash of how many images there are and of their files' names: what tells one data set from another."""
    digest = hashlib.sha256(f"{len(train)} {len(val)}".encode())
    for source in (train, val):
        digest.update(getattr(source, "names", np.array([])).tobytes())      # drawn and downloaded ones have none
    return digest.hexdigest()


def compare_flags(run):
    """InputError if ranks were given different flags: before anything that they do in turn, or they would wait."""
    data = "" if Path(run.data).exists() else run.data                       # a folder may have two paths
    compare_ranks(asdict(run) | dict(data=data))


def compare_ranks(mine):
    first, *others = all_gather(mine)
    for rank, theirs in enumerate(others, 1):
        for name in mine:
            require(theirs[name] == first[name], f"{name} is {first[name]!r} on rank 0, but {theirs[name]!r} on rank "
                    f"{rank}: give all nodes the same data and flags, and a folder for --out and --resume that they "
                    "share")


def settings_of(run, recipe, cfg, train, val, world):
    """What config.json and each checkpoint say of a run: plain types."""
    return dict(run=asdict(run), recipe=asdict(recipe), config=asdict(cfg), classes=list(train.classes),
                train_images=len(train), images=images_of(train, val), ranks=world)


def name_of(settings):
    """SIZE-STEP-DATA of a run's folder, with the flags on top of the step, and its head if it has one."""
    run, recipe = settings["run"], settings["recipe"]
    changes = flags_of(overrides(Config(**settings["config"]), run["size"], run["step"]))
    head = f"-{recipe['head']}" if "head" in recipe else ""
    return f"{run['size']}-{run['step']}{changes}-{Path(run['data']).name}{head}".replace(" --", "-").replace(" ", "-")


def make_folder(out, name, resume):
    """The run's folder. Without `out`: out/NAME-N, N the first free number."""
    try:
        existing = FILES[1:] if resume else FILES        # a run that died before its first checkpoint left config.json
        require(not out or not any(Path(out, file).exists() for file in existing),
                f"--out {out} holds another run: give another folder, or add --resume to continue it")
        if out:
            Path(out).mkdir(parents=True, exist_ok=True)
            return Path(out)
        Path("out").mkdir(exist_ok=True)                                        # an error if it is a link to nothing
        for number in itertools.count(1):
            with suppress(FileExistsError):
                folder = Path("out", f"{name}-{number}")
                folder.mkdir(parents=True)
                return folder
    except OSError as error:
        raise InputError(f"--out {out or 'out'} cannot be made ({error.strerror}): give another folder") from error


def device_line(dtype, machine, device):
    parts = [processor(device), dtype]
    if device.type == "cuda" and dtype == "float32":
        parts.append(f"TF32 {'on' if torch.backends.cudnn.allow_tf32 else 'off'}")
    if machine.compile:
        parts.append("compiled")
    if machine.recompute:
        parts.append("activation checkpointing")
    return f"device  {', '.join(parts)}"


def lock(folder):
    """Lock the run's folder for this process: the open file that holds the lock, or None where there are no locks.
    InputError if another process has it."""
    try:
        import fcntl                                     # not on Windows
    except ImportError:
        return None
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise InputError(f"{folder} is being trained by {file.read() or 'another process'}: wait until that has ended; "
                         f"if it has, delete {file.name}") from error
    except OSError:                                      # a file system without locks
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def write(path, content, previous=None):
    """Write bytes so that the file is intact at any moment, old or new; the old one is kept as `previous`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with write_lock:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):                          # on a read-only file system
            temporary.unlink()
        raise InputError(f"{path} cannot be written ({error.strerror}): make room for it, then go on with --resume; "
                         "what was saved before is intact") from error


def store(checkpoint, path, previous=None):
    """Write a checkpoint as write() does."""
    buffer = io.BytesIO()                                # through memory: torch.save into a full disk hides the reason
    torch.save(checkpoint, buffer)
    write(path, buffer.getbuffer(), previous)


def append_row(row, file=None):
    """Print a dict as a line of JSON, and append it to a file."""
    line = json.dumps(row)
    print(line, flush=True)
    if file:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as rows:
            rows.write(line + "\n")


class RunFolder:
    """The folder of a run. What is to be saved is given once; save() and log() write it, on rank 0 alone.

    path, checkpoint: of find_checkpoint(). settings: of settings_of(), for config.json and each checkpoint. state: a
    dataclass with iteration, epoch and the best score, best_*.
    """

    def __init__(self, given, path, checkpoint, settings, state, model, optimizer, scaler, below=""):
        self.settings, self.state, self.model, self.optimizer, self.scaler = settings, state, model, optimizer, scaler
        self.file, self.checkpoint, self.resuming = path, checkpoint, "resume" in given
        self.n_parameters = sum(p.numel() for p in model.parameters())
        if checkpoint:
            load_optimizer(optimizer, checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"])
        name = Path(below, name_of(settings))
        self.path = path.parent if path else on_rank_0(make_folder, given.get("out", ""), name, self.resuming)
        self.rows = on_rank_0(self.prepare, path and Path(given["resume"] or "") == path)
        if not (self.path / "best.pt").exists():         # last.pt was copied without it
            for field in fields(state):
                if field.name.startswith("best_"):
                    setattr(state, field.name, -1.0)

    def prepare(self, explicit):
        """Put the folder in order before training; returns the rows of metrics.jsonl of the epochs done."""
        self.lock = lock(self.path)
        for name in FILES:                               # of a process that was killed while it wrote
            (self.path / f"{name}.tmp").unlink(missing_ok=True)
        if self.file and self.file.name == "prev.pt" and not explicit:
            os.replace(self.file, self.path / "last.pt") # or the next save would put a damaged last.pt in its place
        write(self.path / "config.json", json.dumps(self.settings, indent=1).encode())
        try:
            return read_bytes(self.path / "metrics.jsonl").splitlines()[: self.state.epoch]
        except FileNotFoundError:
            return []

    def announce(self, usual, machine, device, train, val, micro_batch, notes, epochs, per_epoch, period="epoch"):
        """Print what the run is, how and where, and what it starts from. `usual` is the recipe before flags changed it,
        `notes` say what had to be adapted of the weights; an epoch, or another period, ends with an evaluation."""
        run, recipe, world = (self.settings[name] for name in ("run", "recipe", "ranks"))
        cfg = Config(**self.settings["config"])
        head = f", head {recipe['head']}" if "head" in recipe else ""
        changes = flags_of(overrides(cfg, run["size"], run["step"]))
        print_rank0(f"model   {run['size']}, step {run['step']}{changes}{head}: {self.n_parameters:,} parameters, "
                    f"{cfg.img_size} x {cfg.img_size} pixels in patches of {cfg.patch_size}, {cfg.tokens} tokens, "
                    f"mask {cfg.mask}")
        print_rank0(f"data    {run['data']}: {len(train):,} images to train, {len(val):,} to test, "
                    f"{len(train.classes)} classes")
        parts = (plural(world, "rank"), plural(recipe["batch_size"] // world // micro_batch, "micro-batch", "es"),
                 plural(micro_batch, "image"))
        usual = asdict(usual)
        changes = flags_of({name: value for name, value in recipe.items() if value != usual[name]})
        print_rank0(f"batch   {recipe['batch_size']} = {' x '.join(parts)}; recipe {run['recipe']}{changes}: "
                    f"{plural(epochs, period)} of {plural(per_epoch, 'iteration')}")
        print_rank0(device_line(run["dtype"], machine, device))
        if not self.checkpoint:
            if run["init_from"]:
                print_rank0(f"init    {'; '.join(['weights of ' + run['init_from'], *notes])}")
            print_rank0(f"run     {self.path}" + (", nothing to resume" if self.resuming else ""))
            return
        print_rank0(f"resume  {self.file} at iteration {self.state.iteration:,} of {epochs * per_epoch:,}"
                    + (", finished" if self.state.epoch == epochs else ""))
        if self.checkpoint["ranks"] != world:
            print_rank0(f"ranks   {self.checkpoint['ranks']} before, {world} now: what is drawn by rank, and rounding, "
                        "will differ")

    def save(self, improved=False):
        """Write last.pt, keeping the one before as prev.pt; and best.pt if `improved`. InputError on all ranks if the
        last update made weights infinite."""
        finite = torch.stack([p.isfinite().all() for p in self.model.parameters()]).all()
        require(finite, f"weights are not finite after iteration {self.state.iteration}, which was not saved: try a "
                "smaller --lr or --dtype float32")
        if not is_rank_0():
            return
        weights = self.settings | asdict(self.state) | dict(model=self.model.state_dict())
        if improved:
            store(weights, self.path / "best.pt")
        moments = self.optimizer.state_dict()["state"]
        checkpoint = weights | dict(optimizer=moments, scaler=self.scaler.state_dict())
        store(checkpoint, self.path / "last.pt", self.path / "prev.pt")

    def log(self, row):
        """Add a line to metrics.jsonl."""
        self.rows.append(json.dumps(row).encode())
        if is_rank_0():
            write(self.path / "metrics.jsonl", b"".join(row + b"\n" for row in self.rows))

    def unlock(self):
        if is_rank_0():
            (self.path / ".lock").unlink(missing_ok=True)

    def end_early(self):
        """End a run that was asked to stop and has saved itself."""
        self.unlock()
        print_rank0(f"preempted at iteration {self.state.iteration}; go on with --resume {shlex.quote(str(self.path))}")
        if dist.is_initialized():
            dist.barrier()                               # or torchrun would end rank 0 because another rank has ended
        ignore_signals()                                 # they are sent until a process has ended
        sys.exit(PREEMPTED)

    def finish(self, best, program, data):
        """Print how good the best weights are and, if a `program` can, how to evaluate them; and leave the folder and
        the other ranks."""
        file = self.path / "best.pt"
        if file.exists():
            best = f"{best} in {file}"
        else:                                            # of a finished run's last.pt, copied without it
            best = file = self.path / "last.pt"
        command = f"; evaluate it: {program} {shlex.quote(str(file))} --data {shlex.quote(data)}" if program else ""
        print_rank0(f"done    {best}{command}")
        self.unlock()
        shut_down()


class Monitor:
    """Watches a run: progress, waiting for data, images that cannot be read, losses that are not finite, and requests
    to stop. Rank 0 shows a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, started, state, batch_size, losses, n_images, folder):
        """started: when the program did; losses: how many a loss of check() is the sum of, over micro-batches and
        ranks; n_images: of an epoch."""
        self.started, self.state, self.batch_size, self.losses, self.folder = started, state, batch_size, losses, folder
        self.most_unreadable = min(n_images - 1, max(10, n_images // 100))
        self.n_images, self.waited, self.unreadable, self.stopping = n_images, 0.0, 0, False

    def watch(self, batches):
        """(images, labels) of a loader's batches, timed; read errors are counted, each printed once by rank."""
        return self.watched(iter(batches))               # now, as a loader's start draws from torch's generator

    def watched(self, batches):
        warned = set()
        while True:
            start = time.perf_counter()
            images, labels, errors = next(batches)
            self.waited += time.perf_counter() - start
            for error in errors:
                self.unreadable += bool(error)
                if error and error not in warned:
                    warned.add(error)
                    tqdm.write(f"warning: {printable(error)}; until then the next one takes its place", sys.stderr)
            yield images, labels

    def check(self, loss, grad_norm, scaler):
        """Mean over micro-batches and ranks of this rank's sum over its micro-batches: beside the gradients the one
        exchange of an iteration, and its only wait for the device. InputError on all ranks if a loss or gradient is not
        finite on one, or too many images are not read."""
        counts = [torch.full_like(loss, count) for count in (self.unreadable, len(stop_requests))]
        sums = torch.stack([loss, grad_norm, *counts])
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, grad_norm, unreadable, stops = sums.tolist()
        finite = math.isfinite(loss) and (math.isfinite(grad_norm) or scaler.is_enabled())    # a GradScaler skips those
        require(finite, f"the loss or its gradient is not a finite number at iteration {self.state.iteration}; it was "
                f"not applied, and {self.folder.path} holds the run as it was last saved: try a smaller --lr or "
                "--dtype float32")
        self.state.unreadable += int(unreadable)
        require(self.state.unreadable <= self.most_unreadable, f"more than {self.most_unreadable:,} of "
                f"{self.n_images:,} training images cannot be read: see the warnings, and replace or remove them")
        self.unreadable, self.stopping, self.loss = 0, stops > 0, loss / self.losses
        return self.loss

    def start(self, title, done, total):
        """Begin an epoch of which so many iterations are done."""
        at_stake.set()
        self.title, self.done, self.total = title, done, total
        self.began = self.shown = time.perf_counter(), done, self.waited     # when, iterations, seconds without data
        self.bar = progress(None, title, total=total, initial=done)

    def speed(self, since):
        """Images/s, and the fraction of the time spent waiting for data, since a mark."""
        then, before, waited = since
        seconds = max(time.perf_counter() - then, 1e-9)
        return (self.done - before) * self.batch_size / seconds, (self.waited - waited) / seconds

    def update(self, lr, alpha=None):
        """After an iteration."""
        self.done += 1
        self.bar.update()
        if time.perf_counter() - self.shown[0] > (10 if self.bar.disable else 1):
            rate, waiting = self.speed(self.shown)
            mask = "" if alpha is None else f"alpha {alpha:.3f}  "
            hint = "; more --workers may help" if waiting > 0.2 else ""
            text = f"loss {self.loss:.4f}  lr {lr:.2e}  {mask}{rate:,.0f} images/s, data wait {waiting:.0%}{hint}"
            self.bar.set_postfix_str(text)
            if self.bar.disable:
                print_rank0(f"{self.title}  {self.done}/{self.total}  {text}")
            self.shown = time.perf_counter(), self.done, self.waited

    def end(self):
        """End of the epoch's training."""
        self.bar.close()
        self.of_epoch = self.speed(self.began)

    def times(self):
        """Fields of a row of metrics: seconds since the start; images/s and the fraction of waiting over the epoch; and
        what it ran on."""
        rate, waiting = self.of_epoch
        device = next(self.folder.model.parameters()).device
        return dict(time_s=time.perf_counter() - self.started, time_images_per_s=rate, time_waiting=waiting,
                    time_device=processor(device), time_torch=torch.__version__)
