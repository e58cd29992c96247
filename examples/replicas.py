"""Train the digit classifier with replicas: parameter servers, a chief (worker 0) and more workers.

Alone:      python replicas.py
A cluster:  python replicas.py --ps HOST:PORT,... --workers HOST:PORT,... --job ps --task 0
            python replicas.py --ps HOST:PORT,... --workers HOST:PORT,... --job worker --task 0    (and 1, 2, ...)

Start the tasks in any order; kill any of them and start it again.
"""

import argparse

import tensorflow as tf

import digits_model
from stepguard import Watching
from stepguard.tensorflow import Supervisor, retry_on_lost_peer

v1 = tf.compat.v1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--logdir", default="runs/replicas", help="the chief's; on a file system that outlives it")
parser.add_argument("--steps", type=int, default=3000, help="train up to this step (default: %(default)s)")
parser.add_argument("--ps", default="", help="addresses of the parameter servers")
parser.add_argument("--workers", default="", help="addresses of the workers; the first one is the chief")
parser.add_argument("--job", choices=["ps", "worker"], default="worker")
parser.add_argument("--task", type=int, default=0)
parser.add_argument("--sync", action="store_true", help="every step waits for the gradients of all workers")
parser.add_argument("--save-model-secs", type=float, default=1)
parser.add_argument("--peer-timeout-secs", type=float, default=30, help="how long a silent server is waited for")
args = parser.parse_args()

is_chief = args.task == 0
workers = [address for address in args.workers.split(",") if address]
cluster = tf.train.ClusterSpec({"ps": args.ps.split(","), "worker": workers}) if workers else None
server = None if cluster is None else tf.distribute.Server(cluster, job_name=args.job, task_index=args.task)


def train():
    """One try: a graph, a supervisor and a session of its own."""
    with tf.Graph().as_default():
        # The variables on the parameter servers, all else on this worker. Alone, this places nothing.
        device = v1.train.replica_device_setter(cluster=cluster, worker_device=f"/job:worker/task:{args.task}")
        with v1.device(device):
            optimizer = v1.train.AdamOptimizer(2e-3)
            if args.sync:
                optimizer = v1.train.SyncReplicasOptimizer(optimizer, replicas_to_aggregate=max(1, len(workers)))
            model = digits_model.build(optimizer=optimizer)
            for_sync = {}
            if args.sync:
                queue_runner, init_tokens = optimizer.get_chief_queue_runner(), optimizer.get_init_tokens_op()
                for_sync["local_init_op"] = optimizer.chief_init_op if is_chief else optimizer.local_step_init_op
                for_sync["ready_for_local_init_op"] = optimizer.ready_for_local_init_op

        sv = Supervisor(
            logdir=args.logdir,
            is_chief=is_chief,
            save_model_secs=args.save_model_secs,
            watching=Watching(peer_timeout_secs=args.peer_timeout_secs),
            **for_sync,
        )
        with sv.managed_session(server.target if server else "") as sess:
            if args.sync and is_chief:
                sv.start_queue_runners(sess, [queue_runner])
                sess.run(init_tokens)
            step = int(sess.run(model.global_step))
            print(f"begins at step {step}", flush=True)
            reported = step
            while not sv.should_stop() and step < args.steps:
                _, step = sess.run([model.train_op, model.global_step])
                if step >= reported + 500:
                    reported = int(step)
                    print(f"step {step:5d}   test accuracy {sess.run(model.test_accuracy):.2%}", flush=True)
            if is_chief:
                print(f"test accuracy {sess.run(model.test_accuracy):.2%} after {step} steps", flush=True)


if args.job == "ps":
    server.join()
else:
    retry_on_lost_peer(train, max_losses=20, longest_wait_secs=5)
