"""How accurate is a checkpoint, and what does it say of one image?

    python eval.py out/tiny-soft_mask-shapes-1                       # a run's best.pt, on the data it was trained on
    python eval.py out/tiny-soft_mask-shapes-1/last.pt --data PATH   # on PATH/val
    python eval.py out/tiny-soft_mask-shapes-1 --image cat.jpg       # its five most likely classes
    python eval.py illama-tiny-in1k-75.0 --data PATH                 # the published weights
    torchrun --nproc_per_node=8 eval.py ...                          # the same numbers, sooner

A checkpoint knows its model, its classes and its soft mask, so no flags repeat them. Calibration, shape bias and the
paper's other properties are in experiments/properties.py.
"""
import argparse
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from data import (SIGNALS, Images, check_readable, eval_batches, eval_transform, loader, normalize, open_data,
                  printable, read_image)
from model import build, open_checkpoint, overrides

# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


@torch.no_grad()
def predict(model, batches, device, dtype=torch.float32, stop=()):
    """Logits (B, classes) in float32 and labels (B,) of each batch, until `stop` holds something. ValueError if an
    image cannot be read. Leaves the model in eval mode."""
    model.eval()
    for images, labels, faults in tqdm(batches, "evaluate", leave=False, disable=not is_rank_0() or None):
        if stop:
            return
        check_readable(faults)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(normalize(images))
        yield logits.float(), labels


def score(predictions, device, stop=()):
    """Accuracy in percent and mean cross-entropy of what predict() yields on all ranks; every image counts once.

    Returns dict(test_acc1, test_acc5, test_loss, images), or None if some rank's `stop` held something in between. The
    device is waited for once, at the end.
    """
    images, rows = 0, [torch.zeros(3, device=device)]
    for logits, labels in predictions:
        hits = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        rows.append(torch.stack([hits[:, 0].sum(), hits.sum(), loss]))
        images += len(labels)
    sums = torch.stack(rows).cpu().double().sum(0).tolist()
    hits1, hits5, loss, images, stopped = map(sum, zip(*all_gather([*sums, images, len(stop)])))
    if stopped:
        return None
    if not math.isfinite(loss):
        raise ValueError(f"the loss of {images:,} images is {loss}: the weights hold numbers that are not finite, or "
                         "lead to such; use an earlier checkpoint, or train again with a smaller --lr")
    return dict(test_acc1=100 * hits1 / images, test_acc5=100 * hits5 / images, test_loss=loss / images, images=images)


def evaluate(model, batches, device, dtype=torch.float32, stop=()):
    """score() of a model, and how long it took: time_images_per_s."""
    start = time.perf_counter()
    result = score(predict(model, batches, device, dtype, stop), device, stop)
    return result and result | dict(time_images_per_s=result["images"] / max(time.perf_counter() - start, 1e-9))


def most_likely(logits, classes):
    """{name: probability} of the five most likely classes, the most likely first; logits (classes,)."""
    top = logits.softmax(-1).topk(min(5, len(classes)))
    return {classes[i]: p for i, p in zip(top.indices.tolist(), top.values.tolist())}


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def open_model(source, device, alpha=None):
    """(model, checkpoint) of a path or published name, on a device; `alpha` replaces that of the checkpoint."""
    checkpoint = local_rank_0_first(open_checkpoint, source)
    model = build(checkpoint).to(device).eval()
    if alpha is not None:
        model.set_soft_mask(alpha)
        checkpoint["alpha"] = alpha
    return model, checkpoint


def open_val(source, checkpoint, model, data=None):
    """The validation split of `data`, by default of what the model was trained on. ValueError if it does not fit."""
    data = data or checkpoint["run"].get("data")
    if data is None:
        raise ValueError(f"{source} does not say what it was trained on: give --data")
    val = local_rank_0_first(open_data, data, "val", model.cfg.img_size, checkpoint["classes"])
    if len(val.classes) != model.cfg.num_classes:
        raise ValueError(f"--data {data} has {len(val.classes)} classes, but the model knows {model.cfg.num_classes}: "
                         "use the data that it was trained on")
    return val


def describe(model, checkpoint, dtype):
    """What a row of results says of the model beside its accuracy."""
    run, row = checkpoint["run"], dict(mask=model.cfg.mask, alpha=checkpoint["alpha"], img_size=model.cfg.img_size,
                                       dtype=str(dtype).removeprefix("torch."))
    if "step" in run:
        row |= dict(step=run["step"], overrides=overrides(model.cfg, run["size"], run["step"]), seed=run["seed"])
    return row


