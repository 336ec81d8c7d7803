"""The OpenAI HTTP API over google.api.HttpBody."""
