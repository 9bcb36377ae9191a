"""`heldout serve`: the HTTP server in this process, worker and inference as children, on embedded defaults."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

import uvicorn

from heldout.api.app import create_app
from heldout.engine.remote import RemoteChat
from heldout.errors import InvalidValue
from heldout.processes.uploads import Uploads
from heldout.settings import Settings
from heldout.store.blobs import open_blobs
from heldout.store.db import open_db

#: Seconds a child has to end before it is killed. A worker needs a moment to stop its job processes.
GRACE = 8.0


def serve(settings: Settings, *, host: str, port: int, out: TextIO) -> None:
    """Serve until Ctrl-C. Running jobs stop with us and go on at the next start."""
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    with contextlib.ExitStack() as stack:
        if settings.engine_url == "local:":
            inference_port = _free_port()
            engine_url = f"http://127.0.0.1:{inference_port}/v1"
            command = ["heldout.processes.inference", "--port", str(inference_port)]
            stack.enter_context(_kept_running(command))
        else:
            engine_url = settings.engine_url
        stack.enter_context(_kept_running(["heldout.processes.worker"]))
        chat = RemoteChat(engine_url)
        db, blobs = open_db(settings.database), open_blobs(settings.blobs)
        uploads = Uploads(settings, db)
        stack.callback(uploads.close)
        look = uploads if settings.check_uploads else None
        app = create_app(settings=settings, db=db, blobs=blobs, chat=chat, look=look)
        _welcome(settings, host, port, out)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
        # uvicorn ends in order and then raises the signal again; SIGTERM becomes Ctrl-C, so that the
        # children are ended too.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    print("Stopped. Jobs that were running go on at the next `heldout serve`.", file=out, flush=True)


@contextlib.contextmanager
def _kept_running(module: list[str]) -> Iterator[None]:
    """Run `python -m …` as a child; start it again when it dies, and end it with the block."""
    stop = threading.Event()
    children: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        # A session of its own: Ctrl-C reaches us alone, and we end the children in order.
        children.append(subprocess.Popen([sys.executable, "-m", *module], start_new_session=True))

    def watch() -> None:
        while not stop.wait(0.5):
            if children[-1].poll() is not None:
                code = children[-1].returncode
                print(f"{module[0]} ended with exit code {code}; starting it again", file=sys.stderr, flush=True)
                if not stop.wait(1.0):
                    start()

    start()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        children[-1].terminate()
        try:
            children[-1].wait(GRACE)
        except subprocess.TimeoutExpired:
            children[-1].kill()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InvalidValue(
            f"cannot listen on {host}:{port}: {error.strerror}. Another `heldout serve`? Choose a port with --port."
        ) from error


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _welcome(settings: Settings, host: str, port: int, out: TextIO) -> None:
    open_to_all = host not in ("127.0.0.1", "localhost", "::1")
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    lines = [
        f"Heldout serves at  base_url = http://{shown}:{port}/v1",
        f"Data directory:    {settings.root}",
        f"API key:           {'asked for' if settings.api_key else 'none asked for; clients may send any'}",
    ]
    if settings.model_aliases:
        targets = sorted(set(settings.model_aliases.values()))
        lines.append(
            f"Aliases:           {len(settings.model_aliases)} hosted model names train {', '.join(targets)} here"
        )
    if settings.gate == "block":
        lines.append("Gate:              a model without the verdict 'ship' answers once it is released")
    if open_to_all and not settings.api_key:
        lines.append(f"WARNING: anyone who reaches {host}:{port} can use it. Set HELDOUT_API_KEY to ask for a key.")
    print("\n".join([*lines, "Stop with Ctrl-C."]), file=out, flush=True)
