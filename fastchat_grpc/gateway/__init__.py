"""The HTTP bridge: Envoy, its configuration and its process."""
