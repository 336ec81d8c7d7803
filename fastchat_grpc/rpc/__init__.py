"""The RPC border: messages to domain types, errors to statuses, servers and channels."""
