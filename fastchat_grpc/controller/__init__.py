"""The controller: registry, dispatch, relay."""
