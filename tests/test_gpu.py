"""What is true on a GPU: one property a test. `python -m pytest -m gpu`; skipped where there is none.

GPU_TESTS_ON=cpu runs those that a CPU can, so that the tests themselves are tested everywhere.
"""
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import eval as evaluation
import model as architecture
import train
from conftest import DEADLINE, ROOT, SMALL, environment, equal, load, metrics
from downstream import segment
from downstream import anytime
from harness import processes
from harness import run as harness_run
from model import VisionTransformer, config
from test_model import CASES, build, hashed_images

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # of --deterministic; cuBLAS reads it once, when it starts
DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU")]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="nothing of it is on a CPU")
RUN = [*SMALL[:SMALL.index("--device")], "--device", DEVICE]
DTYPES = [pytest.param("float16", marks=needs_cuda), "bfloat16", "float32"]


@pytest.fixture(autouse=True)
def tf32_is_off():
    processes.use_tf32(False)


def run(photos, out, *flags):
    """Train in this process; returns what last.pt holds."""
    train.main(["--data", str(photos), "--out", str(out), *RUN, *map(str, flags)])
    return load(out / "last.pt")


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("step, alpha", [
    (step, alpha) for step in CASES for alpha in ((1.0, 0.5, 0.0) if "soft" in step else (None,))])
def test_float32_logits_and_gradients_are_those_of_the_cpu(step, alpha):
    found = []
    for device in ("cpu", DEVICE):
        net = build(step, alpha).to(device)
        logits = net(hashed_images(4).to(device))
        logits.square().mean().backward()
        found.append([logits.detach().cpu(), *(p.grad.cpu() for p in net.parameters())])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * ours.abs().max().item())


@pytest.mark.parametrize("step", ["vit", "abs_pos", "soft_mask", "soft_log"])
def test_it_compiles_in_one_graph_and_not_again_when_alpha_changes(step):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = build(step).to(DEVICE).train()
    images = hashed_images(4).to(DEVICE)
    with torch.no_grad():
        expected = []
        for alpha in (1.0, 0.7, 0.5, 0.0):
            if "soft" in step:
                net.set_soft_mask(alpha)
            expected.append(net(images))
    compiled = torch.compile(net, fullgraph=True)
    for alpha, logits in zip((1.0, 0.7, 0.5, 0.0), expected):
        if "soft" in step:
            net.set_soft_mask(alpha)
        torch.testing.assert_close(compiled(images).detach(), logits, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("step, alpha", [("vit", None), ("abs_pos", None), ("soft_log", 0.0), ("soft_log", 0.5)])
def test_masks_before_the_softmax_take_a_fused_kernel(step, alpha):
    net, dtype = build(step, alpha).to(DEVICE), torch.bfloat16
    fused = [SDPBackend.FLASH_ATTENTION]
    if step != "vit":                                    # with a table: the class token's row in the last block, too
        fused.append(SDPBackend.EFFICIENT_ATTENTION)
    with torch.autocast(DEVICE, dtype), sdpa_kernel(fused):                  # an error if none of them applies
        assert net(hashed_images(2).to(DEVICE)).isfinite().all()


@needs_cuda
def test_memory_under_a_causal_mask_grows_with_the_tokens_not_their_square():
    peaks = []
    for img_size in (256, 512, 1024):                    # 257, 1,025 and 4,097 tokens
        net = VisionTransformer(config("tiny", "abs_pos", depth=4, img_size=img_size)).to(DEVICE).train()
        images = torch.randn(2, 3, img_size, img_size, device=DEVICE)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = net(images).sum()
        loss.backward()
        peaks.append((torch.cuda.max_memory_allocated() - before) / net.cfg.tokens)
        del net, images, loss
    assert max(peaks[1:]) < 1.3 * peaks[0]               # a table of 4,097 x 4,097 would be 200 MB for each map


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("dtype, flags", [
    pytest.param("float16", [], marks=needs_cuda), ("bfloat16", []), ("bfloat16", ["--compile"]), ("bfloat16", ["--recompute"]),
    ("float32", [])])
def test_21_iterations_are_finite_and_the_loss_falls(dtype, flags, photos, tmp_path):
    run(photos, tmp_path, "--dtype", dtype, "--epochs", 7, "--lr", 2e-3, "--mixup", 0.1, "--cutmix", 0.1, "--erasing", 0.1, *flags)
    losses = [row["train_loss"] for row in metrics(tmp_path)]
    assert len(losses) == 7 and losses[-1] < losses[0]
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["time_device"] == (torch.cuda.get_device_name() if DEVICE == "cuda" else row["time_device"])


@needs_cuda
def test_an_overflow_of_float16_is_skipped_and_training_goes_on(photos, monkeypatch, tmp_path):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(*args, **kwargs, init_scale=2.0 ** 24))
    checkpoint = run(photos, tmp_path, "--dtype", "float16", "--epochs", 7, "--lr", 2e-3)
    assert checkpoint["scaler"]["scale"] < 2.0 ** 24 and checkpoint["optimizer"][0]["step"] < 21
    losses = [row["train_loss"] for row in metrics(tmp_path)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_ends_as_the_run_left_alone(dtype, photos, monkeypatch, tmp_path):
    """Bit for bit on the same card, with --deterministic."""
    flags = ["--dtype", dtype, "--deterministic", "--drop-path", 0.5, "--mixup", 0.8, "--cutmix", 1, "--erasing", 0.25]
    alone = run(photos, tmp_path / "alone", *flags)
    run(photos, tmp_path / "run", *flags)
    assert equal(alone, load(tmp_path / "run" / "last.pt"))                  # the same command, the same run

    def save_and_stop(folder, improved=False):
        save(folder, improved)
        if folder.state.iteration == 4:
            raise InterruptedError
    save = harness_run.RunFolder.save
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(harness_run.RunFolder, "save", save_and_stop)
        run(photos, tmp_path / "cut", *flags, "--save-every", 2)
    assert load(tmp_path / "cut" / "last.pt")["iteration"] == 4
    train.main(["--resume", str(tmp_path / "cut"), "--device", DEVICE, "--deterministic", "--workers", "0"])
    assert equal(load(tmp_path / "cut" / "last.pt"), alone)


@pytest.fixture(autouse=True)
def deterministic_is_off():
    yield
    torch.use_deterministic_algorithms(False)


@needs_cuda
def test_an_iteration_waits_for_the_device_once(photos, monkeypatch, tmp_path):
    """In Monitor.check(); any other wait is an error between the first check and the last."""
    def check(monitor, *args):
        torch.cuda.set_sync_debug_mode("default")
        checks.append(1)
        total = original(monitor, *args)
        torch.cuda.set_sync_debug_mode("error" if len(checks) < 3 else "default")
        return total
    checks, original = [], harness_run.Monitor.check
    monkeypatch.setattr(harness_run.Monitor, "check", check)
    try:
        run(photos, tmp_path, "--epochs", 1, "--soft-mask-epochs", 1, "--mixup", 0.8, "--cutmix", 1, "--erasing", 0.25,
            "--drop-path", 0.2, "--micro-batch", 4, "--dtype", "bfloat16")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(checks) == 3


def test_one_rank_joins_its_group_with_another_on_the_cpu_beside_it():
    """NCCL on a GPU, and gloo, in which ranks wait; DistributedDataParallel on top."""
    program = f"""
        import torch
        from harness import processes
        from harness.run import Machine
        from model import VisionTransformer, config
        device = torch.device("{DEVICE}", 0) if "{DEVICE}" == "cuda" else torch.device("cpu")
        processes.join(0, 1, device)
        model = VisionTransformer(config("nano", depth=2, img_size=32, patch_size=8)).to(device)
        net = processes.wrap(model, model.blocks, Machine(), world=2)
        net(torch.randn(2, 3, 32, 32, device=device)).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert processes.once_per_node(lambda: 7) == 7 and processes.all_gather("x") == ["x"]
        print(torch.distributed.get_backend(), torch.distributed.get_backend(processes.cpu_group))
        processes.shut_down()
    """
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", sys.executable, "-c",
         textwrap.dedent(program)], capture_output=True, text=True, timeout=DEADLINE, env=environment(), cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-2:] == ["nccl" if DEVICE == "cuda" else "gloo", "gloo"]


