"""Stores that are servers, started here on this machine: Chroma, and PostgreSQL with pgvector."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Warnings of the stores themselves; ours stay errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def chroma_port(tmp_path_factory) -> Iterator[int]:
    folder, port = tmp_path_factory.mktemp("chroma"), free_port()
    code = "from chromadb.cli.cli import app; app()"
    command = [sys.executable, "-c", code, "run", "--path", str(folder / "data"), "--host", "127.0.0.1"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(300):
            assert server.poll() is None, (folder / "log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            pytest.fail("The Chroma server does not answer: " + (folder / "log").read_text())
        yield port
    finally:
        server.terminate()
        server.wait(20)


def test_chroma_server(embeddings, gallery, check_retrieval, chroma_port):
    from langchain_chroma import Chroma

    store = Chroma("scenes", embeddings, host="127.0.0.1", port=chroma_port)
    store.add_images(gallery.paths, metadatas=[{"name": name} for name in gallery.names])
    check_retrieval(store, lambda document: document.metadata["name"])
    assert store.similarity_search_by_image(gallery.others[3], k=1)[0].metadata["name"] == "3"


def postgres_programs() -> Path | None:
    """The folder of a PostgreSQL with pgvector: the system's newest, or the one of the pgserver wheel."""
    for programs in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        extension = Path("/usr/share/postgresql") / programs.parent.name / "extension"
        if (programs / "initdb").exists() and (extension / "vector.control").exists():
            return programs
    if (spec := importlib.util.find_spec("pgserver")) is not None and spec.origin is not None:
        installed = Path(spec.origin).parent / "pginstall"
        if next(installed.rglob("vector.control"), None) is not None:
            return installed / "bin"
    return None


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL with pgvector here: install postgresql-NN-pgvector, or pgserver")
    user = {"user": "nobody"} if os.getuid() == 0 else {}  # PostgreSQL refuses to run as root
    try:
        subprocess.run([str(programs / "initdb"), "--version"], check=True, capture_output=True, cwd="/", **user)
    except (OSError, LookupError, subprocess.CalledProcessError) as error:
        pytest.skip(f"PostgreSQL cannot be started as {user.get('user', 'this user')} from {programs}: {error}")
    folder = Path(tempfile.mkdtemp(prefix="slq-pg-", dir="/tmp"))  # short, because the path of a socket is
    if user:
        shutil.chown(folder, "nobody")
    started = False

    def run(program: str, *args: str) -> None:
        command = [str(programs / program), "-D", str(folder / "data"), *args]
        # No pipe: the server would hold it open.
        with (folder.with_suffix(".log")).open("a") as log:
            process = subprocess.run(command, stdout=log, stderr=log, cwd="/", timeout=60, check=False, **user)
        assert process.returncode == 0, folder.with_suffix(".log").read_text()

    try:
        run("initdb", "--username=slq", "--auth=trust", "--encoding=UTF8", "--no-sync", "--locale=C")
        port = free_port()
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        started = True
        run("pg_ctl", "-w", "-l", str(folder / "server.log"), "-o", options, "start")
        yield f"postgresql+psycopg://slq@127.0.0.1:{port}/postgres"
    finally:
        if started:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)


def test_postgres_with_pgvector(embeddings, gallery, check_retrieval, postgres_url):
    import asyncio

    from langchain_postgres import PGEngine, PGVectorStore

    engine = PGEngine.from_connection_string(url=postgres_url)
    try:
        engine.init_vectorstore_table("scenes", 192)
        store = PGVectorStore.create_sync(engine, embeddings, "scenes")
        rows = embeddings.embed_image(gallery.paths)
        store.add_embeddings(gallery.paths, rows, metadatas=[{"name": name} for name in gallery.names])
        check_retrieval(store, lambda document: document.metadata["name"])
    finally:
        asyncio.run(engine.close())
