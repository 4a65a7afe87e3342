"""Stream processors: each a process of its own that folds topics and appends what it derives."""
