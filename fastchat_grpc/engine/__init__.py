"""The Transformers engine: continuous batching, sampling, KV cache. Knows nothing of gRPC."""
