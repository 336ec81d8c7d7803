"""Names that a gateway's configuration and a controller agree on."""

from __future__ import annotations

TICKET_HEADER = "x-fastchat-ticket"
"""Request header by which a controller knows a request that it picked a worker for."""
CLIENT_HEADER = "x-fastchat-client"
"""Request header with the name of the caller's API key, for the worker's logs."""
PLACES_KEY = "places"
"""Dynamic metadata of the picker that names workers, as "ip:port,ip:port"."""
GATEWAY_KEY = "gateway"
"""Context extension with the node id of the gateway that asks."""
