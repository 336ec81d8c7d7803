"""Text from tokens: detokenization, stops, events. Shared by every backend; needs no torch."""
