"""One file per comparison: ours and a named peer, alternately, in one process."""
