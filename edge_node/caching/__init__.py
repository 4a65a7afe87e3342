"""The caches of a worker: memory, then the region's Redis, then its own disk. What they hold is only ever a saving."""
