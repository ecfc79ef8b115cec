"""What the harness promises: each test provokes a fault of the kind that long runs meet."""
import os
import random
import re
import shutil
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from conftest import (ROOT, SMALL, Program, equal, in_ranks, left_behind, load, metrics, refused, torchrun,
                      wait_until)
from data import Images
from harness import processes
from harness.files import replacing
from harness.flags import InputError
from harness.run import FILES, RunFolder, write

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
# Killed at any moment and resumed: the run left alone


@pytest.mark.parametrize("iteration", range(1, 7))
def test_a_run_killed_at_any_iteration_ends_as_the_run_left_alone(iteration, photos, alone, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, torch.optim.AdamW, "step", iteration)
        run(photos, tmp_path / "run")
    torch.rand(7)                                                            # whatever state the generators are in
    random.random()
    run(photos, tmp_path / "run", "--resume", "--workers", 2 * (iteration % 2))
    assert same(tmp_path / "run", alone)


def test_a_run_interrupted_three_times_ends_as_the_run_left_alone(photos, alone, monkeypatch, tmp_path):
    for evaluations in (1, 1, 2):                                            # one fails, and is the first of the next start
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_in(patch, train, "evaluate", evaluations, before=True)
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


def test_any_optimizer_resumes_exactly_and_what_another_one_saved_is_refused(photos, monkeypatch, tmp_path, capsys):
    for momentum in (0.0, 0.9):                                              # which keep nothing, and one tensor
        monkeypatch.setattr(train, "make_optimizer", lambda model, recipe: torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=momentum))
        alone, other = tmp_path / f"alone-{momentum}", tmp_path / f"run-{momentum}"
        run(photos, alone)
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_in(patch, torch.optim.SGD, "step", 5)
            run(photos, other)
        resume(other)
        assert same(other, alone)
    monkeypatch.undo()
    capsys.readouterr()
    assert "what the optimizer has saved is of another optimizer or model" in refused(train, ["--resume", alone, "--device", "cpu"], capsys)


def test_moments_of_another_shape_are_refused(alone, tmp_path, capsys):
    checkpoint = load(alone / "last.pt")
    checkpoint["optimizer"][0]["exp_avg"] = torch.ones(2)                    # beyond whose end the fused AdamW would write
    torch.save(checkpoint, tmp_path / "last.pt")
    assert "what the optimizer has saved is of another" in refused(train, ["--resume", tmp_path, "--device", "cpu"], capsys)


def test_after_a_resume_an_epoch_goes_on_with_the_images_that_it_has_not_seen(photos, monkeypatch, tmp_path):
    taken, load_one = [], Images.__getitem__
    monkeypatch.setattr(Images, "__getitem__", lambda images, key: taken.append(key) or load_one(images, key))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, RunFolder, "save", 1)                                    # with iteration 2 saved
        run(photos, tmp_path / "run")
    resume(tmp_path / "run", "--workers", 0)
    first_epoch = [index for epoch, index in taken if epoch == 0][:24]       # later ones are evaluated
    assert sorted(first_epoch) == list(range(24))


@pytest.mark.parametrize("at", range(1, 9))
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
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append("replace") or replace(old, new))
    write(tmp_path / "a", b"12345")
    assert calls == ["fsync", "replace"] and (tmp_path / "a").read_bytes() == b"12345"


def test_a_killed_rank_ends_the_others_and_the_run_resumes_exactly(photos, alone2, tmp_path):
    code, said, _ = sabotaged(2, photos, tmp_path / "run", 1, "train", 5, "SIGKILL", "--workers", 2)
    assert code != 0 and "\r" not in said
    assert load(tmp_path / "run" / "last.pt")["iteration"] == 4
    assert len(metrics(tmp_path / "run")) == 1                               # every line parses
    code, _, errors = in_ranks(2, ROOT / "train.py", "--resume", tmp_path / "run", "--workers", 1)
    assert code == 0, errors
    assert same(tmp_path / "run", alone2)


def test_torchrun_restarts_a_run_that_is_killed_twice(photos, alone2, tmp_path):
    launch = partial(torchrun, flags=["--max-restarts=2"])                   # at the third iteration after each start
    code, said, errors = sabotaged(2, photos, tmp_path / "run", 1, "train", 3, "SIGKILL", "--resume", launch=launch)
    assert code == 0, errors
    assert "nothing to resume" in said and "at iteration 2 of 6\n" in said and "at iteration 4 of 6\n" in said
    assert same(tmp_path / "run", alone2)


# ---------------------------------------------------------------------------------------------------------------------
# Signals


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
    (0, "train", 4, "SIGTERM to the launcher", 4), (0, "train", 2, "SIGINT to the launcher", 2), (1, "train", 1, "SIGTERM", 1),
    (1, "evaluate", 1, "SIGTERM", 3)])
