"""The worker: admission, servicer, heartbeat around one backend."""
