"""An object store as a remote place: S3 and its like, Google Cloud Storage, Azure, through the library obstore.

obstore is the Rust crate ``object_store`` with Python's types: it has multipart uploads, conditional writes and
server-side copies for all three clouds in one wheel without dependencies. (fsspec needs a package for each cloud, and
has no conditional writes across them.) Its blocking calls are used, in threads that Python may end at any time: its
asynchronous ones come back into the interpreter from threads of their own, which is an error message at its exit.

What proves an upload: S3 and its like answer with an e-tag that is the MD5 of what they have stored, or, for an upload
in parts, the MD5 of the MD5s of the parts. It is compared with that of the bytes that were read. Stores whose tags are
something else (SSE-KMS, Google, Azure) prove nothing that way, and the object is read back.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from stepguard.remote.objects import ConditionError, NoConditionsError, RemoteError, RemoteObject

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# S3 takes 10,000 parts of at least 5 MiB each.
_PART_BYTES = 8 << 20
_MOST_PARTS = 9_000
_CONCURRENT_PARTS = 4
# Each range of a long read is a request of its own, so that none runs into the limit of its time.
_READ_BYTES = 16 << 20

# A request that hangs is given up after this time. The tries of the library itself are few: who calls has a policy.
_CLIENT_OPTIONS = {"timeout": "60s", "connect_timeout": "10s"}
_RETRIES = 2
_RETRY_SECS = 20


class ObjectStoreRemote:
    """The objects below one address such as ``s3://bucket/runs/x``.

    ``options`` are those of obstore's stores (``endpoint``, ``region``, ``skip_signature`` ...); what they do not say
    is taken from the environment (``AWS_ACCESS_KEY_ID``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_...``) or from the
    machine's own identity.

    Raises ModuleNotFoundError, naming the extra, without obstore; ValueError for an address that no store has.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self._url = url.rstrip("/")
        self._options = dict(options or {})
        self._store = self._opened()

    def _opened(self) -> ObjectStore:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"mirror {self._url!r} needs the package obstore: pip install 'stepguard[mirror]'", name=error.name
            ) from error
        endpoint = str(self._options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL") or "")
        client: Any = {**_CLIENT_OPTIONS, "allow_http": endpoint.startswith("http://")}
        retries: Any = {"max_retries": _RETRIES, "retry_timeout": dt.timedelta(seconds=_RETRY_SECS)}
        config: Any = self._options or None
        try:
            return from_url(self._url, config=config, client_options=client, retry_config=retries)
        except (BaseError, ValueError, TypeError) as error:
            raise ValueError(f"mirror {self._url!r}: {_first_line(error)}") from error

    @property
    def url(self) -> str:
        """The address."""
        return self._url

    def reopen(self) -> None:
        """Look for credentials again, as after an answer that they have expired."""
        self._store = self._opened()

    def objects(self, prefix: str = "") -> list[RemoteObject]:
        """Return the objects whose keys begin with ``prefix``."""
        import obstore

        # The library lists whole path segments only.
        place = prefix.rpartition("/")[0]
        found: list[RemoteObject] = []
        with self._asked("list", prefix):
            for chunk in obstore.list(self._store, place or None):
                found += [_described(one) for one in chunk]
        return sorted((one for one in found if one.key.startswith(prefix)), key=lambda one: one.key)

    def head(self, key: str) -> RemoteObject | None:
        """Return what is known of one object; ``None`` if it is not there."""
        import obstore

        try:
            with self._asked("look at", key):
                return _described(obstore.head(self._store, key))
        except FileNotFoundError:
            return None

    def read(self, key: str) -> Iterator[bytes]:
        """Return the content of an object in blocks, one request for each."""
        import obstore

        found = self.head(key)
        if found is None:
            raise FileNotFoundError(f"{self._url}/{key}: there is no such object")
        for start in range(0, found.size, _READ_BYTES):
            with self._asked("read", key):
                length = min(_READ_BYTES, found.size - start)
                block = bytes(obstore.get_range(self._store, key, start=start, length=length))
            yield block

    def write(self, key: str, blocks: Iterable[bytes], size: int) -> bool:
        """Write an object, in parts if it is large; return whether the e-tag proves its bytes."""
        import obstore

        part_bytes = max(_PART_BYTES, -(-size // _MOST_PARTS))
        tags = _Tags(part_bytes)
        with self._asked("write", key):
            if size <= part_bytes:
                content = b"".join(tags.seen(blocks))
                # An empty object cannot be sent in parts.
                result = obstore.put(self._store, key, content, use_multipart=False)
            else:
                result = obstore.put(
                    self._store, key, tags.seen(blocks), chunk_size=part_bytes, max_concurrency=_CONCURRENT_PARTS
                )
        return _bare(result["e_tag"]) in tags.expected()

    def put(self, key: str, content: bytes) -> str | None:
        """Write a small object, and return its tag."""
        return self._put(key, content, "overwrite")

    def create(self, key: str, content: bytes) -> str | None:
        """Write a small object that must not exist. Raises ConditionError if it does."""
        return self._put(key, content, "create")

    def replace(self, key: str, content: bytes, tag: str | None) -> str | None:
        """Write a small object that must still have this tag. Raises ConditionError if it has another."""
        if tag is None:
            raise NoConditionsError(f"{self._url}: objects have no e-tags here", url=self._url)
        return self._put(key, content, _condition(tag))

    def _put(self, key: str, content: bytes, mode: Any) -> str | None:
        import obstore

        with self._asked("write", key):
            return _tag(obstore.put(self._store, key, content, mode=mode, use_multipart=False))

    def copy(self, source: str, target: str) -> None:
        """Copy an object on the store's side."""
        import obstore

        with self._asked("copy", source):
            obstore.copy(self._store, source, target)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, in batches where the store has them."""
        import obstore

        with self._asked("remove", ""), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, list(keys))

    @contextlib.contextmanager
    def _asked(self, verb: str, key: str) -> Iterator[None]:
        """A block whose errors of the library become those of the protocol."""
        from obstore import exceptions

        place = f"{self._url}/{key}" if key else self._url
        try:
            yield
        except FileNotFoundError as error:
            # A bucket that is gone is not a missing object: nobody may take it for an empty mirror.
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                raise RemoteError(f"{place}: the bucket does not exist", url=self._url) from error
            raise
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
            raise ConditionError(f"{place}: the store refused the conditional write", url=self._url) from error
        except exceptions.NotSupportedError as error:
            raise NoConditionsError(
                f"{place}: the store cannot do this: {_first_line(error)}", url=self._url
            ) from error
        except exceptions.BaseError as error:
            raise RemoteError(f"{place}: could not {verb} it: {_first_line(error)}", url=self._url) from error


class _Tags:
    """The MD5s by which S3 would name the bytes that pass: of the whole, and of its parts."""

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._whole = hashlib.md5(usedforsecurity=False)
        self._part, self._in_part = hashlib.md5(usedforsecurity=False), 0
        self._parts: list[bytes] = []

    def seen(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            self._whole.update(block)
            view = memoryview(block)
            while view:
                taken = view[: self._part_bytes - self._in_part]
                self._part.update(taken)
                self._in_part += len(taken)
                view = view[len(taken) :]
                if self._in_part == self._part_bytes:
                    self._end_part()
            yield block

    def _end_part(self) -> None:
        self._parts.append(self._part.digest())
        self._part, self._in_part = hashlib.md5(usedforsecurity=False), 0

    def expected(self) -> set[str]:
        if self._in_part:
            self._end_part()
        of_parts = hashlib.md5(b"".join(self._parts), usedforsecurity=False).hexdigest()
        return {self._whole.hexdigest(), f"{of_parts}-{len(self._parts)}"}


def _described(found: Any) -> RemoteObject:
    return RemoteObject(found["path"], found["size"], found["last_modified"].timestamp(), _tag(found))


def _tag(found: Any) -> str | None:
    """The version of an object: S3 and Azure compare the e-tag, Google the number of the generation."""
    e_tag, version = found["e_tag"], found["version"]
    return e_tag if e_tag is None or version is None else f"{e_tag} {version}"


def _condition(tag: str) -> dict[str, str]:
    e_tag, _, version = tag.partition(" ")
    return {"e_tag": e_tag, "version": version} if version else {"e_tag": e_tag}


def _bare(tag: str | None) -> str:
    return "" if tag is None else tag.removeprefix("W/").strip('"').lower()


def _first_line(error: BaseException) -> str:
    """The library's message without the dump of its internals that follows it, and its store's answer on one line."""
    return " ".join(str(error).split("\n\nDebug source:")[0].split())[:400]
