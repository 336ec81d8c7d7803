"""Backends: the engines that a worker can host, behind one interface."""