def test_a_signal_ends_all_ranks_at_one_iteration(rank, moment, number, fault, iteration, photos, alone2, tmp_path):
    launch = torchrun if "launcher" in fault else in_ranks
    code, said, errors = sabotaged(2, photos, tmp_path / "run", rank, moment, number, fault, "--workers", 1, launch=launch)
    assert code == (1 if launch == torchrun else 75) and "SIGKILL" not in errors         # after torchrun's 30 seconds
    saved = load(tmp_path / "run" / "last.pt")["iteration"]
    assert saved == iteration if launch == in_ranks else saved in (iteration, iteration + 1)     # it comes by the launcher
    assert said.splitlines()[-1].startswith(f"preempted at iteration {saved};")
    code, _, errors = in_ranks(2, ROOT / "train.py", "--resume", tmp_path / "run")
    assert code == 0, errors
    assert same(tmp_path / "run", alone2)


def test_main_leaves_signals_as_it_found_them_and_no_request_behind(photos, monkeypatch, tmp_path):
    before = [signal.getsignal(number) for number in processes.SIGNALS]
    run(photos, tmp_path / "run", "--epochs", 1)
    monkeypatch.setattr(RunFolder, "log", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        run(photos, tmp_path / "asked")
    assert end.value.code == 75 and processes.stop_requests == []
    assert [signal.getsignal(number) for number in processes.SIGNALS] == before


def test_a_program_that_calls_another_one_keeps_its_handlers():
    with processes.report_errors():
        processes.stop_on_signals()
        with processes.report_errors():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert processes.stop_requests == [signal.SIGTERM]
    assert processes.stop_requests == []


def test_under_nohup_a_run_goes_on_when_its_terminal_is_closed(monkeypatch):
    with monkeypatch.context():
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            processes.stop_on_signals()
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            assert processes.stop_requests == [signal.SIGTERM]
        finally:
            processes.restore_signals()
            signal.signal(signal.SIGHUP, before)
            processes.stop_requests.clear()


def test_a_pipe_that_nobody_reads_any_more_does_not_cost_the_save(photos, alone, tmp_path):
    reading, writing = os.pipe()
    program = Program(ROOT / "tests" / "saboteur.py", 0, "train", 4, "SIGINT to all", "--data", photos, "--out", tmp_path / "run",
                      *SMALL, *SAVING, out=writing)
    os.close(reading)                                                        # as of `train.py | tee`, on Ctrl-C
    os.close(writing)
    assert program.wait()[0] == 75 and load(tmp_path / "run" / "last.pt")["iteration"] == 4
    resume(tmp_path / "run")
    assert same(tmp_path / "run", alone)


def test_a_bug_in_mid_epoch_ends_a_program_though_its_workers_ignore_signals(photos, tmp_path):
    code, _, errors = sabotaged(1, photos, tmp_path / "run", 0, "train", 2, "a bug", "--workers", 2)
    assert code == 1 and "TypeError: a bug" in errors


# ---------------------------------------------------------------------------------------------------------------------
# Which run, which data


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
    assert "run is being trained by another process: wait until that has ended\n" in refused(train, flags, capsys)
    os.kill(other.pid, signal.SIGKILL)                                       # whoever dies does not keep it
    other.wait()
    resume(tmp_path / "run")


@pytest.mark.parametrize("change, said", [("iteration", "iteration is 4 on rank 0, but 6 on rank 1"),
                                          ("seed", "seed is 0 on rank 0, but 1 on rank 1")])
def test_ranks_that_do_not_go_on_from_the_same_are_refused(change, said, alone, tmp_path):
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
    assert code == 2 and f"error: {said}: give all nodes the same data and flags, and a folder for --out and" in errors


@pytest.mark.parametrize("program, own", [("train", ["--init-from", "{weights}"]), ("train", ["--lr", "1"]),
                                          ("train", ["--data", "{data}"]), ("downstream.segment", ["--init-from", "{weights}"])])
def test_a_flag_that_one_rank_alone_is_given_is_named_and_not_waited_for(program, own, photos, finished, tmp_path):
    shutil.copytree(photos, tmp_path / "data")
    own = [flag.format(weights=finished / "best.pt", data=tmp_path / "data") for flag in own]
    (tmp_path / "node.py").write_text(f"""
import os, sys, {program} as program
own = {own!r} if os.environ["RANK"] == "1" else []
program.main([*sys.argv[1:], *own])
""")
    flags = ["--data", photos, *SMALL] if program == "train" else ["--size", "nano", "--depth", "2", "--workers", "0"]
    code, _, errors = in_ranks(2, tmp_path / "node.py", *flags, "--out", tmp_path / "run")
    name = own[0].removeprefix("--").replace("-", "_")
    assert code == 2 and f"error: {name} is " in errors and "on rank 0, but" in errors
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_images_below_the_same_path_are_refused(photos, tmp_path):
    for rank in (0, 1):                                                      # two nodes with disks of their own
        shutil.copytree(photos, tmp_path / f"{rank}" / "data")
    (tmp_path / "1" / "data" / "train" / "cat" / "00.png").unlink()          # a copy that is not complete
    (tmp_path / "node.py").write_text(f"""
import os, sys, train
os.chdir({str(tmp_path)!r} + "/" + os.environ["RANK"])
train.main(["--data", "data", *sys.argv[1:]])
""")
    code, _, errors = in_ranks(2, tmp_path / "node.py", "--out", tmp_path / "run", *SMALL)
    assert code == 2 and "error: train_images is 24 on rank 0, but 23 on rank 1: give all nodes the same data" in errors
    assert not (tmp_path / "run").exists()


def test_within_an_epoch_a_run_goes_on_with_other_ranks_and_says_so(photos, alone, tmp_path):
    code, _, errors = sabotaged(2, photos, tmp_path / "run", 1, "train", 3, "SIGKILL")
    assert code != 0 and load(tmp_path / "run" / "last.pt")["iteration"] == 2
    code, said, errors = in_ranks(1, ROOT / "train.py", "--resume", tmp_path / "run")
    assert code == 0, errors
    assert "ranks   2 before, 1 now: rounding will differ, and what is drawn by rank\n" in said
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [0, 1]
    losses = [metrics(folder)[0]["train_loss"] for folder in (tmp_path / "run", alone)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)                   # a mean, however many ranks took part


def test_one_rank_under_torchrun_is_the_run_without_it(photos, alone, tmp_path):
    code, said, errors = in_ranks(1, ROOT / "train.py", "--data", photos, "--out", tmp_path / "run", *SMALL, *SAVING)
    assert code == 0, errors
    assert metrics(tmp_path / "run") == metrics(alone) and "\r" not in said + errors


@pytest.mark.parametrize("name", FILES)
def test_a_new_run_does_not_touch_the_files_of_another(name, photos, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    said = refused(train, ["--data", photos, "--out", tmp_path, *SMALL], capsys)
    assert f"--out {tmp_path} holds another run: give another folder, or add --resume" in said
    assert (tmp_path / name).read_text() == "mine"


def test_a_program_replaces_its_own_files_alone_and_whole(tmp_path):
    path = tmp_path / "made"
    for content in (b"by me", b"by me again"):
        with replacing(path, "by me") as file:
            file.write_bytes(content)
    with pytest.raises(InputError, match="is there, and not of another program"), replacing(path, "another program"):
        pass
    with pytest.raises(KeyboardInterrupt), replacing(path, "by me") as file:
        file.write_bytes(b"by me, hal")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"by me again" and [*tmp_path.iterdir()] == [path]
    with pytest.raises(InputError, match="is a folder that is not empty"), replacing(tmp_path, "by me"):
        pass
    with replacing("/dev/null", "by me") as file:
        file.write_bytes(b"by me")
    assert Path("/dev/null").is_char_device()


# ---------------------------------------------------------------------------------------------------------------------
# Files, numbers and the system


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_is_reported_and_what_was_saved_is_intact(ranks, photos, alone, tmp_path):
    code, _, errors = sabotaged(ranks, photos, tmp_path / "run", 0, "train", 4, "full disk")
    assert code == 2
    assert f"error: {tmp_path}/run/last.pt cannot be written (File too large): make that possible" in errors
    assert load(tmp_path / "run" / "last.pt")["iteration"] == 3 and not list((tmp_path / "run").glob("*.tmp"))
    if ranks == 1:
        resume(tmp_path / "run")
        assert same(tmp_path / "run", alone)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4                                          # within a weight
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])
def test_a_damaged_checkpoint_is_noticed(damage, photos, alone, tmp_path, capsys):
    shutil.copytree(alone, tmp_path / "run")
    damage(tmp_path / "run" / "last.pt")
    for program, flags in ((evaluation, [tmp_path / "run" / "last.pt"]), (train, ["--resume", tmp_path / "run"]),
                           (train, ["--data", photos, *SMALL, "--init-from", tmp_path / "run" / "last.pt"])):
        assert "run/last.pt cannot be read as a checkpoint" in refused(program, flags, capsys)


