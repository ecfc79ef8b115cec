"""Ranks and devices, requests to stop, errors in one line, printing on rank 0, and data-loading
workers.

    rank, world, device, dtype = setup("auto", "auto")       # joins the ranks that torchrun started
    data = once_per_node(download, "cifar10")
    folder = on_rank_0(make_folder)
    stop_on_signals()                                        # then `stop_requests` fills
"""
import atexit
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from harness.flags import InputError, plural, require

DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
           if hasattr(signal, name)]
PREEMPTED = 75           # exit code of a run that was asked to stop: EX_TEMPFAIL of sysexits.h
cpu_group = None         # all ranks, for waiting: NCCL would end those that wait for ten minutes


def setup(device="auto", dtype="auto"):
    """Join the other processes if torchrun started some. Returns (rank, world, torch.device,
    torch.dtype).

    `auto` takes a GPU where there is one, and fast_dtype() of it. float32 is never TF32.
    """
    rank, world, local_rank = environment()
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if gpus else "mps" if mps and world == 1 else "cpu"
    if dtype == "auto":
        dtype = fast_dtype(device)
    require(device != "cuda" or local_world() <= gpus, f"--device cuda: this machine has {gpus} "
            f"GPUs for {local_world()} processes; start fewer, or use --device cpu")
    require(device != "mps" or mps and world == 1, "--device mps: it takes a Mac, and one process; "
            "use --device cpu")
    require(dtype != "float16" or device == "cuda", "--dtype float16 needs a CUDA GPU, this is "
            f"{device}; use bfloat16 or float32")
    use_tf32(False)
    if device == "cuda":
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    device = torch.device(device)
    if world > 1:
        join(rank, world, device)
    return rank, world, device, getattr(torch, dtype)


def environment():
    """(rank, world size, rank on this node) as torchrun sets them; 0, 1, 0 without it. InputError
    for one of several tasks that another launcher started: they would train as many runs."""
    if "RANK" in os.environ:
        return tuple(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):    # srun, mpiexec
        count = os.environ.get(name, "1")
        require(count == "1", f"this is one of {count} tasks ({name}) that do not know of each "
                "other: start one per machine, srun --ntasks-per-node=1 torchrun "
                "--nproc_per_node=GPUS ...")
    return 0, 1, 0


def join(rank, world, device):
    global cpu_group
    gpu = device.type == "cuda"
    store, _, _ = next(dist.rendezvous("env://"))
    # Over a restart torchrun may keep its store, and in it the addresses of ranks that have ended:
    # the new ranks would try to reach those.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    nccl = gpu and dist.is_nccl_available()                          # it is not on Windows
    dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=rank, world_size=world,
                            device_id=device if nccl else None)
    cpu_group = dist.new_group(backend="gloo", timeout=timedelta(days=1))


def shut_down():
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def fast_dtype(device):
    """The type to compute in where speed matters: float32 but on GPUs, whose older ones emulate
    bfloat16 slowly."""
    if device != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def use_tf32(on):
    """Whether float32 is TF32 on GPUs, in matrix multiplications and in convolutions, where that is
    torch's default."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def processor(device):
    """The name of a GPU, or the kind of device and on a CPU its threads: what a speed depends
    on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu with {plural(torch.get_num_threads(), 'thread')}"
    return device.type


def wrap(model, blocks, machine, world):
    """The model as it is trained: with activation checkpointing of its blocks, compiled, in
    DistributedDataParallel."""
    if machine.deterministic:            # an error where an operation has no such form
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # cuBLAS reads it once
        torch.use_deterministic_algorithms(True)
    if machine.recompute:                # backward computes all but each block's input again
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if machine.compile:
        model.compile()
    if world == 1:
        return model
    net = DistributedDataParallel(model)
    net.broadcast_buffers = False        # they follow from the configuration
    return net


def is_rank_0():
    return os.environ.get("RANK", "0") == "0"


