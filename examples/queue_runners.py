"""Train from text files through TensorFlow's input queues, until the files have been read often enough.

The supervisor starts the queue runners and stops them. The end of the input ends the ``with`` block without an error.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

import digits_data
import digits_model
from stepguard.tensorflow import Supervisor

v1 = tf.compat.v1
tf.get_logger().setLevel("ERROR")  # TensorFlow would say of each queue that it is deprecated

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--logdir", default="runs/queue_runners")
parser.add_argument("--epochs", type=int, default=40, help="how often each file is read (default: %(default)s)")
args = parser.parse_args()


def write_files(folder):
    """Write the training digits as ten text files, a line for each digit, and return their paths."""
    train, _ = digits_data.load()
    rows = np.column_stack([train.images, train.labels])
    paths = []
    for number, part in enumerate(np.array_split(rows, 10)):
        paths.append(str(Path(folder) / f"digits-{number}.csv"))
        np.savetxt(paths[-1], part, fmt="%d", delimiter=",")
    return paths


with tempfile.TemporaryDirectory() as folder, tf.Graph().as_default():
    files = v1.train.string_input_producer(write_files(folder), num_epochs=args.epochs, seed=1)
    _, line = v1.TextLineReader().read(files)
    *pixels, label = tf.io.decode_csv(line, [[0]] * 65)
    images, labels = v1.train.shuffle_batch(
        [tf.stack(pixels), label], batch_size=128, capacity=2000, min_after_dequeue=1000, num_threads=2, seed=1
    )
    model = digits_model.build(images, labels)

    # A summary of the loss would take a batch away from the training, so no summaries are computed on a timer.
    sv = Supervisor(logdir=args.logdir, summary_op=None)
    with sv.managed_session() as sess:
        while not sv.should_stop():
            step, _, loss = sess.run([model.global_step, model.train_op, model.loss])
            if step % 100 == 0:
                print(f"step {step:5d}   loss {loss:.4f}", flush=True)
    print(f"the files were read {args.epochs} times: training is finished", flush=True)

    # The last step was saved when the block ended.
    with v1.Session() as sess:
        newest = tf.train.latest_checkpoint(args.logdir)
        sv.saver.restore(sess, newest)
        print(f"test accuracy {sess.run(model.test_accuracy):.2%} of {newest}", flush=True)
