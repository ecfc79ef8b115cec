"""A run's folder, and what happens beside the training.

    folder = RunFolder(given, architecture)      # finds the run to resume: folder.checkpoint
    folder.check(settings, state)                # the same on all ranks, and as in the checkpoint
    folder.open(model, optimizer, scaler)        # makes or locks the folder, restores the optimizer
    monitor = Monitor(folder, started, losses)   # progress, losses that are not finite, signals

Both are plain objects that a training loop calls, train.py's and that of downstream/segment.py.
"""
import io
import itertools
import json
import math
import os
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from harness.checkpoint import load_optimizer, read_checkpoint, require_keys
from harness.flags import InputError, flags_of, nonempty, overrides, plural, require, shorten
from harness.processes import (DEVICES, PREEMPTED, all_gather, default_workers, ignore_signals,
                               is_rank_0, on_rank_0, print_rank0, processor, progress, shut_down,
                               stop_on_signals, stop_requests)
from model import Config

FILES = ("config.json", "metrics.jsonl", "last.pt", "best.pt")           # of a run's folder
RESUMABLE = ("run", "recipe", "config", "classes", "train_images", "ranks", "iteration", "epoch",
             "loss_sum", "model", "optimizer", "scaler")                 # what last.pt holds


@dataclass
class Machine:
    """Hardware and output; affects results only by rounding."""
    out: str = ""                # the run's folder; default: out/NAME-N, N the next free number
    device: str = "auto"         # auto takes a GPU where there is one
    compile: bool = False        # torch.compile the model
    recompute: bool = False      # activation checkpointing of each block: less memory, more time
    deterministic: bool = False  # on GPUs, too, the same command gives the same bits; slower
    workers: int = default_workers()   # data-loading workers per rank
    save_every: int = 0          # iterations between two checkpoints; each epoch ends with one, too


def add_eval_flags(parser):
    """The flags that programs share which evaluate a model."""
    parser.add_argument("--data", type=nonempty,
                        help="a data set or a folder with val/CLASS/IMAGE; default: the run's")
    parser.add_argument("--alpha", type=float,
                        help="of the soft mask, for the checkpoint's: from 1 (bidirectional) to 0")
    parser.add_argument("--batch-size", type=int, default=256, help="batch size (per rank)")
    parser.add_argument("--workers", type=int, default=default_workers(),
                        help="data-loading workers per rank")
    parser.add_argument("--device", choices=DEVICES, default="auto",
                        help="auto takes a GPU where there is one")


def settings_of(run, recipe, cfg, train, val, world):
    """What config.json and each checkpoint say of a run: plain types."""
    return dict(run=asdict(run), recipe=asdict(recipe), config=asdict(cfg), ranks=world,
                classes=list(train.classes), train_images=len(train), test_images=len(val))


def changes_of(settings):
    """The flags on top of a run's size and step."""
    run, cfg = settings["run"], Config(**settings["config"])
    return flags_of(overrides(cfg, run["size"], run["step"]))


def name_of(settings):
    """SIZE-STEP-DATA of a run's folder, with the flags on top, and its head if it has one."""
    run, head = settings["run"], settings["recipe"].get("head")
    name = f"{run['size']}-{run['step']}{changes_of(settings)}-{Path(run['data']).name}"
    return name.replace(" --", "-").replace(" ", "-") + (f"-{head}" if head else "")


