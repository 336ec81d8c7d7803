"""The Python client: typed, over the generated stubs, asynchronous and synchronous.

    async with AsyncClient("127.0.0.1:21001") as client:
        async for event in client.generate("Once upon a time", max_new_tokens=64):
            if isinstance(event, Delta):
                print(event.text, end="")

    with Client("127.0.0.1:21001") as client:
        print(client.complete([{"role": "user", "content": "Hello"}]).text)

The address may be a controller's or a worker's. Breaking out of a generation cancels it. Failures are
the domain errors of `fastchat_grpc.errors`, as the server raised them.
"""

from __future__ import annotations

from fastchat_grpc.client.asynchronous import DEFAULT_ADDRESS, AsyncClient
from fastchat_grpc.client.requests import Choice, GenerateOptions, PromptLike, Result, build_request
from fastchat_grpc.client.synchronous import Client

__all__ = [
    "DEFAULT_ADDRESS",
    "AsyncClient",
    "Choice",
    "Client",
    "GenerateOptions",
    "PromptLike",
    "Result",
    "build_request",
]
