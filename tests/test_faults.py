"""What a run survives, and what it refuses: each test provokes a fault of the kind that long runs meet."""
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from conftest import (DEADLINE, ROOT, SMALL, Program, environment, equal, in_ranks, left_behind, load, metrics, refused,
                      starter, torchrun, wait_until)
from data import Images, eval_transform, open_data, train_transform
from harness import processes
from harness import run as harness_run
from harness.files import read_image
from harness.run import RunFolder

SAVING = ["--drop-path", "0.5", "--save-every", "2"]      # randomness in the model, and checkpoints within the epochs


def run(photos, out, *flags):
    """Train in this process: 6 iterations, 3 an epoch, 8 images each."""
    train.main(["--data", str(photos), "--out", str(out), *SMALL, *SAVING, *map(str, flags)])


def resume(*flags):
    train.main(["--resume", *map(str, flags), "--device", "cpu", "--save-every", "2"])


def sabotaged(ranks, photos, out, *fault_and_flags, launch=in_ranks):
    """Train in other processes, one of which meets a fault (see saboteur.py). Returns (exit code, stdout, stderr)."""
    fault, flags = fault_and_flags[:4], fault_and_flags[4:]
    command = [ROOT / "tests" / "saboteur.py", *fault, "--data", photos, "--out", out, *SMALL, *SAVING, *flags]
    result = Program(*command).wait() if ranks == 1 else launch(ranks, *command)
    wait_until(lambda: not left_behind(out))
    return result


def same(one, other):
    """Whether two runs ended with the same checkpoints, bit for bit, and the same metrics."""
    return (equal(load(one / "last.pt"), load(other / "last.pt")) and metrics(one) == metrics(other)
            and equal(load(one / "best.pt"), load(other / "best.pt")))


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    """A run that nothing happened to."""
    run(photos, tmp_path_factory.mktemp("alone") / "run")
    return tmp_path_factory.getbasetemp() / "alone0" / "run"


@pytest.fixture(scope="module")
def alone2(photos, tmp_path_factory):
    """The same on two ranks."""
    folder = tmp_path_factory.mktemp("alone2") / "run"
    code, _, errors = in_ranks(2, ROOT / "train.py", "--data", photos, "--out", folder, *SMALL, *SAVING)
    assert code == 0, errors
    return folder


class Crash(BaseException):
    """The process dies here."""


def crash_in(monkeypatch, owner, name, at, before=False):
    """Let the `at`-th call of owner.name end the process, after it or `before` it."""
    calls, function = [], getattr(owner, name)

    def crashing(*args, **kwargs):
        calls.append(args)
        if before and len(calls) == at:
            raise Crash
        result = function(*args, **kwargs)
        if len(calls) == at:
            raise Crash
        return result
    monkeypatch.setattr(owner, name, crashing)


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted and resumed: the run left alone


@pytest.mark.parametrize("iteration", range(1, 7))
def test_a_run_killed_at_any_iteration_ends_as_the_run_left_alone(iteration, photos, alone, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, torch.optim.AdamW, "step", iteration)
        run(photos, tmp_path / "run")
    torch.rand(7)                                                            # whatever state the generators are in
    random.random()
    run(photos, tmp_path / "run", "--resume", "--workers", 1)
    assert same(tmp_path / "run", alone)


def test_a_run_interrupted_three_times_ends_as_the_run_left_alone(photos, alone, monkeypatch, tmp_path):
    for iteration in (3, 2, 2):                                              # of those since the last checkpoint
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_in(patch, torch.optim.AdamW, "step", iteration)
            run(photos, tmp_path / "run", "--resume")
    run(photos, tmp_path / "run", "--resume")
    assert same(tmp_path / "run", alone)


@pytest.mark.parametrize("flags", [["--augment", "--erasing", "0.5", "--mixup", "0.8", "--cutmix", "1", "--img-size", "48"],
                                   ["--dtype", "bfloat16", "--micro-batch", "2"]])
def test_mixing_erasing_and_accumulation_resume_exactly(flags, photos, monkeypatch, tmp_path):
    run(photos, tmp_path / "alone", *flags)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, torch.optim.AdamW, "step", 5)
        run(photos, tmp_path / "run", *flags)
    resume(tmp_path / "run")
    assert same(tmp_path / "run", tmp_path / "alone")


def test_after_a_resume_an_epoch_goes_on_with_the_images_that_it_has_not_seen(photos, monkeypatch, tmp_path):
    taken, load_one = [], Images.__getitem__
    monkeypatch.setattr(Images, "__getitem__", lambda images, key: taken.append(key) or load_one(images, key))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, RunFolder, "save", 1)                                    # with iteration 2 saved
        run(photos, tmp_path / "run")
    resume(tmp_path / "run", "--workers", 0)
    first_epoch = [index for epoch, index in taken if epoch == 0][:24]       # later ones are evaluated
    assert sorted(first_epoch) == list(range(24))


def test_a_finished_run_says_so(photos, finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.suffix == ".pt"}
    (finished / "last.pt.tmp").write_bytes(b"left by a process that was killed")
    resume(finished)
    assert not (finished / "last.pt.tmp").exists()
    assert "last.pt at iteration 6 of 6, finished\n" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.suffix == ".pt"} == before


# ---------------------------------------------------------------------------------------------------------------------
# Signals and processes


