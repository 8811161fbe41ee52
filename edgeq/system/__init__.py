"""Handle files, the cache, child processes, environments and the host machine for every stage."""
