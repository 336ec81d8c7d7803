"""Names that a gateway's configuration and a controller agree on."""

from __future__ import annotations

TICKET_HEADER = "x-fastchat-ticket"
"""Request header by which a controller knows a request that it picked a worker for."""
CLIENT_HEADER = "x-fastchat-client"
"""Request header with the name of the caller's API key, for the worker's logs."""
RESUME_HEADER = "x-fastchat-resume"
"""Request header with "1" by which a bridge asks a worker for the state of its answer, piece by piece, to go on with it
elsewhere. A public gateway drops a caller's own. The worker's answer has it, too: it knows what that is."""
WORKER_HEADER = "x-fastchat-worker"
"""Response header with the identity of the worker, where the bridge has asked for state."""
PLACES_KEY = "places"
"""Dynamic metadata of the picker that names workers, as "ip:port,ip:port"."""
GATEWAY_KEY = "gateway"
"""Context extension with the node id of the gateway that asks."""
CLUSTER_HEADER = "x-fastchat-cluster"
"""Request header with the cluster that has the picker's places. Without it a request goes nowhere."""
STREAM_HEADER = "x-fastchat-stream"
"""Request header that says that the answer comes in pieces, so that silence between them means something."""
PLACE_HEADER = "x-fastchat-place"
"""Request header with the "ip:port" of the worker that a stream of the gateway's module goes to."""
CONTINUE_KEY = "continue"
"""Dynamic metadata of the picker: what any controller must know to pick again for the stream."""
PLACE_KEY, SERVED_KEY, ATTEMPTS_KEY, BROKEN_KEY, END_KEY, DETAILS_KEY = (
    "place",
    "served",
    "attempts",
    "broken",
    "end",
    "details",
)
"""Dynamic metadata of the module: where a stream is, the id of that worker, how many had it, what broke and how, and
the status of the last one ("lost": none came) with its details, unless a controller has been told of it."""
MISSED_HEADER = "x-fastchat-missed"
"""Request header in which a controller that has nobody for a request leaves its verdict, a code, to the next one."""
FINAL_KEY = "final"
"""Context extension with "1" where the controller's verdict is the answer, and no further one is asked."""
CHOICES_KEY = "choices"
"""Context extension with the number of workers that the gateway tries at most."""
KEY_ONLY_KEY = "key_only"
"""Context extension with "1" where nothing is asked but whether the caller's key is known."""
LUA_NAMESPACE = "fastchat_grpc"
"""Namespace of the dynamic metadata that the gateway's Lua filter writes."""
LARGE_KEY = "large"
"""Dynamic metadata of the Lua filter: the request's body may be large."""
NAMED_KEY = "named"
"""Metadata of an endpoint that is known by a name, which its certificate must then have."""
