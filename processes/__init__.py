"""How this system runs processes: children, ports, logs, signals. The lowest floor: it imports nothing of ours."""
