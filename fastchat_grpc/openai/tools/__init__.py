"""Finding tool calls in what a model writes."""
