"""What several papers use: protocol, loop, checkpoints, mesh, metrics. Imports no paper."""
