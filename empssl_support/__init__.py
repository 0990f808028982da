"""What the method needs and need not explain: data, runs, processes, flags, compiled ops."""
