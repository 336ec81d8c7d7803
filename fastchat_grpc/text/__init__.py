"""Text from tokens: requests on their way through an engine, detokenization, stops, events. Shared by every backend;
needs no torch."""