def test_a_checkpoint_that_would_run_code_is_refused(photos, alone, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)
    torch.save(load(alone / "last.pt") | dict(scaler=Trap()), tmp_path / "last.pt")
    for program, flags in ((train, ["--resume", tmp_path]), (evaluation, [tmp_path / "last.pt"]),
                           (train, ["--data", photos, *SMALL, "--init-from", tmp_path / "last.pt"])):
        said = refused(program, flags, capsys)
        assert re.search(r"last.pt cannot be read as a checkpoint .* \(it holds \S+, which could run code\): delete", said)
    assert not (tmp_path / "sprung").exists()


def test_a_nan_on_one_rank_stops_all_before_it_reaches_the_weights(photos, tmp_path):
    code, _, errors = sabotaged(2, photos, tmp_path / "run", 1, "train", 4, "nan")
    assert code == 2 and "error: the loss or its gradient is not a finite number at iteration 3;" in errors
    last = load(tmp_path / "run" / "last.pt")
    assert last["iteration"] == 3 and all(value.isfinite().all() for value in last["model"].values())


def test_weights_that_are_not_finite_have_no_accuracy(alone, tmp_path, capsys):
    checkpoint = load(alone / "last.pt")
    checkpoint["model"]["head.bias"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "last.pt")
    said = refused(evaluation, [tmp_path / "last.pt", "--json", "--workers", 0], capsys)
    assert "the loss of 11 images is nan: the weights hold numbers that are not finite" in said