@pytest.mark.parametrize("moment, number, fault, iteration", [
    ("train", 1, "SIGTERM", 1), ("train", 2, "SIGUSR1", 2), ("train", 4, "SIGINT to all", 4), ("evaluate", 1, "SIGTERM", 3),
    ("train", 5, "SIGHUP to all", 5)])
def test_a_signal_ends_a_run_that_resumes_exactly(moment, number, fault, iteration, photos, alone, tmp_path):
    code, said, errors = sabotaged(1, photos, tmp_path / "run", 0, moment, number, fault, "--workers", 2)
    assert code == 75 and errors == ""
    assert said.splitlines()[-1].startswith(f"preempted at iteration {iteration};")
    assert load(tmp_path / "run" / "last.pt")["iteration"] == iteration
    resume(tmp_path / "run")
    assert same(tmp_path / "run", alone)


@pytest.mark.parametrize("rank, moment, number, fault, iteration", [
    (0, "train", 4, "SIGTERM to the launcher", 4), (1, "train", 1, "SIGTERM", 1), (1, "train", 2, "SIGUSR1", 2),
    (1, "evaluate", 1, "SIGTERM", 3)])
def test_a_signal_ends_all_ranks_at_one_iteration(rank, moment, number, fault, iteration, photos, alone2, tmp_path):
    launch = torchrun if fault == "SIGTERM to the launcher" else in_ranks
    code, said, errors = sabotaged(2, photos, tmp_path / "run", rank, moment, number, fault, "--workers", 1, launch=launch)
    assert code == (1 if launch == torchrun else 75) and "SIGKILL" not in errors         # after torchrun's 30 seconds
    assert load(tmp_path / "run" / "last.pt")["iteration"] == iteration
    assert said.splitlines()[-1].startswith(f"preempted at iteration {iteration};")
    code, _, errors = in_ranks(2, ROOT / "train.py", "--resume", tmp_path / "run")
    assert code == 0, errors
    assert same(tmp_path / "run", alone2)


@pytest.mark.parametrize("fault", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_before_anything_is_at_stake_the_first_signal_ends_a_run_at_once(fault, photos, tmp_path):
    code, said, errors = sabotaged(1, photos, tmp_path / "run", 0, "build", 1, fault)
    assert code == 128 + signal.Signals[fault] and said == errors == ""
    assert not (tmp_path / "run").exists()


def test_a_run_whose_launcher_is_killed_saves_itself(photos, alone2, tmp_path):
    """With the launcher gone, nobody would end it: it would train on beside the run that is resumed."""
    launch = partial(torchrun, flags=["--max-restarts=0"])
    code, said, _ = sabotaged(2, photos, tmp_path / "run", 0, "train", 2, "SIGKILL to the launcher", launch=launch)
    assert code == -signal.SIGKILL
    iteration = load(tmp_path / "run" / "last.pt")["iteration"]
    assert iteration < 6 and not (tmp_path / "run" / ".lock").exists()       # it unlocked the folder when it had saved
    code, _, errors = in_ranks(2, ROOT / "train.py", "--resume", tmp_path / "run")
    assert code == 0, errors
    assert same(tmp_path / "run", alone2)


def test_a_killed_rank_ends_the_others_and_the_run_resumes_exactly(photos, alone2, tmp_path):
    code, said, _ = sabotaged(2, photos, tmp_path / "run", 1, "train", 5, "SIGKILL", "--workers", 2)
    assert code != 0 and "\r" not in said
    assert load(tmp_path / "run" / "last.pt")["iteration"] == 4
    assert len(metrics(tmp_path / "run")) == 1                               # every line parses
    code, _, errors = in_ranks(2, ROOT / "train.py", "--resume", tmp_path / "run", "--workers", 1)
    assert code == 0, errors
    assert same(tmp_path / "run", alone2)


def test_torchrun_restarts_a_run_that_resumes_by_itself(photos, alone2, tmp_path):
    launch = partial(torchrun, flags=["--max-restarts=1"])
    code, said, errors = sabotaged(2, photos, tmp_path / "run", 1, "train", 5, "SIGKILL", "--resume", launch=launch)
    assert code == 0, errors
    assert "nothing to resume" in said and "last.pt at iteration 4 of 6\n" in said
    assert same(tmp_path / "run", alone2)


@pytest.mark.parametrize("change, said", [("iteration", "iteration is 4 on rank 0, but 6 on rank 1"),
                                          ("seed", "seed is 0 on rank 0, but 1 on rank 1")])
def test_ranks_that_do_not_go_on_from_the_same_are_refused(change, said, photos, alone, tmp_path):
    for rank in (0, 1):                                                      # two nodes, each with a folder of its own
        shutil.copytree(alone, tmp_path / f"{rank}")
    checkpoint = load(alone / "last.pt")
    if change == "iteration":
        torch.save(checkpoint | dict(iteration=4), tmp_path / "0" / "last.pt")
    else:
        torch.save(checkpoint | dict(run=checkpoint["run"] | dict(seed=1)), tmp_path / "1" / "last.pt")
    (tmp_path / "node.py").write_text(f"""
import os, sys, train
train.main(["--resume", {str(tmp_path)!r} + "/" + os.environ["RANK"], *sys.argv[1:]])
""")
    code, _, errors = in_ranks(2, tmp_path / "node.py")
    assert code != 0 and errors.count("error: ") == 1
    assert (f"error: {said}: give all nodes the same data and flags, and a folder for --out and --resume that they "
            "share\n") in errors


def test_ranks_with_different_data_are_refused(photos, tmp_path):
    for rank in (0, 1):
        shutil.copytree(photos, tmp_path / f"{rank}")
    (tmp_path / "1" / "train" / "cat" / "00.png").unlink()                    # a copy that is not complete
    (tmp_path / "node.py").write_text(f"""
import os, sys, train
train.main(["--data", {str(tmp_path)!r} + "/" + os.environ["RANK"], *sys.argv[1:]])
""")
    code, _, errors = in_ranks(2, tmp_path / "node.py", "--out", tmp_path / "run", *SMALL)
    assert code != 0 and errors.count("error: ") == 1
    assert "error: train_images is 24 on rank 0, but 23 on rank 1: give all nodes the same data" in errors
    assert not (tmp_path / "run").exists()


def test_ranks_wait_in_the_group_without_a_time_limit(monkeypatch):
    groups = []
    monkeypatch.setattr(processes, "cpu_group", "the group whose limit is a day")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda group=None: groups.append(group))
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda values, value, group=None: (
        groups.append(group), values.__setitem__(slice(None), [value, value])))
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert processes.once_per_node(str, 7) == "7"
    assert processes.on_rank_0(str, 7) == "7" and processes.all_gather(7) == [7, 7]
    assert groups == 4 * ["the group whose limit is a day"]


