"""Who vouches for the rows of a cache: statements signed with SSH keys.

A statement, signed-<hash>.json, lists records of one reference with the SHA-256 of each record and of its shard; its signature
is the file of the same name with .sig. Keys, agents, hardware keys and the file of allowed signers are OpenSSH's, as in git:
`ssh-keygen -Y sign` and `-Y verify` do the cryptography, once for each statement, however many records it lists.

A checksum shows that a file is as it was written; only a signature shows who wrote it.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import STATEMENT_FILE, ReferenceRecord, ShardRecord, SignedRecord, Statement

NAMESPACE = "prefcache-cache"
_MAX_SIGNATURE_BYTES = 1 << 16
_TRIES = 5
_TIMEOUT_SECONDS = 120.0  # a hardware key waits for a touch
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
# A passphrase is asked for nowhere: in the middle of a run nobody would answer.
_NO_PROMPT = {"SSH_ASKPASS": "/bin/false", "SSH_ASKPASS_REQUIRE": "force", "LC_ALL": "C"}


def list_statements(folder: Path) -> list[Path]:
    """List the statements in a cache's folder, by name, whatever they are worth."""
    return sorted(path for path in folder.glob("signed-*.json") if STATEMENT_FILE.fullmatch(path.name))


def signature_path(statement: Path) -> Path:
    return statement.with_name(f"{statement.name}.sig")


# -- signing ---------------------------------------------------------------------------------------------------------