def local_world():
    """The number of ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def once_per_node(function, *args, **kwargs):
    """Call a function on local rank 0 of each node, then on its other ranks: so a node downloads
    once."""
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
    """Call a function on rank 0 alone; all ranks get what it returns, or the InputError or OSError
    that it raises."""
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


def print_line(text, file):
    """Print to sys.stdout or sys.stderr. What is not taken, as nobody reads it any more or the disk
    is full, is dropped: a run goes on without it."""
    if file is None:                     # Python was started with it closed
        return
    try:
        tqdm.write(text, file)
        file.flush()
    except OSError:                      # Python flushes at exit: what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def print_rank0(text, file=None):
    if is_rank_0():
        print_line(text, file or sys.stdout)


def progress(batches, title, **more):
    """tqdm(): the batches, with a bar on a terminal, of rank 0 alone."""
    disable = None if is_rank_0() else True                            # None: where no terminal is
    return tqdm(batches, title, leave=False, disable=disable, **more)


stop_requests = []       # the signals that have asked this program to stop
replaced = {}            # {signal: what it did before stop_on_signals}


def stop_on_signals():
    """From now on signals ask the program to stop, by what they leave in stop_requests, until its
    main() ends. What a process ignores, as SIGHUP under nohup, it still ignores; outside the main
    thread nothing is changed."""
    if replaced or threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            replaced[number] = signal.signal(number, lambda number, _: stop_requests.append(number))


def restore_signals():
    for number, handler in replaced.items():
        signal.signal(number, handler)
    replaced.clear()
    stop_requests.clear()


def ignore_signals():
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    replaced.clear()


REFUSALS = {  # what the system refuses, by words in torch's error
    "DataLoader worker .pid":
        "a data-loading worker was ended by the system, which may be short of memory or of shared "
        "memory (/dev/shm): use fewer --workers",
    "EADDRINUSE|address already in use":
        "the port at which the ranks meet, MASTER_PORT, is in use: give torchrun another "
        "--master_port",
    "CUDA out of memory":
        "the GPU has too little free memory for this: add --recompute, or start with a smaller "
        "--micro-batch; in evaluation make --batch-size smaller",
}
REPORT_AFTER = 5         # seconds, on all but local rank 0, which usually has the same error


@contextmanager
def report_errors():
    """Around main(): bad input, and what the system refuses, ends it with one line and exit code 2.
    At its end signals do what they did before."""
    outer = bool(replaced)               # this main() was called by that of another program
    try:
        yield
        print(end="", flush=True)        # what was printed, while errors are still reported
    except BrokenPipeError:              # nobody reads any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # flushed at exit
        sys.exit(1)
    except (InputError, RuntimeError, OSError) as error:
        text = str(error)
        known = [reason for words, reason in REFUSALS.items() if re.search(words, text, re.I)]
        if isinstance(error, InputError):
            if text.startswith("Caught "):               # by a worker: after its traceback
                text = text.strip().splitlines()[-1].removeprefix("harness.flags.InputError: ")
        elif known:
            text = known[0]
        elif isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}: give another path"
        else:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            restore_signals()
            time.sleep(REPORT_AFTER)     # torchrun ends this rank, unless local rank 0 has no error
        print_line(f"error: {text}", sys.stderr)
        if dist.is_initialized():        # gloo's threads could abort a Python that ends before them
            end_workers()
            os._exit(2)
        sys.exit(2)
    finally:
        if not outer:
            restore_signals()


def default_workers():
    """Data-loading workers per rank: the usable cores by the ranks of this node, at most 16."""
    usable = hasattr(os, "sched_getaffinity")                        # not on Windows
    cores = len(os.sched_getaffinity(0)) if usable else os.cpu_count() or 1
    return min(16, cores // local_world())


def start_worker(_):
    """Ignore signals, which reach workers too: a worker's death would end the run before it is
    saved. Freeze the garbage collector: its marks would copy the shared memory of all modules, 80
    MB per worker."""
    ignore_signals()
    gc.freeze()


@atexit.register
def end_workers():
    """Kill the workers that are left: at exit multiprocessing sends SIGTERM, which they ignore, and
    waits for ever."""
    if hasattr(signal, "SIGCHLD"):       # not on Windows; torch would report their end as an error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
