"""Classes that programs derive from the Supervisor: what they override is called, what they use is there."""

import inspect

import pytest
import tensorflow as tf
from harness import OURS, THEIRS, assert_same, counting_model, files, outcome, run, shown, v1, wait_until

HOOKS = (
    "_init_ready_op",
    "_init_init_op",
    "_init_local_init_op",
    "_init_saver",
    "_init_summary_op",
    "_init_global_step",
    "_init_session_manager",
    "_verify_setup",
    "_write_graph",
    "_get_first_op_from_collection",
    "_default_global_step_tensor",
)


def private(names):
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_every_private_method_of_theirs_can_be_overridden_here():
    methods = private(name for name, _ in inspect.getmembers(THEIRS.Supervisor, inspect.isfunction))
    assert methods == set(HOOKS)
    for name in HOOKS:
        theirs, ours = (inspect.signature(getattr(side.Supervisor, name)).parameters for side in (THEIRS, OURS))
        assert list(ours) == list(theirs), name


@pytest.mark.parametrize("is_chief", [True, False])
def test_every_private_attribute_of_theirs_can_be_read_here(is_chief, tmp_path):
    def scenario(side, logdir):
        counting_model()
        sv = side.Supervisor(logdir=logdir, is_chief=is_chief, init_feed_dict={}, init_fn=None)
        found = {name: shown(getattr(sv, name, "missing"), logdir) for name in theirs_attributes(logdir)}
        for name in ("_summary_writer", "_session_manager", "_coord", "_meta_graph_def"):
            found[name] = found[name] is not None
        return found

    def theirs_attributes(logdir):
        with tf.Graph().as_default():
            counting_model()
            return sorted(private(vars(THEIRS.Supervisor(is_chief=is_chief))))

    assert "missing" not in assert_same(scenario, tmp_path).values()


def test_the_hooks_are_called_in_the_same_order_with_the_same_arguments(tmp_path):
    def scenario(side, logdir):
        v1.get_variable("global_step", [], tf.int64, v1.zeros_initializer(), use_resource=False)
        calls = []

        def told(name):
            def call(self, *args, **kwargs):
                calls.append((name, args, sorted(kwargs)))
                return getattr(super(derived, self), name)(*args, **kwargs)

            return call

        derived = type("Derived", (side.Supervisor,), {name: told(name) for name in HOOKS})
        sv = derived(logdir=logdir)
        with sv.managed_session(start_standard_services=False):
            pass
        return calls

    calls = assert_same(scenario, tmp_path)
    assert {name for name, _, _ in calls} == set(HOOKS)


def test_what_the_hooks_set_is_what_is_used(tmp_path):
    def scenario(side, logdir):
        class Derived(side.Supervisor):
            def _init_saver(self, saver=side.Supervisor.USE_DEFAULT):
                self._saver = v1.train.Saver([model.weights, model.global_step], max_to_keep=1)

            def _init_summary_op(self, summary_op=side.Supervisor.USE_DEFAULT):
                self._summary_op = None

            def _init_init_op(self, init_op=side.Supervisor.USE_DEFAULT, init_feed_dict=None):
                super()._init_init_op(init_op, init_feed_dict)
                self._init_op = tf.group(self._init_op, name="mine")

            def _init_session_manager(self, session_manager=None):
                super()._init_session_manager(session_manager)
                managers.append(self._session_manager)

            def _write_graph(self):
                pass

        model, managers = counting_model(), []
        sv = Derived(logdir=logdir, save_model_secs=0.01)
        with sv.managed_session() as sess:
            sess.run(model.train_op)
            wait_until(lambda: tf.train.latest_checkpoint(logdir))
        return (
            sv.saver.saver_def.max_to_keep,
            sv.summary_op,
            sv.init_op.name,
            sv.session_manager is managers[0],
            "graph.pbtxt" in files(logdir),
        )

    assert assert_same(scenario, tmp_path) == (1, None, "mine", True, False)


def test_what_is_set_after_the_constructor_counts_from_the_next_session_on(tmp_path):
    def scenario(side, logdir):
        class Derived(side.Supervisor):
            def __init__(self, **options):
                self.kept = v1.train.Saver([v1.global_variables()[0]])
                value = tf.compat.v1.placeholder_with_default(5.0, [])
                with tf.control_dependencies([v1.global_variables_initializer()]):
                    init = tf.group(v1.assign(v1.global_variables()[0], [value, value]))
                super().__init__(**options)
                self._init_op = init
                self._init_feed_dict = {value: 7.0}
                self._init_fn = lambda sess: told.append(sess.run(model.weights).tolist())
                self._saver = self.kept
                self._save_path = f"{self._logdir}/other"
                self._save_model_secs = 0.01
                self._stop_grace_secs = 60
                self._summary_writer = writer

        model, told, writer = counting_model(), [], v1.summary.FileWriter(logdir)
        sv = Derived(logdir=logdir, save_model_secs=3600)
        with sv.managed_session() as sess:
            sess.run(model.train_op)
            wait_until(lambda: tf.train.latest_checkpoint(logdir))
        newest = tf.train.load_checkpoint(tf.train.latest_checkpoint(logdir))
        return (
            told,
            sv.saver is sv.kept,
            sorted(newest.get_variable_to_shape_map()),
            tf.train.latest_checkpoint(logdir).rpartition("-")[0] == f"{logdir}/other",
            sv.summary_writer is writer,
            sv.save_model_secs,
        )

    assert assert_same(scenario, tmp_path) == ([[7.0, 7.0]], True, ["weights"], True, True, 0.01)


