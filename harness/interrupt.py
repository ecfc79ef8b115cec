"""Imported first by a program: until it has imported torch, which takes seconds, Ctrl-C ends it without a traceback."""
import signal

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
