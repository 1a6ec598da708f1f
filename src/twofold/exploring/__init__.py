"""The page of a run, served on this machine, with what needs models: a text that the user types, read by both."""