def test_a_property_that_a_class_overrides_is_what_is_used(tmp_path):
    def scenario(side, logdir):
        class Derived(side.Supervisor):
            @property
            def save_path(self):
                return f"{logdir}/mine"

            @property
            def save_summaries_secs(self):
                return self.often  # There only after the constructor.

        model = counting_model()
        sv = Derived(logdir=logdir, save_model_secs=0.01)
        sv.often = 0
        with sv.managed_session() as sess:
            sess.run(model.train_op)
            wait_until(lambda: tf.train.latest_checkpoint(logdir))
        return tf.train.latest_checkpoint(logdir).rpartition("-")[0] == f"{logdir}/mine"

    assert assert_same(scenario, tmp_path) is True


def test_a_session_manager_that_a_class_makes_itself_is_used(tmp_path):
    def scenario(side, logdir):
        class Derived(side.Supervisor):
            def _init_session_manager(self, session_manager=None):
                self._session_manager = v1.train.SessionManager(
                    local_init_op=self._local_init_op, ready_op=self._ready_op, graph=self._graph
                )

        model = counting_model()
        sv = Derived(logdir=logdir, save_model_secs=0.01)
        with sv.managed_session() as sess:
            sess.run(model.train_op)
            wait_until(lambda: tf.train.latest_checkpoint(logdir))
            return type(sess).__name__, int(sess.run(model.global_step))

    assert assert_same(scenario, tmp_path) == ("Session", 1)


def test_a_worker_may_do_without_the_check_of_its_devices(tmp_path):
    def scenario(side, logdir):
        class Derived(side.Supervisor):
            def _verify_setup(self):
                pass

        counting_model(resource=False)
        return outcome(lambda: Derived(is_chief=False).is_chief)

    assert assert_same(scenario, tmp_path) == ("returned", False)


def test_public_methods_that_a_class_overrides_are_called(tmp_path):
    def scenario(side, logdir):
        calls = []

        class Derived(side.Supervisor):
            def prepare_or_wait_for_session(self, *args, **kwargs):
                calls.append("prepare")
                return super().prepare_or_wait_for_session(*args, **kwargs)

            def start_standard_services(self, sess):
                calls.append("services")
                return super().start_standard_services(sess)

            def start_queue_runners(self, sess, queue_runners=None):
                calls.append("queues")
                return super().start_queue_runners(sess, queue_runners)

            def stop(self, *args, **kwargs):
                calls.append("stop")
                return super().stop(*args, **kwargs)

        counting_model()
        with Derived(logdir=logdir).managed_session():
            pass
        return calls

    assert assert_same(scenario, tmp_path) == ["prepare", "services", "queues", "stop"]


def test_a_method_may_be_overridden_with_fewer_arguments_where_their_class_passes_no_more(tmp_path):
    def scenario(side, logdir):
        class Derived(side.Supervisor):
            def prepare_or_wait_for_session(self, master="", config=None, start_standard_services=True):
                return super().prepare_or_wait_for_session(
                    master, config, start_standard_services=start_standard_services
                )

        model = counting_model()
        with Derived(logdir=logdir).managed_session() as session:
            return int(session.run(model.global_step))

    assert assert_same(scenario, tmp_path) == 0


@pytest.mark.parametrize("name", ["save", "metrics", "close", "_build", "_train"])
def test_a_method_of_the_class_s_own_may_have_a_name_that_theirs_has_not(name, tmp_path):
    def scenario(side, logdir):
        model = counting_model()
        derived = type("Derived", (side.Supervisor,), {name: lambda self, sess: int(sess.run(model.global_step))})
        sv = derived(logdir=logdir, save_model_secs=0.05, stop_grace_secs=10)
        with sv.managed_session() as sess:
            sess.run(model.train_op)
            wait_until(lambda: tf.train.latest_checkpoint(logdir))
            return getattr(sv, name)(sess)

    assert assert_same(scenario, tmp_path) == 1


def with_a_constructor_of_its_own(side, session_manager):
    """A class as programs have it that do not want the graph finalised: theirs, without the last line."""

    class NotFinal(side.Supervisor):
        def __init__(self, logdir):
            self._graph = v1.get_default_graph()
            self._init_ready_op()
            self._init_init_op()
            self._init_local_init_op()
            self._init_saver()
            self._init_summary_op()
            self._init_global_step()
            self._meta_graph_def = v1.train.export_meta_graph()
            self._is_chief = True
            self._coord = tf.train.Coordinator()
            self._recovery_wait_secs, self._stop_grace_secs = 30, 10
            self._init_fn = self._local_init_run_options = None
            self._logdir = logdir
            self._save_path = logdir and f"{logdir}/model.ckpt"
            self._save_summaries_secs = self._save_model_secs = 0.05
            self._summary_writer = logdir and v1.summary.FileWriter(logdir)
            self._graph_added_to_summary = False
            self._init_session_manager(session_manager=session_manager and session_manager(self))
            self._verify_setup()

    return NotFinal