class SigningKey:
    """A private SSH key, or the public half of one that the agent holds."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()
        if not self.path.is_file():
            raise UsageError(f"There is no key {path}. Name an SSH key (`ssh-keygen -t ed25519` makes one).")
        shown = _run("-l", "-f", str(self.path))
        match = _FINGERPRINT.search(shown.stdout.decode(errors="replace"))
        if shown.returncode or match is None:
            raise UsageError(f"{path} is not an SSH key ({_complaint(shown)}).")
        self.fingerprint = match[0]

    def sign(self, data: bytes) -> bytes:
        """Return the armored signature; UsageError if the key cannot be used without a passphrase."""
        signed = _run("-Y", "sign", "-q", "-f", str(self.path), "-n", NAMESPACE, data=data)
        if signed.returncode or not signed.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----"):
            raise UsageError(
                f"{self.path} cannot sign ({_complaint(signed)}). If the key has a passphrase, add it to the agent first "
                f"(ssh-add {self.path}): prefcache asks for none."
            )
        return signed.stdout


def sign_records(
    folder: Path, reference: ReferenceRecord, records: Sequence[SignedRecord], key: SigningKey
) -> Path | None:
    """Write a statement about these records and its signature; return its path, or None if there is nothing to sign."""
    files = compose_statement(reference, records, key) if records else []
    for name, data in files:
        artifact.commit_bytes(artifact.member(folder, name), data)
    return folder / files[-1][0] if files else None


def compose_statement(
    reference: ReferenceRecord, records: Sequence[SignedRecord], key: SigningKey
) -> list[tuple[str, bytes]]:
    """Sign a statement about these records; return the names and contents of its two files, in the order to write them."""
    statement = Statement.make(
        name=reference.name,
        model_id=reference.model_id,
        key=key.fingerprint,
        records=[record.facts() for record in sorted(records, key=lambda record: record.record)],
    )
    data = statement.seal()
    path = Path(f"signed-{hashlib.sha256(data).hexdigest()[:32]}.json")
    # The signature first: a statement without one would be read, and count for nothing.
    return [(signature_path(path).name, key.sign(data)), (path.name, data)]


def describe(folder: Path, record: ShardRecord) -> SignedRecord:
    """Hash a record as it was read, whatever is in its place by now, and its shard as it is on disk."""
    return SignedRecord(
        record=record.name,
        sha256=hashlib.sha256(record.seal()).hexdigest(),
        shard_sha256=_hash_file(folder / record.file),
    )


def describe_bytes(record: ShardRecord, shard: bytes | memoryview) -> SignedRecord:
    """Hash a record and its shard as they are about to be written."""
    digests = [hashlib.sha256(data).hexdigest() for data in (record.seal(), shard)]
    return SignedRecord(record=record.name, sha256=digests[0], shard_sha256=digests[1])


def find_signed_by(folder: Path, reference: ReferenceRecord, key: SigningKey) -> dict[Path, set[SignedRecord]]:
    """The valid statements of this key, and what they list."""
    signed: dict[Path, set[SignedRecord]] = {}
    for path in list_statements(folder):
        with contextlib.suppress(IntegrityError):
            statement, data = _read(path, reference)
            if statement.key == key.fingerprint and _signing_fingerprint(path, data) == key.fingerprint:
                signed[path] = set(statement.records)
    return signed


def names_in_statements(folder: Path) -> set[str]:
    """The records that any readable statement lists, whoever signed it: gc leaves them as they are."""
    names: set[str] = set()
    for path in list_statements(folder):
        try:
            names.update(each.record for each in Statement.read(path).records)
        except IntegrityError:
            continue
    return names


def find_key(path: str | None) -> SigningKey | None:
    """The key of score.sign_with; None if that is not set."""
    return None if path is None else SigningKey(Path(path))


def require_key(path: str | None, allowed_signers: Path | None) -> SigningKey | None:
    """The key of score.sign_with, tried out; UsageError, before long work, if what is written would be refused without one."""
    if (key := find_key(path)) is not None:
        refuse_unusable_key(key, allowed_signers)
    elif allowed_signers is not None:
        raise UsageError(
            f"allowed_signers is {allowed_signers}, and what this writes would not be signed, so it would not be used. Set "
            "score.sign_with to a key that this file lists; or have somebody in it sign the rows that others have scored "
            "(prefcache sign)."
        )
    return key


# -- verification ----------------------------------------------------------------------------------------------------


@dataclass
class Signatures:
    """Which records of a cache the allowed signers vouch for."""

    folder: Path
    allowed_signers: Path
    signed: dict[str, set[tuple[str, str]]] = field(default_factory=dict)  # record -> SHA-256 of it and of its shard
    refused: dict[Path, str] = field(default_factory=dict)  # statement -> why it counts for nothing
    signers: dict[Path, str] = field(default_factory=dict)  # statement -> who signed it

    @classmethod
    def read(cls, folder: Path, reference: ReferenceRecord, allowed_signers: Path) -> "Signatures":
        """Verify every statement in the folder. UsageError if there is no file of allowed signers."""
        allowed = allowed_signers.expanduser()
        if not allowed.is_file():
            raise UsageError(
                f"There is no file of allowed signers at {allowed_signers}. It has lines such as `ann@example.com ssh-ed25519 AAAA...` "
                "(man ssh-keygen, ALLOWED SIGNERS)."
            )
        for _ in range(_TRIES):
            found = cls(folder, allowed)
            statements = list_statements(folder)
            for path in statements:
                found._add(path, reference)
            # A signer may have merged some of them meanwhile: then another one lists what they did.
            if all(path.exists() for path in statements):
                break
        return found

    def _add(self, path: Path, reference: ReferenceRecord) -> None:
        try:
            statement, data = _read(path, reference)
            self.signers[path] = _verify(path, data, self.allowed_signers)
        except IntegrityError as error:
            self.refused[path] = str(error)
            return
        for each in statement.records:
            self.signed.setdefault(each.record, set()).add((each.sha256, each.shard_sha256))

    def covers(self, record: ShardRecord) -> bool:
        """Whether somebody vouches for this record, as it was read; its shard is another question."""
        sha256 = hashlib.sha256(record.seal()).hexdigest()
        return any(sha256 == each for each, _ in self.signed.get(record.name, ()))

    def shard_hashes(self, record: ShardRecord) -> set[str]:
        """The SHA-256 that the record's shard may have."""
        return {shard for _, shard in self.signed.get(record.name, ())}

    def why_refused(self, record: ShardRecord) -> str | None:
        """Why nobody vouches for this record and its shard as they are on disk; None if somebody does."""
        if not (signed := self.signed.get(record.name)):
            return f"{self.folder / record.name} is not signed by anybody in {self.allowed_signers}"
        found = describe(self.folder, record)
        if (found.sha256, found.shard_sha256) in signed:
            return None
        is_record = any(found.sha256 == sha256 for sha256, _ in signed)
        changed = record.file if is_record else record.name
        return f"{self.folder / changed} is not what was signed: it has been replaced"


def refuse_unusable_key(key: SigningKey, allowed_signers: Path | None) -> None:
    """UsageError, before long work, if the key cannot sign or if what it signs would not be accepted."""
    signature = key.sign(b"")
    if allowed_signers is None:
        return
    if not allowed_signers.expanduser().is_file():
        raise UsageError(f"There is no file of allowed signers at {allowed_signers}.")
    if not isinstance(principal := _find_signer(signature, b"", allowed_signers.expanduser()), Signer):
        raise UsageError(
            f"{key.path} is not among the keys of {allowed_signers} ({principal}), so what it signs would be refused. Name "
            "a key that is (score.sign_with), or add it."
        )


