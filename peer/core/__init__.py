"""The training side of a peer as pure tensor code: no clock, no network, no files."""
