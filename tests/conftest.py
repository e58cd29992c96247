"""The environment of every test, set before any of them imports TensorFlow. Processes that tests start inherit it."""

import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else sums differ in their last bits from run to run
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the tests need no accelerator, and must not take somebody's

# A script that starts the gate in its background has it ignore Ctrl-C, and so would all that the tests send one to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