def packed(checkpoint):
    """Its bytes. torch.save into a full disk would hide the reason."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getbuffer()


def write(path, content):
    """Replace a file by bytes, or by a checkpoint; at any moment it is intact, old or new."""
    if isinstance(content, dict):
        content = packed(content)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):          # on a read-only file system
            temporary.unlink()
        raise InputError(f"{path} cannot be written ({error.strerror}): make that possible, then "
                         "go on with --resume; what was saved before is intact") from error


def lock(folder):
    """Lock a folder for this process: the open file that holds the lock, which is never deleted,
    or None where there are no locks. InputError if another process has it."""
    try:
        import fcntl                                     # not on Windows
    except ImportError:
        return None
    try:
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): continue in another "
                         f"folder with --resume {folder} --out FOLDER") from error
    try:  # not flock, which workers inherit: those of a killed run would hold it for seconds
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(f"{folder} is being trained by another process: wait until that has "
                         "ended") from error
    except OSError:                                      # a file system without locks
        return None
    return file


def compare_ranks(mine):
    """InputError unless all ranks have the same values in {name: value}."""
    first, *others = all_gather(mine)
    for rank, theirs in enumerate(others, 1):
        for name in mine:
            require(theirs[name] == first[name], f"{name} is {first[name]!r} on rank 0, but "
                    f"{theirs[name]!r} on rank {rank}: give all nodes the same data and flags, and "
                    "a folder for --out and --resume that they share")


def find_checkpoint(given, below):
    """The last.pt that --resume means: of PATH, of --out, or of the latest run in the folder
    `below`. None without --resume, or if nothing has been saved yet."""
    if "resume" not in given:
        return None
    path, out = given["resume"], given.get("out")
    if path or out:
        file = Path(path or out)
        file = file if file.is_file() else file / "last.pt"
        require(file.name == "last.pt" or path and out, "--resume takes a run's folder or its "
                f"last.pt, not {file}: give one of them, or a new folder for it with --out")
        require(file.exists() or not path, f"--resume {path}: no checkpoint there; check the path, "
                f"or give --out {path} --resume, which starts where nothing has been saved")
        return file if file.exists() else None
    files = Path(below).glob("*/last.pt")
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def make_folder(out, name, below, resuming):
    """A new run's folder: `out`, or below/NAME-N, N the first free number."""
    if out:
        # A run that died before its first checkpoint left config.json; other programs write one,
        # too
        config = Path(out, FILES[0])
        ours = resuming and config.exists() and '"recipe"' in config.read_text(errors="replace")
        existing = FILES[1:] if ours else FILES
        require(not any(Path(out, file).exists() for file in existing), f"--out {out} holds "
                "another run: give another folder, or add --resume to continue it")
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    Path(below).mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        with suppress(FileExistsError):
            folder = Path(below, f"{name}-{number}")
            folder.mkdir()
            return folder


