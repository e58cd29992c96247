"""Give every process what it needs, whether it starts or resumes: here, the training digits in memory.

``local_init_op`` runs in each new process, also after a restore. The variables that it fills are in no checkpoint: the
digits are read again from their file, and the checkpoints stay small.
"""

import argparse

import tensorflow as tf

import digits_data
import digits_model
from stepguard.tensorflow import Supervisor

v1 = tf.compat.v1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--logdir", default="runs/custom_local_init_op")
parser.add_argument("--steps", type=int, default=1000, help="train up to this step (default: %(default)s)")
args = parser.parse_args()


def read_digits():
    train, _ = digits_data.load()
    print(f"read {len(train.labels)} digits from {digits_data.CSV_PATH.name}", flush=True)
    return train.images, train.labels


with tf.Graph().as_default():
    images, labels = tf.numpy_function(read_digits, [], [tf.uint8, tf.uint8])
    # In no collection: neither the saver nor the default initialisers know of them.
    images_here = v1.Variable(tf.ensure_shape(images, [1438, 64]), collections=[], trainable=False, name="images")
    labels_here = v1.Variable(tf.ensure_shape(labels, [1438]), collections=[], trainable=False, name="labels")
    fill = tf.group(images_here.initializer, labels_here.initializer, name="read_digits")

    step_now = v1.train.get_or_create_global_step()
    picked = tf.random.stateless_uniform([128], seed=tf.stack([1, step_now]), maxval=1438, dtype=tf.int32)
    model = digits_model.build(tf.gather(images_here, picked), tf.gather(labels_here, picked))

    sv = Supervisor(logdir=args.logdir, local_init_op=fill)
    with sv.managed_session() as sess:
        step = int(sess.run(model.global_step))
        while not sv.should_stop() and step < args.steps:
            sess.run(model.train_op)
            step += 1
            if step % 200 == 0:
                print(f"step {step:5d}   loss {sess.run(model.loss):.4f}", flush=True)
        print(f"test accuracy {sess.run(model.test_accuracy):.2%}", flush=True)