def test_a_rank_waits_for_another_ranks_work(tmp_path):
    (tmp_path / "program.py").write_text("""
import pathlib, sys, time
from harness import processes

def work(done=pathlib.Path(sys.argv[1])):
    if processes.is_rank_0():
        time.sleep(0.5)                            # for the other one to come here, if nothing held it
        done.touch()
    return done.exists()

processes.setup("cpu")
assert processes.once_per_node(work)
sys.stdout.write(processes.on_rank_0(lambda: "from 0\\n" if processes.is_rank_0() else "from 1\\n"))
""")
    code, said, errors = in_ranks(2, tmp_path / "program.py", tmp_path / "done")
    assert code == 0, errors
    assert said.split("\n") == ["from 0", "from 0", ""]


def test_a_gpu_is_named_when_nccl_starts_and_waiting_is_glooss_for_a_day(monkeypatch):
    calls = []
    monkeypatch.setattr(processes, "cpu_group", None)
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), (1, 2, 1, "localhost", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: calls.append(device))
    monkeypatch.setattr(processes, "fast_dtype", lambda device: "bfloat16")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(torch.distributed.HashStore(), 1, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(torch.distributed, "new_group", lambda **kwargs: calls.append(kwargs) or "for waiting")
    assert processes.setup() == (1, 2, torch.device("cuda:1"), torch.bfloat16)
    (backend,), started = calls[1]
    assert calls[0] == "cuda:1" and backend == "nccl" and started["device_id"] == torch.device("cuda:1")
    assert calls[2] == dict(backend="gloo", timeout=timedelta(days=1)) and processes.cpu_group == "for waiting"
    assert (started["rank"], started["world_size"]) == (1, 2)


def test_a_nan_on_one_rank_stops_all_before_it_reaches_the_weights(photos, tmp_path):
    code, _, errors = sabotaged(2, photos, tmp_path / "run", 1, "train", 4, "nan")
    assert code != 0
    assert errors.count("error: the loss or its gradient is not a finite number at iteration 3;") == 1
    last = load(tmp_path / "run" / "last.pt")
    assert last["iteration"] == 3 and all(value.isfinite().all() for value in last["model"].values())


def test_a_program_ends_though_its_workers_ignore_signals(tmp_path):
    (tmp_path / "program.py").write_text("""
import sys
from data import Images, Shapes, eval_transform, loader, train_batches
images = Images(Shapes("train", 16), lambda image, rng: eval_transform(image, rng, 16))
batches = iter(loader(images, train_batches(400, 8), workers=2))              # held until the interpreter is gone
next(batches)
sys.exit(3)
""")
    ended = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=DEADLINE,
                           env=environment())
    assert ended.returncode == 3 and ended.stderr == ""
    assert not left_behind(tmp_path / "program.py")


def test_a_signal_within_the_handler_of_another_does_not_hang(tmp_path):
    (tmp_path / "program.py").write_text("""
import signal, sys, time
from harness import processes
def interrupt(frame, event, function):              # at each call and return within the handler, another signal comes
    sys.setprofile(None)
    signal.raise_signal(signal.SIGINT)
    seen.append(event)
    sys.setprofile(again)
def again(frame, event, function):
    if len(seen) < 50:
        interrupt(frame, event, function)
seen = []
processes.stop_on_signals()
processes.at_stake.set()
sys.setprofile(again)
signal.raise_signal(signal.SIGTERM)
sys.setprofile(None)
while processes.stop_requests.count(signal.SIGINT) < 3:
    time.sleep(0.01)
""")
    assert Program(tmp_path / "program.py").wait()[0] == 0


