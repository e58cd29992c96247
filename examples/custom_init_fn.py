"""Start from weights of your own: a linear classifier that begins as "which average digit is it nearest to?".

``init_fn`` is called once, after ``init_op``, when there is no checkpoint to restore.
"""

import argparse

import numpy as np
import tensorflow as tf

import digits_data
import digits_model
from stepguard.tensorflow import Supervisor

v1 = tf.compat.v1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--logdir", default="runs/custom_init_fn")
parser.add_argument("--steps", type=int, default=1000, help="train up to this step (default: %(default)s)")
args = parser.parse_args()

train, test = digits_data.load()

with tf.Graph().as_default():
    global_step = v1.train.get_or_create_global_step()
    weights = v1.get_variable("weights", [64, 10])
    biases = v1.get_variable("biases", [10])

    def logits_of(pixels):
        return tf.matmul(tf.cast(pixels, tf.float32) / 16.0, weights) + biases

    loss = digits_model.loss_of(logits_of(train.images), train.labels)
    train_op = v1.train.AdamOptimizer(1e-2).minimize(loss, global_step=global_step)
    accuracy = digits_model.accuracy_of(logits_of(test.images), test.labels)

    # The graph may not change once the Supervisor has it: what init_fn runs is built here.
    means_in = v1.placeholder(tf.float32, [10, 64])
    start_from_means = tf.group(
        weights.assign(tf.transpose(means_in)), biases.assign(-tf.reduce_sum(means_in**2, axis=1) / 2)
    )

    def init_fn(sess):
        means = [train.images[train.labels == digit].mean(axis=0) / 16.0 for digit in range(10)]
        sess.run(start_from_means, {means_in: np.stack(means)})
        print(f"started from the ten average digits: test accuracy {sess.run(accuracy):.2%}", flush=True)

    sv = Supervisor(logdir=args.logdir, init_fn=init_fn)
    with sv.managed_session() as sess:
        step = int(sess.run(global_step))
        while not sv.should_stop() and step < args.steps:
            sess.run(train_op)
            step += 1
            if step % 200 == 0:
                print(f"step {step:5d}   loss {sess.run(loss):.4f}", flush=True)
        print(f"test accuracy {sess.run(accuracy):.2%}", flush=True)
