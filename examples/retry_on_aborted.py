"""Come back by yourself when the machine is taken away: each try has a graph, a supervisor and a session of its own.

A lost worker or parameter server shows as AbortedError. Here a step raises one, so that it can be seen on one machine.
"""

import argparse

import tensorflow as tf

import digits_model
from stepguard.tensorflow import Supervisor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--logdir", default="runs/retry_on_aborted")
parser.add_argument("--steps", type=int, default=3000, help="train up to this step (default: %(default)s)")
parser.add_argument("--preempt-at", type=int, nargs="*", default=[1000, 2000], help="lose the machine at these steps")
args = parser.parse_args()

preempt_at = set(args.preempt_at)


def train():
    with tf.Graph().as_default():
        model = digits_model.build()
        sv = Supervisor(logdir=args.logdir, save_model_secs=0.2)
        with sv.managed_session() as sess:
            step = int(sess.run(model.global_step))
            print(f"resumed at step {step}" if step else "starting from scratch", flush=True)
            while not sv.should_stop() and step < args.steps:
                sess.run(model.train_op)
                step += 1
                if step in preempt_at:
                    preempt_at.remove(step)
                    raise tf.errors.AbortedError(None, None, f"preempted at step {step}")
            print(f"test accuracy {sess.run(model.test_accuracy):.2%}", flush=True)


while True:
    try:
        train()
        break
    except tf.errors.AbortedError as error:
        print(f"{error.message}: trying again", flush=True)