def test_what_the_system_refuses_is_reported_in_one_line(photos, monkeypatch, tmp_path, capsys):
    flags = [*SMALL, "--data", str(photos), "--out", str(tmp_path / "run")]
    with socket.socket() as taken, monkeypatch.context() as patch:
        taken.bind(("localhost", 0))
        taken.listen()
        for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=taken.getsockname()[1]).items():
            patch.setenv(name, str(value))
        assert "MASTER_PORT, is in use: give torchrun another --master_port" in refused(train, flags, capsys)
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_model", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to")))
        assert "the GPU has too little free memory for this: add --recompute, or start" in refused(train, flags, capsys)
    monkeypatch.setattr(Images, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SystemExit) as end:
        train.main([*flags, "--workers", "1"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: a data-loading worker was ended by the system, which may be short")


@pytest.mark.parametrize("tasks", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_of_a_launcher_that_do_not_know_each_other_are_refused(tasks, photos, alone, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(tasks, "2")
    for program, flags in ((train, ["--data", photos, "--out", tmp_path / "run", *SMALL]), (evaluation, [alone])):
        said = refused(program, flags, capsys)
        assert f"this is one of 2 tasks ({tasks}) that do not know of each other: start one per machine, srun" in said
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(tasks, "1")                                           # all there is
    evaluation.main([str(alone), "--workers", "0"])


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
processes.shut_down()
""")
    code, said, errors = in_ranks(2, tmp_path / "program.py", tmp_path / "done")
    assert code == 0, errors
    assert said.split("\n") == ["from 0", "from 0", ""]


# ---------------------------------------------------------------------------------------------------------------------
# Images that cannot be read


def spoiled(photos, root, names):
    shutil.copytree(photos, root)
    for name, content in zip(names, (b"", b"no image", (root / names[0]).read_bytes()[:60])):
        (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_training_image_is_warned_of_once_and_the_next_takes_its_place(workers, photos, monkeypatch, tmp_path, capfd):
    names = ["train/cat/00.png", "train/cat/03.png", "train/owl/05.png"]
    data = spoiled(photos, tmp_path / "photos", names)
    run(data, tmp_path / "alone", "--workers", workers)
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 3 and all(line.startswith("warning: ") for line in warnings)
    for name in names:
        assert sum(f"{data}/{name} cannot be read as an image" in line for line in warnings) == 1
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_in(patch, torch.optim.AdamW, "step", 3)
        run(data, tmp_path / "run", "--workers", 1 - workers)
    resume(tmp_path / "run")
    assert same(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize("workers", [0, 1])
def test_where_no_image_can_be_read_the_first_is_an_error(workers, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    for path in (tmp_path / "photos" / "train").glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "photos", tmp_path / "run", "--workers", workers)
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and re.fullmatch("error: .*.png cannot be read as an image .*: replace or remove it", last)


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


def test_a_field_that_is_newer_than_the_run_had_its_default(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = load(finished / "last.pt")
    for part, name in (("config", "rope"), ("recipe", "flip")):              # as if the run were older than these
        checkpoint[part] = {field: value for field, value in checkpoint[part].items() if field != name}
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    assert "here is --no-flip, not --flip" in refused(train, ["--resume", tmp_path / "run", "--no-flip"], capsys)
    assert "here is --rope, not --no-rope" in refused(train, ["--resume", tmp_path / "run", "--rope"], capsys)