class RunFolder:
    """The folder of a run: config.json, metrics.jsonl, last.pt and best.pt; rank 0 alone writes.

    path: the folder, once it is open. checkpoint: of the run to resume, or None. settings: those
    of settings_of(). state: a dataclass, what else differs between two checkpoints.
    """

    def __init__(self, given, architecture, below="out"):
        """given: of parse_flags(). architecture: the model's class. below: the folder of all runs.
        """
        self.out, self.below, self.resuming = given.get("out", ""), below, "resume" in given
        self.architecture = architecture.__name__
        self.file, self.checkpoint, self.lock = find_checkpoint(given, below), None, None
        self.moves = bool(self.file and given["resume"] and self.out)        # to the folder --out
        if self.file:
            if is_rank_0() and not self.moves:
                self.lock = lock(self.file.parent)       # before it is read
            self.checkpoint = read_checkpoint(self.file)
            require_keys(self.checkpoint, RESUMABLE, self.file)
            # Earlier versions did not say
            usual = "Segmenter" if "head" in self.checkpoint["recipe"] else "VisionTransformer"
            theirs = self.checkpoint.get("architecture", usual)
            require(theirs == self.architecture, f"{self.file} is a run of another program, which "
                    f"trains {theirs}, not {self.architecture}: resume it with that program")

    def check(self, settings, state):
        """InputError if there are too few images, if the data are not those of the run to resume,
        or if ranks were given other flags or data, or a --resume and --out that they do not share.
        """
        self.settings, self.state = settings | dict(architecture=self.architecture), state
        data, batch_size = settings["run"]["data"], settings["recipe"]["batch_size"]
        require(settings["train_images"] >= batch_size, f"--data {data} has "
                f"{settings['train_images']} training images, less than one --batch-size "
                f"{batch_size}: make it smaller")

        of_data = {name: settings[name] for name in ("classes", "train_images", "test_images")}
        for name, now in of_data.items() if self.checkpoint else ():
            before = self.checkpoint.get(name, now)      # earlier versions had no test_images
            differ = f"{now} instead of {before}"
            if name == "classes":
                differ = shorten(sorted({*now} ^ {*before}) or now)
            require(now == before, f"--data {data} has other {name.replace('_', ' ')} than the run "
                    f"to resume ({differ}): give the data of its start")
        compare_ranks(settings["run"] | settings["recipe"] | settings["config"] | asdict(state)
                      | of_data)

    def open(self, model, optimizer, scaler):
        """Make a new run's folder and lock it, or restore the optimizer of the run to resume."""
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.n_parameters = sum(p.numel() for p in model.parameters())
        if self.checkpoint:
            load_optimizer(optimizer, self.checkpoint["optimizer"], self.file)
            if self.checkpoint["scaler"]:                # empty unless it was in float16
                scaler.load_state_dict(self.checkpoint["scaler"])
        if self.checkpoint and not self.moves:
            self.path = self.file.parent
        else:
            self.path = on_rank_0(make_folder, self.out, name_of(self.settings), self.below,
                                  self.resuming and not self.moves)
        self.rows = on_rank_0(self.prepare)

    def prepare(self):
        """On rank 0: lock and tidy the folder; the lines of metrics.jsonl of the epochs done."""
        self.lock = self.lock or lock(self.path)
        for name in FILES:                               # of a process that was killed in write()
            (self.path / f"{name}.tmp").unlink(missing_ok=True)
        if self.moves:                                   # from now on it lives here
            beside = ["metrics.jsonl"] + ["best.pt"] * (self.file.name == "last.pt")
            for file in (self.file.with_name(name) for name in beside):
                if file.exists():
                    write(self.path / file.name, file.read_bytes())
            write(self.path / "last.pt", self.file.read_bytes())
        write(self.path / "config.json", json.dumps(self.settings, indent=1).encode())
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_bytes().splitlines() if metrics.exists() else []
        return lines[: self.state.epoch]

    def announce(self, usual, machine, micro_batch, notes, epochs, per_epoch, unit="epoch"):
        """Print what the run is, how and where, and what it starts from.

        usual: the recipe before flags changed it. notes: what had to be adapted of the weights.
        per_epoch: iterations; unit: how an epoch is called.
        """
        settings, saved = self.settings, self.checkpoint
        run, recipe, world = settings["run"], settings["recipe"], settings["ranks"]
        cfg, usual = Config(**settings["config"]), asdict(usual)
        head = f", head {recipe['head']}" if "head" in recipe else ""
        print_rank0(f"model   {run['size']}, step {run['step']}{changes_of(settings)}{head}: "
                    f"{self.n_parameters:,} parameters, {cfg.img_size} x {cfg.img_size} pixels in "
                    f"patches of {cfg.patch_size}, {cfg.tokens} tokens, mask {cfg.mask}")
        print_rank0(f"data    {run['data']}: {settings['train_images']:,} images to train, "
                    f"{settings['test_images']:,} to test, {len(settings['classes'])} classes")
        parts = recipe["batch_size"] // world // micro_batch
        changed = {name: value for name, value in recipe.items() if value != usual[name]}
        print_rank0(f"batch   {recipe['batch_size']} = {plural(world, 'rank')} x "
                    f"{plural(parts, 'micro-batch', 'es')} x {plural(micro_batch, 'image')}; "
                    f"recipe {run['recipe']}{flags_of(changed)}: {plural(epochs, unit)} of "
                    f"{plural(per_epoch, 'iteration')}")
        how = [processor(next(self.model.parameters()).device), run["dtype"]]
        how += ["compiled"] if machine.compile else []
        how += ["activation checkpointing"] if machine.recompute else []
        print_rank0(f"device  {', '.join(how)}")
        if not saved:
            if run["init_from"]:
                print_rank0("; ".join([f"init    weights of {run['init_from']}", *notes]))
            print_rank0(f"run     {self.path}{', nothing to resume' if self.resuming else ''}")
            return
        finished = ", finished" if self.state.epoch == epochs else ""
        print_rank0(f"resume  {self.file} at iteration {self.state.iteration:,} of "
                    f"{epochs * per_epoch:,}{finished}")
        for name, before, now in (("ranks", saved["ranks"], world),
                                  ("dtype", saved["run"]["dtype"], run["dtype"])):
            if before != now:
                print_rank0(f"{name:7} {before} before, {now} now: rounding will differ, and what "
                            "is drawn by rank")

    def save(self, improved=False):
        """Write last.pt, and best.pt if `improved`."""
        if is_rank_0():
            best = self.settings | asdict(self.state) | dict(model=self.model.state_dict())
            if improved:
                write(self.path / "best.pt", best)
            write(self.path / "last.pt", best | dict(
                optimizer=self.optimizer.state_dict()["state"], scaler=self.scaler.state_dict()))

    def log(self, row):
        """Add a line to metrics.jsonl."""
        self.rows.append(json.dumps(row, allow_nan=False).encode())
        if is_rank_0():
            write(self.path / "metrics.jsonl", b"".join(row + b"\n" for row in self.rows))

    def end_early(self):
        """End a run that was asked to stop and has saved itself."""
        print_rank0(f"preempted at iteration {self.state.iteration}; go on with --resume "
                    f"{shlex.quote(str(self.path))}")
        if "RANK" in os.environ:
            ignore_signals()             # torchrun sends them when the first rank has ended,
        if dist.is_initialized():
            dist.barrier()               # by when all have come here
        sys.exit(PREEMPTED)

    def finish(self, best, program, data):
        """Print how good the best weights are and how to evaluate them; leave the other ranks."""
        file = self.path / "best.pt"
        if not file.exists():            # of a finished run's last.pt, copied without it
            best, file = "the last epoch", self.path / "last.pt"
        command = f"{program} {shlex.quote(str(file))} --data {shlex.quote(data)}"
        print_rank0(f"done    {best} in {file}" + (f"; evaluate it: {command}" if program else ""))
        shut_down()