def test_a_program_that_waits_is_ended_by_a_second_signal_but_not_by_the_same_one_twice(tmp_path):
    clock, fifo = tmp_path / "clock", tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "program.py").write_text("""
import pathlib, sys, types
from harness import processes
clock, fifo = map(pathlib.Path, sys.argv[1:])

class Told(list):
    def append(self, number):
        super().append(number)
        print("asked", flush=True)

processes.time = types.SimpleNamespace(monotonic=lambda: float(clock.read_text()))
processes.stop_requests = Told(["a run that failed"])            # as replication.ladder does: not a signal
processes.stop_on_signals()
processes.at_stake.set()
print("ready", flush=True)
fifo.read_bytes()             # as long as nobody writes into the pipe
""")
    program, sentence = Program(tmp_path / "program.py", clock, fifo), "stopping as soon as everything is saved; a second signal ends it at once"
    wait_until(lambda: program.said() == "ready\n")
    clock.write_text("100")
    os.kill(program.pid, signal.SIGINT)                                      # from the terminal, and from torchrun
    wait_until(lambda: program.said() == f"ready\nasked\n{sentence}\n")
    clock.write_text("101.9")
    os.kill(program.pid, signal.SIGINT)
    wait_until(lambda: program.said() == f"ready\nasked\n{sentence}\nasked\n")
    clock.write_text("102.1")
    os.kill(program.pid, signal.SIGTERM)
    code, said, _ = program.wait()
    assert code == 128 + signal.SIGTERM and said.count("asked") == 2


@pytest.mark.parametrize("ignored, hangups", [(["SIGHUP"], 0), ([], 1)])
def test_under_nohup_a_run_goes_on_when_its_terminal_is_closed(ignored, hangups, tmp_path):
    (tmp_path / "program.py").write_text("""
import signal, sys, time
from harness import processes
processes.stop_on_signals()
processes.at_stake.set()
signal.raise_signal(signal.SIGHUP)
signal.raise_signal(signal.SIGTERM)
while signal.SIGTERM not in processes.stop_requests:             # they are taken in their order
    time.sleep(0.01)
sys.exit(processes.stop_requests.count(signal.SIGHUP))
""")
    assert Program(tmp_path / "program.py", ignored=ignored).wait()[0] == hangups


def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    ended = subprocess.run([sys.executable, ROOT / "train.py"], capture_output=True, env=environment(PYTHONPATH=tmp_path),
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # also in a script's background
    assert ended.returncode == -signal.SIGINT and ended.stderr == b""


def test_output_that_nobody_reads_holds_up_neither_a_run_nor_a_signal(photos, alone, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)                             # open, and never read
    os.set_blocking(pipe, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(pipe, b"x" * 4096)                                      # until it is full
    command = [ROOT / "train.py", "--data", photos, "--out", tmp_path / "run", *SMALL, *SAVING]
    os.set_blocking(pipe, True)
    program = Program(*command, out=tmp_path / "pipe")
    _, code = starter().wait_for_one([program])
    assert code == 0 and same(tmp_path / "run", alone)
    program = Program(ROOT / "tests" / "saboteur.py", 0, "train", 4, "SIGTERM", "--data", photos, "--out", tmp_path / "asked", *SMALL,
                      *SAVING, out=tmp_path / "pipe")
    _, code = starter().wait_for_one([program])
    assert code == 75 and load(tmp_path / "asked" / "last.pt")["iteration"] == 4
    os.close(pipe)


@pytest.mark.parametrize("lost", ["full", "a closed pipe", "closed"])
def test_a_run_goes_on_though_its_output_is_lost(lost, photos, alone, tmp_path):
    command = [str(ROOT / "train.py"), "--data", str(photos), "--out", str(tmp_path / "run"), *SMALL, *SAVING]
    if lost == "full":
        code, *_ = Program(*command, out="/dev/full").wait()
    elif lost == "a closed pipe":
        os.mkfifo(tmp_path / "pipe")
        program = Program(*command, out=tmp_path / "pipe")
        with open(tmp_path / "pipe") as pipe:
            assert pipe.readline().startswith("model")
        code, *_ = program.wait()
    else:                                                                    # Python itself starts without it
        code = subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "-", sys.executable, *command]).returncode
    assert code == 0 and same(tmp_path / "run", alone)


def test_two_processes_do_not_train_one_run(photos, alone, tmp_path, capsys):
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "program.py").write_text("""
import pathlib, signal, sys
from harness.run import lock
held = lock(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
signal.pause()
""")
    other = Program(tmp_path / "program.py", tmp_path / "run")
    wait_until(lambda: other.said() == "locked\n")
    flags = ["--resume", tmp_path / "run", "--device", "cpu"]
    said = refused(train, flags, capsys)
    assert f"run is being trained by process {other.pid} on {socket.gethostname()}: wait until that has ended; if it has, delete {tmp_path}/run/.lock" in said
    os.kill(other.pid, signal.SIGKILL)                                       # whoever dies does not keep it
    other.wait()
    resume(*flags[1:2])
    held = harness_run.lock(tmp_path / "run")
    code, _, errors = Program(ROOT / "train.py", *flags).wait()
    assert code == 2 and f"being trained by process {os.getpid()}" in errors             # this one still has it
    held.close()


