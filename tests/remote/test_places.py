"""A remote place, in an object store and in a directory: what both promise, and what each is refused."""

from __future__ import annotations

import contextlib
import os
import threading

import faults
import pytest

from stepguard.remote.objects import ConditionError, RemoteError
from stepguard.remote.opening import open_remote

PART = 8 << 20


@pytest.fixture
def place(url):
    return open_remote(url)


def whole(place, key):
    return b"".join(place.read(key))


def test_what_is_written_is_read_listed_and_removed(place):
    place.write("a/one", [b"on", b"e"], 3)
    place.put("two", b"22")

    assert (whole(place, "a/one"), whole(place, "two")) == (b"one", b"22")
    assert [(one.key, one.size) for one in place.objects()] == [("a/one", 3), ("two", 2)]
    assert [one.key for one in place.objects("a/")] == ["a/one"]
    place.delete(["a/one", "never"])
    assert place.head("a/one") is None
    with pytest.raises(FileNotFoundError):
        whole(place, "a/one")


def test_an_empty_place_has_no_objects(place):
    assert place.objects() == []
    assert place.head("x") is None


def test_an_empty_object_is_one(place):
    place.write("nothing", [], 0)

    assert place.head("nothing").size == 0
    assert whole(place, "nothing") == b""


def test_a_large_object_goes_in_parts_and_comes_back_whole(place):
    content = os.urandom(2 * PART + 12345)
    place.write("large", (content[at : at + (1 << 20)] for at in range(0, len(content), 1 << 20)), len(content))

    assert whole(place, "large") == content


def test_an_error_of_the_blocks_leaves_what_was_there(place):
    def blocks(count):
        for _ in range(count):
            yield b"x" * (1 << 20)
        raise ZeroDivisionError

    place.write("kept", [b"old"], 3)
    for count in (1, 17):
        with pytest.raises(ZeroDivisionError):
            place.write("kept", blocks(count), count << 20)

    assert whole(place, "kept") == b"old"
    assert [one.key for one in place.objects()] == ["kept"]


def test_a_copy_is_made_in_the_place(place):
    place.write("a/one", [b"one"], 3)
    place.copy("a/one", "b/one")
    place.delete(["a/one"])

    assert whole(place, "b/one") == b"one"


def test_of_many_that_create_an_object_one_succeeds(place):
    won = []

    def create(number):
        try:
            place.create("lease", b"%d" % number)
        except ConditionError:
            return
        won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()

    assert len(won) == 1
    assert whole(place, "lease") == b"%d" % won[0]


def test_an_object_that_has_changed_is_not_replaced(place):
    first = place.create("lease", b"1")
    second = place.replace("lease", b"2", first)

    with pytest.raises(ConditionError):
        place.replace("lease", b"3", first)
    assert place.replace("lease", b"4", second) != second
    assert whole(place, "lease") == b"4"


class TestAnObjectStore:
    @pytest.fixture
    def place(self, network):
        return open_remote("s3://bucket/runs/x")

    def test_proves_by_its_checksum_what_has_arrived(self, place):
        assert place.write("small", [b"one"], 3)
        assert place.write("large", [b"x" * (1 << 20)] * 19, 19 << 20)

    def test_proves_nothing_where_bytes_were_changed_on_the_way(self, place, network):
        network.fails(faults.only("PUT", "small", lambda handler, body: b"0" + body[1:]))

        # A store that compares checksums itself refuses them.
        with contextlib.suppress(RemoteError):
            assert not place.write("small", [b"one"], 3)

    @pytest.mark.parametrize("fault", [faults.cut, faults.broken, faults.expired])
    def test_that_does_not_answer_is_an_error_of_the_place(self, place, network, fault):
        network.fails(fault)

        with pytest.raises(RemoteError, match="s3://bucket/runs/x/one: could not write it"):
            place.put("one", b"1")
        network.fails(None)
        place.reopen()
        place.put("one", b"1")

    def test_without_its_bucket_is_not_taken_for_an_empty_one(self, network):
        place = open_remote("s3://another/runs/x")

        with pytest.raises(RemoteError, match="bucket"):
            place.objects()
        with pytest.raises(RemoteError, match="bucket"):
            place.put("one", b"1")


class TestADirectory:
    def test_follows_no_links(self, tmp_path):
        (tmp_path / "secret").write_bytes(b"secret")
        (tmp_path / "mirror").mkdir()
        (tmp_path / "mirror" / "link").symlink_to(tmp_path / "secret")
        place = open_remote(tmp_path / "mirror")

        assert place.objects() == []
        with pytest.raises(RemoteError):
            whole(place, "link")

    def test_whose_disk_fails_is_an_error_of_the_place(self, tmp_path):
        (tmp_path / "mirror").write_bytes(b"a file")

        with pytest.raises(RemoteError):
            open_remote(tmp_path / "mirror").put("one", b"1")


@pytest.mark.parametrize("address", ["", "ftp://host/x", "s3://", "s3:/bucket/x", "https://host/x"])
def test_an_address_that_is_none_is_named(address):
    with pytest.raises(ValueError, match="mirror must be an address such as 's3://bucket/run'"):
        open_remote(address)


def test_credentials_in_an_address_are_refused_and_not_repeated():
    with pytest.raises(ValueError, match="must not have credentials") as raised:
        open_remote("s3://key:geheim@bucket/x")

    assert "geheim" not in str(raised.value)


@pytest.mark.parametrize("address", ["s3://bucket/x?sig=geheim", "az://bucket/x#geheim"])
def test_what_a_store_would_not_see_of_an_address_is_refused_and_not_repeated(address):
    with pytest.raises(ValueError, match=r"without '.' and what comes after it") as raised:
        open_remote(address)

    assert "geheim" not in str(raised.value)
    assert "://bucket/x" in str(raised.value)
