"""Models: finding, fetching and loading them; tokenizers and chat templates."""
