"""The names that TensorFlow's tools give to the files of a checkpoint, in today's format and in the one before."""

import re
from pathlib import Path

import pytest

import stepguard
from stepguard.store import tensorflow_files
from stepguard.store.layout import Layout, SaverFiles

NAME = "model.ckpt-12"


@pytest.mark.parametrize(
    ("file_name", "is_own", "is_data"),
    [
        (f"{NAME}.index", True, True),
        (f"{NAME}.data-00001-of-00002", True, True),
        (f"{NAME}.data-100000-of-100001", True, True),
        (f"{NAME}.meta", True, False),
        (f"{NAME}-00001-of-00002", True, True),
        (NAME, False, True),  # the old format's, or a directory of another engine's
        (f"{NAME}.best.index", False, False),
        (f"{NAME}0.index", False, False),
        (f"{NAME}.data-1-of-2", False, False),
        (f"{NAME}.manifest.json", False, False),
    ],
)
def test_a_file_belongs_to_the_checkpoint_in_its_name_and_to_no_other(file_name, is_own, is_data):
    assert tensorflow_files.is_own(file_name, NAME) is is_own
    assert tensorflow_files.is_data(file_name, NAME) is is_data


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        ([".index", ".data-00000-of-00001"], None),
        ([".index"], ".data-00000-of-00001"),
        ([".index", ".data-00000-of-00002"], ".data-00001-of-00002"),
        ([".index", "-00000-of-00001"], ".data-00000-of-00001"),  # V1 data does not go with a V2 index
        (["-00000-of-00002", "-00001-of-00002"], None),
        (["-00001-of-00002"], "-00000-of-00002"),
        ([""], None),
    ],
)
def test_the_first_missing_data_file_is_named(present, missing):
    expected = None if missing is None else NAME + missing
    assert tensorflow_files.missing_data(NAME, [NAME + one for one in present]) == expected


def test_a_state_file_has_a_pattern_for_shards_of_the_old_format_only():
    listed = ["a-1.index", "a-1.data-00000-of-00001", "a-2-00000-of-00003", "a-3-00000-of-00002", "a-3.index"]
    stated = tensorflow_files.stated(["a-1", "a-2", "a-3", "a-4"], listed)
    assert stated == ["a-1", "a-2-?????-of-00003", "a-3", "a-4"]
    assert [tensorflow_files.without_pattern(one) for one in stated] == ["a-1", "a-2", "a-3", "a-4"]


@pytest.mark.parametrize("name", ["model.ckpt", "model.ckpt-7", "runs/3/model.ckpt-7"])
def test_what_is_given_as_a_name_is_recognised_again(name):
    assert tensorflow_files.checkpoint_of_entry(tensorflow_files.entry_file(name)) == name
    assert tensorflow_files.checkpoint_of_data(tensorflow_files.data_file(name, 3, 12)) == name
    assert tensorflow_files.without_old_shard(f"{name}-00000-of-00002") == name


def test_no_other_module_knows_these_names():
    suffix = re.compile(r"""["'}]\.(?:index|meta|data-)(?!data)|-of-\\d""")
    sources = Path(stepguard.__file__).parent.rglob("*.py")
    knowing = [one.name for one in sources if suffix.search(one.read_text(encoding="utf-8"))]
    assert knowing == [Path(tensorflow_files.__file__).name]


def test_another_framework_hands_in_names_of_its_own(tmp_path):
    class Abacus:
        """A saver that writes ``NAME.beads`` and ``NAME.frame``."""

        def __getattr__(self, name):
            return getattr(tensorflow_files, name)

        def entry_file(self, name):
            return f"{name}.frame"

        def checkpoint_of_entry(self, file_name):
            return file_name.removesuffix(".frame") if file_name.endswith(".frame") else None

        def is_own(self, file_name, name):
            return file_name in (f"{name}.frame", f"{name}.beads")

    files: SaverFiles = Abacus()
    for name in ("model.ckpt-5.frame", "model.ckpt-5.beads", "model.ckpt-6.index", "model.ckpt-6.data-00000-of-00001"):
        (tmp_path / name).write_bytes(b"beads")
    layout = Layout(tmp_path, "model.ckpt", files)
    assert [one.name for one in layout.candidates()] == ["model.ckpt-5"]
    assert layout.present("model.ckpt-5") == ["model.ckpt-5.beads", "model.ckpt-5.frame"]
