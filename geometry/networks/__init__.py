"""Equivariant networks: one file each, all of them the tuple `geometry.network.Network`."""
