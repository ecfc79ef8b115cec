"""Ranks and devices, requests to stop, printing on rank 0, and data-loading workers' start and end.

    rank, world, device, dtype = setup("auto", "auto")         # joins the other ranks that torchrun started
    data = once_per_node(download, "cifar10")
    folder = on_rank_0(make_folder)
    stop_on_signals()                                          # then `stop_requests` fills
"""
import atexit
import gc
import math
import multiprocessing
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from harness.flags import InputError, plural, require

DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
PREEMPTED = 75           # exit code of a run that was asked to stop: "try again", EX_TEMPFAIL of sysexits.h
cpu_group = None         # all ranks, for waiting: NCCL would end those that wait ten minutes for a download or a scan


def setup(device="auto", dtype="auto"):
    """Join the other processes if torchrun started some. Returns (rank, world, torch.device, torch.dtype).

    `auto` takes a GPU where there is one, and fast_dtype() of it.
    """
    rank, world, local_rank = environment()
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if gpus else "mps" if mps and world == 1 else "cpu"
    if dtype == "auto":
        dtype = fast_dtype(device)
    require(device != "cuda" or local_world() <= gpus, f"--device cuda: this machine has {gpus} GPUs for "
            f"{local_world()} processes; start fewer, or use --device cpu")
    require(device != "mps" or mps, "--device mps: there is none on this machine; use --device cpu")
    require(device != "mps" or world == 1, "--device mps: one process at a time; use --device cpu")
    require(dtype in DTYPES, f"unknown --dtype {dtype!r}; choose one of {', '.join(DTYPES)}")        # of a checkpoint
    require(dtype != "float16" or device == "cuda", f"--dtype float16 needs a CUDA GPU, this is {device}; use bfloat16 "
            "or float32")
    use_tf32(False)
    if device == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
        torch.zeros((), device=device)   # an error if it is taken, before anything is read
    device = torch.device(device)
    if world > 1:
        join(rank, world, device)
    return rank, world, device, getattr(torch, dtype)


