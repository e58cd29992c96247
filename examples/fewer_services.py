"""Switch off what the Supervisor does by itself, and save by a rule of your own: every 500 steps."""

import argparse
from pathlib import Path

import tensorflow as tf

import digits_model
from stepguard.tensorflow import Supervisor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--logdir", default="runs/fewer_services")
parser.add_argument("--steps", type=int, default=2000, help="train up to this step (default: %(default)s)")
parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (default: %(default)s)")
args = parser.parse_args()

with tf.Graph().as_default():
    model = digits_model.build()
    my_saver = tf.compat.v1.train.Saver()

    # No summary thread, no checkpoint thread. With saver=None nothing is restored either: that is ours to do as well.
    sv = Supervisor(logdir=args.logdir, summary_op=None, saver=None)
    with sv.managed_session() as sess:
        newest = tf.train.latest_checkpoint(args.logdir)
        if newest:
            my_saver.restore(sess, newest)
            print(f"restored {newest}", flush=True)

        step = int(sess.run(model.global_step))
        while not sv.should_stop() and step < args.steps:
            sess.run(model.train_op)
            step += 1
            if step % args.save_every == 0:
                path = my_saver.save(sess, str(Path(args.logdir) / "mine.ckpt"), global_step=step)
                print(f"step {step:5d}   saved {path}", flush=True)
        print(f"test accuracy {sess.run(model.test_accuracy):.2%}", flush=True)
