"""mlcdn: a CDN for machine-learning models. The command line, the local network and the client library."""
