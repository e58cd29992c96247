"""Use a SessionManager by itself: it says whether the model could be restored, and the program decides what to do."""

import argparse
from pathlib import Path

import tensorflow as tf

import digits_model
from stepguard.tensorflow import SessionManager

v1 = tf.compat.v1

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--logdir", default="runs/session_manager")
parser.add_argument("--steps", type=int, default=500, help="steps of this run (default: %(default)s)")
args = parser.parse_args()

with tf.Graph().as_default():
    model = digits_model.build()
    saver = v1.train.Saver()
    initialise = v1.global_variables_initializer()
    uninitialised = v1.report_uninitialized_variables()
    manager = SessionManager(ready_op=uninitialised, local_init_op=v1.local_variables_initializer())

    sess, restored = manager.recover_session("", saver=saver, checkpoint_dir=args.logdir)
    with sess:
        if not restored:
            sess.run(initialise)
            assert not sess.run(uninitialised).size
        first = int(sess.run(model.global_step))
        print(f"restored at step {first}" if restored else "nothing to restore: initialised", flush=True)

        for step in range(first, first + args.steps):
            _, loss = sess.run([model.train_op, model.loss])
            if step % 100 == 0:
                print(f"step {step:5d}   loss {loss:.4f}", flush=True)

        Path(args.logdir).mkdir(parents=True, exist_ok=True)
        path = saver.save(sess, str(Path(args.logdir) / "model.ckpt"), global_step=model.global_step)
        print(f"saved {path}", flush=True)
        print(f"test accuracy {sess.run(model.test_accuracy):.2%}", flush=True)