def fast_dtype(device):
    """The type to compute in where speed matters: float32 but on GPUs, whose older ones emulate bfloat16 slowly."""
    if device != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def use_tf32(on):
    """Whether float32 is TF32 on GPUs, in matrix multiplications and in convolutions, where that is torch's default."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def processor(device):
    """The name of a GPU, or the kind of device and on a CPU its threads: what a speed depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {plural(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else device.type


def environment():
    """(rank, world size, rank on this node) as torchrun sets them; 0, 1, 0 without it. InputError for half of them, and
    for one of several tasks that a batch system started: they would train as many runs."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    given = [name for name in names[:3] if name in os.environ]
    if not given:
        counts = ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"]
        if os.environ.get("SLURM_PROCID", "0") != "0":   # a batch script is task 0 of those that it might start
            counts.append("SLURM_NTASKS")
        for name in counts:
            count = os.environ.get(name, "1")
            require(count == "1", f"this is one of {count} tasks ({name}) that do not know of each other: start one "
                    "per machine, srun --ntasks-per-node=1 torchrun --nproc_per_node=GPUS ...")
        return 0, 1, 0
    missing = [name for name in names if name not in os.environ]
    require(not missing, f"{given[0]} is set, but not {', '.join(missing)}: start with torchrun, which sets them all")
    values = [os.environ[name] for name in names[:4]]
    numbers = [int(value) if re.fullmatch(r"0|[1-9]\d{0,8}", value) else -1 for value in values]
    rank, world, local_rank, port = numbers
    require(min(numbers) >= 0 and rank < world and local_rank < world and 0 < port < 2 ** 16,
            f"{', '.join(names[:4])} are {', '.join(values)}: start with torchrun, which sets them")
    return rank, world, local_rank


def local_world():
    """The number of ranks on this node."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(value) if re.fullmatch(r"[1-9]\d{0,8}", value) else 1


def join(rank, world, device):
    global cpu_group
    gpu = device.type == "cuda"
    store, _, _ = next(dist.rendezvous("env://"))
    # Over a restart torchrun may keep its store, and in it the addresses of ranks that have ended.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world,
                            device_id=device if gpu else None)
    cpu_group = dist.new_group(backend="gloo", timeout=timedelta(days=1))


def shut_down():
    """Leave the other ranks. The pause lets gloo's threads free their tensors, for which they need Python's lock; torch
    2.6 holds it while it waits for these threads to end."""
    if dist.is_initialized():
        dist.barrier()
        time.sleep(1)
        dist.destroy_process_group()


def is_rank_0():
    return os.environ.get("RANK", "0") == "0"


def progress(batches, title, **more):
    """tqdm(): the batches, with a bar on a terminal, of rank 0 alone."""
    disable = None if is_rank_0() else True                            # None: where no terminal is
    return tqdm(batches, title, leave=False, disable=disable, **more)


def default_workers():
    """Data-loading workers per rank: the usable cores divided by the ranks of this node, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores // local_world())


def wrap(model, blocks, machine, world):
    """The model as it is trained: with activation checkpointing of its blocks, compiled, in DistributedDataParallel."""
    if machine.deterministic:            # an error if there is no such form; with warn_only attention would not be so
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # read by cuBLAS's first matrix multiplication
        torch.use_deterministic_algorithms(True)
    if machine.recompute:                # only each block's input is saved for backward, which computes the rest again
        for block in blocks:
            block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    if machine.compile:
        model.compile()
    if world == 1:
        return model
    net = DistributedDataParallel(model)
    net.broadcast_buffers = False        # they follow from the configuration; torch is renaming the argument
    return net


def once_per_node(function, *args, **kwargs):
    """Call a function on local rank 0 of each node, then on its other ranks: so a node downloads once."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier(cpu_group)
    try:
        return function(*args, **kwargs)
    finally:   # after an error too: then the others meet it as well, and all end
        if dist.is_initialized() and first:
            dist.barrier(cpu_group)


def all_gather(value):
    """What each rank has, by rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=cpu_group)
    return values


def on_rank_0(function, *args):
    """Call a function on rank 0 alone; all ranks get what it returns, or the InputError or OSError that it raises."""
    answer = error = None
    if is_rank_0():
        try:
            answer = function(*args)
        except (InputError, OSError) as refusal:
            error = refusal
    answer, error = all_gather((answer, error))[0]
    if error:
        raise error
    return answer


def print_rank0(text, file=None):
    if is_rank_0():
        tqdm.write(text, file or sys.stdout)
        (file or sys.stdout).flush()


class Output:
    """A stream that a program never waits for, and never ends with: a thread hands on what is written; what nobody
    reads, or a closed pipe or a full disk does not take, is dropped."""

    def __init__(self, stream, most=2 ** 24):
        """most: characters that may wait; what comes then is dropped."""
        self.stream, self.most, self.given, self.taken = stream, most, 0, 0
        self.texts = queue.SimpleQueue()                 # without a lock that a finalizer that prints would wait for
        threading.Thread(target=self.hand_on, daemon=True).start()
        atexit.register(self.finish)

    def __getattr__(self, name):                         # isatty, encoding ...
        return getattr(self.stream, name)

    def write(self, text):
        if self.given - self.taken < self.most:
            self.given += len(text)
            self.texts.put(text)
        return len(text)

    def flush(self):
        pass

    def hand_on(self):
        while True:
            text = self.texts.get()
            rest = text.encode(self.stream.encoding, "backslashreplace")
            while rest:                  # not through the stream, whose lock the interpreter's end would wait for
                try:
                    rest = rest[os.write(self.stream.fileno(), rest):]
                except BlockingIOError:
                    time.sleep(0.05)
                except (OSError, ValueError):
                    break
            self.taken += len(text)

    def finish(self):
        """Wait until all is handed on, two seconds at most."""
        deadline = time.monotonic() + 2
        while self.taken < self.given and time.monotonic() < deadline:
            time.sleep(0.01)


stop_requests = []                 # what asked this program to stop: signals
write_lock = threading.Lock()      # held while a file is written
at_stake = threading.Event()       # set once there is something to lose


def stop_on_signals():
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask the program to stop, by what they leave in stop_requests; before anything
    is at stake they end it at once, and so does one that comes two seconds or more after the first. (Sooner it is the
    same Ctrl-C, from the terminal and from torchrun.) A process whose launcher has died is asked, too.

    A thread takes them: a Python handler would wait for ever if the program does, for a download or another rank. So
    would a program that prints where nobody reads, hence Output.
    """
    for name in ("stdout", "stderr"):
        with suppress(AttributeError, OSError):          # closed, or no file
            getattr(sys, name).fileno()
            setattr(sys, name, Output(getattr(sys, name)))
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    for number in SIGNALS:
        if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:       # by nohup
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, args=(reading, writing), daemon=True).start()


LAUNCHED = ("TORCHELASTIC_RUN_ID", "ILLAMA_LADDER")      # by torchrun, or by replication/ladder.py


def listen(reading, writing):            # the latter to keep it open
    first, launcher = math.inf, os.getppid()
    reading.settimeout(1)                # seconds between two looks for the launcher
    while True:
        try:
            number = reading.recv(1)[0]
        except TimeoutError:
            if first < math.inf or os.getppid() == launcher or not any(name in os.environ for name in LAUNCHED):
                continue
            number = signal.SIGTERM      # this process is an orphan
        if number in SIGNALS:
            if not at_stake.is_set() or time.monotonic() - first > 2:
                with write_lock:
                    os._exit(128 + number)
            stop_requests.append(number)
            if first == math.inf:
                first = time.monotonic()
                print_rank0("stopping as soon as everything is saved; a second signal ends it at once")


def ignore_signals():
    """Those that ask to stop: once all is saved, and in workers, which they reach too."""
    signal.set_wakeup_fd(-1)     # inherited by fork: a worker's signals would reach the run's listen()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def start_worker(_):
    """Ignore signals: a worker's death would end the run before it is saved. Freeze the garbage collector: its marks
    would copy the shared memory of all modules, 80 MB per worker. Print directly: threads are not inherited."""
    ignore_signals()
    sys.stdout, sys.stderr = (getattr(stream, "stream", stream) for stream in (sys.stdout, sys.stderr))
    gc.freeze()


@atexit.register
def end_workers():
    """Kill the workers that are left: at exit multiprocessing sends SIGTERM, which they ignore, and waits for ever."""
    if hasattr(signal, "SIGCHLD"):                         # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)      # where torch would report their end as an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
