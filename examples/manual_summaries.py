"""Write summaries yourself, every 100 steps, instead of every so many seconds."""

import argparse

import tensorflow as tf

import digits_model
from stepguard.tensorflow import Supervisor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--logdir", default="runs/manual_summaries")
parser.add_argument("--steps", type=int, default=1000, help="train up to this step (default: %(default)s)")
args = parser.parse_args()

with tf.Graph().as_default():
    model = digits_model.build()
    summary_op = tf.compat.v1.summary.merge_all()

    # As summary_op is None, managed_session() starts no summary thread.
    sv = Supervisor(logdir=args.logdir, summary_op=None)
    with sv.managed_session() as sess:
        for step in range(sess.run(model.global_step), args.steps):
            if sv.should_stop():
                break
            if step % 100 == 0:
                summary, loss = sess.run([summary_op, model.loss])
                sv.summary_computed(sess, summary, global_step=step)
                print(f"step {step:5d}   loss {loss:.4f}   summary written", flush=True)
            sess.run(model.train_op)
        print(f"test accuracy {sess.run(model.test_accuracy):.2%}", flush=True)