@dataclass(frozen=True)
class Signer:
    name: str


def _read(path: Path, reference: ReferenceRecord) -> tuple[Statement, bytes]:
    """Parse a statement about this reference, and return the bytes that were signed."""
    if not artifact.is_inside(path.parent, path.name):
        raise IntegrityError(f"{path} is a link that leads out of its folder")
    statement = Statement.read(path)
    data = statement.seal()
    try:
        is_as_read = data == path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror})") from None
    if not is_as_read or path.name != f"signed-{hashlib.sha256(data).hexdigest()[:32]}.json":
        raise IntegrityError(f"{path} is not a statement as it is written: it was changed")
    if statement.model_id != reference.model_id:
        raise IntegrityError(
            f"{path} is about {statement.name}@{statement.model_id[:8]}, and this cache is of "
            f"{reference.name}@{reference.model_id[:8]}"
        )
    return statement, data


def _verify(path: Path, data: bytes, allowed: Path) -> str:
    """Return who signed a statement; IntegrityError if it was nobody who may."""
    signer = _find_signer(_read_signature(path), data, allowed)
    if not isinstance(signer, Signer):
        raise IntegrityError(f"{path} is not signed by anybody in {allowed} ({signer})")
    return signer.name


def _read_signature(statement: Path) -> bytes:
    path = signature_path(statement)
    try:
        status = path.stat()
        if not artifact.is_inside(path.parent, path.name) or not stat.S_ISREG(status.st_mode):
            raise IntegrityError(f"{path} is not a file of its folder")
        if status.st_size > _MAX_SIGNATURE_BYTES:
            raise IntegrityError(f"{path} has {status.st_size:,} bytes: no signature is so long")
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror})") from None


def _find_signer(signature: bytes, data: bytes, allowed: Path) -> Signer | str:
    """Find who signed the data, or say why it is none of the allowed signers."""
    with _temporary_file(signature) as file:
        done = _run("-Y", "find-principals", "-f", str(allowed), "-s", file)
        for name in done.stdout.decode(errors="replace").splitlines():
            done = _run("-Y", "verify", "-f", str(allowed), "-I", name, "-n", NAMESPACE, "-s", file, data=data)
            if done.returncode == 0:
                return Signer(name)
    return _complaint(done)


def _signing_fingerprint(path: Path, data: bytes) -> str | None:
    """The key that signed these bytes, whoever has it; None if the signature does not fit."""
    with _temporary_file(_read_signature(path)) as file:
        checked = _run("-Y", "check-novalidate", "-n", NAMESPACE, "-s", file, data=data)
    match = _FINGERPRINT.search(checked.stdout.decode(errors="replace"))
    return match[0] if checked.returncode == 0 and match else None


# -- ssh-keygen ------------------------------------------------------------------------------------------------------


def _run(*arguments: str, data: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    if (program := shutil.which("ssh-keygen")) is None:
        raise UsageError("Signatures need ssh-keygen, which is not installed. Install OpenSSH 8.9 or later.")
    environment = {**os.environ, **_NO_PROMPT}
    try:
        return subprocess.run(
            [program, *arguments], input=data, capture_output=True, env=environment, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"ssh-keygen did not answer within {_TIMEOUT_SECONDS:.0f} s. Run the same command again."
        ) from None


def _complaint(done: "subprocess.CompletedProcess[bytes]") -> str:
    """What ssh-keygen said, in one line."""
    said = done.stderr + done.stdout
    lines = [" ".join(line.split()).rstrip(".") for line in said.decode(errors="replace").splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines)))[:300] or f"ssh-keygen ended with {done.returncode}"


@contextlib.contextmanager
def _temporary_file(data: bytes) -> Iterator[str]:
    """The data as a file of ours, which does not change between two calls."""
    with tempfile.NamedTemporaryFile(prefix="prefcache-", suffix=".sig") as file:
        file.write(data)
        file.flush()
        yield file.name


def _hash_file(path: Path) -> str:
    status = path.stat()
    return _hash_stamped(path.absolute(), (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


@functools.lru_cache(maxsize=1 << 20)
def _hash_stamped(path: Path, stamp: tuple[int, int, int, int]) -> str:
    """The SHA-256 of a file, once in this process unless the file is touched. A memo on disk could be forged with the cache."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