def add_flags(parser):
    """The flags that programs share which evaluate a model."""
    parser.add_argument("--data", type=nonempty,
                        help="a built-in data set or a folder with val/CLASS/IMAGE; default: the run's own")
    parser.add_argument("--soft-mask", type=float, help="alpha for the checkpoint's, from 1 (bidirectional) to 0")
    parser.add_argument("--batch-size", type=int, default=256, help="batch size (per rank)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="data-loading workers per rank")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto takes a GPU where there is one")


def parse(parser, argv):
    args = parser.parse_args(argv)
    if args.batch_size < 1 or not 0 <= args.workers <= 1024:
        raise ValueError("--batch-size must be at least 1 and --workers from 0 to 1024")
    return args


def main(argv=None):
    parser = Parser(description="Evaluate a checkpoint of train.py.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="a run's folder, its best.pt or last.pt, or published weights")
    add_flags(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as it was trained, if that was float32")
    parser.add_argument("--image", type=nonempty, help="classify this image alone: print its five most likely classes")
    parser.add_argument("--json", action="store_true", help="print one dict of JSON")
    with report_errors():
        args = parse(parser, argv)
        if args.image and args.data:
            raise ValueError("--image classifies one image alone: drop it, or --data")
        rank, world, device, dtype = setup(args.device, args.dtype)
        model, checkpoint = open_model(args.checkpoint, device, args.soft_mask)
        if args.dtype == "auto" and checkpoint["run"]["dtype"] == "float32":
            dtype = torch.float32
        transform = partial(eval_transform, size=model.cfg.img_size)
        if args.image:
            classes = checkpoint["classes"]
            if classes is None and model.cfg.num_classes != 1000:
                raise ValueError(f"{args.checkpoint} does not name its {model.cfg.num_classes} classes, so --image "
                                 "cannot: use a checkpoint that train.py wrote")
            classes = classes or torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
            image = Images([(read_image(args.image), 0)], transform)
            [(logits, _)] = predict(model, loader(image, eval_batches(1, 1), 0, device), device, dtype)
            result = most_likely(logits[0], classes)
            lines = "\n".join(f"{100 * p:5.1f} %  {printable(name)}" for name, p in result.items())
        else:
            val = open_val(args.checkpoint, checkpoint, model, args.data)
            batches = eval_batches(len(val), args.batch_size, rank, world)
            result = evaluate(model, loader(Images(val, transform), batches, args.workers, device), device, dtype)
            r = result = result | describe(model, checkpoint, dtype)
            mask = f"mask {r['mask']}" + ("" if r["alpha"] is None else f" alpha {r['alpha']:g}")
            lines = (f"top-1 {r['test_acc1']:.3f} %  top-5 {r['test_acc5']:.3f} %  loss {r['test_loss']:.4f}  "
                     f"{r['images']:,} images at {r['img_size']} x {r['img_size']}, {mask}, {r['dtype']}, "
                     f"{r['time_images_per_s']:,.0f} images/s")
        if is_rank_0():
            print(json.dumps(result) if args.json else lines)
        shut_down()


# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices, for train.py and the experiments too


class Parser(argparse.ArgumentParser):
    """argparse, with wrong flags as ValueErrors: they are reported as all bad input is."""

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


def nonempty(value):
    """The type of a flag that takes text: an empty one, as of an unset variable, would mean the default."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty: give a value, or drop the flag")
    return value


REFUSALS = {  # what the system refuses, by words in an error
    r"DataLoader worker \(pid|ancdata|open files|shared memory":
        "a data-loading worker was ended by the system, which may be short of memory, shared memory (/dev/shm) or open "
        "files: use fewer --workers",
    "EADDRINUSE|address already in use":
        "the port at which the ranks meet, MASTER_PORT, is in use: give torchrun another --master_port",
    "by peer": "another rank has ended: see its message, then go on with --resume",
    "alloc|out of memory|overflow|MemoryError":
        "there is not enough memory for this: make the model, the images or the batch smaller",
}


@contextmanager
def report_errors():
    """Bad input, and what the system refuses, ends a program with one line, printed once per node, and exit code 2."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))   # None if closed
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")              # class names, on a terminal without Unicode
    try:
        yield
    except Exception as error:
        known = [reason for words, reason in REFUSALS.items() if re.search(words, repr(error), re.I)]
        if isinstance(error, ValueError):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            if not frame.line.startswith("raise") or "site-packages" in frame.filename:  # not raised by our code: a bug
                raise
            reason = printable(str(error))
        elif isinstance(error, RuntimeError | OSError | MemoryError) and known and not getattr(error, "filename", None):
            reason = known[0]
        elif isinstance(error, OSError) and error.strerror:
            path = printable(str(error.filename or "the system"))
            reason = f"{path}: {error.strerror}: give another path or fewer processes"
        else:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)   # local rank 0 reports it, and torchrun ends this one; if it had no error, this one reports
        print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.exit(2)


stop = []                          # the signals that asked this program to, as listen() takes them
write_lock = threading.Lock()      # held while a file is written


def stop_on_signals():
    """SIGTERM, SIGINT and SIGHUP ask the program to stop, by what they leave in `stop`; one that comes two seconds or
    more later ends it at once. (Sooner it is the same Ctrl-C, which a rank gets from the terminal and from torchrun.)

    A thread takes them: a Python handler would wait for ever if the program does, for a download or another rank.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    for number in SIGNALS:
        if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:       # by nohup
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, args=(reading, writing), daemon=True).start()


def listen(reading, writing):            # the latter to keep it open
    first = math.inf
    while True:
        number = reading.recv(1)[0]
        if number in SIGNALS:
            if time.monotonic() - first > 2:
                with write_lock:
                    os._exit(128 + number)
            stop.append(number)
            if first == math.inf:
                first = time.monotonic()
                say("stopping as soon as everything is saved; a second signal ends it at once")


DEVICES, DTYPES = ("auto", "cuda", "mps", "cpu"), ("auto", "float32", "bfloat16", "float16")
gloo = None   # a group of all ranks for waiting: NCCL would end those that wait ten minutes for a download or a scan


def setup(device="auto", dtype="auto"):
    """Join the other processes if torchrun started some. Returns (rank, world, torch.device, torch.dtype).

    `auto` takes a GPU where there is one; it computes in bfloat16 on CUDA and in float32 elsewhere.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing and "RANK" in os.environ:
        raise ValueError(f"RANK is set, but not {', '.join(missing)}: start with torchrun, which sets them all")
    values = [os.environ.get(name, default) for name, default in zip(names, ("0", "1", "0"))]
    if "RANK" in os.environ and (not all(map(str.isdecimal, values)) or int(values[0]) >= int(values[1])):
        raise ValueError(f"{', '.join(names[:3])} are {', '.join(values)}: start with torchrun, which sets them")
    rank, world, local_rank = map(int, values)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if gpus else "mps" if mps and world == 1 else "cpu"
    if device == "cuda" and local_world > gpus:
        raise ValueError(f"--device cuda: this machine has {gpus} GPUs for {local_world} processes; "
                         "start fewer, or use --device cpu")
    if device == "mps" and (not mps or world > 1):
        raise ValueError(f"--device mps: {'one process at a time' if mps else 'there is none on this machine'}; "
                         "use --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if dtype not in DTYPES:   # of a checkpoint
        raise ValueError(f"unknown --dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if dtype == "float16" and device != "cuda":
        raise ValueError(f"--dtype float16 needs a CUDA GPU, this is {device}; use bfloat16 or float32")
    if dtype == "float32":               # torch's default: convolutions in TF32 on GPUs that have it, matrix multiplications not
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if device == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    device = torch.device(device)
    if world > 1:
        global gloo
        gpu = device.type == "cuda"
        store, _, _ = next(dist.rendezvous("env://"))
        # Over a restart torchrun may keep its store, and in it the addresses of ranks that have ended.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world,
                                device_id=device if gpu else None)
        gloo = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return rank, world, device, getattr(torch, dtype)


def local_rank_0_first(function, *args, **kwargs):
    """Call a function on local rank 0 of each node, then on its other ranks: so a node downloads once."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier(gloo)
    try:
        return function(*args, **kwargs)
    finally:   # after an error too: then the others meet it as well, and all end
        if dist.is_initialized() and first:
            dist.barrier(gloo)


def all_gather(value):
    """What each rank has, by rank."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value, group=gloo)
    return values


def on_rank_0(function, *args):
    """Call a function on rank 0 alone; all ranks get what it returns, or the ValueError or OSError that it raises."""
    answer = error = None
    if is_rank_0():
        try:
            answer = function(*args)
        except (ValueError, OSError) as refusal:
            error = refusal
    answer, error = all_gather((answer, error))[0]
    if error:
        raise error
    return answer


def shut_down():
    """Part from the other ranks. The pause lets gloo's threads free their tensors, for which they need Python's lock;
    torch 2.6 holds it while it waits for these threads to end."""
    if dist.is_initialized():
        dist.barrier()
        time.sleep(1)
        dist.destroy_process_group()


def say(text, file=None):
    """Print on rank 0. What cannot be written any more, to a closed terminal or pipe or a full disk, is dropped: a run
    does not end with its output."""
    file = file or sys.stdout
    try:
        if is_rank_0():
            tqdm.write(text, file)
            file.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())         # what is left in its buffer, too


def is_rank_0():
    return os.environ.get("RANK", "0") == "0"


def default_workers():
    """Data-loading workers per rank: the usable cores divided by the ranks of this node, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


if __name__ == "__main__":
    main()
