"""The classifier that the examples train, so that each of them can show one use of the Supervisor and little else."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

import digits_data

v1 = tf.compat.v1


class Model(NamedTuple):
    """What a training loop needs of the graph: ``train_op`` takes one step, the others are scalars."""

    train_op: Any
    global_step: Any
    loss: Any
    test_accuracy: Any


def build(images: Any = None, labels: Any = None, *, batch_size: int = 128, optimizer: Any = None) -> Model:
    """Build the classifier in the default graph, with a summary of its loss and one of its test accuracy.

    ``images`` (``[n, 64]``, 0 to 16) and ``labels`` (``[n]``) are a batch. Without them batches are drawn from the
    training digits, each as a function of the step: a resumed run goes on with the batches that it would have seen.
    ``optimizer`` is Adam, unless another is given.
    """
    global_step = v1.train.get_or_create_global_step()
    train, test = digits_data.load()
    if images is None:
        picked = tf.random.stateless_uniform(
            [batch_size], seed=tf.stack([1, global_step]), maxval=len(train.labels), dtype=tf.int32
        )
        images = tf.gather(tf.constant(train.images), picked)
        labels = tf.gather(tf.constant(train.labels), picked)

    with v1.variable_scope("digits"):
        w1 = v1.get_variable("w1", [64, 64], initializer=v1.glorot_uniform_initializer(seed=1))
        b1 = v1.get_variable("b1", [64], initializer=v1.zeros_initializer())
        w2 = v1.get_variable("w2", [64, 10], initializer=v1.glorot_uniform_initializer(seed=2))
        b2 = v1.get_variable("b2", [10], initializer=v1.zeros_initializer())

    def logits_of(pixels: Any) -> Any:
        return tf.matmul(tf.nn.relu(tf.matmul(tf.cast(pixels, tf.float32) / 16.0, w1) + b1), w2) + b2

    loss = loss_of(logits_of(images), labels)
    optimizer = v1.train.AdamOptimizer(2e-3) if optimizer is None else optimizer
    train_op = optimizer.minimize(loss, global_step=global_step)
    test_accuracy = accuracy_of(logits_of(test.images), test.labels)
    v1.summary.scalar("loss", loss)
    v1.summary.scalar("test_accuracy", test_accuracy)
    return Model(train_op, global_step, loss, test_accuracy)


def loss_of(logits: Any, labels: Any) -> Any:
    """Return the mean cross-entropy of ``logits`` (``[n, 10]``) against ``labels`` (``[n]``), a scalar."""
    labels = tf.cast(labels, tf.int32)
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))


def accuracy_of(logits: Any, labels: Any) -> Any:
    """Return the share of ``labels`` (``[n]``) that have the largest of their ``logits`` (``[n, 10]``), a scalar."""
    answers = tf.argmax(logits, axis=1, output_type=tf.int32)
    return tf.reduce_mean(tf.cast(tf.equal(answers, tf.cast(labels, tf.int32)), tf.float32))
