"""Run a service of your own next to the standard ones: here, print the loss twice a second."""

import argparse

import tensorflow as tf

import digits_model
from stepguard.tensorflow import Supervisor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--logdir", default="runs/extra_service")
parser.add_argument("--steps", type=int, default=5000, help="train up to this step (default: %(default)s)")
parser.add_argument("--every-secs", type=float, default=0.5, help="seconds between two losses (default: %(default)s)")
args = parser.parse_args()

with tf.Graph().as_default():
    model = digits_model.build()

    def print_loss(sess):
        step, loss = sess.run([model.global_step, model.loss])
        print(f"step {step:5d}   loss {loss:.4f}", flush=True)

    sv = Supervisor(logdir=args.logdir)
    with sv.managed_session() as sess:
        # The thread stops when the supervisor does. An error in it stops the training, and is raised from this block.
        sv.loop(args.every_secs, print_loss, (sess,))

        for _ in range(sess.run(model.global_step), args.steps):
            if sv.should_stop():
                break
            sess.run(model.train_op)
        print(f"test accuracy {sess.run(model.test_accuracy):.2%}", flush=True)
