"""Starts programs in a moment: a process that has imported torch forks, and the child becomes the program.

A request is a line of JSON on stdin. dict(command, environment, folder, out, err, ignored, constants) is answered by
the child's process id, null by [process id, exit code] of the next child that ends.
"""
import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path

# What takes long to import, and nothing of ours: each child imports that itself.
import numpy  # noqa: F401
import PIL.Image  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed  # noqa: F401
import torch.utils.data  # noqa: F401
import torchvision.transforms.v2  # noqa: F401
import tqdm  # noqa: F401

gc.freeze()              # collections in a child leave the memory shared
for line in sys.stdin:
    request = json.loads(line)
    if request is None:
        child, status = os.wait()
        print(json.dumps([child, os.waitstatus_to_exitcode(status)]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        break                                            # out of the loop, to become the program
    print(child, flush=True)
else:
    sys.exit()

os.setsid()
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)                 # as Python starts
for name in request["ignored"]:
    signal.signal(signal.Signals[name], signal.SIG_IGN)
for number, path in enumerate((os.devnull, request["out"], request["err"])):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY)
    os.dup2(file, number)
    os.close(file)
os.chdir(request["folder"])
os.environ.clear()
os.environ.update(request["environment"])
program, *sys.argv[1:] = request["command"]
code = 0
try:
    for name, value in request["constants"].items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    if program == "-m":
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    else:
        sys.argv[0], sys.path[0], __file__ = program, str(Path(program).parent), program
        exec(compile(Path(program).read_bytes(), program, "exec"))       # in this module, which is __main__
except SystemExit as end:
    code = end.code or 0
except BaseException:
    traceback.print_exc()
    code = 1
# As Python ends, but for the second that freeing all of torch's modules takes.
for thread in threading.enumerate():
    if thread != threading.main_thread() and not thread.daemon:
        thread.join()
atexit._run_exitfuncs()
try:
    sys.stdout.flush()
except OSError:
    code = 120
os._exit(code)