def test_a_folder_that_rank_0_cannot_use_ends_all_ranks(photos, tmp_path):
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    code, _, errors = in_ranks(2, ROOT / "train.py", "--data", photos, "--out", tmp_path / "run", *SMALL)
    assert code != 0 and errors.count("error: ") == 1
    assert f"error: {tmp_path}/run/.lock: Is a directory: give another path" in errors


def test_what_the_system_refuses_is_reported_in_one_line(photos, tmp_path, capsys, monkeypatch):
    flags = [*SMALL, "--data", str(photos), "--out", str(tmp_path / "run")]
    with socket.socket() as taken, monkeypatch.context() as patch:
        taken.bind(("localhost", 0))
        taken.listen()
        for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=taken.getsockname()[1]).items():
            patch.setenv(name, str(value))
        assert "MASTER_PORT, is in use: give torchrun another --master_port" in refused(train, flags, capsys)
        patch.setenv("WORLD_SIZE", "0")
        assert "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT are 0, 0, 0, " in refused(train, flags, capsys)
        for name, value in (("WORLD_SIZE", "two"), ("RANK", "00"), ("MASTER_PORT", "99999"), ("MASTER_PORT", "text")):
            with monkeypatch.context() as wrong:
                wrong.setenv("WORLD_SIZE", "2")
                wrong.setenv(name, value)
                said = refused(train, flags, capsys)
                assert said.endswith(": start with torchrun, which sets them\n") and value in said
    assert "File name too long" in refused(train, [*SMALL, "--data", "a" * 300], capsys)
    monkeypatch.setattr(Images, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SystemExit) as end:
        train.main([*flags, "--workers", "1"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: a data-loading worker was ended by the system, which may be short of memory, shared")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


@pytest.mark.parametrize("lr, said", [("1e30", "the loss of 11 images is nan: "), ("1e39", "weights are not finite after iteration 1, which was not saved")])
def test_a_run_that_diverges_in_the_last_iteration_of_an_epoch_is_no_success(lr, said, photos, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(photos, tmp_path / "run", "--lr", lr, "--warmup-epochs", 0, "--batch-size", 24, "--save-every", 0)
    assert end.value.code == 2 and f"error: {said}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "best.pt").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_weights_that_are_not_finite_have_no_accuracy(photos, alone, tmp_path, capsys):
    checkpoint = load(alone / "last.pt")
    checkpoint["model"]["head.bias"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "last.pt")
    for program, flags in ((evaluation, [tmp_path / "last.pt", "--json", "--workers", 0]),
                           (evaluation, [tmp_path / "last.pt", "--image", photos / "val" / "cat" / "00.png"]),
                           (train, ["--data", photos, *SMALL, "--init-from", tmp_path / "last.pt"])):
        said = refused(program, flags, capsys)
        assert "last.pt: the weights head.bias hold numbers that are not finite: use an earlier checkpoint" in said


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("at", range(1, 14))
def test_a_run_killed_while_it_writes_has_a_checkpoint_that_loads(at, photos, alone, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, os, "replace", at, before=True)                      # each step of each file's writing
        run(photos, tmp_path / "run")
    assert list((tmp_path / "run").glob("*.tmp"))
    run(photos, tmp_path / "run", "--resume")
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert same(tmp_path / "run", alone)


def test_a_file_is_on_the_disk_before_it_takes_its_name(monkeypatch, tmp_path):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(("fsync", os.path.basename(os.readlink(
        f"/proc/self/fd/{file}")), os.fstat(file).st_size)) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append(("replace", old.name)) or replace(old, new))
    harness_run.write(tmp_path / "a", b"12345")
    assert calls == [("fsync", "a.tmp", 5), ("replace", "a.tmp")] and (tmp_path / "a").read_bytes() == b"12345"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_is_reported_and_what_was_saved_is_intact(ranks, photos, alone, alone2, tmp_path):
    code, _, errors = sabotaged(ranks, photos, tmp_path / "run", 0, "train", 4, "full disk")
    assert code != 0
    assert f"error: {tmp_path}/run/last.pt cannot be written (File too large): make room for it" in errors
    assert load(tmp_path / "run" / "last.pt")["iteration"] == 3 and not list((tmp_path / "run").glob("*.tmp"))
    if ranks == 1:
        resume(tmp_path / "run")
        assert same(tmp_path / "run", alone)


def test_a_read_only_file_system_is_reported(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ValueError, match=r"last.pt cannot be written \(Read-only file system\): make room for it"):
        harness_run.write(tmp_path / "last.pt", b"12345")


def test_a_checkpoint_copied_without_best_pt_gets_another_one(photos, alone, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, torch.optim.AdamW, "step", 4)                        # in the second epoch
        run(photos, tmp_path / "run")
    assert load(tmp_path / "run" / "last.pt")["best_acc1"] >= 0
    (tmp_path / "a b").mkdir()
    shutil.copy(tmp_path / "run" / "last.pt", tmp_path / "a b")
    resume(tmp_path / "a b")
    best = load(tmp_path / "a b" / "best.pt")
    assert best["epoch"] == 2 and best["best_acc1"] == metrics(tmp_path / "a b")[-1]["test_acc1"]
    assert f"evaluate it: python eval.py '{tmp_path}/a b/best.pt' --data {photos}\n" in capsys.readouterr().out
    (tmp_path / "a b" / "best.pt").unlink()
    resume(tmp_path / "a b")
    assert f"done    {tmp_path}/a b/last.pt; evaluate it: python eval.py '{tmp_path}/a b/last.pt'" in capsys.readouterr().out


def test_metrics_that_are_no_text_are_kept_as_they_are(photos, alone, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, torch.optim.AdamW, "step", 4)
        run(photos, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"\xff damaged\n")
    resume(tmp_path / "run")
    first, second = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()
    assert first == b"\xff damaged" and json.loads(second)["epoch"] == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4                                          # within a weight
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_taken(damage, photos, alone, tmp_path, capsys):
    shutil.copytree(alone, tmp_path / "run")
    damage(tmp_path / "run" / "last.pt")
    said = refused(evaluation, [tmp_path / "run" / "last.pt"], capsys)
    assert "run/last.pt cannot be read as a checkpoint" in said
    said = refused(train, ["--resume", tmp_path / "run" / "last.pt"], capsys)            # an explicit file
    assert "run/last.pt cannot be read as a checkpoint" in said
    run(photos, tmp_path / "run", "--resume")
    said = capsys.readouterr()
    assert said.err.startswith(f"warning: resuming from {tmp_path}/run/prev.pt, the one before, for ")
    assert f"resume  {tmp_path}/run/prev.pt at iteration 6 of 6" in said.out
    assert same(tmp_path / "run", alone)
    shutil.copytree(alone, tmp_path / "both")
    for name in ("last.pt", "prev.pt"):
        damage(tmp_path / "both" / name)
    said = refused(train, ["--data", photos, "--out", tmp_path / "both", *SMALL, "--resume"], capsys)
    assert f"no checkpoint in {tmp_path}/both is intact (" in said


def test_the_later_checkpoint_is_taken_whatever_the_files_times(photos, alone, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, torch.optim.AdamW, "step", 5)                        # with prev.pt of iteration 3, last.pt of 4
        run(photos, tmp_path / "run")
    os.utime(tmp_path / "run" / "last.pt", (0, 0))                           # as after a copy, or a clock set back
    run(photos, tmp_path / "run", "--resume")
    assert f"resume  {tmp_path}/run/last.pt at iteration 4 of 6" in capsys.readouterr().out
    assert same(tmp_path / "run", alone)


@pytest.mark.parametrize("name", harness_run.FILES)
def test_a_new_run_does_not_touch_the_files_of_another(name, photos, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes.tmp").write_text("mine too")
    said = refused(train, ["--data", photos, "--out", tmp_path, *SMALL], capsys)
    assert f"--out {tmp_path} holds another run: give another folder, or add --resume" in said
    (tmp_path / name).rename(tmp_path / "other")
    run(photos, tmp_path)
    assert (tmp_path / "notes.tmp").read_text() == "mine too" and (tmp_path / "other").read_text() == "mine"


def test_metrics_of_another_run_are_not_overwritten_by_resuming_nothing(photos, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert "holds another run" in refused(train, ["--data", photos, "--out", tmp_path, *SMALL, "--resume"], capsys)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_the_last_intact_checkpoint_outlives_a_damaged_one(at, photos, alone, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, torch.optim.AdamW, "step", 5)
        run(photos, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "last.pt")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, os, "replace", at, before=True)                      # until last.pt is prev.pt, not replaced yet
        run(photos, tmp_path / "run", "--resume")
    run(photos, tmp_path / "run", "--resume")
    assert same(tmp_path / "run", alone)


def test_a_checkpoint_that_would_run_code_is_refused(photos, alone, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)
    torch.save(load(alone / "last.pt") | dict(scaler=Trap()), tmp_path / "last.pt")
    for program, flags in ((train, ["--resume", tmp_path]), (train, ["--resume", tmp_path / "last.pt"]),
                           (train, ["--data", photos, *SMALL, "--init-from", tmp_path / "last.pt"]),
                           (evaluation, [tmp_path / "last.pt"])):
        assert "last.pt cannot be read as a checkpoint of weights and plain types" in refused(program, flags, capsys)
    assert not (tmp_path / "sprung").exists()


def test_nothing_is_loaded_but_weights_and_plain_types():
    sources = [path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parent.name != "tests"]
    loads = [call for source in sources for call in re.findall(r"torch\.load\(.*", source)]
    assert loads and all("weights_only=True" in call for call in loads)


@pytest.mark.parametrize("changes", [
    dict(width=2 ** 20), dict(depth=10 ** 6), dict(img_size=10 ** 6), dict(num_classes=10 ** 9), dict(heads=64),
    dict(width=10 ** 12, heads=1), dict(img_size=4096, patch_size=8, abs_pos=False)])
def test_absurd_shapes_are_refused_before_memory_is_taken(changes, alone, tmp_path, capsys):
    checkpoint = load(alone / "last.pt")
    if changes.get("abs_pos") is False:
        checkpoint["model"].pop("pos_embed")
    torch.save(checkpoint | dict(config=checkpoint["config"] | changes), tmp_path / "last.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for program, flags in ((evaluation, [tmp_path / "last.pt"]), (train, ["--resume", tmp_path, "--device", "cpu"])):
        if changes == dict(heads=64):                                        # as many weights: nothing to notice
            continue
        refused(program, flags, capsys)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000      # kB


def compress(checkpoint, path):
    torch.save(checkpoint, path)
    with zipfile.ZipFile(path) as stored:
        contents = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in contents.items():
            file.writestr(name, content)


def expand(checkpoint, path):
    weights = {name: value.flatten()[:1].clone().expand(value.shape) for name, value in checkpoint["model"].items()}
    torch.save(checkpoint | dict(model=weights), path)


@pytest.mark.parametrize("damage, said", [(compress, "(it is compressed): delete or replace it"),
                                          (expand, "is not a dict of tensors, dense and floating-point")])
def test_a_small_file_of_large_weights_is_refused(damage, said, alone, tmp_path, capsys):
    damage(load(alone / "last.pt"), tmp_path / "last.pt")
    assert said in refused(evaluation, [tmp_path / "last.pt"], capsys)


# ---------------------------------------------------------------------------------------------------------------------
# What does not go on


def test_within_an_epoch_a_run_goes_on_with_other_ranks_and_says_so(photos, alone, tmp_path):
    code, _, errors = sabotaged(2, photos, tmp_path / "run", 1, "train", 3, "SIGKILL")
    assert code != 0 and load(tmp_path / "run" / "last.pt")["iteration"] == 2
    two = load(tmp_path / "run" / "last.pt")
    code, said, errors = in_ranks(1, ROOT / "train.py", "--resume", tmp_path / "run")
    assert code == 0, errors
    assert "ranks   2 before, 1 now: what is drawn by rank, and rounding, will differ\n" in said
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [0, 1] and two["loss_sum"] > 0
    losses = [metrics(folder)[0]["train_loss"] for folder in (tmp_path / "run", alone)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)                   # a mean, however many ranks took part


def test_a_run_does_not_go_on_with_other_classes(photos, alone, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "owl").rename(tmp_path / "photos" / split / "ant")
    said = refused(train, ["--resume", alone, "--data", tmp_path / "photos", "--device", "cpu"], capsys)
    assert "has the classes ant, cat, dog, but the run to resume had cat, dog, owl: give the data that it was" in said


def test_half_an_environment_of_torchrun_is_refused(photos, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "0")
    said = refused(train, ["--data", photos, "--out", tmp_path / "run", *SMALL], capsys)
    assert "RANK is set, but not WORLD_SIZE, LOCAL_RANK, MASTER_PORT, MASTER_ADDR: start with torchrun" in said
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(train, ["--data", photos, "--out", tmp_path / "run", *SMALL], capsys)
    assert "WORLD_SIZE is set, but not RANK, LOCAL_RANK, MASTER_PORT, MASTER_ADDR: start with torchrun" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tasks", ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_tasks_of_a_batch_system_that_do_not_know_each_other_are_refused(tasks, photos, alone, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv(tasks, "2")
    for program, flags in ((train, ["--data", photos, "--out", tmp_path / "run", *SMALL]), (evaluation, [alone])):
        said = refused(program, flags, capsys)
        assert f"this is one of 2 tasks ({tasks}) that do not know of each other: start one per machine, srun" in said
    assert not (tmp_path / "run").exists()
    if tasks == "SLURM_NTASKS":                                              # a batch script that does not call srun
        monkeypatch.setenv("SLURM_PROCID", "0")
    else:
        monkeypatch.setenv(tasks, "1")                                       # all there is
    evaluation.main([str(alone), "--workers", "0"])


def test_no_line_is_lost_though_a_program_prints_faster_than_it_is_read(tmp_path):
    (tmp_path / "program.py").write_text("""
from harness import processes
processes.stop_on_signals()
for number in range(20_000):
    print(number)
""")
    code, said, _ = Program(tmp_path / "program.py").wait()
    assert code == 0 and said.split() == [str(number) for number in range(20_000)]


@pytest.mark.parametrize("value, ranks", [("0", 1), ("text", 1), ("", 1), ("2", 2)])
def test_a_wrong_number_of_local_ranks_is_taken_for_one(value, ranks, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert processes.local_world() == ranks and processes.default_workers() >= 0


def test_one_rank_under_torchrun_is_the_run_without_it(photos, alone, tmp_path):
    code, said, errors = in_ranks(1, ROOT / "train.py", "--data", photos, "--out", tmp_path / "run", *SMALL, *SAVING)
    assert code == 0, errors
    assert metrics(tmp_path / "run") == metrics(alone) and "\r" not in said + errors


def test_a_folder_that_cannot_be_made_is_refused(photos, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").symlink_to("nowhere")                                 # not tried again for ever
    said = refused(train, ["--data", photos, *SMALL], capsys)
    assert "--out out cannot be made (File exists): give another folder" in said
    (tmp_path / "file").touch()
    said = refused(train, ["--data", photos, "--out", tmp_path / "file" / "run", *SMALL], capsys)
    assert f"--out {tmp_path}/file/run cannot be made (Not a directory): give another folder" in said


# ---------------------------------------------------------------------------------------------------------------------
# Images


def spoiled(photos, root, names):
    shutil.copytree(photos, root)
    for name, content in zip(names, (b"", b"no image", (root / names[0]).read_bytes()[:60])):
        (root / name).write_bytes(content)
    return root


def test_unreadable_training_images_are_warned_of_once_and_counted(photos, monkeypatch, tmp_path, capsys):
    names = ["train/cat/00.png", "train/cat/03.png", "train/owl/05.png"]
    data = spoiled(photos, tmp_path / "photos", names)
    run(data, tmp_path / "alone")
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and all(line.startswith("warning: ") for line in warnings)
    for name in names:
        assert sum(f"{data}/{name} cannot be read as an image" in line for line in warnings) == 1
    assert [row["unreadable"] for row in metrics(tmp_path / "alone")] == [3, 3]
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, torch.optim.AdamW, "step", 3)
        run(data, tmp_path / "run", "--workers", 1)
    resume(tmp_path / "run")
    assert same(tmp_path / "run", tmp_path / "alone")


def test_a_run_stops_when_too_many_images_are_unreadable(photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    for path in (tmp_path / "photos" / "train").glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "photos", tmp_path / "run", "--workers", 1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and last == ("error: more than 10 of 24 training images cannot be read: see the "
                                            "warnings, and replace or remove them")


@pytest.mark.parametrize("workers", [0, 1])
def test_one_unreadable_image_in_val_is_an_error_that_names_it(workers, photos, tmp_path, capsys):
    data = spoiled(photos, tmp_path / "photos", ["val/dog/01.png"])
    with pytest.raises(SystemExit) as end:
        run(data, tmp_path / "run", "--workers", workers)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert re.fullmatch("error: .*dog/01.png cannot be read as an image .*: replace or remove it\n", said)
    assert load(tmp_path / "run" / "last.pt")["iteration"] == 3              # the epoch is not lost
    shutil.copy(photos / "val" / "dog" / "01.png", data / "val" / "dog")
    run(data, tmp_path / "run", "--resume")
    run(photos, tmp_path / "alone")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")


@pytest.mark.parametrize("size", [(1, 1), (2, 900), (900, 2), (1, 20_000), (20_000, 1)])
def test_images_of_any_shape_become_squares(size, tmp_path):
    Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "a.png")
    source = [(Image.open(tmp_path / "a.png"), 0)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side in (32, 64, 224, 384):
        for transform in (train_transform, eval_transform):
            image = transform(source[0][0], random.Random(0), side)
            assert image.size == (side, side) and image.getpixel((side // 2, side // 2))[0] > 190
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000                  # kB


def test_a_broken_exif_does_not_matter(tmp_path):
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    (tmp_path / "val" / "a").mkdir(parents=True)
    shutil.move(tmp_path / "a.jpg", tmp_path / "val" / "a")
    image, _ = open_data(str(tmp_path), "val", 32)[0]
    assert image.size == (40, 30) and image.mode == "RGB"


def test_a_file_is_what_it_holds_and_postscript_is_not_run(monkeypatch, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", "EPS")
    monkeypatch.setattr(subprocess, "Popen", None)                           # what Ghostscript would be started with
    with pytest.raises(ValueError, match=r"a.jpg cannot be read as an image \(its format is unknown\): replace"):
        read_image(tmp_path / "a.jpg")


def test_names_in_files_do_not_reach_the_terminal_as_codes(photos, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / f"{name}\x1b[31m").symlink_to(photos / split / name)
    run(tmp_path / "data", tmp_path / "run", "--epochs", 1)
    evaluation.main([str(tmp_path / "run"), "--image", str(photos / "val" / "cat" / "00.png")])
    said = capsys.readouterr().out
    assert "cat\N{REPLACEMENT CHARACTER}[31m\n" in said and "\x1b" not in said
    (tmp_path / "data" / "val" / "owl\x1b[31m").mkdir()
    said = refused(train, ["--data", tmp_path / "data", *SMALL], capsys)
    assert "owl\N{REPLACEMENT CHARACTER}[31m" in said and "\x1b" not in said


def test_names_are_printed_where_the_terminal_has_no_letters_for_them(photos, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / f"{name}\N{GREEK SMALL LETTER PI}").symlink_to(photos / split / name)
    run(tmp_path / "data", tmp_path / "run", "--epochs", 1)
    said = subprocess.run([sys.executable, ROOT / "eval.py", tmp_path / "run", "--image", photos / "val" / "cat" / "00.png"],
                          capture_output=True, text=True, env=environment(PYTHONIOENCODING="ascii"))
    assert said.returncode == 0 and r"cat\u03c0" in said.stdout and said.stderr == ""


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    grey = Image.new("I;16", (4, 4), 0x8000)
    grey.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (128, 128, 128)


def test_classes_are_sorted_as_names_and_numbers_keep_their_place(photos, tmp_path, capsys):
    for number, name in ((0, "cat"), (10, "dog"), (2, "owl")):
        for split in ("train", "val"):
            shutil.copytree(photos / split / name, tmp_path / "photos" / split / str(number))
    run(tmp_path / "photos", tmp_path / "run")
    assert load(tmp_path / "run" / "best.pt")["classes"] == ["0", "10", "2"]
    shutil.move(tmp_path / "photos" / "val" / "0", tmp_path)                 # labels must not move up
    capsys.readouterr()
    evaluation.main([str(tmp_path / "run" / "best.pt"), "--data", str(tmp_path / "photos"), "--json"])
    whole = json.loads(capsys.readouterr().out)
    source = open_data(str(tmp_path / "photos"), "val", 16, ["0", "10", "2"])
    assert whole["images"] == len(source) and set(source.labels.tolist()) == {1, 2}
