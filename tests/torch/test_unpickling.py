"""What others have pickled is read without running code, and without changing anything on the way to a refusal."""

from __future__ import annotations

import importlib
import os
import pickle
import shutil
import struct
import traceback

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType

from stepguard import Saving
from stepguard.errors import CheckpointCorruptError, CheckpointError
from stepguard.torch import Supervisor
from stepguard.torch.checkpoint import unpickling

# Older versions of PyTorch lack some.
RECORDS = sorted(
    (module, name)
    for module, names in unpickling._RECORDS.items()
    for name in names
    if hasattr(importlib.import_module(module), name)
)


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def changing(made, name="changed_by_a_pickle"):
    """A pickle that sets an attribute of whatever ``made`` puts on the stack."""
    state = b"N}" + text(name) + text("yes") + b"s" + pickle.TUPLE2
    return b"\x80\x02" + made + state + b"b."


@pytest.mark.parametrize(("module", "name"), RECORDS)
def test_a_pickle_that_changes_a_class_of_pytorch_is_refused_before_it_has(module, name):
    of_pytorch = getattr(importlib.import_module(module), name)
    with pytest.raises(CheckpointError, match="found a change of"):
        unpickling.loads(changing(f"c{module}\n{name}\n".encode()))
    assert not hasattr(of_pytorch, "changed_by_a_pickle")


def test_a_pickle_that_changes_a_member_of_an_enumeration_is_refused_before_it_has():
    made = b"ctorch.distributed.checkpoint.planner\nWriteItemType\nK\x01\x85R"
    with pytest.raises(CheckpointError, match="found a change of <WriteItemType"):
        unpickling.loads(changing(made))
    assert not hasattr(WriteItemType(1), "changed_by_a_pickle")


def test_what_the_package_itself_pickles_is_read_as_it_was_written():
    content = Metadata(
        {
            "weight": TensorStorageMetadata(
                TensorProperties(dtype=torch.bfloat16, requires_grad=True),
                torch.Size([4, 4]),
                [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 4]))],
            ),
            "step": BytesStorageMetadata(),
        },
        {"weight": ("weight",)},
        {MetadataIndex("weight", torch.Size([0, 0])): _StorageInfo("__0_0.distcp", 0, 16)},
    )
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert unpickling.loads(pickle.dumps(content, protocol)) == content


@pytest.mark.parametrize("content", [b"", b"\x80\x02b.", b"not a pickle", changing(b"N")[:-4]])
def test_what_is_no_pickle_is_damage(content):
    with pytest.raises(CheckpointCorruptError):
        unpickling.loads(content)


# --- files of torch.save ---


class Trap:
    def __reduce__(self):
        return (os.system, ("true",))


class OfAProgram:
    pass


def script(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


UNSAFE = {
    "a function": (lambda path: torch.save({"a": Trap()}, path), f"{os.name}.system"),
    "an object": (lambda path: torch.save({"a": OfAProgram()}, path), "OfAProgram"),
    "a whole model": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "torch.nn.modules.linear.Linear"),
    "the old format": (
        lambda path: torch.save(Trap(), path, _use_new_zipfile_serialization=False),
        f"{os.name}.system",
    ),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps(Trap(), 2)), f"{os.name}.system"),
    "TorchScript": (script, "could run code"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*TorchScript archive:UserWarning")
@pytest.mark.parametrize("what", UNSAFE)
def test_an_unsafe_file_gets_our_error_and_not_the_advice_to_load_it_all_the_same(what, tmp_path):
    write, named = UNSAFE[what]
    path = tmp_path / "model.pt"
    write(path)
    with pytest.raises(CheckpointError) as refused:
        unpickling.load(path)
    shown = "".join(traceback.format_exception(refused.value))
    assert named in str(refused.value)
    assert str(path) in str(refused.value)
    for advice in ("weights_only", "add_safe_globals", "trust"):
        assert advice not in shown


def test_an_unsafe_file_in_a_checkpoint_gets_our_error_at_the_start(tmp_path):
    def supervisor():
        return Supervisor(
            {"model": torch.nn.Linear(2, 2)},
            tmp_path,
            save_model_secs=0,
            saving=Saving(save_at_end=True),
            save_summaries_secs=0,
        )

    with supervisor().managed_session() as session:
        for _ in session.steps(max_steps=1):
            pass
    torch.save({"weight": Trap()}, tmp_path / "model.ckpt-1" / "model.pt")
    _commit_again(tmp_path, "model.ckpt-1")
    with pytest.raises(CheckpointError, match="which could run code") as refused, supervisor().managed_session():
        pass
    assert "weights_only" not in "".join(traceback.format_exception(refused.value))


def _commit_again(logdir, name):
    """As somebody would who can write the manifest too."""
    from stepguard.store import CheckpointStore

    store = CheckpointStore(logdir, engine="torch")
    stage = store.stage(name)
    shutil.move(logdir / name, stage / name)
    (logdir / f"{name}.manifest.json").unlink()
    store.commit(name, 1)