def theirs_for(sv):
    return v1.train.SessionManager(local_init_op=sv._local_init_op, ready_op=sv._ready_op, graph=sv._graph)


@pytest.mark.parametrize("session_manager", [None, theirs_for])
@pytest.mark.parametrize("has_logdir", [True, False])
@pytest.mark.parametrize("error", [None, ValueError("v"), tf.errors.OutOfRangeError(None, None, "o")])
def test_a_constructor_that_does_not_call_theirs(error, has_logdir, session_manager, tmp_path):
    def scenario(side, logdir):
        found = []
        for _ in range(2):
            with tf.Graph().as_default() as graph:
                model = counting_model()
                sv = with_a_constructor_of_its_own(side, session_manager)(logdir if has_logdir else None)

                def train(sv=sv, model=model):
                    with sv.managed_session() as sess:
                        tf.constant("the graph is open")
                        sv.loop(None, sess.run, (model.weights,))
                        began.append(int(sess.run(model.global_step)))
                        for _ in range(3):
                            sess.run(model.train_op)
                        if has_logdir:
                            wait_until(lambda: tf.train.latest_checkpoint(logdir))
                        if error is not None:
                            raise error

                found.append((outcome(train), sv.should_stop(), sv.coord.should_stop(), graph.finalized))
        return found

    began = []
    assert_same(scenario, tmp_path)
    # Theirs may have saved no more than the beginning, and so may ours before an error.
    if not isinstance(error, ValueError):
        assert began[2:] == [0, 3 if has_logdir else 0] or OURS.name == "itself"


def test_a_preparation_of_the_class_s_own(tmp_path):
    """As programs have it whose queues must run before the model can be initialised."""

    def scenario(side, logdir):
        class QueuesFirst(side.Supervisor):
            def prepare_or_wait_for_session(self, master="", config=None, *args, **kwargs):
                self._coord.clear_stop()
                sess, is_recovered = self._session_manager.recover_session(
                    master, self.saver, checkpoint_dir=self._logdir, config=config
                )
                self.start_queue_runners(sess)
                if not is_recovered:
                    sess.run(self.init_op, feed_dict=self._init_feed_dict)
                    assert self._session_manager._model_ready(sess) == (True, None)
                self._write_graph()
                self.start_standard_services(sess)
                return sess

        found = []
        for _ in range(2):
            with tf.Graph().as_default():
                queue = v1.train.input_producer(tf.constant([1.0, 2.0]), shuffle=False).dequeue()
                first = v1.get_variable("first", initializer=queue)
                model = counting_model()
                sv = QueuesFirst(logdir=logdir, save_model_secs=0.05, stop_grace_secs=10)
                with sv.managed_session() as sess:
                    found.append(float(sess.run(first)))
                    began.append(int(sess.run(model.global_step)))
                    for _ in range(3):
                        sess.run(model.train_op)
                    wait_until(lambda: tf.train.latest_checkpoint(logdir))
        return found

    began = []
    assert_same(scenario, tmp_path)
    assert began[2:] == [0, 3] or OURS.name == "itself"


@pytest.mark.skipif(OURS.name == "itself", reason="of ours alone")
class TestNamesThatStepguardNeedsItself:
    @pytest.mark.parametrize("name", ["_observe", "open_session"])
    def test_are_refused_when_the_class_is_made(self, name):
        with pytest.raises(TypeError, match=f"Derived: {name}: a Supervisor of Stepguard needs"):
            type("Derived", (OURS.Supervisor,), {name: lambda self: None})

    def test_are_refused_when_an_object_has_set_one_before_it_is_a_supervisor(self, tmp_path):
        class Derived(OURS.Supervisor):
            def __init__(self, engine):
                self._engine = engine
                super().__init__()

        with tf.Graph().as_default(), pytest.raises(TypeError, match="Derived: _engine: a Supervisor of Stepguard"):
            counting_model()
            Derived("a game engine")

    @pytest.mark.parametrize("name", ["_store", "_options", "_life", "_worker_role"])
    def test_are_refused_at_the_session_when_they_were_set_later(self, name, tmp_path):
        def scenario(side, logdir):
            counting_model()
            sv = side.Supervisor()
            setattr(sv, name, {})
            with sv.managed_session():
                pass

        with pytest.raises(TypeError, match=f"Supervisor: {name}: a Supervisor of Stepguard"):
            run(scenario, OURS, tmp_path)

    def test_a_coordinator_of_another_kind_is_one(self, tmp_path):
        class Derived(OURS.Supervisor):
            def __init__(self):
                super().__init__()
                self._coord = tf.train.Coordinator()

        with tf.Graph().as_default(), pytest.raises(TypeError, match="_coord: expected"):
            counting_model()
            Derived()
