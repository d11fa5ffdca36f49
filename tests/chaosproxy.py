"""A loopback TCP proxy whose faults a test switches on while it runs: lost replies, resets, latency, black holes,
wrong bytes.

Runs in a thread of its own, so sync and async code can be tested through it. Knows bytes, not Redis.
"""

import asyncio
import random
import socket
import struct
import threading
from dataclasses import dataclass

CHUNK = 65536
#: SO_LINGER of zero seconds: close() sends RST instead of FIN.
ABORT = struct.pack("ii", 1, 0)


@dataclass
class Faults:
    #: So many coming replies are swallowed, each with a reset: the request ran and nobody hears of it.
    lose_replies: int = 0
    #: The chance that any other reply is lost like that. Not every n-th: a connection's greeting and the repeated
    #: command could fall into step with it, and one command would never be answered.
    lose_chance: float = 0.0
    #: In so many coming chunks of at least 1000 bytes the last byte is another: of requests, and of replies.
    spoil_requests: int = 0
    spoil_replies: int = 0
    #: Seconds that each chunk waits, in both directions.
    latency: float = 0.0
    #: Accept and swallow what comes from the server, keeping connections open.
    mute: bool = False
    #: Bytes of one segment; 0 = as they come.
    slice: int = 0


def spoilt(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


class ChaosProxy:
    """`with ChaosProxy(target_port) as proxy:` listens on `proxy.port`. `proxy.faults` may change at any time."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.faults = Faults()
        #: Replies lost so far.
        self.lost = 0
        self._random = random.Random(1)
        self._links: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "ChaosProxy":
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exc: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def lose_next_reply(self, count: int = 1) -> None:
        self.faults.lose_replies = count

    def reset_all(self) -> None:
        """Cut every connection with RST."""
        self._call(self._reset_all())

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _stop(self) -> None:
        self._server.close()
        await self._reset_all()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _reset_all(self) -> None:
        for link in list(self._links):
            self._reset(link)

    def _reset(self, link: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        for writer in link:
            raw: socket.socket = writer.get_extra_info("socket")
            if raw.fileno() >= 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            behind_reader, behind = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        link = (writer, behind)
        self._links.add(link)
        try:
            up = asyncio.create_task(self._pump(reader, behind))
            try:
                await self._pump_replies(behind_reader, writer, link)
            finally:
                up.cancel()
                await asyncio.gather(up, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._links.discard(link)
            for end in link:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK):
            await asyncio.sleep(self.faults.latency)
            if self.faults.spoil_requests > 0 and len(chunk) >= 1000:
                self.faults.spoil_requests -= 1
                chunk = spoilt(chunk)
            await self._write(writer, chunk)
        writer.close()

    async def _pump_replies(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        link: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        while chunk := await reader.read(CHUNK):
            if self.faults.mute:
                continue
            if self._loses():
                self.lost += 1
                self._reset(link)
                return
            await asyncio.sleep(self.faults.latency)
            if self.faults.spoil_replies > 0 and len(chunk) >= 1000:
                self.faults.spoil_replies -= 1
                chunk = spoilt(chunk)
            await self._write(writer, chunk)

    async def _write(self, writer: asyncio.StreamWriter, chunk: bytes) -> None:
        size = self.faults.slice or len(chunk)
        for begin in range(0, len(chunk), size):
            writer.write(chunk[begin : begin + size])
            await writer.drain()
            if self.faults.slice:
                await asyncio.sleep(0)  # asyncio's sockets have no delay: each piece leaves alone

    def _loses(self) -> bool:
        if self.faults.lose_replies > 0:
            self.faults.lose_replies -= 1
            return True
        return self._random.random() < self.faults.lose_chance