class Monitor:
    """Watches a run: progress, waiting for data, losses that are not finite, and requests to stop.
    Rank 0 shows a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, folder, started, losses):
        """started: when the program did. losses: how many a loss of check() is the sum of, over
        micro-batches and ranks."""
        self.folder, self.state, self.started, self.losses = folder, folder.state, started, losses
        self.batch_size = folder.settings["recipe"]["batch_size"]
        self.waited, self.stopping = 0.0, False

    def watch(self, batches):
        """A loader's batches, with the time that is spent waiting for them."""
        return self.watched(iter(batches))       # now: its start draws from torch's generator

    def watched(self, batches):
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - start
            yield batch

    def check(self, loss, grad_norm, scaler):
        """Mean over micro-batches and ranks of this rank's sum over its micro-batches: beside the
        gradients the one exchange of an iteration, and its only wait for the device. InputError on
        all ranks if a loss or gradient is not finite on one."""
        sums = torch.stack([loss, grad_norm, torch.full_like(loss, len(stop_requests))])
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, grad_norm, stops = sums.tolist()
        skips = scaler.is_enabled()              # a GradScaler leaves out such an update itself
        require(math.isfinite(loss) and (math.isfinite(grad_norm) or skips), "the loss or its "
                f"gradient is not a finite number at iteration {self.state.iteration}; it was not "
                f"applied, and {self.folder.path} holds the run as it was last saved: resume it "
                "with --dtype float32, or start anew with a smaller --lr")
        self.stopping, self.loss = stops > 0, loss / self.losses
        return self.loss

    def start(self, title, done, total):
        """Begin an epoch of which so many iterations are done: now there is something to save."""
        stop_on_signals()
        self.title, self.done, self.total = title, done, total
        # When, after how many iterations, and after how many seconds without data
        self.began = self.shown = time.perf_counter(), done, self.waited
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
            text = (f"loss {self.loss:.4f}  lr {lr:.2e}  {mask}{rate:,.0f} images/s, data wait "
                    f"{waiting:.0%}{hint}")
            self.bar.set_postfix_str(text)
            if self.bar.disable:
                print_rank0(f"{self.title}  {self.done}/{self.total}  {text}")
            self.shown = time.perf_counter(), self.done, self.waited

    def end(self):
        """End of the epoch's training."""
        self.bar.close()
        self.of_epoch = self.speed(self.began)

    def times(self):
        """Fields of a row of metrics: seconds since the start; images/s and the fraction of
        waiting over the epoch; and what it ran on."""
        rate, waiting = self.of_epoch
        device = next(self.folder.model.parameters()).device
        return dict(time_s=time.perf_counter() - self.started, time_images_per_s=rate,
                    time_waiting=waiting, time_device=processor(device),
                    time_torch=torch.__version__)
