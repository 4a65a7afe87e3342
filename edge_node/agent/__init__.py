"""A node's control process: it folds the log, brings artifacts, and writes the board. It answers no request."""