def test_a_step_that_takes_too_much_memory_ends_the_run_in_a_sentence_and_keeps_what_was_saved(photos, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(train, "evaluate", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        run(photos, tmp_path)
    saved = load(tmp_path / "last.pt")                                       # before the first evaluation

    def forward(model, images):
        if DEVICE == "cuda":
            return torch.empty(1 << 50, device=images.device)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    monkeypatch.setattr(architecture.VisionTransformer, "forward", forward)
    with pytest.raises(SystemExit) as end:
        train.main(["--resume", str(tmp_path), "--device", DEVICE, "--workers", "0"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "too little free memory for this: add --recompute, or start with a smaller --micro-batch" in said
    assert equal(load(tmp_path / "last.pt"), saved)


# ---------------------------------------------------------------------------------------------------------------------
# The programs around it


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_evaluation_counts_as_on_the_cpu(dtype, photos, tmp_path, capsys):
    run(photos, tmp_path, "--dtype", "float32")
    found = []
    for device, kind in ((DEVICE, dtype), ("cpu", "float32")):
        capsys.readouterr()
        evaluation.main([str(tmp_path), "--device", device, "--dtype", kind, "--workers", "0", "--json"])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["test_loss"] == pytest.approx(found[1]["test_loss"], rel=1e-3) and found[0]["images"] == 11


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_segmentation_trains(head, tmp_path):
    segment.main(["--size", "nano", "--depth", "4" if head == "linear" else "12", "--head", head, "--img-size", "32", "--short-side", "32",
                  "--iterations", "4", "--eval-every", "4", "--warmup", "1", "--batch-size", "4", "--micro-batch", "4", "--workers", "0",
                  "--device", DEVICE, "--out", str(tmp_path)])
    assert 0 <= metrics(tmp_path)[-1]["test_miou"] <= 100


def test_reading_row_by_row_gives_what_reading_at_once_does():
    net = build("abs_pos").to(DEVICE)
    images = hashed_images(2).to(DEVICE)
    reader = anytime.Reader(net)
    with torch.no_grad():
        for row in range(net.cfg.grid):
            reader.read(images[:, :, row * net.cfg.patch_size: (row + 1) * net.cfg.patch_size])
        torch.testing.assert_close(reader.answer(), net(images), rtol=1e-4, atol=1e-4)
