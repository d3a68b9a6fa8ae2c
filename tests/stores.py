"""Servers on the loopback, as stores of shards are: HTTP with ranges, and S3, with faults that a test asks for."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from aiohttp import ClientSession, web


class Store:
    """Serves the files of a folder with ranges and ETags, or stands before another server.

    Attributes:
        latency: seconds that each answer takes.
        fail_every: each so-many-th request fails with 503; 0: none.
        ranges: whether ranges are obeyed.
        forbidden: whether all is refused with 403.
        requests: path -> how often it was asked for.
        sent: bytes of all answers.
    """

    def __init__(self, root: Path | None = None, upstream: str = "", port: int = 0) -> None:
        self.root, self.upstream, self.port = root, upstream, port
        self.latency, self.fail_every, self.ranges, self.forbidden = 0.0, 0, True, False
        self.requests: Counter[str] = Counter()
        self.sent, self._numbers = 0, count(1)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin, on the port of before."""
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    def stop(self) -> None:
        """End; open connections are cut."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        self._loop.call_soon(started.set)
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _listen(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.path] += 1
        number = next(self._numbers)
        await asyncio.sleep(self.latency)
        if self.fail_every and number % self.fail_every == 0:
            return web.Response(status=503)
        if request.path.startswith("/moved/"):
            raise web.HTTPFound("/elsewhere?X-Amz-Signature=secret")
        if self.forbidden:
            return web.Response(status=403)
        if self.upstream:
            return await self._pass_on(request)
        path = self.root / request.match_info["path"]  # type: ignore[operator]
        if path.is_dir():
            return web.Response(text="".join(f'<a href="{p.name}">' for p in path.iterdir()), content_type="text/html")
        if not path.is_file():
            return web.Response(status=404)
        if not self.ranges:
            return web.Response(body=path.read_bytes(), headers={"Accept-Ranges": "none"})
        if request.method == "GET":
            self.sent += len(range(path.stat().st_size)[request.http_range])
        return web.FileResponse(path)

    async def _pass_on(self, request: web.Request) -> web.Response:
        url, body = self.upstream + request.path_qs, await request.read()
        async with (
            ClientSession(auto_decompress=False) as session,
            session.request(request.method, url, headers=request.headers, data=body) as answer,
        ):
            data = await answer.read()
            headers = {k: v for k, v in answer.headers.items() if k not in ("Transfer-Encoding", "Connection", "Date")}
            self.sent += len(data)
            return web.Response(status=answer.status, headers=headers, body=data or None)


@contextmanager
def served(root: Path) -> Iterator[Store]:
    """The files of a folder."""
    store = Store(root)
    store.start()
    try:
        yield store
    finally:
        store.stop()


@contextmanager
def s3_served(root: Path, bucket: str) -> Iterator[tuple[Store, dict[str, str]]]:
    """The files of a folder in a bucket of an S3 server, and the environment with which a process finds it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    store = Store(upstream=f"http://{host}:{port}")
    store.start()
    names = {"AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    client = boto3.client(
        "s3",
        endpoint_url=store.upstream,
        aws_access_key_id="name",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=bucket)
    for path in filter(Path.is_file, root.rglob("*")):
        client.upload_file(str(path), bucket, str(path.relative_to(root)))
    try:
        yield store, names | {"AWS_ENDPOINT_URL": store.url}
    finally:
        store.stop()
        server.stop()
