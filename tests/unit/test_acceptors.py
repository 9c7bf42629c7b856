"""How fast an API process takes connections in, while many arrive at once."""

import asyncio
import socket

import uvloop

from api.connections import NUM_ACCEPTORS, acceptors, open_socket

NUM_CLIENTS = 100


def test_many_connections_are_accepted_in_each_turn_of_the_event_loop() -> None:
    accepted: list[asyncio.BaseTransport] = []

    class Accepted(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.append(transport)

    async def count_turns(listening: socket.socket) -> int:
        """Until all who wait already are in."""
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(Accepted, sock=each) for each in acceptors(listening)]
        clients = [socket.create_connection(listening.getsockname()) for _ in range(NUM_CLIENTS)]
        num_turns = 0
        while len(accepted) < NUM_CLIENTS and num_turns < NUM_CLIENTS:
            await asyncio.sleep(0)
            num_turns += 1
        for client in clients:
            client.close()
        for transport in accepted:
            transport.close()
        for server in servers:
            server.close()
        return num_turns

    with open_socket("127.0.0.1", 0) as listening:
        num_turns = uvloop.run(count_turns(listening))
    assert len(accepted) == NUM_CLIENTS
    assert num_turns <= NUM_CLIENTS // NUM_ACCEPTORS + 5
