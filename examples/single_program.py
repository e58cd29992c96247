"""Train a digit classifier under a Supervisor, in one process.

Kill it at any moment and start it again: it goes on from its newest checkpoint.
"""

import argparse

import tensorflow as tf

import digits_data
from stepguard import Saving
from stepguard.tensorflow import Supervisor

v1 = tf.compat.v1

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--logdir", default="runs/single_program", help="checkpoints and event files (default: %(default)s)"
)
parser.add_argument("--steps", type=int, default=3000, help="train up to this step (default: %(default)s)")
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--save-model-secs", type=int, default=1, help="seconds between checkpoints (default: %(default)s)")
parser.add_argument("--save-model-steps", type=int, help="steps between checkpoints, in addition")
args = parser.parse_args()

train, test = digits_data.load()

with tf.Graph().as_default():
    global_step = v1.train.get_or_create_global_step()

    # A batch is a function of the step, so that a resumed run goes on with the batches that it would have seen.
    picked = tf.random.stateless_uniform(
        [args.batch_size], seed=tf.stack([1, global_step]), maxval=len(train.labels), dtype=tf.int32
    )
    images = tf.gather(tf.constant(train.images), picked)
    labels = tf.gather(tf.constant(train.labels), picked)

    # The model: 64 pixels, 128 hidden units, 10 digits.
    w1 = v1.get_variable("w1", [64, 128], initializer=v1.glorot_uniform_initializer(seed=1))
    b1 = v1.get_variable("b1", [128], initializer=v1.zeros_initializer())
    w2 = v1.get_variable("w2", [128, 10], initializer=v1.glorot_uniform_initializer(seed=2))
    b2 = v1.get_variable("b2", [10], initializer=v1.zeros_initializer())

    def logits_of(pixels):
        return tf.matmul(tf.nn.relu(tf.matmul(tf.cast(pixels, tf.float32) / 16.0, w1) + b1), w2) + b2

    loss = tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tf.cast(labels, tf.int32), logits=logits_of(images))
    )
    train_op = v1.train.AdamOptimizer(1e-3).minimize(loss, global_step=global_step)

    answers = tf.argmax(logits_of(tf.constant(test.images)), axis=1, output_type=tf.int32)
    accuracy = tf.reduce_mean(tf.cast(tf.equal(answers, tf.cast(test.labels, tf.int32)), tf.float32))

    v1.summary.scalar("loss", loss)
    v1.summary.scalar("test_accuracy", accuracy)

    # From here on the Supervisor restores or initialises, checkpoints, and writes the summaries.
    sv = Supervisor(
        logdir=args.logdir,
        save_model_secs=args.save_model_secs,
        save_summaries_secs=1,
        saving=Saving(save_model_steps=args.save_model_steps),
    )
    with sv.managed_session() as sess:
        step = sess.run(global_step)
        print(f"resumed at step {step} from {sv.save_path}-{step}" if step else "starting from scratch", flush=True)

        while not sv.should_stop() and step < args.steps:
            _, loss_now = sess.run([train_op, loss])
            step += 1
            if step % 500 == 0:
                print(f"step {step:5d} of {args.steps}   loss {loss_now:.4f}", flush=True)

        print(f"test accuracy {sess.run(accuracy):.2%}", flush=True)
