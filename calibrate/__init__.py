"""Floor 4: comparing traces, reports and the command line."""
