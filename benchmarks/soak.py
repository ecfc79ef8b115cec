"""Does the memory of a long run stay flat? Two ranks with four workers each, looked at twice a minute (Linux).

    python -m benchmarks.soak --out out/soak-shapes.jsonl --size nano --depth 4
    python -m benchmarks.soak --out out/soak-photos.jsonl --size nano --depth 4 --data PATH --recipe small-data ...

What it does not know goes to train.py. A row: the minute, and of each process the memory that it shares with none, in
10^6 bytes, and its open files, the two ranks first, then their workers in the order in which they started.
"""
import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.run import append_row

ROOT = Path(__file__).resolve().parents[1]


def children(pid):
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for file in found for child in file.read_text().split())


def look_at(pid):
    """(bytes of memory of its own, open files)"""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    own = sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))
    return own * 1024, len(os.listdir(f"/proc/{pid}/fd"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--out", help="append the rows to this file")
    args, flags = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   ROOT / "train.py", "--device", "cpu", "--workers", "4", "--epochs", "100000", "--save-every", "200",
                   "--out", Path(folder, "run"), *flags]
        launcher = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
        started = time.time()
        while time.time() - started < 60 * args.minutes and launcher.poll() is None:
            time.sleep(30)
            ranks = children(launcher.pid)
            looks = [look_at(pid) for pid in ranks + [worker for rank in ranks for worker in children(rank)]]
            row = dict(flags=" ".join(flags), minute=round((time.time() - started) / 60, 1),
                       own_mb=[round(own / 1e6, 1) for own, _ in looks], open_files=[files for _, files in looks])
            append_row(row, args.out)
        if launcher.poll() is not None:
            sys.exit(f"error: the run ended by itself, with code {launcher.returncode}")
        launcher.send_signal(signal.SIGTERM)
        launcher.wait()


if __name__ == "__main__":
    main()
