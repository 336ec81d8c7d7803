"""Serve language models from a fleet of workers over gRPC."""

__version__ = "0.1.0"
